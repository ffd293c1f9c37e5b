"""Decode step of a transformer block in seven kernels, on the tensors of the block's own modules.

norm + q,k,v -> rotation, cache, attention -> o -> residual -> norm + gate,up -> silu + down -> residual. Each
projection is a sparse GEMV that makes its own input and drops what is below the threshold. It leaves partial sums,
which the next kernel adds up.
"""

from torch import Tensor

from teal.kernels.attention_gemv import attention_gemv
from teal.kernels.norm_gemv import norm_gemv
from teal.kernels.reduce_partials import reduce_partials
from teal.kernels.rope_attention import rope_attention
from teal.kernels.silu_gemv import silu_gemv
from teal.model import Block, RMSNorm


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
    wqkv, wo, gate_up, down = attention.wqkv, attention.wo, feed_forward.gate_up, feed_forward.down
    q_norm, k_norm = attention.q_norm, attention.k_norm
    norms = (q_norm.weight, k_norm.weight) if isinstance(q_norm, RMSNorm) else (None, None)
    before, between = block.attention_norm, block.ffn_norm
    x, positions = x.flatten(0, 1), positions.contiguous()  # [B, C], [B, 1]
    qkv = norm_gemv(
        x, before.weight, before.eps, wqkv.weight, wqkv.thresholds, wqkv.segments,
        wqkv.scales, wqkv.zeros, wqkv.refined,
    )  # fmt: skip
    heads = attention.config.num_heads
    splits = rope_attention(
        qkv, wqkv.bias, *norms, before.eps, cos, sin, positions, k_cache, v_cache, heads, window or 0,
        before.weight.dtype,
    )  # fmt: skip
    o = attention_gemv(*splits, wo.weight, wo.thresholds, wo.scales, wo.zeros, wo.refined)
    x = reduce_partials(o, x.dtype, wo.bias, x)
    hidden = norm_gemv(
        x, between.weight, between.eps, gate_up.weight, gate_up.thresholds, gate_up.segments,
        gate_up.scales, gate_up.zeros, gate_up.refined,
    )  # fmt: skip
    y = silu_gemv(hidden, down.weight, down.thresholds, down.scales, down.zeros, down.refined)
    return reduce_partials(y, x.dtype, None, x)[:, None]
