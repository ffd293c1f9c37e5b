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

from teal.decoding.sampling import bias_row, filter_logits, penalize, probabilities, sample
from teal.errors import UserError
from teal.options import SamplingParams

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
    "options", [{"temperature": 1e-320}, {"temperature": 1e-38}, {"top_p": 0.0, "temperature": 2.0}]
)
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_values_that_are_greedy(options: dict[str, Any], penalty: float) -> None:
    logits, seen = random_logits(6, rows=4), torch.zeros(4, VOCAB, dtype=torch.bool)
    seen[:, 5:] = True
    expected = sample(logits, SamplingParams(repetition_penalty=penalty), seen, None)
    params = SamplingParams(repetition_penalty=penalty, **options)
    assert torch.equal(sample(logits, params, seen, torch.Generator()), expected)
    assert torch.equal(probabilities(logits, params, seen).argmax(-1), expected)
    assert bool(probabilities(logits, params, seen).isfinite().all())


def test_top_k_of_minus_one_is_off() -> None:
    logits = random_logits(7)
    assert torch.equal(filter_logits(logits, SamplingParams(temperature=1.0, top_k=-1)), logits)


def test_a_bias_adds_bans_and_forces() -> None:
    row = bias_row({3: 2.5, 4: -100.0, 5: -7}, VOCAB, torch.device("cpu"))
    assert row.shape == (1, VOCAB) and row[0, [0, 3, 4, 5]].tolist() == [0.0, 2.5, float("-inf"), -7.0]
    logits = 1000 * random_logits(8)
    forced = (logits + bias_row({6: 100, 7: 100, 8: 99.9}, VOCAB, torch.device("cpu")))[0]
    assert sorted(forced.topk(2).indices.tolist()) == [6, 7] and forced[6] - forced[7] == logits[0, 6] - logits[0, 7]
    assert bool(forced.isfinite().all())  # a grammar that allows no forced token chooses among the others


@pytest.mark.parametrize(
    "field,value",
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_k", -2),
        ("top_p", -0.1), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 1.0), ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")), ("seed", -1), ("seed", 2**63),
    ],
)  # fmt: skip
def test_impossible_parameters_are_refused(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=field):
        SamplingParams(**{field: value})
