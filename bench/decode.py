"""End-to-end decode speed, dense and sparse in one process, interleaved: python -m bench.decode --sparsities 0,0.5

Every figure is the median over rounds that alternate between the configurations, so that drift of the
machine's clock meets all of them alike. The share is of the read bandwidth measured just before. With
--gguf a llama.cpp runner of the same file (pip install llama-cpp-python) joins the rounds, on CPU.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import cli
from engine import Engine, weight_bytes_per_token
from errors import UserError
from generate import add_decode_arguments
from hardware import read_bandwidth
from params import SamplingParams
from teal_layers import set_counting

Runner = Callable[[list[int], int], dict[str, float]]  # prompt, timed tokens -> figures


def build_parser() -> argparse.ArgumentParser:
    """The command line of bench.decode: the model options of generate.py, with a list of sparsities."""
    parser = cli.Parser("Measure decode speed, dense and sparse, interleaved in one process.")
    add_decode_arguments(parser)
    parser.add_argument("--sparsities", default="0,0.5", help="comma-separated; 0 is dense")
    parser.add_argument("--context", type=cli.positive_int, default=512, help="prompt tokens before the timed ones")
    parser.add_argument("--tokens", type=cli.positive_int, default=64, help="timed tokens a round")
    parser.add_argument("--rounds", type=cli.positive_int, default=5, help="rounds; the median is reported")
    parser.add_argument("--gguf", type=Path, help="also run this GGUF file by llama-cpp-python, on CPU")
    return parser


def engine_round(engine: Engine, prompt: list[int], tokens: int) -> dict[str, float]:
    """One prompt from an empty cache and tokens after it: {"tokens_per_s", "first_token_s"}."""
    engine.cached_ids = []
    for _ in engine.generate(prompt, SamplingParams(), tokens + 1, ignore_eos=True):
        pass
    assert engine.stats.tokens_per_s is not None
    return {"tokens_per_s": engine.stats.tokens_per_s, "first_token_s": engine.stats.first_token_s}


def llama_cpp_round(path: Path, context: int) -> Runner:
    """A function like engine_round that runs a GGUF file by llama-cpp-python. Raises UserError if not installed."""
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


def build_engines(args: argparse.Namespace) -> dict[str, Engine]:
    """An engine for each sparsity asked for, by label."""
    engines = {}
    for text in args.sparsities.split(","):
        sparsity = cli.sparsity(text)
        engines[f"{sparsity:.0%} sparse" if sparsity else "dense"] = Engine.load(
            args.checkpoint,
            random_weights=args.random_weights,
            sparsity=sparsity,
            plan=args.plan if sparsity else None,
            device=args.device,
            dtype=args.dtype,
            compile=args.compile,
        )
    return engines


def weight_traffic(engine: Engine, prompt: list[int]) -> float:
    """Bytes of weights a token reads, counted in an untimed run (counting would slow the timed ones)."""
    if engine.plan is None or engine.use_graph:  # rows are skipped on CPU only
        return weight_bytes_per_token(engine.model)
    set_counting(engine.model, True)
    engine_round(engine, prompt, 8)
    bytes_read = weight_bytes_per_token(engine.model)
    set_counting(engine.model, False)
    return bytes_read


def main() -> None:
    """Measure and print a table; the last line is JSON."""
    args = build_parser().parse_args()
    engines = build_engines(args)
    first = next(iter(engines.values()))
    ceiling = read_bandwidth(first.device)
    prompt = [1000 + i % 1000 for i in range(args.context)]
    runners: dict[str, Runner] = {label: partial(engine_round, engine) for label, engine in engines.items()}
    if args.gguf is not None:
        runners["llama.cpp"] = llama_cpp_round(args.gguf, args.context + args.tokens + 8)
    rounds: dict[str, list[dict[str, float]]] = {label: [] for label in runners}
    for i in range(args.rounds + 1):
        for label, run in runners.items():
            result = run(prompt, args.tokens)
            if i:  # the first round warms up
                rounds[label].append(result)
    rows = []
    for label, results in rounds.items():
        row: dict[str, Any] = {name: statistics.median(r[name] for r in results) for name in results[0]}
        row["label"] = label
        if label in engines:
            row["dtype"] = str(engines[label].dtype).removeprefix("torch.")
            row |= {"load_s": engines[label].load_s, "compile_s": engines[label].compile_s}
            row["gb_per_s"] = weight_traffic(engines[label], prompt) * row["tokens_per_s"] / 1e9
        rows.append(row)
    print_table(rows, ceiling)
    device = torch.cuda.get_device_name(first.device) if first.device.type == "cuda" else "cpu"
    facts = {"device": device, "torch": torch.__version__, "date": date.today().isoformat(), "argv": sys.argv[1:]}
    print(json.dumps(facts | {"read_gb_per_s": ceiling / 1e9, "rows": rows}))


def print_table(rows: list[dict[str, Any]], ceiling: float) -> None:
    """rows as aligned text, with each speed over the first row's."""
    print(f"read bandwidth {ceiling / 1e9:.1f} GB/s")
    print(f"{'':14}{'tok/s':>8}{'ratio':>7}{'first token':>13}{'load':>8}{'compile':>9}{'GB/s':>8}{'share':>7}  dtype")
    for row in rows:
        line = f"{row['label']:14}{row['tokens_per_s']:8.1f}{row['tokens_per_s'] / rows[0]['tokens_per_s']:7.2f}"
        line += f"{1e3 * row['first_token_s']:10.1f} ms"
        if "load_s" in row:
            line += f"{row['load_s']:6.2f} s{row['compile_s']:7.1f} s{row['gb_per_s']:8.1f}"
            line += f"{1e9 * row['gb_per_s'] / ceiling:7.0%}  {row['dtype']}"
        print(line)


if __name__ == "__main__":
    cli.run(main)
