"""Requests from any thread, queued for a decoder that one thread runs; batches of prompts."""

import functools
import threading
import time
import traceback
from collections import deque

from teal.decoding.decoder import PREFILL_CHUNK, Decoder
from teal.decoding.engine import Engine
from teal.decoding.requests import Done, Piece, Request
from teal.errors import ParameterError
from teal.options import DEFAULT_MAX_NEW_TOKENS, DEFAULT_QUEUE, MAX_ROWS, SamplingParams

CPU_BLOCK = 64  # prompt tokens of a prefill call, the unit that is shared; on CUDA PREFILL_CHUNK
IDLE_S = 0.5  # between looks at deadlines while nothing runs


class QueueFull(Exception):
    """No room for another request."""


class Scheduler:
    """Runs requests on an engine's model, up to rows at once; submit and cancel from any thread.

    While it runs, the engine is in use: Engine.generate and another Scheduler raise RuntimeError. A request's text does
    not depend on what was served before it or is beside it (decoder.py and row_table.py say how far).
    """

    def __init__(
        self,
        engine: Engine,
        rows: int = MAX_ROWS,
        queue: int = DEFAULT_QUEUE,
        context: int | None = None,
        ahead: bool | None = None,
    ) -> None:
        """queue requests may wait; ahead: a step starts before the host has read the one before, None on a GPU only."""
        if not 1 <= rows <= MAX_ROWS:
            raise ParameterError(f"{{rows}} {{}} is out of range; expected 1 to {MAX_ROWS}", rows)
        self.engine = engine
        limit = engine.model.config.max_seq_len
        self.context = min(context or limit, limit)
        self.queue = queue
        self.waiting: deque[Request] = deque()
        self.changed = threading.Condition()
        self.closing = False
        on_cpu = engine.device.type == "cpu"
        block = CPU_BLOCK if on_cpu else PREFILL_CHUNK
        self.decoder = Decoder(engine, rows, self.context, block, not on_cpu if ahead is None else ahead)
        self.ended = threading.Event()
        self.is_warm = False

    def warm(self) -> None:
        """On CUDA compile and capture all that greedy requests need; run does it otherwise, while requests wait.

        Raises RuntimeError if the engine is in use.
        """
        with self.engine.use.taken():
            self.decoder.warm()
        self.is_warm = True

    def start(self) -> None:
        """Run in a thread of its own. Raises RuntimeError if the engine is in use."""
        self.engine.use.take()
        threading.Thread(target=self._run, name="scheduler", daemon=True).start()

    def submit(self, *requests: Request) -> None:
        """Queue requests. Raises QueueFull if they do not all fit, UserError for one that cannot be run."""
        for request in requests:
            self.decoder.check(request)
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
            for request in (*self._queued(), *self.decoder.admitted):
                request.deadline = 0.0
            self.ended.wait()

    @property
    def load(self) -> tuple[int, int]:
        """(requests that wait, requests that run)."""
        return len(self.waiting), len(self.decoder.admitted)

    def run(self) -> None:
        """Serve until close. Raises RuntimeError if the engine is in use. On a CPU call it in the thread that loaded
        the model. OpenMP's teams of two threads of a program get in each other's way: a token took 21 ms instead of 13.
        """
        self.engine.use.take()
        self._run()

    def _run(self) -> None:
        try:
            if not self.is_warm:
                self.decoder.warm()
            while self._wait_for_work():
                try:
                    self._drop_ended()
                    self._admit()
                    if self.decoder.admitted:
                        self.decoder.advance()
                except Exception as error:  # a bug or the device's limit: the requests learn of it, the server lives on
                    traceback.print_exc()
                    self.decoder.fail(f"{type(error).__name__}: {error}")
        finally:
            self.decoder.use_own_plan()
            self.engine.use.release()
            self.ended.set()

    def _wait_for_work(self) -> bool:
        """Whether there are requests, or there will be none any more."""
        with self.changed:
            while not (self.waiting or self.decoder.admitted):
                if self.closing:
                    return False
                self.changed.wait(IDLE_S)
        return True

    def _queued(self) -> list[Request]:
        """Requests that wait, while others may come."""
        with self.changed:
            return list(self.waiting)

    def _drop_ended(self) -> None:
        """End requests that were cancelled or are late."""
        now = time.monotonic()
        for requests, end in ((self.decoder.admitted, self.decoder.end), (self._queued(), self._end_waiting)):
            for request in requests:
                if request.cancelled:
                    end(request, "cancelled")
                elif request.deadline is not None and now > request.deadline:
                    end(request, "length")

    def _end_waiting(self, request: Request, reason: str) -> None:
        self.waiting.remove(request)
        self.decoder.finish(request, reason)

    def _admit(self) -> None:
        """Give free rows to the requests that came first."""
        while self.waiting and self.decoder.has_room():
            self.decoder.admit(self.waiting.popleft())


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
