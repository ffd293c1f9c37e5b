"""Timing pieces on CUDA that the benchmarks share: graphs with cold weights, steps of several rows, kernel tables."""

import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from typing import Any

import torch
from torch import Tensor

from teal.decoding.backend import Backend
from teal.decoding.cuda_program import PHASES, CudaProgramBackend
from teal.decoding.engine import Engine
from teal.decoding.sampling import argmax_step
from teal.layers.phase import Phase
from teal.model import KVCache
from teal.options import SamplingParams
from teal.plan import Histogram, ProjectionPlan, SparsityPlan
from teal.teal_layers import SparseLinear, sparse_layers

REPEATS = 15


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What a benchmark's JSON says of where and how it ran: device, torch, date, argv."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__, "date": date.today().isoformat(), "argv": sys.argv[1:]}


def graph_microseconds(run: Callable[[int], object], count: int, repeats: int = REPEATS) -> float:
    """Median microseconds of run(i), captured for i = 0 .. count - 1 in one CUDA graph and replayed.

    With other weights for each i, count times their size several times the L2 cache, every run finds them cold.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(min(count, 3)):
            run(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            run(i)
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / count)
    return statistics.median(times)


def wall_microseconds(run: Callable[[int], object], count: int, repeats: int = REPEATS) -> float:
    """As graph_microseconds, by the host's clock, for a CPU."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for i in range(count):
            run(i)
        times.append(1e6 * (time.perf_counter() - start) / count)
    return statistics.median(times)


@torch.inference_mode()
def fitted_plan(
    engine: Engine, plan: SparsityPlan, prompt: list[int], tokens: int = 16, passes: int = 3
) -> SparsityPlan:
    """plan with the thresholds that drop its targets from what decoding after prompt meets.

    For random weights: their attention averages values that have nothing in common. So what reaches the o projection
    shrinks with the length of the text, and thresholds of calibration text would drop too much. Each pass changes what
    later projections meet, hence several.
    """
    for _ in range(passes):
        engine.use_plan(plan)
        histograms: dict[SparseLinear, Histogram] = {}

        def collect(module: SparseLinear, arguments: tuple[Tensor], into: dict[SparseLinear, Histogram]) -> None:
            if module.state.phase is Phase.DECODE:
                into.setdefault(module, Histogram()).add(arguments[0])

        hook = functools.partial(collect, into=histograms)
        hooks = [m.register_forward_pre_hook(hook) for layer in sparse_layers(engine.model) for m in layer]
        with engine.counting():  # which sends the fused backend's tokens through the modules
            for _ in engine.generate(prompt, SamplingParams(), tokens + 1, ignore_eos=True):
                pass
        for handle in hooks:
            handle.remove()
        layers = []
        for modules, layer in zip(sparse_layers(engine.model), plan.layers, strict=True):
            met = {name: histograms[module] for module in modules for name in module.names}
            layers.append({n: ProjectionPlan(p.sparsity, met[n].quantile(p.sparsity)) for n, p in layer.items()})
        plan = replace(plan, layers=tuple(layers))
    return plan


@torch.inference_mode()
def batched_step_s(backend: Backend, batch: int, context: int) -> float:
    """Seconds of one greedy step of batch rows, each after context tokens of its own; on CUDA captured in a graph.

    The prompts are random and go through the model. Rows that shared a text, or a cache of noise, would keep other
    channels than the rows of a server do.
    """
    tokens, positions, cache = _after_prompts(backend, batch, context)

    def step(_: int) -> None:
        if backend.choose(tokens, positions, cache) is None:
            logits = backend.logits(backend.decode(tokens, positions, cache)[:, -1])
            argmax_step(logits, tokens, positions)
        positions.sub_(1)  # about the same step again, after the token it chose

    if tokens.device.type == "cuda":
        return 1e-6 * graph_microseconds(step, 1)
    step(0)
    return 1e-6 * wall_microseconds(step, 1)


def _after_prompts(backend: Backend, batch: int, context: int) -> tuple[Tensor, Tensor, KVCache]:
    """Tokens and positions int64 [batch, 1] of a step after random prompts, and the cache that has these."""
    model = backend.model
    device = model.device
    cache = model.new_cache(batch, context + 8)
    prompts = torch.randint(0, model.config.vocab_size, (batch, context + 1), device=device)
    positions = torch.arange(context, device=device)[None]
    for row in range(batch):
        backend.prefill(prompts[row : row + 1, :-1], positions, cache.part(slice(row, row + 1), None))
    return prompts[:, -1:].contiguous(), torch.full((batch, 1), context, device=device), cache


@torch.inference_mode()
def program_phases(backend: CudaProgramBackend, context: int) -> dict[str, float]:
    """Microseconds of each phase of a layer of the CUDA program, after context tokens, and of the whole layer."""
    tokens, positions, cache = _after_prompts(backend, 1, context)
    # by a graph: beside a launch by the host a layer seemed to take 130 instead of 76 us
    step_us = graph_microseconds(lambda _: backend.decode(tokens, positions, cache), 1)
    backend.stamps = backend.new_stamps()
    backend.decode(tokens, positions, cache)
    stamps, backend.stamps = backend.stamps, None
    return phase_times(stamps, step_us / backend.model.config.num_layers)


def phase_times(stamps: Tensor, layer_us: float) -> dict[str, float]:
    """Mean microseconds of the phases, over layers and blocks, and of a layer, which is layer_us.

    stamps: clocks int64 [layers, 1 + phases, blocks] at the start of a layer and the ends of phases; 0 where a block
    has no part. They are scaled by the mean span of a layer.
    """
    clocks = stamps.double()
    scale = layer_us / float((clocks[:, -1] - clocks[:, 0]).mean())
    found, before = {}, clocks[:, 0]
    for i, name in enumerate(PHASES, start=1):
        here = clocks[:, i]
        found[name] = scale * float((here - before)[here > 0].mean())
        before = torch.where(here > 0, here, before)
    return found | {"a layer": layer_us}


def profile_step(engine: Engine, prompt: list[int], tokens: int = 16) -> dict[str, float]:
    """Microseconds a token spends in each kernel, longest first, by torch.profiler over a stretch of decoding.

    A kernel is charged the time from the end of the one before to its own. Launches overlap (programmatic dependent
    launch), and only so do the figures add up to the step.
    """
    engine.cached_ids = []
    stream = engine.generate(prompt, SamplingParams(), tokens + 8, ignore_eos=True)
    for _ in range(8):
        next(stream)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(tokens - 1):
            next(stream)
        torch.cuda.synchronize()
    stream.close()
    ends = sorted(
        (event.time_range.end, event.name[:70])
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    found: dict[str, float] = {}
    for (before, _), (end, name) in itertools.pairwise(ends):
        found[name] = found.get(name, 0.0) + (end - before) / (tokens - 1)
    return dict(sorted(found.items(), key=lambda item: -item[1]))
