"""A GGUF model in several files, NAME-00001-of-0000N.gguf as gguf-split of llama.cpp writes them, found from any one.

Only the first file has the model's metadata. Each says which part it is (split.no) and of how many (split.count), and
how many tensors all of them hold (split.tensors.count).
"""

import re
from pathlib import Path
from typing import Any

from gguf import GGUFReader, ReaderTensor

from teal.errors import UserError

PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
READ_ERRORS = (ValueError, OSError, IndexError, KeyError, OverflowError, MemoryError)  # of a file that is no GGUF


def gguf_parts(path: Path) -> list[Path]:
    """The files of the model that path is a part of, in order; path alone if its name is no part's.

    Raises UserError for the first one that is missing.
    """
    name = PART_NAME.fullmatch(path.name)
    if name is None:
        return [path]
    count = int(name["count"])
    if not 1 <= int(name["number"]) <= count:
        raise UserError(f"{path}: names part {int(name['number'])} of {count}; download it again under its own name")
    parts = [path.with_name(f"{name['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    for i, part in enumerate(parts, start=1):
        if not part.is_file():
            raise UserError(f"{path}: part {i} of {count} is missing; put {part.name} beside it")
    return parts


def read_parts(path: Path) -> tuple[dict[str, Any], list[ReaderTensor]]:
    """The metadata and all tensors (memory-mapped) of the model that path is a part of.

    Raises UserError if a part is missing, unreadable, or not the part that its name says.
    """
    parts = gguf_parts(path)
    readers = [_reader(part) for part in parts]
    meta = {name: field.contents() for name, field in readers[0].fields.items()}
    for i, (part, reader) in enumerate(zip(parts, readers, strict=True)):
        number, count = _integer(reader, "split.no", default=0), _integer(reader, "split.count", default=1)
        if (number, count) != (i, len(parts)):
            raise UserError(
                f"{part}: holds part {number + 1} of {count} (split.no, split.count); "
                f"name the files of a model NAME-00001-of-{count:05d}.gguf and so on, in one folder"
            )
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    expected = _integer(readers[0], "split.tensors.count", default=len(tensors))
    if len(tensors) != expected:
        raise UserError(
            f"{path}: its {len(parts)} parts hold {len(tensors)} tensors, not {expected}; download them again"
        )
    return meta, tensors


def _integer(reader: GGUFReader, key: str, default: int) -> int:
    return int(reader.fields[key].contents()) if key in reader.fields else default


def _reader(path: Path) -> GGUFReader:
    try:
        return GGUFReader(path)
    except READ_ERRORS as error:
        raise UserError(f"{path}: not a readable GGUF file ({error}); download it again") from error
