"""Make a chosen file operation of a command fail: the disk is full, a folder cannot be written, or the process dies.

As a program it runs a script and kills it, as kill -9 does: python -m tests.faults N FOLDER SCRIPT arguments.
That happens just before the script's N-th operation that writes something under FOLDER.
"""

import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.mkdir", "os.rename", "os.truncate", "os.link", "os.symlink")  # removing succeeds on a full disk
_watchers: list[Callable[[str], None]] = []
_installed = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watchers:
        return
    if event == "open":
        path, _, flags = arguments
        if not isinstance(flags, int) or not flags & WRITING:
            return
    elif event in CHANGES:
        path = arguments[0]
    else:
        return
    if isinstance(path, (str, bytes, os.PathLike)):
        for watch in tuple(_watchers):
            watch(os.path.abspath(os.fsdecode(path)))


@contextmanager
def watching(folder: Path, at: Callable[[int], None]) -> Iterator[None]:
    """Within the block call at(n) before the n-th operation, from 0, that writes something under folder."""
    global _installed
    if not _installed:
        sys.addaudithook(_hook)  # for good: there is no way to remove one
        _installed = True
    count = 0

    def watch(path: str) -> None:
        nonlocal count
        if path.startswith(f"{folder}{os.sep}"):
            count += 1
            at(count - 1)

    _watchers.append(watch)
    try:
        yield
    finally:
        _watchers.remove(watch)


def failing(number: int, code: int) -> Callable[[int], None]:
    """For watching: operation number and all after it fail with this errno."""

    def at(n: int) -> None:
        if n >= number:
            raise OSError(code, os.strerror(code), "a file")

    return at


def main() -> None:
    """Run a script up to the operation named."""
    number, folder, script = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    sys.argv = sys.argv[3:]

    def at(n: int) -> None:
        if n == number:
            os.kill(os.getpid(), signal.SIGKILL)

    with watching(folder, at):
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
