"""End-to-end decode speed, dense and sparse in one process, interleaved: python -m bench.decode --sparsities 0,0.5

Every figure is the median over rounds that alternate between the configurations, so that drift of the machine's
clock meets all of them alike. All sparse rows share one model in memory; only its thresholds change. The share is of
the read bandwidth measured just before. With --gguf a llama.cpp runner of the same file (pip install
llama-cpp-python) joins the rounds, on CPU.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from teal.bench.steps import batched_step_s, fitted_plan, machine_facts, profile_step, program_phases
from teal.bench.weights import (
    add_rounding_arguments,
    check_rounding,
    is_fitted,
    load_rounded,
    starting_plan,
    timed_prompt,
)
from teal.calibration.choose import choose_plan
from teal.cli import command_line as cli
from teal.cli.options import add_decode_arguments, model_options
from teal.cli.ranks import start_ranks
from teal.decoding.cuda_program import CudaProgramBackend
from teal.decoding.engine import Engine
from teal.errors import UserError
from teal.hardware import read_bandwidth
from teal.model import ModelConfig
from teal.options import SamplingParams
from teal.plan import SparsityPlan
from teal.teal_layers import achieved_sparsity, weight_bytes_per_token

Runner = Callable[[list[int], int], dict[str, float]]  # prompt, timed tokens -> figures


def build_parser() -> argparse.ArgumentParser:
    """The command line of bench.decode: the model options of generate.py, with a list of sparsities."""
    parser = cli.Parser("Measure decode speed, dense and sparse, interleaved in one process.")
    add_decode_arguments(parser)
    group = parser.add_argument_group("measurement")
    group.add_argument("--sparsities", type=cli.sparsities, default=(0.0, 0.5), help="commas between; 0 is dense")
    group.add_argument("--context", type=cli.positive_int, default=512, help="prompt tokens before the timed ones")
    group.add_argument("--tokens", type=cli.positive_int, default=64, help="timed tokens a round")
    group.add_argument("--rounds", type=cli.positive_int, default=5, help="rounds; the median is reported")
    group.add_argument("--zero-through-sparse", action="store_true", help="also run sparsity 0 by the sparse kernels")
    add_rounding_arguments(group)
    group.add_argument("--batch", type=cli.positive_ints, default=(), help="also time steps of so many rows (CUDA)")
    group.add_argument(
        "--profile",
        action="store_true",
        help="also print the time of each kernel in a step, of a program's phases in a layer (CUDA)",
    )
    group.add_argument("--gguf", type=Path, help="also run this GGUF file by llama-cpp-python, on CPU")
    return parser


class EngineRunner:
    """Rounds of one engine under one plan (None: dense)."""

    def __init__(self, engine: Engine, plan: SparsityPlan | None) -> None:
        self.engine = engine
        self.plan = plan

    def select(self) -> None:
        """Make the engine use this runner's plan."""
        if self.plan is not None and self.engine.plan is not self.plan:
            self.engine.use_plan(self.plan)

    def __call__(self, prompt: list[int], tokens: int) -> dict[str, float]:
        """One prompt from an empty cache and tokens after it: {"tokens_per_s", "first_token_s"}."""
        self.select()
        self.engine.cached_ids = []
        for _ in self.engine.generate(prompt, SamplingParams(), tokens + 1, ignore_eos=True):
            pass
        stats = self.engine.stats
        assert stats.tokens_per_s is not None
        return {"tokens_per_s": stats.tokens_per_s, "first_token_s": stats.first_token_s}

    def weight_traffic(self, prompt: list[int]) -> tuple[float, float]:
        """Bytes of weights a token reads and the average sparsity, counted in an untimed run."""
        self.select()
        model = self.engine.model
        if self.plan is None:
            return weight_bytes_per_token(model), 0.0
        with self.engine.counting():
            self(prompt, 8)
            shares = [share for layer in achieved_sparsity(model) for share in layer.values()]
            return weight_bytes_per_token(model), statistics.mean(shares)


def llama_cpp_round(path: Path, context: int) -> Runner:
    """A runner of a GGUF file by llama-cpp-python. Raises UserError if that is not installed."""
    if find_spec("llama_cpp") is None:
        raise UserError("--gguf needs llama-cpp-python; pip install llama-cpp-python")
    from llama_cpp import Llama

    llama = Llama(str(path), n_ctx=context, n_threads=torch.get_num_threads(), verbose=False)

    def run(prompt: list[int], tokens: int) -> dict[str, float]:
        llama.reset()
        start = time.perf_counter()
        stream = llama.generate(prompt, temp=0.0)
        next(stream)
        first = time.perf_counter()
        for _ in range(tokens):
            next(stream)
        return {"tokens_per_s": tokens / (time.perf_counter() - first), "first_token_s": first - start}

    return run


def build_runners(args: argparse.Namespace, prompt: list[int]) -> dict[str, EngineRunner]:
    """A runner for each sparsity asked for, by label; two engines at most. Raises UserError."""
    check_rounding(args)
    if args.tensor_parallel > 1 and (args.batch or args.profile):
        raise UserError("--tensor-parallel does not go with --batch and --profile, which time one device")
    start_ranks(args.tensor_parallel, args.device)
    runners: dict[str, EngineRunner] = {}
    if 0.0 in args.sparsities and args.quant is None:
        dense = model_options(args, sparsity=0.0, plan=None)
        runners["dense"] = EngineRunner(Engine.load(dense), None)
    targets = [target for target in args.sparsities if target > 0]
    if not targets and not args.zero_through_sparse and args.quant is None:
        return runners
    options, loaded = model_options(args), load_rounded(args)
    plans = {f"{target:.0%} sparse": starting_plan(loaded, target, args) for target in targets}
    if args.quant is not None and 0.0 in args.sparsities:  # quantized weights have one kernel for all sparsities
        plans = {"dense": choose_plan(loaded, 0.0, None)} | plans
    elif args.zero_through_sparse:
        plans = {"0% by sparse kernels": choose_plan(loaded, 0.0, None)} | plans
    engine = Engine.from_loaded(loaded, next(iter(plans.values())), options.compile, options.backend)
    if is_fitted(args) and not engine.follows:
        plans = {label: fitted_plan(engine, plan, prompt) for label, plan in plans.items()}
    return runners | {label: EngineRunner(engine, plan) for label, plan in plans.items()}


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], ModelConfig]:
    """What the command line asks for: facts about the machine with a row for each configuration, and the model's."""
    prompt = timed_prompt(args.context)
    runners = build_runners(args, prompt)
    engine = next(iter(runners.values())).engine
    if engine.follows:
        engine.follow()
        raise SystemExit(0)
    device = engine.device
    ceiling = read_bandwidth(device)
    timed: dict[str, Runner] = dict(runners)
    if args.gguf is not None:
        timed["llama.cpp"] = llama_cpp_round(args.gguf, args.context + args.tokens + 8)
    rounds: dict[str, list[dict[str, float]]] = {label: [] for label in timed}
    for i in range(args.rounds + 1):
        for label, run in timed.items():
            result = run(prompt, args.tokens)
            if i:  # the first round warms up
                rounds[label].append(result)
    rows = [row_of(label, results, runners.get(label), prompt) for label, results in rounds.items()]
    if device.type == "cuda":
        add_gpu_figures(args, rows, runners, prompt)
    config = next(iter(runners.values())).engine.model.config
    return machine_facts(device) | {"read_gb_per_s": ceiling / 1e9, "rows": rows}, config


def main() -> None:
    """Measure and print a table; the last line is JSON."""
    found, _ = measure(build_parser().parse_args())
    print_table(found["rows"], 1e9 * found["read_gb_per_s"])
    print(json.dumps(found))


def row_of(
    label: str, results: list[dict[str, float]], runner: EngineRunner | None, prompt: list[int]
) -> dict[str, Any]:
    """Medians of a runner's rounds, with what it reads."""
    row: dict[str, Any] = {name: statistics.median(r[name] for r in results) for name in results[0]}
    row["label"] = label
    if runner is not None:
        engine = runner.engine
        row["dtype"] = str(engine.dtype).removeprefix("torch.")
        row |= {"load_s": engine.load_s, "compile_s": engine.compile_s}
        bytes_read, row["sparsity"] = runner.weight_traffic(prompt)
        row["gb_per_s"] = bytes_read * row["tokens_per_s"] / 1e9
    return row


def add_gpu_figures(
    args: argparse.Namespace, rows: list[dict[str, Any]], runners: dict[str, EngineRunner], prompt: list[int]
) -> None:
    """Steps of several rows, and the per-kernel table, where asked for."""
    for row in rows:
        runner = runners[row["label"]]
        runner.select()
        backend = runner.engine.backend
        row["batch_step_ms"] = {rows: 1e3 * batched_step_s(backend, rows, args.context) for rows in args.batch}
        if args.profile:
            row["kernels_us"] = profile_step(runner.engine, prompt)
        if args.profile and isinstance(backend, CudaProgramBackend):
            row["phases_us"] = program_phases(backend, args.context)


def print_table(rows: list[dict[str, Any]], ceiling: float) -> None:
    """rows as aligned text, with each speed over the first row's."""
    print(f"read bandwidth {ceiling / 1e9:.1f} GB/s")
    print(f"{'':22}{'tok/s':>8}{'ratio':>7}{'first token':>13}{'load':>8}{'compile':>9}{'GB/s':>8}{'share':>7}  dtype")
    for row in rows:
        line = f"{row['label']:22}{row['tokens_per_s']:8.1f}{row['tokens_per_s'] / rows[0]['tokens_per_s']:7.2f}"
        line += f"{1e3 * row['first_token_s']:10.1f} ms"
        if "load_s" in row:
            line += f"{row['load_s']:6.2f} s{row['compile_s']:7.1f} s{row['gb_per_s']:8.1f}"
            line += f"{1e9 * row['gb_per_s'] / ceiling:7.0%}  {row['dtype']}"
        print(line)
        for rows_at_once, milliseconds in row.get("batch_step_ms", {}).items():
            speed = 1e3 * rows_at_once / milliseconds
            print(f"{'':22}{rows_at_once} rows a step: {milliseconds:.3f} ms, {speed:.1f} tok/s")
        for name, microseconds in (row.get("kernels_us", {}) | row.get("phases_us", {})).items():
            print(f"{'':22}{microseconds:9.1f} us  {name}")


if __name__ == "__main__":
    cli.run(main)
