"""Sparse GEMV by shape, sparsity and dtype, beside cuBLAS: python -m bench.gemv --models Llama-3-8B

A figure is the median of replays of a CUDA graph. It takes several copies of the weights in turn, so that each product
finds them outside the L2 cache. It covers the comparison with the threshold, the compaction, the product and the sum
of the partial sums. x and the result are vectors of the dtype, as for cuBLAS. Each result is checked against fp64.
With --device cpu the product is the CPU's, beside torch's own, by the host's clock.
"""

import argparse
import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teal.bench.steps import graph_microseconds, machine_facts, wall_microseconds
from teal.checkpoint.presets import find_preset
from teal.cli import command_line as cli
from teal.errors import UserError
from teal.hardware import DTYPES, pick_device, read_bandwidth
from teal.kernels.formats.packing import GROUP_SIZES, Weight, dequantize
from teal.kernels.gemv.tuning import GemvTile
from teal.kernels.reduce_partials import reduce_partials
from teal.kernels.sparse_gemv import launch
from teal.kernels.sparse_linear import sparse_linear
from teal.layers.quantized_linear import BITS, round_in_two_terms, round_input_groups, round_to_nearest
from teal.model import ModelConfig
from teal.options import MAX_ROWS, QUANTS

DEFAULT_MODELS = "Llama-2-7B,Llama-2-13B,Llama-2-70B,Llama-3-8B,Llama-3-70B,Mistral-7B,Qwen2.5-7B"
COLD_BYTES = 600_000_000  # of weight copies: over ten times an H100's L2 cache
MAX_COPIES = 40


def build_parser() -> cli.Parser:
    """The command line of bench.gemv."""
    parser = cli.Parser("Time the sparse GEMV of every projection, compaction and reduction included, beside cuBLAS.")
    group = parser.add_argument_group("what to time")
    group.add_argument("--models", default=DEFAULT_MODELS, help="known architectures, commas between")
    sparsities = (0.0, 0.25, 0.4, 0.5, 0.65, 0.8)
    group.add_argument("--sparsities", type=cli.sparsities, default=sparsities, help="commas between")
    group.add_argument("--dtypes", default="bf16", help="of bf16, fp16, fp32; commas between")
    group.add_argument("--quant", choices=QUANTS, help="weights of 8 or 4 bits; dense stays in floats")
    group.add_argument(
        "--refined", type=cli.positive_int, metavar="N", help="with int4: beside it, with every N-th channel in 8 bits"
    )
    add_input_groups(group)
    group.add_argument("--rows", type=cli.positive_int, default=1, help=f"rows of x, 1 to {MAX_ROWS}")
    group.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    return parser


def add_input_groups(group: argparse._ArgumentGroup) -> None:
    """The option --input-groups, which bench.decode has too."""
    group.add_argument("--input-groups", action="store_true", help="with --quant: groups along the input, as AWQ's")


def check_refined(args: argparse.Namespace) -> None:
    """Raise UserError if --refined is given for other weights than those of 4 bits with groups along the output."""
    if args.refined and (args.quant != "int4" or args.input_groups):
        raise UserError("--refined means channels of int4 weights; add --quant int4, without --input-groups")


def check_input_groups(args: argparse.Namespace) -> None:
    """Raise UserError if that option is given without --quant."""
    if args.input_groups and args.quant is None:
        raise UserError("--input-groups without --quant means nothing; add --quant int8 or int4")


def shapes_of(model: str, parameter: str = "models") -> dict[str, tuple[int, list[int]]]:
    """(K, segments) of each projection of a known architecture. Raises UserError for an unknown one."""
    return projection_shapes(find_preset(model, parameter))


def projection_shapes(c: ModelConfig) -> dict[str, tuple[int, list[int]]]:
    """(K, segments) of each projection of an architecture."""
    return {p.name: (p.in_features, list(p.sizes)) for p in c.projections()}


class ColdWeights:
    """Copies of a random weight [K, N], floats or of 8 or 4 bits, and inputs [B, K], enough to defeat the L2 cache.

    N is the sum of segments. refined: of 4 bits, how many channels have second rows, the first ones. Raises UserError
    if bits are below 16 and no group size divides all of the segments, or K where groups lie along the input.
    """

    def __init__(
        self,
        K: int,
        segments: list[int],
        B: int,
        dtype: torch.dtype,
        device: torch.device,
        bits: int = 16,
        input_groups: bool = False,
        refined: int = 0,
    ) -> None:
        N = sum(segments)
        generator = torch.Generator(device).manual_seed(0)
        options: dict[str, Any] = {"device": device, "dtype": dtype, "generator": generator}
        self.K, self.bits = K, bits
        self.count = _copies(K * N * dtype.itemsize)
        self.floats = [torch.randn(K, N, **options) for _ in range(self.count)]
        self.weights = [Weight(weight) for weight in self.floats]
        if bits < 16:
            group_size = largest_group_size([K] if input_groups else segments)
            if input_groups:
                packed = [Weight(*round_input_groups(w.t().contiguous(), bits, group_size)) for w in self.floats]
            elif refined:
                channels = torch.arange(refined, dtype=torch.int32, device=device)
                packed = [Weight(*round_in_two_terms(w, channels, group_size), channels) for w in self.floats]
            else:
                packed = [Weight(*round_to_nearest(w, bits, group_size)) for w in self.floats]
            self.count = _copies(K * N * bits // 8)
            self.weights = [copied(packed[i % len(packed)]) for i in range(self.count)]
        self.inputs = [torch.randn(B, K, **options) for _ in range(self.count)]
        self.timed = graph_microseconds if device.type == "cuda" else wall_microseconds

    def dense_us(self) -> float:
        """Microseconds of torch's own x @ W^T with W [N, K], the layout that is fastest for it (cuBLAS on CUDA)."""
        transposed = [weight.t().contiguous() for weight in self.floats]
        return self.timed(lambda i: F.linear(self.inputs[i], transposed[i]), len(transposed))

    def sparse_us(self, thresholds: Tensor, segments: list[int], tile: GemvTile | None = None) -> float:
        """Microseconds of the sparse product, from x to its rounded result."""
        return self.timed(lambda i: self.product(i, thresholds, segments, tile), self.count)

    def product(
        self,
        i: int,
        thresholds: Tensor,
        segments: list[int],
        tile: GemvTile | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The sparse product with copy i, [B, N] in dtype (by default the weight's, the only one on a CPU)."""
        x, weight = self.inputs[i], self.weights[i]
        if not x.is_cuda:
            return sparse_linear(x, weight.values, thresholds, segments, *weight[1:])
        partials = launch(x, weight.values, thresholds, segments, *weight[1:], tile)
        return reduce_partials(partials, dtype or weight.dtype, None, None)

    def exact(self, thresholds: Tensor) -> Tensor:
        """What the product with copy 0 stands for, fp64 [B, N]; all segments by the first threshold."""
        x, weight = self.inputs[0], self.weights[0]
        values = weight.values
        if weight.scales is not None:
            values = dequantize(weight.values, weight.scales.float(), *weight[2:])
        return torch.where(x.abs() < thresholds[0].to(x.dtype), 0, x).double() @ values.double()

    def errors(self, thresholds: Tensor, segments: list[int]) -> tuple[float, float]:
        """Relative error to fp64: (of the fp32 sum, of the rounded result)."""
        expected, found = self.exact(thresholds), []
        for dtype in (torch.float32, self.inputs[0].dtype):
            difference = self.product(0, thresholds, segments, dtype=dtype).double() - expected
            found.append(float(difference.norm() / expected.norm()))
        return found[0], found[1]


def largest_group_size(segments: list[int]) -> int:
    """Of the group sizes that divide all segments. Raises UserError if none does."""
    size = next((size for size in GROUP_SIZES if all(width % size == 0 for width in segments)), None)
    if size is None:
        raise UserError(f"--quant: no group size of {GROUP_SIZES} divides the widths {segments}")
    return size


def copied(weight: Weight) -> Weight:
    """The same weight at another address."""
    return Weight(weight.values.clone(), *(None if t is None else t.clone() for t in weight[1:]))


def _copies(size: int) -> int:
    return max(3, min(MAX_COPIES, -(-COLD_BYTES // size)))


def thresholds_for(sparsity: float, segments: list[int], device: torch.device) -> Tensor:
    """The thresholds that drop this share of a standard normal x."""
    cut = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor((1 + sparsity) / 2))
    return torch.full((len(segments),), float(cut) if sparsity else 0.0, device=device)


def measure(
    args: argparse.Namespace, models: dict[str, dict[str, tuple[int, list[int]]]], device: torch.device, ceiling: float
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each distinct shape, dtype and sparsity of models' projections; prints them as they come."""
    rows: list[dict[str, Any]] = []
    seen: dict[tuple[int, tuple[int, ...], str], str] = {}
    for model, shapes in models.items():
        for name, (K, segments) in shapes.items():
            for dtype in args.dtypes.split(","):
                key = (K, tuple(segments), dtype)
                if key in seen:
                    print(f"{model} {name} {dtype}: as {seen[key]}")
                    continue
                seen[key] = f"{model} {name}"
                bits = BITS[args.quant] if args.quant else 8 * DTYPES[dtype].itemsize
                shape = (K, segments, args.rows, DTYPES[dtype], device, bits, args.input_groups)
                cold = ColdWeights(*shape)
                mixed = ColdWeights(*shape, refined=K // args.refined) if args.refined else None
                dense = cold.dense_us()
                for sparsity in args.sparsities:
                    thresholds = thresholds_for(sparsity, segments, device)
                    us = cold.sparse_us(thresholds, segments)
                    gb_per_s = K * sum(segments) * bits / 8e3 * (1 - sparsity) / us
                    sums, rounded = cold.errors(thresholds, segments)
                    row = {"model": model, "projection": name, "dtype": dtype, "K": K, "N": sum(segments)}
                    row |= {"sparsity": sparsity, "us": us, "dense_us": dense, "ratio": dense / us}
                    row |= {"gb_per_s": gb_per_s, "share": 1e9 * gb_per_s / ceiling}
                    row |= {"error_fp32": sums, "error": rounded}
                    beside = ""
                    if mixed is not None:
                        row |= {"mixed_us": mixed.sparse_us(thresholds, segments)}
                        row |= {"mixed_error_fp32": mixed.errors(thresholds, segments)[0]}
                        beside = f"{row['mixed_us']:9.2f} us mixed{row['mixed_us'] / us:7.3f}x"
                    rows.append(row)
                    print(
                        f"{model:12} {name:8}{dtype:5}{K:6} x{sum(segments):6}{sparsity:6.0%}{us:9.2f} us"
                        f"{dense:9.2f} us dense{dense / us:6.2f}x{gb_per_s:8.0f} GB/s{1e9 * gb_per_s / ceiling:6.0%}"
                        f"   {sums:.0e} {rounded:.0e}{beside}",
                        flush=True,
                    )
                del cold, mixed
    return rows


def main() -> None:
    """Measure and print; the last line is JSON."""
    args = build_parser().parse_args()
    if args.rows > MAX_ROWS:
        raise UserError(f"--rows {args.rows} is out of range; expected 1 to {MAX_ROWS}")
    check_input_groups(args)
    check_refined(args)
    for dtype in args.dtypes.split(","):
        if dtype not in DTYPES:
            raise UserError(f"--dtypes {dtype}: expected bf16, fp16 or fp32")
    models = {model: shapes_of(model) for model in args.models.split(",")}
    device = pick_device(args.device)
    ceiling = read_bandwidth(device)
    facts = machine_facts(device)
    print(f"{facts['device']}, read bandwidth {ceiling / 1e9:.0f} GB/s")
    rows = measure(args, models, device, ceiling)
    print(json.dumps(facts | {"read_gb_per_s": ceiling / 1e9, "rows": rows}))


if __name__ == "__main__":
    cli.run(main)
