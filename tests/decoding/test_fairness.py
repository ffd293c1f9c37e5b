"""Prompts and plans side by side: who waits for whom, that none waits forever, and that no text shows it."""

import functools
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teal.calibration.choose import choose_plan
from teal.decoding import scheduler as scheduler_module
from teal.decoding.engine import Engine
from teal.decoding.requests import Done, Piece, Request
from teal.decoding.rows import DecodeRows
from teal.decoding.scheduler import Scheduler
from teal.errors import UserError
from teal.options import COUNTED_TOKENS, SamplingParams
from teal.plan import SparsityPlan
from teal.teal_layers import sparse_layers

BLOCK = 8
LONG = [i * 7 % 190 + 5 for i in range(380)]
SHORT = [9, 33, 120, 7, 61]
TARGETS = (0.0, 0.3, 0.6)


@pytest.fixture
def engine(tiny_folder: Path) -> Engine:
    return Engine.load(str(tiny_folder), device="cpu", dtype="fp32", sparsity=0.3)


@pytest.fixture
def plans(engine: Engine) -> list[SparsityPlan]:
    """Of TARGETS; the second is the engine's own."""
    assert engine.loaded is not None and engine.plan is not None
    own, others = engine.plan, [choose_plan(engine.loaded, target, None) for target in (0.0, 0.6)]
    engine.use_plan(own)
    return [others[0], own, others[1]]


@dataclass
class Trace:
    """What happened, in order: ("block", first token of the prompt) and (name of a request, its text so far)."""

    events: list[tuple[str, Any]] = field(default_factory=list)
    hooks: list[Callable[[], None]] = field(default_factory=list)  # one after each block

    def request(self, name: str, ids: list[int], **options: Any) -> Request:
        def emit(event: Piece | Done) -> None:
            assert not isinstance(event, Done) or event.error is None, event
            self.events.append((name, event.finish_reason if isinstance(event, Done) else event.text))

        return Request(ids, emit, **{"ignore_eos": True, "max_new_tokens": 4, **options})

    def between(self, since: int, name: str) -> list[str]:
        """The names of events from number since to the first one of name."""
        names = [event for event, _ in self.events[since:]]
        return names[: names.index(name)]


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Trace:
    """Records blocks of prompts, which are small."""
    found, prefill = Trace(), DecodeRows.prefill

    def recorded(rows: DecodeRows, row: int, ids: list[int], begin: int) -> torch.Tensor:
        logits = prefill(rows, row, ids, begin)
        found.events.append(("block", ids[0]))
        if found.hooks:
            found.hooks.pop(0)()
        return logits

    monkeypatch.setattr(DecodeRows, "prefill", recorded)
    monkeypatch.setattr(scheduler_module, "CPU_BLOCK", BLOCK)
    return found


def serve(scheduler: Scheduler) -> None:
    scheduler.close_when_idle()
    scheduler.run()


def test_a_short_prompt_begins_while_a_long_one_is_read(engine: Engine, trace: Trace) -> None:
    scheduler, since = Scheduler(engine), [0]

    def submit_short() -> None:
        since[0] = len(trace.events)
        scheduler.closing = False
        scheduler.submit(trace.request("short", SHORT))
        scheduler.close_when_idle()

    trace.hooks = [lambda: None, submit_short]
    scheduler.submit(trace.request("long", LONG))
    serve(scheduler)
    waited = trace.between(since[0], "short")
    assert len(waited) <= 3 and set(waited) == {"block"}, waited  # one of the long prompt's, and its own
    assert trace.events[-1] == ("long", "length")


def test_tokens_keep_coming_while_a_long_prompt_is_read(engine: Engine, trace: Trace) -> None:
    scheduler = Scheduler(engine)
    scheduler.submit(trace.request("short", SHORT, max_new_tokens=100), trace.request("long", LONG))
    serve(scheduler)
    answer = trace.events[: trace.events.index(("short", "length"))]
    names = [name for name, _ in answer[[name for name, _ in answer].index("short") :]]
    assert "long" not in names and names.count("short") > 50  # pieces of 100 tokens
    for i in range(len(names) - 2):
        assert names[i : i + 3] != ["block"] * 3


def test_short_prompts_do_not_starve_a_long_one(engine: Engine, trace: Trace) -> None:
    scheduler, count = Scheduler(engine, queue=1000), 200
    scheduler.submit(trace.request("long", LONG))
    for i in range(count):
        scheduler.submit(trace.request("short", [i % 190 + 5, *SHORT], max_new_tokens=1))
    serve(scheduler)
    before = trace.between(0, "long")
    assert before.count("block") <= 2 * (len(LONG) // BLOCK + 1)
    assert before.count("short") < count  # some were still to come


def test_plans_take_turns(engine: Engine, plans: list[SparsityPlan], trace: Trace) -> None:
    scheduler = Scheduler(engine)
    for target, plan in zip(TARGETS, plans, strict=True):
        scheduler.submit(trace.request(f"{target}", SHORT, max_new_tokens=60, plan=plan))
    serve(scheduler)
    names = [name for name, _ in trace.events if name != "block"]
    for target in TARGETS:
        ended = names.index(f"{target}") + names.count(f"{target}")
        others = {name for name in names[:ended] if name != f"{target}"}
        assert len(others) == 2, f"{target} ran alone"
    assert engine.plan is plans[1]  # as before


def test_each_plans_entries_are_counted_apart(engine: Engine, plans: list[SparsityPlan], trace: Trace) -> None:
    scheduler = Scheduler(engine)
    found: dict[float, list[dict[str, float]]] = {}

    def at_the_end(event: Piece | Done, target: float) -> None:
        if isinstance(event, Done):  # right after its last counted token
            found[target] = scheduler.decoder.achieved

    for target, plan in zip(TARGETS, plans, strict=True):
        emit = functools.partial(at_the_end, target=target)
        scheduler.submit(
            Request(SHORT, emit, max_new_tokens=COUNTED_TOKENS, ignore_eos=True, plan=plan, count_sparsity=True)
        )
    serve(scheduler)
    for target in TARGETS:
        shares = [share for layer in found[target] for share in layer.values()]
        assert sum(shares) / len(shares) == pytest.approx(target, abs=0.12), target
    assert not any(module.counting or int(module.seen) for layer in sparse_layers(engine.model) for module in layer)


def test_a_plan_for_a_dense_engine_is_refused(tiny_folder: Path, plans: list[SparsityPlan]) -> None:
    dense = Engine.load(str(tiny_folder), device="cpu", dtype="fp32")
    with pytest.raises(UserError, match="loaded dense"):
        Scheduler(dense).submit(Request(SHORT, lambda event: None, plan=plans[2]))


def text_of(engine: Engine, ids: list[int], count: int, seed: int, plan: SparsityPlan | None) -> str:
    """What a request gets alone, in a scheduler of its own."""
    pieces: list[str] = []
    scheduler = Scheduler(engine)
    emit = lambda event: pieces.append(getattr(event, "text", ""))  # noqa: E731
    params = SamplingParams(temperature=0.8 * (seed % 2), seed=seed)
    scheduler.submit(Request(ids, emit, params, count, ignore_eos=True, plan=plan))
    serve(scheduler)
    return "".join(pieces)


ASKED = st.tuples(
    st.sampled_from((1, 2, 5, 63, 64, 65, 66, 128, 129, 130, 200, 320)),  # tokens of the prompt
    st.integers(1, 40),  # of the answer
    st.integers(0, 3),  # seed, and whether it is sampled
    st.integers(0, 2),  # plan
    st.booleans(),  # begins like the others
    st.none() | st.integers(0, 30),  # cancelled after so many tokens
)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_any_requests_beside_each_other_get_their_own_texts(tiny_folder: Path, dtype: str) -> None:
    engine = Engine.load(str(tiny_folder), device="cpu", dtype=dtype, sparsity=0.3)
    assert engine.loaded is not None and engine.plan is not None
    own, alone = engine.plan, {}
    plans = [choose_plan(engine.loaded, 0.0, None), own, choose_plan(engine.loaded, 0.6, None)]
    engine.use_plan(own)

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.lists(ASKED, min_size=2, max_size=12), st.integers(1, 8), st.booleans())
    def check(asked: list[tuple[int, int, int, int, bool, int | None]], rows: int, ahead: bool) -> None:
        scheduler = Scheduler(engine, rows=rows, ahead=ahead)
        texts = [""] * len(asked)
        wanted = []
        for i, (length, count, seed, plan, alike, cancelled) in enumerate(asked):
            ids = LONG[:length] if alike else random.Random(length + seed).choices(range(5, 195), k=length)
            key = (*ids, count, seed, plan)
            if key not in alone:
                alone[key] = text_of(engine, ids, count, seed, plans[plan])
            wanted.append((alone[key], cancelled))

            def emit(event: Piece | Done, i: int = i, cancelled: int | None = cancelled) -> None:
                if isinstance(event, Piece):
                    texts[i] += event.text
                    if cancelled is not None and requests[i].new_tokens >= cancelled:
                        scheduler.cancel(requests[i])
                else:
                    assert event.error is None

            params = SamplingParams(temperature=0.8 * (seed % 2), seed=seed)
            requests.append(Request(ids, emit, params, count, ignore_eos=True, plan=plans[plan]))
        scheduler.submit(*requests)
        serve(scheduler)
        requests.clear()
        for text, (expected, cancelled) in zip(texts, wanted, strict=True):
            assert text == expected if cancelled is None else expected.startswith(text)
        assert scheduler.load == (0, 0) and scheduler.decoder.table.owners == [None] * rows

    requests: list[Request] = []
    check()


def test_requests_arrive_while_others_are_submitted(engine: Engine) -> None:
    """Submitting threads change the queue while it is looked through for those that ended."""
    scheduler, ends = Scheduler(engine, queue=10_000), []
    scheduler.start()

    def client(number: int) -> None:
        for _ in range(300):
            scheduler.submit(
                Request(SHORT, lambda e: ends.append(e) if isinstance(e, Done) else None, max_new_tokens=1)
            )

    threads = [threading.Thread(target=client, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    scheduler.close(60)
    assert len(ends) == 900 and all(end.error is None for end in ends)
