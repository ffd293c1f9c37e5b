"""Text <-> token ids for one model, plain and as a conversation, by the files in its checkpoint folder.

The format of a tokenizer file is read from its content, never from its name. Text is text: control tokens come
from the chat template, or from a raw prompt where the caller allows it.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from teal.checkpoint.chat_template import ChatOptions, ChatTemplates, find_templates
from teal.checkpoint.config import read_tokenizer_settings
from teal.checkpoint.control_tokens import ControlTokens
from teal.checkpoint.text_length import TextBound, text_bound
from teal.checkpoint.token_backends import Backend, Declared, JsonBackend, make_backend
from teal.checkpoint.vocab_merges import FILES, as_tokenizer_json, has_vocab_and_merges
from teal.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class Tokenizer:
    """Encode, decode and chat-format text for one model, configured by the files in its folder, if it has one.

    eos_ids: tokens that end a generation. special_ids: tokens that decoded text leaves out.
    """

    def __init__(self, backend: Backend, folder: Path | None = None) -> None:
        names = ("generation_config.json", "config.json")
        generation, model = (read_tokenizer_settings(folder / name) if folder else {} for name in names)
        config = _tokenizer_config(folder) if folder else {}
        self.backend = backend
        self.special_ids = frozenset(backend.special.values())
        self.special_texts = {role: _token_text(config.get(f"{role}_token")) for role in ROLES}
        self.bos_ids = self._find_bos(config, model)
        self.eos_ids = self._find_eos(generation, model)
        variables = {f"{role}_token": text for role, text in self.special_texts.items() if text is not None}
        self.templates = ChatTemplates(find_templates(folder, config) if folder else {}, variables)
        self.control = ControlTokens(backend.control, backend.special)

    def _find_bos(self, config: dict[str, Any], model: dict[str, Any]) -> list[int]:
        wanted = config.get("add_bos_token")
        if isinstance(self.backend, JsonBackend) and (wanted is None or self.backend.prefix):
            return [] if wanted is False else self.backend.prefix
        if wanted is False:
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

    def encode(
        self, text: str, allow_special: bool = False, add_bos: bool = True, context: int | None = None
    ) -> list[int]:
        """Ids of a plain prompt, with one beginning-of-text token where the model expects one.

        allow_special: names of control tokens in the text, such as <|im_end|>, are those tokens, and not text.
        context: raises UserError, before the work, for a text whose length alone tells that it has as many tokens.
        """
        ids = self._encoded(self.control.parts(text) if allow_special else [text], context)
        bos = self.bos_ids if add_bos else []
        return ids if ids[: len(bos)] == bos else bos + ids

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        options: ChatOptions = ChatOptions(),
        context: int | None = None,
    ) -> list[int]:
        """Ids of a conversation ({"role", "content"} dicts), ready for the assistant's next answer.

        Names of control tokens in messages, tools and options are text.
        tools: function descriptions for the template, or for a system message if it has no place for them.
        context is encode's. Raises UserError if the folder has no chat template or the template rejects the messages.
        """
        text = self.templates.render(messages, tools, options, self.control)
        return self._encoded(self.control.parts(text), context)

    def _encoded(self, parts: Sequence[str | int], context: int | None) -> list[int]:
        if context is not None and self._text_bound is not None:
            self._text_bound.check("".join(part for part in parts if isinstance(part, str)), context)
        return self.backend.encode(parts)

    @cached_property
    def _text_bound(self) -> TextBound | None:
        return text_bound(self.backend)

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        options: ChatOptions = ChatOptions(),
    ) -> str:
        """The conversation as the text the model was trained on. Arguments and errors are encode_chat's."""
        return self.templates.render(messages, tools, options)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return self.backend.decode(ids)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token within a text, which may be part of a character. A special token's are its name.

        Joined over a text's tokens they are its UTF-8, with the space that some decoders strip from the start.
        """
        return self.backend.token_bytes(token)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder. Raises UserError if there is none or its file is damaged."""
    for name in TOKENIZER_FILES:
        path = folder / name
        if path.is_file():
            return Tokenizer(_load_backend(path, path.read_bytes, folder), folder)
    if has_vocab_and_merges(folder):
        content = partial(as_tokenizer_json, folder, _tokenizer_config(folder))
        return Tokenizer(_load_backend(folder / "vocab.json", content, folder), folder)
    raise UserError(
        f"{folder}: has no tokenizer; expected one of {', '.join(TOKENIZER_FILES)}, or {' and '.join(FILES)}"
    )


def _load_backend(path: Path, content: Callable[[], bytes], folder: Path) -> Backend:
    declared = _declared(folder)
    try:
        return make_backend(content(), declared)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises plain Exception, sentencepiece RuntimeError
        raise UserError(f"{path}: not a readable tokenizer ({error}); download it again") from error


def _declared(folder: Path) -> Declared:
    config = _tokenizer_config(folder)
    templates = "\n".join(find_templates(folder, config).values())
    try:
        tokens = {int(i): token for i, token in (config.get("added_tokens_decoder") or {}).items()}
        added = {str(token["content"]): i for i, token in tokens.items()}
        special = {str(token["content"]) for token in tokens.values() if token.get("special")}
    except (AttributeError, TypeError, KeyError, ValueError):
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: added_tokens_decoder is not usable; expected token objects by id"
        ) from None
    named = [config.get(f"{role}_token") for role in ROLES]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = config.get(key)
        named += listed if isinstance(listed, list) else listed.values() if isinstance(listed, dict) else []
    special |= {text for text in map(_token_text, named) if text}
    return Declared(added, frozenset(special), templates, legacy=bool(config.get("legacy", False)))


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; what it does not say of special tokens, older checkpoints say in a file of their own."""
    names = ("special_tokens_map.json", "tokenizer_config.json")
    older, config = (read_tokenizer_settings(folder / name) for name in names)
    return older | config


def _token_text(value: Any) -> str | None:
    """A special token in tokenizer_config.json is a string or an object with a content field."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None
