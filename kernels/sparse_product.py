"""The part that all sparse GEMV kernels share: from a program's x to its partial sums, for each kind of weight."""

import triton
import triton.language as tl

from kernels.gather import let_next_start, sum_one_row, sum_rows, threshold_and_compact
from kernels.gather_quantized import store_one_row_quantized, sum_rows_quantized
from kernels.gather_tensor_core import store_one_row_tensor_core


@triton.jit
def sparse_product(
    x, threshold, channels, start, end, p_weight, stride, p_scale, p_zero, p_index, p_value, p_partial, B, K, N,
    R: tl.constexpr, SPLITS: tl.constexpr, BLOCK_B: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_N: tl.constexpr, EVEN_N: tl.constexpr, BITS: tl.constexpr, GROUP_N: tl.constexpr, TENSOR_CORE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compact a program's x [BLOCK_B, BLOCK_R], sum the weight rows it keeps, write the partial sums."""
    STEP: tl.constexpr = LANES * UNROLL
    i_split = tl.program_id(1)
    program = (tl.program_id(0) * SPLITS + i_split).to(tl.int64)
    p_index += program * R
    p_value += program * B * R
    count = threshold_and_compact(x, threshold, channels, K, B, p_index, p_value, R, 2 * STEP, BLOCK_B)
    if TENSOR_CORE:
        store_one_row_tensor_core(
            p_weight, stride, p_scale, p_zero, N // GROUP_N, p_index, p_value, count, p_partial + i_split * N, start, end,
            BLOCK_N, BITS, GROUP_N, PDL,
        )  # fmt: skip
    elif (BITS < 16) & (BLOCK_B == 1):
        store_one_row_quantized(
            p_weight, stride, p_scale, p_zero, N // GROUP_N, p_index, p_value, count, p_partial + i_split * N, start, end,
            STEP, BLOCK_N, BITS, GROUP_N, EVEN_N, PDL,
        )  # fmt: skip
    else:
        if BITS < 16:
            total = sum_rows_quantized(
                p_weight, stride, p_scale, p_zero, N // GROUP_N, p_index, p_value, count, B, start, end,
                R, STEP, BLOCK_N, BITS, GROUP_N, EVEN_N,
            )  # fmt: skip
        elif BLOCK_B == 1:
            total = sum_one_row(p_weight, stride, p_index, p_value, count, start, end, LANES, UNROLL, BLOCK_N, EVEN_N)
        else:
            total = sum_rows(p_weight, stride, p_index, p_value, count, B, start, end, R, STEP, BLOCK_N, EVEN_N)
        let_next_start(PDL)
        rows = tl.arange(0, total.shape[0])[:, None]
        columns = (start + tl.arange(0, BLOCK_N))[None, :]
        tl.store(p_partial + (i_split * B + rows) * N + columns, total, mask=(rows < B) & (columns < end))
