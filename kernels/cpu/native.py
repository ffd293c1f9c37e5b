"""Compiles and loads the CPU kernels, row_gather.cpp and dequantize.cpp: once per machine, source and torch version.

The library is built by the system's C++ compiler into the cache folder. Without a compiler all works through
torch's own operations: correct, and slower.
"""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from teal.errors import UserError
from teal.files import atomic_file, cache_folder, cpu_name

SOURCES = tuple(Path(__file__).with_name(name) for name in ("row_gather.cpp", "linear_fp32.cpp", "dequantize.cpp"))
# Bits must not depend on how the compiler orders a sum, so no -ffast-math; torch's own OpenMP is used, found at load.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-std=c++20", "-fPIC", "-fopenmp")
# GCC 13 fused products and sums in linear_fp32's code for some numbers of rows and not for others: other bits in fp32.
# A weight's two parts (dequantize.cpp) are each rounded before they are added, as plain PyTorch does it.
FLAGS_OF = {"linear_fp32.cpp": ("-ffp-contract=off",), "dequantize.cpp": ("-ffp-contract=off",)}


@functools.cache
def native_kernels() -> Any | None:
    """The compiled ops, by name, or None, said once on stderr, if they cannot be built."""
    try:
        library = _built_library()
        torch.ops.load_library(library)
    except (UserError, OSError, subprocess.SubprocessError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        print(f"note: decoding on CPU runs without compiled kernels, slower: {reason}", file=sys.stderr)
        return None
    return torch.ops.teal_cpu


def _built_library() -> Path:
    texts = (source.read_text(encoding="utf-8") for source in SOURCES)
    key = "\n".join((*texts, torch.__version__, cpu_name(), *FLAGS, str(FLAGS_OF)))
    path = cache_folder("kernels") / f"native-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            print("compiling the CPU kernels (once)", file=sys.stderr)
            with atomic_file(path) as temporary:
                _compile(temporary)
    return path


def _compile(output: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths  # imports setuptools: 0.14 s

    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise UserError("no C++ compiler found; install g++ or set CXX")
    objects = [f"{output}.{source.stem}.o" for source in SOURCES]
    options = (*FLAGS, *(f"-I{folder}" for folder in include_paths()))
    commands = [
        [compiler, *options, *FLAGS_OF.get(source.name, ()), "-c", str(source), "-o", to]
        for source, to in zip(SOURCES, objects, strict=True)
    ]
    link = [compiler, "-shared", *objects, "-o", str(output)]
    link += [f"-L{folder}" for folder in library_paths()] + ["-ltorch_cpu", "-lc10"]
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(_run, commands))
        _run(link)
    finally:
        for path in objects:
            Path(path).unlink(missing_ok=True)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise UserError(f"{command[0]} failed ({errors[0]})")
