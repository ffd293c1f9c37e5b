"""Layout of a KV cache in 8 bits: each head's vector as D signed bytes, then its scale.

Symmetric, a scale for each token and head: a key or value is its byte times the scale. The largest entry's byte is 127.
D is rounded up to a multiple of 16, and what follows the scale keeps the next vector aligned. For D = 20, 48 bytes:

    bytes  0..19    D values, int8
    bytes 20..31    unused, 0
    bytes 32..35    scale, fp32, little-endian
    bytes 36..47    unused, 0
"""

import torch
from torch import Tensor

ALIGNMENT = 16
LARGEST = 127


def packed_width(D: int) -> int:
    """Bytes of a vector of D entries."""
    return -(-D // ALIGNMENT) * ALIGNMENT + ALIGNMENT


def pack_int8(x: Tensor) -> Tensor:
    """x [..., D] -> int8 [..., packed_width(D)]. A vector with an Inf or NaN becomes NaN."""
    x32 = x.float()
    scale = x32.abs().amax(-1, keepdim=True) / LARGEST
    values = (x32 / scale).nan_to_num(0.0, 0.0, 0.0).round().to(torch.int8)  # 0 / 0 where all is zero
    D, width = x.shape[-1], packed_width(x.shape[-1])
    packed = values.new_zeros(*x.shape[:-1], width)
    packed[..., :D] = values
    start = width - ALIGNMENT
    packed[..., start : start + 4] = _bytes(torch.where(scale.isinf(), torch.nan, scale))
    return packed


def unpack_int8(packed: Tensor, D: int, dtype: torch.dtype) -> Tensor:
    """The inverse of pack_int8, rounded to dtype: [..., D]."""
    start = packed.shape[-1] - ALIGNMENT
    parts = (packed[..., start : start + 4].to(torch.int32) & 255) << _shifts(packed.device)
    scale = parts.sum(-1, keepdim=True, dtype=torch.int32).view(torch.float32)
    return (packed[..., :D].float() * scale).to(dtype)


def _bytes(x: Tensor) -> Tensor:
    """The bytes of fp32 x [..., 1], lowest first: int8 [..., 4]. Inductor cannot view one dtype as a narrower one."""
    return (x.view(torch.int32) >> _shifts(x.device)).to(torch.uint8).view(torch.int8)


def _shifts(device: torch.device) -> Tensor:
    return 8 * torch.arange(4, dtype=torch.int32, device=device)
