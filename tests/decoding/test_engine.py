"""The engine: prefix reuse, cache growth, stopping, seeds, compilation, and the statistics it keeps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from teal.calibration import choose
from teal.calibration.sensitivity import BackwardPass
from teal.decoding.engine import Engine
from teal.decoding.rows import CACHE_STEP
from teal.decoding.scheduler import generate_batch
from teal.errors import UserError
from teal.model import KVCache
from teal.options import SamplingParams
from teal.plan import SparsityPlan
from teal.teal_layers import weight_bytes_per_token
from tests.conftest import save_uniform_plan

PROMPT = [5, 9, 33, 120, 7, 250, 61]
SAMPLED = SamplingParams(temperature=1.5, top_k=200, top_p=0.99, min_p=0.001, repetition_penalty=1.1, seed=3)


@pytest.fixture
def engine(tiny_folder: Path) -> Engine:
    return Engine.load(str(tiny_folder), device="cpu", dtype="fp32")


def fresh_greedy(engine: Engine, ids: list[int], count: int) -> list[int]:
    """The continuation by definition: the whole text through the model again for every token."""
    ids = list(ids)
    with torch.inference_mode():
        for _ in range(count):
            cache = KVCache(engine.model.config, 1, 400, engine.device, engine.dtype)
            logits = engine.model(torch.tensor([ids]), torch.arange(len(ids))[None], cache)
            ids.append(int(logits[0, -1].argmax()))
    return ids[-count:]


def test_generates_what_the_model_says(engine: Engine) -> None:
    assert list(engine.generate(PROMPT, max_new_tokens=20, ignore_eos=True)) == fresh_greedy(engine, PROMPT, 20)
    stats = engine.stats
    assert (stats.prompt_tokens, stats.new_tokens, stats.finish_reason) == (7, 20, "length")
    assert len(stats.token_s) == 19 and stats.first_token_s > 0 and stats.tokens_per_s is not None


def test_shared_prefix_is_reused_and_changes_nothing(engine: Engine) -> None:
    first = list(engine.generate(PROMPT, max_new_tokens=8, ignore_eos=True))
    longer = PROMPT + first + [17, 18]
    second = list(engine.generate(longer, max_new_tokens=8, ignore_eos=True))
    # The last generated token was never fed to the model, so its keys are not cached.
    assert engine.stats.reused_tokens == len(PROMPT) + len(first) - 1
    assert second == fresh_greedy(engine, longer, 8)
    other = list(engine.generate([*PROMPT[:3], 77, 78], max_new_tokens=8, ignore_eos=True))
    assert engine.stats.reused_tokens == 3
    assert other == fresh_greedy(engine, [*PROMPT[:3], 77, 78], 8)
    again = list(engine.generate([*PROMPT[:3], 77, 78], max_new_tokens=8, ignore_eos=True))
    assert engine.stats.reused_tokens == 3 and again == other  # two tokens are always left for a dense prefill


def test_abandoned_stream_leaves_the_cache_right(engine: Engine) -> None:
    stream = engine.generate(PROMPT, max_new_tokens=30, ignore_eos=True)
    taken = [next(stream) for _ in range(4)]
    stream.close()
    longer = PROMPT + taken + [40]
    assert list(engine.generate(longer, max_new_tokens=6, ignore_eos=True)) == fresh_greedy(engine, longer, 6)


def test_cache_grows_and_keeps_its_contents(engine: Engine) -> None:
    assert engine.cache.length == CACHE_STEP
    ids = [i % 290 + 5 for i in range(CACHE_STEP - 4)]
    first = list(engine.generate(ids, max_new_tokens=2, ignore_eos=True))
    assert engine.cache.length == CACHE_STEP
    longer = ids + first + [8]
    second = list(engine.generate(longer, max_new_tokens=12, ignore_eos=True))
    assert engine.cache.length == 400  # the model's context; the next multiple would exceed it
    assert engine.stats.reused_tokens > CACHE_STEP - 4
    assert second == fresh_greedy(engine, longer, 12)


def test_long_prompts_go_in_blocks(engine: Engine) -> None:
    ids = [i % 290 + 5 for i in range(100)]
    whole = list(engine.generate(ids, max_new_tokens=5, ignore_eos=True))
    engine.cached_ids = []
    engine.decoder.prefill.block = 7
    assert list(engine.generate(ids, max_new_tokens=5, ignore_eos=True)) == whole
    assert engine.decoder.prefill.blocks == 1 + 15  # the last of 14 and two tokens


def test_stops_at_the_contexts_end(engine: Engine) -> None:
    ids = [i % 290 + 5 for i in range(396)]
    assert len(list(engine.generate(ids, max_new_tokens=100, ignore_eos=True))) == 4
    assert engine.stats.finish_reason == "length"


def test_end_of_text_token_ends_it(engine: Engine) -> None:
    tokens = fresh_greedy(engine, PROMPT, 12)
    engine.tokenizer.eos_ids = frozenset([tokens[5]])
    expected = tokens[: tokens.index(tokens[5])]
    assert list(engine.generate(PROMPT, max_new_tokens=12)) == expected
    assert engine.stats.finish_reason == "stop"
    assert list(engine.generate(PROMPT, max_new_tokens=12, ignore_eos=True)) == tokens


def test_stop_string_ends_the_stream(engine: Engine) -> None:
    text = "".join(engine.stream(PROMPT, max_new_tokens=40, ignore_eos=True))
    stop = text[6:9]
    shown = "".join(engine.stream(PROMPT, max_new_tokens=40, stops=(stop,), ignore_eos=True))
    assert shown == text[: text.index(stop)]
    assert engine.stats.finish_reason == "stop" and engine.stats.new_tokens < 40
    unmatched = "".join(engine.stream(PROMPT, max_new_tokens=40, stops=(text[-2:] + "never",), ignore_eos=True))
    assert unmatched == text


def test_same_seed_same_text(engine: Engine, tiny_folder: Path) -> None:
    def run(e: Engine, params: SamplingParams) -> list[int]:
        return list(e.generate(PROMPT, params, max_new_tokens=30, ignore_eos=True))

    first = run(engine, SAMPLED)
    assert run(engine, SAMPLED) == first  # with a warm cache
    assert run(Engine.load(str(tiny_folder), device="cpu", dtype="fp32"), SAMPLED) == first
    assert run(engine, replace(SAMPLED, seed=4)) != first


def test_repetition_penalty_sees_prompt_and_output(engine: Engine) -> None:
    tokens = list(engine.generate(PROMPT, SamplingParams(repetition_penalty=1e6), max_new_tokens=60, ignore_eos=True))
    assert len(set(tokens)) == 60 and not set(tokens) & set(PROMPT)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_compiled_equals_eager(tiny_folder: Path, sparsity: float, tmp_path: Path) -> None:
    plan = save_uniform_plan(tiny_folder, sparsity, tmp_path / "plan.json") if sparsity else None
    options: dict[str, Any] = {"device": "cpu", "dtype": "fp32", "plan": plan}
    eager = Engine.load(str(tiny_folder), **options, compile=False)
    compiled = Engine.load(str(tiny_folder), **options, compile=True)
    assert compiled.compile_s > 0 and compiled.cached_ids == []
    for ids, count in ((PROMPT, 20), ([i % 290 + 5 for i in range(300)], 40)):  # the second grows the cache
        expected = list(eager.generate(ids, max_new_tokens=count, ignore_eos=True))
        assert list(compiled.generate(ids, max_new_tokens=count, ignore_eos=True)) == expected


def test_sparsity_calibrates_once_and_keeps_the_plan(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = Engine.load(str(tiny_folder), sparsity=0.4, device="cpu", dtype="fp32")
    (path,) = (tmp_path / "teal" / "plans").iterdir()
    assert engine.plan is not None and SparsityPlan.load(path) == engine.plan
    assert engine.plan.target == 0.4 and engine.plan.method == "global"

    def unexpected(*_: object) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr(choose, "calibrate_quickly", unexpected)
    again = Engine.load(str(tiny_folder), sparsity=0.4, device="cpu", dtype="fp32")
    assert again.plan == engine.plan
    expected = list(engine.generate(PROMPT, max_new_tokens=9))
    assert list(again.generate(PROMPT, max_new_tokens=9)) == expected
    assert list(again.generate(PROMPT, max_new_tokens=9)) == expected  # sparse, with a warm cache
    with_plan = Engine.load(str(tiny_folder), plan=str(path), device="cpu", dtype="fp32")
    assert list(with_plan.generate(PROMPT, max_new_tokens=9)) == expected


def test_another_sparsity_uses_what_the_first_one_estimated(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "alone"))
    alone = Engine.load(str(tiny_folder), sparsity=0.6, device="cpu", dtype="fp32").plan
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "after"))
    Engine.load(str(tiny_folder), sparsity=0.4, device="cpu", dtype="fp32")
    monkeypatch.setattr(BackwardPass, "forward", None)
    assert Engine.load(str(tiny_folder), sparsity=0.6, device="cpu", dtype="fp32").plan == alone


def test_a_plan_does_not_depend_on_what_other_dtypes_left_in_the_cache(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = []
    for name, dtypes in (("alone", ("fp32",)), ("after", ("bf16", "fp32"))):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        plans.append([Engine.load(str(tiny_folder), sparsity=0.4, device="cpu", dtype=d).plan for d in dtypes])
    assert plans[1][0] != plans[1][1] == plans[0][0]


def test_weight_bytes_follow_sparsity(tiny_folder: Path) -> None:
    dense = Engine.load(str(tiny_folder), device="cpu", dtype="fp32")
    sparse = Engine.load(str(tiny_folder), sparsity=0.5, device="cpu", dtype="fp32")
    head = dense.model.lm_head.weight.nbytes
    full = weight_bytes_per_token(dense.model)
    assert full == sum(p.nbytes for p in dense.model.parameters() if p.dim() > 1) - head
    with sparse.counting():
        list(sparse.generate(PROMPT, max_new_tokens=50, ignore_eos=True))
        assert weight_bytes_per_token(sparse.model) - head == pytest.approx((full - head) / 2, rel=0.15)
    assert weight_bytes_per_token(sparse.model) == full


def test_impossible_requests_are_refused(engine: Engine) -> None:
    for ids, count, message in (
        ([], 5, "empty"),
        ([5] * 400, 5, "400 tokens"),
        (PROMPT, 0, "max_new_tokens 0"),
    ):
        with pytest.raises(UserError, match=message):
            list(engine.generate(ids, max_new_tokens=count))


@pytest.mark.parametrize(
    "prompt, params, words",
    [
        ([5, 300], SamplingParams(), "token id 300; expected 0 to 299"),
        ([5, -1], SamplingParams(), "token id -1; expected 0 to 299"),
        ("hello", SamplingParams(), r"is a text; give its token ids, as engine\.tokenizer\.encode"),
        (PROMPT, SamplingParams(logit_bias={300: 1.0}), "logit_bias 300: no such token; this model has 300"),
    ],
    ids=["beyond", "negative", "text", "bias"],
)
def test_tokens_that_the_model_lacks_are_refused(
    engine: Engine, prompt: Any, params: SamplingParams, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        next(engine.generate(prompt, params))
    with pytest.raises(UserError, match=words):
        generate_batch(engine, [prompt], params, max_new_tokens=2)
    assert list(engine.generate(PROMPT, max_new_tokens=4, ignore_eos=True)) == fresh_greedy(engine, PROMPT, 4)


def test_random_weights_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = Engine.load(random_weights="smollm2-135m", device="cpu", dtype="bf16")
    assert sum(p.numel() for p in engine.model.parameters()) == 134_515_008
    assert len(list(engine.generate(PROMPT, max_new_tokens=3))) == 3
    with pytest.raises(UserError, match="expected one of"):
        Engine.load(random_weights="nothing")
