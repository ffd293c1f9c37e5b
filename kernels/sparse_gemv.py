"""Sparse GEMV: partial sums of x @ weight over the channels whose |x| reaches their threshold."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from teal.kernels.formats.packing import Weight
from teal.kernels.gemv.gather import owned_work, rounded, wait_for_previous
from teal.kernels.gemv.launch import check_gemv, check_rows, empty_partials, plan_gemv
from teal.kernels.gemv.op import make_op
from teal.kernels.gemv.sparse_product import sparse_product
from teal.kernels.gemv.tuning import GemvTile


@triton.jit(do_not_specialize=["B", "E"])
def sparse_gemv_kernel(
    p_x, p_weight, stride, p_scale, p_zero, p_refined, p_threshold, p_index, p_value, p_partial,
    B, K, E, N, n_0, n_1, n_2, META: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    weight_rows, channels, threshold, start, end = owned_work(p_refined, p_threshold, K, E, n_0, n_1, n_2, META)
    wait_for_previous(PDL)
    rows = tl.arange(0, META.BLOCK_B)[:, None]
    x = tl.load(p_x + rows * K + channels[None, :], mask=(rows < B) & (channels < K)[None, :], other=0.0)
    x = rounded(x.to(tl.float32), META.DTYPE)
    sparse_product(
        x, threshold, weight_rows, channels, start, end, p_weight, stride, p_scale, p_zero, p_index, p_value, p_partial,
        B, K, N, META, PDL,
    )  # fmt: skip


def launch(
    x: Tensor, weight: Tensor, thresholds: Tensor, segments: list[int], scales: Tensor | None = None,
    zeros: Tensor | None = None, refined: Tensor | None = None, tile: GemvTile | None = None,
) -> Tensor:  # fmt: skip
    """Partial sums of x @ weight over channels whose |x| reaches the threshold of their column segment.

    x is [B, K], contiguous, B from 1 to 8, of weight's dtype or in fp32, which is rounded to it. weight is [K, N] with
    contiguous rows. With scales, zeros and refined it is a quantized weight (packing.py), of its scales' dtype.
    thresholds are fp32 [J]; segments: J widths, at most 3, that add up to N. Returns fp32 [splits, B, N], to be summed
    over the first dimension (reduce_partials). Raises ValueError on a mismatch.
    """
    matrix = Weight(weight, scales, zeros, refined)
    check_rows(x, matrix, (matrix.dtype, torch.float32))
    check_gemv(matrix, thresholds, segments, x.shape[1], x.shape[0])
    plan = plan_gemv(matrix, thresholds, segments, x.shape[0], tile)
    sparse_gemv_kernel[plan.grid](x, *plan.args, META=plan.meta, **plan.options)
    return plan.partials


sparse_gemv = make_op(
    "sparse_gemv",
    launch,
    lambda x, weight, scales, zeros, refined: empty_partials(Weight(weight, scales, zeros, refined), x.shape[0]),
)
