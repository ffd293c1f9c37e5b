"""Speculative decoding: the dense model's own text, several tokens a pass (Leviathan et al. 2023, Chen et al. 2023).

A draft proposes tokens and the dense model judges them in one pass, which reads its weights once for all. The draft is
the same model with sparse activations: weights, embeddings and KV cache are shared, a call of one token being sparse and
one of several dense. With weights rounded to 8 or 4 bits for it, the draft has those of its own, and shares the rest.
Or it is what followed the last few tokens where they stood before (prompt lookup, Saxena 2023). Keys and values that the
draft writes are overwritten by the pass that judges; those of refused tokens lie behind the position reached, where
nothing is read before it is written.
"""

import copy
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from engine import Engine, choose_plan
from errors import UserError
from loading import LoadedModel, load_for_decoding, round_weights
from model import Transformer
from params import SamplingParams
from plan import SparsityPlan
from sampling import draw, probabilities, take_likeliest

MAX_DRAFT = 16
LOOKUP_TOKENS = (4, 3, 2)  # how many last tokens must have stood before, tried in this order
SAVED_BY_SPARSITY = 0.8  # of a draft step's time at sparsity 1: 40% less at 50%, as on an H100 (BENCHMARKS.md)
ROUNDED_COST = {None: 1.0, "int8": 0.63, "int4": 0.48}  # of a step with these weights, at 50%, there too
LOOKUP_COST = 0.05  # what judging one token more adds to a pass
FORGETTING = 0.9  # of the acceptance seen, each round


class SpeculativeEngine(Engine):
    """An Engine that drafts after a call of speculate; its text is then the dense model's."""

    draft_length = 0
    drafter: Transformer | None = None  # None: look up
    draft_cost = LOOKUP_COST  # time of a drafted token over that of a pass of the dense model

    @classmethod
    def load_with_draft(
        cls,
        checkpoint: str | None = None,
        *,
        length: int,
        draft_sparsity: float = 0.5,
        draft_plan: str | None = None,
        draft_quant: str | None = None,
        random_weights: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        compile: bool | None = None,
        quant: str | None = None,
        quant_lm_head: bool = False,
        kv_cache: str = "float",
    ) -> Self:
        """As Engine.load, an engine that drafts up to length tokens by sparse steps of the model.

        draft_sparsity or the file draft_plan say how sparse; draft_quant ("int8", "int4") rounds the weights of the draft
        alone, and its output head to 8 bits. Raises UserError.
        """
        check_length(length)
        if draft_plan is None and not 0 < draft_sparsity < 1:
            raise UserError(f"--draft-sparsity {draft_sparsity:g} is out of range; expected 0 < sparsity < 1")
        start = time.perf_counter()
        loaded = load_for_decoding(
            checkpoint, random_weights, device, dtype, draft_quant is None, quant, quant_lm_head, kv_cache
        )
        load_s = time.perf_counter() - start
        if draft_quant is None:
            plan = choose_plan(loaded, draft_sparsity, draft_plan)
            engine = cls.from_loaded(loaded, plan, compile)
            engine.draft_with(engine.model, plan, None, length)
        else:
            rounded = sharing_copy(loaded)
            round_weights(rounded, draft_quant, quant_lm_head=True, option="--draft-quant")
            plan = choose_plan(rounded, draft_sparsity, draft_plan)
            drafter = Engine.from_loaded(rounded, plan, compile)
            engine = cls.from_loaded(loaded, None, compile)
            engine.draft_with(drafter.model, plan, draft_quant, length)
            engine.compile_s += drafter.compile_s
        engine.load_s = load_s
        return engine

    @property
    def text_sparsity(self) -> float:
        """As Engine's; drafts do not decide the text."""
        return 0.0 if self.draft_length else super().text_sparsity

    def draft_with(self, drafter: Transformer, plan: SparsityPlan, rounded: str | None, length: int) -> None:
        """Draft up to length tokens a round by one-token steps of drafter, which decodes by plan. Raises UserError."""
        self.drafter, self.draft_cost = drafter, ROUNDED_COST[rounded] * (1 - SAVED_BY_SPARSITY * plan.target)
        self._speculate(length)

    def look_up(self, length: int) -> None:
        """Draft up to length tokens a round by looking up what followed before. Raises UserError."""
        if self.plan is not None:
            raise UserError("drafting by lookup goes with a dense engine; this one was loaded with a sparsity")
        self.drafter, self.draft_cost = None, LOOKUP_COST
        self._speculate(length)

    def _speculate(self, length: int) -> None:
        check_length(length)
        self.draft_length = length
        self.tried, self.taken = 2.0, 1.0  # tokens drafted and accepted lately
        with torch.inference_mode():
            self.drafted = torch.zeros(MAX_DRAFT, dtype=torch.int64, device=self.device)
            self.outcome = torch.zeros(MAX_DRAFT + 2, dtype=torch.int64, device=self.device)
        self.graphs.clear()

    def best_length(self) -> int:
        """The draft length that yields most tokens for its time at the acceptance seen lately.

        With acceptance a, k drafted tokens yield (1 - a^(k+1)) / (1 - a) (Leviathan et al., eq. 1). By costs known
        beforehand, not by the clock: the same seed gives the same text.
        """
        a = min(self.taken / self.tried, 0.99)
        return max(
            range(1, self.draft_length + 1), key=lambda k: (1 - a ** (k + 1)) / (1 - a) / (1 + self.draft_cost * k)
        )

    def _tokens(self, params: SamplingParams, count: int) -> Iterator[int]:
        """As Engine._tokens, in rounds of drafting and judging."""
        if not self.draft_length:
            yield from super()._tokens(params, count)
            return
        text = Lookup([*self.cached_ids, int(self.token)])
        yield int(self.token)
        made = 1
        while made < count:
            # One at least: a pass over a single token would be sparse. There is room for it, though nobody wants it.
            tokens = self._round(params, text, max(1, min(self.best_length(), count - made - 1)))
            text.extend(tokens)
            for token in tokens[: count - made]:
                made += 1
                yield token

    @torch.inference_mode()
    def _round(self, params: SamplingParams, text: "Lookup", length: int) -> list[int]:
        """Draft and judge: the accepted tokens and one of the dense model's own; text ends in the one not fed yet."""
        if self.drafter is None:
            found = text.continuation(length)
            length = len(found)
            self.drafted[:length] = torch.tensor(found, dtype=torch.int64)
        if self.use_graph:
            with torch.cuda.device(self.device):
                self._captured(
                    (params.without_seed(), 1 + length), lambda: self._draft_and_judge(params, length)
                ).replay()
        else:
            self._draft_and_judge(params, length)
        kept, *tokens = self.outcome[: length + 2].tolist()
        self.stats.rounds += 1
        self.stats.drafted_tokens += length
        self.stats.accepted_tokens += kept
        self.tried = FORGETTING * self.tried + length
        self.taken = FORGETTING * self.taken + kept
        return tokens[: kept + 1]

    def _draft_and_judge(self, params: SamplingParams, length: int) -> None:
        """A round without a host in between: its tokens and how many were kept go into self.outcome."""
        drafted, q = self._draft(params, length)
        tokens = torch.cat((self.token[0], drafted))
        positions = self.position[0] + torch.arange(length + 1, device=self.device)
        logits = self.model.logits(self.model.hidden_states(tokens[None], positions[None], self.cache))[0]
        if q is None:
            kept, last = judge_likeliest(drafted, logits)
        else:
            kept, last = judge(drafted, q, probabilities(logits, params, self._seen_after(drafted)), self.generator)
        padded = torch.cat((drafted, last))
        found = torch.where(torch.arange(length + 1, device=self.device) < kept, padded, last)
        self.outcome[: length + 2] = torch.cat((kept, found))
        self.seen.scatter_(1, found[None], True)
        self.token.copy_(last[None])
        self.position += kept + 1

    def _seen_after(self, drafted: Tensor) -> Tensor:
        """bool [k + 1, V]: the tokens seen so far, and in row i those of the first i drafted ones."""
        new = torch.zeros(len(drafted) + 1, self.seen.shape[1], dtype=torch.int32, device=self.device)
        new[1:].scatter_(1, drafted[:, None], 1)
        return self.seen | (new.cumsum(0) > 0)

    def _draft(self, params: SamplingParams, length: int) -> tuple[Tensor, Tensor | None]:
        """Tokens [length], and the distributions [length, V] that they were drawn from; None where the likeliest is taken."""
        if self.drafter is None:
            drafted = self.drafted[:length]
            if params.takes_likeliest:
                return drafted, None
            certain = torch.zeros(length, self.model.config.vocab_size, device=self.device)
            return drafted, certain.scatter_(1, drafted[:, None], 1.0)
        token, position, seen = self.token.clone(), self.position.clone(), self.seen.clone()
        tokens, rows = [], []
        for _ in range(length):
            logits = self.drafter.logits(self.drafter.hidden_states(token, position, self.cache)[:, -1])
            if params.takes_likeliest:
                take_likeliest(logits, token, position)
            else:
                rows.append(probabilities(logits, params, seen))
                token.copy_(draw(rows[-1], self.generator)[:, None])
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
        """Up to length tokens that followed the longest of the text's ends that stood in it before, where it last did."""
        for n in LOOKUP_TOKENS:
            if (at := self.after.get(tuple(self.text[-n:]))) is not None:
                return self.text[at : at + length]
        return []


def check_length(length: int) -> None:
    """Raise UserError unless so many tokens can be drafted in a round."""
    if not 1 <= length <= MAX_DRAFT:
        raise UserError(f"--speculate {length} is out of range; expected 1 to {MAX_DRAFT}")


def sharing_copy(loaded: LoadedModel) -> LoadedModel:
    """A copy whose modules are its own and whose tensors are those of loaded."""
    tensors: dict[int, Any] = {id(t): t for t in (*loaded.model.parameters(), *loaded.model.buffers())}
    return LoadedModel(
        copy.deepcopy(loaded.model, tensors), loaded.tokenizer, loaded.name, loaded.identity, loaded.folder
    )


def judge_likeliest(drafted: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the drafted tokens [k] are the likeliest by logits [k + 1, V], and the likeliest after them: int64 [1] each."""
    best, ignored = (torch.zeros(len(logits), 1, dtype=torch.int64, device=logits.device) for _ in range(2))
    take_likeliest(logits, best, ignored)
    best = best[:, 0]
    kept = (drafted == best[:-1]).long().cumprod(0).sum(0, keepdim=True)
    return kept, best.gather(0, kept)


def judge(drafted: Tensor, q: Tensor, p: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """How many of the drafted tokens [k] to keep, and the token after them, int64 [1] each; they follow p, whatever q is.

    q [k, V]: the distributions they were drawn from; p [k + 1, V]: the model's after each. Token d is kept with
    probability min(1, p(d) / q(d)), and the first refused one is replaced by a draw from what p has more than q
    (Leviathan et al., algorithm 1).
    """
    k = len(drafted)
    at = drafted[:, None]
    chance = (p[:k].gather(1, at) / q.gather(1, at))[:, 0]
    taken = torch.rand(k, generator=generator, device=p.device) < chance
    kept = taken.long().cumprod(0).sum(0, keepdim=True)
    p_next = p.index_select(0, kept)
    q_next = torch.cat((q, torch.zeros_like(p[:1]))).index_select(
        0, kept
    )  # after the last there is no draft to surpass
    more = (p_next - q_next).clamp(min=0)
    weights = torch.where(more.sum(-1, keepdim=True) > 0, more, p_next)  # equal but for rounding: no more anywhere
    return kept, draw(weights, generator)
