"""What a decoder is asked for and what it answers: requests, pieces of text, log probabilities, the end."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from teal.decoding.statistics import GenerationStats
from teal.options import COUNTED_TOKENS, DEFAULT_MAX_NEW_TOKENS, SamplingParams
from teal.plan import SparsityPlan


class Matcher(Protocol):
    """A grammar's state: which tokens may come next (constrained.py). Both raise UserError where it has no way on."""

    def mask(self, logits: Tensor) -> Tensor: ...

    def accept(self, token: int) -> bool: ...


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probabilities under the model, before sampling parameters: a token's, and those of the most probable ones."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that became certain, or one token where no text is asked for; log probabilities since the last piece."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    token: int | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a request: "stop" or "length"; or with an error's text "error", or "refused" if it is to blame."""

    finish_reason: str
    error: str | None = None


@dataclass(slots=True, eq=False)
class Request:
    """One text to generate. emit is called in the decoder's thread with each Piece and at last with Done."""

    prompt_ids: list[int]
    emit: Callable[[Piece | Done], None]
    params: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    stops: tuple[str, ...] = ()
    ignore_eos: bool = False
    detokenize: bool = True  # False: a Piece for each token, without text
    top_logprobs: int | None = None  # None: no log probabilities at all
    matcher: Matcher | None = None
    plan: SparsityPlan | None = None  # None: the engine's own
    count_sparsity: bool = False  # of the first COUNTED_TOKENS
    deadline: float | None = None  # time.monotonic() at which it ends, finished or not
    cancelled: bool = False  # set by anyone; noticed before the next step
    arrived: float = field(default_factory=time.monotonic)
    prefilled: int = 0  # prompt tokens whose keys and values are in the row
    stats: GenerationStats = field(default_factory=lambda: GenerationStats(finish_reason="length"))
    last_token_at: float = 0.0
    token: int = 0  # the newest, not yet fed to the model

    @property
    def new_tokens(self) -> int:
        return self.stats.new_tokens

    @property
    def reused_tokens(self) -> int:
        return self.stats.reused_tokens

    @property
    def tokens_left(self) -> int:
        """How many more it may get."""
        return self.max_new_tokens - self.stats.new_tokens

    @property
    def is_plain(self) -> bool:
        """Whether the argmax of the model's logits is the token to take."""
        return self.params.is_argmax and self.matcher is None

    @property
    def counting(self) -> bool:
        """Whether what its next step drops is to be counted."""
        return self.count_sparsity and self.new_tokens < COUNTED_TOKENS

    def timed(self) -> float:
        """Note that a token has come; seconds since the one before, or since the request arrived."""
        now = time.monotonic()
        stats = self.stats
        seconds = now - (self.last_token_at if stats.new_tokens else self.arrived)
        if stats.new_tokens:
            stats.token_s.append(seconds)
        else:
            stats.first_token_s = seconds
        stats.new_tokens += 1
        self.last_token_at = now
        return seconds


class Observer:
    """Told what happens, in the decoder's thread; a server's metrics override what they need."""

    def first_token(self, seconds: float) -> None:
        """A request's first token came so long after it arrived."""

    def next_token(self, seconds: float) -> None:
        """Another token came so long after the one before."""

    def drafted(self, tokens: int, accepted: int) -> None:
        """A round of speculative decoding drafted so many tokens and accepted these of them."""

    def finished(self, request: Request, reason: str) -> None:
        """A request ended: "stop", "length", "cancelled", "refused" or "error"."""
