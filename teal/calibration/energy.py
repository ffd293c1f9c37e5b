"""How much each input channel of a projection matters: the energy that it carries where gradients are.

An error D in the weight changes the projection's output by x D. Let g be the gradient of the log-likelihood at the
output, for labels drawn from the model. To second order the error costs half the mean of (x D g)^2 nats a token
(Martens 2014, section 9). Where channels and outputs count as independent, channel i's share is
E[x_i^2 |g|^2] |D_i|^2 / 2N. Tokens count by their own gradients: massive activations of first tokens, which hardly move
the loss, do not rule the sum.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from teal.calibration.sensitivity import HEAD_TOKENS, BackwardPass, pieces_of, probes
from teal.model import Projection, Transformer
from teal.progress import progress

ENERGY_TOKENS = 4096  # at most, spread over the text: means of squares need no more


@dataclass(slots=True)
class ChannelEnergy:
    """Of one projection: inputs fp32 [K], the mean of x_i^2 over tokens, each counted by the mean of its g^2.

    gradients: E[g^2], as a mean over outputs or of each of them, fp32 [N].
    """

    inputs: Tensor
    gradients: float | Tensor


@dataclass(slots=True)
class _Sums:
    """Over tokens of one projection: of g^2 as a mean over outputs, fp32 [], and of x^2 times that, fp32 [K]."""

    gradients: Tensor = field(default_factory=lambda: torch.zeros(()))
    inputs: Tensor = field(default_factory=lambda: torch.zeros(()))
    tokens: int = 0

    def add(self, squares: Tensor, gradient: Tensor) -> None:
        """Some tokens more, of x^2 fp32 [T, K] and g [T, N]."""
        weights = gradient.float().square().mean(1)
        self.gradients = self.gradients + weights.sum()
        self.inputs = self.inputs + weights @ squares
        self.tokens += len(weights)

    def energy(self) -> ChannelEnergy:
        """In host memory."""
        inputs = self.inputs / self.gradients.clamp(min=torch.finfo(torch.float32).tiny)
        return ChannelEnergy(inputs.cpu(), float(self.gradients) / self.tokens)


def _block_energies(backward: BackwardPass, i: int) -> dict[str, ChannelEnergy]:
    """Of block i, through which gradients go back."""
    sums: dict[str, _Sums] = defaultdict(_Sums)

    def note(p: Projection, x: Tensor, gradients: dict[str, Tensor], _: dict[str, Tensor]) -> None:
        squares = x.float().square()
        for name, gradient in gradients.items():
            sums[name].add(squares, gradient)

    with probes(backward.model.blocks[i], note):
        backward.through(i)
    return {name: own.energy() for name, own in sums.items()}


def channel_energies(model: Transformer, sequences: Tensor) -> list[dict[str, ChannelEnergy]]:
    """Of every projection of a model [layer][projection], from sequences int64 [S, L] of token ids."""
    backward = BackwardPass(model, sequences, ENERGY_TOKENS)
    backward.forward()
    found = [
        _block_energies(backward, i) for i in progress(range(len(model.blocks))[::-1], "measuring energies", "block")
    ]
    return found[::-1]


@torch.inference_mode()
def head_energy(model: Transformer, sequences: Tensor) -> ChannelEnergy:
    """Of the output head. E[g^2] of a token's logit is E[p(1 - p)], which no backward pass has to find."""
    device = model.device
    inputs = torch.zeros(model.config.hidden_size, device=device)
    gradients = torch.zeros(model.config.vocab_size, device=device)
    tokens = 0
    for ids in progress(pieces_of(sequences, ENERGY_TOKENS), "measuring the head", "sequence"):
        positions = torch.arange(len(ids), device=device)[None]
        hidden = model.hidden_states(ids[None].to(device), positions, model.new_cache(1, len(ids)))
        for normed in model.norm(hidden)[0].split(HEAD_TOKENS):
            logits, cap = model.unembed(normed), model.config.logit_softcap
            p = logits.softmax(-1)
            variances = p * (1 - p) * (1 if cap is None else (1 - (logits / cap).square()).square())
            inputs += variances.mean(1) @ normed.float().square()
            gradients += variances.sum(0)
            tokens += len(normed)
    return ChannelEnergy((inputs / gradients.mean()).cpu(), (gradients / tokens).cpu())
