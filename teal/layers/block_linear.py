"""Modules for weights of GGUF's block types, which stay as their file rounds them: projections, head and embedding.

A CPU's kernels read them (kernels/formats/blocks.py). Elsewhere such a checkpoint is read as floats.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from teal.kernels.block_linear import (
    KERNEL_ROWS,
    block_columns,
    block_floats,
    block_linear,
    block_matmul,
    kernel_rows,
)
from teal.kernels.formats.blocks import Blocks, sections, size_of
from teal.kernels.matmul import matmul
from teal.kernels.sparse_linear import drop_small
from teal.layers.phase import Phase, PhasedModule
from teal.model import OutputHead, Transformer


class BlockShape(NamedTuple):
    """The type of a weight [K, N]."""

    kind: str
    K: int
    N: int


class BlockWeight(nn.Module):
    """A weight [K, N] of parts side by side, each of a type of its own; unset until loading fills them.

    dtype: of the floats that it stands for elsewhere.
    """

    def __init__(self, shapes: Sequence[BlockShape], dtype: torch.dtype) -> None:
        super().__init__()
        self.shapes, self.dtype = tuple(shapes), dtype
        self.K, self.N = shapes[0].K, sum(shape.N for shape in shapes)
        self.kept: dict[torch.dtype, Tensor] | None = None  # floats, within floats_kept
        self.data = nn.ParameterList(
            nn.Parameter(torch.empty(size_of(*shape), dtype=torch.uint8), requires_grad=False) for shape in shapes
        )

    @property
    def parts(self) -> list[Blocks]:
        return [Blocks(*shape, data) for shape, data in zip(self.shapes, self.data, strict=True)]

    @property
    def device(self) -> torch.device:
        return self.data[0].device

    @property
    def scale_bytes(self) -> int:
        """Bytes of scales and minima: a dropped entry of x does not skip them."""
        return sum(part.nbytes for weight in self.parts for part in sections(weight)[1:])

    def sparse(self, x: Tensor, thresholds: Tensor, segments: Sequence[int]) -> Tensor:
        """As few, for any number of rows, in x's dtype: [B, N]."""
        if len(x) <= kernel_rows(x.dtype):
            return self.few(x, thresholds, segments).to(x.dtype)

        def product(part: int, limit: float) -> Tensor:
            return self._product(drop_small(x, torch.tensor(limit, dtype=x.dtype)), part)

        return self._by_segment(thresholds, segments, product)

    def few(self, x: Tensor, thresholds: Tensor, segments: Sequence[int]) -> Tensor:
        """x [B, K] times the weight as it is stored: fp32 [B, N]. thresholds [J] of |x| hold for segments' columns."""
        return self._by_segment(thresholds, segments, lambda part, limit: block_linear(x, self.parts[part], limit))

    def _by_segment(
        self, thresholds: Tensor, segments: Sequence[int], product: Callable[[int, float], Tensor]
    ) -> Tensor:  # fmt: skip
        """The columns of all segments, of what product gives for a part's number and a threshold."""
        found = []
        for part, limits in enumerate(self._limits(thresholds.tolist(), segments)):
            products = {limit: product(part, limit) for limit in {limit for _, limit in limits}}
            begin = 0
            for width, limit in limits:
                found.append(products[limit][:, begin : begin + width])
                begin += width
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def _product(self, x: Tensor, part: int | None = None) -> Tensor:
        """x [B, K] times the weight, or one part of it, in floats of x's dtype: [B, N] in this dtype."""
        if self.kept is None:
            return block_matmul(x, self.parts if part is None else [self.parts[part]])
        floats = self.floats(x.dtype)
        if part is not None:
            floats = floats.split([shape.N for shape in self.shapes], dim=1)[part]
        return matmul(x, floats)

    def _limits(self, thresholds: list[float], segments: Sequence[int]) -> list[list[tuple[int, float]]]:
        """Of each part, its widths and their thresholds."""
        left = list(zip(segments, thresholds, strict=True))
        found = []
        for shape in self.shapes:
            limits, room = [], shape.N
            while room:
                width, limit = left.pop(0)
                if width > room:
                    left.insert(0, (width - room, limit))
                limits.append((min(width, room), limit))
                room -= min(width, room)
            found.append(limits)
        return found

    def many(self, x: Tensor) -> Tensor:
        """x [..., K] times the weight, in x's dtype: [..., N]. Many rows take the weight in floats of it."""
        rows = x.reshape(-1, self.K)
        if len(rows) > kernel_rows(x.dtype):
            y = self._product(rows)
        else:
            y = torch.cat([block_linear(rows, part) for part in self.parts], dim=1).to(x.dtype)
        return y.view(*x.shape[:-1], self.N)

    def floats(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [K, N], rounded once from fp32."""
        dtype = dtype or self.dtype
        if self.kept is None:
            return block_floats(self.parts, dtype)
        if dtype not in self.kept:
            with torch.inference_mode(False):  # gradients may pass a product with it
                self.kept[dtype] = block_floats(self.parts, dtype)
        return self.kept[dtype]


@contextmanager
def floats_kept(model: nn.Module) -> Iterator[None]:
    """Within the context floats of a model's weights in blocks are made once, not at each call with many tokens.

    A calibration of the default model on a CPU then takes 12 s, not 41.
    """
    weights = [module for module in model.modules() if isinstance(module, BlockWeight)]
    for weight in weights:
        weight.kept = {}
    try:
        yield
    finally:
        for weight in weights:
            weight.kept = None


class BlockLinear(PhasedModule):
    """nn.Linear with a weight of GGUF's block types."""

    def __init__(self, linear: nn.Linear, shapes: Sequence[BlockShape]) -> None:
        super().__init__()
        self.weight = BlockWeight(shapes, linear.weight.dtype)
        self.bias = linear.bias
        self.thresholds = nn.Buffer(torch.zeros(1), persistent=False)  # keeps all
        self.segments = [self.weight.N]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        if self.state.phase is Phase.DECODE:
            rows = x.reshape(-1, self.weight.K)
            y = self.weight.sparse(rows, self.thresholds, self.segments).view(*x.shape[:-1], -1)
        else:
            y = self.weight.many(x)
        return y if self.bias is None else y + self.bias

    def dequantized(self) -> Tensor:
        """The weight [K, N] in floats."""
        return self.weight.floats()


class BlockHead(BlockLinear):
    """An output head with a weight of GGUF's block types. Its result is fp32, as OutputHead's is."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> fp32 [..., N]. Not the phase but the number of rows decides how."""
        rows = x.reshape(-1, self.weight.K)
        few = len(rows) <= KERNEL_ROWS
        y = self.weight.few(rows, self.thresholds, self.segments) if few else self.weight.many(rows.float())
        return y.view(*x.shape[:-1], -1)


class BlockEmbedding(nn.Module):
    """nn.Embedding whose tokens' vectors are the columns of a weight [C, V], as a head has them that may share it."""

    def __init__(self, shape: BlockShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = BlockWeight([shape], dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [...] -> fp32 [..., C]."""
        return block_columns(self.weight.parts[0], tokens.flatten()).view(*tokens.shape, -1)


def widen_blocks(model: Transformer) -> None:
    """Replace such modules by plain ones in place, with the floats that their weights stand for."""
    for block in model.blocks:
        for p in block.projections():
            module = block.get_submodule(p.module)
            if isinstance(module, BlockLinear):
                block.set_submodule(p.module, _plain(module, nn.Linear))
    shared = model.lm_head.weight is model.embedding.weight
    if isinstance(model.embedding, BlockEmbedding):
        model.embedding = nn.Embedding.from_pretrained(model.embedding.weight.floats().t().contiguous())
    if isinstance(model.lm_head, BlockHead):
        head = _plain(model.lm_head, OutputHead)
        head.weight = model.embedding.weight if shared else head.weight
        model.lm_head = head


def _plain(module: BlockLinear, kind: type[nn.Linear]) -> nn.Linear:
    weight = module.weight
    plain = kind(weight.K, weight.N, bias=False, device="meta")
    plain.weight = nn.Parameter(module.dequantized().t().contiguous(), requires_grad=False)
    plain.bias = module.bias
    return plain
