"""Text and JSON that come from outside: characters alone, and nesting of a depth that later code can walk."""

import json
from typing import Any

MAX_DEPTH = 100  # of JSON: far beyond any real file, far below Python's limit on recursion


def is_text(value: str) -> bool:
    """Whether value holds characters alone: bytes that are not UTF-8 come from the system as lone surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in value)


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number, of a size that arithmetic can take."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError if it is none, nests too deep, or holds half a surrogate pair."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    level = [content]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += (*value, *value.values())
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str) and not is_text(value):
                raise ValueError(f"a string holds half a surrogate pair ({value[:40]!a})")
        if not inner:
            return content
        level = inner
    raise ValueError(f"nested more than {MAX_DEPTH} deep")
