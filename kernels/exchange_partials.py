"""Sum of partial sums over the GPUs that share a model, with bias and residual: reduce_partials.py and an all-reduce.

Each GPU has a buffer of words that the others write into, in the manner of NCCL's LL protocol. A word of 64 bits is an
fp32 value and the epoch that it belongs to. Value and signal take one trip, where a flag beside the values takes two.

    words     [2, ranks, M]: of even and odd epochs, from each rank, an entry for each of up to M values
    a word    bits 0..31 value, bits 32..63 epoch
    epochs    [programs]: of each program's last exchange, counted by itself

A program sends its columns to all others and then polls its own buffer for theirs. It overwrites words of the epoch
before the last. A peer has read those: it has sent words of the last one since. Sums run over the ranks in their order,
so all GPUs have the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from teal.kernels.gemv.gather import let_next_start, wait_for_previous
from teal.kernels.gemv.launch import DTYPES, launch_options
from teal.kernels.gemv.op import make_op
from teal.kernels.reduce_partials import BLOCK, check, check_tensor, store_sum, sum_of_splits


@triton.jit
def word_of(value, epoch):
    """int64 words of fp32 values and an epoch."""
    bits = value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return (epoch.to(tl.int64) << 32) | bits


@triton.jit
def received(p_words, epoch, mask):
    """The values in words, once all are of this epoch."""
    words = tl.load(p_words, mask=mask, other=epoch.to(tl.int64) << 32, volatile=True)
    while tl.sum(((words >> 32) != epoch).to(tl.int32)) > 0:
        words = tl.load(p_words, mask=mask, other=epoch.to(tl.int64) << 32, volatile=True)
    return words.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["B"])
def exchange_partials_kernel(
    p_partial, p_bias, p_residual, p_out, p_words, p_epochs, p_peers, B, N, M, RANK: tl.constexpr, RANKS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    i_row, i_program = tl.program_id(1), tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    if HAS_BIAS:
        bias = tl.load(p_bias + columns, mask=inside, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    epoch = tl.load(p_epochs + i_program) + 1
    own = sum_of_splits(p_partial, i_row, columns, B, N, SPLITS, BLOCK_S)
    if HAS_BIAS:
        own += bias
    entries = (epoch & 1) * RANKS * M + i_row * N + columns
    sent = word_of(own, epoch)
    for i in tl.static_range(1, RANKS):  # not to the same one first from everywhere
        p_peer = tl.load(p_peers + (RANK + i) % RANKS).to(tl.pointer_type(tl.int64))
        tl.store(p_peer + entries + RANK * M, sent, mask=inside, cache_modifier=".wt")
    tl.debug_barrier()  # all threads of this program have read the epoch
    tl.store(p_epochs + i_program, epoch)
    let_next_start(PDL)
    y = tl.zeros_like(own)
    for i in tl.static_range(RANKS):
        if i == RANK:
            y += own
        else:
            y += received(p_words + entries + i * M, epoch, inside)
    store_sum(y, p_out, p_residual, i_row, columns, N, HAS_RESIDUAL)


def programs_of(rows: int, columns: int) -> int:
    """How many programs exchange so many values, each of which counts epochs."""
    return rows * triton.cdiv(columns, BLOCK)


def launch(
    partials: Tensor, dtype: torch.dtype, bias: Tensor | None, residual: Tensor | None, words: Tensor, epochs: Tensor,
    peers: Tensor, rank: int,
) -> Tensor:  # fmt: skip
    """Sum over partials [splits, B, N] of all ranks, plus bias [N] of each, rounded to dtype, plus residual [B, N].

    words int64 [2, ranks, M], which others write to; epochs int32; peers int64 [ranks]: addresses of the words of all
    ranks. partials are of any dtype of DTYPES, the rest is as in reduce_partials. All ranks call it with the same
    shapes in the same order. Returns [B, N]. Raises ValueError on a mismatch.
    """
    check(partials, DTYPES, dtype, bias, residual)
    splits, B, N = partials.shape
    for name, tensor, kind in (
        ("words", words, torch.int64),
        ("epochs", epochs, torch.int32),
        ("peers", peers, torch.int64),
    ):
        check_tensor(name, tensor, tensor.shape, (kind,), partials.device)
    if words.dim() != 3 or words.shape[:2] != (2, len(peers)):
        raise ValueError(f"words is {tuple(words.shape)}: expected [2, {len(peers)}, values]")
    if words.shape[2] < B * N or programs_of(B, N) > len(epochs):
        raise ValueError(f"{B} rows of {N} values: the buffer has room for {words.shape[2]} and {len(epochs)} programs")
    if not 0 <= rank < len(peers):
        raise ValueError(f"rank {rank}: expected 0 to {len(peers) - 1}")
    out = torch.empty(B, N, dtype=dtype, device=partials.device)
    exchange_partials_kernel[(triton.cdiv(N, BLOCK), B)](
        partials, bias, residual, out, words, epochs, peers, B, N, words.shape[2], RANK=rank, RANKS=len(peers),
        SPLITS=splits, BLOCK_S=triton.next_power_of_2(splits), HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, BLOCK=BLOCK, **launch_options(partials.device, num_warps=4),
    )  # fmt: skip
    return out


exchange_partials = make_op(
    "exchange_partials",
    launch,
    lambda partials, dtype: torch.empty(partials.shape[1:], dtype=dtype, device=partials.device),
    mutates=("words", "epochs"),
)
