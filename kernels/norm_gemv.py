"""RMSNorm fused into a sparse GEMV."""

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
def norm_gemv_kernel(
    p_x, p_norm, eps, p_weight, stride, p_scale, p_zero, p_refined, p_threshold, p_index, p_value, p_partial,
    B, K, E, N, n_0, n_1, n_2, CHUNK: tl.constexpr, META: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    BLOCK_B: tl.constexpr = META.BLOCK_B
    weight_rows, channels, threshold, start, end = owned_work(p_refined, p_threshold, K, E, n_0, n_1, n_2, META)
    norm = tl.load(p_norm + channels, mask=channels < K, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    rows = tl.arange(0, BLOCK_B)[:, None]
    x = tl.load(p_x + rows * K + channels[None, :], mask=(rows < B) & (channels < K)[None, :], other=0.0)
    squares = tl.zeros([BLOCK_B, CHUNK], tl.float32)
    for i in range(0, K, CHUNK):
        k = (i + tl.arange(0, CHUNK))[None, :]
        part = tl.load(p_x + rows * K + k, mask=(rows < B) & (k < K), other=0.0).to(tl.float32)
        squares += part * part
    scale = tl.rsqrt(tl.sum(squares, axis=1) / K + eps)
    normed = rounded(rounded(x.to(tl.float32) * scale[:, None], META.DTYPE) * norm[None, :], META.DTYPE)
    sparse_product(
        normed, threshold, weight_rows, channels, start, end, p_weight, stride, p_scale, p_zero, p_index, p_value,
        p_partial, B, K, N, META, PDL,
    )  # fmt: skip


def launch(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, thresholds: Tensor, segments: list[int],
    scales: Tensor | None = None, zeros: Tensor | None = None, refined: Tensor | None = None,
    tile: GemvTile | None = None,
) -> Tensor:  # fmt: skip
    """As sparse_gemv of RMSNorm(x) * norm, for x [B, K] in fp32 or the weight's dtype and norm [K] in the weight's.

    Every program computes the mean square itself: K values from the L2 cache cost less than another kernel.
    """
    matrix = Weight(weight, scales, zeros, refined)
    check_rows(x, matrix, (matrix.dtype, torch.float32))
    B, K = x.shape
    if norm.shape != (K,) or norm.dtype != matrix.dtype or norm.device != x.device or not norm.is_contiguous():
        raise ValueError(f"norm is {norm.dtype} {tuple(norm.shape)}: expected contiguous {matrix.dtype} [{K}] beside x")
    check_gemv(matrix, thresholds, segments, K, B)
    plan = plan_gemv(matrix, thresholds, segments, B, tile)
    chunk = min(triton.next_power_of_2(K), 4096 if B == 1 else 512)
    norm_gemv_kernel[plan.grid](x, norm, eps, *plan.args, CHUNK=chunk, META=plan.meta, **plan.options)
    return plan.partials


norm_gemv = make_op(
    "norm_gemv",
    launch,
    lambda x, weight, scales, zeros, refined: empty_partials(Weight(weight, scales, zeros, refined), x.shape[0]),
)
