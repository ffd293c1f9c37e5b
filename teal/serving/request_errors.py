"""What is wrong with a request, in the client's words: the field's path, what would be right, and what was there."""

import json
from typing import Any

from pydantic import ValidationError

SHOWN = 60  # characters of a wrong value
KINDS = {
    "string_type": "a string",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}
UNITS = {"prompt": "prompts", "messages": "messages", "tools": "tools", "stop": "stop strings"}


def describe(error: ValidationError, data: dict[str, Any]) -> tuple[str, str | None]:
    """(message, path of the field or None) for the first thing that is wrong with data."""
    first = error.errors(include_url=False)[0]
    path = _path(first["loc"], data, missing=first["type"] == "missing")
    field = ".".join(map(str, path)) or None
    text = _expectation(first["type"], first.get("ctx", {}), first["msg"], first["input"], path)
    return f"{field}: {text}" if field else text, field


def _path(location: tuple[int | str, ...], data: Any, missing: bool) -> list[int | str]:
    """location without pydantic's names of a union's members, which are in no request."""
    path: list[int | str] = []
    for i, part in enumerate(location):
        last = i == len(location) - 1
        if isinstance(data, dict) and (part in data or (last and missing)):
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int):
            data = data[part]
        else:
            continue
        path.append(part)
    return path


def _expectation(kind: str, context: dict[str, Any], message: str, value: Any, path: list[int | str]) -> str:
    if kind == "missing":
        return "is missing; it is required"
    if kind in ("too_long", "too_short"):
        unit = next((UNITS[part] for part in reversed(path) if part in UNITS), "items")
        words, bound = ("at most", context["max_length"]) if kind == "too_long" else ("at least", context["min_length"])
        return f"{words} {bound} {unit if bound != 1 else unit.removesuffix('s')}, got {len(value)}"
    if kind == "value_error":
        return str(context["error"])
    if kind in BOUNDS:
        words, key = BOUNDS[kind]
        bound = context[key]
        expected = f"{words} {int(bound) if bound == int(bound) else bound}"
    elif kind == "literal_error":
        expected = f"expected {context['expected']}"
    elif kind == "string_pattern_mismatch":
        expected = f"expected a text that matches {context['pattern']}"
    else:
        expected = f"expected {KINDS[kind]}" if kind in KINDS else message
    return f"{expected}, got {_shown(value)}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
