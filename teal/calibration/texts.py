"""Text to calibrate and evaluate on: files, the default text, and token sequences cut from it."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from teal.errors import ParameterError
from teal.user_text import parse_json

SPLIT_BLOCK = 4096  # characters; every fifth block is held out, so that both parts cover the whole text
HELD_OUT_EVERY = 5
CALIBRATION_PART = "the 4/5 for calibration"  # of a text, in errors
CHARACTERS_PER_TOKEN = 8  # no tokenizer of a supported family averages over this on prose


def default_text() -> str:
    """The help topics of the Python language reference: English prose that every CPython carries."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ParameterError("this Python lacks pydoc_data, the default text; give a file as {text}") from None
    return "\n\n".join(topics[name] for name in sorted(topics))


def read_texts(paths: list[Path], field: str) -> str:
    """The text of the files in order; of a .jsonl file, the given field of each line. No paths: the default text.

    Raises UserError for a file that is unreadable, not UTF-8, or lacks the field.
    """
    return "\n\n".join(_read(path, field) for path in paths) if paths else default_text()


def _read(path: Path, field: str) -> str:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ParameterError("{text} {}: byte {} is not UTF-8; convert the file", path, error.start) from None
    except OSError as error:
        raise ParameterError("{text} {}: {}; give a readable text file", path, error.strerror) from None
    if path.suffix != ".jsonl":
        return content
    documents = []
    for number, line in enumerate(
        content.split("\n"), 1
    ):  # JSON strings may hold what splitlines takes for a line's end
        if not line.strip():
            continue
        try:
            documents.append(parse_json(line)[field])
        except (ValueError, KeyError, TypeError) as error:
            expected = f"line {number} is no JSON object with the field {field!r}"
            raise ParameterError("{text} {}: {} ({!r:.80})", path, expected, error) from None
        if not isinstance(documents[-1], str):
            raise ParameterError("{text} {}: line {}: field {!r} is no string", path, number, field)
    return "\n\n".join(documents)


def text_hash(text: str) -> str:
    """16 hex digits that name a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def split_text(text: str, rotated: bool = False) -> tuple[str, str]:
    """(calibration part, held-out part) of a text: 4/5 and 1/5 of it.

    rotated: for a model whose rotation was found on rotation_text(text): the calibration part is then the other 2/5.
    """
    blocks = _blocks(text)
    used = [block for i, block in enumerate(blocks) if i % HELD_OUT_EVERY in ((1, 3) if rotated else (0, 1, 2, 3))]
    return "".join(used), "".join(blocks[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])


def rotation_text(text: str) -> str:
    """The 2/5 of a text to find a rotation on: a basis fits its own text, and thresholds found there keep too much."""
    return "".join(block for i, block in enumerate(_blocks(text)) if i % HELD_OUT_EVERY in (0, 2))


def _blocks(text: str) -> list[str]:
    # a short text gives something to both parts
    size = max(1, min(SPLIT_BLOCK, len(text) // HELD_OUT_EVERY))
    return [text[i : i + size] for i in range(0, len(text), size)]


def split_sequences(
    encode: Callable[[str], list[int]],
    text: str,
    calibration: tuple[int, int],
    held_out: tuple[int, int],
    rotated: bool = False,
) -> tuple[Tensor, Tensor]:
    """Tokens of the two parts of a text, each int64 [sequences, length] of the sizes given. Raises UserError.

    rotated: as for split_text.
    """
    parts = split_text(text, rotated)
    names = (CALIBRATION_PART.replace("4", "2") if rotated else CALIBRATION_PART, "the 1/5 held out to check it")
    first, second = (
        token_sequences(encode, part, *size, (name, len(text)))
        for part, size, name in zip(parts, (calibration, held_out), names, strict=True)
    )
    return first, second


def token_sequences(
    encode: Callable[[str], list[int]], text: str, sequences: int, length: int, part: tuple[str, int] | None = None
) -> Tensor:
    """int64 [sequences, length] of tokens, taken at even spacing over the text. Raises UserError if it is too short.

    part, if text is one of a longer text: what the error calls it, and the characters of the whole.
    """
    stride = len(text) // sequences
    shortest = 0  # without a character for each sequence there is no need to look
    if stride > 0:
        starts = [i * stride for i in range(sequences)]
        pieces = [encode(text[start : start + CHARACTERS_PER_TOKEN * length])[:length] for start in starts]
        shortest = min(len(piece) for piece in pieces)
    if shortest < length:
        name, given = part or ("", len(text))
        where = f" (in {name}, {len(text)} characters)" if part else ""
        needed = f"{sequences} sequences of {length} tokens are needed, the shortest has {shortest}{where}"
        raise ParameterError(
            "the text of {} characters is too short: {}; give a longer {text}, or fewer or shorter sequences",
            given,
            needed,
        )
    return torch.tensor(pieces)


def first_tokens(encode: Callable[[str], list[int]], text: str, count: int) -> Tensor:
    """int64 [at most count]: the first tokens of a text."""
    return torch.tensor(encode(text[: CHARACTERS_PER_TOKEN * count])[:count], dtype=torch.int64)


def spread_sequences(encode: Callable[[str], list[int]], text: str, most: int, length: int) -> Tensor:
    """int64 [at most most, length]: whole sequences of a text's tokens, at even spacing, one behind the other.

    Raises UserError if there is not one.
    """
    tokens = torch.tensor(encode(text), dtype=torch.int64)
    whole = tokens[: len(tokens) // length * length].view(-1, length)
    if not len(whole):
        raise ParameterError("{text}: {} tokens are no sequence of {}; give a longer text", len(tokens), length)
    return whole[torch.linspace(0, len(whole) - 1, min(most, len(whole))).round().long()]
