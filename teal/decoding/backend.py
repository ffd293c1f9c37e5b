"""What a backend is: it runs a model's layers in prefill and in decode steps. Those that there are: backends.py."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar

from torch import Tensor

from teal.layers.phase import call_state
from teal.model import Block, KVCache, Transformer

PositionTensors = Callable[[Tensor, int], tuple[Tensor, Tensor, dict[int | None, Tensor]]]


class Backend(ABC):
    """Runs the layers of model; reason says in one line why it was chosen."""

    name: ClassVar[str]
    compiles = False  # whether first calls take long, and steps may be captured in CUDA graphs

    def __init__(self, model: Transformer, reason: str) -> None:
        self.model, self.reason = model, reason
        self.state = call_state(model)
        self.norm: Callable[[Tensor], Tensor] = model.norm
        self.position_tensors: PositionTensors = model.position_tensors  # of decode steps

    @abstractmethod
    def prefill(self, tokens: Tensor, positions: Tensor, kv_cache: KVCache) -> Tensor:
        """Output of the last block, fp32 [B, T, C], for tokens at positions, int64 [B, T]; fills kv_cache there."""

    def decode(self, tokens: Tensor, positions: Tensor, kv_cache: KVCache) -> Tensor:
        """As prefill, for one token a row (T = 1), sparse where the model is."""
        assert tokens.shape[1] == 1, f"{tuple(tokens.shape)}: a decode step has one token a row"
        with self.state.decoding():
            return self._decode(tokens, positions, kv_cache)

    @abstractmethod
    def _decode(self, tokens: Tensor, positions: Tensor, kv_cache: KVCache) -> Tensor:
        """As decode, in that phase."""

    def choose(self, tokens: Tensor, positions: Tensor, kv_cache: KVCache) -> Tensor | None:
        """A greedy step in one launch: logits fp32 [B, V]; tokens becomes their argmax, and positions one more.

        None if this backend has none for these rows; then decode, logits and an argmax do it.
        """
        return None

    def layers(self, kv_cache: KVCache) -> Iterator[tuple[Block, int | None, Tensor, Tensor]]:
        """Each block with its attention window, and its keys and values in kv_cache."""
        return zip(self.model.blocks, self.model.config.sliding_windows, kv_cache.k, kv_cache.v, strict=True)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits fp32 [..., V] of hidden states [..., C]."""
        return self.model.lm_head(self.norm(hidden))
