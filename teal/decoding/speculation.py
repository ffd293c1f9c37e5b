"""Speculative decoding: the dense model's own text, several tokens a pass (Leviathan et al. 2023, Chen et al. 2023).

A draft proposes tokens and the dense model verifies them in one pass, which reads its weights once for all. The draft is
the same model with sparse activations, whose tensors and KV cache it shares; with weights rounded to 8 or 4 bits for it,
it has those of its own and shares the rest. Or it is what followed the last few tokens where they stood before (prompt
lookup, Saxena 2023). Keys and values that the draft writes are overwritten by the pass that verifies; those of refused
tokens lie behind the position reached, where nothing is read before it is written.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from teal.calibration.choose import choose_plan
from teal.checkpoint.loading import Check, Described, LoadedModel, check_draft_fit, load_for_decoding, round_weights
from teal.decoding.engine import Engine
from teal.decoding.sampling import argmax_step, draw, probabilities
from teal.model import KVCache, Transformer
from teal.options import MAX_DRAFT, DraftOptions, ModelOptions, SamplingParams, check_length, check_speculation
from teal.plan import SparsityPlan, keep_all_plan
from teal.teal_layers import sparsify

LOOKUP_TOKENS = (4, 3, 2)  # how many last tokens must have stood before, tried in this order
SAVED_BY_SPARSITY = 0.8  # of a draft step's time at sparsity 1: 40% less at 50%, as on an H100 (BENCHMARKS.md)
ROUNDED_COST = {None: 1.0, "int8": 0.63, "int4": 0.48}  # of a step with these weights, at 50%, there too
LOOKUP_COST = 0.05  # what judging one token more adds to a pass
FORGETTING = 0.9  # of the acceptance seen, each round


class SpeculativeEngine(Engine):
    """An Engine that drafts after a call of draft_with or look_up; its text is then the dense model's."""

    draft_length = 0
    drafter: Transformer | None = None  # None: look up
    draft_cost = LOOKUP_COST  # time of a drafted token over that of a pass of the dense model

    @classmethod
    def load_with_draft(cls, model: ModelOptions, draft: DraftOptions, *, check: Check | None = None) -> Self:
        """As Engine.load, a dense engine that drafts. Raises UserError."""
        check_speculation(model)

        def check_both(described: Described) -> None:
            check_draft_fit(draft, described, model.force_plan)
            if check is not None:
                check(described)

        if draft.lookup:
            engine = cls.load(model, check=check_both)
            engine.look_up(draft.length)
            return engine
        loaded = load_for_decoding(model, check_both, sparse=draft.quant is None)
        drafter = make_draft(loaded, draft, model.compile)
        # A draft with the same weights needs them in the sparse layout, and the dense model then keeps all of them.
        plan = keep_all_plan(loaded.model.config) if draft.quant is None else None
        engine = cls.from_loaded(loaded, plan, model.compile, model.backend)
        engine.draft_with(drafter, draft.length)
        return engine

    def draft_with(self, draft: "Draft", length: int) -> None:
        """Draft up to length tokens a round by sparse steps. Raises UserError."""
        self.drafter, self.draft_cost = draft.model, draft.cost
        self.compile_s += draft.compile_s
        self._speculate(length)

    def look_up(self, length: int) -> None:
        """Draft up to length tokens a round by looking up what followed before. Raises UserError."""
        self.drafter, self.draft_cost = None, LOOKUP_COST
        self._speculate(length)

    def drafts_under(self, plan: SparsityPlan | None) -> bool:
        """Whether it drafts: not under a plan that drops anything, whose text the pass that verifies does not give."""
        return self.draft_length > 0 and (plan is None or drops_nothing(plan))

    def _speculate(self, length: int) -> None:
        check_length(length)
        with self.use.taken(), torch.inference_mode():
            self.draft_length = length
            self._forget()
            self.drafted = torch.zeros(MAX_DRAFT, dtype=torch.int64, device=self.device)
            self.outcome = torch.zeros(MAX_DRAFT + 2, dtype=torch.int64, device=self.device)
            self.graphs.clear()

    def _forget(self) -> None:
        self.tried, self.taken = 2.0, 1.0  # tokens drafted and accepted lately

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
        """As Engine._tokens, in rounds of drafting and verifying."""
        if not self.drafts_under(self.plan):
            yield from super()._tokens(params, count)
            return
        self._forget()  # or the same seed would give another text, later
        text = Lookup([*self.cached_ids, int(self.token)] if self.drafter is None else [])
        yield int(self.token)
        made = 1
        while made < count:
            tokens = self._round(params, text, min(self.best_length(), count - made - 1))
            text.extend(tokens)
            for token in tokens:
                made += 1
                yield token

    @torch.inference_mode()
    def _round(self, params: SamplingParams, text: "Lookup", length: int) -> list[int]:
        """Draft and verify: the accepted tokens and one of the dense model's own; text ends in the one not fed yet."""
        length = self.propose(text, length)
        row = Row(self.token, self.position, self.cache, self.seen, self.generator)
        if self.use_graph:
            with torch.cuda.device(self.device):
                key = (params.without_seed(), 1 + length)
                self._captured(key, lambda: self.draft_and_verify(row, params, length)).replay()
        else:
            self.draft_and_verify(row, params, length)
        tokens = self.verified(length)
        self.stats.rounds += 1
        self.stats.drafted_tokens += length
        self.stats.accepted_tokens += len(tokens) - 1
        return tokens

    def propose(self, text: "Lookup", length: int) -> int:
        """Before a round: take what follows text's end in it, if that is the draft; how many tokens there will be."""
        if self.drafter is not None:
            return length
        found = text.continuation(length)
        self.drafted[: len(found)] = torch.tensor(found, dtype=torch.int64)
        return len(found)

    def verified(self, length: int) -> list[int]:
        """After a round of length drafted tokens: those accepted and one more. Waits for the device."""
        kept, *tokens = self.outcome[: length + 2].tolist()
        self.tried = FORGETTING * self.tried + length
        self.taken = FORGETTING * self.taken + kept
        return tokens[: kept + 1]

    def draft_and_verify(self, row: "Row", params: SamplingParams, length: int) -> None:
        """A round without a host in between: how many tokens were kept, and the tokens, go into self.outcome."""
        drafted, q = self._draft(row, params, length)
        tokens = torch.cat((row.token[0], drafted))
        positions = row.position[0] + torch.arange(length + 1, device=self.device)
        logits = self.model.logits(self.model.hidden_states(tokens[None], positions[None], row.cache))[0]
        if q is None:
            kept, last = verify_greedy(drafted, logits)
        else:
            p = probabilities(logits, params, seen_after(row.seen, drafted))
            kept, last = verify_sampled(drafted, q, p, row.generator)
        padded = torch.cat((drafted, last))
        found = torch.where(torch.arange(length + 1, device=self.device) < kept, padded, last)
        self.outcome[: length + 2] = torch.cat((kept, found))
        row.seen.scatter_(1, found[None], True)
        row.token.copy_(last[None])
        row.position.add_(kept + 1)

    def _draft(self, row: "Row", params: SamplingParams, length: int) -> tuple[Tensor, Tensor | None]:
        """Tokens [length], and the distributions [length, V] that they were drawn from; None where the likeliest is taken."""
        if self.drafter is None or length == 0:
            drafted = self.drafted[:length]
            if params.is_argmax:
                return drafted, None
            certain = torch.zeros(length, self.model.config.vocab_size, device=self.device)
            return drafted, certain.scatter_(1, drafted[:, None], 1.0)
        token, position, seen = row.token.clone(), row.position.clone(), row.seen.clone()
        tokens, rows = [], []
        for _ in range(length):
            logits = self.drafter.logits(self.drafter.hidden_states(token, position, row.cache)[:, -1])
            if params.is_argmax:
                argmax_step(logits, token, position)
            else:
                rows.append(probabilities(logits, params, seen))
                token.copy_(draw(rows[-1], row.generator)[:, None])
                position += 1
                seen.scatter_(1, token, True)
            tokens.append(token[0].clone())
        return torch.cat(tokens), torch.cat(rows) if rows else None


@dataclass(frozen=True, slots=True)
class Row:
    """What a round reads and writes: the token not fed yet and its position, int64 [1, 1]; cache; seen bool [1, V]."""

    token: Tensor
    position: Tensor
    cache: KVCache
    seen: Tensor
    generator: torch.Generator | None


@dataclass(frozen=True, slots=True)
class Draft:
    """A model that drafts; cost is the time of its step over that of a pass of the dense model."""

    model: Transformer
    cost: float
    compile_s: float


def make_draft(loaded: LoadedModel, options: DraftOptions, compile: bool | None = None) -> Draft:
    """A sparse copy of loaded that shares its tensors; with options.quant its projections and head are its own.

    Without quant loaded becomes sparse in place, at sparsity 0. Raises UserError.
    """
    if options.quant is None:
        plan = choose_plan(loaded, options.sparsity, options.plan)
        sparsify(loaded.model, keep_all_plan(loaded.model.config))
        copied = sharing_copy(loaded)
    else:
        copied = sharing_copy(loaded)
        round_weights(copied, options.quant, quant_lm_head=True, parameter="draft_quant")
        plan = choose_plan(copied, options.sparsity, options.plan)
        loaded.calibrate_s = copied.calibrate_s  # which began with loaded's
    engine = Engine.from_loaded(copied, plan, compile)
    cost = ROUNDED_COST[options.quant] * (1 - SAVED_BY_SPARSITY * plan.target)
    return Draft(engine.model, cost, engine.compile_s)


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


def drops_nothing(plan: SparsityPlan) -> bool:
    """Whether the plan is dense decoding."""
    return not any(projection.threshold for layer in plan.layers for projection in layer.values())


def sharing_copy(loaded: LoadedModel) -> LoadedModel:
    """A copy whose modules and buffers (thresholds) are its own and whose parameters are those of loaded."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in loaded.model.parameters()}
    return replace(loaded, model=copy.deepcopy(loaded.model, shared))


def seen_after(seen: Tensor, drafted: Tensor) -> Tensor:
    """bool [k + 1, V]: row i is seen [1, V] with the first i of the drafted tokens [k]."""
    new = torch.zeros(len(drafted) + 1, seen.shape[1], dtype=torch.int32, device=seen.device)
    new[1:].scatter_(1, drafted[:, None], 1)
    return seen | (new.cumsum(0) > 0)


def verify_greedy(drafted: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the drafted tokens [k] are the likeliest by logits [k + 1, V], and the likeliest after them: int64 [1] each."""
    best, ignored = (torch.zeros(len(logits), 1, dtype=torch.int64, device=logits.device) for _ in range(2))
    argmax_step(logits, best, ignored)
    best = best[:, 0]
    kept = (drafted == best[:-1]).long().cumprod(0).sum(0, keepdim=True)
    return kept, best.gather(0, kept)


def verify_sampled(drafted: Tensor, q: Tensor, p: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
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
    none = torch.zeros_like(p[:1])  # after the last token there is no draft to surpass
    q_next = torch.cat((q, none)).index_select(0, kept)
    more = (p_next - q_next).clamp(min=0)
    weights = torch.where(more.sum(-1, keepdim=True) > 0, more, p_next)  # equal but for rounding: no more anywhere
    return kept, draw(weights, generator)
