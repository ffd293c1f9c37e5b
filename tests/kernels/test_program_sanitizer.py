"""A step of the decode program under compute-sanitizer: no memory error, no race, no barrier that a thread misses."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from teal.decoding.backends import FusedBackend
from teal.decoding.cuda_program import CudaProgramBackend
from tests.conftest import ROOT
from tests.kernels.program_models import SMALL, one_step, random_model

SANITIZER = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
# cuda-bindings asks the driver for functions that it does not have, which is reported as an error of the API.
OPTIONS = {"memcheck": ("--report-api-errors", "no")}
FORMATS = {"floats": None, "int8": "int8", "int4": "int4", "mixed": "mixed"}


def step(name: str, words: int | None = None) -> None:
    """One sparse step of a small model. words: of the workspace, fewer than the program needs."""
    model = random_model(SMALL, torch.bfloat16, FORMATS[name], name != "floats", True, "cuda")
    backend = CudaProgramBackend(FusedBackend(model, "test", compile=False))
    backend.program.words = backend.program.words[:words].clone()
    logits = one_step(backend)
    print("logits are finite:", bool(logits.isfinite().all()))


def sanitize(tool: str, call: str) -> "subprocess.CompletedProcess[str]":
    """call, one of step, under a tool. Each tensor has an allocation of its own, whose end the tool knows."""
    assert SANITIZER is not None
    program = f"from tests.kernels.test_program_sanitizer import step; {call}"
    return subprocess.run(
        [SANITIZER, "--tool", tool, "--error-exitcode", "9", *OPTIONS.get(tool, ()), sys.executable, "-c", program],
        cwd=ROOT, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, text=True, capture_output=True, timeout=600,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(SANITIZER is None, reason="no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_step_is_clean(name: str, tool: str) -> None:
    run = sanitize(tool, f"step({name!r})")
    said = run.stdout + run.stderr
    assert run.returncode == 0 and "logits are finite: True" in said and re.search(r"SUMMARY: .*\b0 errors", said), said


@pytest.mark.gpu
@pytest.mark.skipif(SANITIZER is None, reason="no compute-sanitizer")
def test_an_error_is_seen() -> None:
    """The program is among what is checked: with too small a workspace it writes beyond the end."""
    run = sanitize("memcheck", "step('int4', words=8)")
    assert run.returncode and "decode_step" in run.stdout + run.stderr, run.stdout + run.stderr
