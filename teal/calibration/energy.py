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

from teal.calibration.sensitivity import HEAD_TOKENS, BackwardPass, pieces_of
from teal.model import Block, Projection, Transformer
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
def _noting(block: Block, device: torch.device) -> Iterator[list[_Sums]]:
    """Within the context every projection module of block adds up what passes through it."""
    found = [_Sums(p, device) for p in block.projections()]
    handles = [
        block.get_submodule(sums.projection.module).register_forward_hook(lambda _, x, y, s=sums: s.note(x[0], y))
        for sums in found
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def channel_energies(model: Transformer, sequences: Tensor) -> list[dict[str, ChannelEnergy]]:
    """Of every projection of a float model [layer][projection], from sequences int64 [S, L] of token ids."""
    backward = BackwardPass(model, sequences, ENERGY_TOKENS)
    backward.forward()
    energies: list[dict[str, ChannelEnergy]] = [{} for _ in model.blocks]
    for i in progress(range(len(model.blocks))[::-1], "measuring energies", "block"):
        with torch.inference_mode(False), _noting(model.blocks[i], model.device) as found:
            backward.through(i)
        energies[i] = {name: energy for sums in found for name, energy in sums.energies().items()}
    return energies


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
            p = model.lm_head(normed).softmax(-1)
            variances = p * (1 - p)
            inputs += variances.mean(1) @ normed.float().square()
            gradients += variances.sum(0)
            tokens += len(normed)
    return ChannelEnergy((inputs / gradients.mean()).cpu(), (gradients / tokens).cpu())
