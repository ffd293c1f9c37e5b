"""The architecture that a GGUF file's header names, read without the tensors and without the gguf package.

That package reads all metadata before it answers, a vocabulary of 150,000 strings among it, which takes seconds.
"""

import difflib
import struct
from pathlib import Path
from typing import IO

from teal.checkpoint.gguf_families import FAMILIES
from teal.errors import ParameterError, UserError

VERSIONS = (2, 3)  # version 1 had shorter counts
# Value types of the metadata: bytes of a number or a truth value by its type's code; a string and an array have none.
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9


def check_header(path: Path) -> None:
    """Raise UserError unless path is a GGUF file of an architecture that can be converted."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ParameterError(
                "{checkpoint} {}: is a file but not GGUF; give a folder, a .gguf file or a hub id", path
            )
        try:
            architecture = _architecture(file)
        except (struct.error, ValueError, KeyError, OverflowError, OSError) as error:
            raise UserError(f"{path}: not a readable GGUF file ({error}); download it again") from error
    check_architecture(path, architecture)


def check_architecture(path: Path, architecture: object) -> None:
    """Raise UserError, naming the nearest, unless convert_gguf knows the architecture."""
    if architecture not in FAMILIES:
        [nearest] = difflib.get_close_matches(str(architecture), FAMILIES, n=1, cutoff=0.0)
        raise UserError(
            f"{path}: GGUF architecture {architecture!r} is not supported; "
            f"expected {', '.join(FAMILIES)} (the nearest by name is {nearest})"
        )


def _architecture(file: IO[bytes]) -> str | None:
    """general.architecture, from the file after its magic number: nearly always the first of its entries."""
    version, _, count = struct.unpack("<IQQ", file.read(20))
    if version not in VERSIONS:
        raise ValueError(f"version {version}; expected {' or '.join(map(str, VERSIONS))}")
    for _ in range(count):
        key = _string(file)
        (kind,) = struct.unpack("<I", file.read(4))
        if key == b"general.architecture" and kind == STRING:
            return _string(file).decode("utf-8", errors="replace")
        _skip(file, kind)
    return None


def _string(file: IO[bytes]) -> bytes:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > 1 << 20:
        raise ValueError(f"a string of {length} bytes")
    content = file.read(length)
    if len(content) < length:
        raise ValueError("it ends within its header")
    return content


def _skip(file: IO[bytes], kind: int) -> None:
    """Move over a value of this type."""
    if kind == STRING:
        _string(file)
        return
    if kind != ARRAY:
        file.seek(SIZES[kind], 1)
        return
    inner, count = struct.unpack("<IQ", file.read(12))
    if inner in SIZES:
        file.seek(SIZES[inner] * count, 1)
        return
    if inner != STRING:
        raise ValueError("an array of arrays")
    for _ in range(count):
        _string(file)
