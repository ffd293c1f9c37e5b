"""Text <-> token ids for the three file formats models ship: tokenizers JSON, SentencePiece, tiktoken.

The format is read from a file's content, never from its name. Special tokens and the chat template
come from the checkpoint folder; the template runs in Jinja2's sandbox.
"""

import base64
import binascii
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import jinja2
import sentencepiece
import tiktoken
import tokenizers
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from errors import UserError
from hf_config import read_tokenizer_settings

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")

# Llama 3's tiktoken files hold only the ranks; the split pattern and the 256 special tokens that
# follow the ranks are constants of the family.
LLAMA3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPECIAL_NAMES = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 8: "eom_id"}
LLAMA3_SPECIAL_NAMES |= {9: "eot_id", 10: "python_tag"}
LLAMA3_SPECIAL_COUNT = 256
TOOLS_MESSAGE = (
    "You can call functions. To call one, answer only with "
    '<tool_call>{"name": NAME, "arguments": OBJECT}</tool_call>. Functions:\n'
)


class Backend(Protocol):
    """What the formats have in common: ids of plain text, text of ids, ids of special tokens."""

    special: dict[str, int]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class JsonBackend:
    """tokenizer.json, by the tokenizers package."""

    def __init__(self, content: bytes) -> None:
        self.inner = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        added = self.inner.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}
        # Ids a post-processor puts before any text, such as <s>.
        self.prefix = self.inner.encode("").ids

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=True)


class SentencePieceBackend:
    """SentencePiece tokenizer.model; special tokens in a text are found here, which SentencePiece does not do.

    added: tokens the checkpoint declares beside the model file, with their ids.
    """

    def __init__(self, content: bytes, added: dict[str, int]) -> None:
        if not content:
            raise ValueError("the file is empty")  # SentencePiece itself would accept it
        self.inner = sentencepiece.SentencePieceProcessor(model_proto=content)
        pieces = range(self.inner.get_piece_size())
        self.special = {self.inner.id_to_piece(i): i for i in pieces if self.inner.is_control(i)} | added

    def encode(self, text: str) -> list[int]:
        if not self.special:
            return self.inner.encode(text)
        ids: list[int] = []
        for part in re.split("(" + "|".join(map(re.escape, self.special)) + ")", text):
            ids += [self.special[part]] if part in self.special else self.inner.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode([i for i in ids if i < self.inner.get_piece_size()])


class TiktokenBackend:
    """Llama 3's tiktoken tokenizer.model: one base64 token and its rank a line."""

    def __init__(self, content: bytes) -> None:
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in content.splitlines())}
        names = [
            f"<|{LLAMA3_SPECIAL_NAMES.get(i, f'reserved_special_token_{i}')}|>" for i in range(LLAMA3_SPECIAL_COUNT)
        ]
        self.special = {name: len(ranks) + i for i, name in enumerate(names)}
        self.inner = tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=self.special
        )
        self.first_special = len(ranks)

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, allowed_special="all")

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode([i for i in ids if i < self.first_special])


class IdBackend:
    """For random weights, which have no text: a text's bytes are its ids, and ids are written as numbers."""

    def __init__(self) -> None:
        self.special: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: list[int]) -> str:
        return "".join(f" {i}" for i in ids)


class Tokenizer:
    """Encode, decode and chat-format text for one model, configured by the files in its folder, if it has one.

    eos_ids: tokens that end a generation.
    """

    def __init__(self, backend: Backend, folder: Path | None = None) -> None:
        names = ("tokenizer_config.json", "generation_config.json", "config.json")
        config, generation, model = (read_tokenizer_settings(folder / name) if folder else {} for name in names)
        self.backend = backend
        self.special_texts = {role: _token_text(config.get(f"{role}_token")) for role in ("bos", "eos", "unk", "pad")}
        self.bos_ids = self._find_bos(config, model)
        self.eos_ids = self._find_eos(generation, model)
        self.chat_template = _find_chat_template(folder, config) if folder else None

    def _find_bos(self, config: dict[str, Any], model: dict[str, Any]) -> list[int]:
        if isinstance(self.backend, JsonBackend):
            return self.backend.prefix
        if not config.get("add_bos_token", True):
            return []
        text = self.special_texts["bos"]
        first = next((t for t in ("<|begin_of_text|>", "<s>") if t in self.backend.special), None)
        found = self.backend.special.get(text or first or "", model.get("bos_token_id"))
        return [] if found is None else [found]

    def _find_eos(self, generation: dict[str, Any], model: dict[str, Any]) -> frozenset[int]:
        found: set[int] = set()
        for source in (generation, model):
            value = source.get("eos_token_id")
            found |= set(value) if isinstance(value, list) else {value} if isinstance(value, int) else set()
        text = self.special_texts["eos"]
        # End-of-turn tokens that chat models emit though their config may name only end-of-text.
        names = [text, "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "</s>", "<|end_of_text|>", "<|endoftext|>"]
        return frozenset(found | {self.backend.special[n] for n in names if n in self.backend.special})

    def encode(self, text: str) -> list[int]:
        """Ids of a plain prompt, with the beginning-of-text token where the model expects one."""
        return self.bos_ids + self.backend.encode(text)

    def encode_chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Ids of a conversation ({"role", "content"} dicts), ready for the assistant's next answer.

        tools: function descriptions for the template, or for a system message if it has no place for them. Raises
        UserError if the folder has no chat template or the template rejects the messages.
        """
        return self.backend.encode(self.render_chat(messages, tools))

    def render_chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
        """The conversation as the text the model was trained on. Raises UserError as encode_chat does."""
        if self.chat_template is None:
            raise UserError("this checkpoint has no chat template; use --prompt, or a chat-tuned checkpoint")
        if tools and "tools" not in self.chat_template:
            described = TOOLS_MESSAGE + "\n".join(json.dumps(tool["function"]) for tool in tools)
            messages = [{"role": "system", "content": described}, *messages]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals |= {"raise_exception": _raise_template_error, "strftime_now": datetime.now().strftime}
        texts = {f"{role}_token": text or "" for role, text in self.special_texts.items()}
        try:
            template = environment.from_string(self.chat_template)
            return template.render(messages=messages, tools=tools, add_generation_prompt=True, **texts)
        except Exception as error:  # a template is a program, and messages from outside may be of any shape
            raise UserError(f"the checkpoint's chat template rejected the conversation ({error})") from error

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens left out."""
        return self.backend.decode(ids)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder. Raises UserError if there is none or its file is damaged."""
    for name in TOKENIZER_FILES:
        path = folder / name
        if path.is_file():
            return Tokenizer(_load_backend(path, folder), folder)
    raise UserError(f"{folder}: has no tokenizer; expected one of {', '.join(TOKENIZER_FILES)}")


def _load_backend(path: Path, folder: Path) -> Backend:
    content = path.read_bytes()
    try:
        if content.lstrip()[:1] == b"{":
            return JsonBackend(content)
        if _is_tiktoken(content):
            return TiktokenBackend(content)
        declared = read_tokenizer_settings(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
        return SentencePieceBackend(content, {token["content"]: int(i) for i, token in declared.items()})
    except Exception as error:  # tokenizers raises plain Exception, sentencepiece RuntimeError
        raise UserError(f"{path}: not a readable tokenizer ({error}); download it again") from error


def _is_tiktoken(content: bytes) -> bool:
    first = content.split(b"\n", 1)[0].split()
    try:
        return len(first) == 2 and first[1].isdigit() and bool(base64.b64decode(first[0], validate=True))
    except binascii.Error:
        return False


def _token_text(value: Any) -> str | None:
    """A special token in tokenizer_config.json is a string or an object with a content field."""
    return value.get("content") if isinstance(value, dict) else value


def _find_chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: byte {error.start} is not UTF-8; download it again") from None
    template = read_tokenizer_settings(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):  # several named templates
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default", next(iter(named.values()), None))
    return template


def _raise_template_error(message: str) -> None:
    raise jinja2.TemplateError(message)
