"""Device functions that write and read vectors of a KV cache, in floats or in 8 bits (kv_int8.py)."""

import triton
import triton.language as tl

from teal.kernels.formats.kv_int8 import LARGEST
from teal.kernels.gemv.gather import rounded

INT8_LARGEST = tl.constexpr(float(LARGEST))


@triton.jit
def nearest_integer(x):
    """fp32 x rounded to an integer, ties to even, for |x| below 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def store_vector(p, x, y, HALF: tl.constexpr, BLOCK_H: tl.constexpr, SCALE_AT: tl.constexpr, DTYPE: tl.constexpr):
    """Put both halves [1, BLOCK_H] of a key or value into the cache at p; returns what the cache gives back."""
    d = tl.arange(0, BLOCK_H)[None, :]
    if SCALE_AT > 0:
        bad = tl.max(tl.where((x * 0 != 0) | (y * 0 != 0), 1, 0)) > 0  # an Inf or NaN: all becomes NaN
        scale = tl.max(tl.maximum(tl.abs(x), tl.abs(y))) / INT8_LARGEST
        divisor = tl.where(bad | (scale == 0), 1.0, scale)
        x, y = nearest_integer(tl.where(bad, 0.0, x / divisor)), nearest_integer(tl.where(bad, 0.0, y / divisor))
        tl.store(p + d, x.to(tl.int8), mask=d < HALF)
        tl.store(p + HALF + d, y.to(tl.int8), mask=d < HALF)
        scale = tl.where(bad, float("nan"), scale)
        tl.store((p + SCALE_AT).to(tl.pointer_type(tl.float32)), scale)
        x, y = rounded(x * scale, DTYPE), rounded(y * scale, DTYPE)
    else:
        tl.store(p + d, x, mask=d < HALF)
        tl.store(p + HALF + d, y, mask=d < HALF)
    return x, y


@triton.jit
def load_positions(
    p, i, end, stride, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, SCALE_AT: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Both halves [BLOCK_P, BLOCK_H] of the cache rows from position i on, in DTYPE; zeros from end on."""
    position = i + tl.arange(0, BLOCK_P)
    d = tl.arange(0, BLOCK_H)[None, :]
    offsets = position[:, None].to(tl.int64) * stride + d
    inside = (position < end)[:, None] & (d < HALF)
    low = tl.load(p + offsets, mask=inside, other=0)
    high = tl.load(p + offsets + HALF, mask=inside, other=0)
    if SCALE_AT > 0:
        p_scale = (p + position.to(tl.int64) * stride + SCALE_AT).to(tl.pointer_type(tl.float32))
        scale = tl.load(p_scale, mask=position < end, other=0.0)[:, None]
        low = rounded(low.to(tl.float32) * scale, DTYPE).to(DTYPE)
        high = rounded(high.to(tl.float32) * scale, DTYPE).to(DTYPE)
    return low, high
