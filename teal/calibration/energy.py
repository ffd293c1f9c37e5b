"""How much each input channel of a projection matters: the energy that it carries, and that of the gradients.

An error D in the weight changes the projection's output by x D. To second order that costs half the mean of (x D g)^2
nats a token, with g the gradient of the log-likelihood at the output, for labels drawn from the model (Martens 2014,
section 9). Where channels and outputs count as independent, a channel's share is E[x_i^2] E[g^2] |D_i|^2 / 2.
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
    """Of one projection: inputs fp32 [K], E[x_i^2], and gradients, E[g^2] as a mean over outputs or of each [N]."""

    inputs: Tensor
    gradients: float | Tensor


class _Sums:
    """Sums of squares at one module: of its inputs [K] and of the gradients of each output [N]."""

    def __init__(self, projection: Projection) -> None:
        self.projection = projection
        self.inputs: Tensor | float = 0.0
        self.gradients: Tensor | float = 0.0
        self.tokens = 0

    def note(self, x: Tensor, y: Tensor) -> None:
        """Add a forward pass, x [1, T, K] to y [1, T, N], and what comes back through y."""
        self.inputs = self.inputs + _squares(x.detach())
        self.tokens += x.shape[1]
        y.register_hook(self._note_gradient)

    def _note_gradient(self, gradient: Tensor) -> None:
        self.gradients = self.gradients + _squares(gradient)

    def energies(self) -> dict[str, ChannelEnergy]:
        """By the name of each stacked projection, in host memory."""
        p, inputs, gradients = self.projection, self.inputs, self.gradients
        assert isinstance(inputs, Tensor) and isinstance(gradients, Tensor)
        inputs = (inputs / self.tokens).cpu()
        parts = zip(p.names, gradients.split(p.sizes), strict=True)
        return {name: ChannelEnergy(inputs, float(part.mean()) / self.tokens) for name, part in parts}


def _squares(t: Tensor) -> Tensor:
    """Sums over tokens of squares, [1, T, C] -> fp32 [C]."""
    return t[0].float().square().sum(0)


@contextmanager
def _noting(model: Transformer) -> Iterator[list[list[_Sums]]]:
    """Within the block every projection module adds up what passes through it [layer][module]."""
    found = [[_Sums(p) for p in block.projections()] for block in model.blocks]
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
    pieces = _pieces(sequences)
    inputs = torch.zeros(model.config.hidden_size, device=device)
    gradients = torch.zeros(model.config.vocab_size, device=device)
    for ids in progress(pieces, "measuring the head", "sequence"):
        tokens = ids[None].to(device)
        positions = torch.arange(len(ids), device=device)[None]
        normed = model.norm(model.hidden_states(tokens, positions, model.new_cache(1, len(ids))))
        inputs += _squares(normed)
        for part in normed.split(HEAD_TOKENS, dim=1):
            p = model.lm_head(part)[0].softmax(-1)
            gradients += (p * (1 - p)).sum(0)
    count = sum(map(len, pieces))
    return ChannelEnergy((inputs / count).cpu(), (gradients / count).cpu())


def _pieces(sequences: Tensor) -> list[Tensor]:
    """Some of sequences [S, L], cut so that gradients of a piece fit: int64 [at most GRADIENT_LENGTH] each."""
    length = min(GRADIENT_LENGTH, sequences.shape[1])
    pieces = sequences[:, : sequences.shape[1] // length * length].reshape(-1, length)
    count = min(len(pieces), max(1, ENERGY_TOKENS // length))
    return list(pieces[torch.linspace(0, len(pieces) - 1, count).round().long()])
