"""A product with weights in floats for many rows. CPUs without bf16 instructions multiply in fp32.

Torch emulates products of 16 bits there, and those of fp16 badly. A tile of columns at a time becomes fp32, and stays
in a cache. ms on two cores of a Xeon (AVX-512, no bf16) for 1536 x 8960:

    rows                     1       4       8      16      32      64     512
    bf16                   1.9     4.7     6.8      11      20      34     255
    fp16, nn.Linear's      1.7     5.9      11      21
    fp16, weight [K, N]                            439     974    2458
    fp32, tiles                                    8.5      10      13      62
    fp32, whole             23      27      28      27      28      31      81
"""

import functools
from typing import Any

import torch
from torch import Tensor

from teal.kernels.cpu.native import native_kernels

MIN_FP32_ROWS = {torch.bfloat16: 16, torch.float16: 6}  # with fewer, making floats of the weight takes longer
TILE = 1 << 21  # weights; 2^19 and 2^22 take 512 rows 74 and 63 ms


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, K] @ weight [K, N], in their dtype; on a CPU that would emulate its products, in fp32 and rounded once."""
    if x.device.type == "cpu" and emulates(x.dtype) and x.shape[0] >= MIN_FP32_ROWS[x.dtype]:
        return matmul_in_fp32(x, weight)
    return x @ weight


def matmul_in_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, K] @ weight [K, N] of a dtype, with products and sums of fp32, rounded once."""
    wide = x.float()
    found = [(wide @ tile.float()).to(x.dtype) for tile in weight.split(max(1, TILE // x.shape[1]), dim=1)]
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def emulates(dtype: torch.dtype) -> bool:
    """Whether torch emulates a CPU's products of a dtype."""
    return dtype == torch.float16 or (dtype == torch.bfloat16 and bf16_kernels() is None)


@functools.cache  # asking for an op that is not there takes 6 us
def bf16_kernels() -> Any | None:
    """The compiled kernels, if the processor has vdpbf16ps."""
    native = native_kernels()
    return native if hasattr(native, "block_matmul") else None
