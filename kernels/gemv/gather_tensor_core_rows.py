"""The sums of gather_tensor_core.py for 2 to 8 rows of bf16 x: each row has columns of its own in the tensor cores' B.

The integers are made bf16 once for all rows of a pass. That is most of the work: four rows take about the time of one.
B has eight columns, and a row needs one for each group in a warp's columns, or of channels:

    groups              1                    2                          4
    columns 0..7 of B   rows 0 1 .. 7        rows 0 0 1 1 2 2 3 3       rows 0 0 0 0 1 1 1 1
    rows a pass         8                    4                          2

For more than four rows of two groups along the output gather_tensor_core_wide.py makes one pass.

There is no column left for what bf16 leaves of x times scale. With groups along the output the error is that of weights
rounded to bf16, 1e-3. With groups along the input B has x itself, exactly.
"""

import triton
import triton.language as tl

from teal.kernels.gemv.gather import let_next_start
from teal.kernels.gemv.gather_quantized import load_column_scales
from teal.kernels.gemv.gather_tensor_core import WARP_BYTES, from_lane, sum_tiles


@triton.jit
def four(a, b, c, d):
    """[T] each -> [T, 4]."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [a.shape[0], 4])


@triton.jit
def side_by_side(
    sums_0, sums_1, sums_2, sums_3, SIDE: tl.constexpr, Q: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """[T, 4]: a lane's sums in its SIDE-th column of B of the Q-th four neighbouring columns of weights.

    Of 4 bits these are the Q-th integers of its four words. Of 8 they are all integers of its Q-th word, a low and a
    high nibble each.
    """
    if BITS == 4:
        y = four(sums_0[2 * Q + SIDE], sums_1[2 * Q + SIDE], sums_2[2 * Q + SIDE], sums_3[2 * Q + SIDE])
    else:
        s = (sums_0, sums_1, sums_2, sums_3)[Q]
        y = four(
            s[SIDE] + 16.0 * s[2 + SIDE],
            s[4 + SIDE] + 16.0 * s[6 + SIDE],
            s[8 + SIDE] + 16.0 * s[10 + SIDE],
            s[12 + SIDE] + 16.0 * s[14 + SIDE],
        )
    return y


@triton.jit
def store_four_columns(
    y_0, y_1, x_0, x_1, p_rows, p_scale, p_zero, K, N, B, row, column, r, c, group, end,
    COLUMNS: tl.constexpr, Q: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    """Correct a lane's sums y_0 and y_1 [T, 4] in its two columns of B, and write them to p_rows.

    Columns of weights and Q are those of side_by_side; x_0 and x_1 [T, 1] are the corrections of the two columns of B.
    """
    BITS: tl.constexpr = META.BITS
    GROUP_K: tl.constexpr = META.GROUP_K
    WORDS: tl.constexpr = META.GROUP_N * BITS // 32
    w = column * BITS // 32 + 4 * r
    at = w // WORDS * META.GROUP_N + w % WORDS + Q * WORDS if BITS == 4 else 4 * (w + Q)
    columns = at[:, None] + tl.arange(0, 4)[None, :]
    if GROUP_K == 0:
        y_0 -= x_0 * (1.0 if BITS == 4 else 2304.0)
        y_1 -= x_1 * (1.0 if BITS == 4 else 2304.0)
    else:
        scale, zero = load_column_scales(p_scale, p_zero, group, K, N, columns, end, META)
        y_0 = scale * (y_0 - x_0 * (zero if BITS == 4 else 2304.0))
        if COLUMNS == 2:
            scale, zero = load_column_scales(p_scale, p_zero, group + 1, K, N, columns, end, META)
        y_1 = scale * (y_1 - x_1 * (zero if BITS == 4 else 2304.0))
    p_at = p_rows + columns
    if COLUMNS == 1:
        i = (row + 2 * c)[:, None]
        tl.store(p_at + i * N, y_0, mask=(i < B) & (columns < end))
        tl.store(p_at + (i + 1) * N, y_1, mask=(i + 1 < B) & (columns < end))
    else:
        i = (row + 2 * c // COLUMNS)[:, None]
        inside = (i < B) & (columns < end)
        if GROUP_K:
            y = y_0 + y_1
        else:  # that of the columns' own group, if this lane has it
            own = r * COLUMNS // 8
            y = tl.where((own % 2 == 0)[:, None], y_0, y_1)
            inside = inside & (own // 2 == c % (COLUMNS // 2))[:, None]
        tl.store(p_at + i * N, y, mask=inside)


@triton.jit
def store_rows_tensor_core(
    p_weight, stride, p_scale, p_zero, K, N, p_index, p_value, count, B, p_rows, first, start, end,
    META: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As store_one_row_tensor_core, for B rows of values [B, R] and of partial sums [B, N]."""
    BITS: tl.constexpr = META.BITS
    GROUP_N: tl.constexpr = META.GROUP_N
    GROUP_K: tl.constexpr = META.GROUP_K
    COLUMNS: tl.constexpr = META.SPAN if GROUP_K else WARP_BYTES * 8 // BITS // GROUP_N
    THREADS: tl.constexpr = META.BLOCK_N * BITS // 32
    lane = tl.arange(0, THREADS)
    r, c = lane % 32 // 4, lane % 4
    group = first // GROUP_K if GROUP_K else 0
    for row in range(0, B, 8 // COLUMNS):
        value_at = (p_value + tl.minimum(row + r // COLUMNS, B - 1) * META.R + 4 * c).to(tl.int64)
        sums_0, sums_1, sums_2, sums_3, correction, column = sum_tiles(
            p_weight, stride, p_scale, p_zero, N, p_index, value_at, count, first, start, end,
            COLUMNS, False, META,
        )  # fmt: skip
        # A lane's own columns of B are 2 c and 2 c + 1.
        x_0, x_1 = from_lane(correction, 8 * c)[:, None], from_lane(correction, 8 * c + 4)[:, None]
        for q in tl.static_range(32 // BITS):
            y_0 = side_by_side(sums_0, sums_1, sums_2, sums_3, 0, q, BITS)
            y_1 = side_by_side(sums_0, sums_1, sums_2, sums_3, 1, q, BITS)
            store_four_columns(
                y_0, y_1, x_0, x_1, p_rows, p_scale, p_zero, K, N, B, row, column, r, c, group, end, COLUMNS, q, META
            )
    let_next_start(PDL)
