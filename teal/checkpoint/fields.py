"""Fields of a config.json, checked as they are read: errors name the file, the field and its value."""

import math
from pathlib import Path
from typing import Any

from teal.errors import UserError
from teal.user_text import is_number


class Fields:
    """The object raw in the file at path, or an object within it."""

    def __init__(self, path: Path, raw: dict[str, Any]) -> None:
        self.path, self.raw = path, raw

    def get(self, field: str, default: Any = None) -> Any:
        """The value of a field; default if it is left out or null."""
        value = self.raw.get(field)
        return default if value is None else value

    def bad(self, field: str, expected: str) -> UserError:
        """What to raise for a value that is of no use."""
        return UserError(f"{self.path}: {field} {self.raw.get(field)!r:.200} is not usable; expected {expected}")

    def positive(self, field: str, kind: type[int] | type[float] = int, default: Any = None) -> Any:
        """A positive number. Raises UserError for any other."""
        value = self.get(field, default)
        if not (is_number(value) and isinstance(value, (int, kind)) and 0 < value < math.inf):
            raise UserError(
                f"{self.path}: {field} {value!r:.200} is not usable; expected a positive {kind.__name__}"
            )  # fmt: skip
        return value

    def optional(self, field: str) -> float | None:
        """A positive number, or None if it is left out."""
        return None if self.raw.get(field) is None else float(self.positive(field, float))

    def numbers(self, field: str, length: int) -> list[float]:
        """A list of so many positive numbers."""
        values = self.get(field)
        if not (isinstance(values, list) and len(values) == length and all(is_number(v) and v > 0 for v in values)):
            raise self.bad(field, f"a list of {length} positive numbers")
        return values

    def object(self, field: str) -> "Fields":
        """An object within this one; empty if it is left out."""
        value = self.get(field, {})
        if not isinstance(value, dict):
            raise self.bad(field, "an object")
        return Fields(self.path, value)
