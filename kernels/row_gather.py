"""Compiles and loads row_gather.cpp, the CPU kernel of sparse_linear: once per machine, source and torch version.

The library is built by the system's C++ compiler into the cache folder. Without a compiler sparse_linear
still works, through torch.embedding_bag: correct, and slower than the dense product on small models.
"""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from errors import UserError
from files import atomic_file, cache_folder, cpu_name

SOURCE = Path(__file__).with_suffix(".cpp")
# Bits must not depend on how the compiler orders a sum, so no -ffast-math; torch's own OpenMP is used, found at load.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-std=c++20", "-fPIC", "-fopenmp")


@functools.cache
def native_row_gather() -> Callable[[Tensor, Tensor, Tensor, list[int], Tensor | None, Tensor | None], Tensor] | None:
    """The compiled op with the arguments of sparse_linear, or None, said once on stderr, if it cannot be built."""
    try:
        library = _built_library()
        torch.ops.load_library(library)
    except (UserError, OSError, subprocess.SubprocessError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        print(f"note: sparse decoding on CPU runs without its compiled kernel, slower: {reason}", file=sys.stderr)
        return None
    return torch.ops.teal_cpu.row_gather.default


def _built_library() -> Path:
    key = "\n".join((SOURCE.read_text(encoding="utf-8"), torch.__version__, cpu_name(), *FLAGS))
    path = cache_folder("kernels") / f"row_gather-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            print("compiling the CPU kernel (once)", file=sys.stderr)
            with atomic_file(path) as temporary:
                _compile(temporary)
    return path


def _compile(output: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise UserError("no C++ compiler found; install g++ or set CXX")
    command = [compiler, *FLAGS, "-c", str(SOURCE), "-o", f"{output}.o"]
    command += [f"-I{folder}" for folder in include_paths()]
    link = [compiler, "-shared", f"{output}.o", "-o", str(output)]
    link += [f"-L{folder}" for folder in library_paths()] + ["-ltorch_cpu", "-lc10"]
    try:
        for step in (command, link):
            done = subprocess.run(step, capture_output=True, text=True)
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
                raise UserError(f"{compiler} failed ({errors[0]})")
    finally:
        Path(f"{output}.o").unlink(missing_ok=True)
