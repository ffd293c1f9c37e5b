"""RMSNorm or a layer norm, fused into a sparse GEMV."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from teal.kernels.formats.packing import Weight
from teal.kernels.gemv.gather import owned_work, wait_for_previous
from teal.kernels.gemv.launch import check_gemv, check_rows, empty_partials, plan_gemv
from teal.kernels.gemv.norm import check_norm, load_norm, normed, row_scale
from teal.kernels.gemv.op import make_op
from teal.kernels.gemv.sparse_product import sparse_product
from teal.kernels.gemv.tuning import GemvTile


@triton.jit(do_not_specialize=["B", "E"])
def norm_gemv_kernel(
    p_x, p_norm, p_bias, eps, p_weight, stride, p_scale, p_zero, p_refined, p_threshold, p_index, p_value, p_partial,
    B, K, E, N, n_0, n_1, n_2, LAYER_NORM: tl.constexpr, CHUNK: tl.constexpr, META: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    weight_rows, channels, threshold, start, end = owned_work(p_refined, p_threshold, K, E, n_0, n_1, n_2, META)
    norm, bias = load_norm(p_norm, p_bias, channels, K, LAYER_NORM)
    wait_for_previous(PDL)
    rows = tl.arange(0, META.BLOCK_B)[:, None]
    x = tl.load(p_x + rows * K + channels[None, :], mask=(rows < B) & (channels < K)[None, :], other=0.0)
    mean, scale = row_scale(p_x, rows, B, K, eps, LAYER_NORM, CHUNK)
    x = normed(x, mean, scale, norm, bias, LAYER_NORM, META.DTYPE)
    sparse_product(
        x, threshold, weight_rows, channels, start, end, p_weight, stride, p_scale, p_zero, p_index, p_value, p_partial,
        B, K, N, META, PDL,
    )  # fmt: skip


def launch(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, thresholds: Tensor, segments: list[int],
    scales: Tensor | None = None, zeros: Tensor | None = None, refined: Tensor | None = None,
    bias: Tensor | None = None, tile: GemvTile | None = None,
) -> Tensor:  # fmt: skip
    """As sparse_gemv of RMSNorm(x) * norm, for x [B, K] in fp32 or the weight's dtype and norm [K] in the weight's.

    With a bias [K] it is that of the layer norm LayerNorm(x) * norm + bias. Raises ValueError on a mismatch.
    """
    matrix = Weight(weight, scales, zeros, refined)
    check_rows(x, matrix, (matrix.dtype, torch.float32))
    B, K = x.shape
    check_norm(norm, bias, K, (matrix.dtype,), x)
    check_gemv(matrix, thresholds, segments, K, B)
    plan = plan_gemv(matrix, thresholds, segments, B, tile)
    chunk = min(triton.next_power_of_2(K), 4096 if B == 1 else 512)
    norm_gemv_kernel[plan.grid](
        x, norm, bias, eps, *plan.args, LAYER_NORM=bias is not None, CHUNK=chunk, META=plan.meta, **plan.options
    )
    return plan.partials


norm_gemv = make_op(
    "norm_gemv",
    launch,
    lambda x, weight, scales, zeros, refined: empty_partials(Weight(weight, scales, zeros, refined), x.shape[0]),
)
