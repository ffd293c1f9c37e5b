"""A step of one row by several backends, in turn on the same weights: python -m bench.backends --sparsities 0,0.5

Each figure is the median over rounds of a whole greedy step after a prompt: embedding, blocks, head and argmax. On CUDA
steps are captured in a graph. Beside a step stands its speed over the first backend's.
"""

import argparse
import json
import statistics
from typing import Any

from teal.bench.steps import batched_step_s, fitted_plan, machine_facts, program_phases
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
from teal.cli.options import add_decode_arguments
from teal.decoding.backend import Backend
from teal.decoding.backends import choose_backend
from teal.decoding.cuda_program import CudaProgramBackend
from teal.decoding.engine import Engine
from teal.errors import UserError
from teal.options import BACKENDS


def build_parser() -> cli.Parser:
    """The command line of bench.backends."""
    parser = cli.Parser("Measure a step of one row by several backends, in turn on the same weights.")
    add_decode_arguments(parser)
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--backends", type=lambda text: tuple(text.split(",")), default=("fused", "program"), help="commas between"
    )
    group.add_argument("--sparsities", type=cli.sparsities, default=(0.0, 0.5), help="commas between; 0 is dense")
    group.add_argument("--contexts", type=cli.positive_ints, default=(512,), help="prompt tokens before the step")
    group.add_argument("--rounds", type=cli.positive_int, default=3, help="rounds; the median is reported")
    group.add_argument("--profile", action="store_true", help="also time the phases of a CUDA program's layer")
    add_rounding_arguments(group)
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Facts about the machine, and a row for each sparsity and context. Raises UserError for odd options."""
    check_rounding(args)
    if args.tensor_parallel > 1:
        raise UserError("--tensor-parallel does not go with bench.backends, which times one device")
    if args.backend != "auto":
        raise UserError(f"--backend {args.backend} means nothing here; name all of them by --backends")
    for name in args.backends:
        if name not in BACKENDS or name == "auto":
            known = ", ".join(other for other in BACKENDS if other != "auto")
            raise UserError(f"--backends {name} is unknown; expected some of {known}")
    loaded = load_rounded(args)
    limit = loaded.model.config.max_seq_len
    if (longest := max(args.contexts)) >= limit:
        raise UserError(f"--contexts {longest} is too long; expected less than the model's context of {limit}")
    plans = [choose_plan(loaded, 0.0, None) if not t else starting_plan(loaded, t, args) for t in args.sparsities]
    engine = Engine.from_loaded(loaded, plans[0], args.compile, args.backends[0])
    others = {name: choose_backend(engine.model, args.compile, name) for name in args.backends[1:]}
    backends = {args.backends[0]: engine.backend} | others
    rows = []
    for target, plan in zip(args.sparsities, plans, strict=True):
        for context in args.contexts:
            if target and is_fitted(args):
                plan = fitted_plan(engine, plan, timed_prompt(context))
            engine.use_plan(plan)
            rows.append({"sparsity": target, "context": context, **steps(backends, context, args)})
            print_row(rows[-1])
    return machine_facts(engine.device) | {"rows": rows}


def steps(backends: dict[str, Backend], context: int, args: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds of a step by each backend, and microseconds of a program's phases."""
    times: dict[str, list[float]] = {name: [] for name in backends}
    for _ in range(args.rounds):
        for name, backend in backends.items():
            times[name].append(1e3 * batched_step_s(backend, 1, context))
    row: dict[str, Any] = {"step_ms": {name: statistics.median(found) for name, found in times.items()}}
    for backend in backends.values():
        if args.profile and isinstance(backend, CudaProgramBackend):
            row["phases_us"] = program_phases(backend, context)
    return row


def print_row(row: dict[str, Any]) -> None:
    """A line, and one for each phase."""
    first = next(iter(row["step_ms"].values()))
    found = [f"{name} {1e3 / ms:.1f} tok/s ({first / ms:.2f}x)" for name, ms in row["step_ms"].items()]
    print(f"{row['sparsity']:4.0%} after {row['context']:,}:  " + "  ".join(found), flush=True)
    for name, us in row.get("phases_us", {}).items():
        print(f"{us:10.1f} us  {name}")


def main() -> None:
    """Measure and print a line for each step; the last line is JSON."""
    print(json.dumps(measure(build_parser().parse_args())))


if __name__ == "__main__":
    cli.run(main)
