"""Several requests decoded together: a queue, blocks of prompts and steps in turns, one step for all of a plan.

One thread owns the model. Prompts are read in blocks, between which the running requests take steps: neither a long
prompt nor another's plan keeps anybody waiting for more than a block and a few steps. Blocks go in turn to the prompt
with the least left and to the one that came first, so short ones begin soon and long ones get half at least. Requests
of one plan share a step; plans take turns. A request's text does not depend on what was served before it or is beside
it, to the bit on a CPU (its kernels sum each row as if it were alone; row_table.py says what rows share).
"""

import functools
import threading
import time
import traceback
from collections import deque

import torch
from torch import Tensor

from teal.decoding.engine import PREFILL_CHUNK, Engine
from teal.decoding.plan_switch import Tally
from teal.decoding.prefill import Prefill
from teal.decoding.requests import Done, Observer, Piece, Request, Sequence, TokenLogprob, token_logprob
from teal.decoding.row_table import Flight, Group, RowTable
from teal.decoding.rows import DecodeRows
from teal.decoding.speculation import SpeculativeEngine
from teal.errors import ParameterError, UserError
from teal.options import COUNTED_TOKENS, DEFAULT_MAX_NEW_TOKENS, DEFAULT_QUEUE, MAX_ROWS, SamplingParams
from teal.plan import SparsityPlan
from teal.teal_layers import achieved_sparsity

CPU_BLOCK = 64  # prompt tokens of a prefill call, the unit that is shared; on CUDA PREFILL_CHUNK
# Steps between two blocks of prompts, less after a shorter one. Of a 135M model a block takes as long as 5 to 8 steps of
# one row, or 2 of eight: neither reading nor writing gets much more time than the other.
STEPS_A_BLOCK = 4
IDLE_S = 0.5  # between looks at deadlines while nothing runs


class QueueFull(Exception):
    """No room for another request."""


class Scheduler:
    """Runs requests on an engine's model, up to rows at once; submit and cancel from any thread.

    While it runs, the engine is in use: Engine.generate and another Scheduler raise RuntimeError.
    """

    def __init__(
        self,
        engine: Engine,
        rows: int = MAX_ROWS,
        queue: int = DEFAULT_QUEUE,
        context: int | None = None,
        ahead: bool | None = None,
    ) -> None:
        """queue requests may wait; ahead: a step starts before the host has read the one before, None where a GPU can."""
        if not 1 <= rows <= MAX_ROWS:
            raise ParameterError(f"{{rows}} {{}} is out of range; expected 1 to {MAX_ROWS}", rows)
        self.engine = engine
        limit = engine.model.config.max_seq_len
        self.context = min(context or limit, limit)
        self.queue = queue
        self.observer = Observer()
        self.waiting: deque[Request] = deque()
        self.owed_steps = 0  # to the running requests, before another block
        self.sequences: dict[Request, Sequence] = {}
        self.achieved: list[dict[str, float]] = []
        self.own_plan = engine.plan
        self.changed = threading.Condition()
        self.closing = False
        self.ahead = engine.device.type == "cuda" if ahead is None else ahead
        with torch.inference_mode():
            self.rows = DecodeRows(engine, rows, self.context)
        self.table = RowTable(self.rows, rows, CPU_BLOCK if engine.device.type == "cpu" else PREFILL_CHUNK)
        self.prefill = Prefill(self.rows, self.table)
        self.ended = threading.Event()

    def start(self) -> None:
        """Run in a thread of its own. Raises RuntimeError if the engine is in use."""
        self.engine.use.take()
        threading.Thread(target=self._run, name="scheduler", daemon=True).start()

    def submit(self, *requests: Request) -> None:
        """Queue requests. Raises QueueFull if they do not all fit, UserError for one that cannot be run."""
        for request in requests:
            count = len(request.prompt_ids)
            if count < 1:
                raise UserError("the prompt is empty; give at least one token of text")
            if count >= self.context:
                raise UserError(f"the prompt has {count} tokens; the context of {self.context} must exceed it")
            if request.plan is not None and self.own_plan is None:
                raise UserError(
                    "a plan was given for an engine that was loaded dense; load it with a sparsity or a plan"
                )
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
            for request in (*self._queued(), *self._admitted()):
                request.deadline = 0.0
            self.ended.wait()

    @property
    def load(self) -> tuple[int, int]:
        """(requests that wait, requests that run)."""
        return len(self.waiting), len(self._admitted())

    def run(self) -> None:
        """Serve until close. Raises RuntimeError if the engine is in use. On a CPU in the thread that loaded the model:
        OpenMP's teams of two threads of a program get in each other's way, and a token took 21 ms instead of 13.
        """
        self.engine.use.take()
        self._run()

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                self.rows.warm()
                self._serve()
        finally:
            self._switch(self.own_plan)
            self.engine.use.release()
            self.ended.set()

    def _serve(self) -> None:
        while True:
            with self.changed:
                while not (self.waiting or self._admitted()):
                    if self.closing:
                        return
                    self.changed.wait(IDLE_S)
            try:
                self._drop_ended()
                self._admit()
                if self.prefill.requests and not (self.owed_steps > 0 and self.table.groups):
                    self._prefill_block()
                else:
                    self._step_all()
            except Exception as error:  # a bug or the device's limit: the requests learn of it, the server lives on
                traceback.print_exc()
                self._fail(f"{type(error).__name__}: {error}")

    def _queued(self) -> list[Request]:
        """Requests that wait, while others may come."""
        with self.changed:
            return list(self.waiting)

    def _admitted(self) -> list[Request]:
        """Requests that have a row of the cache."""
        return [*self.table.running, *self.prefill.requests]

    def _fail(self, message: str) -> None:
        for request in self._admitted():
            self._end(request, "error", message)
        self.table.forget()

    def _drop_ended(self) -> None:
        now = time.monotonic()
        for request in [*self._admitted(), *self._queued()]:
            if request.cancelled:
                self._end(request, "cancelled")
            elif request.deadline is not None and now > request.deadline:
                self._end(request, "length")

    def _end(self, request: Request, reason: str, error: str | None = None) -> None:
        """Take request out of wherever it is and say so to whoever waits for it."""
        if request.counting and request not in self.waiting:
            self._stop_counting(request)
        sequence = self.sequences.pop(request, None)
        if request in self.waiting:
            self.waiting.remove(request)
        else:
            if request in self.prefill.requests:
                self.prefill.requests.remove(request)
            self.table.leave(request)
        self.observer.finished(request, reason)
        if request.cancelled:
            return
        if sequence is not None and error is None and (tail := sequence.rest()) is not None:
            request.emit(tail)
        request.emit(Done(reason, error))

    def _admit(self) -> None:
        """Give free rows to the requests that came first."""
        while self.waiting and self.table.has_room():
            request = self.waiting.popleft()
            self.table.take(request, self.engine.cache_key(self._plan_of(request)))
            self.prefill.requests.append(request)
            self.rows.reserve(len(request.prompt_ids) + request.max_new_tokens, self.table.held())

    def _plan_of(self, request: Request) -> SparsityPlan | None:
        return request.plan or self.own_plan

    def _switch(self, plan: SparsityPlan | None, tally: Tally | None = None) -> None:
        """Let the next calls of the model be of this plan, and count what they drop in tally."""
        if plan is not None and plan is not self.engine.plan:
            self.engine.switch_plan(plan)
        if self.engine.plan_switch is not None:
            self.engine.plan_switch.count(tally)

    def _stop_counting(self, request: Request) -> None:
        """Note what was dropped while request was counted; go on for the others of its plan."""
        group = self.table.group_of(request)
        if group is None or group.tally is None:
            return
        self._switch(group.plan, group.tally)
        self.achieved = achieved_sparsity(self.engine.model)
        if not any(other.counting for other in group.requests if other is not request):
            group.tally = None
            self._switch(group.plan)

    def _prefill_block(self) -> None:
        """Read the next part of a prompt; with the last part the request runs."""
        request = self.prefill.next()
        plan = self._plan_of(request)
        self._switch(plan)
        tokens, logits = self.prefill.read_block(request)
        self.owed_steps = -(-tokens * STEPS_A_BLOCK // self.table.block)
        if logits is not None:
            self.table.join(request, plan)
            self.sequences[request] = Sequence(request, self.engine)
            self._choose(request, logits, int(logits.argmax()))

    def _step_all(self) -> None:
        """One step of every plan, or a round of drafting."""
        self.owed_steps -= 1
        for group in list(self.table.groups):
            if group.requests and not self._speculate(group):
                self._step(group)

    def _step(self, group: Group) -> None:
        """One token more for every running request of a plan."""
        flight, rows = group.flight or self._launch(group), self.table.rows_of(group)
        group.flight = None
        same = flight.requests == group.requests and flight.rows == rows
        if self.ahead and same and not self._may_draft(group) and all(r.is_argmax for r in group.requests):
            group.flight = self._launch(group, fed=True)
        for request in group.requests:
            if request in flight.requests:
                self.table.contents_of(request).ids.append(request.token)
        for i, (request, token) in enumerate(zip(flight.requests, flight.step.likeliest(), strict=True)):
            if request in group.requests:  # it has not ended meanwhile
                self._choose(request, flight.step.logits[i : i + 1], token)

    def _may_draft(self, group: Group) -> bool:
        """Whether the engine drafts and one request runs that takes the likeliest, by the engine's own plan.

        Beside others it takes ordinary steps, which read the weights once for all of them.
        """
        engine, requests = self.engine, self.table.running
        drafts = isinstance(engine, SpeculativeEngine) and engine.drafts_under(self.own_plan)
        return drafts and group.plan is self.own_plan and len(requests) == 1 and requests[0].is_argmax

    def _speculate(self, group: Group) -> bool:
        """Several tokens by drafting and verifying, if that may be and there is something to verify."""
        engine = self.engine
        if not isinstance(engine, SpeculativeEngine) or group.flight is not None or not self._may_draft(group):
            return False
        request, ids = group.requests[0], self.table.contents[0].ids
        text = self.sequences[request].text
        if engine.drafter is None:
            text.extend([*ids, request.token][len(text.text) :])
        drafts = engine.propose(text, min(engine.best_length(), request.max_new_tokens - request.new_tokens - 1))
        if drafts == 0:
            return False
        self._switch(group.plan)
        self.rows.feed(range(1), [request.token], [len(ids)])
        tokens = self.rows.round(drafts, len(ids) + drafts + 1)
        self.observer.drafted(drafts, len(tokens) - 1)
        for token in tokens:
            if request in group.requests:
                ids.append(request.token)
                self._choose(request, None, token)
        return True

    def _launch(self, group: Group, fed: bool = False) -> Flight:
        """Start a step of a plan's requests. fed: it goes on from one of the same requests that was just started."""
        requests, rows = list(group.requests), self.table.rows_of(group)
        lengths = [len(self.table.contents[row].ids) for row in rows]
        if not fed:
            self.rows.feed(rows, [request.token for request in requests], lengths)
        counting = any(request.counting for request in requests)
        if counting and group.tally is None and self.engine.plan_switch is not None:
            group.tally = self.engine.plan_switch.tally()
        self._switch(group.plan, group.tally if counting else None)
        return Flight(requests, rows, self.rows.step(rows, max(lengths) + (2 if fed else 1), eager=counting))

    def _choose(self, request: Request, logits: Tensor | None, likeliest: int) -> None:
        """Sample a token for request from its logits [1, V], pass its text on, end it if it is finished.

        One that takes the likeliest needs no logits. A grammar without a way on ends this request and no other.
        """
        sequence = self.sequences[request]
        try:
            token = likeliest if logits is None or request.is_plain else sequence.sample(logits)
            complete = request.matcher is not None and request.matcher.accept(token)
        except UserError as error:
            self._end(request, "refused", str(error))
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
