"""The part that all sparse GEMV kernels share: from a program's x to its partial sums, for each kind of weight."""

import triton
import triton.language as tl

from teal.kernels.gemv.gather import let_next_start, sum_one_row, sum_rows, threshold_and_compact
from teal.kernels.gemv.gather_quantized import store_one_row_quantized, sum_rows_by_input, sum_rows_quantized
from teal.kernels.gemv.gather_tensor_core import store_one_row_tensor_core
from teal.kernels.gemv.gather_tensor_core_rows import store_rows_tensor_core
from teal.kernels.gemv.gather_tensor_core_wide import store_rows_wide


@triton.jit
def sparse_product(
    x, threshold, weight_rows, channels, start, end, p_weight, stride, p_scale, p_zero, p_index, p_value, p_partial,
    B, K, N, META: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compact a program's x [BLOCK_B, BLOCK_R], sum the weight rows it keeps, write the partial sums."""
    STEP: tl.constexpr = META.LANES * META.UNROLL
    i_split = tl.program_id(1)
    program = (tl.program_id(0) * META.SPLITS + i_split).to(tl.int64)
    p_index += program * META.R
    p_value += program * B * META.R
    count = threshold_and_compact(x, threshold, weight_rows, channels, K, B, p_index, p_value, 2 * STEP, META)
    first = i_split * META.RUN  # the first channel, where it owns a single run
    if META.TENSOR_CORE & (META.BLOCK_B == 1):
        store_one_row_tensor_core(
            p_weight, stride, p_scale, p_zero, K, N, p_index, p_value, count, p_partial + i_split * N,
            first, start, end, META, PDL,
        )  # fmt: skip
    elif META.TENSOR_CORE & (META.BLOCK_B == 8) & (META.GROUP_K == 0) & (META.GROUP_N * META.BITS == 512):
        store_rows_wide(
            p_weight, stride, p_scale, p_zero, N, p_index, p_value, count, B,
            p_partial + i_split * B * N, start, end, META, PDL,
        )  # fmt: skip
    elif META.TENSOR_CORE:
        store_rows_tensor_core(
            p_weight, stride, p_scale, p_zero, K, N, p_index, p_value, count, B,
            p_partial + i_split * B * N, first, start, end, META, PDL,
        )  # fmt: skip
    elif (META.BITS < 16) & (META.BLOCK_B == 1) & (META.GROUP_K == 0):
        store_one_row_quantized(
            p_weight, stride, p_scale, p_zero, N // META.GROUP_N, p_index, p_value, count,
            p_partial + i_split * N, start, end, META, PDL,
        )  # fmt: skip
    else:
        if META.GROUP_K:
            total = sum_rows_by_input(
                p_weight, stride, p_scale, p_zero, K, N, p_index, p_value, count, B, first, start, end, META
            )
        elif META.BITS < 16:
            total = sum_rows_quantized(
                p_weight, stride, p_scale, p_zero, N // META.GROUP_N, p_index, p_value, count, B, start, end, META
            )
        elif META.BLOCK_B == 1:
            total = sum_one_row(p_weight, stride, p_index, p_value, count, start, end, META)
        else:
            total = sum_rows(p_weight, stride, p_index, p_value, count, B, start, end, META)
        let_next_start(PDL)
        rows = tl.arange(0, total.shape[0])[:, None]
        columns = (start + tl.arange(0, META.BLOCK_N))[None, :]
        tl.store(p_partial + (i_split * B + rows) * N + columns, total, mask=(rows < B) & (columns < end))
