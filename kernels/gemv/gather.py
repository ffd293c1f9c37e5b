"""Device functions the sparse GEMV kernels share: which channels a program owns, compaction, gather and sum.

A program owns every SPLITS-th run of RUN neighbouring input channels and one block of output columns. It computes its x
and lists the channels that reach the threshold in its own scratch row. That takes a prefix sum and one barrier; nothing
crosses programs. Then it reads only those weight rows. Runs are dealt out round-robin, so that a cluster of large
activations does not leave one program with most of the work. If the weight is quantized with groups along the input, a
program owns a single run, of few groups.

A refined channel has two weight rows (packing.py). Programs then own weight rows, and each entry of x is that of its
row's channel. So such a channel is listed twice, perhaps by two programs, under its own row and under the other.

Layouts: weight [K, N] with contiguous rows, partials fp32 [SPLITS, B, N], scratch index int32 [programs, R] and value
fp32 [programs, B, R]. R is the most entries a program can list, padding included.
"""

import os

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Triton's CPU interpreter truncates when it narrows to bf16 and multiplies bf16 tiles as integers.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """fp32 x rounded to DTYPE (nearest, ties to even), as fp32."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
        y = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    else:
        y = x.to(DTYPE).to(tl.float32)
    return y


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until the previous kernel of the stream has ended and its results can be read.

    What is read before this must be older: weights, thresholds, caches, results of the kernel before the last.
    """
    if PDL:
        gdc_wait()


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """Let the stream's next kernel take its place on the multiprocessors; it waits there for this one's end.

    Called after wait_for_previous, and by a GEMV when it is nearly done. Called at its start, waiting kernels spread
    over the multiprocessors unevenly. One layer of Llama-3-8B at 50% then took 123 us on an H100 instead of 106.
    """
    if PDL:
        gdc_launch_dependents()


@triton.jit
def column_block(i_block, n_0, n_1, n_2, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr):
    """(segment, first column, end column) of block i_block, where each segment is cut into blocks of its own."""
    blocks_0 = tl.cdiv(n_0, BLOCK_N)
    blocks_1 = tl.cdiv(n_1, BLOCK_N)
    in_1 = i_block >= blocks_0
    in_2 = i_block >= blocks_0 + blocks_1
    segment = in_1.to(tl.int32) + in_2.to(tl.int32)
    first = (i_block - tl.where(in_1, blocks_0, 0) - tl.where(in_2, blocks_1, 0)) * BLOCK_N
    begin = tl.where(in_1, n_0, 0) + tl.where(in_2, n_1, 0)
    end = begin + tl.where(in_2, n_2, tl.where(in_1, n_1, n_0))
    start = begin + first
    if ALIGNED:  # every width is a multiple of 16, which the selections above hide from the compiler
        start = tl.multiple_of(start, 16)
        end = tl.multiple_of(end, 16)
    return segment, start, end


@triton.jit
def owned_work(p_refined, p_threshold, K, E, n_0, n_1, n_2, META: tl.constexpr):
    """This program's weight rows [BLOCK_R] and their channels, its segment's threshold, first column and end.

    Without refined channels a row is its channel. Channels past the owned ones are >= K. Nothing here depends on the
    kernels before, so it comes before the wait for them. The threshold is a read from memory that nothing else hides.
    """
    segment, start, end = column_block(tl.program_id(0), n_0, n_1, n_2, META.BLOCK_N, META.ALIGNED)
    r = tl.arange(0, META.BLOCK_R)
    weight_rows = ((r // META.RUN) * META.SPLITS + tl.program_id(1)) * META.RUN + r % META.RUN
    channels = weight_rows
    if META.REFINED:
        second = (weight_rows >= K) & (weight_rows < K + E)
        channels = tl.load(p_refined + (weight_rows - K), mask=second, other=weight_rows)
    threshold = rounded(tl.load(p_threshold + segment), META.DTYPE)
    return weight_rows, channels, threshold, start, end


@triton.jit
def threshold_and_compact(
    x, threshold, weight_rows, channels, K, B, p_index, p_value, PAD: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    """List the weight rows whose entry in x [BLOCK_B, BLOCK_R] any row keeps, and its values; returns how many.

    Values of rows that drop a listed entry are 0. A NaN is never below a threshold, so it is kept. PAD more entries
    repeat one listed weight row with value 0. The loop over the list then needs no masks, which cost it a register move
    for every four bytes loaded. The repeated row comes from the cache.
    """
    R: tl.constexpr = META.R
    BLOCK_B: tl.constexpr = META.BLOCK_B
    rows = tl.arange(0, BLOCK_B)[:, None]
    dropped = tl.abs(x) < threshold
    keep = (~dropped) & (channels < K)[None, :] & (rows < B)
    listed = tl.max(keep.to(tl.int32), axis=0)  # [BLOCK_R]
    position = tl.cumsum(listed, axis=0) - 1
    # The last listed row has the highest position: one reduction gives both, and the count.
    last = tl.max(tl.where(listed != 0, (position.to(tl.int64) + 1) << 32 | weight_rows, 0), axis=0)
    count = (last >> 32).to(tl.int32)
    tl.store(p_index + position, weight_rows, mask=listed != 0)
    tl.store(p_value + rows * R + position[None, :], tl.where(keep, x, 0.0), mask=(listed != 0)[None, :] & (rows < B))
    pad = count + tl.arange(0, PAD)
    tl.store(p_index + pad, tl.zeros([PAD], tl.int32) + last.to(tl.int32))
    tl.store(p_value + rows * R + pad[None, :], tl.zeros([BLOCK_B, PAD], tl.float32), mask=rows < B)
    tl.debug_barrier()  # the lists are read below by other threads of this program
    return count


@triton.jit
def keep_loads_above():
    """Stop the assembler from sinking loads below the arithmetic that follows: they would then start too late."""
    if not INTERPRETED:
        tl.inline_asm_elementwise("bar.warp.sync 0xffffffff; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def sum_one_row(
    p_weight, stride, p_index, p_value, count, start, end, META: tl.constexpr,
):  # fmt: skip
    """Sum over the listed channels of value times weight row, for one row of x: [1, BLOCK_N].

    Weights are read once and leave the L2 cache first, so that what the kernels hand each other stays there. One layer
    of Llama-3-8B at 50% takes 98 us instead of 103 on an H100.

    A step covers LANES * UNROLL weight rows. The UNROLL axis stays within a thread: UNROLL 16-byte loads are in flight
    while it holds only the sums of its own columns. The next step's loads start before this step's arithmetic.
    """
    LANES: tl.constexpr = META.LANES
    UNROLL: tl.constexpr = META.UNROLL
    STEP: tl.constexpr = LANES * UNROLL
    BLOCK_N: tl.constexpr = META.BLOCK_N
    columns = start + tl.arange(0, BLOCK_N)
    steps = tl.arange(0, LANES)[None, :] * UNROLL + tl.arange(0, UNROLL)[:, None]
    inside = None if META.EVEN_N else (columns < end)[None, None, :]
    total = tl.zeros([LANES, BLOCK_N], tl.float32)
    p_columns = p_weight + columns[None, None, :]
    index = tl.load(p_index + steps)  # [UNROLL, LANES], a thread's entries side by side
    weight = tl.load(
        p_columns + (index.to(tl.int64) * stride)[:, :, None],
        mask=inside,
        eviction_policy="evict_first",
    )
    index = tl.load(p_index + STEP + steps)
    for i in range(0, count - STEP, STEP):
        arriving = tl.load(
            p_columns + (index.to(tl.int64) * stride)[:, :, None],
            mask=inside,
            eviction_policy="evict_first",
        )
        index = tl.load(p_index + i + 2 * STEP + steps)
        keep_loads_above()
        value = tl.load(p_value + i + steps)
        total += tl.sum(value[:, :, None] * weight.to(tl.float32), axis=0)
        weight = arriving
    value = tl.load(p_value + (tl.maximum(count - 1, 0) // STEP) * STEP + steps)
    total += tl.sum(value[:, :, None] * weight.to(tl.float32), axis=0)
    return tl.sum(total, axis=0)[None, :]


@triton.jit
def sum_rows(
    p_weight, stride, p_index, p_value, count, B, start, end, META: tl.constexpr,
):  # fmt: skip
    """As sum_one_row for several rows of x, on tensor cores: [16, BLOCK_N], their smallest tile."""
    R: tl.constexpr = META.R
    STEP: tl.constexpr = META.LANES * META.UNROLL
    BLOCK_N: tl.constexpr = META.BLOCK_N
    columns = start + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, 16)[:, None]
    lanes = tl.arange(0, STEP)
    inside = None if META.EVEN_N else (columns < end)[None, :]
    total = tl.zeros([16, BLOCK_N], tl.float32)
    index = tl.load(p_index + lanes)
    weight = tl.load(
        p_weight + (index.to(tl.int64) * stride)[:, None] + columns[None, :], mask=inside,
        eviction_policy="evict_first",
    )  # fmt: skip
    index = tl.load(p_index + STEP + lanes)
    for i in range(0, count, STEP):
        arriving = weight
        if i + STEP < count:
            arriving = tl.load(
                p_weight + (index.to(tl.int64) * stride)[:, None] + columns[None, :], mask=inside,
                eviction_policy="evict_first",
            )  # fmt: skip
            index = tl.load(p_index + tl.minimum(i + 2 * STEP, R - STEP) + lanes)
            keep_loads_above()
        value = tl.load(p_value + rows * R + (i + lanes)[None, :], mask=rows < B, other=0.0)
        if INTERPRETED:
            total = tl.dot(value, weight.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(value.to(weight.dtype), weight, total, input_precision="ieee")
        weight = arriving
    return total
