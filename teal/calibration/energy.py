"""How much each input channel of a projection matters: the energy that it carries where gradients are.

An error D in the weight changes the projection's output by x D. Let g be the gradient of the log-likelihood at the
output, for labels drawn from the model. To second order the error costs half the mean of (x D g)^2 nats a token
(Martens 2014, section 9). Where channels and outputs count as independent, channel i's share is
E[x_i^2 |g|^2] |D_i|^2 / 2N. Tokens count by their own gradients: massive activations of first tokens, which hardly move
the loss, do not rule the sum.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from teal.calibration.sensitivity import GRADIENT_LENGTH, HEAD_TOKENS, _backward
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


class _Sums:
    """Sums over tokens at one module: of g^2 as a mean over each projection's outputs, and of x^2 times that."""

    def __init__(self, projection: Projection, device: torch.device) -> None:
        self.projection = projection
        self.inputs = torch.zeros(len(projection.names), projection.in_features, device=device)
        self.gradients = torch.zeros(len(projection.names), device=device)
        self.tokens = 0

    def note(self, x: Tensor, y: Tensor) -> None:
        """Add a forward pass, x [1, T, K] to y [1, T, N], as soon as the gradient of y is known."""
        squares = x.detach()[0].float().square()
        y.register_hook(lambda gradient: self._add(squares, gradient[0].float()))

    def _add(self, squares: Tensor, gradient: Tensor) -> None:
        parts = gradient.square().split(self.projection.sizes, dim=1)
        weights = torch.stack([part.mean(1) for part in parts])  # [projections, T]
        self.inputs += weights @ squares
        self.gradients += weights.sum(1)
        self.tokens += len(squares)

    def energies(self) -> dict[str, ChannelEnergy]:
        """By the name of each stacked projection, in host memory."""
        inputs = (self.inputs / self.gradients.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).cpu()
        gradients = (self.gradients / self.tokens).tolist()
        return {name: ChannelEnergy(*own) for name, *own in zip(self.projection.names, inputs, gradients, strict=True)}


@contextmanager
def _noting(model: Transformer) -> Iterator[list[list[_Sums]]]:
    """Within the block every projection module adds up what passes through it [layer][module]."""
    device = model.embedding.weight.device
    found = [[_Sums(p, device) for p in block.projections()] for block in model.blocks]
    handles = [
        block.get_submodule(sums.projection.module).register_forward_hook(lambda _, x, y, s=sums: s.note(x[0], y))
        for block, own in zip(model.blocks, found, strict=True)
        for sums in own
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def channel_energies(model: Transformer, sequences: Tensor) -> list[dict[str, ChannelEnergy]]:
    """Of every projection of a float model [layer][projection], from sequences int64 [S, L] of token ids."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad(), _noting(model) as found:
        for ids in progress(_pieces(sequences), "measuring energies", "sequence"):
            _backward(model, ids.clone(), generator)
    return [{name: energy for sums in own for name, energy in sums.energies().items()} for own in found]


@torch.inference_mode()
def head_energy(model: Transformer, sequences: Tensor) -> ChannelEnergy:
    """Of the output head. E[g^2] of a token's logit is E[p(1 - p)], which no backward pass has to find."""
    device = model.embedding.weight.device
    inputs = torch.zeros(model.config.hidden_size, device=device)
    gradients = torch.zeros(model.config.vocab_size, device=device)
    tokens = 0
    for ids in progress(_pieces(sequences), "measuring the head", "sequence"):
        positions = torch.arange(len(ids), device=device)[None]
        hidden = model.hidden_states(ids[None].to(device), positions, model.new_cache(1, len(ids)))
        for normed in model.norm(hidden)[0].split(HEAD_TOKENS):
            p = model.lm_head(normed).softmax(-1)
            variances = p * (1 - p)
            inputs += variances.mean(1) @ normed.float().square()
            gradients += variances.sum(0)
            tokens += len(normed)
    return ChannelEnergy((inputs / gradients.mean()).cpu(), (gradients / tokens).cpu())


def _pieces(sequences: Tensor) -> list[Tensor]:
    """Some of sequences [S, L], cut so that gradients of a piece fit: int64 [at most GRADIENT_LENGTH] each."""
    length = min(GRADIENT_LENGTH, sequences.shape[1])
    pieces = sequences[:, : sequences.shape[1] // length * length].reshape(-1, length)
    count = min(len(pieces), max(1, ENERGY_TOKENS // length))
    return list(pieces[torch.linspace(0, len(pieces) - 1, count).round().long()])
