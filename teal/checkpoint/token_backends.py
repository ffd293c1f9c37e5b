"""File formats of tokenizers behind one interface: tokenizers JSON, SentencePiece, tiktoken.

A prompt comes in parts: a str is plain text, an int the id of a control token. Text never becomes a control
token, whatever it says. Control tokens are those the file marks as special, and other added tokens that the
chat template writes, such as <tool_call>.
"""

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import sentencepiece
import tiktoken
import tokenizers

# A noncharacter of Unicode, which no text contains: it tells names of control tokens from the same text.
PRIVATE = "\ufdd0"

# Llama 3's tiktoken files hold only the ranks. The split pattern and the 256 special tokens that follow
# the ranks are constants of the family.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL_NAMES = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 8: "eom_id"}
LLAMA3_SPECIAL_NAMES |= {9: "eot_id", 10: "python_tag"}
LLAMA3_SPECIAL_COUNT = 256

SPACE = "▁"  # how SentencePiece writes a space within a token
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
# Appended to a serialized ModelProto, whose fields of the same number merge: normalizer_spec.add_dummy_prefix = false.
NO_PREFIX_SPACE = b"\x1a\x02\x18\x00"


@dataclass(frozen=True, slots=True)
class Declared:
    """What the files beside a tokenizer say of it."""

    added: dict[str, int]  # tokens of tokenizer_config.json's added_tokens_decoder
    special: frozenset[str]  # names of special tokens, there and elsewhere
    templates: str  # the chat templates' source
    legacy: bool  # SentencePiece: a space before every stretch of text, not only before the first

    def is_marker(self, name: str) -> bool:
        """Whether the chat template writes this added token. A token of whitespace is ordinary text."""
        return name in self.templates and not name.isspace()


class Backend(Protocol):
    """special: tokens left out of decoded text. control: those that text never becomes; special ones are among them."""

    special: dict[str, int]
    control: dict[str, int]

    def encode(self, parts: Sequence[str | int]) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_bytes(self, token: int) -> bytes:
        """Bytes of one token within a text; a special one's name; nothing for an id without a token."""


class JsonBackend:
    """tokenizer.json, by the tokenizers package."""

    def __init__(self, content: bytes, declared: Declared) -> None:
        self.inner = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        self.inner.no_truncation()
        self.inner.no_padding()
        added = self.inner.get_added_tokens_decoder()
        known = {token.content for token in added.values() if token.special}
        late = [name for name in sorted(declared.special - known) if self.inner.token_to_id(name) is not None]
        self.inner.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in late])
        added = self.inner.get_added_tokens_decoder()
        self.added = {token.content: i for i, token in added.items()}
        self.special = {token.content: i for i, token in added.items() if token.special}
        markers = {token.content: i for i, token in added.items() if declared.is_marker(token.content)}
        self.control = self.special | markers
        self.names = {i: name for name, i in self.control.items()}
        self.prefix = self._find_prefix()
        self.is_byte_level = self._joined(["Ġ"]) == " "
        self.has_byte_tokens = self._joined(["<0xC3>", "<0xA9>"]) == "é"

    def _find_prefix(self) -> list[int]:
        """Ids that the post-processor puts before a text, such as <s>."""
        probe = self.inner.encode("a")
        count = probe.special_tokens_mask.index(0) if 0 in probe.special_tokens_mask else 0
        return probe.ids[:count]

    def encode(self, parts: Sequence[str | int]) -> list[int]:
        names, unknown = self.names, self._unknown
        text = "".join(names[p] if isinstance(p, int) else p for p in parts)
        # Unlike encode, encode_batch_fast lets other threads run: 4 MB of text take seconds.
        ids = self.inner.encode_batch_fast([text], add_special_tokens=False)[0].ids
        made = [i for i in ids if i in names and i != unknown]
        wanted = [p for p in parts if isinstance(p, int) and p != unknown]
        if made == wanted and not any(names.get(unknown, PRIVATE) in p for p in parts if isinstance(p, str)):
            return ids  # the text names no control token that it is not to become
        return self._encode_without_names(parts)

    @cached_property
    def _unknown(self) -> int:
        """Id of the token for what the vocabulary lacks, which any text may become; -1 without one."""
        model = self.inner.model
        name = getattr(model, "unk_token", None)
        found = getattr(model, "unk_id", None) if name is None else self.inner.token_to_id(name)
        return -1 if found is None else found

    @cached_property
    def _without_names(self) -> tokenizers.Tokenizer:
        """The same tokenizer, in which control tokens have names that no text contains; it shares the model."""
        other = tokenizers.Tokenizer(self.inner.model)
        other.normalizer, other.pre_tokenizer = self.inner.normalizer, self.inner.pre_tokenizer
        for i, token in sorted(self.inner.get_added_tokens_decoder().items()):
            if i in self.names:
                token = tokenizers.AddedToken(
                    PRIVATE + token.content, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False
                )
            other.add_tokens([token])
        return other

    def _encode_without_names(self, parts: Sequence[str | int]) -> list[int]:
        text = "".join(PRIVATE + self.names[p] if isinstance(p, int) else p.replace(PRIVATE, "") for p in parts)
        encoding = self._without_names.encode_batch([text], add_special_tokens=False)[0]
        ids: list[int] = []
        for i, name in zip(encoding.ids, encoding.tokens, strict=True):
            if name.startswith(PRIVATE):
                ids.append(self.control[name[1:]])
            elif i in self.names and i != self._unknown and name == self.names[i]:
                ids += self._spelled(name)  # the vocabulary made it from characters
            else:
                ids.append(self.added.get(name, i))
        return ids

    def _spelled(self, name: str) -> list[int]:
        """Ids of a control token's name as text."""
        return [token.id for part in (name[:1], name[1:]) for token in self.inner.model.tokenize(part)]

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(list(ids), skip_special_tokens=True)

    def _joined(self, tokens: list[str]) -> str:
        return self.inner.decoder.decode(tokens) if self.inner.decoder is not None else " ".join(tokens)

    def token_bytes(self, token: int) -> bytes:
        name = self.inner.id_to_token(token)
        if name is None:
            return b""
        if name in self.special:
            return name.encode("utf-8")
        if self.is_byte_level:
            known = all(c in BYTE_OF_CHARACTER for c in name)
            return bytes(BYTE_OF_CHARACTER[c] for c in name) if known else name.encode("utf-8")
        if self.has_byte_tokens and (byte := BYTE_TOKEN.fullmatch(name)):
            return bytes([int(byte[1], 16)])
        return self._joined(["a", name])[1:].encode("utf-8")  # as it stands within a text, not at its start


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable Latin-1 characters are themselves, other bytes follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


class SentencePieceBackend:
    """SentencePiece tokenizer.model, and the tokens that the checkpoint declares beside it."""

    def __init__(self, content: bytes, declared: Declared) -> None:
        if not content:
            raise ValueError("the file is empty")  # SentencePiece itself would accept it
        self.inner = sentencepiece.SentencePieceProcessor(model_proto=content)
        self.bare = sentencepiece.SentencePieceProcessor(model_proto=content + NO_PREFIX_SPACE)
        self.legacy = declared.legacy
        self.size = self.inner.get_piece_size()
        reserved = [i for i in range(self.size) if self.inner.is_control(i) or self.inner.is_unknown(i)]
        self.names = {i: name for name, i in declared.added.items()}
        self.special = {self.inner.id_to_piece(i): i for i in reserved}
        self.special |= {name: i for name, i in declared.added.items() if name in declared.special}
        self.control = self.special | {name: i for name, i in declared.added.items() if declared.is_marker(name)}
        self.skipped = frozenset(self.special.values())
        self.plain_added = {name: i for name, i in declared.added.items() if name not in self.control}
        self.added_pattern = either(self.plain_added)
        self.strips_space = self.inner.encode("a", out_type=str)[0].startswith(SPACE)

    def encode(self, parts: Sequence[str | int]) -> list[int]:
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
                continue
            for text in self.added_pattern.split(part):
                if text in self.plain_added:
                    ids.append(self.plain_added[text])
                elif text:
                    ids += (self.bare if ids and not self.legacy else self.inner).encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text = b"".join(self.token_bytes(i) for i in ids if i not in self.skipped).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips_space else text

    def token_bytes(self, token: int) -> bytes:
        if token in self.names:
            return self.names[token].encode("utf-8")
        if token >= self.size:
            return b""
        piece = self.inner.id_to_piece(token)
        return bytes([int(piece[3:5], 16)]) if self.inner.is_byte(token) else piece.replace(SPACE, " ").encode("utf-8")


class TiktokenBackend:
    """Llama 3's tiktoken tokenizer.model: one base64 token and its rank a line."""

    def __init__(self, content: bytes, declared: Declared) -> None:
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in content.splitlines())}
        names = {
            len(ranks) + i: f"<|{LLAMA3_SPECIAL_NAMES.get(i, f'reserved_special_token_{i}')}|>"
            for i in range(LLAMA3_SPECIAL_COUNT)
        }
        names |= {i: name for name, i in declared.added.items() if i >= len(ranks)}
        self.special = {name: i for i, name in names.items()}
        self.control = self.special
        self.inner = tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=self.special
        )
        self.names = names

    def encode(self, parts: Sequence[str | int]) -> list[int]:
        ids: list[int] = []
        for part in parts:
            ids += [part] if isinstance(part, int) else self.inner.encode_ordinary(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.token_bytes(i) for i in ids if i not in self.names).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        try:
            return self.inner.decode_single_token_bytes(token)
        except KeyError:
            return b""


class IdBackend:
    """For random weights, which have no text: a text's bytes are its ids, and ids are written as numbers."""

    def __init__(self) -> None:
        self.special: dict[str, int] = {}
        self.control: dict[str, int] = {}

    def encode(self, parts: Sequence[str | int]) -> list[int]:
        return list("".join(map(str, parts)).encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f" {i}" for i in ids)

    def token_bytes(self, token: int) -> bytes:
        return f" {token}".encode()


def make_backend(content: bytes, declared: Declared) -> Backend:
    """The backend for a tokenizer file's content. Raises exceptions of many types for a damaged one."""
    if content.lstrip()[:1] == b"{":
        return JsonBackend(content, declared)
    return (TiktokenBackend if _is_tiktoken(content) else SentencePieceBackend)(content, declared)


def _is_tiktoken(content: bytes) -> bool:
    first = content.split(b"\n", 1)[0].split()
    try:
        return len(first) == 2 and first[1].isdigit() and bool(base64.b64decode(first[0], validate=True))
    except binascii.Error:
        return False


def either(names: Any) -> re.Pattern[str]:
    """Matches any of the names as group 1, the longest that fits; nothing if there are none."""
    return re.compile("(" + ("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)") + ")")
