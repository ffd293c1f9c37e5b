"""Host side the sparse GEMV launchers share: argument checks, tile sizes, scratch."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from teal.kernels.formats.packing import Weight, check_quantized
from teal.kernels.gemv.gather import INTERPRETED
from teal.kernels.gemv.tuning import MAX_SPAN, GemvTile, gemv_tile, input_run, register_limit
from teal.options import MAX_ROWS

TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
DTYPES = tuple(TRITON_DTYPES)
RUN = 16  # channels a program owns side by side: 32 bytes of 16-bit x, one memory sector


def check_rows(x: Tensor, weight: Weight, dtypes: tuple[torch.dtype, ...] = ()) -> None:
    """Raise ValueError unless x is contiguous [B, K], of weight's dtype or one of dtypes, and beside it."""
    if x.dim() != 2 or not x.is_contiguous():
        raise ValueError(f"x has shape {tuple(x.shape)} and strides {x.stride()}: expected contiguous [B, K]")
    device = weight.values.device
    if x.dtype not in (dtypes or (weight.dtype,)) or x.device != device:
        raise ValueError(f"x is {x.dtype} on {x.device}, weight {weight.dtype} on {device}: expected the same")


def check_partials(partials: Tensor, N: int, like: Tensor) -> None:
    """Raise ValueError unless partials are contiguous fp32 [splits, B, N] on the device of like."""
    if partials.dim() != 3 or partials.shape[2] != N or partials.dtype != torch.float32:
        raise ValueError(f"partials are {partials.dtype} {tuple(partials.shape)}: expected fp32 [splits, B, {N}]")
    if not partials.is_contiguous() or partials.device != like.device:
        raise ValueError(f"partials have strides {partials.stride()} on {partials.device}: expected contiguous ones")


def empty_partials(weight: Weight, B: int) -> Tensor:
    """What a sparse GEMV with B rows returns, unfilled: fp32 [splits, B, N]."""
    _, splits = _run_and_splits(weight, B, _tile(weight, B))
    return torch.empty(splits, B, weight.N, dtype=torch.float32, device=weight.values.device)


def _tile(weight: Weight, B: int) -> GemvTile:
    values = weight.values
    # The same programs for one row and several on tensor cores; sum_rows_by_input has no form of its own for one.
    rows = 1 if _suits_tensor_cores(weight, B) else max(B, 2) if weight.by_input else B
    return gemv_tile(int(weight.K), int(weight.N), int(rows), values.device, weight.dtype, weight.bits)


def _run_and_splits(weight: Weight, B: int, tile: GemvTile) -> tuple[int, int]:
    """(neighbouring channels a program owns, splits): a single run to a program of groups along the input."""
    if not weight.by_input:
        return RUN, tile.splits
    K = int(weight.values.shape[0])
    most = MAX_SPAN if B == 1 else 2 if B <= 4 else 1  # that leave a tensor core's eight columns enough for all rows
    run = input_run(K, weight.channels, tile.splits, most)
    return run, triton.cdiv(K, run)


def check_gemv(weight: Weight, thresholds: Tensor, segments: list[int], K: int, B: int) -> None:
    """Raise ValueError unless weight [K, N], thresholds fp32 [J] and segments fit a product with [B, K]."""
    values = weight.values
    if weight.scales is not None or weight.refined is not None:
        check_quantized(weight, K, segments)
        if not all(t.is_contiguous() for t in weight if t is not None):
            raise ValueError("a quantized weight must be contiguous")
    if values.dim() != 2 or weight.K != K or weight.dtype not in DTYPES:
        raise ValueError(f"weight is {weight.dtype} {tuple(values.shape)}: expected 16- or 32-bit floats [{K}, N]")
    if values.stride(1) != 1:
        raise ValueError(f"weight has strides {values.stride()}: its rows must be contiguous")
    if not 1 <= len(segments) <= 3 or sum(segments) != weight.N or min(segments) < 1:
        raise ValueError(f"segments {segments} do not cut {weight.N} columns into 1 to 3 parts")
    J = len(segments)
    if thresholds.dtype != torch.float32 or thresholds.shape != (J,) or not thresholds.is_contiguous():
        raise ValueError(f"thresholds are {thresholds.dtype} {tuple(thresholds.shape)}: expected fp32 [{J}]")
    if not 1 <= B <= MAX_ROWS:
        raise ValueError(f"{B} rows: expected 1 to {MAX_ROWS}")
    if thresholds.device != values.device:
        raise ValueError(f"thresholds are on {thresholds.device} and weight on {values.device}: expected the same")


@dataclass(frozen=True, eq=False)
class GemvMeta(str):
    """What a sparse GEMV kernel is compiled for, passed as one tl.constexpr and read by attribute.

    A string of its fields, too: Triton's hooks (vLLM sets one) write a constexpr as JSON. Fields only: Triton's cache
    key holds their values, and would not see a change of a property's code. Within a list of sizes Triton 3.6 wants a
    constexpr: name the field first, BLOCK_N: tl.constexpr = META.BLOCK_N.
    """

    R: int  # entries a program can list, padding included
    BLOCK_R: int  # channels it owns, rounded up to a power of two
    SPLITS: int  # programs among which the channels of a column block are dealt out
    BLOCK_B: int  # rows of x: 1, 4 or 8; four take 2 to 8% less time than eight with four of them empty
    LANES: int  # rows of weights its threads cover at once
    UNROLL: int  # such rows in flight in each thread
    BLOCK_N: int  # columns of a program
    EVEN_N: bool  # whether every segment is whole blocks: no masks
    BITS: int  # of a weight, 16 for any floats
    GROUP_N: int  # columns packed together
    GROUP_K: int  # channels to a scale, of groups along the input; 0 of others
    RUN: int  # neighbouring channels that a program owns
    SPAN: int  # groups of GROUP_K channels that its single run touches at most
    ALIGNED: bool  # whether rows and segments begin at multiples of 16 columns
    REFINED: bool  # whether channels have second rows
    DTYPE: tl.dtype  # of x and the scales
    TENSOR_CORE: bool  # whether gather_tensor_core.py or one of its two forms for several rows takes it

    def __new__(cls, **fields: Any) -> "GemvMeta":
        return super().__new__(cls, fields)


@dataclass(slots=True)
class GemvLaunch:
    """Everything a sparse GEMV kernel takes beside its own inputs, for B rows of x and weight [K, N]."""

    partials: Tensor  # fp32 [splits, B, N]
    grid: tuple[int, int]
    args: tuple  # of every sparse GEMV kernel, in their order
    meta: GemvMeta
    options: dict  # PDL, and Triton's own


def plan_gemv(weight: Weight, thresholds: Tensor, segments: list[int], B: int, tile: GemvTile | None) -> GemvLaunch:
    """Tile, scratch, outputs and common arguments of a launch."""
    K, N, device = weight.K, weight.N, weight.values.device
    tile = tile or _tile(weight, B)
    values = weight.values.view(torch.int32) if weight.bits == 8 else weight.values  # read as words of four
    meta = _meta(weight, segments, values.stride(0), B, tile)
    blocks = sum(triton.cdiv(n, tile.block_n) for n in segments)
    programs = blocks * meta.SPLITS
    partials = torch.empty(meta.SPLITS, B, N, dtype=torch.float32, device=device)
    index = torch.empty(programs, meta.R, dtype=torch.int32, device=device)
    value = torch.empty(programs, B, meta.R, dtype=torch.float32, device=device)
    weights = (values, values.stride(0), weight.scales, weight.zeros, weight.refined)
    sizes = (B, K, values.shape[0] - K, N, *(*segments, 0, 0)[:3])
    args = (*weights, thresholds, index, value, partials, *sizes)
    options = launch_options(device, tile.num_warps)
    if meta.TENSOR_CORE:
        options |= register_limit(weight.by_input, B, programs, device)
    return GemvLaunch(partials, (blocks, meta.SPLITS), args, meta, options)


def _meta(weight: Weight, segments: list[int], stride: int, B: int, tile: GemvTile) -> GemvMeta:
    """What the kernels are compiled for; stride: between rows of weights. Raises ValueError for a bad tile."""
    if (B > 1 or weight.by_input) and tile.lanes * tile.unroll < 16:
        raise ValueError(f"{tile}: lanes * unroll must be at least 16, a tensor core's depth")
    if tile.block_n < weight.group_size:
        raise ValueError(f"{tile}: block_n must be at least the group size {weight.group_size}")
    run, splits = _run_and_splits(weight, B, tile)
    owned = triton.cdiv(triton.cdiv(weight.values.shape[0], run), splits) * run
    return GemvMeta(
        R=triton.cdiv(owned, RUN) * RUN + 2 * tile.lanes * tile.unroll,  # lists are read 16 bytes at a time
        BLOCK_R=triton.next_power_of_2(owned),
        SPLITS=splits,
        BLOCK_B=1 if B == 1 else 4 if B <= 4 else 8,
        LANES=tile.lanes,
        UNROLL=tile.unroll,
        BLOCK_N=tile.block_n,
        EVEN_N=all(n % tile.block_n == 0 for n in segments),
        BITS=weight.bits,
        GROUP_N=weight.group_size,
        GROUP_K=weight.channels,
        RUN=run,
        SPAN=_span(weight.channels, run),
        ALIGNED=all(n % 16 == 0 for n in segments) and stride % 16 == 0,
        REFINED=weight.refined is not None,
        DTYPE=TRITON_DTYPES[weight.dtype],
        TENSOR_CORE=_takes_tensor_core(weight, B, tile),
    )


def _takes_tensor_core(weight: Weight, B: int, tile: GemvTile) -> bool:
    """Whether the product is that of gather_tensor_core.py, or one of its two forms for several rows."""
    fits = tile.lanes * tile.unroll == 16 and tile.block_n * weight.bits == 1024 * tile.num_warps
    return fits and _suits_tensor_cores(weight, B)


def _suits_tensor_cores(weight: Weight, B: int) -> bool:
    """Whether it is, with the right tile."""
    if weight.bits == 16 or not has_tensor_cores(weight.values.device):
        return False
    if weight.dtype != torch.bfloat16 and (B > 1 or weight.dtype != torch.float16):
        return False
    return weight.by_input or 1024 // weight.bits // weight.group_size in (1, 2, 4)


def _span(group: int, run: int) -> int:
    """How many groups of channels a run touches at most (tuning.input_run): whole ones, or parts of one or two."""
    if not group or not group % run:
        return 1
    return 2 if run < group else run // group


def has_tensor_cores(device: torch.device) -> bool:
    """Whether kernels can use the instruction for bf16 matrices, of compute capability 8.0 on."""
    return device.type == "cuda" and not INTERPRETED.value and torch.cuda.get_device_capability(device) >= (8, 0)


def kernels_run_on(device: torch.device) -> bool:
    """Whether the Triton kernels can run there: on CUDA, or anywhere under Triton's interpreter."""
    return device.type == "cuda" or INTERPRETED.value


def has_dependent_launch(device: torch.device) -> bool:
    """Whether the GPU has programmatic dependent launch, of compute capability 9.0 on."""
    return device.type == "cuda" and not INTERPRETED.value and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(device: torch.device, num_warps: int) -> dict:
    """Triton's options: dependent launch where there is such, and multiply-adds, which Triton 3.10 wants asked for."""
    pdl = has_dependent_launch(device)
    options = {"PDL": pdl, "num_warps": num_warps, "enable_fp_fusion": True}
    return options | ({"launch_pdl": True} if pdl else {})
