"""Products with weights of GGUF's block types (formats/blocks.py), by compiled kernels on a CPU or torch's operations.

The kernels round an entry of x to 16 bits, relative to the largest of its group of channels (cpu/blocks.cpp). If x is
fp32 they round it to 24. Torch's operations take the weight in fp32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from teal.kernels.cpu.native import native_kernels
from teal.kernels.formats.blocks import Blocks, column, dequantize
from teal.kernels.sparse_linear import drop_small

# With more rows a dense product with floats is as fast. 768 x 1536 in Q4_1, ms of a Zen 5 core in bf16:
#   rows       1      8      16     32
#   kernel     0.02   0.16   0.30   0.61
#   floats     0.46   0.49   0.53   0.60
KERNEL_ROWS = 24


def block_linear(x: Tensor, weight: Blocks, threshold: float = 0.0) -> Tensor:
    """x [B, K] times the weight [K, N], with entries |x| below threshold taken as 0: fp32 [B, N].

    The threshold is rounded to x's dtype before. Raises ValueError for an x of other channels.
    """
    if x.shape[-1] != weight.K:
        raise ValueError(f"x has {x.shape[-1]} channels: expected {weight.K}")
    native = native_kernels() if len(x) <= KERNEL_ROWS else None
    if native is not None:
        return native.block_product(x.contiguous(), weight.data, _numbers(weight), weight.N, threshold)
    kept = drop_small(x, torch.tensor(threshold).to(x.dtype)) if threshold else x
    return kept.float() @ block_floats([weight], torch.float32)


def block_floats(parts: Sequence[Blocks], dtype: torch.dtype) -> Tensor:
    """The weights [K, N] side by side: one weight in floats, rounded once from fp32."""
    if (native := native_kernels()) is None:
        return torch.cat([dequantize(part).to(dtype) for part in parts], dim=1)
    widths = [part.N for part in parts]
    found = torch.empty(parts[0].K, sum(widths), dtype=dtype)
    native.block_floats([part.data for part in parts], [n for part in parts for n in _numbers(part)], widths, found)
    return found


def block_columns(weight: Blocks, chosen: Tensor) -> Tensor:
    """The columns chosen, int64 [n], of a weight: fp32 [n, K]. Raises IndexError for one that is not there."""
    if (native := native_kernels()) is not None:
        return native.block_columns(weight.data, _numbers(weight), weight.K, weight.N, chosen)
    return torch.stack([column(weight, n) for n in chosen.tolist()])


def _numbers(weight: Blocks) -> list[int]:
    """Its type as the kernels take it."""
    found = weight.type
    return [found.bits, found.offset, found.group, int(found.has_minima), int(found.nested)]
