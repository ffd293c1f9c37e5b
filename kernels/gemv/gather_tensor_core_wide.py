"""The sums of gather_tensor_core_rows.py for 5 to 8 rows where a warp's columns are two groups: one pass, not two.

The columns of B are the rows of x, for one group at a time. So each lane takes 8 bytes of either group instead of 16 of
one, and each group's words meet a B of their own:

                 bytes 0..63 of a row: group 0          bytes 64..127: group 1
    lane 4 r + c     8 r .. 8 r + 7, words 0 and 1          64 + 8 r .., words 2 and 3
    meets            B of x times scale 0                   B of x times scale 1

Loads are half as wide and twice as many. But weights are read and made bf16 once: 45 instead of 67 µs for eight rows
of Llama-3-8B's gate,up on an H100.
"""

import triton
import triton.language as tl

from teal.kernels.gemv.gather import keep_loads_above, let_next_start
from teal.kernels.gemv.gather_tensor_core import (
    STEP,
    WARP_BYTES,
    add_tile,
    corrected,
    exchange,
    from_lane,
    make_b,
)
from teal.kernels.gemv.gather_tensor_core_rows import side_by_side
from teal.kernels.gemv.lane_loads import address, leave_first, load_four, load_meta, load_two


@triton.jit
def load_piece(words, stride, scale, zero, groups_of_row, index, policy, DTYPE: tl.constexpr, META: tl.constexpr):
    """Two words of each of a lane's four rows in one group, their scales and zeros; as load_step."""
    i_0, i_1, i_2, i_3 = index
    size = 4 * stride
    w_0, w_1 = load_two(address(words, i_0, size), policy), load_two(address(words, i_1, size), policy)
    w_2, w_3 = load_two(address(words, i_2, size), policy), load_two(address(words, i_3, size), policy)
    s, z = load_meta(scale, zero, groups_of_row, index, DTYPE, META.BITS)
    return w_0, w_1, w_2, w_3, s, z


@triton.jit
def piece_addresses(p_weight, p_scale, p_zero, column, r, end, G: tl.constexpr, META: tl.constexpr):
    """Addresses (int64) of a lane's words in group G of its warp's columns, and of their scale and zero, in row 0."""
    BITS: tl.constexpr = META.BITS
    word = tl.minimum(column * BITS // 32 + G * META.GROUP_N * BITS // 32 + 2 * r, end * BITS // 32 - 2)
    group = tl.minimum(column // META.GROUP_N + G, end // META.GROUP_N - 1) + 0 * r
    zero = (p_zero + group).to(tl.int64) if BITS == 4 else (p_scale + group).to(tl.int64)
    return (p_weight + word).to(tl.int64), (p_scale + group).to(tl.int64), zero


@triton.jit
def store_four(y, x_0, x_1, p_rows, N, B, i, column, r, end, Q: tl.constexpr, META: tl.constexpr):
    """Correct a lane's sums y [T, 4] in a column of B, row i of x, and write them. x_0 and x_1 are of either group."""
    BITS: tl.constexpr = META.BITS
    WORDS: tl.constexpr = META.GROUP_N * BITS // 32
    j = tl.arange(0, 4)[None, :]
    if BITS == 4:  # the Q-th integers of the four words
        columns = (column + 2 * r)[:, None] + j // 2 * META.GROUP_N + j % 2 + Q * WORDS
        y -= tl.where(j < 2, x_0[:, None], x_1[:, None])
    else:  # all integers of the Q-th word
        columns = (column + 4 * (Q // 2 * WORDS + 2 * r + Q % 2))[:, None] + j
        y -= (x_0 if Q < 2 else x_1)[:, None] * 2304.0
    tl.store(p_rows + i[:, None] * N + columns, y, mask=(i < B)[:, None] & (columns < end))


@triton.jit
def store_sums(
    sums_0, sums_1, sums_2, sums_3, correction_a, correction_b, p_rows, N, B, column, r, c, end, META: tl.constexpr,
):  # fmt: skip
    """Correct a warp's sums in its two columns of B, from the shares of the correction that its lanes have."""
    BITS: tl.constexpr = META.BITS
    correction_a += exchange(correction_a, 1)
    correction_a += exchange(correction_a, 2)  # lanes 4 n + c have the whole of column n
    correction_b += exchange(correction_b, 1)
    correction_b += exchange(correction_b, 2)
    for side in tl.static_range(2):  # a lane's own columns of B are 2 c and 2 c + 1
        x_a, x_b = from_lane(correction_a, 8 * c + 4 * side), from_lane(correction_b, 8 * c + 4 * side)
        for q in tl.static_range(32 // BITS):
            y = side_by_side(sums_0, sums_1, sums_2, sums_3, side, q, BITS)
            store_four(y, x_a, x_b, p_rows, N, B, 2 * c + side, column, r, end, q, META)


@triton.jit
def store_rows_wide(
    p_weight, stride, p_scale, p_zero, N, p_index, p_value, count, B, p_rows, start, end,
    META: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As gather_tensor_core_rows.store_rows_tensor_core, for groups along the output, two to a warp's columns."""
    BITS: tl.constexpr = META.BITS
    THREADS: tl.constexpr = META.BLOCK_N * BITS // 32
    tl.static_assert(WARP_BYTES * 8 // BITS == 2 * META.GROUP_N)
    dtype: tl.constexpr = p_scale.dtype.element_ty
    lane = tl.arange(0, THREADS)
    r, c = lane % 32 // 4, lane % 4
    column = start + lane // 32 * (2 * META.GROUP_N)
    words_a, scale_a, zero_a = piece_addresses(p_weight, p_scale, p_zero, column, r, end, 0, META)
    words_b, scale_b, zero_b = piece_addresses(p_weight, p_scale, p_zero, column, r, end, 1, META)
    policy = leave_first(lane)
    nothing = tl.zeros([THREADS], tl.float32)
    sums = (nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing,
            nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing)  # fmt: skip
    sums_0, sums_1, sums_2, sums_3 = sums, sums, sums, sums
    index_at = (p_index + 4 * c).to(tl.int64)
    value_at = (p_value + tl.minimum(r, B - 1) * META.R + 4 * c).to(tl.int64)  # r is B's column, and x's row, here
    last = tl.cdiv(count, STEP) * STEP
    groups = N // META.GROUP_N
    index = load_four(index_at)
    a_0, a_1, a_2, a_3, s_a, z_a = load_piece(words_a, stride, scale_a, zero_a, groups, index, policy, dtype, META)
    b_0, b_1, b_2, b_3, s_b, z_b = load_piece(words_b, stride, scale_b, zero_b, groups, index, policy, dtype, META)
    value = load_four(value_at)
    x_a, y_a = make_b(value, s_a, 0, 0, r < 0, 0, 1, False)
    x_b, y_b = make_b(value, s_b, 0, 0, r < 0, 0, 1, False)
    correction_a, correction_b = corrected(nothing, x_a, y_a, z_a, META), corrected(nothing, x_b, y_b, z_b, META)
    index = load_four(index_at + 4 * STEP)
    for i in range(0, count, STEP):
        n_0, n_1, n_2, n_3, s_a, z_a = load_piece(words_a, stride, scale_a, zero_a, groups, index, policy, dtype, META)
        m_0, m_1, m_2, m_3, s_b, z_b = load_piece(words_b, stride, scale_b, zero_b, groups, index, policy, dtype, META)
        value = load_four(value_at + 4 * (i + STEP))
        index = load_four(index_at + 4 * tl.minimum(i + 2 * STEP, last))
        keep_loads_above()
        sums_0 = add_tile(sums_0, a_0[0], a_1[0], a_2[0], a_3[0], x_a, y_a, BITS)
        sums_1 = add_tile(sums_1, a_0[1], a_1[1], a_2[1], a_3[1], x_a, y_a, BITS)
        sums_2 = add_tile(sums_2, b_0[0], b_1[0], b_2[0], b_3[0], x_b, y_b, BITS)
        sums_3 = add_tile(sums_3, b_0[1], b_1[1], b_2[1], b_3[1], x_b, y_b, BITS)
        a_0, a_1, a_2, a_3, b_0, b_1, b_2, b_3 = n_0, n_1, n_2, n_3, m_0, m_1, m_2, m_3
        x_a, y_a = make_b(value, s_a, 0, 0, r < 0, 0, 1, False)  # of the next step, whose scales need not be kept
        x_b, y_b = make_b(value, s_b, 0, 0, r < 0, 0, 1, False)
        correction_a, correction_b = (
            corrected(correction_a, x_a, y_a, z_a, META),
            corrected(correction_b, x_b, y_b, z_b, META),
        )
    store_sums(sums_0, sums_1, sums_2, sums_3, correction_a, correction_b, p_rows, N, B, column, r, c, end, META)
    let_next_start(PDL)
