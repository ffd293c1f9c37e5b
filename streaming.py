"""Token ids that arrive one by one -> text on character boundaries, cut at stop strings."""

from tokenizer import Tokenizer


class StreamDecoder:
    """Turns ids that arrive one by one into text, never splitting a UTF-8 character.

    The text of an id depends on its neighbours (spaces, multi-byte characters), so a short window of
    ids is decoded with and without the new one and the difference emitted once it ends on a
    character boundary.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.context = 0  # ids[context:emitted] are already out and decoded again as context
        self.emitted = 0

    def push(self, token: int) -> str:
        """Text that became certain with this id; may be empty."""
        self.ids.append(token)
        return self._emit(final=False)

    def flush(self) -> str:
        """Text still held back; bytes of an unfinished character are dropped."""
        return self._emit(final=True).rstrip("\ufffd")

    def _emit(self, final: bool) -> str:
        before = self.tokenizer.decode(self.ids[self.context : self.emitted])
        after = self.tokenizer.decode(self.ids[self.context :])
        # A character has at most 4 bytes, so at most 4 ids: a longer run of U+FFFD is the text itself.
        unfinished = after.endswith("\ufffd") and len(self.ids) - self.emitted < 4
        if not final and (unfinished or len(after) <= len(before)):
            return ""
        self.context, self.emitted = self.emitted, len(self.ids)
        return after[len(before) :]


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
