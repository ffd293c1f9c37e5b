"""Combination of attention's shares and the sparse GEMV of the o projection, in one kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from teal.kernels.formats.packing import Weight
from teal.kernels.gemv.gather import owned_work, rounded, wait_for_previous
from teal.kernels.gemv.launch import check_gemv, empty_partials, plan_gemv
from teal.kernels.gemv.sparse_product import sparse_product
from teal.kernels.gemv.tuning import GemvTile


@triton.jit(do_not_specialize=["B", "stride_j", "stride_k"])
def attention_gemv_kernel(
    p_sum, p_max, p_share, p_weight, stride, p_scale, p_zero, p_threshold, stride_j, stride_k, p_index, p_value, p_partial,
    B, K, N, n_0, n_1, n_2, D: tl.constexpr, SHARES: tl.constexpr, META: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    channels, threshold, start, end = owned_work(
        p_threshold, stride_j, stride_k, K, n_0, n_1, n_2, META
    )
    wait_for_previous(PDL)
    rows = tl.arange(0, META.BLOCK_B)[:, None]
    inside = (rows < B) & (channels < K)[None, :]
    slot = (rows * (K // D) + (channels // D)[None, :]) * SHARES  # [META.BLOCK_B, META.BLOCK_R]
    largest = tl.full([META.BLOCK_B, META.BLOCK_R], float("-inf"), tl.float32)
    for s in tl.static_range(SHARES):
        largest = tl.maximum(largest, tl.load(p_max + slot + s, mask=inside, other=0.0))
    total = tl.zeros([META.BLOCK_B, META.BLOCK_R], tl.float32)
    weight = tl.zeros([META.BLOCK_B, META.BLOCK_R], tl.float32)
    for s in tl.static_range(SHARES):
        factor = tl.exp(tl.load(p_max + slot + s, mask=inside, other=0.0) - largest)
        total += factor * tl.load(p_sum + (slot + s) * D + (channels % D)[None, :], mask=inside, other=0.0)
        weight += factor * tl.load(p_share + slot + s, mask=inside, other=1.0)
    x = rounded(total / weight, META.DTYPE)
    sparse_product(
        x, threshold, channels, start, end, p_weight, stride, p_scale, p_zero, p_index, p_value, p_partial, B, K, N, META, PDL,
    )  # fmt: skip


def launch(
    sums: Tensor, largest: Tensor, shares: Tensor, weight: Weight, thresholds: Tensor, tile: GemvTile | None = None
) -> Tensor:
    """As attention_gemv, with a chosen tile."""
    B, H, count, D = sums.shape
    for name, tensor, shape in (("sums", sums, (B, H, count, D)), ("largest", largest, (B, H, count)),
                                ("shares", shares, (B, H, count))):  # fmt: skip
        if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}; expected contiguous fp32 {shape}")
        if tensor.device != weight.values.device:
            raise ValueError(f"{name} is on {tensor.device}, weight on {weight.values.device}: expected the same")
    check_gemv(weight, thresholds, [weight.N], H * D, B)
    plan = plan_gemv(weight, thresholds, [weight.N], B, tile)
    attention_gemv_kernel[plan.grid](sums, largest, shares, *plan.args, D=D, SHARES=count, META=plan.meta, **plan.options)
    return plan.partials


@torch.library.custom_op("teal::attention_gemv", mutates_args=())
def attention_gemv(
    sums: Tensor, largest: Tensor, shares: Tensor, weight: Tensor, thresholds: Tensor,
    scales: Tensor | None = None, zeros: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As sparse_gemv of the attention output [B, H D] whose shares rope_attention returned.

    weight is [H D, N]; thresholds fp32 [1] or [1, H D]. The attention output is rounded to weight's dtype.
    """
    return launch(sums, largest, shares, Weight(weight, scales, zeros), thresholds)


@attention_gemv.register_fake
def _(
    sums: Tensor, largest: Tensor, shares: Tensor, weight: Tensor, thresholds: Tensor,
    scales: Tensor | None = None, zeros: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return empty_partials(Weight(weight, scales, zeros), sums.shape[0])
