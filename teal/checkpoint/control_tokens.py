"""Keeps what clients send apart from control tokens that a chat template writes.

The template is rendered with content in which a mark follows each control token's text. What is marked in the
result is text; what is not was written by the template, and becomes a token.
"""

import re
from collections.abc import Iterable
from typing import Any

from teal.checkpoint.token_backends import PRIVATE, either

MARK = PRIVATE
# Ends of a turn, a message or a text: chat models write them though a config may name only one. Not </s>, which is
# plain text in some vocabularies.
END_TOKENS = (
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>", "<|end_of_turn|>",
    "<end_of_turn>", "<｜end▁of▁sentence｜>",
)  # fmt: skip


class ControlTokens:
    """The control tokens of a vocabulary.

    control: names and ids of tokens that no content may become.
    special: those of them that a model never writes as text.
    """

    def __init__(self, control: dict[str, int], special: dict[str, int]) -> None:
        self.ids = control
        self.in_content = either(control)
        self.in_answers = either(special)
        self.written = re.compile(f"{self.in_content.pattern}({MARK}?)")
        self.beginnings = frozenset(name[:n] for name in control for n in range(1, len(name)))
        self.longest = max(map(len, self.beginnings), default=0)

    def parts(self, text: str) -> list[str | int]:
        """Text -> parts for a backend: ids of the control tokens in it, but for those that are marked as content."""
        parts: list[str | int] = []
        start = 0
        for found in self.written.finditer(text):
            if not found[2]:
                parts += [text[start : found.start()], self.ids[found[1]]]
                start = found.end()
        parts.append(text[start:])
        return [p.replace(MARK, "") if isinstance(p, str) else p for p in parts if p != ""]

    def mark_messages(self, messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages with content marked. In the assistant's, markers such as <think> stay tokens, as it wrote them."""
        return [self.mark(m, self.in_answers if m.get("role") == "assistant" else self.in_content) for m in messages]

    def mark(self, value: Any, names: re.Pattern[str] | None = None) -> Any:
        """A JSON value whose strings are marked, keys of objects as well."""
        names = names or self.in_content
        if isinstance(value, str):
            return self._mark_text(value, names)
        if isinstance(value, dict):
            return type(value)((self.mark(k, names), self.mark(v, names)) for k, v in value.items())
        if isinstance(value, (list, tuple)):
            return [self.mark(item, names) for item in value]
        return value

    def _mark_text(self, text: str, names: re.Pattern[str]) -> str:
        text = names.sub(rf"\1{MARK}", text.replace(MARK, ""))
        # A token's beginning at the end could go on in the next string, so it is marked, too.
        shown = text.rstrip()
        for n in range(min(self.longest, len(shown)), 0, -1):
            if shown[-n:] in self.beginnings:
                return shown + MARK + text[len(shown) :]
        return text
