"""A product with weights in floats for many rows. CPUs without bf16 instructions multiply in fp32.

Torch emulates products of 16 bits there, and those of fp16 badly. ms on two cores of a Xeon (AVX-512, no bf16):

    rows                    16      32      64     512
    576 x 1536, bf16      0.67    1.14    2.12    18.1
                fp16        18      35      66
                fp32      0.44    0.50    0.85     4.6      with the making of it
    1536 x 8960, bf16       13      35      35
                 fp16      439     974    2458
                 fp32       27      31      31
"""

from typing import Any

import torch
from torch import Tensor

from teal.kernels.cpu.native import native_kernels

MIN_BF16_ROWS = 32  # with fewer, making floats of the weight takes longer than multiplying as it is


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, K] @ weight [K, N], in their dtype; on a CPU that would emulate its products, in fp32 and rounded once."""
    if x.device.type != "cpu" or x.dtype == torch.float32:
        return x @ weight
    if x.dtype == torch.bfloat16 and (x.shape[0] < MIN_BF16_ROWS or bf16_kernels()):
        return x @ weight
    return (x.float() @ weight.float()).to(x.dtype)


def bf16_kernels() -> Any | None:
    """The compiled kernels, if the processor has vdpbf16ps."""
    native = native_kernels()
    return native if hasattr(native, "block_matmul") else None
