"""Attention of one new token a row, the cache split among programs (flash-decoding, Dao et al. 2023).

Each program attends over one share of the positions so far and leaves its sum, unnormalised, with the maximum and the
sum of its weights; the o projection (attention_gemv.py) combines the shares. Positions beyond the row's own are never
read, so a large cache costs nothing.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gather import INTERPRETED, start_after_previous
from kernels.launch import launch_options

BLOCK_POSITIONS = 32
MAX_SHARES = 16  # 8 key/value heads x 16 shares are 128 programs, one for each multiprocessor of an H100
PROGRAMS = 256


@triton.jit
def decode_attention_kernel(
    p_q, p_k, p_v, p_position, p_sum, p_max, p_weight, scale, stride_b, stride_h, stride_s,
    KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SHARES: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    i_row, i_kv, i_share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dtype = p_q.dtype.element_ty
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    head = i_kv * G + g
    live = (g < G)[:, None] & (d < D)[None, :]
    start_after_previous(PDL)
    length = tl.load(p_position + i_row).to(tl.int32) + 1
    first = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
    share = tl.cdiv(tl.cdiv(length - first, SHARES), BLOCK_P) * BLOCK_P
    begin = first + i_share * share
    end = tl.minimum(begin + share, length)
    q = tl.load(p_q + (i_row * KV * G + head)[:, None] * D + d[None, :], mask=live, other=0.0)
    base = i_row.to(tl.int64) * stride_b + i_kv * stride_h
    largest = tl.full([BLOCK_G], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_G], tl.float32)
    total = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for i in range(begin, end, BLOCK_P):
        position = i + tl.arange(0, BLOCK_P)
        offsets = base + position[:, None].to(tl.int64) * stride_s + d[None, :]
        inside = (position < end)[:, None] & (d < D)[None, :]
        k = tl.load(p_k + offsets, mask=inside, other=0.0)
        v = tl.load(p_v + offsets, mask=inside, other=0.0)
        if INTERPRETED:
            scores = tl.dot(q.to(tl.float32), tl.trans(k).to(tl.float32), input_precision="ieee") * scale
        else:
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where((position < end)[None, :], scores, float("-inf"))
        highest = tl.maximum(largest, tl.max(scores, axis=1))
        kept = tl.exp(largest - highest)
        probs = tl.exp(scores - highest[:, None])
        weight = weight * kept + tl.sum(probs, axis=1)
        if INTERPRETED:
            total = total * kept[:, None] + tl.dot(probs, v.to(tl.float32), input_precision="ieee")
        else:
            total = total * kept[:, None] + tl.dot(probs.to(dtype), v, input_precision="ieee")
        largest = highest
    slot = (i_row * KV * G + head) * SHARES + i_share
    tl.store(p_sum + slot[:, None] * D + d[None, :], total, mask=live)
    tl.store(p_max + slot, largest, mask=g < G)
    tl.store(p_weight + slot, weight, mask=g < G)


def shares_for(B: int, KV: int) -> int:
    """Among how many programs the positions of one row and key/value head are split."""
    return max(1, min(MAX_SHARES, triton.next_power_of_2(PROGRAMS // int(B * KV) + 1) // 2))


@torch.library.custom_op("teal::decode_attention", mutates_args=())
def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Shares of softmax(q k^T / sqrt(D)) v over positions 0 to positions[b], or the last window of them if window > 0.

    q [B, H, D] contiguous; k_cache and v_cache [B, KV, S, D], one dtype and layout; positions int64, B values below S.
    Returns fp32 sums [B, H, shares, D], maxima [B, H, shares] and weights [B, H, shares]: the result is the sum over
    shares of exp(max - max_all) sum, over that of exp(max - max_all) weight. A share without positions has max -inf.
    Raises ValueError on a mismatch.
    """
    B, H, D = q.shape
    KV = k_cache.shape[1]
    _check(q, k_cache, v_cache, positions)
    sums, largest, weights = _outputs(q, k_cache)
    shares = sums.shape[2]
    decode_attention_kernel[(B, KV, shares)](
        q, k_cache, v_cache, positions, sums, largest, weights, 1 / math.sqrt(D), *k_cache.stride()[:3],
        KV=KV, G=H // KV, D=D, SHARES=shares, WINDOW=window, BLOCK_G=max(16, triton.next_power_of_2(H // KV)),
        BLOCK_D=max(16, triton.next_power_of_2(D)), BLOCK_P=BLOCK_POSITIONS,
        **launch_options(q.device, num_warps=4),
    )  # fmt: skip
    return sums, largest, weights


@decode_attention.register_fake
def _(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _outputs(q, k_cache)


def _outputs(q: Tensor, k_cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, H, D = q.shape
    shares = shares_for(B, k_cache.shape[1])
    sums = torch.empty(B, H, shares, D, dtype=torch.float32, device=q.device)
    largest, weights = (torch.empty(B, H, shares, dtype=torch.float32, device=q.device) for _ in range(2))
    return sums, largest, weights


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor) -> None:
    B, H, D = q.shape
    if k_cache.shape[0] != B or k_cache.shape[3] != D or H % k_cache.shape[1] or not q.is_contiguous():
        raise ValueError(f"q {tuple(q.shape)} and k_cache {tuple(k_cache.shape)}: expected [B, H, D] and [B, KV, S, D]")
    if v_cache.shape != k_cache.shape or v_cache.stride() != k_cache.stride() or k_cache.stride(3) != 1:
        raise ValueError(
            f"k_cache has strides {k_cache.stride()}, v_cache {v_cache.stride()}: expected contiguous heads"
        )
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"q is {q.dtype}, the caches {k_cache.dtype} and {v_cache.dtype}: expected one dtype")
    if positions.dtype != torch.int64 or positions.numel() != B:
        raise ValueError(f"positions are {positions.dtype} {tuple(positions.shape)}: expected {B} int64")
    if not q.device == k_cache.device == v_cache.device == positions.device:
        raise ValueError(f"q is on {q.device}, k_cache on {k_cache.device}: expected all on one device")
