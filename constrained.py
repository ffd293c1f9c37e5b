"""Constrained decoding: JSON of any shape, or of a schema, by llguidance (pip install llguidance)."""

import json
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from errors import UserError
from tokenizer import JsonBackend, Tokenizer

ANY_OBJECT = {"type": "object"}
MAX_SCHEMA_BYTES = 131_072  # compiling takes time with the square of a schema's size: half a second for this much
KEPT_GRAMMARS = 16


class Grammars:
    """Makes matchers for one tokenizer, whose vocabulary is read once."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self._compiled = lru_cache(KEPT_GRAMMARS)(self._compile)

    def prepare(self) -> None:
        """Read the vocabulary now: it takes a second, in which no other thread runs."""
        if isinstance(self.tokenizer.backend, JsonBackend):
            _ = self._vocabulary

    @cached_property
    def _vocabulary(self) -> Any:
        import llguidance

        if not isinstance(self.tokenizer.backend, JsonBackend):
            raise UserError("constrained decoding needs a checkpoint with a tokenizer.json")
        eos = sorted(self.tokenizer.eos_ids)
        return llguidance.LLTokenizer(self.tokenizer.backend.inner.to_str(), n_vocab=self.vocab_size, eos_token=eos)

    def json(self, schema: dict[str, Any] | None = None) -> "JsonMatcher":
        """A matcher of one JSON text of this schema, by default any object. Raises UserError for a schema unknown here."""
        text = json.dumps(ANY_OBJECT if schema is None else schema)
        if len(text) > MAX_SCHEMA_BYTES:
            raise UserError(f"the JSON schema has {len(text)} bytes; at most {MAX_SCHEMA_BYTES} can be used")
        return JsonMatcher(self._compiled(text).deep_copy(), self.vocab_size)

    def _compile(self, schema: str) -> Any:
        """An LLMatcher at its start; other threads run meanwhile."""
        import llguidance

        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise UserError(f"the JSON schema cannot be used: {' '.join(matcher.get_error().split())}")
        return matcher


class JsonMatcher:
    """The state of one text: which tokens may follow."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        import llguidance.numpy

        self.matcher = matcher
        self.bits = llguidance.numpy.allocate_token_bitmask(1, vocab_size)

    def mask(self, logits: Tensor) -> Tensor:
        """logits [1, V] with -inf for tokens that the grammar does not allow next."""
        import llguidance.numpy

        llguidance.numpy.fill_next_token_bitmask(self.matcher, self.bits)
        words = torch.from_numpy(self.bits).to(logits.device)
        places = torch.arange(logits.shape[-1], device=logits.device)
        allowed = (words[0, places // 32] >> (places % 32)) & 1
        return logits.masked_fill(allowed == 0, -torch.inf)

    def accept(self, token: int) -> bool:
        """Take the token that was chosen; True if the text is complete."""
        self.matcher.consume_token(token)
        return bool(self.matcher.is_stopped())
