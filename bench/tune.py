"""Find the fastest tile of each projection on this GPU and keep it: python -m bench.tune --model Llama-3-8B

Times are those of bench.gemv: compaction, product and sum, with cold weights. The winners go to the user's
configuration folder (kernels/gemv/tuning.py), beside those of other shapes and devices that are there already.
"""

import json
from dataclasses import asdict
from typing import Any

import torch
import triton

from teal.bench.gemv import ColdWeights, shapes_of, thresholds_for
from teal.cli import command_line as cli
from teal.errors import UserError
from teal.files import atomic_file
from teal.hardware import pick_device
from teal.kernels.gemv.tuning import MAX_SPLITS, GemvTile, default_tile, user_tiles, user_tiles_path
from teal.layers.quantized_linear import BITS
from teal.options import QUANTS

QUANTIZED_PROGRAMS_PER_MULTIPROCESSOR = (1, 1.5, 2, 3, 6)  # of four warps; no more than 3 run at once
PROGRAMS_PER_MULTIPROCESSOR = (1, 2, 4)  # more cost more in starts and partial sums than they hide


def build_parser() -> cli.Parser:
    """The command line of bench.tune."""
    parser = cli.Parser("Time tiles of the sparse GEMV on this GPU and keep the fastest for each shape.")
    group = parser.add_argument_group("what to tune")
    group.add_argument(
        "--model", type=cli.architecture, default="Llama-3-8B", help="known architecture whose projections to tune"
    )
    group.add_argument("--sparsity", type=cli.sparsity, default=0.5, help="sparsity to tune for")
    group.add_argument("--quant", choices=QUANTS, help="tune for weights of 8 or 4 bits")
    group.add_argument("--device", default="cuda", help="cuda or cuda:N")
    return parser


def candidates(K: int, segments: list[int], multiprocessors: int, bits: int) -> list[GemvTile]:
    """Tiles worth timing for weight [K, sum(segments)], the rule's first."""
    tiles = [default_tile(K, sum(segments), 1, multiprocessors, bits)]
    if bits < 16:
        for warps in (2, 4, 8):
            block_n = warps * 1024 // bits
            blocks = sum(triton.cdiv(n, block_n) for n in segments)
            for programs in QUANTIZED_PROGRAMS_PER_MULTIPROCESSOR:
                splits = max(
                    1, min(round(4 * programs * multiprocessors / warps) // blocks, triton.cdiv(K, 32), MAX_SPLITS)
                )
                tiles.append(GemvTile(block_n, 4, 4, splits, warps))
        return list(dict.fromkeys(tiles))
    for block_n in (512, 1024, 2048):
        blocks = sum(triton.cdiv(n, block_n) for n in segments)
        for programs in PROGRAMS_PER_MULTIPROCESSOR:
            splits = max(1, min(round(programs * multiprocessors / blocks), triton.cdiv(K, 32), MAX_SPLITS))
            tiles += [GemvTile(block_n, 1, unroll, splits, block_n // 256) for unroll in (4, 8)]
    return list(dict.fromkeys(tiles))


def fastest(cold: ColdWeights, segments: list[int], sparsity: float, multiprocessors: int) -> GemvTile:
    """The candidate with the least time; prints each."""
    thresholds = thresholds_for(sparsity, segments, cold.floats[0].device)
    times = {}
    for tile in candidates(cold.K, segments, multiprocessors, cold.bits):
        times[tile] = cold.sparse_us(thresholds, segments, tile)
        print(f"  {times[tile]:9.2f} us  {tile}", flush=True)
    return min(times, key=lambda tile: times[tile])


def keep(found: dict[tuple[str, int, int, int], GemvTile]) -> None:
    """Write the user's tiles, with these in place of older ones."""
    path = user_tiles_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = [
        {"device": device, "bits": bits, "K": K, "N": N, "tile": asdict(tile)}
        for (device, bits, K, N), tile in sorted((user_tiles() | found).items())
    ]
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    user_tiles.cache_clear()


def main() -> None:
    """Tune every projection of a model; the last line is JSON."""
    args = build_parser().parse_args()
    shapes = shapes_of(args.model, "model")
    device = pick_device(args.device)
    if device.type != "cuda":
        raise UserError(f"--device {args.device}: tiles are those of CUDA kernels; expected cuda")
    properties = torch.cuda.get_device_properties(device)
    bits = BITS[args.quant] if args.quant else 16
    found: dict[tuple[str, int, int, int], GemvTile] = {}
    for name, (K, segments) in shapes.items():
        print(f"{name}: {K} x {sum(segments)}")
        cold = ColdWeights(K, segments, 1, torch.bfloat16, device, bits)
        tile = fastest(cold, segments, args.sparsity, properties.multi_processor_count)
        found[properties.name, bits, K, sum(segments)] = tile
        del cold
    keep(found)
    print(json.dumps({"path": str(user_tiles_path()), "tiles": len(found)}))


if __name__ == "__main__":
    cli.run(main)
