"""The sums of gather.py for weights of 8 and 4 bits (packing.py): integers become floats without a conversion.

A conversion runs at a quarter of the rate of other arithmetic. Instead the bits of an integer become the mantissa of a
float, exactly:

    4 bits   q         float 1 + q/16              sum of  a (1 + q/16)          a = 16 x scale
    8 bits   q + 128   float 1 + (q + 128)/256     sum of  a (1 + (q + 128)/256)  a = 256 x scale
    wanted   (q - zero) scale x = a (mantissa - m)  m = mantissa of what stands for 0

The zero-point correction, the sum of a m, is the same for all weights of a group and row. It is summed once beside and
taken off at the end. That leaves a shift, a logical operation and a multiply-add for each weight.

Where the GPU has tensor cores and the groups fit, one row of 16-bit x goes to gather_tensor_core.py instead. Several
rows of bf16 go to gather_tensor_core_rows.py. What is here takes everything else: fp32, the smallest groups along the
output, several rows of fp16, and Triton's interpreter.
"""

import triton
import triton.language as tl

from teal.kernels.gemv.gather import INTERPRETED, keep_loads_above, let_next_start

ONE = tl.constexpr(0x3F800000)  # the bits of 1.0
FLIP_SIGNS = tl.constexpr(-0x7F7F7F80)  # 0x80808080: int8 q to q + 128


@triton.jit
def load_words(
    p_weight, stride, index, start, end, META: tl.constexpr
):  # fmt: skip
    """Words [R, BLOCK_W/4, 4] of the rows index [R] from column start on. Those from column end on are 0."""
    PARTS: tl.constexpr = 32 // META.BITS
    BLOCK_W: tl.constexpr = META.BLOCK_N // PARTS
    w = tl.arange(0, BLOCK_W // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    first = tl.multiple_of(start // PARTS, 4)  # start is a multiple of GROUP_N, at least 32
    inside = None if META.EVEN_N else (start + w * PARTS < end)[None, :, :]
    p_words = p_weight + (index.to(tl.int64) * stride)[:, None, None] + (first + w)[None, :, :]
    # Only the order of the axes over the threads follows from the 2: words first, then quads, rows within a thread.
    return tl.load(tl.max_contiguous(p_words, [1, 2, 4]), mask=inside, eviction_policy="evict_first")


@triton.jit
def load_scaled_words(
    p_weight, stride, p_scale, p_zero, groups_of_row, index, start, end, META: tl.constexpr,
):  # fmt: skip
    """load_words(), and of each four the scale and what stands for 0, both [R, BLOCK_W/4].

    What stands for 0 is what mantissa() gives for it.
    """
    BITS: tl.constexpr = META.BITS
    GROUP_N: tl.constexpr = META.GROUP_N
    word = load_words(p_weight, stride, index, start, end, META)
    QUADS: tl.constexpr = GROUP_N * BITS // 128  # to a group
    q = tl.arange(0, META.BLOCK_N * BITS // 128)
    g = tl.minimum(start // GROUP_N + q // QUADS, end // GROUP_N - 1)
    at = index[:, None] * groups_of_row + g[None, :]
    scale = tl.load(p_scale + at).to(tl.float32)
    zero = tl.zeros_like(scale) + 1.5
    if BITS == 4:
        zero = ((tl.load(p_zero + at).to(tl.int32) << 19) | ONE).to(tl.float32, bitcast=True)
    return word, scale, zero


@triton.jit
def mantissa(word, J: tl.constexpr, BITS: tl.constexpr):
    """The J-th integer of each word in a float: 1 + q/16, or 1 + (q + 128)/256 for words with FLIP_SIGNS applied."""
    LEFT: tl.constexpr = 23 - BITS - BITS * J  # to the top of the mantissa
    shifted = word << LEFT if LEFT >= 0 else word >> -LEFT
    bits = (shifted & (0x780000 if BITS == 4 else 0x7F8000)) | ONE
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def store_part(
    p_row, total, start, end, J: tl.constexpr, META: tl.constexpr
):  # fmt: skip
    """Write the sums [BLOCK_W/4, 4] of the J-th integers of all words to their columns of p_row."""
    BITS: tl.constexpr = META.BITS
    GROUP_N: tl.constexpr = META.GROUP_N
    WORDS: tl.constexpr = GROUP_N * BITS // 32
    w = tl.arange(0, META.BLOCK_N * BITS // 128)[:, None] * 4 + tl.arange(0, 4)[None, :]
    columns = start + (w // WORDS * GROUP_N + J * WORDS + w % WORDS if BITS == 4 else 4 * w + J)
    tl.store(p_row + columns, total, mask=columns < end)


@triton.jit
def add_four(sums, a, word, FIRST: tl.constexpr, BITS: tl.constexpr):
    """sums, four of [BLOCK_W/4, 4], plus a times the integers FIRST to FIRST + 3 of each word."""
    return (
        sums[0] + tl.sum(a * mantissa(word, FIRST, BITS), axis=0),
        sums[1] + tl.sum(a * mantissa(word, FIRST + 1, BITS), axis=0),
        sums[2] + tl.sum(a * mantissa(word, FIRST + 2, BITS), axis=0),
        sums[3] + tl.sum(a * mantissa(word, FIRST + 3, BITS), axis=0),
    )


@triton.jit
def store_one_row_quantized(
    p_weight, stride, p_scale, p_zero, groups_of_row, p_index, p_value, count, p_row, start, end,
    META: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As gather.sum_one_row, with LANES * UNROLL rows of weights a step, and store the sums in p_row.

    Each place of an integer in its word has a sum of its own, so that all arithmetic is where the words are.
    """
    BITS: tl.constexpr = META.BITS
    STEP: tl.constexpr = META.LANES * META.UNROLL
    BLOCK_W: tl.constexpr = META.BLOCK_N * BITS // 32
    SHIFTED: tl.constexpr = 1 << BITS
    steps = tl.arange(0, STEP)
    correction = tl.zeros([BLOCK_W // 4], tl.float32)
    nothing = tl.zeros([BLOCK_W // 4, 4], tl.float32)
    low = (nothing, nothing, nothing, nothing)  # of a word's first four integers
    high = low  # of its last four, of 4 bits
    index = tl.load(p_index + steps)
    word, scale, zero = load_scaled_words(p_weight, stride, p_scale, p_zero, groups_of_row, index, start, end, META)
    index = tl.load(p_index + STEP + steps)
    for i in range(0, count, STEP):
        next_word, next_scale, next_zero = load_scaled_words(
            p_weight, stride, p_scale, p_zero, groups_of_row, index, start, end, META
        )
        index = tl.load(p_index + tl.minimum(i + 2 * STEP, count) + steps)
        keep_loads_above()
        a = (tl.load(p_value + i + steps) * SHIFTED)[:, None] * scale
        correction += tl.sum(a * zero, axis=0)
        a = a[:, :, None]
        if BITS == 8:
            word = word ^ FLIP_SIGNS
        low = add_four(low, a, word, 0, BITS)
        if BITS == 4:
            high = add_four(high, a, word, 4, BITS)
        word, scale, zero = next_word, next_scale, next_zero
    let_next_start(PDL)
    correction = correction[:, None]
    for j in tl.static_range(4):
        store_part(p_row, low[j] - correction, start, end, j, META)
    if BITS == 4:
        for j in tl.static_range(4):
            store_part(p_row, high[j] - correction, start, end, 4 + j, META)


@triton.jit
def mantissas(word, BITS: tl.constexpr):
    """mantissa() of all integers in the order of their columns: [R, GROUPS, 8, WORDS] or [R, GROUPS, WORDS, 4]."""
    if BITS == 4:
        shift = (4 * tl.arange(0, 8))[None, None, :, None]
        bits = ((word[:, :, None, :] >> shift) << 19) & 0x780000
    else:
        shift = (8 * tl.arange(0, 4))[None, None, None, :]
        bits = (((word ^ FLIP_SIGNS)[:, :, :, None] >> shift) << 15) & 0x7F8000
    return (bits | ONE).to(tl.float32, bitcast=True)


@triton.jit
def sum_rows_quantized(
    p_weight, stride, p_scale, p_zero, groups_of_row, p_index, p_value, count, B, start, end, META: tl.constexpr,
):  # fmt: skip
    """As gather.sum_rows. Weights are rounded to the scales' dtype."""
    R: tl.constexpr = META.R
    STEP: tl.constexpr = META.LANES * META.UNROLL
    BITS: tl.constexpr = META.BITS
    BLOCK_N: tl.constexpr = META.BLOCK_N
    SHAPE: tl.constexpr = [STEP, BLOCK_N // META.GROUP_N, META.GROUP_N * BITS // 32]
    SHIFTED: tl.constexpr = 1 << BITS
    dtype = p_scale.dtype.element_ty
    rows = tl.arange(0, 16)[:, None]
    lanes = tl.arange(0, STEP)
    total = tl.zeros([16, BLOCK_N], tl.float32)
    for i in range(0, count, STEP):
        index = tl.load(p_index + i + lanes)
        value = tl.load(p_value + rows * R + (i + lanes)[None, :], mask=rows < B, other=0.0)
        word, scale, zero = load_scaled_words(p_weight, stride, p_scale, p_zero, groups_of_row, index, start, end, META)
        scale = tl.reshape(tl.broadcast_to((scale * SHIFTED)[:, :, None], word.shape), SHAPE)
        zero = tl.reshape(tl.broadcast_to(zero[:, :, None], word.shape), SHAPE)
        if BITS == 4:
            integers = mantissas(tl.reshape(word, SHAPE), BITS) - zero[:, :, None, :]
            weight = tl.reshape(integers * scale[:, :, None, :], [STEP, BLOCK_N])
        else:
            integers = mantissas(tl.reshape(word, SHAPE), BITS) - zero[:, :, :, None]
            weight = tl.reshape(integers * scale[:, :, :, None], [STEP, BLOCK_N])
        if INTERPRETED:
            total = tl.dot(value, weight, total, input_precision="ieee")
        else:
            total = tl.dot(value.to(dtype), weight.to(dtype), total, input_precision="ieee")
    return total


@triton.jit
def load_column_scales(p_scale, p_zero, group, K, N, columns, end, META: tl.constexpr):
    """Scales of a group of channels for these columns, and 128 + zero points, both fp32; 0 and 128 from column end on.

    A number past the last group stands for the last: a program of fewer channels has sums of 0 for it.
    """
    at = tl.minimum(group, K // META.GROUP_K - 1) * N + columns
    inside = columns < end
    scale = tl.load(p_scale + at, mask=inside, other=0.0).to(tl.float32)
    zero = tl.zeros_like(scale) + 128.0
    if META.BITS == 4:
        bits = tl.load(p_zero + at, mask=inside, other=0).to(tl.int32) << 16 | 0x43000000
        zero = bits.to(tl.float32, bitcast=True)
    return scale, zero


@triton.jit
def sum_rows_by_input(
    p_weight, stride, p_scale, p_zero, K, N, p_index, p_value, count, B, first, start, end, META: tl.constexpr,
):  # fmt: skip
    """As gather.sum_rows, for groups of GROUP_K input channels, of one row too: integers are summed group by group.

    The list is in the order of the channels, the first of which is first. GROUP_N columns are packed together.
    """
    R: tl.constexpr = META.R
    STEP: tl.constexpr = META.LANES * META.UNROLL
    BITS: tl.constexpr = META.BITS
    BLOCK_N: tl.constexpr = META.BLOCK_N
    GROUP_K: tl.constexpr = META.GROUP_K
    SHAPE: tl.constexpr = [STEP, BLOCK_N // META.GROUP_N, META.GROUP_N * BITS // 32]
    dtype = p_scale.dtype.element_ty
    rows = tl.arange(0, 16)[:, None]
    lanes = tl.arange(0, STEP)
    columns = start + tl.arange(0, BLOCK_N)
    listed = tl.arange(0, META.BLOCK_R)
    channel = tl.load(p_index + listed, mask=listed < count, other=K)
    total = tl.zeros([16, BLOCK_N], tl.float32)
    begin = count * 0
    for g in range(META.SPAN):
        group = first // GROUP_K + g
        stop = tl.sum((channel < tl.minimum((group + 1) * GROUP_K, K)).to(tl.int32), axis=0)
        sums = tl.zeros([16, BLOCK_N], tl.float32)
        values = tl.zeros([16], tl.float32)
        for i in range(begin, stop, STEP):
            entry = i + lanes
            index = tl.load(p_index + entry)
            value = tl.load(p_value + rows * R + entry[None, :], mask=(rows < B) & (entry < stop)[None, :], other=0.0)
            word = tl.reshape(load_words(p_weight, stride, index, start, end, META), SHAPE)
            integer = tl.reshape(mantissas(word, BITS) - (1.0 if BITS == 4 else 1.5), [STEP, BLOCK_N])
            if INTERPRETED:
                sums = tl.dot(value, integer, sums, input_precision="ieee")
            else:
                sums = tl.dot(value.to(dtype), integer.to(dtype), sums, input_precision="ieee")
            values += tl.sum(value, axis=1)
        scale, zero = load_column_scales(p_scale, p_zero, group, K, N, columns, end, META)
        total += ((1 << BITS) * sums - values[:, None] * (zero - 128.0)[None, :]) * scale[None, :]
        begin = stop
    return total
