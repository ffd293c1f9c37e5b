"""The end of the server: a first SIGINT or SIGTERM lets answers end, a second one ends the process at once."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING

from teal import interrupts

if TYPE_CHECKING:
    import uvicorn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
HANG_UP_S = 5.0  # for clients to take the end of their answers
POLL_S = 0.05


class Shutdown:
    """Hears the signals from now on.

    drain: what lets answers end, called in a thread; None while there is no server.
    """

    def __init__(self) -> None:
        self.drain: Callable[[], None] | None = None
        for number in SIGNALS:
            signal.signal(number, self._first)

    def _first(self, number: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)  # the second is the system's, whatever this process is doing
        if self.drain is not None:
            threading.Thread(target=self.drain, name="drain", daemon=True).start()
            return
        if interrupts.importing(frame):  # where nothing may be raised
            interrupts.end_now() if number == signal.SIGINT else os._exit(128 + number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)


def hang_up(web: "uvicorn.Server") -> None:
    """Stop web, and close the connections of clients that do not take the end of their answers."""
    web.should_exit = True
    end = time.monotonic() + HANG_UP_S
    while web.server_state.connections and time.monotonic() < end:
        time.sleep(POLL_S)
    for connection in list(web.server_state.connections):
        with suppress(RuntimeError):  # the event loop has just ended
            connection.loop.call_soon_threadsafe(connection.transport.abort)
