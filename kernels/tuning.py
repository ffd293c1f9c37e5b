"""Tile sizes of the sparse GEMV, by shape."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class GemvTile:
    """A program sums lanes * unroll rows at a time over block_n columns; the input channels are dealt to splits programs."""

    block_n: int
    lanes: int
    unroll: int
    splits: int
    num_warps: int = 4


def gemv_tile(K: int, N: int, B: int, device: torch.device, dtype: torch.dtype) -> GemvTile:
    if B == 1:
        return GemvTile(512, 2, 8, 32)
    return GemvTile(128, 4, 8, 16)
