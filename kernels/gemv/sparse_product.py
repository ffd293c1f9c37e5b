"""The part that all sparse GEMV kernels share: from a program's x to its partial sums, for each kind of weight."""

import triton
import triton.language as tl

from teal.kernels.gemv.gather import let_next_start, sum_one_row, sum_rows, threshold_and_compact
from teal.kernels.gemv.gather_quantized import store_one_row_quantized, sum_rows_by_input, sum_rows_quantized
from teal.kernels.gemv.gather_tensor_core import store_one_row_tensor_core
from teal.kernels.gemv.gather_tensor_core_rows import store_rows_tensor_core


@triton.jit
def sparse_product(
    x, threshold, channels, start, end, p_weight, stride, p_scale, p_zero, p_index, p_value, p_partial, B, K, N,
    R: tl.constexpr, SPLITS: tl.constexpr, BLOCK_B: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_N: tl.constexpr, EVEN_N: tl.constexpr, BITS: tl.constexpr, GROUP_N: tl.constexpr, GROUP_K: tl.constexpr,
    RUN: tl.constexpr, SPAN: tl.constexpr, TENSOR_CORE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compact a program's x [BLOCK_B, BLOCK_R], sum the weight rows it keeps, write the partial sums.

    A quantized weight has GROUP_N columns packed together. Where GROUP_K is not 0, a scale of it is for so many channels
    and one column, and the program's run of channels, RUN of them, touches SPAN such groups at most.
    """
    STEP: tl.constexpr = LANES * UNROLL
    i_split = tl.program_id(1)
    program = (tl.program_id(0) * SPLITS + i_split).to(tl.int64)
    p_index += program * R
    p_value += program * B * R
    count = threshold_and_compact(x, threshold, channels, K, B, p_index, p_value, R, 2 * STEP, BLOCK_B)
    first = i_split * RUN  # the first channel, where it owns a single run
    if TENSOR_CORE & (BLOCK_B == 1):
        store_one_row_tensor_core(
            p_weight, stride, p_scale, p_zero, K, N, p_index, p_value, count, p_partial + i_split * N, first, start, end,
            BLOCK_N, BITS, GROUP_N, GROUP_K, SPAN, PDL,
        )  # fmt: skip
    elif TENSOR_CORE:
        store_rows_tensor_core(
            p_weight, stride, p_scale, p_zero, K, N, p_index, p_value, count, B, p_partial + i_split * B * N, first, start, end,
            R, BLOCK_N, BITS, GROUP_N, GROUP_K, SPAN, PDL,
        )  # fmt: skip
    elif (BITS < 16) & (BLOCK_B == 1) & (GROUP_K == 0):
        store_one_row_quantized(
            p_weight, stride, p_scale, p_zero, N // GROUP_N, p_index, p_value, count, p_partial + i_split * N, start, end,
            STEP, BLOCK_N, BITS, GROUP_N, EVEN_N, PDL,
        )  # fmt: skip
    else:
        if GROUP_K:
            total = sum_rows_by_input(
                p_weight, stride, p_scale, p_zero, K, N, p_index, p_value, count, B, first, start, end,
                R, channels.shape[0], STEP, BLOCK_N, BITS, GROUP_N, GROUP_K, SPAN, EVEN_N,
            )  # fmt: skip
        elif BITS < 16:
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
