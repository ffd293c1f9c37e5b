"""Products of a BlockWeight with many rows: parts, segments with thresholds of their own, floats that are kept."""

import pytest
import torch
from torch import nn

from teal.kernels.block_linear import INTEGER_KERNEL_ROWS, KERNEL_ROWS
from teal.kernels.formats.blocks import dequantize
from teal.layers.block_linear import BlockShape, BlockWeight, floats_kept
from tests.block_models import random_blocks
from tests.conftest import assert_near

SHAPES = [BlockShape("Q4_K", 256, 300), BlockShape("Q8_0", 256, 100)]
SEGMENTS, THRESHOLDS = [200, 130, 70], [0.0, 1.2, 0.6]  # a border within a part, and one of parts within a segment


@pytest.fixture
def weight() -> BlockWeight:
    made = BlockWeight(SHAPES, torch.bfloat16)
    for data, shape in zip(made.data, SHAPES, strict=True):
        data.copy_(random_blocks(*shape).data)
    return made


@pytest.mark.parametrize("keep", [False, True], ids=["tiles", "kept"])
@pytest.mark.parametrize("rows", [1, INTEGER_KERNEL_ROWS, INTEGER_KERNEL_ROWS + 1, KERNEL_ROWS, KERNEL_ROWS + 1, 100])
@pytest.mark.parametrize("dtype,limit", [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)], ids=["fp32", "bf16"])
def test_products(rows: int, dtype: torch.dtype, limit: float, keep: bool, weight: BlockWeight) -> None:
    """few and sparse drop what each segment's threshold says, many nothing."""
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = torch.cat([dequantize(part) for part in weight.parts], dim=1).double()
    kept = [torch.where(x.abs() < torch.tensor(t).to(dtype), 0, x.double()) for t in THRESHOLDS]
    expected = torch.cat([k @ part for k, part in zip(kept, whole.split(SEGMENTS, dim=1), strict=True)], dim=1)
    with floats_kept(weight if keep else nn.Identity()):
        found = weight.sparse(x, torch.tensor(THRESHOLDS), SEGMENTS)
        dense = weight.many(x)
    assert found.dtype == dense.dtype == dtype
    assert_near("sparse", found.float(), expected.float(), limit)
    assert_near("dense", dense.float(), (x.double() @ whole).float(), limit)
    assert weight.kept is None
