"""From the partial sums of q, k and v to attention of one new token a row, in splits, with the KV cache filled.

The earlier positions are split among programs (flash-decoding, Dao et al. 2023). Each program sums the partials of its
query heads and rotates them itself, which costs less than a kernel that does it once. One more program for each
key/value head makes the new token's key and value and puts them into the cache. It is a split of its own, so that the
others wait for nothing but the partials. A program leaves its sum, unnormalised, with its largest logit and its sum of
exponentials; the o projection (attention_gemv.py) combines them. Positions beyond a row's own are never read, so a
large cache costs nothing. A cache may be in 8 bits (kv_int8.py).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from teal.kernels.formats.kv_int8 import ALIGNMENT, packed_width
from teal.kernels.gemv.gather import INTERPRETED, let_next_start, rounded, wait_for_previous
from teal.kernels.gemv.kv_cache import load_positions, store_vector
from teal.kernels.gemv.launch import TRITON_DTYPES, launch_options
from teal.kernels.gemv.op import make_op

BLOCK_POSITIONS = 64
MAX_SPLITS = 16  # 8 key/value heads x 16 splits are 128 programs, one for each multiprocessor of an H100
PROGRAMS = 256
# As many programs or fewer get 8 warps each: 4,096 positions take 10.0 us with 8 and 11.2 with 4, on an H100. Where a
# multiprocessor runs two programs, 8 rows of 4,096 take 51 us with 4 and 67 with 8. An 8-bit cache always wants 8: its
# conversions spill with 4, and 32,768 positions take 111 us against 76.
FEW_PROGRAMS = 128


@triton.jit
def summed_heads(
    p_partial, p_bias, i_row, B, N, head, live, HALF: tl.constexpr, SPLITS_IN: tl.constexpr, BLOCK_H: tl.constexpr,
    HEADS: tl.constexpr, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Both halves [HEADS, BLOCK_H] of the heads [HEADS], summed, biased and rounded."""
    d = tl.arange(0, BLOCK_H)[None, :]
    inside = live[:, None] & (d < HALF)
    column = head[:, None] * 2 * HALF + d
    a = tl.zeros([HEADS, BLOCK_H], tl.float32)
    b = tl.zeros([HEADS, BLOCK_H], tl.float32)
    for s in tl.static_range(SPLITS_IN):
        p_row = p_partial + (s * B + i_row) * N + column
        a += tl.load(p_row, mask=inside, other=0.0)
        b += tl.load(p_row + HALF, mask=inside, other=0.0)
    if HAS_BIAS:
        a += tl.load(p_bias + column, mask=inside, other=0.0).to(tl.float32)
        b += tl.load(p_bias + column + HALF, mask=inside, other=0.0).to(tl.float32)
    return rounded(a, DTYPE), rounded(b, DTYPE)


@triton.jit
def scale_of_all(
    p_partial, p_bias, i_row, B, N, eps, FIRST: tl.constexpr, COUNT: tl.constexpr, SPLITS_IN: tl.constexpr,
    HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr, CHUNK: tl.constexpr = 1024,
):  # fmt: skip
    """1 / root mean square of columns FIRST to FIRST + COUNT of a row, summed, biased and rounded."""
    squares = tl.zeros([CHUNK], tl.float32)
    for i in range(0, COUNT, CHUNK):
        column = FIRST + i + tl.arange(0, CHUNK)
        x = tl.zeros([CHUNK], tl.float32)
        for s in tl.static_range(SPLITS_IN):
            x += tl.load(p_partial + (s * B + i_row) * N + column, mask=column < FIRST + COUNT, other=0.0)
        if HAS_BIAS:
            x += tl.load(p_bias + column, mask=column < FIRST + COUNT, other=0.0).to(tl.float32)
        x = rounded(x, DTYPE)
        squares += x * x
    return tl.rsqrt(tl.sum(squares) / COUNT + eps)


@triton.jit
def normed_and_rotated(
    a, b, p_norm, scale, eps, cos, sin, HALF: tl.constexpr, BLOCK_H: tl.constexpr, NORM: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Norm and rotation of both halves [HEADS, BLOCK_H], rounded as the layers would.

    NORM "head": of each head by itself (Qwen3). "all": of all at once, with their scale and p_norm [HEADS, 1] (OLMo 2).
    """
    if NORM != "none":
        d = tl.arange(0, BLOCK_H)[None, :]
        if NORM == "head":
            scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * HALF) + eps)[:, None]
        a = rounded(a * scale, DTYPE) * tl.load(p_norm + d, mask=d < HALF, other=0.0).to(tl.float32)
        b = rounded(b * scale, DTYPE) * tl.load(p_norm + HALF + d, mask=d < HALF, other=0.0).to(tl.float32)
        a, b = rounded(a, DTYPE), rounded(b, DTYPE)
    return rounded(a * cos - b * sin, DTYPE), rounded(b * cos + a * sin, DTYPE)


@triton.jit
def queries(
    p_partial, p_bias, p_norm, eps, cos, sin, i_row, i_kv, B, N,
    KV: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, SPLITS_IN: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr, HAS_BIAS: tl.constexpr, NORM: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Both halves [HEADS, BLOCK_H] of the queries of a key/value head, normed and rotated."""
    g = tl.arange(0, HEADS)
    a, b = summed_heads(
        p_partial, p_bias, i_row, B, N, i_kv * G + g, g < G, HALF, SPLITS_IN, BLOCK_H, HEADS, HAS_BIAS, DTYPE
    )
    scale = 1.0
    if NORM == "all":
        p_norm += (i_kv * G + tl.minimum(g, G - 1))[:, None] * 2 * HALF
        scale = scale_of_all(p_partial, p_bias, i_row, B, N, eps, 0, KV * G * 2 * HALF, SPLITS_IN, HAS_BIAS, DTYPE)
    return normed_and_rotated(a, b, p_norm, scale, eps, cos, sin, HALF, BLOCK_H, NORM, DTYPE)


@triton.jit
def soft_capped(scores, SOFTCAP: tl.constexpr):
    """SOFTCAP tanh(scores / SOFTCAP), with tanh(u) = 1 - 2 / (1 + exp(2 u)) (Gemma 2); scores if SOFTCAP is 0."""
    if SOFTCAP > 0:
        scores = SOFTCAP - 2 * SOFTCAP / (1.0 + tl.exp(scores * (2 / SOFTCAP)))
    return scores


@triton.jit
def new_token(
    a, b, p_partial, p_bias, p_k_norm, eps, cos, sin, p_k, p_v, p_sum, scale, at, i_row, i_kv, B, N,
    KV: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, SPLITS_IN: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr, HAS_BIAS: tl.constexpr, NORM: tl.constexpr, SOFTCAP: tl.constexpr, SCALE_AT: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Write the new key and value [at] and the split of their position; returns its scores [HEADS]."""
    d = tl.arange(0, BLOCK_H)[None, :]
    g = tl.arange(0, HEADS)
    pair = tl.arange(0, 2)  # key and value, side by side so that their loads are
    x, y = summed_heads(
        p_partial, p_bias, i_row, B, N, KV * G + i_kv + pair * KV, pair < 2, HALF, SPLITS_IN, BLOCK_H, 2, HAS_BIAS,
        DTYPE,
    )  # fmt: skip
    k_scale = 1.0
    if NORM == "all":
        p_k_norm += i_kv * 2 * HALF
        k_scale = scale_of_all(
            p_partial, p_bias, i_row, B, N, eps, KV * G * 2 * HALF, KV * 2 * HALF, SPLITS_IN, HAS_BIAS, DTYPE
        )
    k_x, k_y = normed_and_rotated(x, y, p_k_norm, k_scale, eps, cos, sin, HALF, BLOCK_H, NORM, DTYPE)
    is_key = (pair == 0)[:, None]
    k_x = tl.sum(tl.where(is_key, k_x, 0.0), axis=0)[None, :]
    k_y = tl.sum(tl.where(is_key, k_y, 0.0), axis=0)[None, :]
    x = tl.sum(tl.where(is_key, 0.0, x), axis=0)[None, :]
    y = tl.sum(tl.where(is_key, 0.0, y), axis=0)[None, :]
    k_x, k_y = store_vector(p_k + at, k_x, k_y, HALF, BLOCK_H, SCALE_AT, DTYPE)
    x, y = store_vector(p_v + at, x, y, HALF, BLOCK_H, SCALE_AT, DTYPE)
    inside = (g < G)[:, None] & (d < HALF)
    tl.store(p_sum, tl.broadcast_to(x, [HEADS, BLOCK_H]), mask=inside)
    tl.store(p_sum + HALF, tl.broadcast_to(y, [HEADS, BLOCK_H]), mask=inside)
    return soft_capped((tl.sum(a * k_x, axis=1) + tl.sum(b * k_y, axis=1)) * scale, SOFTCAP)


@triton.jit
def product(x, y, out, DTYPE: tl.constexpr):
    """out + x @ y in fp32, with operands rounded to DTYPE as tensor cores take them."""
    if INTERPRETED:
        out = tl.dot(x.to(tl.float32), y.to(tl.float32), out, input_precision="ieee")
    else:
        out = tl.dot(x.to(DTYPE), y, out, input_precision="ieee")
    return out


@triton.jit
def repeated(x, ROWS: tl.constexpr):
    """x [rows, D] repeated to [ROWS, D]: tensor cores want 16 rows, and what the repetitions give is not stored."""
    return tl.reshape(tl.broadcast_to(x[None, :, :], [ROWS // x.shape[0], x.shape[0], x.shape[1]]), [ROWS, x.shape[1]])


@triton.jit
def attend(
    a, b, k_low, k_high, v_low, v_high, p_k, p_v, stride, begin, end, scale,
    HALF: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, SOFTCAP: tl.constexpr,
    SCALE_AT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Attention of queries [BLOCK_G, 2 x BLOCK_H] over cache rows begin to end, whose first block is loaded already.

    Returns the unnormalised sum in halves, the largest score and the sum of weights of each query.
    """
    largest = tl.full([BLOCK_G], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_G], tl.float32)
    low = tl.zeros([BLOCK_G, BLOCK_H], tl.float32)
    high = tl.zeros([BLOCK_G, BLOCK_H], tl.float32)
    for i in range(begin, end, BLOCK_P):
        # Asked for before this block is worked on, so that it is under way meanwhile.
        next_k = load_positions(p_k, i + BLOCK_P, end, stride, HALF, BLOCK_H, BLOCK_P, SCALE_AT, DTYPE)
        next_v = load_positions(p_v, i + BLOCK_P, end, stride, HALF, BLOCK_H, BLOCK_P, SCALE_AT, DTYPE)
        scores = product(a, tl.trans(k_low), tl.zeros([BLOCK_G, BLOCK_P], tl.float32), DTYPE)
        scores = soft_capped(product(b, tl.trans(k_high), scores, DTYPE) * scale, SOFTCAP)
        scores = tl.where((i + tl.arange(0, BLOCK_P) < end)[None, :], scores, float("-inf"))
        highest = tl.maximum(largest, tl.max(scores, axis=1))
        kept = tl.exp(largest - highest)
        probs = tl.exp(scores - highest[:, None])
        weight = weight * kept + tl.sum(probs, axis=1)
        low = product(probs, v_low, low * kept[:, None], DTYPE)
        high = product(probs, v_high, high * kept[:, None], DTYPE)
        largest = highest
        k_low, k_high = next_k
        v_low, v_high = next_v
    return low, high, largest, weight


@triton.jit
def split_positions(i_split, earlier, NUM_SPLITS: tl.constexpr, WINDOW: tl.constexpr, BLOCK_P: tl.constexpr):
    """Begin and end of a split's positions among the earlier ones; split 0, the new token's own, has none of them."""
    first = tl.maximum(earlier + 1 - WINDOW, 0) if WINDOW > 0 else 0
    length = tl.cdiv(tl.cdiv(earlier - first, NUM_SPLITS - 1), BLOCK_P) * BLOCK_P
    begin = first + (i_split - 1) * length
    end = tl.minimum(begin + length, earlier)
    if i_split == 0:
        begin, end = earlier, earlier
    return begin, end


@triton.jit(do_not_specialize=["B"])
def rope_attention_kernel(
    p_partial, p_bias, p_q_norm, p_k_norm, eps, p_cos, p_sin, p_position, p_k, p_v, p_sum, p_max, p_exp_sum, scale,
    stride_b, stride_h, stride_s, B,
    KV: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, SPLITS_IN: tl.constexpr, NUM_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr, HEADS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
    HAS_BIAS: tl.constexpr, NORM: tl.constexpr, SOFTCAP: tl.constexpr, SCALE_AT: tl.constexpr, DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    i_row, i_kv, i_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    N: tl.constexpr = (KV * G + 2 * KV) * 2 * HALF
    earlier = tl.load(p_position + i_row).to(tl.int32)  # positions before the new one
    begin, end = split_positions(i_split, earlier, NUM_SPLITS, WINDOW, BLOCK_P)
    p_k += i_row.to(tl.int64) * stride_b + i_kv * stride_h
    p_v += i_row.to(tl.int64) * stride_b + i_kv * stride_h
    g, row, d = tl.arange(0, HEADS), tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_H)[None, :]
    slot = (i_row * KV * G + i_kv * G) * NUM_SPLITS + i_split
    p_sum += slot.to(tl.int64) * 2 * HALF
    p_max += slot
    p_exp_sum += slot
    cos = tl.load(p_cos + i_row * HALF + d, mask=d < HALF, other=0.0)
    sin = tl.load(p_sin + i_row * HALF + d, mask=d < HALF, other=0.0)
    k_low, k_high = load_positions(p_k, begin, end, stride_s, HALF, BLOCK_H, BLOCK_P, SCALE_AT, DTYPE)
    v_low, v_high = load_positions(p_v, begin, end, stride_s, HALF, BLOCK_H, BLOCK_P, SCALE_AT, DTYPE)
    wait_for_previous(PDL)
    let_next_start(PDL)
    a, b = tl.zeros([HEADS, BLOCK_H], tl.float32), tl.zeros([HEADS, BLOCK_H], tl.float32)
    if (begin < end) | (i_split == 0):
        a, b = queries(
            p_partial, p_bias, p_q_norm, eps, cos, sin, i_row, i_kv, B, N,
            KV, G, HALF, SPLITS_IN, HEADS, BLOCK_H, HAS_BIAS, NORM, DTYPE,
        )  # fmt: skip
    if i_split == 0:
        scores = new_token(
            a, b, p_partial, p_bias, p_k_norm, eps, cos, sin, p_k, p_v, p_sum + g[:, None] * NUM_SPLITS * 2 * HALF + d,
            scale, earlier.to(tl.int64) * stride_s, i_row, i_kv, B, N,
            KV, G, HALF, SPLITS_IN, HEADS, BLOCK_H, HAS_BIAS, NORM, SOFTCAP, SCALE_AT, DTYPE,
        )  # fmt: skip
        tl.store(p_max + g * NUM_SPLITS, scores, mask=g < G)
        tl.store(p_exp_sum + g * NUM_SPLITS, tl.full([HEADS], 1.0, tl.float32), mask=g < G)
    else:
        low, high, largest, weight = attend(
            repeated(a, BLOCK_G), repeated(b, BLOCK_G), k_low, k_high, v_low, v_high, p_k, p_v, stride_s, begin, end,
            scale, HALF, BLOCK_G, BLOCK_H, BLOCK_P, SOFTCAP, SCALE_AT, DTYPE,
        )  # fmt: skip
        p_row = p_sum + row[:, None] * NUM_SPLITS * 2 * HALF + d
        inside = (row < G)[:, None] & (d < HALF)
        tl.store(p_row, low, mask=inside)
        tl.store(p_row + HALF, high, mask=inside)
        tl.store(p_max + row * NUM_SPLITS, largest, mask=row < G)
        tl.store(p_exp_sum + row * NUM_SPLITS, weight, mask=row < G)


def attention_splits(B: int, KV: int) -> int:
    """Among how many programs one row and key/value head is split, that of the new token included."""
    return max(2, min(MAX_SPLITS, triton.next_power_of_2(PROGRAMS // int(B * KV) + 1) // 2))


def launch(
    partials: Tensor, bias: Tensor | None, q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
    cos: Tensor, sin: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor, heads: int, window: int,
    dtype: torch.dtype, softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """softmax(q k^T / sqrt(D)) v over positions 0 to positions[b], in splits; the last window of them if window > 0.

    q, k and v come from partial sums fp32 [splits, B, (H + 2 KV) D]; k and v go into the caches at positions. bias is
    [(H + 2 KV) D]. q_norm and k_norm are RMSNorm weights, [D] of each head (Qwen3), or [H D] and [KV D] of all heads at
    once (OLMo 2). Then every program reads all of q, so that few splits are wanted. Scores become softcap *
    tanh(scores / softcap), unless that is 0 (Gemma 2). cos and sin are fp32 with B * D/2
    values; positions int64 with B values, below S. k_cache and v_cache are [B, KV, S, D] of dtype, or int8 [B, KV, S,
    packed_width(D)] (kv_int8.py), and of one layout. bias and norms are of dtype, too. All rounding is that of the
    unfused layers. Returns fp32 sums [B, H, splits, D], max_logits and exp_sums [B, H, splits]. Attention's output is
    the sum over splits of exp(max - max_all) sums, over that of exp(max - max_all) exp_sums. A split without positions
    has max -inf. cos, sin, positions and the caches must be older than the stream's last kernel (see
    gather.wait_for_previous). Raises ValueError on a mismatch.
    """
    _check(partials, bias, q_norm, k_norm, cos, sin, positions, k_cache, v_cache, heads, dtype)
    splits, B, N = partials.shape
    KV = k_cache.shape[1]
    D = N // (heads + 2 * KV)
    sums, max_logits, exp_sums = _outputs(partials, k_cache, heads)
    num_splits = sums.shape[2]
    head_block = triton.next_power_of_2(heads // KV)
    packed = k_cache.dtype == torch.int8
    norm = "none" if q_norm is None else "head" if q_norm.numel() == D else "all"
    warps = 8 if packed or B * KV * num_splits <= FEW_PROGRAMS else 4
    rope_attention_kernel[(B, KV, num_splits)](
        partials, bias, q_norm, k_norm, eps, cos, sin, positions, k_cache, v_cache, sums, max_logits, exp_sums,
        1 / math.sqrt(D), *k_cache.stride()[:3], B,
        KV=KV, G=heads // KV, HALF=D // 2, SPLITS_IN=splits, NUM_SPLITS=num_splits, WINDOW=window, HEADS=head_block,
        BLOCK_G=max(16, head_block), BLOCK_H=max(16, triton.next_power_of_2(D // 2)),
        BLOCK_P=BLOCK_POSITIONS if D <= 128 else BLOCK_POSITIONS // 2, HAS_BIAS=bias is not None, NORM=norm,
        SOFTCAP=softcap, DTYPE=TRITON_DTYPES[dtype], SCALE_AT=packed_width(D) - ALIGNMENT if packed else 0,
        **launch_options(k_cache.device, num_warps=warps),
    )  # fmt: skip
    return sums, max_logits, exp_sums


def _outputs(partials: Tensor, k_cache: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    _, B, N = partials.shape
    KV = k_cache.shape[1]
    D = N // (heads + 2 * KV)
    num_splits = attention_splits(B, KV)
    sums = torch.empty(B, heads, num_splits, D, dtype=torch.float32, device=k_cache.device)
    max_logits, exp_sums = (
        torch.empty(B, heads, num_splits, dtype=torch.float32, device=k_cache.device) for _ in range(2)
    )
    return sums, max_logits, exp_sums


def _check(
    partials: Tensor, bias: Tensor | None, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor, sin: Tensor,
    positions: Tensor, k_cache: Tensor, v_cache: Tensor, heads: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    B, KV, _, width = k_cache.shape
    D = partials.shape[-1] // (heads + 2 * KV)
    N = (heads + 2 * KV) * D
    if (k_cache.dtype, width) not in ((dtype, D), (torch.int8, packed_width(D))):
        raise ValueError(
            f"k_cache is {k_cache.dtype} {tuple(k_cache.shape)}: expected {dtype} [..., {D}] or packed int8"
        )
    if heads % KV:
        raise ValueError(f"{heads} heads and k_cache {tuple(k_cache.shape)}: expected a multiple of {KV} heads")
    if partials.dtype != torch.float32 or partials.shape[1:] != (B, N) or not partials.is_contiguous():
        raise ValueError(f"partials are {partials.dtype} {tuple(partials.shape)}: expected fp32 [splits, {B}, {N}]")
    if v_cache.shape != k_cache.shape or v_cache.stride() != k_cache.stride() or v_cache.dtype != k_cache.dtype:
        raise ValueError(f"k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)}: expected one layout")
    if k_cache.stride(3) != 1 or D % 2:
        raise ValueError(f"k_cache has strides {k_cache.stride()}, head size {D}: expected contiguous, even heads")
    if positions.dtype != torch.int64 or positions.numel() != B or not positions.is_contiguous():
        raise ValueError(f"positions are {positions.dtype} {tuple(positions.shape)}: expected {B} contiguous int64")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm: expected both or none")
    of_all = q_norm is not None and q_norm.numel() != D
    normed = (("q_norm", q_norm, heads * D if of_all else D), ("k_norm", k_norm, KV * D if of_all else D))
    for name, tensor, count in (("bias", bias, N), *normed):
        if tensor is not None and (tensor.numel() != count or tensor.dtype != dtype):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}: expected {dtype} [{count}]")
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tensor.dtype != torch.float32 or tensor.numel() != B * D // 2 or not tensor.is_contiguous():
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}: expected fp32, {B} x {D // 2}")
    for tensor in (partials, bias, q_norm, k_norm, cos, sin, positions, v_cache):
        if tensor is not None and tensor.device != k_cache.device:
            raise ValueError(f"a tensor is on {tensor.device} and k_cache on {k_cache.device}: expected the same")


rope_attention = make_op("rope_attention", launch, _outputs, mutates=("k_cache", "v_cache"))
