"""Decode step of a transformer block in seven kernels, on the tensors of the block's own modules.

norm + q,k,v -> rotation, cache, attention -> o -> residual -> norm + gate,up -> activation + down -> residual. Each
projection is a sparse GEMV that makes its own input and drops what is below the threshold. It leaves partial sums,
which the next kernel adds up. A norm after a sublayer is one kernel more, and so are norms of q and k over all heads.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from teal.kernels.activation_gemv import activation_gemv
from teal.kernels.attention_gemv import attention_gemv
from teal.kernels.formats.packing import Weight
from teal.kernels.norm_gemv import norm_gemv
from teal.kernels.norm_residual import norm_residual
from teal.kernels.reduce_partials import reduce_partials
from teal.kernels.rope_attention import rope_attention
from teal.kernels.sparse_gemv import sparse_gemv
from teal.layers.team import Summed
from teal.model import Attention, Block, LayerNorm, RMSNorm


def fused_decode(
    block: Block,
    window: int | None,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """As block's forward for one token a row: x fp32 [B, 1, C] -> fp32 [B, 1, C]; writes keys and values at positions.

    The block's projections are SparseLinear or QuantizedLinear modules; window is its attention window in tokens.
    Raises ValueError for more than MAX_ROWS rows, and for what the kernels' checks refuse.
    """
    attention, feed_forward = block.attention, block.feed_forward
    wo, down = attention.wo, feed_forward.down
    x = x.flatten(0, 1)  # [B, C]
    qkv = _of_normed(block.attention_norm, x, attention.wqkv)
    splits = _attention(attention, qkv, cos, sin, positions.contiguous(), k_cache, v_cache, window)
    o = attention_gemv(*splits, wo.weight, wo.thresholds, wo.scales, wo.zeros, wo.refined)
    x = _added(o, wo.bias, block.attention_end, x)
    gate_up = _of_normed(block.ffn_norm, x, feed_forward.gate_up)
    y = activation_gemv(
        gate_up, down.weight, down.thresholds, down.scales, down.zeros, down.refined, block.config.activation
    )
    return _added(y, None, block.ffn_end, x)[:, None]


def _of_normed(norm: nn.Module, x: Tensor, linear: Any) -> Tensor:
    """Partial sums [splits, B, N] of linear's product with norm(x), for x fp32 [B, C]."""
    weight = (linear.weight, linear.thresholds, linear.segments, linear.scales, linear.zeros, linear.refined)
    if isinstance(norm, (RMSNorm, LayerNorm)):
        return norm_gemv(x, norm.weight, norm.eps, *weight, _bias(norm))
    return sparse_gemv(x, *weight)


def _attention(
    attention: Attention, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Attention's splits from the partial sums of q, k and v: see rope_attention."""
    config = attention.config
    wqkv: Any = attention.wqkv
    bias = wqkv.bias
    q_norm, k_norm = attention.q_norm, attention.k_norm
    norms = (q_norm.weight, k_norm.weight) if isinstance(q_norm, RMSNorm) else (None, None)
    if norms[0] is not None and norms[0].numel() > config.head_dim:
        # Of all heads at once: every program of rope_attention reads all of q, which is too much in splits.
        qkv, bias = reduce_partials(qkv, torch.float32, bias, None)[None], None
    dtype = Weight(wqkv.weight, wqkv.scales).dtype
    return rope_attention(
        qkv, bias, *norms, config.norm_eps, cos, sin, positions, k_cache, v_cache, config.num_heads, window or 0, dtype,
        config.attention_softcap or 0.0,
    )  # fmt: skip


def _added(partials: Tensor, bias: Tensor | None, end: nn.Module, x: Tensor) -> Tensor:
    """x [B, C] plus what a sublayer's end makes of the sum of partials [splits, B, C] and bias."""
    add_up: Callable[..., Tensor] = reduce_partials
    if isinstance(end, Summed):
        add_up, end = end.team.sum_of_partials, end.inner
    if isinstance(end, (RMSNorm, LayerNorm)):
        return norm_residual(add_up(partials, x.dtype, bias, None), end.weight, _bias(end), end.eps, x)
    return add_up(partials, x.dtype, bias, x)


def _bias(norm: RMSNorm | LayerNorm) -> Tensor | None:
    return norm.bias if isinstance(norm, LayerNorm) else None
