"""Quantized weights to floats on a GPU: one kernel that reads the integers once and writes the floats once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from teal.kernels.formats.packing import Weight
from teal.kernels.gemv.gather import rounded

BLOCK_ROWS = 8
BLOCK_GROUPS = 4


@triton.jit
def second_rows(p_refined, channels, K, E, steps):
    """The row that refines each channel, and whether there is one: refined [E] rises and is halved steps times."""
    low = tl.zeros_like(channels)
    high = low + E
    for _ in range(steps):
        middle = (low + high) // 2
        below = tl.load(p_refined + middle, mask=middle < E, other=K) < channels
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return K + low, tl.load(p_refined + low, mask=low < E, other=-1) == channels


@triton.jit
def dequantize_kernel(
    p_values, stride, p_scale, p_zero, p_refined, stride_scale, p_out, K, GROUPS, E, steps,
    BITS: tl.constexpr, GROUP_N: tl.constexpr, GROUP_K: tl.constexpr, REFINED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = 8 if BITS == 4 else 1  # integers of a word, or the one of a byte
    WORDS: tl.constexpr = GROUP_N // PARTS
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    w = tl.arange(0, BLOCK_GROUPS * WORDS)
    groups = tl.program_id(1) * BLOCK_GROUPS + w // WORDS
    inside = (rows < K)[:, None] & (groups < GROUPS)[None, :]
    column = groups * GROUP_N + w % WORDS
    at_scale = rows[:, None] * stride_scale + groups[None, :]
    if GROUP_K:
        at_scale = (rows // GROUP_K)[:, None] * stride_scale + column[None, :]
    scale = tl.load(p_scale + at_scale, mask=inside, other=0.0).to(tl.float32)
    row = rows[:, None].to(tl.int64)
    words = (groups * WORDS + w % WORDS)[None, :]
    value = tl.load(p_values + row * stride + words, mask=inside, other=0)
    p_out += row * GROUPS * GROUP_N + column[None, :]
    dtype = p_out.dtype.element_ty
    if BITS == 8:
        tl.store(p_out, rounded(value.to(tl.float32) * scale, dtype), mask=inside)
    else:
        zero = tl.load(p_zero + at_scale, mask=inside, other=0).to(tl.float32)
        if REFINED:
            second, found = second_rows(p_refined, rows, K, E, steps)
            refines = inside & found[:, None]
            at_rest = second[:, None] * stride_scale + groups[None, :]
            rest = tl.load(p_values + second[:, None].to(tl.int64) * stride + words, mask=refines, other=0)
            rest_scale = tl.load(p_scale + at_rest, mask=refines, other=0.0).to(tl.float32)
            rest_zero = tl.load(p_zero + at_rest, mask=refines, other=0).to(tl.float32)
        for j in tl.static_range(8):
            if GROUP_K:  # scales of the j-th columns
                scale = tl.load(p_scale + at_scale + j * WORDS, mask=inside, other=0.0).to(tl.float32)
                zero = tl.load(p_zero + at_scale + j * WORDS, mask=inside, other=0).to(tl.float32)
            y = (((value >> (4 * j)) & 15).to(tl.float32) - zero) * scale
            if REFINED:
                y += (((rest >> (4 * j)) & 15).to(tl.float32) - rest_zero) * rest_scale
            tl.store(p_out + j * WORDS, rounded(y, dtype), mask=inside)


def launch(
    values: Tensor, scales: Tensor, zeros: Tensor | None, refined: Tensor | None = None, out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """As packing.dequantize, also of some columns of a larger weight, whose rows are not side by side.

    out: where to put it. Raises ValueError for other strides, and for an out of another shape.
    """
    if values.stride(1) != 1 or scales.stride(1) != 1:
        raise ValueError(f"values have strides {values.stride()}, scales {scales.stride()}: rows must be contiguous")
    if zeros is not None and zeros.stride() != scales.stride():
        raise ValueError(f"zeros have strides {zeros.stride()}, scales {scales.stride()}: expected the same")
    weight = Weight(values, scales, zeros, refined)
    K, N, group_size = weight.K, weight.N, weight.group_size
    E, groups = values.shape[0] - K, N // group_size
    if out is None:
        out = torch.empty(K, N, dtype=scales.dtype, device=values.device)
    if out.shape != (K, N) or out.dtype != scales.dtype or not out.is_contiguous():
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}: expected contiguous {scales.dtype} [{K}, {N}]")
    dequantize_kernel[(triton.cdiv(K, BLOCK_ROWS), triton.cdiv(groups, BLOCK_GROUPS))](
        values, values.stride(0), scales, zeros, refined, scales.stride(0), out, K, groups, E, E.bit_length(),
        BITS=weight.bits, GROUP_N=group_size, GROUP_K=weight.channels, REFINED=refined is not None,
        BLOCK_ROWS=BLOCK_ROWS, BLOCK_GROUPS=BLOCK_GROUPS, num_warps=4,
        enable_fp_fusion=False,  # a weight's two parts are each rounded before they are added
    )  # fmt: skip
    return out
