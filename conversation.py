"""A conversation in a terminal: line editing and history, commands that begin with /, turns that share the KV cache."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine import Engine
from errors import UserError
from files import FileKind, Output, atomic_file, cache_folder, reserved

SAVED = FileKind("a saved conversation", rb'^\[\s*(\]|\{\s*"role": )')
HELP = """/sparsity P   drop another share of activations from now on (0 is dense)
/stats        figures of the last answer, as JSON
/reset        forget the conversation
/save FILE    write the conversation as JSON
/help         this list; Ctrl-D or /quit ends"""


class Conversation:
    """Messages of one conversation with an engine."""

    def __init__(self, engine: Engine, system: str | None) -> None:
        self.engine = engine
        self.opening = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.opening)
        self.figures: dict[str, Any] = {}

    def messages_of_user(self, first: str | None) -> Iterator[str]:
        """What the user writes, first if given and then line by line until the end; commands are carried out here."""
        if first is not None:
            yield first.strip()
        if sys.stdin.isatty():
            _use_history()
        while (line := _read_line()) is not None:
            message = line.strip()
            if message in ("/quit", "/exit"):
                return
            if message.startswith("/"):
                print(self._command(message), file=sys.stderr)
            elif message:
                yield message

    def prompt_ids(self, message: str) -> list[int]:
        """Token ids of the conversation with another message of the user."""
        self.messages.append({"role": "user", "content": message})
        return self.engine.tokenizer.encode_chat(self.messages)

    def add_answer(self, text: str) -> None:
        self.messages.append({"role": "assistant", "content": text})

    def _command(self, line: str) -> str:
        """Carry out a command; returns what to say about it. A mistake is said, and ends nothing."""
        name, _, argument = line.partition(" ")
        try:
            if name == "/sparsity":
                return self._use_sparsity(argument.strip())
            if name == "/stats":
                return json.dumps(self.figures, indent=1)
            if name == "/reset":
                self.messages = list(self.opening)
                return "a new conversation"
            if name == "/save":
                return self._save(argument.strip())
        except (UserError, OSError) as error:
            return f"error: {error}"
        return HELP if name == "/help" else f"error: {name} is no command\n{HELP}"

    def _use_sparsity(self, text: str) -> str:
        try:
            sparsity = float(text)
        except ValueError:
            raise UserError(f"/sparsity {text}: expected a number, 0 <= sparsity < 1") from None
        if not 0 <= sparsity < 1:
            raise UserError(f"/sparsity {text} is out of range; expected 0 <= sparsity < 1")
        self.engine.use_sparsity(sparsity)
        return f"sparsity {sparsity:g} from now on"

    def _save(self, name: str) -> str:
        if not name:
            raise UserError("/save needs a file name")
        path = Path(name).expanduser()
        with reserved(Output("/save", path, SAVED)), atomic_file(path) as temporary:
            temporary.write_text(json.dumps(self.messages, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return f"{path}: {len(self.messages)} messages"


def _use_history() -> None:
    """Arrow keys and earlier lines, kept between conversations, where Python has readline."""
    try:
        import atexit
        import readline
    except ImportError:
        return
    path = cache_folder("chat") / "history"
    if path.exists():
        readline.read_history_file(path)
    readline.set_history_length(1000)
    atexit.register(readline.write_history_file, path)


def _read_line() -> str | None:
    """The next line, None at the end of input. Ctrl-C clears the line in a terminal."""
    if not sys.stdin.isatty():
        return sys.stdin.readline() or None
    while True:
        try:
            return input("> ")
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except EOFError:
            return None
