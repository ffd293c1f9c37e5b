"""Stub."""

from torch import Tensor

from teal.model import KVCache, Transformer


class Backend:
    name, reason = "eager", ""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def prefill(self, tokens: Tensor, positions: Tensor, kv_cache: KVCache) -> Tensor:
        return self.model.hidden_states(tokens, positions, kv_cache)

    def decode(self, tokens: Tensor, positions: Tensor, kv_cache: KVCache) -> Tensor:
        return self.model.hidden_states(tokens, positions, kv_cache)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)
