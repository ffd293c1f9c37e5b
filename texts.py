"""Text to calibrate and evaluate on: files, the default text, and token sequences cut from it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from errors import UserError

SPLIT_BLOCK = 4096  # characters; every fifth block is held out, so that both parts cover the whole text
HELD_OUT_EVERY = 5
CHARACTERS_PER_TOKEN = 8  # no tokenizer of a supported family averages over this on prose


def default_text() -> str:
    """The help topics of the Python language reference: English prose that every CPython carries."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python lacks pydoc_data, the default text; pass --text FILE") from None
    return "\n\n".join(topics[name] for name in sorted(topics))


def read_texts(paths: list[Path], field: str) -> str:
    """The text of the files in order; of a .jsonl file, the given field of each line. No paths: the default text.

    Raises UserError for a file that is unreadable, not UTF-8, or lacks the field.
    """
    return "\n\n".join(_read(path, field) for path in paths) if paths else default_text()


def _read(path: Path, field: str) -> str:
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--text {path}: byte {error.start} is not UTF-8; convert the file") from None
    except OSError as error:
        raise UserError(f"--text {path}: {error.strerror}; give a readable text file") from None
    if path.suffix != ".jsonl":
        return content
    documents = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            documents.append(json.loads(line)[field])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"--text {path}: line {number} is no JSON object with the field {field!r}") from None
        if not isinstance(documents[-1], str):
            raise UserError(f"--text {path}: line {number}: field {field!r} is no string")
    return "\n\n".join(documents)


def text_hash(text: str) -> str:
    """16 hex digits that name a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def split_text(text: str) -> tuple[str, str]:
    """(calibration part, held-out part) of a text."""
    blocks = [text[i : i + SPLIT_BLOCK] for i in range(0, len(text), SPLIT_BLOCK)]
    held_out = blocks[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    del blocks[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return "".join(blocks), "".join(held_out)


def token_sequences(encode: Callable[[str], list[int]], text: str, sequences: int, length: int) -> Tensor:
    """int64 [sequences, length] of tokens, taken at even spacing over the text. Raises UserError if it is too short."""
    stride = len(text) // sequences
    starts = [i * stride for i in range(sequences)]
    pieces = [encode(text[start : start + CHARACTERS_PER_TOKEN * length])[:length] for start in starts]
    shortest = min(len(piece) for piece in pieces)
    if shortest < length:
        raise UserError(
            f"the text of {len(text)} characters is too short: {sequences} sequences of {length} tokens are needed, "
            f"the shortest has {shortest}; give a longer --text"
        )
    return torch.tensor(pieces)


def first_tokens(encode: Callable[[str], list[int]], text: str, count: int) -> Tensor:
    """int64 [at most count]: the first tokens of a text."""
    return torch.tensor(encode(text[: CHARACTERS_PER_TOKEN * count])[:count], dtype=torch.int64)
