"""What sparsity costs in quality: perplexity, divergence from the dense model, and when greedy text departs from it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teal.calibration.stages import weight_counts
from teal.errors import UserError
from teal.layers.phase import decoding
from teal.model import Transformer
from teal.options import POLICY_SHARES
from teal.plan import SparsityPlan, keep_all_plan
from teal.progress import progress
from teal.teal_layers import achieved_sparsity, set_counting, sparse_prefill, sparsify, weight_bytes_per_token

CONTINUATION_PROMPT = 64  # tokens of text before a greedy continuation
CONTINUATION_LENGTH = 128  # tokens continued at most
FLOAT_BYTES = 2  # of a weight or scale in floats when bytes are counted: 16 bits, though fp32 may compute the figures


@dataclass(slots=True)
class Score:
    """Sums over scored tokens; the properties are their means."""

    tokens: int = 0
    nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.tokens)

    def as_row(self) -> dict[str, float]:
        return {
            "perplexity": self.perplexity,
            "kl": self.kl / self.tokens,
            "top1_agreement": self.agreed / self.tokens,
            "tokens": self.tokens,
        }


@dataclass(frozen=True, slots=True)
class Case:
    """A configuration to evaluate; plan None is the dense model."""

    method: str
    sparsity: float
    plan: SparsityPlan | None
    policy: str = "decode"


@dataclass(slots=True)
class Result:
    """Everything measured of a case.

    achieved: sparsities [layer][projection], none for the dense model. counts: weights of each projection of a layer.
    bytes_per_token: those of the weights that decoding one token reads, floats counted as FLOAT_BYTES.
    """

    case: Case
    counts: dict[str, int]
    score: Score = field(default_factory=Score)
    achieved: list[dict[str, float]] = field(default_factory=list)
    bytes_per_token: float = 0.0

    def as_row(self) -> dict[str, Any]:
        row: dict[str, Any] = {"method": self.case.method, "sparsity": self.case.sparsity, "policy": self.case.policy}
        row |= self.score.as_row()
        row["bytes_per_token"] = round(self.bytes_per_token)
        if self.achieved and self.case.plan is not None:
            row |= self._sparsity_fields(self.case.plan)
        return row

    def _sparsity_fields(self, plan: SparsityPlan) -> dict[str, float]:
        """The share of all weights that was dropped, by how much that is more than planned, and single projections."""
        planned = [{name: p.sparsity for name, p in layer.items()} for layer in plan.layers]
        gaps = [abs(seen[n] - p) for seen, layer in zip(self.achieved, planned, strict=True) for n, p in layer.items()]
        achieved = self._share_of_weights(self.achieved)
        return {
            "achieved_sparsity": achieved,
            "signed_sparsity_gap": achieved - self._share_of_weights(planned),
            "worst_sparsity_gap": max(gaps),
            "mean_sparsity_gap": sum(gaps) / len(gaps),
        }

    def _share_of_weights(self, sparsities: list[dict[str, float]]) -> float:
        """The mean of sparsities [layer][projection], each projection weighing as many as it has weights."""
        dropped = sum(p * self.counts[name] for layer in sparsities for name, p in layer.items())
        return dropped / (len(sparsities) * sum(self.counts.values()))


def windows(count: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first scored, end) of windows over count tokens; every token but the first is scored exactly once.

    Windows have at most length tokens and begin stride < length apart. A window scores the tokens that the one before
    did not reach. After the first window each has at least length - stride tokens of context.
    """
    scored = 1
    for begin in range(0, count, stride):
        end = min(begin + length, count)
        if end > scored:
            yield begin, scored, end
            scored = end
        if end == count:
            return


def check_tokens(count: int, continuations: int = 0) -> None:
    """Raise UserError unless a text of so many tokens can be scored, and so many prompts cut from it."""
    if count < 2:
        raise UserError(f"the text has {count} tokens; at least 2 are needed, and some thousands for a figure")
    if count < continuations * CONTINUATION_PROMPT:
        needed = continuations * CONTINUATION_PROMPT
        raise UserError(f"{continuations} continuations need {needed} tokens of text; there are {count}")


@torch.inference_mode()
def evaluate(
    model: Transformer,
    tokens: Tensor,
    cases: list[Case],
    length: int,
    stride: int,
    reference: Transformer | None = None,
) -> list[Result]:
    """Score every case on tokens [T], window by window; the dense model's logits of a window serve all cases.

    KL divergence and agreement are with reference, by default the dense model itself. model must be sparse already if
    any case has a plan (thresholds change in place). Raises UserError if there are too few tokens.
    """
    check_tokens(len(tokens))
    counts = weight_counts(model.config.projections())
    results = [Result(case, counts) for case in cases]
    sums: list[list[dict[str, float]]] = [[] for _ in cases]  # of achieved sparsities times tokens
    spans = list(windows(len(tokens), length, stride))
    total = sum(end - begin for begin, _, end in spans)
    for begin, first, end in progress(spans, "evaluating", "window"):
        ids = tokens[None, begin:end].to(model.device)
        dense = window_logits(model, ids, first - begin)
        expected = dense if reference is None else window_logits(reference, ids, first - begin)
        for i, result in enumerate(results):
            case = result.case
            logits = dense
            if case.plan is not None:
                sparsify(model, case.plan)
                set_counting(model, True)
                with sparse_prefill(model, POLICY_SHARES[case.policy]):
                    logits = window_logits(model, ids, first - begin)
                add_shares(sums[i], achieved_sparsity(model), end - begin)
            result.bytes_per_token += weight_bytes_per_token(model, FLOAT_BYTES) * (end - begin) / total
            set_counting(model, False)
            add_score(result.score, logits, expected, ids[0, first - begin :])
    for result, layers in zip(results, sums, strict=True):
        result.achieved = [{name: value / total for name, value in layer.items()} for layer in layers]
    return results


def add_shares(sums: list[dict[str, float]], shares: list[dict[str, float]], weight: float) -> None:
    """Add weight times shares [layer][projection] to sums, which may be empty."""
    sums += [dict.fromkeys(layer, 0.0) for layer in shares[len(sums) :]]
    for layer, values in zip(sums, shares, strict=True):
        for name, value in values.items():
            layer[name] += weight * value


def window_logits(model: Transformer, ids: Tensor, first: int) -> Tensor:
    """fp32 logits [n, V] that predict the tokens ids[0, first:] of ids [1, L]."""
    cache = model.new_cache(1, ids.shape[1])
    positions = torch.arange(ids.shape[1], device=model.device)[None]
    hidden = model.hidden_states(ids, positions, cache)
    return model.logits(hidden[0, first - 1 : -1]).float()


def add_score(score: Score, logits: Tensor, expected: Tensor, targets: Tensor) -> None:
    """Add to score what logits [n, V] give for targets [n], beside the logits expected of a perfect model."""
    score.tokens += len(targets)
    log_probs = logits.log_softmax(-1)
    score.nll += float(F.nll_loss(log_probs, targets, reduction="sum"))
    if logits is expected:
        score.agreed += len(targets)
        return
    true = expected.log_softmax(-1)
    score.kl += float((true.exp() * (true - log_probs)).sum())
    score.agreed += int((logits.argmax(-1) == expected.argmax(-1)).sum())


@torch.inference_mode()
def decode_score(model: Transformer, tokens: Tensor) -> Score:
    """Score tokens [T] through the decode path: one call a token, each of them sparse if the model is.

    The decode policy's batched figure on one window of T tokens is the same but for rounding.
    """
    cache = model.new_cache(1, len(tokens))
    score = Score()
    ids = tokens.to(model.device)
    with decoding(model):
        for i in progress(range(len(ids) - 1), "decoding", "token"):
            position = torch.full((1, 1), i, device=model.device)
            logits = model(ids[None, i : i + 1], position, cache)[0].float()
            add_score(score, logits, logits, ids[i + 1 : i + 2])
    return score


@torch.inference_mode()
def continue_greedily(model: Transformer, prompts: Tensor, count: int) -> Tensor:
    """The count most likely next tokens [B, count] after prompts [B, P]: dense prefill, then token by token."""
    B, P = prompts.shape
    cache = model.new_cache(B, P + count)
    positions = torch.arange(P, device=model.device).expand(B, P)
    hidden = model.hidden_states(prompts.to(model.device), positions, cache)
    made = [model.logits(hidden[:, -1:]).argmax(-1)]
    with decoding(model):
        for i in range(count - 1):
            position = torch.full((B, 1), P + i, device=model.device)
            made.append(model(made[-1], position, cache).argmax(-1))
    return torch.cat(made, dim=1)


def departures(expected: Tensor, actual: Tensor) -> list[int]:
    """For each row of [B, n], how many tokens are equal before the first difference."""
    equal = (expected == actual).long().cumprod(dim=1)
    return equal.sum(dim=1).tolist()


def agreements_with_dense(model: Transformer, plans: list[SparsityPlan], tokens: Tensor, prompts: int) -> list[float]:
    """For each plan the median, over prompts cut from tokens, of the tokens before sparse text departs from dense."""
    check_tokens(len(tokens), prompts)
    starts = [i * (len(tokens) // prompts) for i in range(prompts)]
    batch = torch.stack([tokens[start : start + CONTINUATION_PROMPT] for start in starts])
    sparsify(model, keep_all_plan(model.config))
    expected = continue_greedily(model, batch, CONTINUATION_LENGTH)
    found = []
    for plan in plans:
        sparsify(model, plan)
        found.append(float(median(departures(expected, continue_greedily(model, batch, CONTINUATION_LENGTH)))))
    return found
