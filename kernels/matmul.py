"""A product with weights in floats for many rows. CPUs without bf16 instructions multiply in fp32.

Torch emulates products of 16 bits there. On two cores of a Xeon (AVX-512, no bf16) 512 rows of 576 x 1536 took 18.1 ms
in bf16. By way of fp32 it was 4.6.
"""

from typing import Any

import torch
from torch import Tensor

from teal.kernels.cpu.native import native_kernels


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, K] @ weight [K, N], in their dtype; on a CPU that would emulate its products, in fp32 and rounded once."""
    if x.device.type != "cpu" or x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and bf16_kernels()):
        return x @ weight
    return (x.float() @ weight.float()).to(x.dtype)


def bf16_kernels() -> Any | None:
    """The compiled kernels, if the processor has vdpbf16ps."""
    native = native_kernels()
    return native if hasattr(native, "block_matmul") else None
