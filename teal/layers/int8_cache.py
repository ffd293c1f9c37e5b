"""A KV cache in 8 bits (kernels/formats/kv_int8.py), put into a model from outside."""

import torch
from torch import Tensor

from teal.kernels.formats.kv_int8 import pack_int8, packed_width, unpack_int8
from teal.model import Attention, Transformer, attend


class Int8CacheAttention(Attention):
    """Attention that keeps keys and values in 8 bits: the cache's last dimension holds packed vectors."""

    def __init__(self, attention: Attention) -> None:
        with torch.device("meta"):
            super().__init__(attention.config)
        self.wqkv, self.wo = attention.wqkv, attention.wo
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm

    def cached_vector(self, dtype: torch.dtype) -> tuple[int, torch.dtype]:
        """As Attention.cached_vector: bytes of a packed vector."""
        return packed_width(self.config.head_dim), torch.int8

    def attend_cached(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor
    ) -> Tensor:
        """As Attention.attend_cached; what it attends to is what the cache gives back."""
        rows = torch.arange(q.shape[0], device=q.device)[:, None]
        k_cache[rows, :, positions] = pack_int8(k)
        v_cache[rows, :, positions] = pack_int8(v)
        D = self.config.head_dim
        keys, values = unpack_int8(k_cache, D, q.dtype), unpack_int8(v_cache, D, q.dtype)
        return attend(q, keys, values, mask, self.config.attention_softcap)


def has_int8_cache(model: Transformer) -> bool:
    """Whether use_int8_cache was called for model."""
    return any(isinstance(module, Int8CacheAttention) for module in model.modules())


def use_int8_cache(model: Transformer) -> None:
    """Make every block of model, in place, keep its keys and values in 8 bits, in caches of model.new_cache."""
    for block in model.blocks:
        block.attention = Int8CacheAttention(block.attention)
