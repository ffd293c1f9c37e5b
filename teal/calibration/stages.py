"""One block of a model, run projection by projection over the activations of all sequences."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from teal.model import Block, Projection, Transformer


def weight_counts(projections: Iterable[Projection]) -> dict[str, int]:
    """How many weights each named projection has, by which a model's sparsity is counted."""
    return {name: size * p.in_features for p in projections for name, size in zip(p.names, p.sizes, strict=True)}


class Positions:
    """Where the tokens of sequences of one length stand: what depends on it is computed once for all blocks."""

    def __init__(self, model: Transformer, length: int, batch: int = 1) -> None:
        self.model = model
        with torch.inference_mode(False):  # gradients may pass what is multiplied by them
            self.positions = torch.arange(length, device=model.device).expand(batch, length)
            self.tensors = model.position_tensors(self.positions, length)

    def context(self, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What block i is called with beside x. The cache is new: gradients pass what a call writes into it."""
        batch, length = self.positions.shape
        cache = self.model.new_cache(batch, length, layers=1)
        return *self.tensors[i], self.positions, cache.k[0], cache.v[0]


class BlockStages:
    """One block of a model, run projection by projection over sequences of one length.

    A block is a chain of sublayers. Each begins with a norm, or what stands for it. The result of its last projection
    passes the sublayer's end, in some families a norm, and is added to the sublayer's input.
    """

    def __init__(self, positions: Positions, index: int) -> None:
        self.model, self.index = positions.model, index
        self.block = self.model.blocks[index]
        self.device = positions.positions.device
        self.context = positions.context(index)
        self.projections = self.block.projections()
        self.sizes = weight_counts(self.projections)

    def inputs(self, p: Projection, x: "Stream") -> "Stream":
        """The inputs of p for x, the residual stream [B, L, C] where p's sublayer begins."""
        return x.map(lambda part: self._input(p, part))

    def _input(self, p: Projection, x: Tensor) -> Tensor:
        normed = self.block.get_submodule(p.norm)(x)
        if p.input == "normed":
            return normed
        sublayer = self.block.get_submodule(p.module.rpartition(".")[0])
        with _identity(self.block, p.module):
            return sublayer(normed, *self.context) if p.input == "attended" else sublayer(normed)

    def after(self, p: Projection, x: "Stream", inputs: "Stream") -> "Stream":
        """The residual stream where the next projection's sublayer begins; inputs are those of p for x."""
        if not p.ends_sublayer:
            return x
        module, end = self.block.get_submodule(p.module), self.block.get_submodule(p.end)
        return x.map(lambda part, own: part + end(module(own)), inputs)

    def forward(self, x: Tensor) -> Tensor:
        """The whole block."""
        return self.block(x, *self.context)


@contextmanager
def _identity(block: Block, place: str) -> Iterator[None]:
    module = block.get_submodule(place)
    block.set_submodule(place, nn.Identity())
    try:
        yield
    finally:
        block.set_submodule(place, module)


class Stream:
    """Activations of all sequences, [1, L, C] each, on the device or, with offload, in host memory."""

    def __init__(self, parts: list[Tensor], device: torch.device, offload: bool) -> None:
        self.home = torch.device("cpu") if offload else device
        self.device = device
        self.parts = [part.to(self.home) for part in parts]

    @classmethod
    def embedded(cls, model: Transformer, sequences: Tensor, offload: bool) -> "Stream":
        """What the first block reads of sequences, token ids [N, L]."""
        device = model.device
        return cls([model.embed(row[None].to(device)) for row in sequences], device, offload)

    def map(self, function: Callable[..., Tensor], *others: "Stream") -> "Stream":
        """A stream of function(own part, parts of the others)."""
        rows = zip(self.parts, *(other.parts for other in others), strict=True)
        results = [function(*(t.to(self.device) for t in row)).to(self.home) for row in rows]
        return Stream(results, self.device, self.home != self.device)
