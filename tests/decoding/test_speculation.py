"""Speculative decoding gives the dense model's text and distribution, whatever the draft, and leaves its cache."""

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from teal.decoding.drafting import Acceptance, Lookup, seen_after, verify_greedy, verify_sampled
from teal.decoding.engine import Engine
from teal.decoding.requests import Done, Observer, Piece, Request
from teal.decoding.scheduler import Scheduler
from teal.decoding.speculation import SpeculativeEngine
from teal.errors import UserError
from teal.layers.quantized_linear import is_quantized
from teal.model import KVCache
from teal.options import MAX_DRAFT, DraftOptions, ModelOptions, SamplingParams
from teal.teal_layers import sparse_layers
from tests.conftest import assert_near, save_tiny_model, tiny_config

PROMPTS = [[5, 9, 33, 120, 7, 250, 61], [8, 8], [i * 7 % 190 + 5 for i in range(40)], [11, 12, 13] * 6]


def speculative(
    folder: Path, length: int = 4, sparsity: float = 0.6, draft_quant: str | None = None
) -> SpeculativeEngine:
    """Drafts by sparse steps; by lookup if sparsity is 0."""
    if sparsity:
        return SpeculativeEngine.load_with_draft(
            ModelOptions(str(folder), device="cpu", dtype="fp32"),
            DraftOptions(length=length, sparsity=sparsity, quant=draft_quant),
        )
    engine = SpeculativeEngine.load(str(folder), device="cpu", dtype="fp32")
    engine.look_up(length)
    return engine


def chi_square_p(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """P(a chi-square this large) for counts of draws from probs; the rarest, up to 10 expected, are one class."""
    from scipy.stats import chisquare

    expected = probs.double() * counts.sum()
    if (counts[expected == 0] > 0).any():
        return 0.0
    order = expected.argsort()
    rare = int((expected[order].cumsum(0) < 10).sum()) + 1
    observed, wanted = (torch.cat((v[order[:rare]].sum()[None], v[order[rare:]])) for v in (counts.double(), expected))
    return float(chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue)


@pytest.mark.parametrize(
    "sparsity,length,quant",
    [(0.6, 1, None), (0.6, 4, None), (0.3, MAX_DRAFT, None), (0.0, 4, None), (0.4, 4, "int4"), (0.4, 4, "int8")],
)
def test_greedy_text_is_the_dense_models(
    tiny_folder: Path, quantizable_folder: Path, sparsity: float, length: int, quant: str | None
) -> None:
    folder = quantizable_folder if quant else tiny_folder
    dense = Engine.load(str(folder), device="cpu", dtype="fp32")
    engine = speculative(folder, length, sparsity, quant)
    drafted = accepted = 0
    for prompt in PROMPTS:
        for count in (1, 2, 50):
            assert list(engine.generate(prompt, max_new_tokens=count, ignore_eos=True)) == list(
                dense.generate(prompt, max_new_tokens=count, ignore_eos=True)
            )
            assert engine.stats.new_tokens == count
            drafted += engine.stats.drafted_tokens
            accepted += engine.stats.accepted_tokens
    assert 0 < accepted < drafted


@pytest.mark.parametrize("sparsity,quant", [(0.6, None), (0.0, None), (0.6, "int4")])
def test_the_cache_is_that_of_a_fresh_run(
    tiny_folder: Path, quantizable_folder: Path, sparsity: float, quant: str | None
) -> None:
    folder = quantizable_folder if quant else tiny_folder
    engine = speculative(folder, sparsity=sparsity, draft_quant=quant)
    stream = engine.generate(PROMPTS[3], max_new_tokens=60, ignore_eos=True)
    text = PROMPTS[3] + [next(stream) for _ in range(37)]
    stream.close()
    assert engine.cached_ids == text[:-1] and engine.stats.accepted_tokens < engine.stats.drafted_tokens
    fresh = Engine.load(str(folder), device="cpu", dtype="fp32")
    next(fresh.generate(text[:-1], max_new_tokens=1))
    n = len(text) - 1
    for name in ("k", "v"):
        actual, expected = (getattr(e.cache, name)[:, :, :, :n] for e in (engine, fresh))
        assert_near(name, actual, expected, 1e-5)


def test_to_the_end_of_the_context(tiny_folder: Path) -> None:
    engine = speculative(tiny_folder, 8)
    limit = engine.model.config.max_seq_len
    prompt = [i % 190 + 5 for i in range(limit - 9)]
    dense = list(Engine.load(str(tiny_folder), device="cpu", dtype="fp32").generate(prompt, ignore_eos=True))
    assert list(engine.generate(prompt, ignore_eos=True)) == dense and len(dense) == 9
    assert engine.stats.finish_reason == "length"


def test_sampling_repeats_with_its_seed(tiny_folder: Path) -> None:
    engine = speculative(tiny_folder)
    texts = []
    for seed in (5, 5, 6):
        params = SamplingParams(temperature=0.8, top_k=20, repetition_penalty=1.3, seed=seed)
        engine.cached_ids = []
        texts.append(list(engine.generate(PROMPTS[0], params, 40, ignore_eos=True)))
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("lookup", [False, True])
def test_verified_tokens_follow_the_models_distribution(lookup: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    p = (2 * torch.randn(3, 12, generator=generator)).softmax(-1)
    q = (2 * torch.randn(2, 12, generator=generator)).softmax(-1)
    if lookup:
        q = torch.eye(12)[[3, 4]]
    first, second = torch.zeros(12), torch.zeros(12)
    for drafted in torch.multinomial(q, 20_000, replacement=True, generator=generator).t():
        kept, last = verify_sampled(drafted, q, p, generator)
        tokens = [*drafted[: int(kept)].tolist(), int(last)]
        first[tokens[0]] += 1
        if len(tokens) > 1:  # then of p[1], since these rows do not depend on the tokens
            second[tokens[1]] += 1
    assert chi_square_p(first, p[0]) > 1e-3 and chi_square_p(second, p[1]) > 1e-3
    assert chi_square_p(first, p[1]) < 1e-9  # the test can tell


def test_sampled_text_follows_the_dense_models_distribution(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20,000 rounds from the same place: the first token of each, after the prompt and its greedy continuation.

    Of a model of one layer: each round runs its draft twice.
    """
    save_tiny_model(tiny_config("llama", vocab_size=300, num_hidden_layers=1), tmp_path)
    (tmp_path / "tokenizer.json").symlink_to(tiny_folder / "tokenizer.json")
    engine = speculative(tmp_path, 2, 0.7)
    params = SamplingParams(temperature=0.5, top_k=8)
    dense = Engine.load(str(tmp_path), device="cpu", dtype="fp32")
    first = next(dense.generate(PROMPTS[0], max_new_tokens=1))
    logits = []
    for text in (PROMPTS[0], [*PROMPTS[0], first]):
        ids = torch.tensor([text])
        with torch.inference_mode():
            logits.append(dense.model(ids, torch.arange(ids.shape[1])[None], dense.model.new_cache(1, 64))[0, -1])
    start = int(logits[0].argmax())
    top = logits[1].topk(8)
    expected = torch.zeros(len(logits[1])).scatter_(0, top.indices, (top.values / 0.5).softmax(-1))
    counts = torch.zeros_like(expected)
    known: dict[tuple[int, ...], torch.Tensor] = {}
    run = engine.model.hidden_states

    def hidden_states(tokens: torch.Tensor, positions: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """The same call gives the same, computed once: a round costs 15 ms otherwise."""
        key = (*tokens[0].tolist(), *positions[0].tolist())
        if key not in known:
            known[key] = run(tokens, positions, cache)
        return known[key]

    monkeypatch.setattr(engine.model, "hidden_states", hidden_states)
    with torch.inference_mode():
        rows, drafter = engine.decoder.rows, engine.drafter
        assert drafter is not None
        rows.prefill(0, PROMPTS[0], 0)
        accepted = 0
        for _ in range(20_000):
            rows.feed(range(1), [start], [len(PROMPTS[0])])
            tokens = rows.round(drafter, params, 2, 16)
            counts[tokens[0]] += 1
            accepted += len(tokens) - 1
    assert chi_square_p(counts, expected) > 1e-3
    assert accepted < 0.9 * 2 * 20_000


class DraftCount(Observer):
    """Adds up what was drafted and accepted."""

    def __init__(self) -> None:
        self.tokens = self.taken = 0

    def drafted(self, tokens: int, accepted: int) -> None:
        self.tokens += tokens
        self.taken += accepted


@pytest.mark.parametrize("sparsity", [0.6, 0.0])
def test_requests_alone_and_beside_each_other(tiny_folder: Path, sparsity: float) -> None:
    dense = Engine.load(str(tiny_folder), device="cpu", dtype="fp32")
    engine = speculative(tiny_folder, 4, sparsity)
    for prompts, lengths in (([PROMPTS[3]], [60]), (PROMPTS, [9, 30, 1, 90])):
        scheduler, counted = Scheduler(engine), DraftCount()
        scheduler.decoder.observer = counted
        texts = [""] * len(prompts)

        def take(event: Piece | Done, i: int, texts: list[str] = texts) -> None:
            texts[i] += event.text if isinstance(event, Piece) else f"|{event.finish_reason}"

        for i, (ids, count) in enumerate(zip(prompts, lengths, strict=True)):
            emit = functools.partial(take, i=i)
            scheduler.submit(Request(ids, emit, max_new_tokens=count, ignore_eos=True))
        scheduler.close_when_idle()
        scheduler.run()
        for text, ids, count in zip(texts, prompts, lengths, strict=True):
            stream = dense.stream(ids, max_new_tokens=count, ignore_eos=True)
            assert text == "".join(stream) + "|length"
        assert 0 < counted.taken < counted.tokens


def test_drafting_goes_on_after_a_step_without_where_steps_start_ahead(tiny_folder: Path) -> None:
    engine, found = speculative(tiny_folder, 4, 0.0), []
    for ahead in (False, True):
        pieces: list[str] = []
        scheduler, counted = Scheduler(engine, ahead=ahead), DraftCount()
        scheduler.decoder.observer = counted
        engine.look_up(4)  # forgets what was accepted
        emit = functools.partial(lambda event, into: into.append(getattr(event, "text", "")), into=pieces)
        scheduler.submit(Request(PROMPTS[0], emit, max_new_tokens=90, ignore_eos=True))
        scheduler.close_when_idle()
        scheduler.run()
        found.append(("".join(pieces), counted.tokens, counted.taken))
    assert found[0] == found[1] and found[0][1] > 0


def test_sampled_requests_take_ordinary_steps(tiny_folder: Path) -> None:
    engine = speculative(tiny_folder)
    counted, texts = DraftCount(), []
    for drafter in (engine.drafter, None):
        engine.drafter = drafter
        pieces: list[str] = []
        scheduler = Scheduler(engine)
        scheduler.decoder.observer = counted
        emit = functools.partial(lambda event, into: into.append(getattr(event, "text", "")), into=pieces)
        scheduler.submit(Request(PROMPTS[0], emit, SamplingParams(temperature=0.9), max_new_tokens=20))
        scheduler.close_when_idle()
        scheduler.run()
        texts.append("".join(pieces))
    assert texts[0] == texts[1] != "" and counted.tokens == 0


def test_verified_by_the_argmax() -> None:
    logits = torch.zeros(4, 9)
    logits[range(4), [3, 5, 2, 7]] = 1.0
    for drafted, kept, last in (([3, 5, 2], 3, 7), ([3, 5, 1], 2, 2), ([4, 5, 2], 0, 3), ([3, 1, 2], 1, 5)):
        assert [int(t) for t in verify_greedy(torch.tensor(drafted), logits)] == [kept, last]
    assert [int(t) for t in verify_greedy(torch.zeros(0, dtype=torch.int64), logits[:1])] == [0, 3]


def test_penalties_count_what_was_drafted_before() -> None:
    seen = torch.zeros(1, 20, dtype=torch.bool)
    seen[0, [3, 9]] = True
    rows = seen_after(seen, torch.tensor([7, 9, 1]))
    assert [row.nonzero()[:, 0].tolist() for row in rows] == [[3, 9], [3, 7, 9], [3, 7, 9], [1, 3, 7, 9]]


def test_a_rounded_draft_shares_all_but_what_is_rounded(quantizable_folder: Path) -> None:
    engine = speculative(quantizable_folder, draft_quant="int4")
    assert engine.drafter is not None and engine.drafter.backend is not None and not is_quantized(engine.model)
    drafting = engine.drafter.backend.model
    target, draft = ({p.data_ptr() for p in m.parameters()} for m in (engine.model, drafting))
    rounded: list[Any] = [*itertools.chain(*sparse_layers(drafting)), drafting.lm_head]
    own = {t.data_ptr() for m in rounded for t in (m.weight, m.scales, m.zeros) if t is not None}
    assert own and draft - own <= target and not own & target


def test_lookup() -> None:
    def continuation(text: list[int], length: int) -> list[int]:
        return Lookup(text).continuation(length)

    assert continuation([1, 2, 3, 4, 9, 1, 2, 3], 3) == [4, 9, 1]
    assert continuation([1, 2, 7, 1, 2, 8, 1, 2], 1) == [8]  # the last time
    assert continuation([3, 1, 2, 7, 0, 1, 2, 8, 3, 1, 2], 1) == [7]  # but the longest end first
    assert continuation([1, 2, 3], 4) == [] and continuation([1], 4) == [] and continuation([2, 2, 2], 4) == [2]


def test_the_draft_gets_longer_with_acceptance(tiny_folder: Path) -> None:
    drafter = speculative(tiny_folder, 8, 0.5).drafter
    assert drafter is not None
    lengths = [drafter.best_length(Acceptance(1.0, taken)) for taken in (0.1, 0.6, 0.9, 0.99)]
    assert lengths[0] == 1 and lengths == sorted(lengths) and lengths[2] >= 2 and lengths[3] > lengths[1]


def test_refusals(tiny_folder: Path, quantizable_folder: Path) -> None:
    model = ModelOptions(str(quantizable_folder), device="cpu", dtype="fp32", quant="int8")
    with pytest.raises(UserError, match="draft_length 17 is out of range; expected 1 to 16"):
        DraftOptions(length=17)
    with pytest.raises(UserError, match="draft_sparsity 0 is out of range; expected 0 < sparsity < 1"):
        DraftOptions(sparsity=0.0)
    with pytest.raises(UserError, match=r"draft_quant int4: .* is quantized already"):
        SpeculativeEngine.load_with_draft(model, DraftOptions(quant="int4"))
    with pytest.raises(UserError, match="draft_length 0 is out of range"):
        speculative(tiny_folder).look_up(0)
