"""Files a crash cannot leave half-written, and the folder and keys under which things made once are kept."""

import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from errors import UserError

# Bytes. The head holds a GGUF file's metadata: vocabularies and templates of 128,000 tokens take 8 MB.
FINGERPRINT_HEAD, FINGERPRINT_SAMPLE, FINGERPRINT_SAMPLES = 16 << 20, 4096, 2048


def cache_folder(name: str) -> Path:
    """$XDG_CACHE_HOME/teal/name (default ~/.cache/teal/name), created. Raises UserError if it cannot be written."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "teal" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"cache folder {folder} is not writable ({error.strerror}); set XDG_CACHE_HOME to a folder that is"
        ) from error
    return folder


def cpu_name() -> str:
    """The processor's name: part of the key of whatever was measured or compiled for it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def fingerprint(*paths: Path) -> str:
    """16 hex digits that name the content of files: sizes, first megabytes, and samples at even distances.

    Whole models take too long to hash. A change of a few rows of one tensor may go unseen, one of all weights or of some
    layers will not: distances are smaller than a layer.
    """
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{size} ".encode())
        with path.open("rb", buffering=0) as file:
            digest.update(file.read(FINGERPRINT_HEAD))
            for i in range(FINGERPRINT_SAMPLES):
                file.seek(max(FINGERPRINT_HEAD, size * i // FINGERPRINT_SAMPLES))
                digest.update(file.read(FINGERPRINT_SAMPLE))
            file.seek(max(0, size - FINGERPRINT_SAMPLE))
            digest.update(file.read(FINGERPRINT_SAMPLE))
    return digest.hexdigest()[:16]


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside path to write to; renamed over path if the block succeeds, removed if it fails.

    A link stays one, to a file with the new content. A device or a pipe is written to as it is.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        yield path
        return
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)  # it can only be read by setting it
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path | None]:
    """A temporary folder to fill; renamed to path if the block succeeds, removed if it fails.

    Yields None if path exists. Processes that ask for the same path wait for the first one, under a
    lock file beside it that the system releases if its holder dies; what a dead one left is removed.
    """
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.exists():
            yield None
            return
        temporary = path.with_name(f".{path.name}.part")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
