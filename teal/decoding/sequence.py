"""What only a running request needs: its random numbers, the tokens it has seen, the text so far."""

import torch
from torch import Tensor

from teal.checkpoint.tokenizer import Tokenizer
from teal.decoding.drafting import Acceptance, Lookup
from teal.decoding.requests import Piece, Request, TokenLogprob
from teal.decoding.rows import DecodeRows
from teal.decoding.sampling import bias_row, penalize_counts, sample
from teal.decoding.streaming import StopStrings, StreamDecoder
from teal.errors import UserError


class Sequence:
    """A request's state beside its row. Of a single row the generator and the seen tokens are those of its steps."""

    def __init__(self, request: Request, rows: DecodeRows, tokenizer: Tokenizer) -> None:
        self.request = request
        self.decoder = StreamDecoder(tokenizer, request.prompt_ids) if request.detokenize else None
        self.filter = StopStrings(request.stops)
        self.text = Lookup([])  # as far as drafting has looked at it
        self.acceptance = Acceptance()
        device, self.rows = rows.device, rows
        self.generator, self.seen = rows.generator, rows.seen  # seen: bool [1, V], prompt and output
        if rows.single:
            rows.begin(request.params.seed, request.prompt_ids)
        else:
            self.generator = torch.Generator(device).manual_seed(request.params.seed)
            self.seen = torch.zeros_like(rows.seen)
            self.seen[0, torch.tensor(request.prompt_ids, device=device)] = True
        params, biases = request.params, request.params.biases
        penalized = params.presence_penalty or params.frequency_penalty
        self.counts = torch.zeros(self.seen.shape, device=device) if penalized else None  # generated tokens [1, V]
        self.bias = bias_row(biases, self.seen.shape[1], device) if biases else None
        self.pending: list[tuple[int, TokenLogprob]] = []  # where the token's text begins, for those not emitted yet
        self.decoded = self.shown = 0  # characters: of all tokens, and of the text emitted

    def sample(self, logits: Tensor) -> int:
        """A token by all that the request asks for, from its logits [1, V]. Raises UserError if that allows none."""
        request, params = self.request, self.request.params
        if self.counts is not None:
            logits = penalize_counts(logits, self.counts, params.presence_penalty, params.frequency_penalty)
        if self.bias is not None:
            logits = logits + self.bias
        if request.matcher is not None:
            logits = request.matcher.mask(logits)
        if self.bias is not None and not bool((logits > -torch.inf).any()):
            raise UserError("logit_bias bans every token that may come next")
        token = int(sample(logits, params, self.seen, self.generator))
        if self.counts is not None:
            self.counts[0, token] += 1
        if self.rows.single:
            self.rows.saw(token)
        else:
            self.seen[0, token] = True
        return token

    def push(self, token: int, logprob: TokenLogprob | None) -> Piece | None:
        """What to emit after this token: the text that became certain and the log probabilities of the tokens in it."""
        if self.decoder is None:
            return Piece("", () if logprob is None else (logprob,), token)
        if logprob is not None:
            self.pending.append((self.decoded, logprob))
        text = self.decoder.push(token)
        self.decoded += len(text)
        return self._piece(self.filter.push(text))

    def rest(self) -> Piece | None:
        """What was held back, at the end of the text. Tokens past a stop string are in no piece."""
        if self.decoder is None:
            return None
        text = self._piece(self.filter.push(self.decoder.flush()) + self.filter.flush(), last=not self.filter.stopped)
        self.pending.clear()
        return text

    def _piece(self, text: str, last: bool = False) -> Piece | None:
        self.shown += len(text)
        count = len(self.pending) if last else sum(start < self.shown for start, _ in self.pending)
        logprobs = tuple(logprob for _, logprob in self.pending[:count])
        del self.pending[:count]
        return Piece(text, logprobs) if text or logprobs else None


def token_logprob(logits: Tensor, token: int, count: int) -> TokenLogprob:
    """Of one row of logits [V]."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(count) if count else (logprobs[:0], logprobs[:0].long())
    return TokenLogprob(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
