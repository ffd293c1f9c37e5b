"""Calls of tools in a text that comes in pieces: what of it is content, and what a call's name and arguments.

A call is <tool_call>{"name": NAME, "arguments": OBJECT}</tool_call>, anywhere outside <think>…</think>. It may also be
the bare object where an answer begins, or after its thoughts or another call. "parameters" may stand for "arguments",
as Llama 3 has it. White space beside a call is dropped. Held back is what may still become a call: a marker's first
characters, and an object until its name is known. So is a tagged call with its fields in another order.
"""

import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

TOOL_OPEN, TOOL_CLOSE = "<tool_call>", "</tool_call>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Content:
    """Text that belongs to no call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of a tool begins."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """The next part of a call's arguments, a JSON object."""

    index: int
    text: str


Delta = Content | CallStart | Arguments


@dataclass(slots=True)
class Call:
    """A call as far as it has come."""

    id: str
    name: str
    arguments: str = ""
    complete: bool = False


class ToolCallParser:
    """Splits one answer into deltas; content and calls are those of all deltas so far.

    names: the tools there are. in_thought: the prompt opened <think> already. limit: so many calls end the answer.
    """

    def __init__(self, names: Sequence[str], in_thought: bool = False, limit: int | None = None) -> None:
        self.names = names
        self.limit = limit
        self.content = ""
        self.calls: list[Call] = []
        self._held = ""  # not settled yet
        self._spaces = ""  # after the content, part of it if more follows
        self._raw = ""  # the call under way, up to the held text
        self._tagged = False  # whether it is between tags
        self._scan = ObjectScan()  # of its arguments
        # What the held text is read as. A step returns None if it needs more text.
        self._step: Callable[[], list[Delta] | None] | None = self._thought if in_thought else self._start

    @property
    def complete_calls(self) -> list[Call]:
        """Those that came whole, which a client may run."""
        return [call for call in self.calls if call.complete]

    def push(self, text: str) -> list[Delta]:
        """What became certain with this piece."""
        self._held += text
        found: list[Delta] = []
        while self._held and self._step is not None and (deltas := self._step()) is not None:
            found += deltas
        return found

    def finish(self, cut: bool) -> list[Delta]:
        """The rest, at the end of the answer. cut: a limit ended it, so a call that it broke off is no content.

        A call that the model itself broke off is content.
        """
        text, found = self._held, list[Delta]()
        if self._step == self._whole:
            called = self._parsed(text)
            text, found = (self._raw + text, []) if called is None else ("", called)
        elif self._step in (self._head, self._arguments):
            text = self._raw + text
        elif self._step in (self._close, None):
            text = ""
        if cut and self._may_be_call(text):
            self._spaces = text = ""
        found += self._shown(text)
        if self._spaces and not self.calls:
            found.append(Content(self._spaces))
            self.content += self._spaces
        self._held, self._step = "", None
        return found

    def _may_be_call(self, text: str) -> bool:
        if self._step in (self._start, self._content):
            return len(text.lstrip()) > 1  # a marker's start; "<" alone is rather less-than
        return self._step != self._thought

    def _shown(self, text: str) -> list[Delta]:
        text = self._spaces + text
        shown = text.rstrip()
        self._spaces = text[len(shown) :]
        self.content += shown
        return [Content(shown)] if shown else []

    def _start(self) -> list[Delta] | None:
        """An answer's beginning, and what follows thoughts or a call."""
        text = self._held.lstrip()
        if text.startswith(THINK_OPEN):
            self._step = self._thought
        elif text.startswith("{"):
            self._spaces += self._held[: -len(text)]
            self._begin(text, tagged=False)
        elif text and not THINK_OPEN.startswith(text) and not TOOL_OPEN.startswith(text):
            self._step = self._content
        else:
            return None
        return []

    def _thought(self) -> list[Delta] | None:
        before, marker, rest = self._held.partition(THINK_CLOSE)
        if not marker:
            return self._all_but_start_of(THINK_CLOSE)
        self._held, self._step = rest, self._start
        return self._shown(before + marker)

    def _content(self) -> list[Delta] | None:
        before, marker, rest = self._held.partition(TOOL_OPEN)
        if not marker:
            return self._all_but_start_of(TOOL_OPEN)
        self._begin(rest, tagged=True)
        return self._shown(before)

    def _all_but_start_of(self, marker: str) -> list[Delta] | None:
        """Show the held text but for what may be the start of marker at its end."""
        longest = min(len(marker) - 1, len(self._held))
        keep = next((n for n in range(longest, 0, -1) if self._held.endswith(marker[:n])), 0)
        if keep == len(self._held):
            return None
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return self._shown(text)

    def _begin(self, text: str, tagged: bool) -> None:
        self._held, self._tagged, self._raw = text, tagged, TOOL_OPEN if tagged else ""
        self._step = self._head

    def _head(self) -> list[Delta] | None:
        """A call up to its arguments."""
        found = match_head(self._held, self.names)
        if found is None:
            return None
        if not found:
            self._step = self._whole if self._tagged else self._content
            return []
        name, end = found
        self._raw, self._held = self._raw + self._held[:end], self._held[end:]
        self._scan, self._step = ObjectScan(), self._arguments
        return self._called(name)

    def _called(self, name: str) -> list[Delta]:
        if self.limit is not None and len(self.calls) >= self.limit:
            self._held, self._step = "", None
            return []
        self._spaces = ""
        self.calls.append(Call(f"call_{uuid.uuid4().hex[:24]}", name))
        return [CallStart(len(self.calls) - 1, self.calls[-1].id, name)]

    def _arguments(self) -> list[Delta] | None:
        end = self._scan.push(self._held)
        text, self._held = self._held[:end], self._held[end:]
        self._raw += text
        self.calls[-1].arguments += text
        if self._scan.ended:
            self.calls[-1].complete = True
            self._step = self._close
        return [Arguments(len(self.calls) - 1, text)]

    def _close(self) -> list[Delta] | None:
        """What closes a call whose arguments are complete."""
        if not self._tagged:
            text = self._held.lstrip()
            if not text:
                return None
            self._held, self._step = text.removeprefix("}"), self._start
            return []
        return None if self._body() is None else []

    def _body(self) -> str | None:
        """Take the held text up to the closing tag, or to an opening one where that is missing; None: not here yet."""
        ends = [i for i in (self._held.find(TOOL_CLOSE), self._held.find(TOOL_OPEN)) if i >= 0]
        if not ends:
            return None
        text, self._held = self._held[: min(ends)], self._held[min(ends) :].removeprefix(TOOL_CLOSE)
        self._step = self._start
        return text

    def _whole(self) -> list[Delta] | None:
        """A tagged call that is read when it is complete."""
        text = self._body()
        if text is None:
            return None
        found = self._parsed(text)
        return self._shown(TOOL_OPEN + text + TOOL_CLOSE) if found is None else found

    def _parsed(self, text: str) -> list[Delta] | None:
        """The call that text is, if it is one."""
        try:
            call: Any = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(call, dict) or call.get("name") not in self.names:
            return None
        arguments = call.get("arguments", call.get("parameters", {}))
        if not isinstance(arguments, dict):
            return None
        found = self._called(call["name"])
        if found:
            self.calls[-1].arguments = json.dumps(arguments, ensure_ascii=False)
            self.calls[-1].complete = True
            found.append(Arguments(len(self.calls) - 1, self.calls[-1].arguments))
        return found


class ObjectScan:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self.ended = False
        self._depth = 0
        self._quoted = self._escaped = False

    def push(self, text: str) -> int:
        """How many characters of text belong to the object."""
        for i, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = character == "\\"
                self._quoted = character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.ended = True
                    return i + 1
        return len(text)


def match_head(text: str, names: Sequence[str]) -> tuple[str, int] | Literal[False] | None:
    """(a call's name, where its arguments begin) if text begins as a call of one of names does.

    None if it is still too short to know, False if it does not.
    """
    quoted = [json.dumps(name) for name in names]
    fields = ['"arguments"', '"parameters"']
    at, called = 0, ""
    for expected in (["{"], ['"name"'], [":"], quoted, [","], fields, [":"], ["{"]):
        at = len(text) - len(text[at:].lstrip())
        rest = text[at:]
        found = next((literal for literal in expected if rest.startswith(literal)), None)
        if found is None:
            return None if any(literal.startswith(rest) for literal in expected) else False
        called = json.loads(found) if expected is quoted else called
        at += len(found)
    return called, at - 1
