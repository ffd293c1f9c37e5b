"""Requests beside each other: the bits each has alone, prefix reuse, fairness, failures, shutdown."""

import functools
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from teal.decoding.engine import Engine
from teal.decoding.requests import Done, Observer, Piece, Request
from teal.decoding.rows import DecodeRows
from teal.decoding.scheduler import QueueFull, Scheduler, generate_batch
from teal.errors import UserError
from teal.options import SamplingParams
from teal.teal_layers import sparse_layers


@pytest.fixture(params=["fp32", "bf16"])
def engine(request: pytest.FixtureRequest, tiny_folder: Path) -> Engine:
    return Engine.load(str(tiny_folder), device="cpu", dtype=request.param, sparsity=0.4)


@dataclass
class Collected:
    """What a request emitted."""

    text: str = ""
    end: Done | None = None
    logprobs: list[float] = field(default_factory=list)

    def take(self, event: Piece | Done) -> None:
        assert self.end is None, "events after the end"
        if isinstance(event, Piece):
            self.text += event.text
            self.logprobs += [entry.logprob for entry in event.logprobs]
        else:
            self.end = event


def test_what_is_warm_is_not_warmed_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[DecodeRows] = []
    monkeypatch.setattr(DecodeRows, "warm", lambda rows: warmed.append(rows))
    for is_warm in (True, False):
        scheduler = Scheduler(engine, rows=2)
        if is_warm:
            scheduler.warm()
        scheduler.close_when_idle()
        scheduler.run()
        assert warmed.pop() is scheduler.decoder.rows and not warmed
    with engine.use.taken(), pytest.raises(RuntimeError):
        Scheduler(engine).warm()


def prompts(engine: Engine, count: int) -> list[list[int]]:
    chance = random.Random(0)
    texts = ["The European lobster lives " * chance.randint(0, 6) + f"number {i}" for i in range(count)]
    return [engine.tokenizer.encode(text) for text in texts]


def run(
    engine: Engine, batch: list[list[int]], tokens: int = 24, ahead: bool | None = None, **options: Any
) -> list[Collected]:
    """All requests of a batch at once, to the end."""
    scheduler = Scheduler(engine, ahead=ahead)
    found = [Collected() for _ in batch]
    for collected, ids in zip(found, batch, strict=True):
        scheduler.submit(Request(ids, collected.take, max_new_tokens=tokens, **{"top_logprobs": 0, **options}))
    scheduler.close_when_idle()
    scheduler.run()
    assert all(collected.end is not None and collected.end.error is None for collected in found)
    return found


def test_an_answer_has_the_bits_it_has_alone(engine: Engine) -> None:
    batch = prompts(engine, 12)
    alone = [run(engine, [ids], ignore_eos=True)[0] for ids in batch]
    assert len({collected.text for collected in alone}) > 6
    for seed in (1, 2):
        order = random.Random(seed).sample(range(12), 12)
        together = run(engine, [batch[i] for i in order], ignore_eos=True)
        for i, collected in zip(order, together, strict=True):
            assert collected.text == alone[i].text and collected.logprobs == alone[i].logprobs


def test_steps_started_ahead_change_no_text(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, started = prompts(engine, 12), []
    step = DecodeRows.step
    monkeypatch.setattr(DecodeRows, "step", lambda *a, **k: started.append(a[1]) or step(*a, **k))  # type: ignore[func-returns-value]
    found: dict[bool, list[list[Collected]]] = {False: [], True: []}
    steps = {}
    for ahead, texts in found.items():
        started.clear()
        for tokens, options in ((24, {}), (3, {"ignore_eos": True}), (200, {"stops": ("the", "a")})):
            texts.append(run(engine, batch, tokens, ahead=ahead, top_logprobs=None, **options))
        steps[ahead] = len(started)
    assert found[True] == found[False]
    assert steps[True] > steps[False]  # some were for nothing, as their requests had ended


def test_sampled_requests_beside_greedy_ones_and_steps_ahead(engine: Engine) -> None:
    batch, texts = prompts(engine, 8), []
    for ahead in (False, True):
        scheduler, found = Scheduler(engine, rows=4, ahead=ahead), [Collected() for _ in batch]
        for i, (collected, ids) in enumerate(zip(found, batch, strict=True)):
            params = SamplingParams(temperature=0.9 * (i % 3 == 1), seed=i)
            scheduler.submit(Request(ids, collected.take, params, max_new_tokens=8 + 5 * i, ignore_eos=True))
        scheduler.close_when_idle()
        scheduler.run()
        texts.append([collected.text for collected in found])
    assert texts[0] == texts[1]


def test_a_shared_prefix_changes_nothing(engine: Engine) -> None:
    ids = prompts(engine, 3)[0] * 4 + [7, 9, 11]
    assert 130 < len(ids) < 380
    [fresh] = run(engine, [ids], ignore_eos=True)
    scheduler, found, requests = Scheduler(engine, rows=2), [], []
    for prompt in (ids[:-1], ids, [*ids, 5], ids):
        collected = Collected()
        request = Request(prompt, collected.take, max_new_tokens=24, top_logprobs=0, ignore_eos=True)
        scheduler.submit(request)
        found.append(collected)
        requests.append(request)
    scheduler.close_when_idle()
    scheduler.run()
    assert requests[0].reused_tokens == 0
    assert all(request.reused_tokens == (len(ids) - 2) // 64 * 64 for request in (requests[1], requests[3]))
    for i in (1, 3):
        assert found[i].text == fresh.text and found[i].logprobs == fresh.logprobs


def test_seeds_make_a_text_repeatable_beside_others(engine: Engine) -> None:
    batch = prompts(engine, 6)
    hot: dict[str, Any] = {
        "params": SamplingParams(temperature=1.0, top_p=0.9, seed=3, presence_penalty=0.5),
        "ignore_eos": True,
    }
    [alone] = run(engine, batch[:1], **hot)
    assert run(engine, batch, **hot)[0].text == alone.text
    assert run(engine, batch[:1], **{**hot, "params": SamplingParams(temperature=1.0, seed=4)})[0].text != alone.text


def test_first_come_first_served_and_the_queue_has_an_end(tiny_folder: Path) -> None:
    engine = Engine.load(str(tiny_folder), device="cpu", dtype="fp32", sparsity=0.4)
    scheduler, order = Scheduler(engine, rows=2, queue=5), []
    requests = [
        Request(
            ids,
            lambda event, i=i: order.append(i) if isinstance(event, Done) else None,  # type: ignore[misc]
            max_new_tokens=4,
            ignore_eos=True,
        )
        for i, ids in enumerate(prompts(engine, 6))
    ]  # fmt: skip
    for request in requests[:5]:
        scheduler.submit(request)
    with pytest.raises(QueueFull):
        scheduler.submit(requests[5])
    scheduler.close_when_idle()
    scheduler.run()
    assert order == [0, 1, 2, 3, 4]
    with pytest.raises(QueueFull):
        scheduler.submit(requests[5])


def test_cancelled_and_late_requests_end_at_once(tiny_folder: Path) -> None:
    engine = Engine.load(str(tiny_folder), device="cpu", dtype="fp32", sparsity=0.4)
    scheduler = Scheduler(engine)
    ended: list[str] = []
    scheduler.decoder.observer = type(
        "Ends", (Observer,), {"finished": lambda self, request, reason: ended.append(reason)}
    )()
    late, gone = Collected(), Collected()
    first = Request(prompts(engine, 1)[0], gone.take, max_new_tokens=10_000, ignore_eos=True)
    second = Request(
        prompts(engine, 2)[1], late.take, max_new_tokens=10_000, ignore_eos=True, deadline=time.monotonic() + 0.2
    )
    scheduler.submit(first, second)
    scheduler.start()
    while gone.text == "":
        time.sleep(0.005)
    scheduler.cancel(first)
    scheduler.close(10)
    assert gone.end is None and late.end == Done("length") and sorted(ended) == ["cancelled", "length"]
    assert scheduler.load == (0, 0)


def test_a_failing_step_is_told_and_survived(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.load(str(tiny_folder), device="cpu", dtype="fp32", sparsity=0.4, backend="eager")
    scheduler, broken, whole = Scheduler(engine), Collected(), Collected()
    hidden, calls = engine.model.hidden_states, [0]

    def failing(*arguments: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 3:
            raise RuntimeError("no such luck")
        return hidden(*arguments)

    monkeypatch.setattr(engine.model, "hidden_states", failing)
    thread = threading.Thread(target=scheduler.run)
    thread.start()
    scheduler.submit(Request(prompts(engine, 1)[0], broken.take, max_new_tokens=8, ignore_eos=True))
    while broken.end is None:
        time.sleep(0.005)
    scheduler.submit(Request(prompts(engine, 1)[0], whole.take, max_new_tokens=8, ignore_eos=True))
    scheduler.close(20)
    thread.join()
    assert broken.end == Done("error", "RuntimeError: no such luck") and whole.end == Done("length")


def test_the_first_tokens_are_counted_and_no_more(tiny_folder: Path) -> None:
    engine = Engine.load(str(tiny_folder), device="cpu", dtype="fp32", sparsity=0.4)
    [long, short] = prompts(engine, 2)
    scheduler, seen = Scheduler(engine), []
    module = sparse_layers(engine.model)[0][0]

    def look(event: Piece | Done, i: int) -> None:
        seen.append((i, module.state.counting, int(module.seen) // engine.model.config.hidden_size))

    for i, (ids, tokens) in enumerate(((long, 90), (short, 8))):
        emit = functools.partial(look, i=i)
        scheduler.submit(Request(ids, emit, max_new_tokens=tokens, count_sparsity=i == 0, ignore_eos=True))
    scheduler.close_when_idle()
    scheduler.run()
    counted = [count for _, counting, count in seen if counting]
    assert 31 <= max(counted) <= 31 + 8  # steps of the first request, and rows beside it
    assert not module.state.counting and seen[-1] == (0, False, 0) and len(counted) < len(seen) - 20
    assert engine.plan is not None
    for layer, planned in zip(scheduler.decoder.achieved, engine.plan.layers, strict=True):
        assert all(abs(share - planned[name].sparsity) < 0.3 for name, share in layer.items())


def test_prompts_that_cannot_run_are_refused(tiny_folder: Path) -> None:
    engine = Engine.load(str(tiny_folder), device="cpu", dtype="fp32")
    scheduler = Scheduler(engine, context=50)
    for ids, message in (([], "empty"), ([1] * 50, "50 tokens; the context of 50")):
        with pytest.raises(UserError, match=message):
            scheduler.submit(Request(ids, Collected().take))
    request = Request([1] * 45, Collected().take, max_new_tokens=99)
    scheduler.submit(request)
    assert request.max_new_tokens == 5


def test_a_batch_gives_each_prompt_its_text(engine: Engine) -> None:
    batch = prompts(engine, 11)
    params = SamplingParams(temperature=0.7, seed=5)
    texts = generate_batch(engine, batch, params, max_new_tokens=12, stops=("a",))
    assert texts == [generate_batch(engine, [ids], params, max_new_tokens=12, stops=("a",))[0] for ids in batch]
    assert len(set(texts)) > 6 and not any("a" in text for text in texts)
    assert generate_batch(engine, []) == []
    with pytest.raises(UserError, match="empty"):
        generate_batch(engine, [[5], []])


def test_a_batch_says_when_a_step_fails(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.load(str(tiny_folder), device="cpu", dtype="fp32")
    monkeypatch.setattr(engine.model, "hidden_states", lambda *arguments: 1 / 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        generate_batch(engine, prompts(engine, 2), max_new_tokens=4)
