"""Weights with groups along the input dimension, on a CPU, against plain fp32 products."""

import math

import pytest
import torch
from torch import Tensor

from kernels import dequantize as dequantize_file
from kernels.launch import check_gemv
from kernels.packing import Weight, dequantize, pack_int4
from kernels.quantized_matmul import quantized_matmul
from kernels.reference import sparse_linear_reference
from kernels.sparse_linear import MAX_KERNEL_ROWS, sparse_linear, sparse_linear_op
from tests.conftest import relative_error

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 4e-4}


def random_weight(
    K: int, N: int, group: int, dtype: torch.dtype, bits: int = 4
) -> tuple[tuple[Tensor, Tensor, Tensor | None], Tensor]:
    """A weight [K, N] with a scale for each column of group channels, and what it stands for, fp32."""
    generator = torch.Generator().manual_seed(0)
    least = 0 if bits == 4 else -128
    values = torch.randint(least, least + (1 << bits), (K, N), generator=generator)
    scales = (0.01 + 0.02 * torch.rand(K // group, N, generator=generator)).to(dtype)
    zeros = torch.randint(0, 17, (K // group, N), generator=generator) * (bits == 4)  # GPTQ stores one less: 16 occurs
    exact = torch.stack([(values[k] - zeros[k // group]) * scales[k // group].float() for k in range(K)])
    if bits == 8:
        return (values.to(torch.int8), scales, None), exact
    return (pack_int4(values, 32), scales, zeros.to(torch.uint8)), exact


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("group", [16, 32, 96, 192])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("B", [1, 2, 4, 9])
def test_products_equal_those_of_the_dequantized_weight(B: int, bits: int, group: int, dtype: torch.dtype) -> None:
    weight, exact = random_weight(192, 1152, group, dtype, bits)
    assert Weight(*weight).by_input and Weight(*weight).N == 1152
    assert torch.equal(dequantize(*weight), exact.to(dtype))
    x = torch.randn(B, 192, generator=torch.Generator().manual_seed(1)).to(dtype)
    thresholds, segments = torch.tensor([0.3, 0.9, 0.0]), [640, 384, 128]
    found = sparse_linear(x, weight[0], thresholds, segments, *weight[1:])
    expected = sparse_linear_reference(x, exact, thresholds, segments)
    tolerance = TOLERANCE[dtype] * (1 if B <= MAX_KERNEL_ROWS else 2)  # of more rows weights are rounded, too
    assert found.dtype == dtype and relative_error(found, expected) <= tolerance
    assert relative_error(quantized_matmul(x, *weight), x.float() @ exact) <= 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_has_the_bits_it_has_alone(bits: int) -> None:
    weight, _ = random_weight(192, 256, 64, torch.float32, bits)
    x = torch.randn(4, 192)
    x[1, :70], x[2] = 0.0, 0.0  # groups of which a row keeps nothing
    arguments = (weight[0], torch.tensor([0.5]), [256], *weight[1:])
    together = sparse_linear(x, *arguments)
    for row, expected in zip(x.split(1), together.split(1), strict=True):
        assert torch.equal(sparse_linear(row, *arguments), expected)
    assert torch.equal(together[2], torch.zeros(256))


def test_dropped_channels_and_their_groups_are_never_read() -> None:
    weight, exact = random_weight(192, 96, 64, torch.float32)
    x, limits = torch.randn(1, 192), torch.tensor([0.7])
    x[:, 64:128] = 0.0
    expected = sparse_linear_reference(x, exact, limits, [96])
    values, scales, zeros = weight
    scales[1] = math.nan
    values[(x.abs() < limits)[0]] = -1
    found = sparse_linear(x, values, limits, [96], scales, zeros)
    assert relative_error(found, expected) <= 2e-6


def test_a_product_in_blocks_of_columns_and_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, exact = random_weight(64, 320, 32, torch.float32)
    x = torch.randn(3, 64)
    monkeypatch.setattr("kernels.quantized_matmul.COLUMNS_AT_ONCE", 96)
    assert relative_error(quantized_matmul(x, *weight), x @ exact) <= 1e-6
    assert relative_error(torch.compile(quantized_matmul, fullgraph=True)(x, *weight), x @ exact) <= 1e-6


def test_opcheck() -> None:
    weight, _ = random_weight(64, 64, 32, torch.float32)
    values, scales, zeros = weight
    torch.library.opcheck(sparse_linear_op, (torch.randn(1, 64), values, torch.zeros(1), [64], scales, zeros))


def test_the_triton_kernels_refuse_them() -> None:
    (values, scales, zeros), _ = random_weight(96, 64, 32, torch.float32)
    with pytest.raises(ValueError, match="must have groups along the output"):
        check_gemv(Weight(values, scales, zeros), torch.zeros(1), [64], 96, 1)
    with pytest.raises(ValueError, match="expected groups along the output"):
        dequantize_file.launch(values, scales, zeros)


def test_bad_arguments_are_refused() -> None:
    weight, _ = random_weight(96, 64, 32, torch.float32)
    values, scales, zeros = weight
    x, limits = torch.ones(1, 96), torch.zeros(1)
    bad = {
        "5 groups along the input: expected a divisor of 96": (x, values, limits, [64], scales.new_ones(5, 64), zeros),
        "expected uint8": (x, values, limits, [64], scales, scales),
        "no multiples of the group size 32": (x, values, torch.zeros(2), [48, 16], scales, zeros),
    }
    for message, arguments in bad.items():
        with pytest.raises(ValueError) as error:
            sparse_linear(*arguments)
        assert message in str(error.value), message
