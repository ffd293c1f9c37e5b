"""Sum of a sparse GEMV's partial sums, with bias and residual.

Partials are fp32 [splits, B, N], contiguous. Program (i, s) of a GEMV writes column block i of all rows of split s:

    split 0    row 0: columns 0..N-1    row 1: columns 0..N-1    ...
    split 1    row 0: columns 0..N-1    row 1: columns 0..N-1    ...
               element (s B + b) N + n is split s, row b, column n

The sum runs over the splits in their order, so bits do not depend on which program ended first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from teal.kernels.gemv.gather import let_next_start, rounded, wait_for_previous
from teal.kernels.gemv.launch import DTYPES, launch_options
from teal.kernels.gemv.op import make_op

BLOCK = 32  # columns a program sums: 4096 of them, 66 partials each, take 1.4 us on an H100; blocks of 128 took 2.8


@triton.jit
def sum_of_splits(p_partial, i_row, columns, B, N, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr):
    """fp32 sums of a row's columns over the splits, in their order."""
    s = tl.arange(0, BLOCK_S)
    parts = tl.load(
        p_partial + (s[:, None] * B + i_row) * N + columns[None, :],
        mask=(s < SPLITS)[:, None] & (columns < N)[None, :], other=0.0,
    )  # fmt: skip
    return tl.sum(parts.to(tl.float32), axis=0)


@triton.jit
def store_sum(y, p_out, p_residual, i_row, columns, N, HAS_RESIDUAL: tl.constexpr):
    """Write a row's columns, rounded, and added to the residual if there is one."""
    inside = columns < N
    if HAS_RESIDUAL:
        y = rounded(y, p_out.dtype.element_ty)
        y += tl.load(p_residual + i_row * N + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(p_out + i_row * N + columns, rounded(y, p_out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["B"])
def reduce_partials_kernel(
    p_partial, p_bias, p_residual, p_out, B, N, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    if HAS_BIAS:
        bias = tl.load(p_bias + columns, mask=inside, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    let_next_start(PDL)
    y = sum_of_splits(p_partial, i_row, columns, B, N, SPLITS, BLOCK_S)
    if HAS_BIAS:
        y += bias
    store_sum(y, p_out, p_residual, i_row, columns, N, HAS_RESIDUAL)


def check(
    partials: Tensor, kinds: tuple[torch.dtype, ...], dtype: torch.dtype, bias: Tensor | None, residual: Tensor | None
) -> None:
    """Raise ValueError unless partials, of one of kinds, can be added up as launch says."""
    if partials.dim() != 3 or partials.dtype not in kinds or not partials.is_contiguous():
        raise ValueError(f"partials are {partials.dtype} {tuple(partials.shape)}: expected contiguous [splits, B, N]")
    _, B, N = partials.shape
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}: expected one of {DTYPES}")
    for name, tensor, shape, of in (("bias", bias, (N,), DTYPES), ("residual", residual, (B, N), (dtype,))):
        if tensor is not None:
            check_tensor(name, tensor, shape, of, partials.device)


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], kinds: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Raise ValueError, naming it, unless a tensor is contiguous, and of this shape, one of these dtypes and device."""
    if tensor.shape != shape or tensor.dtype not in kinds or not tensor.is_contiguous():
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}: expected contiguous {kinds} {shape}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} and partials on {device}: expected the same")


def launch(partials: Tensor, dtype: torch.dtype, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Sum over partials fp32 [splits, B, N], in fixed order, plus bias [N], rounded to dtype, plus residual [B, N].

    residual is of that dtype or None; bias is None or of any dtype of DTYPES. Returns [B, N]. Raises ValueError on a
    mismatch.
    """
    check(partials, (torch.float32,), dtype, bias, residual)
    splits, B, N = partials.shape
    out = torch.empty(B, N, dtype=dtype, device=partials.device)
    reduce_partials_kernel[(triton.cdiv(N, BLOCK), B)](
        partials, bias, residual, out, B, N, SPLITS=splits, BLOCK_S=triton.next_power_of_2(splits),
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, BLOCK=BLOCK,
        **launch_options(partials.device, num_warps=4),
    )  # fmt: skip
    return out


reduce_partials = make_op(
    "reduce_partials",
    launch,
    lambda partials, dtype: torch.empty(partials.shape[1:], dtype=dtype, device=partials.device),
)
