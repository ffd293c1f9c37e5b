"""Compiles and loads the CPU kernels, all .cpp files of this folder: once per processor, source and torch version.

The library is built by the system's C++ compiler into the cache folder. Without a compiler all works through
torch's own operations: correct, and slower.
"""

import ctypes
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

from teal.environment import usable_cores
from teal.errors import UserError
from teal.files import atomic_file, cache_folder, cpu_name

FOLDER = Path(__file__).parent
SOURCES, HEADERS = (tuple(sorted(FOLDER.rglob(pattern))) for pattern in ("*.cpp", "*.h"))
# Bits must not depend on how the compiler orders or fuses sums, so no -ffast-math. GCC 13 fused products and sums for
# some numbers of rows and not for others: what is to be fused says so. torch's own OpenMP is used, found at load.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-ffp-contract=off", "-std=c++20", "-fPIC", "-fopenmp")


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """The compiled C functions, or None, said once on stderr, if they cannot be built. A call releases the GIL."""
    try:
        path = _built_library()
        torch.ops.load_library(path)
        return ctypes.CDLL(str(path))
    except (UserError, OSError, subprocess.SubprocessError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        print(f"note: decoding on CPU runs without compiled kernels, slower: {reason}", file=sys.stderr)
        return None


def native_kernels() -> Any | None:
    """The compiled ops, by name, or None as native_library."""
    return None if native_library() is None else torch.ops.teal_cpu


def processor_features() -> str:
    """The instructions that -march=native may use here: a machine of the same name may hide some."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return ""


def _built_library() -> Path:
    texts = (source.read_text(encoding="utf-8") for source in (*SOURCES, *HEADERS))
    key = "\n".join((*texts, torch.__version__, cpu_name(), processor_features(), *FLAGS))
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
    options = (*FLAGS, *(f"-I{folder}" for folder in include_paths()))
    commands, objects = [], []
    for unit in units():
        objects.append(f"{output}.{unit[0].stem}.o")
        commands.append([compiler, *options, "-c", *unit_arguments(unit), "-o", objects[-1]])
    link = [compiler, "-shared", *objects, "-o", str(output)]
    link += [f"-L{folder}" for folder in library_paths()] + ["-ltorch_cpu", "-lc10", *_cpp_runtime()]
    try:
        with ThreadPoolExecutor(usable_cores()) as pool:
            list(pool.map(_run, commands))
        _run(link)
    finally:
        for path in objects:
            Path(path).unlink(missing_ok=True)


def units() -> list[list[Path]]:
    """Sources that are compiled at once. Torch's headers take 6 of the 8 s of an op alone, so they are read once.

    All on two cores took 38 s apart and 19 in this way; the ops together take 12.
    """
    ops = [source for source in SOURCES if "<torch/" in source.read_text(encoding="utf-8")]
    return [unit for unit in (ops, *([source] for source in SOURCES if source not in ops)) if unit]


def unit_arguments(unit: list[Path]) -> list[str]:
    """What a compiler is given to read the sources of a unit one after the other."""
    return [*(part for source in unit for part in ("-include", str(source))), "-x", "c++", os.devnull]


def _cpp_runtime() -> list[str]:
    """The libstdc++ that torch has loaded. A compiler without a shared one links a static one of its own.

    Two of them in a process do not mix: a message with a number in it then ends the process by a segmentation fault.
    """
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if "/libstdc++.so" in line}
    return [path for path in sorted(paths) if os.path.exists(path)][:1]  # one replaced since is "... (deleted)"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise UserError(f"{command[0]} failed ({errors[0]})")
