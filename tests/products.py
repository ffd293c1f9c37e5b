"""Inputs of sparse products, what they should give in fp64, and how close partial sums must come."""

import torch
from torch import Tensor

from tests.conftest import relative_error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FP32_SUMS = 1e-6  # relative error of partial sums: products are exact, sums are fp32


def make(B: int, K: int, segments: list[int], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, K, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(K, sum(segments), generator=generator).to(DEVICE, dtype)
    thresholds = torch.linspace(0.3, 0.9, len(segments)).to(DEVICE)
    return x, weight, thresholds


def close(partials: Tensor, expected: Tensor, name: str, tolerance: float = FP32_SUMS) -> None:
    actual = partials.double().sum(0)
    assert actual.shape == expected.shape, name
    if expected.double().norm() == 0:
        assert actual.abs().max() == 0, name
    else:
        assert relative_error(actual, expected) <= tolerance, name


def reference(x: Tensor, weight: Tensor, thresholds: Tensor, segments: list[int]) -> Tensor:
    """sparse_linear_reference with fp64 sums, so that only the kernel's rounding counts."""
    parts = []
    for threshold, columns in zip(thresholds.to(x.dtype), weight.double().split(segments, dim=1), strict=True):
        parts.append(torch.where(x.abs() < threshold, 0, x).double() @ columns)
    return torch.cat(parts, dim=1)


def boundary_error(x: Tensor, weight: Tensor, thresholds: Tensor, segments: list[int]) -> float:
    """How much the product moves if every entry is rounded once more: what one unit in the last place can change."""
    step = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-22}[x.dtype]
    base = reference(x, weight, thresholds, segments)
    moved = reference(x, weight, thresholds * (1 + step), segments)
    rounding = step * reference(x, weight, thresholds, segments).norm() / 8
    return float(((base - moved).norm() + rounding) / base.norm())
