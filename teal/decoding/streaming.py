"""Token ids that arrive one by one -> text on character boundaries, cut at stop strings."""

import codecs
from collections.abc import Sequence

from teal.checkpoint.tokenizer import Tokenizer

LONGEST_CHARACTER = 4  # bytes of UTF-8


class StreamDecoder:
    """Turns ids that arrive one by one into text, never splitting a UTF-8 character.

    prompt_ids: what they continue. The text is decode(prompt + ids) without decode(prompt). So a word keeps the space
    before it, and a character that the prompt begins is finished.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        tail = [i for i in prompt_ids[-LONGEST_CHARACTER:] if i not in tokenizer.special_ids]
        self.utf8.decode(b"".join(map(tokenizer.token_bytes, tail)))
        # While all is spaces, ids wait: a decoder may strip those at the start of a text.
        self.at_start = not any(self._has_text(i) for i in reversed(prompt_ids))
        self.start = list(prompt_ids) if self.at_start else []
        self.shown = len(tokenizer.decode(self.start))

    def _has_text(self, token: int) -> bool:
        return token not in self.tokenizer.special_ids and bool(self.tokenizer.token_bytes(token).strip(b" "))

    def push(self, token: int) -> str:
        """Text that became certain with this id; may be empty."""
        if token in self.tokenizer.special_ids:
            return ""
        data = self.tokenizer.token_bytes(token)
        if self.at_start:
            self.start.append(token)
            if not self._has_text(token):
                return ""
            data = b" " * self._leading_spaces() + data.lstrip(b" ")
            self.at_start = False
        return self.utf8.decode(data)

    def flush(self) -> str:
        """Text still held back; bytes of an unfinished character are dropped."""
        return self.tokenizer.decode(self.start)[self.shown :] if self.at_start else ""

    def _leading_spaces(self) -> int:
        """Of the text so far, without those of the prompt."""
        text = self.tokenizer.decode(self.start)
        return len(text) - len(text.lstrip(" ")) - self.shown


class StopStrings:
    """Passes text through until one of the stop strings appears; holds back what may be the start of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self.held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of the text so far that can be shown now; nothing after a stop string."""
        if self.stopped:
            return ""
        self.held += text
        found = [i for i in (self.held.find(stop) for stop in self.stops) if i >= 0]
        if found:
            self.stopped = True
            shown, self.held = self.held[: min(found)], ""
            return shown
        keep = max((self._overlap(stop) for stop in self.stops), default=0)
        cut = len(self.held) - keep
        shown, self.held = self.held[:cut], self.held[cut:]
        return shown

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        shown, self.held = self.held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest start of stop that ends the held text."""
        longest = min(len(stop) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if self.held.endswith(stop[:n])), 0)
