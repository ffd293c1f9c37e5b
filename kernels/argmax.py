"""The end of a greedy step: the argmax of each row of logits, and its position moved on."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from teal.kernels.gemv.gather import let_next_start, wait_for_previous
from teal.kernels.gemv.launch import DTYPES, launch_options
from teal.kernels.gemv.op import make_op

MAX_BLOCKS = 128  # of a row of logits: a program for each, about as many as an H100 has multiprocessors
MIN_BLOCK = 256


@triton.jit
def first_largest(x, index):
    """(largest of x, index of its first occurrence); a NaN is larger than all."""
    x = tl.where(x != x, float("inf"), x)
    largest, at = tl.max(x, axis=0, return_indices=True, return_indices_tie_break_left=True)
    return largest, tl.max(tl.where(tl.arange(0, x.shape[0]) == at, index, 0), axis=0)


@triton.jit
def largest_of_blocks_kernel(p_logits, p_largest, p_index, V, BLOCK: tl.constexpr, PDL: tl.constexpr):
    i_block, i_row = tl.program_id(0), tl.program_id(1)
    index = i_block * BLOCK + tl.arange(0, BLOCK)
    wait_for_previous(PDL)
    let_next_start(PDL)
    x = tl.load(p_logits + i_row.to(tl.int64) * V + index, mask=index < V, other=float("-inf")).to(tl.float32)
    largest, at = first_largest(x, index)
    slot = i_row * tl.num_programs(0) + i_block
    tl.store(p_largest + slot, largest)
    tl.store(p_index + slot, at)


@triton.jit
def take_largest_kernel(
    p_largest, p_index, p_token, p_position, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    i_row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    wait_for_previous(PDL)
    largest = tl.load(p_largest + i_row * BLOCKS + i, mask=i < BLOCKS, other=float("-inf"))
    index = tl.load(p_index + i_row * BLOCKS + i, mask=i < BLOCKS, other=0)
    _, token = first_largest(largest, index)
    tl.store(p_token + i_row, token.to(tl.int64))
    tl.store(p_position + i_row, tl.load(p_position + i_row) + 1)


def launch(logits: Tensor, token: Tensor, position: Tensor) -> None:
    """Write the index of each row's largest logit, the first of several, into token and add 1 to position.

    logits contiguous [B, V] of 16 or 32 bits; token and position contiguous int64 with B values. Torch's argmax gives
    one row of 128,256 to few of a GPU's cores: 37 us on an H100. The rest would be four more kernels. Raises ValueError
    on a mismatch.
    """
    if logits.dim() != 2 or logits.dtype not in DTYPES or not logits.is_contiguous():
        raise ValueError(f"logits are {logits.dtype} {tuple(logits.shape)}: expected contiguous [B, V]")
    B, V = logits.shape
    for name, tensor in (("token", token), ("position", position)):
        if tensor.dtype != torch.int64 or tensor.numel() != B or not tensor.is_contiguous():
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}: expected {B} contiguous int64")
        if tensor.device != logits.device:
            raise ValueError(f"{name} is on {tensor.device} and logits on {logits.device}: expected the same")
    block = max(MIN_BLOCK, triton.next_power_of_2(triton.cdiv(V, MAX_BLOCKS)))
    blocks = triton.cdiv(V, block)
    largest = torch.empty(B, blocks, dtype=torch.float32, device=logits.device)
    index = torch.empty(B, blocks, dtype=torch.int32, device=logits.device)
    options = launch_options(logits.device, num_warps=4)
    largest_of_blocks_kernel[(blocks, B)](logits, largest, index, V, BLOCK=block, **options)
    take_largest_kernel[(B,)](
        largest, index, token, position, BLOCKS=blocks, BLOCK=triton.next_power_of_2(blocks), **options
    )


argmax_step = make_op("argmax_step", launch, lambda: None, mutates=("token", "position"))
