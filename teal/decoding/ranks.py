"""The calls by which one process decodes, repeated by the others that share its model (teal/layers/team.py).

Only the first rank knows requests, texts and clients. What it does to rows of the cache it tells the others before it
does it, by name and arguments. They make the same calls, and so the same kernels, graphs and exchanges. All ranks get
all logits and draw with the same random state, so that they choose the same tokens.
"""

import functools
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Client, Connection, Listener
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from teal.layers.team import Team

Method = TypeVar("Method", bound=Callable[..., Any])


class Calls:
    """What the first rank tells the others: runners by number, their rows by number, a method and its arguments.

    Through local sockets, with a key that only the ranks know. Arguments are plain objects: no tensors.
    """

    def __init__(self, team: Team) -> None:
        self.team, self.leads = team, team.rank.index == 0
        self.runners: list[Any] = []
        self.others = self._listen() if self.leads else [self._connect()]
        self.lock = threading.Lock()

    def _listen(self) -> list[Connection]:
        key = secrets.token_bytes(32)
        with Listener(("127.0.0.1", 0), authkey=key) as listener:
            dist.broadcast_object_list([listener.address, key], 0, device=torch.device("cpu"))
            return [listener.accept() for _ in range(self.team.rank.count - 1)]

    def _connect(self) -> Connection:
        found: list[Any] = [None, None]
        dist.broadcast_object_list(found, 0, device=torch.device("cpu"))
        address, key = found
        return Client(address, authkey=key)

    def add(self, runner: Any) -> int:
        """The number of a runner. All ranks make the same runners in the same order."""
        self.runners.append(runner)
        return len(self.runners) - 1

    def tell(self, runner: int, rows: int | None, method: str, *arguments: Any) -> None:
        """Have the other ranks make this call; method "" makes the rows."""
        if self.leads:
            with self.lock:
                for other in self.others:
                    other.send((runner, rows, method, arguments))

    def follow(self, make_rows: Callable[..., Any]) -> None:
        """Make the calls that the first rank tells, until it ends."""
        [first] = self.others
        with torch.inference_mode():
            while True:
                try:
                    number, rows, method, arguments = first.recv()
                except (EOFError, ConnectionError):
                    return
                runner = self.runners[number]
                if not method:
                    make_rows(runner, *arguments)
                else:
                    getattr(runner if rows is None else runner.rows[rows], method)(*arguments)


@functools.cache
def calls_of(team: Team) -> Calls:
    """Those of a team, whose ranks all call this at the same point."""
    return Calls(team)


def on_all_ranks(method: Method) -> Method:
    """A method of a ModelRunner or DecodeRows that the other ranks call, too, where several share the model.

    If it fails on the first rank, it raises SystemExit: nothing can be computed together any more.
    """

    @functools.wraps(method)
    def call(self: Any, *arguments: Any) -> Any:
        if self.calls is None or not self.calls.leads:
            return method(self, *arguments)
        with uninterrupted():
            self.calls.tell(*self.address, method.__name__, *arguments)
            try:
                return method(self, *arguments)
            except Exception as error:  # the others are in the middle of it, and no later call would meet theirs
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                print(f"error: rank 0 failed in {method.__name__}, where the others wait: {reason}", file=sys.stderr)
                raise SystemExit(1) from error

    return call  # type: ignore[return-value]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within the block Ctrl-C waits for its end: a call that one rank has begun must be made by all."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    caught: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: caught.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if caught:
            handler(*caught[0])
