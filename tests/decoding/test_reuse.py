"""Keys and values are reused only under the plan they were made under, and an engine makes one text at a time."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from teal.calibration.choose import choose_plan
from teal.decoding.engine import Engine
from teal.decoding.plan_switch import PlanSwitch
from teal.decoding.requests import Done, Piece, Request
from teal.decoding.scheduler import Scheduler, generate_batch
from teal.decoding.speculation import SpeculativeEngine
from teal.errors import UserError
from teal.options import DraftOptions, ModelOptions
from teal.plan import SparsityPlan
from teal.teal_layers import sparse_layers, sparse_prefill, sparsify

LONG = [i * 7 % 190 + 5 for i in range(330)]
PROMPT = LONG[:7]


def load(folder: Path, sparsity: float = 0.5) -> Engine:
    return Engine.load(str(folder), device="cpu", dtype="fp32", sparsity=sparsity)


@pytest.fixture
def engine(tiny_folder: Path) -> Engine:
    return load(tiny_folder)


@pytest.fixture
def plans(engine: Engine) -> dict[float, SparsityPlan]:
    assert engine.loaded is not None and engine.plan is not None
    return {0.5: engine.plan, 0.0: choose_plan(engine.loaded, 0.0, None)}


def answers(
    engine: Engine, asked: list[tuple[list[int], SparsityPlan | None]], rows: int = 1
) -> tuple[list[Any], list[int]]:
    """(text, log probabilities) of requests one after another, and how many tokens of each prompt were reused."""
    scheduler, found = Scheduler(engine, rows), [["", []] for _ in asked]

    def take(event: Piece | Done, into: list[Any]) -> None:
        if isinstance(event, Piece):
            into[0] += event.text
            into[1] += [entry.logprob for entry in event.logprobs]
        else:
            assert event.error is None

    requests = [
        Request(ids, lambda e, into=into: take(e, into), max_new_tokens=24, ignore_eos=True, top_logprobs=0, plan=plan)  # type: ignore[misc]
        for (ids, plan), into in zip(asked, found, strict=True)
    ]
    scheduler.submit(*requests)
    scheduler.close_when_idle()
    scheduler.run()
    return found, [request.reused_tokens for request in requests]


@pytest.mark.parametrize("order", [(0.5, 0.0), (0.0, 0.5)])
def test_a_server_reuses_nothing_of_another_plan(
    engine: Engine, plans: dict[float, SparsityPlan], order: tuple[float, float]
) -> None:
    [fresh], _ = answers(engine, [(LONG, plans[order[1]])])
    for rows in (1, 3):
        found, reused = answers(
            engine, [(LONG, plans[order[0]]), (LONG, plans[order[1]]), (LONG, plans[order[1]])], rows
        )
        assert found[1] == found[2] == fresh != found[0]
        assert reused == [0, 0, 320]


def test_the_setting_of_prefill_counts_too(engine: Engine) -> None:
    fresh = list(load_again(engine).generate(LONG, max_new_tokens=20, ignore_eos=True))
    with sparse_prefill(engine.model):
        assert list(engine.generate(LONG, max_new_tokens=20, ignore_eos=True)) != fresh
    assert list(engine.generate(LONG, max_new_tokens=20, ignore_eos=True)) == fresh and engine.stats.reused_tokens == 0


def load_again(engine: Engine) -> Engine:
    return load(Path(engine.name), 0.5)


@pytest.mark.parametrize("length", [65, 129, 193])
def test_only_whole_blocks_are_shared(engine: Engine, length: int) -> None:
    """A prompt's last token that is left over is read with the block before it, which is then longer than others."""
    [fresh], _ = answers(engine, [(LONG, None)])
    found, reused = answers(engine, [(LONG[:length], None), (LONG, None)])
    assert reused == [0, length - 65] and found[1] == fresh


def test_a_prompt_asked_for_several_times_at_once_is_read_once(engine: Engine) -> None:
    [fresh], _ = answers(engine, [(LONG, None)])
    found, reused = answers(engine, [(LONG, None)] * 5, rows=5)
    assert reused == [0, 320, 320, 320, 320] and found == [fresh] * 5


def test_compiled_blocks_follow_the_plan(tiny_folder: Path) -> None:
    engines = [load(tiny_folder), Engine.load(str(tiny_folder), device="cpu", dtype="fp32", sparsity=0.5, compile=True)]
    for sparsity in (0.0, 0.5, 0.0):
        texts = []
        for engine in engines:
            assert engine.loaded is not None
            engine.use_plan(choose_plan(engine.loaded, sparsity, None, can_calibrate=False))
            texts.append(list(engine.generate(PROMPT, max_new_tokens=20, ignore_eos=True)))
        assert texts[0] == texts[1]


@pytest.mark.parametrize("order", [(0.5, 0.0), (0.0, 0.5)])
def test_an_engine_and_a_chat_reuse_nothing_of_another_plan(
    engine: Engine, tiny_folder: Path, order: tuple[float, float]
) -> None:
    def text(e: Engine) -> list[int]:
        return list(e.generate(LONG, max_new_tokens=24, ignore_eos=True))

    fresh = load(tiny_folder)
    fresh.use_sparsity(order[1])
    expected = text(fresh)
    engine.use_sparsity(order[0])
    assert text(engine) != expected
    engine.use_sparsity(order[1])  # what /sparsity calls
    assert text(engine) == expected and engine.stats.reused_tokens == 0
    assert text(engine) == expected and engine.stats.reused_tokens == len(LONG) - 2


def test_a_speculating_chat_that_turns_sparse_stops_drafting(tiny_folder: Path) -> None:
    load(tiny_folder)  # calibrates
    model = ModelOptions(str(tiny_folder), device="cpu", dtype="fp32")
    engine = SpeculativeEngine.load_with_draft(model, DraftOptions(length=4))
    dense = list(engine.generate(PROMPT, max_new_tokens=40, ignore_eos=True))
    assert engine.stats.drafted_tokens
    engine.use_sparsity(0.5)
    expected = list(load(tiny_folder).generate(PROMPT, max_new_tokens=40, ignore_eos=True))
    assert list(engine.generate(PROMPT, max_new_tokens=40, ignore_eos=True)) == expected != dense
    assert engine.stats.drafted_tokens == 0
    batches = [generate_batch(e, [PROMPT], max_new_tokens=40, ignore_eos=True) for e in (engine, load(tiny_folder))]
    assert batches[0] == batches[1]
    engine.use_sparsity(0.0)
    assert list(engine.generate(PROMPT, max_new_tokens=40, ignore_eos=True)) == dense and engine.stats.drafted_tokens


def test_a_switch_sets_what_sparsify_sets_in_tensors_that_stay(tiny_folder: Path) -> None:
    engine, other = load(tiny_folder), load(tiny_folder)
    assert engine.loaded is not None and engine.plan is not None
    plans = [engine.plan, choose_plan(engine.loaded, 0.0, None)]
    for target, factor in ((0.3, 1.0), (0.3, 2.0), (0.6, 2.0)):  # a q apart from k and v is a segment of its own
        base = choose_plan(engine.loaded, target, None)
        layers = tuple(
            p | {"k": p["v"], "up": p["gate"], "q": replace(p["v"], threshold=factor * p["v"].threshold)}
            for p in base.layers
        )
        plans.append(replace(base, layers=layers))
    modules = [[module for layer in sparse_layers(e.model) for module in layer] for e in (engine, other)]
    tensors: dict[int, list[int]] = {}
    switch = PlanSwitch(engine.model)
    for i in (0, 1, 2, 3, 4, 0, 3, 1, 4, 2, 2, 0):
        number = switch.use(plans[i])
        sparsify(other.model, plans[i])
        assert all(
            a.segments == b.segments and a.thresholds.equal(b.thresholds) and a.name_thresholds.equal(b.name_thresholds)
            for a, b in zip(*modules, strict=True)
        )
        addresses = [tensor.data_ptr() for m in modules[0] for tensor in (m.thresholds, m.name_thresholds)]
        assert tensors.setdefault(number, addresses) == addresses
    assert len(tensors) < len(plans)


REFUSED = "making another text"


def start(engine: Engine) -> Iterator[int]:
    """A generator that has given its first token."""
    stream = engine.generate(PROMPT, max_new_tokens=30, ignore_eos=True)
    next(stream)
    return stream


def test_a_second_text_is_refused_and_the_first_is_whole(engine: Engine) -> None:
    expected = list(engine.generate(PROMPT, max_new_tokens=30, ignore_eos=True))
    stream = start(engine)
    for other in (
        lambda: next(engine.generate(LONG)),
        lambda: next(engine.stream(LONG)),
        lambda: engine.use_sparsity(0.0),
        lambda: engine.counting().__enter__(),
        lambda: generate_batch(engine, [LONG]),
        lambda: Scheduler(engine).start(),
    ):
        with pytest.raises(RuntimeError, match=REFUSED):
            other()
    assert list(stream) == expected[1:]
    assert list(engine.generate(PROMPT, max_new_tokens=30, ignore_eos=True)) == expected


def test_threads_get_their_text_or_a_refusal(engine: Engine) -> None:
    prompts = [LONG[i : i + 20] for i in range(6)]
    expected = [list(load_again(engine).generate(ids, max_new_tokens=20, ignore_eos=True)) for ids in prompts]
    outcomes: list[str] = []
    barrier = threading.Barrier(len(prompts))

    def client(i: int) -> None:
        barrier.wait()
        for _ in range(10):
            try:
                text = list(engine.generate(prompts[i], max_new_tokens=20, ignore_eos=True))
                outcomes.append("right" if text == expected[i] else "wrong")
            except RuntimeError as error:
                outcomes.append("refused" if REFUSED in str(error) else repr(error))
                time.sleep(0.01)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(outcomes) <= {"right", "refused"} and "right" in outcomes
    assert list(engine.generate(prompts[0], max_new_tokens=20, ignore_eos=True)) == expected[0]


def broken_off(engine: Engine) -> None:
    for _ in engine.stream(PROMPT, max_new_tokens=30, ignore_eos=True):
        break


def failed(engine: Engine) -> None:
    with pytest.raises(KeyError):
        for _ in engine.stream(PROMPT, max_new_tokens=30, ignore_eos=True):
            raise KeyError


def closed(engine: Engine) -> None:
    stream: Any = engine.stream(PROMPT, max_new_tokens=30, ignore_eos=True)
    next(stream)
    stream.close()


def refused_itself(engine: Engine) -> None:
    with pytest.raises(UserError):
        next(engine.generate([]))


def never_begun(engine: Engine) -> None:
    engine.unused = engine.generate(PROMPT)  # type: ignore[attr-defined]


def step_failed(engine: Engine) -> None:
    choose = engine.backend.choose
    stream = start(engine)
    engine.backend.choose = lambda *arguments: 1 / 0  # type: ignore[method-assign, assignment]
    try:
        with pytest.raises(ZeroDivisionError):
            next(stream)
    finally:
        engine.backend.choose = choose  # type: ignore[method-assign]


def scheduled(engine: Engine) -> None:
    generate_batch(engine, [PROMPT, LONG], max_new_tokens=3)


@pytest.mark.parametrize("use", [broken_off, failed, closed, refused_itself, never_begun, step_failed, scheduled])
def test_an_engine_is_free_after(engine: Engine, use: Callable[[Engine], None]) -> None:
    expected = list(load_again(engine).generate(PROMPT, max_new_tokens=30, ignore_eos=True))
    use(engine)
    assert list(engine.generate(PROMPT, max_new_tokens=30, ignore_eos=True)) == expected


def test_an_engine_is_refused_while_a_scheduler_runs(engine: Engine) -> None:
    scheduler = Scheduler(engine)
    scheduler.start()
    with pytest.raises(RuntimeError, match=REFUSED):
        next(engine.generate(PROMPT))
    with pytest.raises(RuntimeError, match=REFUSED):
        Scheduler(engine).run()
    scheduler.close(10)
    assert list(engine.generate(PROMPT, max_new_tokens=5, ignore_eos=True))
