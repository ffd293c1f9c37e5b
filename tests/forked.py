"""Commands in processes of their own that find torch imported: forks of one that has done so save a second or two each.

Else they are as `python generate.py ...`, `python -m module ...` or `python -c program ...`. Only what torch reads from
the environment when it is imported is that of the tests.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch"])
NOTHING = Path(os.devnull)


class Forked:
    """A running command, in the manner of subprocess.Popen. Its standard streams are files."""

    def __init__(
        self, folder: Path, arguments: tuple[str, ...], environment: Mapping[str, str],
        stdin: Path = NOTHING, stdout: Path = NOTHING, stderr: Path = NOTHING,
    ) -> None:  # fmt: skip
        self.arguments = arguments
        given = (folder, arguments, dict(environment), (stdin, stdout, stderr))
        self.process = FORKS.Process(target=_run, args=given)
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def poll(self) -> int | None:
        """The exit status, or that of the signal that ended it as a negative number."""
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """As poll, when it has ended. Raises TimeoutExpired after so many seconds."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout or 0.0)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()


def run_forked(
    folder: Path, arguments: tuple[str, ...], content: bytes, timeout: float, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[bytes]:
    """As subprocess.run([sys.executable, *arguments]) in folder."""
    with tempfile.TemporaryDirectory() as kept:
        stdin, stdout, stderr = (Path(kept, name) for name in ("in", "out", "err"))
        for path, text in ((stdin, content), (stdout, b""), (stderr, b"")):
            path.write_bytes(text)
        process = Forked(folder, arguments, environment, stdin, stdout, stderr)
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(arguments, status, stdout.read_bytes(), stderr.read_bytes())


def _run(
    folder: Path, arguments: tuple[str, ...], environment: dict[str, str], streams: tuple[Path, Path, Path]
) -> None:
    """What the interpreter does with its arguments."""
    for number, path in enumerate(streams):
        opened = os.open(path, os.O_RDWR)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.orig_argv = [sys.executable, *arguments]
    kind, *rest = arguments
    try:
        if kind == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.argv = [kind, *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = list(arguments)
            runpy.run_path(kind, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a fork ends without them
