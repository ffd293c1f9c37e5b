"""The decode program on a CPU: program.cu compiled by the system's C++ compiler with program_on_cpu.cpp around it."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from teal.decoding import cuda_program
from teal.decoding.backend import EagerBackend
from teal.decoding.cuda_program import CudaProgramBackend, model_obstacle
from teal.kernels.program import plan as plan_module
from teal.kernels.program.plan import Plan
from teal.kernels.program.shapes import Device
from teal.model import Transformer

COMPILER = shutil.which("g++")
FEW_BLOCKS = Device(10, 232448, (9, 0))
HERE, SOURCES = Path(__file__).parent, Path(plan_module.__file__).parent
FLAGS = ("-std=c++20", "-Og", "-finline-functions-called-once", "-fPIC", "-w")  # most of the time goes into compiling


@functools.cache
def standard_headers() -> "tempfile.TemporaryDirectory[str]":
    """A folder, until this process ends, with the standard library's headers of program_on_cpu.cpp, precompiled."""
    assert COMPILER is not None
    folder = tempfile.TemporaryDirectory()
    lines = (HERE / "program_on_cpu.cpp").read_text(encoding="utf-8").splitlines()
    header = Path(folder.name) / "standard.h"
    header.write_text("\n".join(line for line in lines if line.startswith("#include <")))
    subprocess.run([COMPILER, *FLAGS, "-x", "c++-header", header], check=True)
    return folder


@functools.cache
def compiled_program(config: str) -> "tempfile.TemporaryDirectory[str]":
    """A folder, until this process ends, with config.cuh and program.so: several tests have the same."""
    assert COMPILER is not None
    folder = tempfile.TemporaryDirectory()
    (Path(folder.name) / "config.cuh").write_text(config)
    library, precompiled = f"{folder.name}/program.so", f"{standard_headers().name}/standard.h"
    options = (*FLAGS, "-shared", "-include", precompiled, f"-I{folder.name}", f"-I{SOURCES}")
    subprocess.run([COMPILER, *options, "-o", library, HERE / "program_on_cpu.cpp"], check=True)
    return folder


class EmulatedProgram:
    """As kernels.program.launch.Program; folder is for its files, which are its own, as the library's state is."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        shutil.copytree(compiled_program(plan.source).name, folder, dirs_exist_ok=True)
        library = folder / "program.so"
        self.plan, self.library = plan, ctypes.CDLL(str(library))
        self.library.launch.restype = ctypes.c_char_p
        self.words = torch.zeros(plan.words, dtype=torch.int64)
        self.counters = torch.zeros(2, dtype=torch.int32)

    def launch(self, arguments: Sequence[int]) -> None:
        values = (ctypes.c_int64 * len(arguments))(*arguments)
        fault = self.library.launch(ctypes.byref(values))
        assert fault is None, fault.decode()


def emulated_backend(model: Transformer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> CudaProgramBackend:
    """A program backend of a model on the CPU, whose prefill is the eager one's."""
    threads = dict.fromkeys(plan_module.BLOCK_THREADS, (128,))  # which are fibers of one thread
    monkeypatch.setattr(plan_module, "BLOCK_THREADS", threads)
    monkeypatch.setattr(cuda_program, "device_facts", lambda device: FEW_BLOCKS)
    monkeypatch.setattr(cuda_program, "Program", lambda plan, device: EmulatedProgram(plan, folder))
    monkeypatch.setattr(cuda_program, "program_obstacle", lambda model: model_obstacle(model, FEW_BLOCKS))
    return CudaProgramBackend(EagerBackend(model, "test"))
