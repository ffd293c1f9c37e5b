"""A conversation in a terminal: line editing and history, commands that begin with /, turns that share the KV cache."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from teal.cli.command_line import message_of
from teal.decoding.engine import Engine
from teal.errors import UserError
from teal.files import FileKind, Output, atomic_file, cache_folder, reserved

SAVED = FileKind("a saved conversation", rb'^\[\s*(\]|\{\s*"role": )')
HELP = """/sparsity P   drop another share of activations from now on (0 is dense), in a chat started with --sparsity
/stats        figures of the last answer, as JSON
/reset        forget the conversation
/save FILE    write the conversation as JSON
/help         this list; Ctrl-D or /quit ends, Ctrl-C stops an answer
//text        a message that begins with a slash
\"\"\"text\"\"\"   a message of several lines; a paste of several lines is one, too"""
QUOTES = '"""'
ANSWER_SHARE = 4  # a quarter of the context at most is kept free for an answer
KEPT_SHARE = 2  # once turns are dropped, half of the context is free of them: the next turns find their prefix cached


class Conversation:
    """Messages of one conversation with an engine.

    When they leave no room for an answer in the model's context, the oldest turns are dropped; the system prompt stays.
    """

    def __init__(self, engine: Engine, system: str | None, max_new_tokens: int) -> None:
        self.engine = engine
        self.opening = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.opening)
        self.figures: dict[str, Any] = {}
        self.context = engine.model.config.max_seq_len
        self.room = min(max_new_tokens, self.context // ANSWER_SHARE)

    def messages_of_user(self, first: str | None) -> Iterator[str]:
        """What the user writes, first if given and then one by one until the end; commands are carried out here."""
        if sys.stdin.isatty():
            _use_line_editing()
            print(f"{self.engine.name}: /help lists the commands, Ctrl-D ends the conversation", file=sys.stderr)
        if first is not None:
            yield first.strip()
        while (line := _read_line("> ")) is not None:
            message = line.strip()
            if message in ("/quit", "/exit"):
                return
            if message.startswith(QUOTES):
                message = _read_block(message)
            elif message.startswith("//"):
                message = message[1:]
            elif message.startswith("/") and "\n" not in message:
                print(self._command(message), file=sys.stderr)
                continue
            if message:
                yield message

    def prompt_ids(self, message: str) -> list[int]:
        """Token ids of the conversation with another message of the user.

        Raises UserError for a message that alone is too long, or that the chat template rejects; the conversation is
        then as it was before.
        """
        encode = self.engine.tokenizer.encode_chat
        turns = [*self.messages[len(self.opening) :], {"role": "user", "content": message}]
        ids = encode([*self.opening, *turns])
        limit = self.context - self.room
        dropped = 0
        if len(ids) > limit:
            while len(turns) > 1 and len(ids) > self.context // KEPT_SHARE:
                turns = turns[2:]  # a message and its answer
                dropped += 1
                ids = encode([*self.opening, *turns])
        if len(ids) > limit:
            raise UserError(
                f"the message makes a prompt of {len(ids)} tokens; at most {limit} fit the model's context of "
                f"{self.context} with room for an answer; shorten it"
            )
        if dropped:
            print(f"[the context is full: the oldest {dropped} turns are dropped]", file=sys.stderr)
        self.messages = [*self.opening, *turns]
        return ids

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
        except UserError as error:
            return f"error: {message_of(error)}"
        return HELP if name == "/help" else f"error: {name} is no command\n{HELP}"

    def _use_sparsity(self, text: str) -> str:
        try:
            sparsity = float(text)
        except ValueError:
            raise UserError(f"/sparsity {text}: expected a number, 0 <= sparsity < 1") from None
        if not 0 <= sparsity < 1:
            raise UserError(f"/sparsity {text} is out of range; expected 0 <= sparsity < 1")
        if self.engine.plan is not None:
            self.engine.use_sparsity(sparsity)
        elif sparsity > 0:
            raise UserError(f"/sparsity {text}: this chat was started dense; start one with --sparsity {text}")
        return f"sparsity {sparsity:g} from now on"

    def _save(self, name: str) -> str:
        if not name:
            raise UserError("/save needs a file name")
        path = Path(name).expanduser()
        try:
            with reserved(Output("/save", path, SAVED)), atomic_file(path) as temporary:
                temporary.write_text(json.dumps(self.messages, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"/save {name}: {error.strerror}; name a file that can be written") from None
        return f"{path}: {len(self.messages)} messages"


def _use_line_editing() -> None:
    """Arrow keys, earlier lines kept between conversations, and pastes of several lines, where Python has readline."""
    try:
        import atexit
        import readline
    except ImportError:
        return
    path = cache_folder("chat") / "history"
    if path.exists():
        readline.read_history_file(path)
    readline.set_history_length(1000)
    readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off
    atexit.register(readline.write_history_file, path)


def _read_block(text: str) -> str:
    """The message that text begins with triple quotes, read on to the line that ends with them or the end of input."""
    while not (text.endswith(QUOTES) and len(text) >= 2 * len(QUOTES)):
        line = _read_line("... ")
        if line is None:
            break
        text += "\n" + line.rstrip()
    return text.removeprefix(QUOTES).removesuffix(QUOTES).strip()


def _read_line(prompt: str) -> str | None:
    """The next line, None at the end of input. Ctrl-C clears the line in a terminal."""
    if not sys.stdin.isatty():
        return sys.stdin.readline() or None
    while True:
        try:
            return input(prompt)
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except EOFError:
            return None
