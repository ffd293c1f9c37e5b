"""The sums of gather.py for weights of 8 and 4 bits (packing.py): integers become floats without a conversion instruction.

A conversion runs at a quarter of the rate of other arithmetic. Instead the bits of an integer are put into the mantissa
of a float: 1 + q/16 or 1 + (q + 128)/256, exactly. With a = 16 (256) times an entry of x times the scale of a group,
a (1 + q/16) is wanted plus 16 times the entry and scale; what is too much is the same for all weights of a group and
row, is summed once, and taken off at the end, together with the zero point. That leaves a shift, a logical operation
and a multiply-add for each weight.
"""

import triton
import triton.language as tl

from kernels.gather import INTERPRETED, keep_loads_above

ONE = tl.constexpr(0x3F800000)  # the bits of 1.0
FLIP_SIGNS = tl.constexpr(-0x7F7F7F80)  # 0x80808080: int8 q to q + 128


@triton.jit
def load_groups(
    p_weight, stride, p_scale, p_zero, groups_of_row, index, start, end,
    BITS: tl.constexpr, GROUP_N: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Words [R, GROUPS, WORDS] of the rows index [R] from column start on, scales [R, GROUPS] and zeros likewise.

    Groups from column end on have scale 0. zeros is the scales again for 8 bits, which have none.
    """
    WORDS: tl.constexpr = GROUP_N * BITS // 32
    g = tl.arange(0, GROUPS)
    inside = start + g * GROUP_N < end
    words = start * BITS // 32 + g[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    word = tl.load(
        p_weight + (index.to(tl.int64) * stride)[:, None, None] + words[None, :, :],
        mask=inside[None, :, None], other=0, eviction_policy="evict_first",
    )  # fmt: skip
    at = index[:, None] * groups_of_row + (start // GROUP_N + g)[None, :]
    scale = tl.load(p_scale + at, mask=inside[None, :], other=0.0).to(tl.float32)
    zero = scale
    if BITS == 4:
        zero = tl.load(p_zero + at, mask=inside[None, :], other=0)
        zero = ((zero.to(tl.int32) << 19) | ONE).to(tl.float32, bitcast=True)  # 1 + zero/16
    return word, scale, zero


@triton.jit
def mantissas(word, BITS: tl.constexpr):
    """Words [R, GROUPS, WORDS] -> floats, in the order of their columns: [R, GROUPS, 8, WORDS] or [R, GROUPS, WORDS, 4]."""
    if BITS == 4:
        shift = (4 * tl.arange(0, 8))[None, None, :, None]
        bits = ((word[:, :, None, :] >> shift) << 19) & 0x780000
    else:
        shift = (8 * tl.arange(0, 4))[None, None, None, :]
        bits = (((word ^ FLIP_SIGNS)[:, :, :, None] >> shift) << 15) & 0x7F8000
    return (bits | ONE).to(tl.float32, bitcast=True)


@triton.jit
def excess(zero, BITS: tl.constexpr):
    """What mantissas() give for the integer that stands for 0."""
    return zero if BITS == 4 else tl.zeros_like(zero) + 1.5


@triton.jit
def sum_one_row_quantized(
    p_weight, stride, p_scale, p_zero, groups_of_row, p_index, p_value, count, start, end,
    UNROLL: tl.constexpr, BLOCK_N: tl.constexpr, BITS: tl.constexpr, GROUP_N: tl.constexpr,
):  # fmt: skip
    """As gather.sum_one_row, with UNROLL rows of weights a step."""
    GROUPS: tl.constexpr = BLOCK_N // GROUP_N
    PARTS: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = GROUP_N // PARTS
    SHIFTED: tl.constexpr = 1 << BITS
    steps = tl.arange(0, UNROLL)
    total = tl.zeros([GROUPS, PARTS, WORDS] if BITS == 4 else [GROUPS, WORDS, PARTS], tl.float32)
    too_much = tl.zeros([GROUPS], tl.float32)
    index = tl.load(p_index + steps)
    word, scale, zero = load_groups(
        p_weight, stride, p_scale, p_zero, groups_of_row, index, start, end, BITS, GROUP_N, GROUPS
    )
    index = tl.load(p_index + UNROLL + steps)
    for i in range(0, count, UNROLL):
        next_word, next_scale, next_zero = load_groups(
            p_weight, stride, p_scale, p_zero, groups_of_row, index, start, end, BITS, GROUP_N, GROUPS
        )
        index = tl.load(p_index + tl.minimum(i + 2 * UNROLL, count) + steps)
        keep_loads_above()
        a = (tl.load(p_value + i + steps) * SHIFTED)[:, None] * scale
        total += tl.sum(a[:, :, None, None] * mantissas(word, BITS), axis=0)
        too_much += tl.sum(a * excess(zero, BITS), axis=0)
        word, scale, zero = next_word, next_scale, next_zero
    return tl.reshape(total - too_much[:, None, None], [1, BLOCK_N])


@triton.jit
def sum_rows_quantized(
    p_weight, stride, p_scale, p_zero, groups_of_row, p_index, p_value, count, B, start, end,
    R: tl.constexpr, STEP: tl.constexpr, BLOCK_N: tl.constexpr, BITS: tl.constexpr, GROUP_N: tl.constexpr,
):  # fmt: skip
    """As gather.sum_rows. Weights are rounded to the scales' dtype."""
    GROUPS: tl.constexpr = BLOCK_N // GROUP_N
    SHIFTED: tl.constexpr = 1 << BITS
    dtype = p_scale.dtype.element_ty
    rows = tl.arange(0, 16)[:, None]
    lanes = tl.arange(0, STEP)
    total = tl.zeros([16, BLOCK_N], tl.float32)
    for i in range(0, count, STEP):
        index = tl.load(p_index + i + lanes)
        value = tl.load(p_value + rows * R + (i + lanes)[None, :], mask=rows < B, other=0.0)
        word, scale, zero = load_groups(
            p_weight, stride, p_scale, p_zero, groups_of_row, index, start, end, BITS, GROUP_N, GROUPS
        )
        integers = mantissas(word, BITS) - excess(zero, BITS)[:, :, None, None]
        weight = tl.reshape(integers * (scale * SHIFTED)[:, :, None, None], [STEP, BLOCK_N])
        if INTERPRETED:
            total = tl.dot(value, weight, total, input_precision="ieee")
        else:
            total = tl.dot(value.to(dtype), weight.to(dtype), total, input_precision="ieee")
    return total
