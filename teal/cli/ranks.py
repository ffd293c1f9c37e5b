"""--tensor-parallel N: a command starts itself N - 1 times more, and all end together.

The others are in sessions of their own, so that a Ctrl-C reaches the first one alone. Each sends a sign of life every
second through a pipe, and ends when the other end of that pipe does. torchrun may start all of them instead.
"""

import atexit
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import IO

from teal.errors import ParameterError
from teal.options import LOCAL_RANK, MAX_CPU_RANKS, RANK, RANKS

LIFELINE = "TEAL_LIFELINE"  # the file descriptor of a started rank's pipe
ALIVE_S, SILENT_S = 1.0, 8.0  # between signs of life, and after how long without one a rank counts as hung
GRACE_S = 1.0  # for this process to end by itself when another has
END_S = 5.0  # for the others to end by themselves
LAST_WORDS = 4096  # characters kept of what a rank printed


@dataclass(slots=True)
class Started:
    """A rank that this process started; life: this end of its pipe."""

    index: int
    process: subprocess.Popen[str]
    life: socket.socket
    words: str = ""
    seen: float = 0.0

    def listen(self, stream: IO[str]) -> None:
        """Keep the end of what it prints."""
        for line in stream:
            self.words = (self.words + line)[-LAST_WORDS:]

    def last_line(self) -> str:
        """What it said of its end."""
        lines = [line.strip() for line in self.words.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or ["without a word"])[-1].removeprefix("error: ")


def start_ranks(count: int, device: str) -> None:
    """Start the other ranks of a command that runs on so many devices, unless torchrun did. Raises UserError."""
    if LIFELINE in os.environ:
        _keep_alive(int(os.environ[LIFELINE]))
    if not is_first(count):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the life of the process
    if count == 1 or RANKS in os.environ:
        return
    _check_devices(count, device)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), RANKS: str(count)}
    started = [_start(index, shared) for index in range(1, count)]
    os.environ |= shared | {RANK: "0", LOCAL_RANK: "0"}
    watch = Watch(started)
    atexit.register(watch.end)
    threading.Thread(target=watch.run, name="ranks", daemon=True).start()


def is_first(count: int) -> bool:
    """Whether this process, one of so many, talks to the user."""
    return count == 1 or os.environ.get(RANK, "0") == "0"


def leave(code: int) -> None:
    """At the end of a command with several ranks: end this process at once. Others do nothing.

    To take a process group of GPUs down in order, all ranks have to be there, and one that waits for another stays.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()
    os._exit(code)


def _check_devices(count: int, device: str) -> None:
    import torch

    found = 0 if device == "cpu" else torch.cuda.device_count()
    if not found and device in ("auto", "cpu") and count > MAX_CPU_RANKS:
        raise ParameterError(
            f"{{tensor_parallel}} {{}}: on a CPU at most {MAX_CPU_RANKS} processes share a model", count
        )
    if device.startswith("cuda:"):
        raise ParameterError("{tensor_parallel} {} takes a card for each rank; leave {device} {} out", count, device)
    if 0 < found < count or (device == "cuda" and found < count):
        raise ParameterError("{tensor_parallel} {}: this machine has {} CUDA devices; give at most that", count, found)


def _start(index: int, shared: dict[str, str]) -> Started:
    ours, theirs = socket.socketpair()
    environment = os.environ | shared | {
        RANK: str(index), LOCAL_RANK: str(index), LIFELINE: str(theirs.fileno()),
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True, pass_fds=(theirs.fileno(),),
    )  # fmt: skip
    theirs.close()
    found = Started(index, process, ours, seen=time.monotonic())
    threading.Thread(target=found.listen, args=(process.stderr,), daemon=True).start()
    return found


def _keep_alive(descriptor: int) -> None:
    """In a started rank: give signs of life, and end with the process that started it."""
    line = socket.socket(fileno=os.dup(descriptor))
    os.close(descriptor)
    del os.environ[LIFELINE]

    def run() -> None:
        line.settimeout(ALIVE_S)
        while True:
            try:
                line.send(b".")
                if not line.recv(1):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        os._exit(1)

    threading.Thread(target=run, name="lifeline", daemon=True).start()


class Watch:
    """Ends the command when one of the ranks that it started ends or falls silent."""

    def __init__(self, started: list[Started]) -> None:
        self.started, self.ending = started, False
        self.selector = selectors.DefaultSelector()
        for rank in started:  # here, as a command that fails at once closes them before the thread runs
            self.selector.register(rank.life, selectors.EVENT_READ, rank)

    def run(self) -> None:
        """Look after the ranks until the command ends; the body of a thread."""
        with self.selector:
            while not self.ending:
                for key, _ in self.selector.select(ALIVE_S):
                    self._hear(key.data)
                for rank in self.started:
                    if time.monotonic() - rank.seen > SILENT_S:
                        self._give_up(rank, f"has been silent for {SILENT_S:.0f} s, it hangs")

    def _hear(self, rank: Started) -> None:
        """Take a sign of life, or the end of a rank."""
        try:
            is_alive = bool(rank.life.recv(LAST_WORDS))
        except OSError:  # also where end() has closed it
            is_alive = False
        if not is_alive and not self.ending:
            self._give_up(rank, f"ended with code {rank.process.wait()}: {rank.last_line()}")
        rank.seen = time.monotonic()

    def _give_up(self, rank: Started, why: str) -> None:
        """Say why, and end all of them at once: this process may wait for the lost one on its device.

        It may also have met the same mistake itself, which it then is about to say.
        """
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline:
            if self.ending:
                return
            time.sleep(0.05)
        os.write(2, f"error: rank {rank.index} {why}\n".encode())
        self.kill()
        os._exit(1)

    def end(self) -> None:
        """Let the others end by themselves, when the command has."""
        self.ending = True
        deadline = time.monotonic() + END_S
        for rank in self.started:
            rank.life.close()
            try:
                rank.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
        self.kill()

    def kill(self) -> None:
        """End all of them now."""
        for rank in self.started:
            rank.process.kill()
        for rank in self.started:
            rank.process.wait()
