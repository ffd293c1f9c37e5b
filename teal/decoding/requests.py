"""What the scheduler is asked for and what it answers: requests, pieces of text, log probabilities, the end."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from teal.decoding.engine import Engine
from teal.decoding.sampling import bias_row, penalize_counts, sample
from teal.decoding.speculation import Lookup
from teal.decoding.streaming import StopStrings, StreamDecoder
from teal.errors import UserError
from teal.options import COUNTED_TOKENS, SamplingParams
from teal.plan import SparsityPlan


class Matcher(Protocol):
    """A grammar's state: which tokens may come next (constrained.py). Both raise UserError where it has no way on."""

    def mask(self, logits: Tensor) -> Tensor: ...

    def accept(self, token: int) -> bool: ...


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log probability under the model, before sampling parameters, and the likeliest tokens' beside it."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that became certain, and the log probabilities of the tokens since the last piece, if asked for."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a request: finish_reason "stop" or "length"; or an error's text, "refused" where the request is to blame."""

    finish_reason: str
    error: str | None = None


@dataclass(slots=True, eq=False)
class Request:
    """One text to generate. emit is called in the scheduler's thread with each Piece and at last with Done."""

    prompt_ids: list[int]
    emit: Callable[[Piece | Done], None]
    params: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int = 256
    stops: tuple[str, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int | None = None  # None: no log probabilities at all
    matcher: Matcher | None = None
    plan: SparsityPlan | None = None  # None: the engine's own
    count_sparsity: bool = False  # of the first COUNTED_TOKENS
    deadline: float | None = None  # time.monotonic() at which it ends, finished or not
    cancelled: bool = False  # set by anyone; noticed before the next step
    arrived: float = field(default_factory=time.monotonic)
    prefilled: int = 0  # prompt tokens whose keys and values are in the row
    reused_tokens: int = 0
    new_tokens: int = 0
    first_token_s: float | None = None
    last_token_at: float = 0.0
    token: int = 0  # the newest, not yet fed to the model

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is the one to take."""
        return self.params.is_argmax and self.matcher is None

    @property
    def is_argmax(self) -> bool:
        """Whether that token is all it wants of a step."""
        return self.is_plain and self.top_logprobs is None and not self.counting

    @property
    def counting(self) -> bool:
        """Whether what its next step drops is to be counted."""
        return self.count_sparsity and self.new_tokens < COUNTED_TOKENS


class Sequence:
    """What only a running request needs."""

    def __init__(self, request: Request, engine: Engine) -> None:
        self.request = request
        self.decoder = StreamDecoder(engine.tokenizer, request.prompt_ids)
        self.filter = StopStrings(request.stops)
        self.text = Lookup([])  # as far as drafting has looked at it
        self.generator = torch.Generator(engine.device)
        self.generator.manual_seed(request.params.seed)
        size = engine.model.config.vocab_size
        # Generated tokens, counted, and all tokens seen; kept for requests whose tokens are sampled.
        self.counts = torch.zeros(1, size, device=engine.device)
        self.seen = torch.zeros(1, size, dtype=torch.bool, device=engine.device)
        self.seen[0, torch.tensor(request.prompt_ids, device=engine.device)] = True
        self.bias = bias_row(biases, size, engine.device) if (biases := request.params.biases) else None
        self.pending: list[tuple[int, TokenLogprob]] = []  # where the token's text begins, for those not emitted yet
        self.decoded = self.shown = 0  # characters: of all tokens, and of the text emitted

    def sample(self, logits: Tensor) -> int:
        """A token by all that the request asks for, from its logits [1, V]. Raises UserError if that allows none."""
        request, params = self.request, self.request.params
        if params.presence_penalty or params.frequency_penalty:
            logits = penalize_counts(logits, self.counts, params.presence_penalty, params.frequency_penalty)
        if self.bias is not None:
            logits = logits + self.bias
        if request.matcher is not None:
            logits = request.matcher.mask(logits)
        if self.bias is not None and not bool((logits > -torch.inf).any()):
            raise UserError("logit_bias bans every token that may come next")
        token = int(sample(logits, request.params, self.seen, self.generator))
        self.counts[0, token] += 1
        self.seen[0, token] = True
        return token

    def push(self, token: int, logprob: TokenLogprob | None) -> Piece | None:
        """The text that became certain with this token, and the log probabilities of the tokens in it."""
        if logprob is not None:
            self.pending.append((self.decoded, logprob))
        text = self.decoder.push(token)
        self.decoded += len(text)
        return self._piece(self.filter.push(text))

    def rest(self) -> Piece | None:
        """What was held back, at the end of the text. Tokens past a stop string are in no piece."""
        text = self._piece(self.filter.push(self.decoder.flush()) + self.filter.flush(), last=not self.filter.stopped)
        self.pending.clear()
        return text

    def _piece(self, text: str, last: bool = False) -> Piece | None:
        self.shown += len(text)
        count = len(self.pending) if last else sum(start < self.shown for start, _ in self.pending)
        logprobs = tuple(logprob for _, logprob in self.pending[:count])
        del self.pending[:count]
        return Piece(text, logprobs) if text or logprobs else None


class Observer:
    """Told what happens, in the scheduler's thread; a server's metrics override what they need."""

    def first_token(self, seconds: float) -> None:
        """A request's first token came so long after it arrived."""

    def next_token(self, seconds: float) -> None:
        """Another token came so long after the one before."""

    def drafted(self, tokens: int, accepted: int) -> None:
        """A round of speculative decoding drafted so many tokens and accepted these of them."""

    def finished(self, request: Request, reason: str) -> None:
        """A request ended: "stop", "length", "cancelled", "refused" or "error"."""


def token_logprob(logits: Tensor, token: int, count: int) -> TokenLogprob:
    """Of one row of logits [V]."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(count) if count else (logprobs[:0], logprobs[:0].long())
    return TokenLogprob(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
