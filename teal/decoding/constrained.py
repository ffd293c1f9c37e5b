"""Constrained decoding: JSON of any shape, or of a schema, by llguidance (pip install llguidance)."""

import json
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from teal.checkpoint.token_backends import JsonBackend
from teal.checkpoint.tokenizer import Tokenizer
from teal.errors import UserError

FORCED_STEPS = 4  # of a schema are tried before it is taken
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
        inner = self.tokenizer.backend.inner
        # A config may name ends that its tokenizer lacks. A complete text ends without one, so any will do.
        eos = [i for i in sorted(self.tokenizer.eos_ids) if i < inner.get_vocab_size()] or None
        return llguidance.LLTokenizer(inner.to_str(), n_vocab=self.vocab_size, eos_token=eos)

    def json(self, schema: dict[str, Any] | None = None) -> "JsonMatcher":
        """A matcher of one JSON text of this schema, by default any object.

        Raises UserError for a schema with unknown keywords, without any answer, or beyond the matcher's limits.
        """
        text = json.dumps(ANY_OBJECT if schema is None else schema)
        if len(text) > MAX_SCHEMA_BYTES:
            raise UserError(f"the JSON schema has {len(text)} bytes; at most {MAX_SCHEMA_BYTES} can be used")
        return JsonMatcher(self._compiled(text).deep_copy(), self.vocab_size)

    def _compile(self, schema: str) -> Any:
        """An LLMatcher at its start; other threads run meanwhile."""
        import llguidance

        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0)
        _require_sound(matcher, "cannot be used")
        _try_out(matcher.deep_copy())
        return matcher


def _try_out(matcher: Any) -> None:
    """Go the first forced steps. Raises UserError for a schema that needs itself in itself, endlessly."""
    for token in [*matcher.compute_ff_tokens()[:FORCED_STEPS], None]:
        matcher.compute_bitmask()
        _require_sound(matcher)
        if token is not None:
            matcher.consume_token(token)


def _require_sound(matcher: Any, problem: str = "cannot be followed to an end") -> None:
    if matcher.is_error():
        reason = " ".join(matcher.get_error().partition("<state>")[0].split())
        raise UserError(f"the JSON schema {problem}: {reason}")


class JsonMatcher:
    """The state of one text: which tokens may follow."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        import llguidance.numpy

        self.matcher = matcher
        self.vocab_size = vocab_size
        self.bits = llguidance.numpy.allocate_token_bitmask(1, vocab_size)

    def mask(self, logits: Tensor) -> Tensor:
        """logits [1, V] with -inf for tokens that the grammar forbids next. Raises UserError if it allows none."""
        import llguidance.numpy

        llguidance.numpy.fill_next_token_bitmask(self.matcher, self.bits)
        _require_sound(self.matcher)
        if not self.bits.any():
            raise UserError("the JSON schema needs text that no token of this model continues")
        words = torch.from_numpy(self.bits).to(logits.device)
        places = torch.arange(logits.shape[-1], device=logits.device)
        allowed = (words[0, places // 32] >> (places % 32)) & 1
        return logits.masked_fill(allowed == 0, -torch.inf)

    def accept(self, token: int) -> bool:
        """Take the token that was chosen; True if the text is complete. Raises UserError if it has no way on."""
        self.matcher.consume_token(token)
        _require_sound(self.matcher)
        stopped = bool(self.matcher.is_stopped())
        if stopped and not self.matcher.is_accepting():
            raise UserError(f"the JSON schema cannot be followed to an end: {self.matcher.stop_reason()}")
        return stopped

    def copy(self) -> "JsonMatcher":
        """Another text of the same schema, which need not be compiled again."""
        return JsonMatcher(self.matcher.deep_copy(), self.vocab_size)
