"""Residual plus the norm of what a sublayer adds, of families that have norms there (Gemma 2 and 3, OLMo 2, GLM-4).

A norm needs a whole row, and a program of reduce_partials sums a few columns. So this is a kernel of its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from teal.kernels.gemv.gather import let_next_start, rounded, wait_for_previous
from teal.kernels.gemv.launch import DTYPES, launch_options
from teal.kernels.gemv.norm import check_norm, load_norm, normed, row_scale
from teal.kernels.gemv.op import make_op

BLOCK = 512  # columns a program writes; each reads its whole row, 21 KB of 5,376 columns in fp32
MAX_CHUNK = 8192  # columns read at once: 32 of them to a thread


@triton.jit(do_not_specialize=["B"])
def norm_residual_kernel(
    p_y, p_norm, p_bias, eps, p_residual, p_out, B, N, LAYER_NORM: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) + tl.zeros([1, 1], tl.int32)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    norm, bias = load_norm(p_norm, p_bias, columns, N, LAYER_NORM)
    columns = columns[None, :]
    inside = columns < N
    residual = tl.load(p_residual + row * N + columns, mask=inside, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    let_next_start(PDL)
    y = tl.load(p_y + row * N + columns, mask=inside, other=0.0)
    mean, scale = row_scale(p_y, row, B, N, eps, LAYER_NORM, CHUNK)
    dtype: tl.constexpr = p_out.dtype.element_ty
    out = residual + normed(y, mean, scale, norm, bias, LAYER_NORM, dtype)
    tl.store(p_out + row * N + columns, rounded(out, dtype), mask=inside)


def launch(y: Tensor, norm: Tensor, bias: Tensor | None, eps: float, residual: Tensor) -> Tensor:
    """residual + RMSNorm(y) * norm, or residual + LayerNorm(y) * norm + bias: [B, N] of residual's dtype.

    y and residual are [B, N] of one dtype, norm and bias [N] of any of DTYPES. residual must be older than the
    stream's last kernel (see gather.wait_for_previous). Raises ValueError on a mismatch.
    """
    if y.dim() != 2 or not y.is_contiguous() or y.dtype not in DTYPES:
        raise ValueError(f"y is {y.dtype} {tuple(y.shape)}: expected contiguous [B, N] of one of {DTYPES}")
    if residual.shape != y.shape or residual.dtype != y.dtype or not residual.is_contiguous():
        raise ValueError(f"residual is {residual.dtype} {tuple(residual.shape)}: expected {y.dtype} {tuple(y.shape)}")
    if residual.device != y.device:
        raise ValueError(f"residual is on {residual.device} and y on {y.device}: expected the same")
    B, N = y.shape
    check_norm(norm, bias, N, DTYPES, y)
    out = torch.empty_like(residual)
    norm_residual_kernel[(triton.cdiv(N, BLOCK), B)](
        y, norm, bias, eps, residual, out, B, N, LAYER_NORM=bias is not None,
        CHUNK=min(triton.next_power_of_2(N), MAX_CHUNK), BLOCK=BLOCK, **launch_options(y.device, num_warps=8),
    )  # fmt: skip
    return out


norm_residual = make_op("norm_residual", launch, lambda residual: torch.empty_like(residual))
