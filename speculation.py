"""Speculative decoding: the dense model's own text, several tokens a pass (Leviathan et al. 2023, Chen et al. 2023).

A draft proposes tokens and the dense model judges them in one pass, which reads its weights once for all. The draft is
the same model with sparse activations: weights, embeddings and KV cache are shared, a call of one token being sparse and
one of several dense. Or it is what followed the last few tokens where they stood before (prompt lookup, Saxena 2023).
Keys and values that the draft writes are overwritten by the pass that judges; those of refused tokens lie behind the
position reached, where nothing is read before it is written.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from engine import Engine
from errors import UserError
from params import SamplingParams
from sampling import draw, probabilities

MAX_DRAFT = 16
LOOKUP_TOKENS = (4, 3, 2)  # how many last tokens must have stood before, tried in this order
SAVED_BY_SPARSITY = 0.8  # of a draft step's time at sparsity 1: 40% less at 50%, as on an H100 (BENCHMARKS.md)
LOOKUP_COST = 0.05  # what judging one token more adds to a pass
FORGETTING = 0.9  # of the acceptance seen, each round


class SpeculativeEngine(Engine):
    """An Engine that drafts after a call of speculate; loaded with a sparsity, its text is still the dense model's."""

    draft_length = 0
    lookup = False

    @property
    def text_sparsity(self) -> float:
        """As Engine's; drafts do not decide the text."""
        return 0.0 if self.draft_length else super().text_sparsity

    def speculate(self, length: int, lookup: bool = False) -> None:
        """Draft up to length tokens a round: by the engine's plan, or by lookup for a dense engine. Raises UserError."""
        if not 1 <= length <= MAX_DRAFT:
            raise UserError(f"--speculate {length} is out of range; expected 1 to {MAX_DRAFT}")
        if lookup == (self.plan is not None):
            given = "a sparsity" if lookup else "no sparsity"
            raise UserError(f"drafting by {'lookup' if lookup else 'the sparse model'} does not go with {given}")
        self.draft_length, self.lookup = length, lookup
        self.tried, self.taken = 2.0, 1.0  # tokens drafted and accepted lately

    def best_length(self) -> int:
        """The draft length that yields most tokens for its time at the acceptance seen lately.

        With acceptance a, k drafted tokens yield (1 - a^(k+1)) / (1 - a) (Leviathan et al., eq. 1).
        """
        a = min(self.taken / self.tried, 0.99)
        cost = LOOKUP_COST if self.plan is None else 1 - SAVED_BY_SPARSITY * self.plan.target
        return max(range(1, self.draft_length + 1), key=lambda k: (1 - a ** (k + 1)) / (1 - a) / (1 + cost * k))

    def _tokens(self, params: SamplingParams, count: int) -> Iterator[int]:
        """As Engine._tokens, in rounds of drafting and judging."""
        if not self.draft_length:
            yield from super()._tokens(params, count)
            return
        text = [*self.cached_ids, int(self.token)]
        yield text[-1]
        made = 1
        while made < count:
            # One at least: a pass over a single token would be sparse. There is room for it, though nobody wants it.
            tokens = self._round(params, text, max(1, min(self.best_length(), count - made - 1)))
            text += tokens
            for token in tokens[: count - made]:
                made += 1
                yield token

    @torch.inference_mode()
    def _round(self, params: SamplingParams, text: list[int], length: int) -> list[int]:
        """Draft and judge: the accepted tokens and one of the dense model's own; text ends in the one not fed yet."""
        drafted, q = self._look_up(text, length) if self.lookup else self._draft(params, length)
        tokens = torch.cat((self.token[0], drafted))
        positions = self.position[0] + torch.arange(len(tokens), device=self.device)
        logits = self.model.logits(self.model.hidden_states(tokens[None], positions[None], self.cache))[0]
        seen = self.seen.repeat(len(tokens), 1)
        for i in range(1, len(tokens)):
            seen[i:, tokens[i]] = True
        kept, last = judge(drafted, q, probabilities(logits, params, seen), self.generator)
        found = [*drafted[:kept].tolist(), last]
        self.seen[0, found] = True
        self.token.fill_(last)
        self.position += len(found)
        self.stats.drafted_tokens += len(drafted)
        self.stats.accepted_tokens += kept
        self.tried = FORGETTING * self.tried + len(drafted)
        self.taken = FORGETTING * self.taken + kept
        return found

    def _draft(self, params: SamplingParams, length: int) -> tuple[Tensor, Tensor]:
        """Tokens [length] of the sparse model, and the distributions [length, V] that they were drawn from."""
        token, seen, rows = self.token, self.seen.clone(), []
        drafted = []
        for i in range(length):
            hidden = self.model.hidden_states(token, self.position + i, self.cache)
            rows.append(probabilities(self.model.logits(hidden[:, -1]), params, seen))
            token = draw(rows[-1], self.generator)[:, None]
            seen.scatter_(1, token, True)
            drafted.append(token[0])
        return torch.cat(drafted), torch.cat(rows)

    def _look_up(self, text: list[int], length: int) -> tuple[Tensor, Tensor]:
        """As _draft: up to length tokens that followed the end of text where it last stood before, for certain."""
        found = continuation(text, length)
        drafted = torch.tensor(found, dtype=torch.int64, device=self.device)
        q = torch.zeros(len(found), self.model.config.vocab_size, device=self.device)
        return drafted, q.scatter_(1, drafted[:, None], 1.0)


def continuation(text: list[int], length: int) -> list[int]:
    """Up to length tokens that followed the longest of text's ends that stood in it before, where it last did."""
    for n in LOOKUP_TOKENS:
        end = text[-n:]
        for i in range(len(text) - n - 1, -1, -1):
            if text[i : i + n] == end:
                return text[i + n : i + n + length]
    return []


def judge(drafted: Tensor, q: Tensor, p: Tensor, generator: torch.Generator | None) -> tuple[int, int]:
    """How many of the drafted tokens [k] to keep, and the token after them; together they follow p, whatever q is.

    q [k, V]: the distributions they were drawn from; p [k + 1, V]: the model's after each. Token d is kept with
    probability min(1, p(d) / q(d)), and the first refused one is replaced by a draw from what p has more than q
    (Leviathan et al., algorithm 1).
    """
    k = len(drafted)
    at = drafted[:, None]
    chance = (p[:k].gather(1, at) / q.gather(1, at))[:, 0]
    kept = torch.rand(k, generator=generator, device=p.device) < chance
    count = int(kept.cumprod(0).sum())
    rest = (p[count] - q[count]).clamp(min=0) if count < k else p[count]
    if not rest.any():  # p and q are equal but for rounding
        rest = p[count]
    return count, int(draw(rest[None], generator))
