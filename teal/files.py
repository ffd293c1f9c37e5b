"""Files a crash cannot leave half-written, and the folder and keys under which things made once are kept.

A temporary is a folder .NAME-TOKEN.part beside its target. Its process holds a lock in it, which the system releases
when the process dies, however it dies. So sweep() can tell the left-overs of the dead from the work of the living.
"""

import errno
import glob
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from teal.errors import UserError

# Bytes. The head holds a GGUF file's metadata: vocabularies and templates of 128,000 tokens take 8 MB.
FINGERPRINT_HEAD, FINGERPRINT_SAMPLE, FINGERPRINT_SAMPLES = 16 << 20, 4096, 2048
HEAD_BYTES = 4096  # of a file, in which the mark of its kind stands
OWNER = "owner.part"  # the lock in a temporary folder
UNOWNED_S = 60.0  # an empty folder is younger while its process is about to make the lock


def cache_folder(name: str) -> Path:
    """$XDG_CACHE_HOME/teal/name (default ~/.cache/teal/name), created. Raises UserError if it cannot be written.

    What dead processes left anywhere in the cache is removed.
    """
    base = user_folder("XDG_CACHE_HOME", ".cache")
    folder = base / "teal" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"cache folder {folder} is not writable ({error.strerror}); set XDG_CACHE_HOME to a folder that is"
        ) from error
    sweep(base / "teal", "*/.*.part")
    return folder


def user_folder(variable: str, at_home: str) -> Path:
    """The folder that an environment variable names, else one in the user's home. Raises UserError without a home."""
    try:
        return Path(os.environ.get(variable) or Path.home() / at_home)
    except RuntimeError as error:
        raise UserError(f"the user has no home folder; set {variable} to a folder") from error


def cpu_name() -> str:
    """The processor's name: part of the key of whatever was measured or compiled for it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def fingerprint(*paths: Path) -> str:
    """16 hex digits that name the content of files: sizes, first megabytes, and samples at even distances.

    Whole models take too long to hash. A change of a few rows of one tensor may go unseen. One of all weights or of
    some layers will not: distances are smaller than a layer.
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


def sweep(folder: Path, pattern: str) -> None:
    """Remove the temporary folders that match a glob pattern under folder and whose process is dead."""
    for temporary in folder.glob(pattern):
        with suppress(OSError, Timeout):
            if not (temporary / OWNER).is_file():
                if time.time() - temporary.stat().st_mtime > UNOWNED_S:
                    temporary.rmdir()  # its process died at once; what is not empty is not ours, and stays
                continue
            with FileLock(temporary / OWNER).acquire(timeout=0):
                _remove(temporary)


def temporary_folder(parent: Path, name: str) -> AbstractContextManager[Path]:
    """A new folder .name-TOKEN.part in parent, removed after the block, or by a sweep after the process died."""
    return _owned(lambda: parent / f".{name}-{secrets.token_hex(4)}.part")


@contextmanager
def _owned(choose: Callable[[], Path]) -> Iterator[Path]:
    """A new folder at a path that choose returns, with its lock held until the block ends and the folder is removed."""
    lock = None
    while lock is None:
        folder = choose()
        lock = _own(folder)
    try:
        yield folder
    finally:
        with suppress(OSError):
            _remove(folder)
        lock.release()


def _own(folder: Path) -> FileLock | None:
    """Make a temporary folder and take its lock. None if a sweep at that very moment took it for a dead process's."""
    folder.mkdir()
    lock = FileLock(folder / OWNER)
    try:
        lock.acquire(timeout=0)
        if (folder / OWNER).exists():
            return lock
        lock.release()
    except (Timeout, FileNotFoundError, FileExistsError):
        pass  # FileLock makes the folder again that a sweep removed
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return None


def _remove(folder: Path) -> None:
    """Remove a temporary folder, its lock last: a kill on the way leaves what the next sweep knows as a left-over."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != OWNER:
            path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _share(file: Path) -> None:
    """Give a file the mode of any new one: safetensors writes files that nobody else may read."""
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def _flush(file: Path) -> None:
    """Have the disk write it: of one renamed before, a loss of power may leave an empty file."""
    with file.open("rb") as written:
        os.fsync(written.fileno())


def _flush_all(folder: Path) -> None:
    for file in filter(Path.is_file, folder.rglob("*")):
        _flush(file)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """An object, to be read by people too."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to, in a folder beside path; renamed over path if the block succeeds.

    A link stays one, to a file with the new content. A device or a pipe is written to as it is. An OSError that is
    about the temporary path names path instead.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        yield path
        return
    try:
        with temporary_folder(path.parent, path.name) as folder:
            temporary = folder / "content.part"
            yield temporary
            _share(temporary)
            _flush(temporary)
            temporary.replace(path)
    except OSError as error:
        if str(error.filename).startswith(f"{path.parent / ('.' + path.name)}-"):
            error.filename = str(path)
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path | None]:
    """A temporary folder to fill; renamed to path if the block succeeds, removed if it fails.

    Yields None if path exists. Processes that ask for the same path wait for the first one, under a lock file beside
    it. The system releases the lock if its holder dies; what a dead one left is removed.
    """
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.exists():
            yield None
            return
        folder = path.with_name(f".{path.name}.part")
        shutil.rmtree(folder, ignore_errors=True)
        with _owned(lambda: folder):
            temporary = folder / "content"
            temporary.mkdir()
            yield temporary
            for file in filter(Path.is_file, temporary.iterdir()):
                _share(file)
            _flush_all(temporary)
            temporary.rename(path)


def replace_folder(new: Path, target: Path) -> None:
    """Rename new to target. An old folder there is removed once new stands in its place, and put back if that fails."""
    _flush_all(new)
    if not target.exists():
        new.rename(target)
        return
    with _owned(lambda: _aside(target)) as aside:
        old = target.rename(aside / "old")
        try:
            new.rename(target)
        except BaseException:
            old.rename(target)
            raise


def restore_folder(target: Path) -> None:
    """Put back the old folder of a replace_folder whose process was killed before the new one stood there."""
    aside = _aside(target)
    if (aside / OWNER).is_file() and (aside / "old").is_dir() and not target.exists():
        (aside / "old").rename(target)
    sweep(target.parent, glob.escape(aside.name))


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old.part")


class FileKind(NamedTuple):
    """What a file of ours is called, and a pattern found in the first HEAD_BYTES of every one."""

    name: str
    mark: bytes


class Output(NamedTuple):
    """A path that an option names to be written. kind is None for a folder, whose content its command checks."""

    option: str
    path: Path
    kind: FileKind | None


@contextmanager
def reserved(*outputs: Output) -> Iterator[None]:
    """Within the block no other command writes these. Raises UserError if they cannot be written, or another writes.

    So it does for an existing file that is not empty and not of the output's kind: it may be someone's work.
    """
    with ExitStack() as stack:
        for option, given, kind in outputs:
            path = given.resolve()
            if path.exists() and not path.is_file() and not path.is_dir():
                continue  # a device or a pipe
            check_writable(option, given)
            name = hashlib.sha256(str(path).casefold().encode()).hexdigest()[:16]
            lock = FileLock(cache_folder("locks") / f"{name}.lock")
            try:
                stack.enter_context(lock.acquire(timeout=0))
            except Timeout:
                raise UserError(f"{option} {given}: is being written by another run or option; name another") from None
            if kind is not None:
                check_replaceable(option, given, kind)
                sweep(path.parent, f".{glob.escape(path.name)}-*.part")
        yield


def check_writable(option: str, given: Path) -> None:
    """Raise UserError unless a file can be made where given, or the first folder that is missing to it, would be."""
    path = given.resolve()
    parent = next(folder for folder in path.parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
        if path.is_file() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"{option} {given}: cannot be written ({error.strerror}); name another place") from error


def check_replaceable(option: str, path: Path, kind: FileKind) -> None:
    """Raise UserError if path is a folder, or a file that is not empty and not of this kind."""
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; name a file")
    if not path.is_file():
        return
    if path.stat().st_size and not is_kind(path, kind):
        raise UserError(f"{option} {path}: exists and is not {kind.name}; move it away or name another file")


def is_kind(path: Path, kind: FileKind) -> bool:
    """Whether a file's head has the kind's mark."""
    with path.open("rb") as file:
        return re.search(kind.mark, file.read(HEAD_BYTES)) is not None
