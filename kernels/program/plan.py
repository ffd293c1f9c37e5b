"""How a model's decode step is cut over the blocks of program.cu, and the config that it is compiled with.

A table of four products, each [K, N] of a format, is all that the kernel knows of a model beside sizes of attention:

    q,k,v       pieces of columns x splits of channels      no piece has columns of two of them
    o           pieces of columns x splits of channels
    gate,up     mlp_teams runs of columns x mlp_share splits of channels, which a team adds
    down        mlp_share runs of columns x the rows of a team's columns

A granule is 16 bytes of a row (formats.cuh).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teal.kernels.formats.packing import Weight
from teal.kernels.program.shapes import MAX_INPUT_GROUPS, PRODUCTS, Device, Format, Model

MAX_ROWS = 1 << 16  # of a weight: lists hold 16-bit rows
MAX_HIDDEN = 1 << 14  # MAX_OF_THREAD of 512 threads
MAX_OF_THREAD = 32  # channels that a thread lists: bits of a mask, shared.cuh
GROUP_HEADS = 4  # query heads that a block attends with at once; a tile has room for 8, in half as many blocks
MAX_ATTENTION_SPLITS = 32  # one lane each weighs them
POSITIONS_OF_SPLIT = 64  # at least, of attention: 32 and 128 were 1% slower at 512 positions
MAX_QKV_SPLITS = 12  # whose sums a thread of attention loads at once
# Of a block, by bits of weights; the second where the first does not fit. Straight code costs less with fewer warps,
# and floats want more rows under way. 8B at 50%, 512 and 256: bf16 3.17, 3.24 ms, int8 2.16, 2.13, int4 1.78, 1.60.
BLOCK_THREADS = {16: (512, 256), 8: (256, 512), 4: (256, 512)}
MIN_SCALED_STAGES = 3  # with less left for the ring, scales are fetched row by row
MAX_STAGES = 4  # steps of 64 bytes a thread, three in flight: 3, 5 and 6 were 1% slower (int4 at 50%, H200)
# Bytes of a row that a block reads at once of q,k,v and of o, about. Narrow pieces leave few splits, whose sums have to
# be added and whose lists are of more even length. o has enough splits that a block makes its list in one pass: every
# pass reads what attention sent anew, 1.5 us.
QKV_PIECE_BYTES, O_PIECE_BYTES = 256, 512
# Of gate, and as many of up. In bf16 896 were 1 to 2% faster than 448, these 3% than 224 (H100).
MLP_PIECE_BYTES = 500
# Granules at whose multiples a team's columns begin, 64 bytes: off them bf16 lost 5%, and int4 2% (H100). But they
# leave 20 of 132 blocks without a part of the 8B's gate,up in int4. An H200's memory gives more than the others draw.
# There 32 bytes, of which 128 blocks have a part, were 1.6% faster.
RUN_GRANULES, FINE_RUN_GRANULES = 4, 2
FINE_FROM = 32.0  # GB/s of memory for each multiprocessor: an H100 has 25, an H200 36
# Neighbouring channels of a part. Blocks poll what others send by whole lines of 128 bytes. A step of the 8B in int4 at
# 50% took 1.38 ms with 8 of gate,up and 1.36 with 32. With 4 of q,k,v and 2 of o it took 1.36, with 16 1.34 (H200).
QKV_RUN, O_RUN, MLP_RUN = 16, 16, 32
UNEVEN = 1 / 16  # by which whole runs may make the longest part longer than its share
LINE_GRANULES = 8  # of 128 bytes: whole ones of the head's rows took 137 us, not 150 (8 bits, H200)
SCALE_ROW, GROUP_REST = 36, 4  # words, panel.cuh
PAIRS_OF_PASS = 64  # of channels, of which o's blocks make their list at once


@dataclass(frozen=True, slots=True)
class Plan:
    """How the step is cut; source is config.cuh, and words the size of the workspace in 64-bit words.

    sizes: constants of the config that say how work is cut.
    """

    grid: int
    threads: int
    sizes: dict[str, int]
    shared_bytes: int
    words: int
    source: str


def weight_obstacle(weights: Sequence[Weight]) -> str:
    """Why the kernel cannot take these weights of all blocks, those of a projection in turn; empty if it can."""
    for weight in weights:
        if weight.by_input and weight.bits != 4:
            return f"{weight.bits} bits with groups along the input are not supported; expected 4"
        if weight.dtype not in (torch.bfloat16, torch.float16):
            return f"weights of {str(weight.dtype).removeprefix('torch.')} are not supported; expected bf16 or fp16"
        if not weight.values.is_contiguous() or weight.values.data_ptr() % 16:
            return "a weight is not contiguous"
        if len(weight.values) > MAX_ROWS:
            return f"{len(weight.values)} rows of a weight are too many; expected at most {MAX_ROWS}"
        if weight.N * weight.bits % 128:
            return f"{weight.N} columns of {weight.bits} bits are no multiple of 16 bytes"
    return ""


def shape_obstacle(model: Model, device: Device) -> str:
    """Why the kernel cannot run a model of these shapes on a device; empty if it can."""
    c, columns = model.config, model.products[0].columns
    if device.capability < (8, 0):
        return f"compute capability {'.'.join(map(str, device.capability))} is too old; expected 8.0 or later"
    if c.head_dim not in (16, 32, 64, 128, 256):
        return f"heads of {c.head_dim} channels are not supported; expected 16, 32, 64, 128 or 256"
    if c.hidden_size > MAX_HIDDEN:
        return f"hidden size {c.hidden_size} is too large; expected at most {MAX_HIDDEN}"
    if c.q_size % columns or c.kv_size % columns or c.intermediate_size % model.products[2].columns:
        return f"widths are no multiples of {columns} columns, which are 16 bytes"
    columns *= model.products[0].unit
    if c.q_size % columns or c.kv_size % columns or (model.products[1].channels and c.hidden_size % columns):
        return f"widths are no multiples of {columns} columns, as groups along the input need"
    if _units(model) > device.multiprocessors:
        return f"{_units(model)} groups of heads exceed {device.multiprocessors} multiprocessors"
    cuts = _all_sizes(model, device)
    if not cuts:
        return f"products of these widths cannot be cut over {device.multiprocessors} multiprocessors"
    if (touched := min(_touched_groups(model, sizes) for _, sizes in cuts)) > MAX_INPUT_GROUPS:
        return f"a block's channels are of {touched} groups along the input; expected at most {MAX_INPUT_GROUPS}"
    if _cut(model, device) is None:
        return f"{device.shared_bytes} bytes of shared memory are too few for hidden size {c.hidden_size}"
    return ""


def plan(model: Model, device: Device) -> Plan:
    """The plan of a model that has no obstacle. Raises ValueError for another."""
    if reason := shape_obstacle(model, device):
        raise ValueError(reason)
    found = _cut(model, device)
    assert found is not None
    return found


def pieces_and_splits(
    product: Format, unit: int, grid: int, threads: int, piece_bytes: int, least: int = 1, most_splits: int = 1 << 16
) -> tuple[int, int]:
    """(granules of a piece, splits of the channels): whole pieces, about piece_bytes, that keep most blocks busy.

    least: splits that come before all else, or as many as there can be. most_splits: never more. 0 splits: none fit.
    """
    most = min(unit, product.teams(threads))
    found = []
    for piece in (p for p in range(product.unit, most + 1, product.unit) if unit % p == 0):
        pieces = product.granules // piece
        if pieces > grid:
            continue
        splits = min(grid // pieces, max(1, product.K // 16), most_splits)
        distance = abs(math.log2(16 * piece / piece_bytes))
        found.append((min(splits, least), round(pieces * splits / grid, 1), -distance, piece, splits))
    if not found:
        return 1, 0
    *_, piece, splits = max(found)
    return piece, splits


def _units(model: Model) -> int:
    """Key/value heads, each with the groups of its query heads."""
    return model.config.num_kv_heads * math.ceil(model.heads_of_key / min(GROUP_HEADS, model.heads_of_key))


def _cut(model: Model, device: Device) -> Plan | None:
    """The plan with the first of BLOCK_THREADS, and as many stages, that shared memory has room for; None without."""
    for (threads, sizes), scaled in itertools.product(_all_sizes(model, device), (True, False)):
        scaled = scaled and model.products[2].bits < 16
        if _touched_groups(model, sizes) > MAX_INPUT_GROUPS:
            continue
        sizes |= _seconds(model, sizes)
        for stages in range(MAX_STAGES, 1 if not scaled else MIN_SCALED_STAGES - 1, -1):
            shared = _shared_bytes(model, sizes, threads, stages, scaled)
            if shared <= device.shared_bytes:
                words = _words(model, sizes)
                constants = sizes | {"THREADS": threads, "STAGES": stages}
                source = _source(model, constants, scaled, shared, words)
                return Plan(sizes["GRID"], threads, constants, shared, words, source)
    return None


def _all_sizes(model: Model, device: Device) -> list[tuple[int, dict[str, int]]]:
    """Threads of a block and the _sizes with them, for each of BLOCK_THREADS that are enough."""
    found = ((n, _sizes(model, device, n)) for n in BLOCK_THREADS[model.products[2].bits])
    return [(threads, sizes) for threads, sizes in found if sizes is not None]


def _sizes(model: Model, device: Device, threads: int) -> dict[str, int] | None:
    """Constants of the config that say how the work is cut; None if so many threads are too few."""
    c, (qkv, o, gate_up, _), grid = model.config, model.products, device.multiprocessors
    unit = math.gcd(c.q_size, c.kv_size) // qkv.columns
    qkv_piece, qkv_splits = pieces_and_splits(
        qkv, unit, grid, threads, QKV_PIECE_BYTES, qkv.least_splits, MAX_QKV_SPLITS
    )
    one_pass = max(math.ceil(c.q_size / 2 / PAIRS_OF_PASS), o.least_splits)
    o_piece, o_splits = pieces_and_splits(o, o.granules, grid, threads, O_PIECE_BYTES, one_pass)
    teams, share, granules = _mlp(gate_up, device, threads)
    _, head_piece = whole_runs(model.gathered_head.granules, grid, LINE_GRANULES, 1)
    if not (qkv_splits and o_splits and teams) or head_piece > model.gathered_head.teams(threads):
        return None
    sizes = {
        "GRID": grid,
        "QKV_PIECE": qkv_piece,
        "QKV_SPLITS": qkv_splits,
        **_channels("QKV", c.hidden_size, qkv_splits, QKV_RUN),
        "O_PIECE": o_piece,
        "O_SPLITS": o_splits,
        **_channels("O", c.q_size, o_splits, O_RUN),
        "MLP_TEAMS": teams,
        "MLP_SHARE": share,
        **_channels("MLP", c.hidden_size, share, MLP_RUN),
        "TEAM_GRANULES": granules,
        "HEAD_PIECE": head_piece,
        "LANES_OF_PAIR": threads // PAIRS_OF_PASS,
        "GROUP_HEADS": min(GROUP_HEADS, model.heads_of_key),
        "POSITIONS_OF_SPLIT": POSITIONS_OF_SPLIT,
        "ATTENTION_SPLITS": min(grid // _units(model), MAX_ATTENTION_SPLITS),
    }
    return sizes if _most_listed(model, sizes, threads) <= MAX_OF_THREAD else None


def _most_listed(model: Model, sizes: dict[str, int], threads: int) -> int:
    """Channels that a thread lists at most: fours of x, pairs of attention's output."""
    of_x = max(sizes["QKV_CHANNELS"], sizes["MLP_CHANNELS"], 0 if model.head is None else model.config.hidden_size)
    return max(4 * math.ceil(of_x / 4 / threads), 2 * math.ceil(sizes["O_CHANNELS"] / 2 / PAIRS_OF_PASS))


def whole_runs(count: int, parts: int, longest: int, shortest: int) -> tuple[int, int]:
    """(items of a run, items of the longest part), where each part has whole runs of count items.

    Runs are the longest powers of two, from longest to shortest, that keep parts about even (UNEVEN).
    """
    run = longest
    while run > shortest and run * math.ceil(count / run / parts) > (1 + UNEVEN) * count / parts:
        run //= 2
    return run, run * math.ceil(count / run / parts)


def _channels(product: str, count: int, parts: int, longest: int) -> dict[str, int]:
    """RUN and CHANNELS of a product whose channels are shared out in runs: of fours, as lists are read."""
    run, most = whole_runs(count, parts, longest, 4)
    return {f"{product}_RUN": run, f"{product}_CHANNELS": most}


def _mlp(gate_up: Format, device: Device, threads: int) -> tuple[int, int, int]:
    """(teams, blocks of each, granules of gate of each) of gate and up, as MLP_PIECE_BYTES says. 0 teams: none fit.

    A block's channels must be of few groups along the input: then a team may have eight blocks.
    """
    grid, half, found = device.multiprocessors, gate_up.granules // 2, (0, 1, 1)
    is_fine = device.gb_per_s > FINE_FROM * grid
    run = max(FINE_RUN_GRANULES if is_fine else RUN_GRANULES, gate_up.unit)
    is_few = not gate_up.channels
    for share in (1, 2, 4, 8):
        if grid < share or (share > 4 and is_few):
            break
        granules = run * math.ceil(half / run / (grid // share))
        if 2 * granules > gate_up.teams(threads):
            continue
        found = math.ceil(half / granules), share, granules
        if gate_up.channels:
            channels = _channels("MLP", gate_up.K, share, MLP_RUN)["MLP_CHANNELS"]
            is_few = _touched(channels, gate_up.channels) <= MAX_INPUT_GROUPS
        if 16 * granules >= MLP_PIECE_BYTES and is_few:
            break
    return found


def part_of(product: str, channels: Tensor, gate_up: Format, sizes: dict[str, int]) -> Tensor:
    """The parts of a product's channels that these are in. A block lists the channels of one."""
    if product == "QKV":
        return channels // sizes["QKV_RUN"] % sizes["QKV_SPLITS"]
    if product == "O":
        return channels // sizes["O_RUN"] % sizes["O_SPLITS"]
    if product == "MLP":
        return channels // sizes["MLP_RUN"] % sizes["MLP_SHARE"]
    if product == "DOWN":  # of which a team has those rows that meet its columns of gate
        return gate_up.granule_of(channels) // sizes["TEAM_GRANULES"]
    return torch.zeros_like(channels)


def _seconds(model: Model, sizes: dict[str, int]) -> dict[str, int]:
    """How many second rows a block has of each product at most, in fours; and rows of gate and up."""
    found = {}
    for product, refined in zip(PRODUCTS, model.refined, strict=True):
        parts = (part_of(product, channels.long(), model.products[2], sizes) for channels in refined)
        found[f"{product}_SECONDS"] = _fours(max((int(part.bincount(minlength=1).max()) for part in parts), default=0))
    most = max(map(len, model.refined[PRODUCTS.index("MLP")]), default=0)
    return found | {"GATE_UP_ROWS": model.config.hidden_size + _fours(most)}


def _fours(count: int) -> int:
    """The next multiple of four."""
    return 4 * math.ceil(count / 4)


def _parts(model: Model, sizes: dict[str, int], threads: int) -> list[tuple[Format, int, int]]:
    """panel.cuh's Panels: (product, granules of a block, its channels); of gate and up one half of the granules."""
    qkv, o, gate_up, down = model.products
    return [
        (qkv, sizes["QKV_PIECE"], sizes["QKV_CHANNELS"]),
        (o, sizes["O_PIECE"], sizes["O_CHANNELS"]),
        (gate_up, sizes["TEAM_GRANULES"], sizes["MLP_CHANNELS"]),
        (down, _own_granules(down, sizes, threads), 4 * _team_fours(gate_up, sizes)),
    ]


def _touched_groups(model: Model, sizes: dict[str, int]) -> int:
    """Groups along the input that a block's channels are of, at most; 0 where none lie so."""
    parts = _parts(model, sizes, 1 << 16)
    return max(_touched(channels, p.channels) if p.channels else 0 for p, _, channels in parts)


def _shared_bytes(model: Model, sizes: dict[str, int], threads: int, stages: int, scaled: bool) -> int:
    """What shared.cuh's Shared takes at most; the compiler checks it."""
    c, words, rows = model.config, 0, 0
    for name, (product, granules, channels) in zip(PRODUCTS[:4], _parts(model, sizes, threads), strict=True):
        of_product = channels + sizes[f"{name}_SECONDS"]
        rows, halves = max(rows, of_product), 2 if name == "MLP" else 1
        if product.channels:
            words += halves * (granules * SCALE_ROW + GROUP_REST) * _touched(channels, product.channels)
        elif product.bits < 16:
            words += halves * of_product * _touched(granules, product.group // product.columns)
    by_ring = 16 * stages * threads if not scaled or model.head is not None else 16
    panels = 4 * words if scaled else 80
    attended = threads // 8 * sizes["GROUP_HEADS"] * c.head_dim
    ring = max(64 * stages * threads, 64 * threads, attended)
    lists = 6 * max(rows, _fours(c.hidden_size) + sizes["HEAD_SECONDS"]) + 2 * rows * scaled
    heads = 4 * (sizes["GROUP_HEADS"] + 2) * c.head_dim + 2 * (sizes["GROUP_HEADS"] + 2) * (c.head_dim + 32)
    of_warps = threads // 4 * (sizes["GROUP_HEADS"] + 1)
    return ring + max(by_ring, panels) + lists + 16 * threads + heads + of_warps + 28 * c.num_layers + 1536


def _team_fours(gate_up: Format, sizes: dict[str, int]) -> int:
    """Columns that a team of blocks has of the hidden layer, at most, in fours."""
    return sizes["TEAM_GRANULES"] * gate_up.columns // 4


def _own_granules(down: Format, sizes: dict[str, int], threads: int) -> int:
    """Granules of down's rows that a block reads: panel.cuh's DOWN_PIECES * DOWN_PIECE."""
    pieces = math.ceil(math.ceil(down.granules / sizes["MLP_SHARE"]) / down.teams(threads))
    return pieces * down.unit * math.ceil(down.granules / (sizes["MLP_SHARE"] * pieces * down.unit))


def _touched(count: int, of_group: int) -> int:
    """How many groups so many neighbours touch, which begin at a multiple of their number."""
    if count % of_group == 0:
        return count // of_group
    return 1 if of_group % count == 0 else (count + of_group - 2) // of_group + 1


def _words(model: Model, sizes: dict[str, int]) -> int:
    """Size of the workspace: program.cu's Words."""
    c, (qkv, _, gate_up, _) = model.config, model.products
    values = sizes["QKV_SPLITS"] * qkv.N + (sizes["O_SPLITS"] + sizes["MLP_TEAMS"] + 2) * c.hidden_size
    values += 8 * sizes["MLP_TEAMS"] * sizes["MLP_SHARE"] * _team_fours(gate_up, sizes)
    squares = 16 * (sizes["GRID"] + c.hidden_size // 128)  # of two x, a four for each warp that owns columns
    attended = c.num_heads * sizes["ATTENTION_SPLITS"] * (c.head_dim + 2)
    return (values + squares) // 2 + attended + 2 * sizes["GRID"]


def _source(model: Model, sizes: dict[str, int], scaled: bool, shared: int, words: int) -> str:
    c = model.config
    constants = sizes | {
        "HIDDEN": c.hidden_size, "HEADS": c.num_heads, "KV_HEADS": c.num_kv_heads, "HEAD_DIM": c.head_dim,
        "LAYERS": c.num_layers, "VOCAB": c.vocab_size, "Q_SIZE": c.q_size, "KV_SIZE": c.kv_size,
        "HEAD_BITS": 16 if model.head is None else model.head.bits, "CACHE_BITS": model.cache_bits,
        "EMBEDDING_BITS": model.embedding_bits,
        "SHARED_BYTES": shared, "RANK": model.rank, "RANKS": model.ranks,
    }  # fmt: skip
    lines = [f"constexpr int {name} = {value};" for name, value in constants.items()]
    flags = {"FLOAT_IS_BF16": model.dtype == torch.bfloat16, "SCALED": scaled}
    lines += [f"constexpr bool {name} = {str(value).lower()};" for name, value in flags.items()]
    lines.append(f"constexpr long long WORKSPACE_WORDS = {words};")
    lines += [f"constexpr float NORM_EPS = {c.norm_eps!r}f, ATTENTION_SCALE = {1 / math.sqrt(c.head_dim)!r}f;"]
    names = ("Qkv", "O", "GateUp", "Down", "Head")
    lines += ["template <int, int, int, int, int>", "struct Format;"]
    lines += [
        f"using {name} = {product};"
        for name, product in zip(names, (*model.products, model.gathered_head), strict=True)
    ]
    return "#pragma once\n" + "\n".join(lines) + "\n"
