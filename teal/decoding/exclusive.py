"""Something that one user at a time may use, in whatever thread: the next one is refused and does not wait."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Exclusive:
    """refusal: what RuntimeError says to those that come while it is in use."""

    def __init__(self, refusal: str) -> None:
        self.refusal = refusal
        self.lock = threading.Lock()

    def take(self) -> None:
        """Use it until release, which any thread may call. Raises RuntimeError if it is in use."""
        if not self.lock.acquire(blocking=False):
            raise RuntimeError(self.refusal)

    def release(self) -> None:
        self.lock.release()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Take it for a block."""
        self.take()
        try:
            yield
        finally:
            self.release()
