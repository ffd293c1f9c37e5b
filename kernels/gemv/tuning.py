"""Tile sizes of the sparse GEMV: a table of measured ones, the user's own, and a rule for all other shapes.

bench/tune.py measures and writes the user's file.
"""

import functools
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

from teal.errors import UserError
from teal.files import user_folder
from teal.kernels.formats.packing import GROUP_SIZES
from teal.user_text import parse_json


@dataclass(frozen=True, slots=True)
class GemvTile:
    """A program sums lanes * unroll rows at a time over block_n columns; the input channels go to splits programs.

    lanes is how many rows the program's threads cover at once, eight 16-bit columns each.
    """

    block_n: int
    lanes: int
    unroll: int
    splits: int
    num_warps: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            power_of_two = value > 0 and value & (value - 1) == 0
            if not isinstance(value, int) or value < 1 or (name != "splits" and not power_of_two):
                raise UserError(f"tile {name} {value!r} is not usable; expected a power of two (splits: at least 1)")


H100 = "NVIDIA H100 80GB HBM3"
# (device name, bits of a weight, K, N) -> tile for one row of 16-bit x: the fastest there at 50% sparsity with cold
# weights. For floats lanes 1 everywhere: threads side by side over columns need no sum across warps at the end, which
# cost 1.5 us. Wider blocks need fewer programs, whose start and end cost about 1 us each on a multiprocessor. For
# integers the times are those of a layer of Llama-3-8B. Programs that just fill the GPU win, three for each of 132
# multiprocessors. 14 splits of gate and up take 49.1 us, 19 splits 54.5. Where the next kernel adds, fewer win.
TILES: dict[tuple[str, int, int, int], GemvTile] = {
    (H100, 16, 4096, 6144): GemvTile(1024, 1, 8, 44, 4),  # 12.6 us; 88 splits 12.4, but a slower sum
    (H100, 16, 4096, 4096): GemvTile(1024, 1, 8, 66, 4),  # 9.1 us; 33 splits 11.0
    (H100, 16, 4096, 28672): GemvTile(2048, 1, 4, 19, 8),  # 45.2 us; block_n 1024, 9 splits 46.9
    (H100, 16, 14336, 4096): GemvTile(2048, 1, 8, 128, 8),  # 25.2 us; 66 splits 25.8, block_n 512 26.6
    (H100, 4, 4096, 6144): GemvTile(1024, 4, 4, 33, 4),  # 2.3 us less than 44 splits: rope_attention adds them
    (H100, 4, 4096, 4096): GemvTile(1024, 4, 4, 66, 4),
}
INTERPRETED_MULTIPROCESSORS = 4  # programs run one after the other there: few suffice
QUANTIZED_PROGRAMS = 3  # for each multiprocessor: what the registers of gather_tensor_core.py leave room for
# With groups along the input a few registers less are enough for a fourth. More programs than three a multiprocessor
# then run at once. Of Llama-3-8B at 50%, gate and up take 19.0 us with this limit and 23.6 without, down 11.5 and 14.6.
FOUR_PROGRAMS_REGISTERS = 128
# For several rows and groups along the output three programs need a limit: four rows of gate and up 35.9 us, not 49.2.
THREE_PROGRAMS_REGISTERS = 168
FULL_ENOUGH = 0.8  # of the places
PROGRAMS_PER_MULTIPROCESSOR = 2  # within 4% of the fastest for each of the shapes above, with block_n 1024
MAX_BLOCK_N = 1024
MAX_GROUP = max(GROUP_SIZES)  # a block holds whole groups of quantized weights
MAX_SPLITS = 128  # the kernels that sum the partials hold one value of each split
MAX_SPAN = 4  # groups along the input that a program's channels touch: a tensor core has eight columns, two for a group


def gemv_tile(K: int, N: int, B: int, device: torch.device, dtype: torch.dtype, bits: int = 16) -> GemvTile:
    """The tile for x [B, K] and weight [K, N]. The same arguments give the same tile all through a process."""
    name, multiprocessors = _device_facts(device)
    if B == 1 and dtype.itemsize == 2:
        key = (name, bits, K, N)
        known = user_tiles().get(key) or TILES.get(key)
        if known is not None:
            return known
    return default_tile(K, N, B, multiprocessors, bits)


def register_limit(by_input: bool, B: int, programs: int, device: torch.device) -> dict[str, int]:
    """Launch options of the sums on tensor cores for so many rows and programs; by_input: where groups lie."""
    _, multiprocessors = _device_facts(device)
    if by_input and B == 1 and programs > QUANTIZED_PROGRAMS * multiprocessors:
        return {"maxnreg": FOUR_PROGRAMS_REGISTERS}
    return {"maxnreg": THREE_PROGRAMS_REGISTERS} if B > 1 and not by_input else {}


def default_tile(K: int, N: int, B: int, multiprocessors: int, bits: int = 16) -> GemvTile:
    """A tile by rule: wide blocks, and splits for a few programs on each multiprocessor."""
    if bits < 16 and B == 1:  # of gather_tensor_core.py, which wants 16 rows and 128 bytes of each row to a warp
        block_n = min(4096 // bits, max(1024 // bits, triton.next_power_of_2(N)))
        splits = _filling_splits(triton.cdiv(N, block_n), QUANTIZED_PROGRAMS * multiprocessors)
        return GemvTile(block_n, 4, 4, min(splits, triton.cdiv(K, 32), MAX_SPLITS), block_n * bits // 1024)
    if bits < 16:
        block_n, lanes, unroll, num_warps = min(256, max(MAX_GROUP, triton.next_power_of_2(N))), 2, 8, 4
    elif B == 1:
        block_n = min(MAX_BLOCK_N, triton.next_power_of_2(N))
        num_warps = max(1, block_n // 256)
        lanes, unroll = 1, 8
    else:  # tensor cores, 16 rows of weights a step: 198 us a layer of Llama-3-8B with 4 rows, 248 with 32 x 256
        block_n, lanes, unroll, num_warps = min(512, max(16, triton.next_power_of_2(N))), 2, 8, 4
    programs = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors
    splits = max(1, min(programs // triton.cdiv(N, block_n), triton.cdiv(K, 32), MAX_SPLITS))
    return GemvTile(block_n, lanes, unroll, splits, num_warps)


def _filling_splits(blocks: int, places: int) -> int:
    """Splits whose programs fill all multiprocessors once, or twice if once leaves many places empty."""
    once = places // blocks
    return once if once * blocks >= FULL_ENOUGH * places else max(1, 2 * places // blocks)


def input_run(K: int, group: int, splits: int, most: int = MAX_SPAN) -> int:
    """Neighbouring channels to a program, of most groups, for about so many splits of K; group: channels to a scale.

    Whole groups, as each costs a program the reading of its scales, or equal parts of one.
    """
    groups = K / splits / group  # wanted
    if groups >= 1:
        return group * min(most, round(groups))
    return min(group, 16 * triton.cdiv(group, 16 * round(1 / groups)))  # whole sectors of x


def user_tiles_path() -> Path:
    """Where bench/tune.py keeps this user's tiles: $XDG_CONFIG_HOME/teal/tiles.json."""
    return user_folder("XDG_CONFIG_HOME", ".config") / "teal" / "tiles.json"


@functools.cache
def user_tiles() -> dict[tuple[str, int, int, int], GemvTile]:
    """The user's tiles by (device name, bits, K, N); none if there is no file. Raises UserError for a damaged one."""
    path = user_tiles_path()
    try:
        rows = parse_json(path.read_text(encoding="utf-8"))
        return {(row["device"], row["bits"], row["K"], row["N"]): GemvTile(**row["tile"]) for row in rows}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no list of tiles ({error!r}); delete it or run python -m bench.tune again") from None


@functools.cache
def _device_facts(device: torch.device) -> tuple[str, int]:
    if device.type != "cuda":
        return device.type, INTERPRETED_MULTIPROCESSORS
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count
