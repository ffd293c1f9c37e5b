"""Drafts and their verification: several tokens a pass (Leviathan et al. 2023, Chen et al. 2023).

A draft proposes tokens and the target model verifies them in one pass, which reads its weights once for all. The draft
is sparse steps of the same model on the same KV cache. Or it is what followed the last few tokens where they stood
before (prompt lookup, Saxena 2023). Keys and values that the draft writes are overwritten by the pass that verifies.
Those of refused tokens lie behind the position reached, where nothing is read before it is written.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from teal.decoding.backend import Backend
from teal.decoding.sampling import argmax_step, draw, probabilities
from teal.model import KVCache
from teal.options import MAX_DRAFT, SamplingParams, check_length

LOOKUP_TOKENS = (4, 3, 2)  # how many last tokens must have stood before, tried in this order
LOOKUP_COST = 0.05  # what verifying one token more adds to a pass
FORGETTING = 0.9  # of the acceptance seen, each round


@dataclass(frozen=True, slots=True)
class Row:
    """What a round reads and writes: the token not fed yet and its position, int64 [1, 1]; cache; seen bool [1, V]."""

    token: Tensor
    position: Tensor
    cache: KVCache
    seen: Tensor
    generator: torch.Generator


@dataclass(frozen=True, slots=True)
class Draft:
    """A model that drafts; cost is the time of its step over that of a pass of the dense model."""

    backend: Backend
    cost: float
    compile_s: float


@dataclass(slots=True)
class Acceptance:
    """How many tokens were drafted and accepted lately for one text."""

    drafted: float = 2.0
    accepted: float = 1.0

    def add(self, drafted: int, accepted: int) -> None:
        """Note a round."""
        self.drafted = FORGETTING * self.drafted + drafted
        self.accepted = FORGETTING * self.accepted + accepted

    @property
    def rate(self) -> float:
        return self.accepted / self.drafted


class Drafter:
    """Drafts up to length tokens a round for a target model: by a Draft, or by lookup without one. Raises UserError."""

    def __init__(self, target: Backend, length: int, draft: Draft | None = None) -> None:
        check_length(length)
        self.target, self.length = target, length
        self.adapts = True  # False: every round drafts length tokens
        self.backend = None if draft is None else draft.backend
        self.cost = LOOKUP_COST if draft is None else draft.cost
        device = target.model.device
        with torch.inference_mode():  # tensors made outside and inside it would each be compiled for
            self.drafted = torch.zeros(MAX_DRAFT, dtype=torch.int64, device=device)
            self.outcome = torch.zeros(MAX_DRAFT + 2, dtype=torch.int64, device=device)

    @property
    def looks_up(self) -> bool:
        return self.backend is None

    def best_length(self, acceptance: Acceptance) -> int:
        """The draft length that yields most tokens for its time at the acceptance seen lately.

        With acceptance a, k drafted tokens yield (1 - a^(k+1)) / (1 - a) (Leviathan et al., eq. 1). By costs known
        beforehand, not by the clock: the same seed gives the same text.
        """
        if not self.adapts:
            return self.length
        a = min(acceptance.rate, 0.99)
        return max(range(1, self.length + 1), key=lambda k: (1 - a ** (k + 1)) / (1 - a) / (1 + self.cost * k))

    def propose(self, text: "Lookup", length: int) -> int:
        """Before a round: take what follows text's end in it, if that is the draft; how many tokens there will be."""
        if not self.looks_up:
            return length
        found = text.continuation(length)
        self.drafted[: len(found)] = torch.tensor(found, dtype=torch.int64)
        return len(found)

    def verified(self, length: int) -> list[int]:
        """After a round of length drafted tokens: those accepted and one more. Waits for the device."""
        kept, *tokens = self.outcome[: length + 2].tolist()
        return tokens[: kept + 1]

    def draft_and_verify(self, row: "Row", params: SamplingParams, length: int) -> None:
        """A round without a host in between: how many tokens were kept, and the tokens, go into self.outcome."""
        drafted, q = self._draft(row, params, length)
        tokens = torch.cat((row.token[0], drafted))
        positions = row.position[0] + torch.arange(length + 1, device=self.drafted.device)
        logits = self.target.logits(self.target.prefill(tokens[None], positions[None], row.cache))[0]
        if q is None:
            kept, last = verify_greedy(drafted, logits)
        else:
            p = probabilities(logits, params, seen_after(row.seen, drafted))
            kept, last = verify_sampled(drafted, q, p, row.generator)
        padded = torch.cat((drafted, last))
        found = torch.where(torch.arange(length + 1, device=self.drafted.device) < kept, padded, last)
        self.outcome[: length + 2] = torch.cat((kept, found))
        row.seen.scatter_(1, found[None], True)
        row.token.copy_(last[None])
        row.position.add_(kept + 1)

    def _draft(self, row: "Row", params: SamplingParams, length: int) -> tuple[Tensor, Tensor | None]:
        """Tokens [length] and the distributions [length, V] they were drawn from; None where the argmax is taken."""
        if self.backend is None:
            drafted = self.drafted[:length]
            if params.is_argmax:
                return drafted, None
            certain = torch.zeros(length, self.target.model.config.vocab_size, device=self.drafted.device)
            return drafted, certain.scatter_(1, drafted[:, None], 1.0)
        token, position, seen = row.token.clone(), row.position.clone(), row.seen.clone()
        tokens, rows = [], []
        for _ in range(length):
            logits = self.backend.logits(self.backend.decode(token, position, row.cache)[:, -1])
            if params.is_argmax:
                argmax_step(logits, token, position)
            else:
                rows.append(probabilities(logits, params, seen))
                token.copy_(draw(rows[-1], row.generator)[:, None])
                position += 1
                seen.scatter_(1, token, True)
            tokens.append(token[0].clone())
        return torch.cat(tokens), torch.cat(rows) if rows else None


class Lookup:
    """A text that knows where its last tokens stood before."""

    def __init__(self, tokens: list[int]) -> None:
        self.text: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}  # n tokens -> where what followed their last occurrence begins
        self.extend(tokens)

    def extend(self, tokens: list[int]) -> None:
        """Append tokens."""
        for token in tokens:
            for n in LOOKUP_TOKENS:
                if len(self.text) >= n:
                    self.after[tuple(self.text[-n:])] = len(self.text)
            self.text.append(token)

    def continuation(self, length: int) -> list[int]:
        """Up to length tokens that followed the longest of the text's ends that stood in it before, the last time."""
        for n in LOOKUP_TOKENS:
            if (at := self.after.get(tuple(self.text[-n:]))) is not None:
                return self.text[at : at + length]
        return []


def seen_after(seen: Tensor, drafted: Tensor) -> Tensor:
    """bool [k + 1, V]: row i is seen [1, V] with the first i of the drafted tokens [k]."""
    new = torch.zeros(len(drafted) + 1, seen.shape[1], dtype=torch.int32, device=seen.device)
    new[1:].scatter_(1, drafted[:, None], 1)
    return seen | (new.cumsum(0) > 0)


def verify_greedy(drafted: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the drafted tokens [k] are argmax of logits [k + 1, V], and the argmax after them: int64 [1] each."""
    best, ignored = (torch.zeros(len(logits), 1, dtype=torch.int64, device=logits.device) for _ in range(2))
    argmax_step(logits, best, ignored)
    best = best[:, 0]
    kept = (drafted == best[:-1]).long().cumprod(0).sum(0, keepdim=True)
    return kept, best.gather(0, kept)


def verify_sampled(drafted: Tensor, q: Tensor, p: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """How many of the drafted tokens [k] to keep, and the token after them, int64 [1] each: they follow p.

    q [k, V]: the distributions they were drawn from; p [k + 1, V]: the model's after each. Token d is kept with
    probability min(1, p(d) / q(d)). The first refused one is replaced by a draw from what p has more than q (Leviathan
    et al., algorithm 1).
    """
    k = len(drafted)
    at = drafted[:, None]
    chance = (p[:k].gather(1, at) / q.gather(1, at))[:, 0]
    taken = torch.rand(k, generator=generator, device=p.device) < chance
    kept = taken.long().cumprod(0).sum(0, keepdim=True)
    p_next = p.index_select(0, kept)
    none = torch.zeros_like(p[:1])  # after the last token there is no draft to surpass
    q_next = torch.cat((q, none)).index_select(0, kept)
    more = (p_next - q_next).clamp(min=0)
    weights = torch.where(more.sum(-1, keepdim=True) > 0, more, p_next)  # equal but for rounding: no more anywhere
    return kept, draw(weights, generator)
