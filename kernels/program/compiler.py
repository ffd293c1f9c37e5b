"""Compiles program.cu at run time by NVRTC, which CUDA builds of torch bring along: no nvcc on the user's machine.

A cubin is kept in the cache folder under a hash of sources, config, architecture and compiler, behind its own.
"""

import functools
import hashlib
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from teal.errors import UserError
from teal.files import atomic_file, cache_folder

SOURCE = "program.cu"
CONFIG = "config.cuh"  # generated, plan.py
OPTIONS = ("-std=c++17", "-default-device", "-lineinfo")


def compiler_obstacle() -> str:
    """Why nothing can be compiled here; empty if it can."""
    try:
        if find_spec("cuda.bindings") is None:
            return "it needs the package cuda-bindings, which is not installed"
    except ModuleNotFoundError:
        return "it needs the package cuda-bindings, which is not installed"
    try:
        _version()
    except (UserError, RuntimeError, ImportError) as error:
        return f"it needs the library NVRTC, which cannot be loaded ({str(error).splitlines()[0]:.120})"
    return ""


def cubin(config: str, capability: tuple[int, int]) -> bytes:
    """program.cu with config, for GPUs of capability: from the cache, or compiled. Raises UserError."""
    architecture = f"sm_{capability[0]}{capability[1]}"
    parts = (*_sources().values(), config, architecture, *OPTIONS, str(_version()))
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    path = cache_folder("program") / f"{digest}.cubin"
    if (kept := _kept(path)) is not None:
        return kept
    compiled = compile_source(config, architecture)
    with suppress(OSError), atomic_file(path) as temporary:  # without room it is compiled again next time
        temporary.write_bytes(hashlib.sha256(compiled).digest() + compiled)
    return compiled


def _kept(path: Path) -> bytes | None:
    """The cubin in a file of the cache; None if there is none, or not all of it."""
    with suppress(OSError):
        content = path.read_bytes()
        size = hashlib.sha256().digest_size
        if hashlib.sha256(content[size:]).digest() == content[:size]:
            return content[size:]
    return None


def compile_source(config: str, architecture: str) -> bytes:
    """The cubin of program.cu for an architecture such as sm_90. Raises UserError with the compiler's first error."""
    from cuda.bindings import nvrtc

    headers = _sources() | {CONFIG: config}
    source = headers.pop(SOURCE)
    names, texts = ([item.encode() for item in part] for part in (headers, headers.values()))
    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), SOURCE.encode(), len(texts), texts, names))
    options = [option.encode() for option in (f"-arch={architecture}", *OPTIONS)]
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(status):
            raise UserError(f"compiling {SOURCE} for {architecture} failed: {_first_error(program)}")
        result = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
        checked(nvrtc.nvrtcGetCUBIN(program, result))
        return result
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def checked(result: tuple[Any, ...]) -> Any:
    """What a call of cuda-bindings returned beside its status. Raises UserError unless that is success."""
    status, *values = result
    if int(status):
        raise UserError(f"CUDA: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


@functools.cache
def _sources() -> dict[str, str]:
    """All files of the program by name."""
    folder = Path(__file__).parent
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.cu*"))}


@functools.cache
def _version() -> tuple[int, int]:
    from cuda.bindings import nvrtc

    return checked(nvrtc.nvrtcVersion())


def _first_error(program: Any) -> str:
    from cuda.bindings import nvrtc

    log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
    checked(nvrtc.nvrtcGetProgramLog(program, log))
    lines = log.decode(errors="replace").replace("\0", "").splitlines()
    return next((line for line in lines if "error" in line), "no message")
