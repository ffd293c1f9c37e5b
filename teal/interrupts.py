"""Ctrl-C ends a command within a second, whatever it is doing, with exit code 130 and without a traceback.

The first Ctrl-C raises KeyboardInterrupt, so that temporary files are removed on the way out. Further ones change
nothing. A call into C may go on for long, and a library may swallow the exception. Then a thread ends the process
GRACE_S after the signal. While a module is imported the process ends at once: torch's C++ calls Python meanwhile,
and aborts at exceptions that it does not expect. Code that handles SIGINT itself, as the server does, installs its
own handler; then the thread keeps still.
"""

import functools
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import NoReturn

EXIT_INTERRUPTED = 130  # 128 + SIGINT
GRACE_S = 0.7

_message = threading.Lock()  # held once the message is out


def install() -> None:
    """Handle Ctrl-C as above from now on. Call it in the main thread."""
    signal.signal(signal.SIGINT, _raise)
    signal.set_wakeup_fd(_watched_pipe(), warn_on_full_buffer=False)


def install_for_imports() -> None:
    """As install, for modules that import torch before cli.run has begun."""
    install()
    sys.excepthook = _end_or_show


def pending() -> bool:
    """Whether there was a Ctrl-C, so that whatever exception comes now is due to it."""
    return signal.getsignal(signal.SIGINT) is _ignore


def work_is_done() -> None:
    """From now on a Ctrl-C interrupts nothing; a process that does not end by itself is still ended by the thread.

    Python sets a handler of its own back to the system's while it shuts down, but not SIG_IGN. A second Ctrl-C would
    kill.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN if pending() else _ignore)


def importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported in frame or in one of its callers."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def end_now() -> NoReturn:
    """End the process as interrupted, without any clean-up."""
    say()
    os._exit(EXIT_INTERRUPTED)


def say() -> None:
    """Tell the user on stderr, once."""
    if _message.acquire(blocking=False):
        os.write(2, b"\ninterrupted\n")


def _raise(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, _ignore)
    sys.unraisablehook = lambda _: None  # an interrupted destructor is no news
    if importing(frame):
        end_now()
    raise KeyboardInterrupt


def _ignore(number: int, frame: FrameType | None) -> None:
    pass


def _end_or_show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if pending():
        end_now()
    sys.__excepthook__(kind, error, traceback)


@functools.cache
def _watched_pipe() -> int:
    """The end to write to of a pipe that _watch reads; Python writes a signal's number there even within a C call."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    threading.Thread(target=_watch, args=(read,), name="interrupts", daemon=True).start()
    return write


def _watch(pipe: int) -> None:
    ours = (_raise, _ignore, signal.SIG_IGN)  # the main thread may be ahead of this one
    while os.read(pipe, 1)[0] != signal.SIGINT or signal.getsignal(signal.SIGINT) not in ours:
        pass
    time.sleep(GRACE_S)
    end_now()
