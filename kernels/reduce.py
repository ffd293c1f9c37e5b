"""Sum of a sparse GEMV's partials, plus bias and residual."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gather import rounded, start_after_previous
from kernels.launch import launch_options

BLOCK = 128


@triton.jit
def reduce_kernel(
    p_partial, p_bias, p_residual, p_out, total_rows, N, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    s = tl.arange(0, BLOCK_S)
    start_after_previous(PDL)
    parts = tl.load(
        p_partial + (s[:, None] * total_rows + i_row) * N + columns[None, :],
        mask=(s < SPLITS)[:, None] & inside[None, :], other=0.0,
    )  # fmt: skip
    y = tl.sum(parts, axis=0)
    if HAS_BIAS:
        y += tl.load(p_bias + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y = rounded(y, p_residual.dtype.element_ty)
        y += tl.load(p_residual + i_row * N + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(p_out + i_row * N + columns, rounded(y, p_out.dtype.element_ty), mask=inside)


def launch(partials: Tensor, dtype: torch.dtype, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Sum over partials [S, B, N] plus bias [N], plus residual [B, N] -> [B, N]."""
    splits, B, N = partials.shape
    out = torch.empty(B, N, dtype=dtype, device=partials.device)
    reduce_kernel[(triton.cdiv(N, BLOCK), B)](
        partials, bias, residual, out, B, N, SPLITS=splits, BLOCK_S=triton.next_power_of_2(splits),
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, BLOCK=BLOCK,
        **launch_options(partials.device, 4),
    )  # fmt: skip
    return out
