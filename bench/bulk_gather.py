"""The sparse GEMV in CUDA C++ (bulk_gather.cu) beside Triton's, by shape: python -m bench.bulk_gather --model Llama-3-8B

Tells what Triton leaves on the table; nothing else uses the CUDA kernel. Needs nvcc and a GPU of compute capability 9.0.
Both are timed as in bench.gemv, with the sum of the partial sums, and each tile's result is checked against fp64.
"""

import ctypes
import json
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from teal.bench.gemv import ColdWeights, shapes_of, thresholds_for
from teal.bench.steps import graph_microseconds, machine_facts
from teal.cli import command_line as cli
from teal.errors import UserError
from teal.hardware import pick_device
from teal.kernels.reduce_partials import reduce_partials
from teal.kernels.sparse_gemv import launch

SOURCE = Path(__file__).with_suffix(".cu")
SHARED_BYTES = 228 * 1024  # of a multiprocessor
PROGRAM_BYTES = 1024  # the system's own share of it for each program
STAGE_BYTES = 16 * 1024
STAGES = (3, 4, 6)
SPLITS_FOR = (1, 2, 3)  # programs on each multiprocessor


class Tile(NamedTuple):
    """Compile-time sizes of bulk_gather.cu: rows weight rows to a stage, splits shares of the K channels."""

    K: int
    block_n: int
    rows: int
    stages: int
    splits: int


def build_parser() -> cli.Parser:
    """The command line of bench.bulk_gather."""
    parser = cli.Parser("Time a CUDA C++ sparse GEMV on bulk copies beside Triton's, for every projection of a model.")
    group = parser.add_argument_group("what to time")
    group.add_argument("--model", default="Llama-3-8B", type=cli.architecture, help="a known architecture")
    group.add_argument("--sparsity", type=cli.sparsity, default=0.5, help="share of channels dropped")
    return parser


def tiles_for(K: int, N: int, multiprocessors: int) -> list[Tile]:
    """Tiles worth trying: blocks of 1,024 and 2,048 columns, programs that fill the multiprocessors once to thrice."""
    found = []
    for block_n in (1024, 2048):
        if N % block_n:
            continue
        rows = STAGE_BYTES // (2 * block_n)
        for programs in SPLITS_FOR:
            splits = min(programs * multiprocessors // (N // block_n), 128)
            for stages in STAGES:
                owned = -(-K // 16 // splits) * 16 * 8
                if programs * (stages * STAGE_BYTES + owned + PROGRAM_BYTES) <= SHARED_BYTES:
                    found.append(Tile(K, block_n, rows, stages, splits))
    return found


def build(tile: Tile, folder: Path) -> Any:
    """bulk_gather.cu's launch function for this tile. Raises UserError with nvcc's words if it does not compile."""
    library = folder / f"{'_'.join(map(str, tile))}.so"
    sizes = [f"-D{name.upper()}={size}" for name, size in tile._asdict().items()]
    command = ["nvcc", "-O3", "-arch=sm_90a", "-shared", "-Xcompiler", "-fPIC", *sizes, "-o", str(library), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"nvcc: {done.stderr.strip()[:500]}")
    function = ctypes.CDLL(str(library)).launch
    pointer, integer = ctypes.c_void_p, ctypes.c_longlong
    function.argtypes = [pointer, pointer, pointer, integer, pointer, pointer, ctypes.c_int]
    return function


def partial_sums(function: Any, tile: Tile, x: Tensor, weight: Tensor, threshold: Tensor) -> Tensor:
    """x [1, K] bf16, weight [K, N] bf16, threshold fp32 [1]: fp32 [splits, 1, N], as sparse_gemv."""
    N = weight.shape[1]
    partials = torch.empty(tile.splits, 1, N, dtype=torch.float32, device=x.device)
    stream = torch.cuda.current_stream().cuda_stream
    pointers = (t.data_ptr() for t in (x, weight))
    error = function(stream, *pointers, weight.stride(0), threshold.data_ptr(), partials.data_ptr(), N)
    if error:
        raise UserError(f"{tile}: the launch failed with CUDA error {error}")
    return partials


def compare(name: str, K: int, N: int, sparsity: float, folder: Path, device: torch.device) -> dict[str, Any]:
    """Time cuBLAS, Triton's product and every tile of the CUDA one for a shape; prints and returns the row."""
    cold = ColdWeights(K, [N], 1, torch.bfloat16, device)
    threshold = thresholds_for(sparsity, [N], device)
    weights = [w.values for w in cold.weights]
    expected = cold.exact(threshold)
    row: dict[str, Any] = {"projection": name, "K": K, "N": N, "dense_us": cold.dense_us()}
    row["triton_us"] = cold.sparse_us(threshold, [N])
    row["triton_product_us"] = graph_microseconds(
        lambda i: launch(cold.inputs[i], cold.weights[i], threshold, [N]), cold.count
    )
    tiles = tiles_for(K, N, torch.cuda.get_device_properties(device).multi_processor_count)
    with ThreadPoolExecutor() as pool:
        functions = list(pool.map(lambda tile: build(tile, folder), tiles))
    rows = []
    for tile, function in zip(tiles, functions, strict=True):

        def product(i: int, tile: Tile = tile, function: Any = function) -> Tensor:
            return partial_sums(function, tile, cold.inputs[i], weights[i], threshold)

        sums = product(0).sum(0).double()
        error = float((sums - expected).norm() / expected.norm())
        if not error <= 1e-5:
            raise UserError(f"{name} {tile}: relative error {error:.1e} to fp64; expected at most 1e-5")
        us = graph_microseconds(
            lambda i, p=product: reduce_partials(p(i), torch.bfloat16, None, None),  # type: ignore[misc]
            cold.count,
        )
        rows.append((us, graph_microseconds(product, cold.count), tile))
    rows.sort()
    for us, alone, tile in rows[:3]:
        print(f"  {name:8} {tile}: {us:.2f} us, the product alone {alone:.2f}")
    row |= {"cuda_us": rows[0][0], "cuda_product_us": min(r[1] for r in rows), "tile": rows[0][2]._asdict()}
    print(
        f"{name:8} cuBLAS dense {row['dense_us']:.2f} us; Triton {row['triton_us']:.2f} (product alone "
        f"{row['triton_product_us']:.2f}); CUDA C++ {row['cuda_us']:.2f} (product alone {row['cuda_product_us']:.2f})",
        flush=True,
    )
    return row


def main() -> None:
    """Compare every projection; the last line is JSON."""
    args = build_parser().parse_args()
    shapes = shapes_of(args.model, "model")
    device = pick_device("cuda")
    if torch.cuda.get_device_capability(device) < (9, 0):
        raise UserError(f"{torch.cuda.get_device_name(device)} has no bulk copies; expected compute capability 9.0 on")
    if shutil.which("nvcc") is None:
        raise UserError("nvcc is not on the PATH; expected the CUDA toolkit's compiler")
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            compare(name, K, sum(segments), args.sparsity, Path(folder), device)
            for name, (K, segments) in shapes.items()
        ]
    print(json.dumps(machine_facts(device) | {"sparsity": args.sparsity, "rows": rows}))


if __name__ == "__main__":
    cli.run(main)
