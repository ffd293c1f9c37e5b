"""Products of many rows on a CPU that has no bf16 instructions, where torch emulates those of 16 bits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from teal.kernels import block_linear, matmul
from teal.kernels.block_linear import block_matmul
from teal.kernels.formats.blocks import dequantize as block_floats
from teal.kernels.formats.packing import dequantize
from teal.kernels.quantized_matmul import quantized_matmul
from teal.kernels.sparse_linear import sparse_linear
from teal.layers.quantized_linear import round_to_nearest
from tests.block_models import random_blocks
from tests.conftest import assert_near

K, N, ROWS = 256, 192, 40


class Products(TorchDispatchMode):
    """Notes the dtypes of torch's products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in (torch.ops.aten.mm.default, torch.ops.aten.mm.out):
            self.dtypes.add(args[0].dtype)
        return op(*args, **(kwargs or {}))


def by_floats(x: Tensor) -> tuple[Tensor, Tensor]:
    weight = torch.randn(K, N).to(x.dtype)
    return matmul.matmul(x, weight), weight


def by_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    weight = random_blocks("Q4_1", K, N)
    return block_matmul(x, [weight]), block_floats(weight)


def by_sparse_floats(x: Tensor) -> tuple[Tensor, Tensor]:
    weight = torch.randn(K, N).to(x.dtype)
    return sparse_linear(x, weight, torch.zeros(2), [128, 64]), weight


def by_integers(x: Tensor) -> tuple[Tensor, Tensor]:
    weight = round_to_nearest(torch.randn(K, N).to(x.dtype), 4, 64)
    return quantized_matmul(x, *weight), dequantize(*weight)


@pytest.mark.parametrize("product", [by_floats, by_blocks, by_sparse_floats, by_integers])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cpu_without_bf16_multiplies_in_fp32(
    dtype: torch.dtype, product: Callable[[Tensor], tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By emulation a prompt took three times as long."""
    monkeypatch.setattr(matmul, "bf16_kernels", lambda: None)
    monkeypatch.setattr(block_linear, "_compiled_matmul", lambda dtype: None)
    x = torch.randn(ROWS, K).to(dtype)
    with Products() as products:
        y, weight = product(x)
    assert products.dtypes == {torch.float32} and y.dtype == dtype
    if product is not by_blocks:  # which makes floats of them in any case
        with Products() as products:
            product(x[:10])
        assert products.dtypes == {dtype if dtype == torch.bfloat16 else torch.float32}
    assert_near("product", y.float(), x.float() @ weight.float(), 2 ** (-9 if dtype == torch.bfloat16 else -11))
