"""Modules with quantized weights: one product by two ways, chosen by phase, or in the head by the number of rows."""

import pytest
import torch
from torch import nn

from teal.layers import quantized_linear
from teal.layers.phase import decoding
from teal.layers.quantized_linear import QuantizedHead, QuantizedLinear, round_to_nearest
from teal.options import MAX_ROWS
from tests.conftest import relative_error

K, N = 64, 96


@pytest.fixture
def by_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each product that is made a block of columns at a time."""
    seen: list[int] = []
    product = quantized_linear.quantized_matmul

    def spied(x: torch.Tensor, *arguments: object) -> torch.Tensor:
        seen.append(x.numel() // K)
        return product(x, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(quantized_linear, "quantized_matmul", spied)
    return seen


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 1)], ids=str)
def test_the_phase_decides_and_not_the_shape(bits: int, shape: tuple[int, int], by_blocks: list[int]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(K, N, bias=True).requires_grad_(False)
    module = QuantizedLinear(linear, bits, 32)
    module.set_weight(*round_to_nearest(linear.weight.t().contiguous(), bits, 32))
    x = torch.randn(*shape, K)
    expected = x @ module.dequantized() + linear.bias
    assert relative_error(module(x), expected) <= 1e-6, "prefill"
    assert by_blocks == [shape[0] * shape[1]]
    with decoding(module):
        assert relative_error(module(x), expected) <= 1e-6, "decode"
    assert len(by_blocks) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_head_gives_fp32_whatever_the_rows(dtype: torch.dtype, by_blocks: list[int]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(K, N, bias=False, dtype=dtype).requires_grad_(False)
    head = QuantizedHead(linear, 32)
    head.set_weight(*round_to_nearest(linear.weight.t().contiguous(), 8, 32))
    x = torch.randn(1, MAX_ROWS + 1, K).to(dtype)
    many, few = head(x), head(x[:, :MAX_ROWS])
    assert by_blocks == [MAX_ROWS + 1] and many.dtype == few.dtype == torch.float32
    assert relative_error(few, many[:, :MAX_ROWS]) <= (1e-6 if dtype == torch.float32 else 3e-3), "few rows"
