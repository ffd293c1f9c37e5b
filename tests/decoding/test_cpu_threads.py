"""Threads of a CPU's decode step: how many there are, who says so, and that they end with their process."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from teal.decoding.engine import Engine
from teal.errors import UserError
from teal.kernels.cpu.native import native_kernels
from tests.conftest import ROOT

STEPPED = """
import contextlib, os, sys, torch
from teal.decoding.engine import Engine
engine = Engine.load(sys.argv[1], device="cpu", dtype="fp32", threads=int(sys.argv[2]) or None)
assert engine.backend.name == "program", engine.backend.reason
text = list(engine.generate([5, 9, 33], max_new_tokens=8, ignore_eos=True))
count = 0
for task in os.listdir("/proc/self/task"):
    with contextlib.suppress(OSError):  # it has ended
        count += open(f"/proc/self/task/{task}/comm").read() == "teal-step\\n"
print(torch.get_num_threads(), count)
"""
FORKED = """
child = os.fork()
if child == 0:  # its process has none of the threads
    engine.cached_ids = []
    torch.set_num_threads(1)
    backend, cache = engine.backend, engine.cache
    with torch.inference_mode():
        token, position = torch.tensor([[5]]), torch.tensor([[0]])
        backend.program.run(backend._model(), backend._call(token, position, cache), 4)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
needs_linux = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")


@pytest.fixture
def restored_threads() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def stepped(folder: Path, threads: int, more: str = "", cores: set[int] | None = None) -> list[int]:
    """[threads of torch, threads that the steps started] of a process that decodes a few tokens."""
    assert native_kernels() is not None  # compiled here, not within the child's time
    done = subprocess.run(
        [sys.executable, "-c", STEPPED + more, str(folder), str(threads)],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
        preexec_fn=None if cores is None else lambda: os.sched_setaffinity(0, cores),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@needs_linux
@pytest.mark.parametrize("threads", [1, 4])
def test_a_step_takes_the_threads_asked_for(tiny_folder: Path, threads: int) -> None:
    """Beside the caller; the process then ends, though its threads sleep."""
    assert stepped(tiny_folder, threads) == [threads, threads - 1]


@needs_linux
def test_one_core_has_one_thread(tiny_folder: Path) -> None:
    assert stepped(tiny_folder, 0, cores={min(os.sched_getaffinity(0))}) == [1, 0]


@needs_linux
def test_a_forked_child_steps_alone(tiny_folder: Path) -> None:
    assert stepped(tiny_folder, 3, FORKED) == [3, 2]


@pytest.mark.usefixtures("restored_threads")
def test_threads_are_an_option_of_the_model(tiny_folder: Path) -> None:
    texts = []
    for threads in (1, 3):
        engine = Engine.load(str(tiny_folder), device="cpu", dtype="bf16", threads=threads)
        assert torch.get_num_threads() == threads
        texts.append(list(engine.generate([5, 9, 33], max_new_tokens=20, ignore_eos=True)))
    assert texts[0] == texts[1]
    for threads in (0, 1025):
        with pytest.raises(UserError, match=f"threads {threads} is out of range; expected 1 to 1024"):
            Engine.load(str(tiny_folder), threads=threads)


def test_the_default_model_gives_the_text_of_the_modules(default_folder: Path) -> None:
    texts = []
    for backend in ("eager", "program"):
        engine = Engine.load(str(default_folder), device="cpu", dtype="fp32", backend=backend)
        ids = engine.tokenizer.encode("The European lobster lives in")
        texts.append(engine.tokenizer.decode(list(engine.generate(ids, max_new_tokens=12, ignore_eos=True))))
    assert texts[0] == texts[1]
