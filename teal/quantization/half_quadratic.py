"""Half-quadratic quantization (Badri & Shaji 2023, mobiusml.github.io/hqq_blog) for scales and whole zeros.

No data: a group's scale and zero minimize sum |w - rounded w|^p with p < 1. That lets a few weights be far off where
it brings the others near. The outliers (a generalized soft threshold) and a least-squares fit of the rest alternate.
The published method keeps the scale and fits a fractional zero; ours are whole numbers, so both are fitted.
"""

import torch
from torch import Tensor

from teal.layers.quantized_linear import Packed, group_scales, pack, round_groups

P = 0.7  # the norm, and BETA, GROWTH and ITERATIONS: the published values
BETA, GROWTH = 10.0, 1.01
ITERATIONS = 20


def half_quadratic(weight: Tensor, bits: int, group_size: int) -> Packed:
    """weight [K, N] -> values, scales (of its dtype), zeros, as quantization.round_to_nearest gives them."""
    K, N = weight.shape
    groups = weight.float().view(K, N // group_size, group_size)
    scales, zeros = group_scales(groups, bits, weight.dtype)
    best = scales, zeros
    least = _error(groups, scales, zeros, bits)
    beta = BETA
    for _ in range(ITERATIONS):
        scales, zeros = _fit(groups, scales, zeros, bits, beta)
        error = _error(groups, scales, zeros, bits)
        better = error < least
        best = torch.where(better, scales, best[0]), torch.where(better, zeros, best[1])
        least = torch.where(better, error, least)
        beta *= GROWTH
    return pack(round_groups(groups, *best, bits).view(K, N), *best, bits)


def _fit(groups: Tensor, scales: Tensor, zeros: Tensor, bits: int, beta: float) -> tuple[Tensor, Tensor]:
    """New scales (same dtype) and zeros (fp32) for the integers that the old ones give. Errors are in steps."""
    step = scales.float()[..., None]
    integers = round_groups(groups, scales, zeros, bits)
    off = groups / step - (integers - zeros[..., None])
    outliers = off.sign() * (off.abs() - off.abs().clamp(min=1e-8) ** (P - 1) / beta).clamp(min=0)
    target = groups / step - outliers
    if bits == 4:
        zeros = (integers - target).mean(-1).round().clamp(0, 15)
    centred = integers - zeros[..., None]
    square = centred.square().sum(-1)
    change = torch.where(square > 0, (target * centred).sum(-1) / square, 1.0)
    fitted = (scales.float() * change).to(scales.dtype)
    return torch.where(fitted > 0, fitted, scales), zeros


def _error(groups: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """sum |w - rounded w|^P of each group [K, G]."""
    integers = round_groups(groups, scales, zeros, bits)
    rounded = (integers - zeros[..., None]) * scales.float()[..., None]
    return ((groups - rounded).abs() ** P).sum(-1)
