"""Products with weights of GGUF's block types (formats/blocks.py), by compiled kernels on a CPU or torch's operations.

The kernels round an entry of x to 16 bits, relative to the largest of its group of channels (cpu/blocks.cpp). If x is
fp32 they round it to 24. Torch's operations take the weight in fp32.

With many rows a product takes floats of x's dtype, made of a tile of columns at a time: they stay in a cache. In bf16
a compiled kernel multiplies them too, if the processor can (cpu/block_matmul.cpp). If it has VNNI alone, entries of 16
bits are rounded as those of few rows (cpu/integer_matmul.cpp). Otherwise torch multiplies, in fp32: matmul.py says why.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from teal.kernels.cpu.native import native_kernels
from teal.kernels.formats.blocks import STRIP, Blocks, column, columns, dequantize
from teal.kernels.matmul import bf16_kernels, matmul
from teal.kernels.sparse_linear import drop_small

# With more rows a dense product with floats is as fast. 768 x 1536 in Q4_1, ms of a Zen 5 core in bf16:
#   rows       1      8      16     32
#   kernel     0.02   0.16   0.30   0.61
#   floats     0.46   0.49   0.53   0.60
KERNEL_ROWS = 24
# The same beside products by whole numbers, ms of two Xeon cores for 1536 x 8960 in Q4_K:
#   rows            6      9      12     24
#   few rows        2.3    2.8    3.6    7.1
#   whole numbers   1.3    1.9    1.9    3.0
INTEGER_KERNEL_ROWS = 5
# Weights in a tile of torch's products. 896 x 9728 in Q4_1 times 64 rows in bf16, ms of two Zen 5 cores. With floats
# that are kept it takes 1.47.
#   TILE       2^18   2^19   2^20   2^21
#   ms         2.46   2.01   1.81   1.67
TILE = 1 << 21


class Piece(NamedTuple):
    """Columns begin to end of a weight; begin is a multiple of STRIP."""

    weight: Blocks
    begin: int
    end: int


def block_linear(x: Tensor, weight: Blocks, threshold: float = 0.0) -> Tensor:
    """x [B, K] times the weight [K, N], with entries |x| below threshold taken as 0: fp32 [B, N].

    The threshold is rounded to x's dtype before. Raises ValueError for an x of other channels.
    """
    if x.shape[-1] != weight.K:
        raise ValueError(f"x has {x.shape[-1]} channels: expected {weight.K}")
    native = native_kernels() if len(x) <= KERNEL_ROWS else None
    if native is not None:
        return native.block_product(x.contiguous(), weight.data, _numbers(weight), weight.N, threshold)
    kept = drop_small(x, torch.tensor(threshold).to(x.dtype)) if threshold else x
    return kept.float() @ block_floats([weight], torch.float32)


def kernel_rows(dtype: torch.dtype) -> int:
    """Most rows of a dtype for which block_linear is as fast as block_matmul."""
    return INTEGER_KERNEL_ROWS if _compiled_matmul(dtype) == "integer_matmul" else KERNEL_ROWS


def block_matmul(x: Tensor, parts: Sequence[Blocks]) -> Tensor:
    """x [B, K] times weights [K, N] side by side: [B, sum of N] in x's dtype. A compiled kernel rounds them to it, too.

    Without gradients of x only a tile's floats are held at once.
    """
    if x.requires_grad:  # the backward pass takes all of them
        return matmul(x, block_floats(parts, x.dtype))
    if (name := _compiled_matmul(x.dtype)) is not None:
        multiply = getattr(native_kernels(), name)
        y, x = x.new_empty(len(x), sum(part.N for part in parts)), x.contiguous()
        for part, to in zip(parts, y.split([part.N for part in parts], dim=1), strict=True):
            multiply(x, part.data, _numbers(part), to)
        return y
    wide = x.float()
    return torch.cat([(wide @ _floats(pieces, torch.float32)).to(x.dtype) for pieces in tiles(parts)], dim=1)


@functools.cache  # asking for an op that is not there takes 6 us
def _compiled_matmul(dtype: torch.dtype) -> str | None:
    """The compiled op for many rows of a dtype, if the processor has one that is faster than torch's in fp32."""
    if dtype == torch.bfloat16 and bf16_kernels() is not None:
        return "block_matmul"
    return "integer_matmul" if dtype.itemsize == 2 and hasattr(native_kernels(), "integer_matmul") else None


def tiles(parts: Sequence[Blocks]) -> Iterator[list[Piece]]:
    """The columns of weights [K, N] side by side, in order, by TILE weights at most or a strip of columns."""
    most = max(STRIP, TILE // parts[0].K)
    pieces, room = [], most
    for part in parts:
        begin = 0
        while begin < part.N:
            end = min(part.N, begin + room // STRIP * STRIP)
            if end > begin:
                pieces.append(Piece(part, begin, end))
                room -= end - begin
            if end < part.N:
                yield pieces
                pieces, room = [], most
            begin = end
    yield pieces


def block_floats(parts: Sequence[Blocks], dtype: torch.dtype) -> Tensor:
    """The weights [K, N] side by side: one weight in floats, rounded once from fp32."""
    return _floats([Piece(part, 0, part.N) for part in parts], dtype)


def _floats(pieces: Sequence[Piece], dtype: torch.dtype) -> Tensor:
    """As block_floats, of pieces of weights."""
    if (native := native_kernels()) is None:
        return torch.cat([dequantize(columns(*piece)).to(dtype) for piece in pieces], dim=1)
    widths = [end - begin for _, begin, end in pieces]
    found = torch.empty(pieces[0].weight.K, sum(widths), dtype=dtype)
    for (weight, begin, _), to in zip(pieces, found.split(widths, dim=1), strict=True):
        native.block_floats(weight.data, _numbers(weight), weight.N, begin, to)
    return found


def block_columns(weight: Blocks, chosen: Tensor) -> Tensor:
    """The columns chosen, int64 [n], of a weight: fp32 [n, K]. Raises ValueError for one that is not there."""
    if (native := native_kernels()) is not None:
        return native.block_columns(weight.data, _numbers(weight), weight.K, weight.N, chosen)
    return torch.stack([column(weight, n) for n in chosen.tolist()])


def _numbers(weight: Blocks) -> list[int]:
    """Its type as the kernels take it."""
    found = weight.type
    return [found.bits, found.offset, found.group, int(found.has_minima), int(found.nested)]
