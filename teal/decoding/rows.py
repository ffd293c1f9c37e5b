"""Rows of one KV cache that are decoded together: prefill of one, a step of neighbouring ones, moves between rows.

On CUDA a step of some rows is a graph of its own, captured when they first occur, and it leaves the likeliest tokens
where the next step reads them: the host may launch that one before it has looked at them.
"""

import math
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

from teal.decoding.compilation import capture
from teal.decoding.engine import Engine
from teal.decoding.sampling import argmax_step
from teal.decoding.speculation import Row, SpeculativeEngine
from teal.model import KVCache
from teal.options import SamplingParams

# Attention sees whole multiples of this: torch's on a CPU goes by blocks of 512 positions, and a block that is masked
# altogether changes no bit, while a longer part of one would.
LENGTH_STEP = 512


@dataclass(slots=True)
class Step:
    """What a step of n rows gives: fp32 logits [n, V], valid until the next step, and the likeliest tokens [n]."""

    logits: Tensor
    host: Tensor
    event: torch.cuda.Event | None

    def likeliest(self) -> list[int]:
        """Waits for the step."""
        if self.event is not None:
            self.event.synchronize()
        return self.host.tolist()


def zeros(like: Tensor, length: int) -> Tensor:
    """Zeros for as many rows as like [layers, B, K, S, D] has, of length positions.

    On a CPU the system hands out their memory as it is written: 8 rows of 8192 positions of a 135M model are 1.5 GB, and
    filling them stopped everybody for 2 s.
    """
    shape = (*like.shape[:3], length, like.shape[4])
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    # numpy.zeros would ask for pages of 2 MB, which several rows share.
    pages = mmap.mmap(-1, math.prod(shape) * like.element_size())
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)


class DecodeRows:
    """So many rows of a cache of up to context positions, for the model of an engine."""

    def __init__(self, engine: Engine, count: int, context: int) -> None:
        self.engine, self.model, self.device, self.use_graph = engine, engine.model, engine.device, engine.use_graph
        self.backend = engine.backend
        self.context = context
        self.tokens, self.positions = (torch.zeros(count, 1, dtype=torch.int64, device=self.device) for _ in range(2))
        # By layout of the engine's plan, and rows or drafted tokens.
        self.graphs: dict[tuple[int, range], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.round_graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self.unread = torch.zeros(1, self.model.config.vocab_size, dtype=torch.bool, device=self.device)
        self.head_rows = 1 if self.device.type == "cpu" and not self._head_is_row_invariant(count) else count
        self.cache = self.model.new_cache(count, min(LENGTH_STEP, context))

    def _head_is_row_invariant(self, count: int) -> bool:
        """Whether the output head gives a row the same bits alone as beside others; fp32 products often do not."""
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(count, self.model.config.hidden_size, generator=generator)
        hidden = hidden.to(self.model.embedding.weight.dtype)
        logits = self.backend.logits
        return torch.equal(logits(hidden), torch.cat([logits(row) for row in hidden.split(1)]))

    def _logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits [n, V] of hidden states [n, C]."""
        parts = [self.backend.logits(part).float() for part in hidden.split(self.head_rows)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def reserve(self, length: int, held: list[int]) -> None:
        """Make room for so many positions, keeping the first held[row] of each row.

        On CUDA for at least twice as many as there were, since graphs are captured anew.
        """
        if length <= self.cache.length:
            return
        least = length if self.device.type == "cpu" else max(length, 2 * self.cache.length)
        grown = self.cache.part(slice(None), None)
        grown.k, grown.v = (
            zeros(old, min(-(-least // LENGTH_STEP) * LENGTH_STEP, self.context)) for old in (grown.k, grown.v)
        )
        for row, kept in enumerate(held):
            for old, new in ((self.cache.k, grown.k), (self.cache.v, grown.v)):
                new[:, row, :, :kept] = old[:, row, :, :kept]
        self.cache = grown
        self.graphs.clear()
        self.round_graphs.clear()

    def swap(self, a: int, b: int, length: int) -> None:
        """Exchange the first length positions of two rows."""
        for tensor in (self.cache.k, self.cache.v):
            kept = tensor[:, a, :, :length].clone()
            tensor[:, a, :, :length] = tensor[:, b, :, :length]
            tensor[:, b, :, :length] = kept

    def copy(self, source: int, to: int, length: int) -> None:
        """Copy the first length positions of a row to another."""
        for tensor in (self.cache.k, self.cache.v):
            tensor[:, to, :, :length] = tensor[:, source, :, :length]

    def _part(self, rows: slice, length: int) -> KVCache:
        """These rows of the cache; on a CPU, where attention takes time for all it is shown, as far as needed."""
        if self.device.type != "cpu":
            return self.cache.part(rows, None)
        return self.cache.part(rows, min(self.cache.length, -(-length // LENGTH_STEP) * LENGTH_STEP))

    def prefill(self, row: int, ids: list[int], begin: int) -> Tensor:
        """Put tokens ids[begin:] at their positions of a row; fp32 logits [1, V] after the last."""
        tokens = torch.tensor([ids[begin:]], device=self.device)
        positions = torch.arange(begin, len(ids), device=self.device)[None]
        hidden = self.backend.prefill(tokens, positions, self._part(slice(row, row + 1), len(ids)))
        return self._logits(hidden[:, -1])

    def feed(self, rows: range, tokens: list[int], positions: list[int]) -> None:
        """Set what the next step of these rows reads, and where; after a step, that is its argmax at the next positions."""
        for tensor, values in ((self.tokens, tokens), (self.positions, positions)):
            tensor[rows.start : rows.stop, 0] = torch.tensor(values, device=self.device)

    def step(self, rows: range, length: int, eager: bool = False) -> Step:
        """One token more for these rows, none of which gets longer than length. eager: not by a graph."""
        if self.use_graph and not eager:
            key = self.engine.layout, rows
            if key not in self.graphs:
                self._capture(rows)
            graph, logits = self.graphs[key]
            graph.replay()
        else:
            logits = self._run(rows, length)
        tokens = self.tokens[rows.start : rows.stop, 0]
        if self.device.type == "cpu":
            return Step(logits, tokens.clone(), None)
        host = torch.empty(len(rows), dtype=torch.int64, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return Step(logits, host, event)

    def _run(self, rows: range, length: int) -> Tensor:
        part = slice(rows.start, rows.stop)
        tokens, positions = self.tokens[part], self.positions[part]
        hidden = self.backend.decode(tokens, positions, self._part(part, length))
        logits = self._logits(hidden[:, -1])
        argmax_step(logits, tokens, positions)
        return logits

    def round(self, drafts: int, length: int) -> list[int]:
        """Draft so many likeliest tokens for the first row and verify them: those accepted and one of the model's own.

        The row does not get longer than length. Only for an engine that drafts.
        """
        assert isinstance(self.engine, SpeculativeEngine)
        if self.use_graph:
            key = self.engine.layout, drafts
            if key not in self.round_graphs:
                self._capture_round(self.engine, drafts)
            self.round_graphs[key].replay()
        else:
            self._run_round(self.engine, drafts, length)
        return self.engine.verified(drafts)

    def _run_round(self, engine: SpeculativeEngine, drafts: int, length: int) -> None:
        row = Row(self.tokens[:1], self.positions[:1], self._part(slice(0, 1), length), self.unread, None)
        engine.draft_and_verify(row, SamplingParams(), drafts)

    def _capture_round(self, engine: SpeculativeEngine, drafts: int) -> None:
        self.round_graphs[engine.layout, drafts] = capture(
            lambda: self._run_round(engine, drafts, self.cache.length), (self.tokens, self.positions)
        )

    def _capture(self, rows: range) -> None:
        """Record a step of these rows. What running it writes, the first replay writes again."""
        found: list[Tensor] = []
        graph = capture(lambda: found.append(self._run(rows, self.cache.length)), (self.tokens, self.positions))
        self.graphs[self.engine.layout, rows] = (graph, found[-1])

    def warm(self) -> None:
        """On CUDA compile and capture what requests of the engine's own plan need now, not in the middle of an answer."""
        if self.use_graph:
            for count in range(1, len(self.tokens) + 1):
                self._capture(range(count))
            if isinstance(self.engine, SpeculativeEngine) and self.engine.drafts_under(self.engine.plan):
                for drafts in range(1, self.engine.draft_length + 1):
                    self._capture_round(self.engine, drafts)
