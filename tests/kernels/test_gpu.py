"""On a CUDA device: the same model as on a CPU, the captured step as the eager one, and the same bits every run."""

import functools
import gc
import math
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from teal.checkpoint.weights import load_model
from teal.decoding.engine import Engine
from teal.decoding.requests import Done, Piece, Request
from teal.decoding.rows import CACHE_STEP
from teal.decoding.scheduler import Scheduler
from teal.decoding.speculation import SpeculativeEngine
from teal.layers.phase import decoding
from teal.model import KVCache, attend
from teal.options import DraftOptions, ModelOptions, SamplingParams
from tests.conftest import assert_one_line_error, relative_error, save_uniform_plan

pytestmark = pytest.mark.gpu
PROMPT = [5, 9, 33, 120, 7, 250, 61]
SAMPLED = SamplingParams(temperature=1.2, top_k=100, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=3)


def tokens(
    engine: Engine, ids: list[int] = PROMPT, count: int = 40, params: SamplingParams = SamplingParams()
) -> list[int]:
    return list(engine.generate(ids, params, max_new_tokens=count, ignore_eos=True))


def test_logits_equal_the_cpus(tiny_folder: Path) -> None:
    ids = torch.randint(0, 300, (1, 60), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(60)[None]
    results = []
    for device in map(torch.device, ("cpu", "cuda")):
        model = load_model(tiny_folder, device, torch.float32)
        cache = KVCache(model.config, 1, 64, device, torch.float32)
        with torch.inference_mode():
            parts = [model(ids[:, :20].to(device), positions[:, :20].to(device), cache)]
            with decoding(model):
                for i in range(20, 60):
                    parts.append(model(ids[:, i : i + 1].to(device), positions[:, i : i + 1].to(device), cache))
        results.append(torch.cat(parts, dim=1).cpu())
    assert relative_error(results[1], results[0]) <= 1e-5, "logits"


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("length", [64, 777, 4096])
def test_decode_attention_is_as_accurate_as_its_dtype(rows: int, length: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, 8, n, 128, device="cuda", generator=generator) for n in (rows, length, length))
    q, k, v = (4 * q).bfloat16(), k.bfloat16(), v.bfloat16()  # scores of real models are large, too
    mask = torch.rand(1, 1, rows, length, device="cuda", generator=generator) < 0.9
    scores = (q.double() @ k.double().mT / math.sqrt(128)).masked_fill(~mask, -math.inf)
    expected = scores.softmax(-1) @ v.double()
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    error = relative_error(attend(q, k, v, mask), expected)
    assert error <= 1.5 * relative_error(fused, expected), "attention output"


@pytest.mark.parametrize("sparsity,kv_cache", [(0.0, "float"), (0.5, "float"), (0.0, "int8"), (0.5, "int8")])
def test_graph_equals_eager(tiny_folder: Path, tmp_path: Path, sparsity: float, kv_cache: str) -> None:
    plan = save_uniform_plan(tiny_folder, sparsity, tmp_path / "plan.json", "cuda") if sparsity else None
    options: dict[str, Any] = {"device": "cuda", "dtype": "fp32", "plan": plan, "kv_cache": kv_cache}
    eager = Engine.load(str(tiny_folder), **options, compile=False)
    graph = Engine.load(str(tiny_folder), **options, compile=True)
    assert graph.use_graph and not eager.use_graph
    for ids in (PROMPT, [i % 290 + 5 for i in range(CACHE_STEP - 10)]):  # the second grows the cache while decoding
        assert tokens(graph, ids) == tokens(eager, ids)
    assert graph.decoder.rows.graphs


@pytest.mark.parametrize("how", ["sparse", "int4", "lookup"])
def test_speculative_rounds_in_graphs_give_the_dense_text(quantizable_folder: Path, how: str) -> None:
    options: dict[str, Any] = {"device": "cuda", "dtype": "fp32", "compile": True}
    dense = Engine.load(str(quantizable_folder), **options)
    if how == "lookup":
        engine = SpeculativeEngine.load(str(quantizable_folder), **options)
        engine.look_up(4)
    else:
        quant = "int4" if how == "int4" else None
        engine = SpeculativeEngine.load_with_draft(
            ModelOptions(str(quantizable_folder), **options), DraftOptions(length=4, quant=quant)
        )
    for ids in (PROMPT, [i % 290 + 5 for i in range(CACHE_STEP - 10)]):
        assert tokens(engine, ids, 60) == tokens(dense, ids, 60)
        assert 0 < engine.stats.accepted_tokens <= engine.stats.drafted_tokens
    assert engine.decoder.rows.graphs
    texts = []
    for _ in range(2):
        engine.cached_ids = []
        texts.append(tokens(engine, params=SAMPLED))
    assert texts[0] == texts[1] != tokens(dense)


def test_a_server_drafts_in_graphs(tiny_folder: Path) -> None:
    options: dict[str, Any] = {"device": "cuda", "dtype": "fp32"}
    eager, _ = answers_of(Engine.load(str(tiny_folder), **options, compile=False), ahead=False)
    model = ModelOptions(str(tiny_folder), **options, compile=True)
    engine = SpeculativeEngine.load_with_draft(model, DraftOptions(length=3, sparsity=0.4))
    drafted, _ = answers_of(engine, ahead=True)
    assert [text for i, text in enumerate(drafted) if i != 5] == [text for i, text in enumerate(eager) if i != 5]


def test_penalty_and_filters_work_inside_the_graph(tiny_folder: Path) -> None:
    engine = Engine.load(str(tiny_folder), device="cuda", dtype="fp32", compile=True)
    text = tokens(engine, count=60, params=SamplingParams(repetition_penalty=1e6))
    assert len(set(text)) == 60 and not set(text) & set(PROMPT)
    assert tokens(engine, params=replace(SAMPLED, top_k=1, repetition_penalty=1.0)) == tokens(engine)


def test_seed_decides_inside_the_graph(tiny_folder: Path) -> None:
    engine = Engine.load(str(tiny_folder), device="cuda", dtype="bf16", compile=True)
    first = tokens(engine, params=SAMPLED)
    assert tokens(engine, params=SAMPLED) == first
    assert tokens(engine, params=replace(SAMPLED, seed=4)) != first
    again = Engine.load(str(tiny_folder), device="cuda", dtype="bf16", compile=True)
    assert tokens(again, params=SAMPLED) == first


def test_same_text_every_run(tiny_folder: Path) -> None:
    engine = Engine.load(str(tiny_folder), device="cuda", dtype="bf16", compile=True, sparsity=0.5)
    first = tokens(engine, count=100)
    for _ in range(20):
        engine.cached_ids = []
        assert tokens(engine, count=100) == first


def test_random_weights_are_made_on_the_device() -> None:
    engine = Engine.load(random_weights="SmolLM2-135M", device="cuda", compile=False)
    assert engine.dtype == torch.bfloat16 and engine.model.embedding.weight.is_cuda
    assert len(tokens(engine, count=5)) == 5


def answers_of(engine: Engine, ahead: bool) -> tuple[list[str], int]:
    """Texts of nine requests, four at once, and how many graphs they left. Rows join and leave, the cache grows."""
    scheduler, texts = Scheduler(engine, rows=4, ahead=ahead), [""] * 9

    def take(event: Piece | Done, i: int) -> None:
        assert not isinstance(event, Done) or event.error is None
        texts[i] += event.text if isinstance(event, Piece) else ""

    for i in range(9):
        ids = [(7 * i + j) % 290 + 5 for j in range(10 + 35 * i)]
        params = SamplingParams(temperature=0.8 * (i == 5), seed=i)
        emit = functools.partial(take, i=i)
        scheduler.submit(Request(ids, emit, params, max_new_tokens=10 + 8 * i, ignore_eos=True))
    scheduler.close_when_idle()
    scheduler.run()
    return texts, len(scheduler.decoder.rows.graphs)


def test_rows_by_graphs_started_ahead_equal_eager_ones(tiny_folder: Path) -> None:
    options: dict[str, Any] = {"device": "cuda", "dtype": "fp32", "sparsity": 0.5}
    eager, _ = answers_of(Engine.load(str(tiny_folder), **options, compile=False), ahead=False)
    graphs, count = answers_of(Engine.load(str(tiny_folder), **options, compile=True), ahead=True)
    assert graphs == eager and all(eager) and count == 4


@contextmanager
def memory_left(megabytes: int) -> Iterator[None]:
    """Within the block this process may take so much more of the GPU's memory."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 1e6 * megabytes) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_out_of_memory_is_one_line_and_the_process_goes_on(tiny_folder: Path, invoke: Any) -> None:
    options = ("--prompt", "1 2 3", "--max-new-tokens", "4", "--device", "cuda", "--no-compile")
    with memory_left(100):  # the weights alone are 270 MB
        code, _, err = invoke("--random-weights", "SmolLM2-135M", *options)
        assert_one_line_error(code, err, "out of memory", "shorter context")
        assert invoke("--checkpoint", tiny_folder, *options)[0] == 0
    assert invoke("--random-weights", "SmolLM2-135M", *options)[0] == 0


def test_a_server_outlives_a_request_that_needs_too_much_memory() -> None:
    engine = Engine.load(random_weights="SmolLM2-135M", device="cuda", compile=False)
    scheduler, ends = Scheduler(engine, rows=2), []
    thread = threading.Thread(target=scheduler.run)

    def ask(length: int) -> Done:
        found: queue.Queue[Piece | Done] = queue.Queue()
        scheduler.submit(Request([5 + i % 100 for i in range(length)], found.put, max_new_tokens=4, ignore_eos=True))
        while not isinstance(event := found.get(timeout=60), Done):
            pass
        return event

    thread.start()
    try:
        ends.append(ask(100))
        with memory_left(50):  # 8,000 positions of two rows are 740 MB
            ends += [ask(8000), ask(100)]
        ends.append(ask(8000))
    finally:
        scheduler.close(10)
        thread.join()
    assert [end.finish_reason for end in ends] == ["length", "error", "length", "length"]
    assert "memory" in str(ends[1].error)
