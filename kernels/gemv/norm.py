"""Norms over rows, which kernels compute beside something else: RMSNorm, or a layer norm where there is a bias.

Every program computes the sums over a row itself: K values from the L2 cache cost less than another kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from teal.kernels.gemv.gather import rounded


@triton.jit
def row_scale(p_x, rows, B, K, eps, LAYER_NORM: tl.constexpr, CHUNK: tl.constexpr):
    """Mean and 1 / deviation, both [BLOCK_B, 1], of rows [BLOCK_B, 1] of x; without LAYER_NORM 0 and 1 / RMS."""
    mean = tl.zeros([rows.shape[0], 1], tl.float32)
    if LAYER_NORM:
        total = tl.zeros([rows.shape[0], CHUNK], tl.float32)
        for i in range(0, K, CHUNK):
            k = (i + tl.arange(0, CHUNK))[None, :]
            total += tl.load(p_x + rows * K + k, mask=(rows < B) & (k < K), other=0.0).to(tl.float32)
        mean = (tl.sum(total, axis=1) / K)[:, None]
    squares = tl.zeros([rows.shape[0], CHUNK], tl.float32)
    for i in range(0, K, CHUNK):
        k = (i + tl.arange(0, CHUNK))[None, :]
        part = tl.load(p_x + rows * K + k, mask=(rows < B) & (k < K), other=0.0).to(tl.float32)
        if LAYER_NORM:
            part = tl.where(k < K, part - mean, 0.0)
        squares += part * part
    scale = tl.rsqrt(tl.sum(squares, axis=1) / K + eps)
    return mean, scale[:, None]


@triton.jit
def load_norm(p_norm, p_bias, columns, K, LAYER_NORM: tl.constexpr):
    """Weight and bias of a norm at columns, as fp32; without LAYER_NORM the weight twice."""
    norm = tl.load(p_norm + columns, mask=columns < K, other=0.0).to(tl.float32)
    bias = norm
    if LAYER_NORM:
        bias = tl.load(p_bias + columns, mask=columns < K, other=0.0).to(tl.float32)
    return norm, bias


@triton.jit
def normed(x, mean, scale, norm, bias, LAYER_NORM: tl.constexpr, DTYPE: tl.constexpr):
    """Entries x [BLOCK_B, BLOCK] of rows with that mean and scale; norm, bias [BLOCK]. Rounded as model.py does."""
    if LAYER_NORM:
        y = rounded((x.to(tl.float32) - mean) * scale * norm[None, :] + bias[None, :], DTYPE)
    else:
        y = rounded(rounded(x.to(tl.float32) * scale, DTYPE) * norm[None, :], DTYPE)
    return y


def check_norm(norm: Tensor, bias: Tensor | None, K: int, dtypes: tuple[torch.dtype, ...], like: Tensor) -> None:
    """Raise ValueError unless norm, and bias if there is one, are contiguous [K] of one of dtypes, beside like."""
    for name, tensor in (("norm", norm), ("bias", norm if bias is None else bias)):
        if tensor.shape != (K,) or tensor.dtype not in dtypes or not tensor.is_contiguous():
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}: expected contiguous {dtypes} [{K}]")
        if tensor.device != like.device:
            raise ValueError(f"{name} is on {tensor.device} and its input on {like.device}: expected the same")
