"""Microseconds of the sum over GPUs that share a model: python -m bench.allreduce --tensor-parallel 2

Each way is captured 64 times in one CUDA graph, as a token of a model of 32 layers has it twice a layer. Ours
is exchange_partials.py. On CPUs only torch.distributed's own is there, without a graph.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from teal.bench.steps import graph_microseconds, machine_facts, wall_microseconds
from teal.cli import command_line as cli
from teal.cli.options import add_device_argument, add_tensor_parallel_argument
from teal.cli.ranks import start_ranks
from teal.errors import UserError
from teal.hardware import pick_device
from teal.layers.team import Team, join_team

COUNT = 64  # in one graph


def build_parser() -> cli.Parser:
    """The command line of bench.allreduce."""
    parser = cli.Parser("Time the sum over GPUs that ends a sublayer of a model they share.")
    group = parser.add_argument_group("measurement")
    add_tensor_parallel_argument(group)
    group.add_argument("--values", type=cli.positive_ints, default=(4096, 8192), help="bf16, commas between")
    add_device_argument(group)
    return parser


def ways(team: Team, values: int) -> dict[str, Callable[[int], object]]:
    """What adds up a tensor bf16 [1, values] of each rank, by name."""
    x = torch.zeros(1, values, dtype=torch.bfloat16, device=team.device)
    if team.device.type == "cpu":
        return {"gloo": lambda _: dist.all_reduce(x)}
    import torch.distributed._symmetric_memory as symmetric

    shared = symmetric.empty(values, dtype=x.dtype, device=team.device).zero_()
    symmetric.rendezvous(shared, team.group)
    name = team.group.group_name
    return {
        "NCCL": lambda _: dist.all_reduce(x),
        "one-shot": lambda _: torch.ops.symm_mem.one_shot_all_reduce(shared, "sum", name),
        "ours": lambda _: team.sum(x),
    }


@torch.inference_mode()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Facts about the machine, and a row of microseconds for each number of values."""
    team = join_team(args.tensor_parallel, pick_device(args.device), None)
    team.share_memory(max(args.values))
    time_one = graph_microseconds if team.device.type == "cuda" else wall_microseconds
    rows = []
    for values in args.values:
        found = {}
        for name, run in ways(team, values).items():
            dist.barrier()
            found[name] = time_one(run, COUNT)
        rows.append({"values": values, "us": found})
    return machine_facts(team.device) | {"ranks": args.tensor_parallel, "rows": rows}


def main() -> None:
    """Measure and print; the last line is JSON."""
    args = build_parser().parse_args()
    if args.tensor_parallel < 2:
        raise UserError(f"--tensor-parallel {args.tensor_parallel}: one rank has nothing to add; expected 2 or more")
    start_ranks(args.tensor_parallel, args.device)
    found = measure(args)
    for row in found["rows"]:
        print(f"{row['values']:6} values " + "  ".join(f"{name} {us:.2f} us" for name, us in row["us"].items()))
    print(json.dumps(found))


if __name__ == "__main__":
    cli.run(main)
