"""Decode step of a sparse transformer block in seven kernels; replaces blocks from outside.

norm + q,k,v -> rotation, cache, attention -> o -> residual -> norm + gate,up -> silu + down -> residual. Each projection is a sparse GEMV that makes its own input, drops what is below the threshold and leaves
partial sums, which the next kernel adds up. Prefill and devices without these kernels go through the block itself,
on the same weights.
"""

from torch import Tensor, nn

from teal.kernels.attention_gemv import attention_gemv
from teal.kernels.gemv.launch import kernels_run_on
from teal.kernels.norm_gemv import norm_gemv
from teal.kernels.reduce_partials import reduce_partials
from teal.kernels.rope_attention import rope_attention
from teal.kernels.silu_gemv import silu_gemv
from teal.model import Block, RMSNorm, Transformer
from teal.options import MAX_ROWS
from teal.teal_layers import SparseLinear


class FusedBlock(nn.Module):
    """A Block whose projections are SparseLinear modules; one token a row takes the fused path."""

    def __init__(self, block: Block, window: int | None) -> None:
        super().__init__()
        self.block = block
        self.prefill: nn.Module = block  # what takes calls of many tokens: the block, perhaps compiled
        self.window = window or 0

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor
    ) -> Tensor:
        """As Block.forward."""
        if x.shape[1] > 1:
            return self.prefill(x, cos, sin, mask, positions, k_cache, v_cache)
        if x.shape[0] > MAX_ROWS or self.wqkv.counting or not kernels_run_on(x.device):
            return self.block(x, cos, sin, mask, positions, k_cache, v_cache)
        return self.decode(x, cos, sin, positions, k_cache, v_cache)

    @property
    def wqkv(self) -> SparseLinear:
        """The projection that stands for all four: they count together."""
        assert isinstance(self.block.attention.wqkv, SparseLinear)
        return self.block.attention.wqkv

    def decode(
        self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor
    ) -> Tensor:
        """x fp32 [B, 1, C] -> fp32 [B, 1, C]; writes keys and values at positions."""
        attention, feed_forward = self.block.attention, self.block.feed_forward
        wqkv, wo, gate_up, down = attention.wqkv, attention.wo, feed_forward.gate_up, feed_forward.down
        q_norm, k_norm = attention.q_norm, attention.k_norm
        norms = (q_norm.weight, k_norm.weight) if isinstance(q_norm, RMSNorm) else (None, None)
        before, between = self.block.attention_norm, self.block.ffn_norm
        x, positions = x.flatten(0, 1), positions.contiguous()  # [B, C], [B, 1]
        qkv = norm_gemv(
            x, before.weight, before.eps, wqkv.weight, wqkv.thresholds, wqkv.segments, wqkv.scales, wqkv.zeros
        )
        heads = attention.config.num_heads
        shares = rope_attention(
            qkv, wqkv.bias, *norms, before.eps, cos, sin, positions, k_cache, v_cache, heads, self.window,
            before.weight.dtype,
        )  # fmt: skip
        o = attention_gemv(*shares, wo.weight, wo.thresholds, wo.scales, wo.zeros)
        x = reduce_partials(o, x.dtype, wo.bias, x)
        hidden = norm_gemv(
            x, between.weight, between.eps, gate_up.weight, gate_up.thresholds, gate_up.segments,
            gate_up.scales, gate_up.zeros,
        )  # fmt: skip
        y = silu_gemv(hidden, down.weight, down.thresholds, down.scales, down.zeros)
        return reduce_partials(y, x.dtype, None, x)[:, None]


def fuse_blocks(model: Transformer) -> None:
    """Replace every block of a sparse model, in place, by a FusedBlock."""
    windows = model.config.sliding_windows
    model.layers = nn.ModuleList(FusedBlock(block, window) for block, window in zip(model.blocks, windows, strict=True))
