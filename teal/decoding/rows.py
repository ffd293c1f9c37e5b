"""Rows of one KV cache that are decoded together: prefill of one, a step of neighbouring ones, moves between rows.

On CUDA a step of some rows is a graph of its own, captured when they first occur. It leaves the tokens it chose where
the next step reads them: the host may launch that one before it has looked at them.
"""

import math
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

from teal.decoding.compilation import capture
from teal.decoding.drafting import Drafter, Row
from teal.decoding.ranks import on_all_ranks
from teal.decoding.runner import ModelRunner
from teal.decoding.sampling import argmax_step, sample
from teal.model import KVCache
from teal.options import SamplingParams

# Attention sees whole multiples of this. Torch's on a CPU goes by blocks of 512 positions. A block that is masked
# altogether changes no bit, while a longer part of one would.
LENGTH_STEP = 512
CACHE_STEP = 256  # a single row's cache grows in multiples of this, so that few lengths are ever compiled
GREEDY = SamplingParams()
# Of a CUDA graph: layout of the plan, rows, sampling parameters; for a round the drafter and the number of drafts.
Key = tuple[int, range, SamplingParams, Drafter | None, int]


@dataclass(slots=True)
class Step:
    """What a step of n rows gives: fp32 logits [n, V], valid until the next step, and the tokens [n] that it chose."""

    logits: Tensor
    host: Tensor
    event: torch.cuda.Event | None

    def tokens(self) -> list[int]:
        """Waits for the step."""
        if self.event is not None:
            self.event.synchronize()
        return self.host.tolist()


def zeros(like: Tensor, length: int) -> Tensor:
    """Zeros for as many rows as like [layers, B, K, S, D] has, of length positions.

    On a CPU the system hands out their memory as it is written. 8 rows of 8192 positions of a 135M model are 1.5 GB,
    and filling them stopped everybody for 2 s.
    """
    shape = (*like.shape[:3], length, like.shape[4])
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    # numpy.zeros would ask for pages of 2 MB, which several rows share.
    pages = mmap.mmap(-1, math.prod(shape) * like.element_size())
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)


class DecodeRows:
    """So many rows of a cache of up to context positions, for the model of a runner.

    single: one request at a time, whose cache is as long as it may need and is read whole. Its steps may sample, with
    the generator and the seen tokens bool [1, V] kept here. Otherwise steps choose the argmax.
    """

    def __init__(self, runner: ModelRunner, count: int, context: int, single: bool = False) -> None:
        self.runner, self.device, self.context, self.single = runner, runner.device, context, single
        self.calls, self.address = runner.calls, runner.add_rows(self, count, context, single)
        self.tokens, self.positions = (torch.zeros(count, 1, dtype=torch.int64, device=self.device) for _ in range(2))
        self.seen = torch.zeros(1, runner.model.config.vocab_size, dtype=torch.bool, device=self.device)
        self.generator = torch.Generator(self.device)
        self.graphs: dict[Key, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # and what the step or round returns
        self.head_rows = 1 if self.device.type == "cpu" and not self._head_is_row_invariant(count) else count
        self.length_step = CACHE_STEP if single else LENGTH_STEP
        self.cache = runner.model.new_cache(count, min(self.length_step, context))

    def _head_is_row_invariant(self, count: int) -> bool:
        """Whether the output head gives a row the same bits alone as beside others; fp32 products often do not."""
        if count == 1:
            return True
        generator, logits = torch.Generator().manual_seed(0), self.runner.backend.logits
        hidden = torch.randn(count, self.runner.model.config.hidden_size, generator=generator).to(self.runner.dtype)
        return torch.equal(logits(hidden), torch.cat([logits(row) for row in hidden.split(1)]))

    def _logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits [n, V] of hidden states [n, C]."""
        parts = [self.runner.backend.logits(part).float() for part in hidden.split(self.head_rows)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    @on_all_ranks
    def reserve(self, length: int, held: list[int]) -> None:
        """Make room for so many positions, keeping the first held[row] of each row.

        On CUDA several rows get at least twice as many as there were, since graphs are captured anew.
        """
        if length <= self.cache.length:
            return
        least = length if self.single or self.device.type == "cpu" else max(length, 2 * self.cache.length)
        grown = self.cache.part(slice(None), None)
        new_length = min(-(-least // self.length_step) * self.length_step, self.context)
        grown.k, grown.v = (zeros(old, new_length) for old in (grown.k, grown.v))
        for row, kept in enumerate(held):
            for old, new in ((self.cache.k, grown.k), (self.cache.v, grown.v)):
                new[:, row, :, :kept] = old[:, row, :, :kept]
        self.cache = grown
        self.graphs.clear()

    @on_all_ranks
    def swap(self, a: int, b: int, length: int) -> None:
        """Exchange the first length positions of two rows."""
        for tensor in (self.cache.k, self.cache.v):
            kept = tensor[:, a, :, :length].clone()
            tensor[:, a, :, :length] = tensor[:, b, :, :length]
            tensor[:, b, :, :length] = kept

    @on_all_ranks
    def copy(self, source: int, to: int, length: int) -> None:
        """Copy the first length positions of a row to another."""
        for tensor in (self.cache.k, self.cache.v):
            tensor[:, to, :, :length] = tensor[:, source, :, :length]

    def _part(self, rows: slice, length: int) -> KVCache:
        """These rows of the cache; on a CPU, where attention takes time for all it sees, as far as several need it."""
        if self.single or self.device.type != "cpu":
            return self.cache.part(rows, None)
        return self.cache.part(rows, min(self.cache.length, -(-length // LENGTH_STEP) * LENGTH_STEP))

    @on_all_ranks
    def prefill(self, row: int, ids: list[int], begin: int) -> Tensor:
        """Put tokens ids[begin:] at their positions of a row; fp32 logits [1, V] after the last."""
        tokens = torch.tensor([ids[begin:]], device=self.device)
        positions = torch.arange(begin, len(ids), device=self.device)[None]
        hidden = self.runner.backend.prefill(tokens, positions, self._part(slice(row, row + 1), len(ids)))
        return self._logits(hidden[:, -1])

    @on_all_ranks
    def feed(self, rows: range, tokens: list[int], positions: list[int]) -> None:
        """Set what the next step of these rows reads, and where; after a step, that is what it chose, one further."""
        for tensor, values in ((self.tokens, tokens), (self.positions, positions)):
            tensor[rows.start : rows.stop, 0] = torch.tensor(values, device=self.device)

    def step(self, rows: range, length: int, params: SamplingParams = GREEDY, eager: bool = False) -> Step:
        """One token more for these rows, chosen by params; none gets longer than length. eager: not by a graph."""
        by_graph, counting = self.runner.use_graph and not eager, self.runner.backend.state.counting
        return self.step_from(self._random_state(params), rows, length, params, by_graph, counting)

    @on_all_ranks
    def step_from(
        self, state: bytes | None, rows: range, length: int, params: SamplingParams, by_graph: bool, counting: bool
    ) -> Step:
        """As step, from a state of the generator if one is given; counting: what all ranks do then, by the modules."""
        self._set_random_state(state)
        self.runner.backend.state.counting = counting
        logits = self._replay(rows, params) if by_graph else self._run(rows, length, params)
        tokens = self.tokens[rows.start : rows.stop, 0]
        if self.device.type == "cpu":
            return Step(logits, tokens.clone(), None)
        host = torch.empty(len(rows), dtype=torch.int64, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return Step(logits, host, event)

    def _run(self, rows: range, length: int, params: SamplingParams) -> Tensor:
        part = slice(rows.start, rows.stop)
        tokens, positions = self.tokens[part], self.positions[part]
        cache, backend = self._part(part, length), self.runner.backend
        if params.is_argmax and (chosen := backend.choose(tokens, positions, cache)) is not None:
            return chosen
        logits = self._logits(backend.decode(tokens, positions, cache)[:, -1])
        if params.is_argmax:
            argmax_step(logits, tokens, positions)
        else:
            positions += 1
            tokens.copy_(sample(logits, params, self.seen, self.generator)[:, None])
            self.seen.scatter_(1, tokens, True)
        return logits

    def round(self, drafter: Drafter, params: SamplingParams, drafts: int, length: int) -> list[int]:
        """Draft so many tokens for the first row and verify them: those accepted and one of the model's own.

        The row does not get longer than length.
        """
        shared = self.calls is not None and drafter.looks_up
        proposed = drafter.drafted[:drafts].tolist() if shared else []
        self.round_from(self._random_state(params), proposed, params, drafts, length, self.runner.use_graph)
        return drafter.verified(drafts)

    @on_all_ranks
    def round_from(
        self, state: bytes | None, proposed: list[int], params: SamplingParams, drafts: int, length: int,
        by_graph: bool,
    ) -> None:  # fmt: skip
        """As round, by the runner's drafter, from a state of the generator and with tokens proposed if given."""
        self._set_random_state(state)
        drafter = self.runner.drafter
        assert drafter is not None
        if proposed:
            drafter.drafted[: len(proposed)] = torch.tensor(proposed)
        if by_graph:
            self._replay(range(1), params, drafter, drafts)
        else:
            self._run_round(length, params, drafter, drafts)

    @on_all_ranks
    def begin(self, seed: int, ids: list[int]) -> None:
        """Of a single row: begin a text after these tokens, whose steps sample by seed."""
        self.generator.manual_seed(seed)
        self.seen.zero_()
        self.seen[0, torch.tensor(ids, device=self.device)] = True

    @on_all_ranks
    def saw(self, token: int) -> None:
        """Of a single row: note a token that no step chose."""
        self.seen[0, token] = True

    def _random_state(self, params: SamplingParams) -> bytes | None:
        """For other ranks: the host may have drawn on this one since the last step."""
        return None if self.calls is None or params.is_argmax else self.generator.get_state().numpy().tobytes()

    def _set_random_state(self, state: bytes | None) -> None:
        if state is not None:
            self.generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))

    def _run_round(self, length: int, params: SamplingParams, drafter: Drafter, drafts: int) -> Tensor:
        row = Row(self.tokens[:1], self.positions[:1], self._part(slice(0, 1), length), self.seen, self.generator)
        drafter.draft_and_verify(row, params, drafts)
        return drafter.outcome

    def _replay(self, rows: range, params: SamplingParams, drafter: Drafter | None = None, drafts: int = 0) -> Tensor:
        """Replay the CUDA graph of a step or a round, captured if need be; what the step or round returns."""
        key = self.runner.layout, rows, params.without_seed(), drafter, drafts
        if key not in self.graphs:
            self._capture(key)
        graph, result = self.graphs[key]
        graph.replay()
        return result

    def _capture(self, key: Key) -> None:
        """Record a step or a round. Tensors and random state stay; keys and values are written again by a replay."""
        _, rows, params, drafter, drafts = key
        found: list[Tensor] = []

        def run() -> None:
            length = self.cache.length
            if drafter is None:
                found.append(self._run(rows, length, params))
            else:
                found.append(self._run_round(length, params, drafter, drafts))

        generator, state = (None if params.is_argmax else self.generator), self.generator.get_state()
        graph = capture(run, (self.tokens, self.positions, self.seen), generator)
        self.generator.set_state(state)
        self.graphs[key] = graph, found[-1]

    @on_all_ranks
    def warm(self) -> None:
        """On CUDA compile and capture now what greedy requests of the runner's plan need."""
        if not self.runner.use_graph:
            return
        layout, drafter = self.runner.layout, self.runner.drafter
        for count in range(1, len(self.tokens) + 1):
            self._capture((layout, range(count), GREEDY, None, 0))
        if drafter is not None and self.runner.drafts_under(self.runner.plan):
            for drafts in range(1, drafter.length + 1):
                self._capture((layout, range(1), GREEDY, drafter, drafts))
