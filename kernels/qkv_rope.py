"""From the partial sums of q, k and v to rotated queries and a filled KV cache, one program a head."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gather import rounded, start_after_previous
from kernels.launch import launch_options


@triton.jit(do_not_specialize=["B"])
def qkv_rope_kernel(
    p_partial, p_bias, p_q_norm, p_k_norm, eps, p_cos, p_sin, p_position, p_q, p_k_cache, p_v_cache,
    stride_b, stride_h, stride_s, B, H: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    i_head, i_row = tl.program_id(0), tl.program_id(1)
    dtype = p_q.dtype.element_ty
    d = tl.arange(0, BLOCK_D)
    inside = d < HALF
    s = tl.arange(0, BLOCK_S)
    N: tl.constexpr = (H + 2 * KV) * 2 * HALF
    column = i_head * 2 * HALF + d
    start_after_previous(PDL)
    p_row = p_partial + (s[:, None] * B + i_row) * N + column[None, :]
    live = (s < SPLITS)[:, None] & inside[None, :]
    a = tl.sum(tl.load(p_row, mask=live, other=0.0), axis=0)  # the first half of the head's channels
    b = tl.sum(tl.load(p_row + HALF, mask=live, other=0.0), axis=0)  # the second
    if HAS_BIAS:
        a += tl.load(p_bias + column, mask=inside, other=0.0).to(tl.float32)
        b += tl.load(p_bias + column + HALF, mask=inside, other=0.0).to(tl.float32)
    a, b = rounded(a, dtype), rounded(b, dtype)
    position = tl.load(p_position + i_row)
    if i_head >= H + KV:
        p_out = p_v_cache + i_row * stride_b + (i_head - H - KV) * stride_h + position * stride_s
    else:
        if HAS_NORM:
            p_norm = p_q_norm if i_head < H else p_k_norm
            scale = tl.rsqrt((tl.sum(a * a, axis=0) + tl.sum(b * b, axis=0)) / (2 * HALF) + eps)
            a = rounded(a * scale, dtype) * tl.load(p_norm + d, mask=inside, other=0.0).to(tl.float32)
            b = rounded(b * scale, dtype) * tl.load(p_norm + HALF + d, mask=inside, other=0.0).to(tl.float32)
            a, b = rounded(a, dtype), rounded(b, dtype)
        cos = tl.load(p_cos + i_row * HALF + d, mask=inside, other=0.0)
        sin = tl.load(p_sin + i_row * HALF + d, mask=inside, other=0.0)
        a, b = a * cos - b * sin, b * cos + a * sin
        if i_head < H:
            p_out = p_q + (i_row * H + i_head) * 2 * HALF
        else:
            p_out = p_k_cache + i_row * stride_b + (i_head - H) * stride_h + position * stride_s
    tl.store(p_out + d, rounded(a, dtype), mask=inside)
    tl.store(p_out + HALF + d, rounded(b, dtype), mask=inside)


@torch.library.custom_op("teal::qkv_rope", mutates_args=("k_cache", "v_cache"))
def qkv_rope(
    partials: Tensor, bias: Tensor | None, q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
    cos: Tensor, sin: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor, heads: int,
) -> Tensor:  # fmt: skip
    """Rotated queries [B, H, D] from partial sums fp32 [splits, B, (H + 2 KV) D]; k and v go into the caches.

    bias [(H + 2 KV) D]; q_norm and k_norm [D], RMSNorm weights of each head (Qwen3); cos and sin fp32 with B * D/2
    values; positions int64 with B values, below S; k_cache and v_cache [B, KV, S, D] of one dtype and layout. All
    rounding is that of the unfused layers. Raises ValueError on a mismatch.
    """
    splits, B, _ = partials.shape
    KV, D = k_cache.shape[1], k_cache.shape[3]
    _check(partials, bias, q_norm, k_norm, cos, sin, positions, k_cache, v_cache, heads)
    q = torch.empty(B, heads, D, dtype=k_cache.dtype, device=k_cache.device)
    qkv_rope_kernel[(heads + 2 * KV, B)](
        partials, bias, q_norm, k_norm, eps, cos, sin, positions, q, k_cache, v_cache, *k_cache.stride()[:3], B,
        H=heads, KV=KV, HALF=D // 2, SPLITS=splits, BLOCK_S=triton.next_power_of_2(splits),
        BLOCK_D=triton.next_power_of_2(D // 2), HAS_BIAS=bias is not None, HAS_NORM=q_norm is not None,
        **launch_options(k_cache.device, num_warps=4),
    )  # fmt: skip
    return q


@qkv_rope.register_fake
def _(
    partials: Tensor, bias: Tensor | None, q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
    cos: Tensor, sin: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor, heads: int,
) -> Tensor:  # fmt: skip
    return k_cache.new_empty(partials.shape[1], heads, k_cache.shape[3])


def _check(
    partials: Tensor, bias: Tensor | None, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor, sin: Tensor,
    positions: Tensor, k_cache: Tensor, v_cache: Tensor, heads: int,
) -> None:  # fmt: skip
    B, KV, _, D = k_cache.shape
    N = (heads + 2 * KV) * D
    if partials.dtype != torch.float32 or partials.shape[1:] != (B, N) or not partials.is_contiguous():
        raise ValueError(f"partials are {partials.dtype} {tuple(partials.shape)}: expected fp32 [splits, {B}, {N}]")
    if v_cache.shape != k_cache.shape or v_cache.stride() != k_cache.stride() or v_cache.dtype != k_cache.dtype:
        raise ValueError(f"k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)}: expected one layout")
    if k_cache.stride(3) != 1 or D % 2:
        raise ValueError(f"k_cache has strides {k_cache.stride()}, head size {D}: expected contiguous, even heads")
    if positions.dtype != torch.int64 or positions.numel() != B:
        raise ValueError(f"positions are {positions.dtype} {tuple(positions.shape)}: expected {B} int64")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm: expected both or none")
    for name, tensor, count in (("bias", bias, N), ("q_norm", q_norm, D), ("k_norm", k_norm, D)):
        if tensor is not None and (tensor.numel() != count or tensor.dtype != k_cache.dtype):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}: expected {k_cache.dtype} [{count}]")
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tensor.dtype != torch.float32 or tensor.numel() != B * D // 2 or not tensor.is_contiguous():
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}: expected fp32, {B} x {D // 2}")
    for tensor in (partials, bias, q_norm, k_norm, cos, sin, positions, v_cache):
        if tensor is not None and tensor.device != k_cache.device:
            raise ValueError(f"a tensor is on {tensor.device} and k_cache on {k_cache.device}: expected the same")
