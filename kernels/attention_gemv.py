"""Combination of attention's splits and the sparse GEMV of the o projection, in one kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from teal.kernels.formats.packing import Weight
from teal.kernels.gemv.gather import owned_work, rounded, wait_for_previous
from teal.kernels.gemv.launch import check_gemv, empty_partials, plan_gemv
from teal.kernels.gemv.op import make_op
from teal.kernels.gemv.sparse_product import sparse_product
from teal.kernels.gemv.tuning import GemvTile


@triton.jit(do_not_specialize=["B", "E"])
def attention_gemv_kernel(
    p_sum, p_max, p_exp_sum, p_weight, stride, p_scale, p_zero, p_refined, p_threshold, p_index, p_value, p_partial,
    B, K, E, N, n_0, n_1, n_2, D: tl.constexpr, NUM_SPLITS: tl.constexpr, META: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    BLOCK_B: tl.constexpr = META.BLOCK_B
    BLOCK_R: tl.constexpr = META.BLOCK_R
    weight_rows, channels, threshold, start, end = owned_work(p_refined, p_threshold, K, E, n_0, n_1, n_2, META)
    wait_for_previous(PDL)
    rows = tl.arange(0, BLOCK_B)[:, None]
    inside = (rows < B) & (channels < K)[None, :]
    slot = (rows * (K // D) + (channels // D)[None, :]) * NUM_SPLITS  # [BLOCK_B, BLOCK_R]
    largest = tl.full([BLOCK_B, BLOCK_R], float("-inf"), tl.float32)
    for s in tl.static_range(NUM_SPLITS):
        largest = tl.maximum(largest, tl.load(p_max + slot + s, mask=inside, other=0.0))
    total = tl.zeros([BLOCK_B, BLOCK_R], tl.float32)
    weight = tl.zeros([BLOCK_B, BLOCK_R], tl.float32)
    for s in tl.static_range(NUM_SPLITS):
        factor = tl.exp(tl.load(p_max + slot + s, mask=inside, other=0.0) - largest)
        total += factor * tl.load(p_sum + (slot + s) * D + (channels % D)[None, :], mask=inside, other=0.0)
        weight += factor * tl.load(p_exp_sum + slot + s, mask=inside, other=1.0)
    x = rounded(total / weight, META.DTYPE)
    sparse_product(
        x, threshold, weight_rows, channels, start, end, p_weight, stride, p_scale, p_zero, p_index, p_value, p_partial,
        B, K, N, META, PDL,
    )  # fmt: skip


def launch(
    sums: Tensor, max_logits: Tensor, exp_sums: Tensor, weight: Tensor, thresholds: Tensor,
    scales: Tensor | None = None, zeros: Tensor | None = None, refined: Tensor | None = None,
    tile: GemvTile | None = None,
) -> Tensor:  # fmt: skip
    """As sparse_gemv of the attention output [B, H D], from the splits that rope_attention returned.

    sums fp32 [B, H, splits, D]; max_logits and exp_sums fp32 [B, H, splits]; weight is [H D, N]; thresholds fp32 [1].
    The attention output is rounded to weight's dtype.
    """
    matrix = Weight(weight, scales, zeros, refined)
    B, H, splits, D = sums.shape
    for name, tensor, shape in (("sums", sums, (B, H, splits, D)), ("max_logits", max_logits, (B, H, splits)),
                                ("exp_sums", exp_sums, (B, H, splits))):  # fmt: skip
        if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}; expected contiguous fp32 {shape}")
        if tensor.device != weight.device:
            raise ValueError(f"{name} is on {tensor.device}, weight on {weight.device}: expected the same")
    check_gemv(matrix, thresholds, [matrix.N], H * D, B)
    plan = plan_gemv(matrix, thresholds, [matrix.N], B, tile)
    attention_gemv_kernel[plan.grid](
        sums, max_logits, exp_sums, *plan.args, D=D, NUM_SPLITS=splits, META=plan.meta, **plan.options
    )
    return plan.partials


attention_gemv = make_op(
    "attention_gemv",
    launch,
    lambda sums, weight, scales, zeros, refined: empty_partials(Weight(weight, scales, zeros, refined), sums.shape[0]),
)
