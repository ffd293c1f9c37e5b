"""How few tokens a text can have, by its length alone: a text that cannot fit is refused before it is tokenized."""

import json
from dataclasses import dataclass
from typing import Any

from teal.checkpoint.token_backends import Backend, JsonBackend, SentencePieceBackend
from teal.errors import UserError

NFC_BYTES = 3  # of a text that become one at most: three Korean letters of 3 bytes become a syllable of 3
PROBE = "a  b\u0301 Ａ ﬁ \u200b\u0001\t\n\r c "  # a SentencePiece normalizer that drops or joins anything does so here

# Byte-level vocabularies write a byte that prints as its Latin-1 character, the others as those from U+0100 on.
PRINTED = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
LEVELS = PRINTED + tuple(byte for byte in range(256) if byte not in PRINTED)
BYTE_CHARACTERS = {byte: chr(byte if i < len(PRINTED) else 256 + i - len(PRINTED)) for i, byte in enumerate(LEVELS)}


@dataclass(frozen=True, slots=True)
class TextBound:
    """longest: the most bytes that one token stands for. dropped: bytes that no token has, which leave no trace."""

    longest: int
    dropped: bytes = b""

    def check(self, text: str, context: int) -> None:
        """Raise UserError for a text that has context tokens or more, if its length alone tells."""
        size = len(text.encode("utf-8").translate(None, self.dropped))
        if size > self.longest * (context - 1):
            least = -(-size // self.longest)
            raise UserError(
                f"the prompt has at least {least} tokens ({size} bytes); the context of {context} must exceed it"
            )


def text_bound(backend: Backend) -> TextBound | None:
    """The bound of a vocabulary. None if there may be none.

    There is none where an unknown word of any length is one token, nor where spaces beside an added token belong to it.
    Nor is there one where a normalizer drops characters.
    """
    if isinstance(backend, JsonBackend):
        return _json_bound(backend)
    if isinstance(backend, SentencePieceBackend):
        processor, pieces = backend.inner, range(backend.inner.get_piece_size())
        is_identity = processor.normalize(PROBE).replace("▁", " ").removeprefix(" ") == PROBE
        if is_identity and any(map(processor.is_byte, pieces)):
            names = [*map(processor.id_to_piece, pieces), *backend.special]
            return TextBound(max(len(name.encode("utf-8")) for name in names))
    return None


def _json_bound(backend: JsonBackend) -> TextBound | None:
    inner = backend.inner
    shrinks = _shrinks_by(_state(inner.normalizer))
    if shrinks is None or any(token.lstrip or token.rstrip for token in inner.get_added_tokens_decoder().values()):
        return None
    vocabulary = inner.get_vocab()
    longest = shrinks * max(len(token.encode("utf-8")) for token in vocabulary)
    if getattr(inner.model, "byte_fallback", False):
        return TextBound(longest)
    is_byte_level = '"ByteLevel"' in json.dumps(_state(inner.pre_tokenizer))
    if not is_byte_level or getattr(inner.model, "unk_token", None) is not None:
        return None
    dropped = bytes(byte for byte, character in BYTE_CHARACTERS.items() if character not in vocabulary)
    return TextBound(longest, dropped) if shrinks == 1 or not dropped else None


def _state(part: Any) -> dict[str, Any] | None:
    """A part of a tokenizer as tokenizer.json has it."""
    return None if part is None else json.loads(part.__getstate__())


def _shrinks_by(normalizer: dict[str, Any] | None) -> int | None:
    """How many bytes of a text a normalizer may turn into one; None if any number."""
    if normalizer is None or normalizer["type"] == "Prepend":
        return 1
    if normalizer["type"] == "NFC":
        return NFC_BYTES
    if normalizer["type"] == "Replace":
        pattern = normalizer["pattern"].get("String")
        return 1 if pattern is not None and len(pattern.encode()) <= len(normalizer["content"].encode()) else None
    if normalizer["type"] == "Sequence":
        factors = [_shrinks_by(part) for part in normalizer["normalizers"]]
        return None if None in factors else max((f for f in factors if f is not None), default=1)
    return None
