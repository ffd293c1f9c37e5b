"""Sampling: distributions by chi-square, filters against transformers, seeds."""

from typing import Any

import pytest
import scipy.stats
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from errors import UserError
from params import SamplingParams
from sampling import filter_logits, penalize, sample

VOCAB = 50


def random_logits(seed: int, rows: int = 1) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def draw(logits: torch.Tensor, params: SamplingParams, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(params.seed)
    seen = torch.zeros(count, VOCAB, dtype=torch.bool)
    return sample(logits.expand(count, -1), params, seen, generator)


def test_greedy_takes_the_largest() -> None:
    logits = random_logits(0, rows=5)
    seen = torch.zeros(5, VOCAB, dtype=torch.bool)
    assert torch.equal(sample(logits, SamplingParams(), seen, None), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax(temperature: float) -> None:
    logits, count = random_logits(1), 40_000
    observed = draw(logits, SamplingParams(temperature=temperature), count).bincount(minlength=VOCAB)
    expected = count * (logits[0] / temperature).softmax(-1).double()
    common = expected >= 5  # the test's condition; rarer tokens are counted together
    bins = torch.cat([observed[common], observed[~common].sum()[None]]).double()
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    keep = wanted > 0
    assert scipy.stats.chisquare(bins[keep], wanted[keep] * bins.sum() / wanted.sum()).pvalue > 1e-4


WARPERS: dict[str, tuple[dict[str, Any], Any]] = {
    "top-k": ({"top_k": 7}, TopKLogitsWarper(7)),
    "top-k-1": ({"top_k": 1}, TopKLogitsWarper(1)),
    "top-p": ({"top_p": 0.8}, TopPLogitsWarper(0.8)),
    "top-p-tiny": ({"top_p": 1e-6}, TopPLogitsWarper(1e-6)),
    "min-p": ({"min_p": 0.1}, MinPLogitsWarper(0.1)),
}


@pytest.mark.parametrize("name", WARPERS)
def test_filters_keep_what_transformers_keeps(name: str) -> None:
    options, warper = WARPERS[name]
    for seed in range(20):
        logits = random_logits(seed, rows=3)
        ours = filter_logits(logits, SamplingParams(temperature=1.0, **options))
        assert torch.equal(ours, warper(torch.zeros(3, 1, dtype=torch.int64), logits)), f"{name}, seed {seed}"


def test_repetition_penalty_equals_transformers() -> None:
    logits = random_logits(3, rows=2)
    ids = torch.tensor([[1, 5, 9], [0, 2, 2]])
    seen = torch.zeros(2, VOCAB, dtype=torch.bool).scatter_(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    torch.testing.assert_close(penalize(logits, 1.3, seen), expected)


def test_filtered_tokens_are_never_drawn() -> None:
    logits = random_logits(4)
    params = SamplingParams(temperature=5.0, top_k=9, top_p=0.9, min_p=0.05)
    allowed = filter_logits(logits / params.temperature, params)[0].isfinite().nonzero().flatten()
    assert set(draw(logits, params, 5000).tolist()) == set(allowed.tolist())


def test_seed_decides() -> None:
    logits = random_logits(5)
    a, b, other = (draw(logits, SamplingParams(temperature=1.0, seed=s), 100) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, other)


@pytest.mark.parametrize(
    "field,value",
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_k", -1),
        ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 1.0), ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")), ("seed", -1), ("seed", 2**63),
    ],
)  # fmt: skip
def test_impossible_parameters_are_refused(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=field):
        SamplingParams(**{field: value})
