"""Several requests decoded together: a queue, rows of one KV cache, and one step for all running rows.

One thread owns the model. Running requests occupy the first rows of the cache; the rows behind keep what
finished requests left, so that a prompt which begins like an earlier one starts from its keys and values. Only those
made by prefill are shared, in whole blocks that are always computed alike: a request's text does not depend on what
was served before it or is beside it, to the bit on a CPU (its kernels sum each row as if it were alone).
"""

import functools
import threading
import time
import traceback
from collections import deque

import torch
from torch import Tensor

from decode_rows import DecodeRows, Step
from engine import PREFILL_CHUNK, Engine
from errors import UserError
from generation import Done, Observer, Piece, Request, Sequence, TokenLogprob, token_logprob
from params import COUNTED_TOKENS, DEFAULT_MAX_NEW_TOKENS, SamplingParams
from speculation import SpeculativeEngine
from teal_layers import achieved_sparsity, set_counting

CPU_BLOCK = 64  # prompt tokens of a prefill call, the unit that is shared; on CUDA PREFILL_CHUNK
MAX_ROWS = 8  # what the sparse kernels take at once
IDLE_S = 0.5  # between looks at deadlines while nothing runs


class QueueFull(Exception):
    """No room for another request."""


class Scheduler:
    """Runs requests on an engine's model, up to rows at once; submit and cancel from any thread."""

    def __init__(
        self,
        engine: Engine,
        rows: int = MAX_ROWS,
        queue: int = 128,
        context: int | None = None,
        ahead: bool | None = None,
    ) -> None:
        """queue requests may wait; ahead: a step starts before the host has read the one before, None where a GPU can."""
        if not 1 <= rows <= MAX_ROWS:
            raise UserError(f"--rows {rows} is out of range; expected 1 to {MAX_ROWS}")
        self.engine = engine
        limit = engine.model.config.max_seq_len
        self.context = min(context or limit, limit)
        self.queue = queue
        self.observer = Observer()
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # request i is in row i
        self.prefilling: tuple[Request, int] | None = None  # and its row
        self.sequences: dict[Request, Sequence] = {}
        self.row_ids: list[list[int]] = [[] for _ in range(rows)]  # tokens whose keys and values are in each row
        self.row_shared = [0] * rows  # how many of them were made by prefill
        self.achieved: list[dict[str, float]] = []
        self.own_plan = engine.plan
        self.changed = threading.Condition()
        self.closing = False
        self.block = CPU_BLOCK if engine.device.type == "cpu" else PREFILL_CHUNK
        self.ahead = engine.device.type == "cuda" if ahead is None else ahead
        self.in_flight: tuple[list[Request], Step] | None = None  # a step whose tokens nobody has read yet
        with torch.inference_mode():
            self.rows = DecodeRows(engine, rows, self.context)
        self.ended = threading.Event()

    def start(self) -> None:
        """Run in a thread of its own."""
        threading.Thread(target=self.run, name="scheduler", daemon=True).start()

    def submit(self, *requests: Request) -> None:
        """Queue requests. Raises QueueFull if they do not all fit, UserError for a prompt that cannot be run."""
        for request in requests:
            count = len(request.prompt_ids)
            if count < 1:
                raise UserError("the prompt is empty; give at least one token of text")
            if count >= self.context:
                raise UserError(f"the prompt has {count} tokens; the context of {self.context} must exceed it")
            request.max_new_tokens = min(request.max_new_tokens, self.context - count)
        with self.changed:
            if self.closing or len(self.waiting) + len(requests) > self.queue:
                raise QueueFull
            self.waiting.extend(requests)
            self.changed.notify()

    def cancel(self, request: Request) -> None:
        """End a request before the next step; its emit is not called again."""
        request.cancelled = True
        with self.changed:
            self.changed.notify()

    def close_when_idle(self) -> None:
        """Take no more requests; run returns when those there are have finished."""
        with self.changed:
            self.closing = True
            self.changed.notify()

    def close(self, timeout: float) -> None:
        """Take no more requests, let those there are finish for so many seconds, then end them."""
        self.close_when_idle()
        if not self.ended.wait(timeout):
            for request in (*self.waiting, *self._admitted()):
                request.deadline = 0.0
            self.ended.wait()

    @property
    def load(self) -> tuple[int, int]:
        """(requests that wait, requests that run)."""
        return len(self.waiting), len(self._admitted())

    def run(self) -> None:
        """Serve until close. On a CPU in the thread that loaded the model: OpenMP's teams of two threads of a program
        get in each other's way, and a token took 21 ms instead of 13.
        """
        try:
            with torch.inference_mode():
                self.rows.warm()
                self._serve()
        finally:
            self.ended.set()

    def _serve(self) -> None:
        while True:
            with self.changed:
                while not (self.waiting or self.running or self.prefilling):
                    if self.closing:
                        return
                    self.changed.wait(IDLE_S)
            try:
                self._drop_ended()
                self._admit()
                self._prefill_chunk()
                if not self._speculate():
                    self._step()
            except Exception as error:  # a bug or the device's limit: the requests learn of it, the server lives on
                traceback.print_exc()
                self._fail(f"{type(error).__name__}: {error}")

    def _admitted(self) -> list[Request]:
        """Requests that have a row of the cache."""
        prefilling = self.prefilling
        return [*self.running, *([prefilling[0]] if prefilling else [])]

    def _fail(self, message: str) -> None:
        self.in_flight = None
        for request in self._admitted():
            self._end(request, "error", message)
        self.row_ids = [[] for _ in self.row_ids]
        self.row_shared = [0] * len(self.row_shared)

    def _drop_ended(self) -> None:
        now = time.monotonic()
        for request in [*self._admitted(), *self.waiting]:
            if request.cancelled:
                self._end(request, "cancelled")
            elif request.deadline is not None and now > request.deadline:
                self._end(request, "length")

    def _end(self, request: Request, reason: str, error: str | None = None) -> None:
        """Take request out of wherever it is and say so to whoever waits for it."""
        if request.counting and request not in self.waiting:
            self._stop_counting(request)
        sequence = self.sequences.pop(request, None)
        if request in self.running:
            row, last = self.running.index(request), len(self.running) - 1
            self._swap(row, last)
            self.running[row] = self.running[last]
            self.running.pop()
        elif self.prefilling is not None and self.prefilling[0] is request:
            self.prefilling = None
        elif request in self.waiting:
            self.waiting.remove(request)
        self.observer.finished(request, reason)
        if request.cancelled:
            return
        if sequence is not None and reason != "error" and (tail := sequence.rest()) is not None:
            request.emit(tail)
        request.emit(Done(reason, error))

    def _stop_counting(self, request: Request) -> None:
        """Note what was dropped while request was counted; go on for the others."""
        self.achieved = achieved_sparsity(self.engine.model)
        if not any(other.counting for other in self._admitted() if other is not request):
            set_counting(self.engine.model, False)

    def _swap(self, a: int, b: int) -> None:
        """Exchange two rows of the cache."""
        if a == b:
            return
        newest = 1 if self.in_flight is not None else 0  # the position that a step started ahead fills
        self.rows.swap(a, b, max(len(self.row_ids[a]), len(self.row_ids[b])) + newest)
        self.row_ids[a], self.row_ids[b] = self.row_ids[b], self.row_ids[a]
        self.row_shared[a], self.row_shared[b] = self.row_shared[b], self.row_shared[a]

    def _admit(self) -> None:
        """Begin the oldest request's prefill, if a row is free and it decodes with the thresholds in use."""
        if self.prefilling is not None or not self.waiting or len(self.running) == len(self.row_ids):
            return
        request = self.waiting[0]
        plan = request.plan or self.own_plan
        if plan is not self.engine.plan:
            if self.running:  # it waits for its turn, and those behind it too: first come, first served
                return
            assert plan is not None
            if self.engine.use_plan(plan):
                self.rows.drop_graphs()
        if request.counting and not any(other.counting for other in self.running):
            set_counting(self.engine.model, True)
        self.waiting.popleft()
        row = self._row_for(request)
        self.prefilling = (request, row)
        self.rows.reserve(len(request.prompt_ids) + request.max_new_tokens)

    def _row_for(self, request: Request) -> int:
        """A free row that holds the longest start of the prompt there is, and how much that is, in request."""
        ids = request.prompt_ids

        def common(row: int) -> int:
            # At least two tokens are left for prefill: one alone would count as decoding and be sparse.
            limit = min(self.row_shared[row], len(ids) - 2)
            same = next((i for i in range(limit) if self.row_ids[row][i] != ids[i]), max(limit, 0))
            return same // self.block * self.block

        best = max(range(len(self.row_ids)), key=lambda r: (common(r), -len(self.row_ids[r])))
        reused = common(best)
        row = best
        if best < len(self.running):  # in use: copy from it
            row = min(range(len(self.running), len(self.row_ids)), key=lambda r: len(self.row_ids[r]))
            self.rows.copy(best, row, reused)
        self.row_ids[row] = ids[:reused]
        self.row_shared[row] = reused
        request.prefilled = request.reused_tokens = reused
        return row

    def _prefill_chunk(self) -> None:
        """Put the next part of the prompt into the cache; with the last part the request runs."""
        if self.prefilling is None:
            return
        request, row = self.prefilling
        ids = request.prompt_ids
        end = request.prefilled + self.block
        if end >= len(ids) - 1:  # one token that is left over joins the block before
            end = len(ids)
        logits = self.rows.prefill(row, ids[:end], request.prefilled)
        request.prefilled = end
        self.row_ids[row] = ids[:end]
        self.row_shared[row] = end
        if end < len(ids):
            return
        self._swap(row, len(self.running))
        self.prefilling = None
        self.running.append(request)
        self.sequences[request] = Sequence(request, self.engine)
        self._choose(request, logits, int(logits.argmax()))

    def _step(self) -> None:
        """One token more for every running request."""
        if not self.running:
            self.in_flight = None
            return
        requests, step = self.in_flight or self._launch()
        self.in_flight = None
        if self.ahead and requests == self.running and all(request.takes_likeliest for request in requests):
            self.in_flight = self._launch(fed=True)
        for request, ids in zip(self.running, self.row_ids, strict=False):
            if request in requests:
                ids.append(request.token)
        for row, (request, token) in enumerate(zip(requests, step.likeliest(), strict=True)):
            if request in self.running:  # it has not ended meanwhile
                self._choose(request, step.logits[row : row + 1], token)

    def _speculate(self) -> bool:
        """Several tokens by drafting and judging, if the engine does that and one request runs that takes the likeliest.

        Beside others it takes ordinary steps, which read the weights once for all of them.
        """
        engine = self.engine
        if not isinstance(engine, SpeculativeEngine) or not engine.draft_length or engine.plan is not self.own_plan:
            return False
        if self.in_flight is not None or len(self.running) != 1 or not self.running[0].takes_likeliest:
            return False
        request, ids = self.running[0], self.row_ids[0]
        text = self.sequences[request].text
        if engine.drafter is None:
            text.extend([*ids, request.token][len(text.text) :])
        drafts = engine.propose(text, min(engine.best_length(), request.max_new_tokens - request.new_tokens - 1))
        if drafts == 0:
            return False
        self.rows.feed([request.token], [len(ids)])
        tokens = self.rows.round(drafts, len(ids) + drafts + 1)
        self.observer.drafted(drafts, len(tokens) - 1)
        for token in tokens:
            if request in self.running:
                ids.append(request.token)
                self._choose(request, None, token)
        return True

    def _launch(self, fed: bool = False) -> tuple[list[Request], Step]:
        """Start a step of all running requests. fed: it goes on from one of the same requests that was just started."""
        requests = list(self.running)
        lengths = [len(self.row_ids[row]) for row in range(len(requests))]
        if not fed:
            self.rows.feed([request.token for request in requests], lengths)
        counting = any(request.counting for request in requests)
        return requests, self.rows.step(len(requests), max(lengths) + (2 if fed else 1), eager=counting)

    def _choose(self, request: Request, logits: Tensor | None, likeliest: int) -> None:
        """Sample a token for request from its logits [1, V], pass its text on, end it if it is finished.

        One that takes the likeliest needs no logits. A grammar without a way on ends this request and no other.
        """
        sequence = self.sequences[request]
        try:
            token = likeliest if logits is None or request.is_plain else sequence.sample(logits)
            complete = request.matcher is not None and request.matcher.accept(token)
        except UserError as error:
            self._end(request, "error", str(error))
            return
        self._timed(request)
        if request.count_sparsity and request.new_tokens == COUNTED_TOKENS:
            self._stop_counting(request)
        request.token = token
        logprob = None
        if request.top_logprobs is not None and logits is not None:
            logprob = token_logprob(logits[0], token, request.top_logprobs)
        self._pass_on(request, sequence, token, logprob, complete)

    def _timed(self, request: Request) -> None:
        now = time.monotonic()
        request.new_tokens += 1
        if request.first_token_s is None:
            request.first_token_s = now - request.arrived
            self.observer.first_token(request.first_token_s)
        else:
            self.observer.next_token(now - request.last_token_at)
        request.last_token_at = now

    def _pass_on(
        self, request: Request, sequence: Sequence, token: int, logprob: TokenLogprob | None, complete: bool
    ) -> None:  # fmt: skip
        """Emit what became text with token, and end the request with its last one."""
        if token in self.engine.tokenizer.eos_ids and not request.ignore_eos:
            self._end(request, "stop")
            return
        if (piece := sequence.push(token, logprob)) is not None:
            request.emit(piece)
        if sequence.filter.stopped or complete:
            self._end(request, "stop")
        elif request.new_tokens >= request.max_new_tokens:
            self._end(request, "length")


def generate_batch(
    engine: Engine,
    prompts: list[list[int]],
    params: SamplingParams = SamplingParams(),
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    stops: tuple[str, ...] = (),
    ignore_eos: bool = False,
) -> list[str]:
    """Texts that continue prompts (token ids), up to MAX_ROWS of them at once.

    Raises UserError for a prompt that is empty or fills the model's context, RuntimeError if a step fails.
    """
    texts = [""] * len(prompts)
    errors = []

    def take(i: int, event: Piece | Done) -> None:
        if isinstance(event, Piece):
            texts[i] += event.text
        elif event.error is not None:
            errors.append(event.error)

    scheduler = Scheduler(engine, rows=max(1, min(MAX_ROWS, len(prompts))), queue=len(prompts))
    requests = [
        Request(ids, functools.partial(take, i), params, max_new_tokens, stops, ignore_eos)
        for i, ids in enumerate(prompts)
    ]
    scheduler.submit(*requests)
    scheduler.close_when_idle()
    scheduler.run()
    if errors:
        raise RuntimeError(errors[0])
    return texts
