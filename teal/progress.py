"""How far a long loop has come: a bar on a terminal, elsewhere a line every 10 s, both on stderr."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Protocol, TypeVar

from tqdm import tqdm

INTERVAL_S = 10.0

T = TypeVar("T", covariant=True)


class Countable(Sized, Iterable[T], Protocol[T]):
    """What can be iterated and has a length."""


def progress(items: Countable[T], doing: str, unit: str, delay: float = 0.0) -> Iterator[T]:
    """The items, one by one, while stderr says how many are done. A bar appears after delay seconds."""
    if sys.stderr.isatty():
        return iter(tqdm(items, desc=doing, unit=unit, leave=False, delay=delay))
    return _with_lines(items, doing, unit)


def _with_lines(items: Countable[T], doing: str, unit: str) -> Iterator[T]:
    start, done, ended = time.monotonic(), 0, threading.Event()

    def report() -> None:  # in a thread: one item may take minutes
        while not ended.wait(INTERVAL_S):
            passed = time.monotonic() - start
            print(f"{doing}: {done} of {len(items)} {unit}s after {passed:.0f} s", file=sys.stderr, flush=True)

    threading.Thread(target=report, name="progress", daemon=True).start()
    try:
        for item in items:
            yield item
            done += 1
    finally:
        ended.set()
