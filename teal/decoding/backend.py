"""What a backend is, the two that run a model's modules, as they are or compiled, and what all others build on.

A backend runs a model's layers. It changes neither the model's methods nor its list of layers. All give the same result
but for rounding; the eager one is the reference. Prefill and decode are methods of their own.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor

from teal.decoding.compilation import compile_blocks, mark_varying
from teal.layers.phase import call_state
from teal.model import Block, KVCache, Transformer

# What the inputs of a block's projections are, in the order of the kernels that run a whole block or step.
FUSED_INPUTS = ("normed", "attended", "normed", "activated")
PositionTensors = Callable[[Tensor, int], list[tuple[Tensor, Tensor, Tensor]]]


class Backend(ABC):
    """Runs the layers of model; reason says in one line why it was chosen."""

    name: ClassVar[str]
    compiles = False  # whether first calls take long, and steps may be captured in CUDA graphs
    keeps_modules = False  # whether all but decode runs the modules as they are, so that they may be calibrated

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
        return self.model.unembed(self.norm(hidden))


class EagerBackend(Backend):
    """The modules as they are."""

    name = "eager"
    keeps_modules = True

    def prefill(self, tokens: Tensor, positions: Tensor, kv_cache: KVCache) -> Tensor:
        """As Backend.prefill."""
        return self.model.hidden_states(tokens, positions, kv_cache)

    def _decode(self, tokens: Tensor, positions: Tensor, kv_cache: KVCache) -> Tensor:
        return self.model.hidden_states(tokens, positions, kv_cache)


class CompiledBackend(Backend):
    """Blocks by torch.compile, and on CUDA what surrounds them; the work happens at the first calls."""

    name = "compiled"
    compiles = True

    def __init__(self, model: Transformer, reason: str) -> None:
        super().__init__(model, reason)
        device = model.device
        self.run_block = compile_blocks(device)
        if device.type == "cuda":  # some 20 small kernels otherwise, 2 us each
            self.norm = torch.compile(model.norm.forward, fullgraph=True)
            self.position_tensors = torch.compile(model.position_tensors, fullgraph=True)

    def prefill(self, tokens: Tensor, positions: Tensor, kv_cache: KVCache) -> Tensor:
        """As Backend.prefill. A single token goes through the modules: it would be compiled for its length alone."""
        if tokens.shape[1] == 1:
            return self.model.hidden_states(tokens, positions, kv_cache)
        return self._through_blocks(tokens, positions, kv_cache, self.model.position_tensors)

    def _decode(self, tokens: Tensor, positions: Tensor, kv_cache: KVCache) -> Tensor:
        return self._through_blocks(tokens, positions, kv_cache, self.position_tensors)

    def _through_blocks(
        self, tokens: Tensor, positions: Tensor, kv_cache: KVCache, position_tensors: PositionTensors
    ) -> Tensor:
        x = self.model.embed(tokens)
        tensors = position_tensors(positions, kv_cache.length)
        for (block, _, k, v), own in zip(self.layers(kv_cache), tensors, strict=True):
            context = (*own, positions, k, v)
            mark_varying(self.state.phase, x, *context)
            x = self.run_block(block, x, *context)
        return x


class StepBackend(Backend):
    """Runs decode steps by kernels of its own, and prefill by another backend, on the same weights."""

    def __init__(self, others: Backend) -> None:
        super().__init__(others.model, others.reason)
        self.others, self.compiles = others, others.compiles
        self.norm, self.position_tensors = others.norm, others.position_tensors

    def prefill(self, tokens: Tensor, positions: Tensor, kv_cache: KVCache) -> Tensor:
        """As Backend.prefill."""
        return self.others.prefill(tokens, positions, kv_cache)
