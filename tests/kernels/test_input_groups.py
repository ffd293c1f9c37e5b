"""Weights with groups along the input dimension against plain fp32 products: the CPU's kernel, and Triton's."""

import math

import pytest
import torch
from torch import Tensor

from teal.kernels import dequantize as dequantize_file
from teal.kernels import sparse_gemv as sparse_gemv_file
from teal.kernels.activation_gemv import activation_gemv
from teal.kernels.attention_gemv import attention_gemv
from teal.kernels.formats.packing import Weight, dequantize, pack_int4
from teal.kernels.gemv import launch
from teal.kernels.gemv.tuning import MAX_SPAN, GemvTile, input_run
from teal.kernels.norm_gemv import norm_gemv
from teal.kernels.quantized_matmul import quantized_matmul
from teal.kernels.reference import rms_norm_reference, silu_reference, sparse_linear_reference
from teal.kernels.sparse_gemv import sparse_gemv
from teal.kernels.sparse_linear import sparse_linear, sparse_linear_op
from teal.options import MAX_ROWS
from tests import lanes
from tests.conftest import relative_error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    tolerance = TOLERANCE[dtype] * (1 if B <= MAX_ROWS else 2)  # of more rows weights are rounded, too
    assert found.dtype == dtype and relative_error(found, expected) <= tolerance, "sparse product"
    assert relative_error(quantized_matmul(x, *weight), x.float() @ exact) <= 2 * TOLERANCE[dtype], "dense product"


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
    assert relative_error(found, expected) <= 2e-6, "product beside poisoned rows"


def test_a_product_in_blocks_of_columns_and_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, exact = random_weight(64, 320, 32, torch.float32)
    x = torch.randn(3, 64)
    monkeypatch.setattr("teal.kernels.quantized_matmul.COLUMNS_AT_ONCE", 96)
    for name, product in (("eager", quantized_matmul), ("compiled", torch.compile(quantized_matmul, fullgraph=True))):
        assert relative_error(product(x, *weight), x @ exact) <= 1e-6, f"{name} product"


def test_opcheck() -> None:
    weight, _ = random_weight(64, 64, 32, torch.float32)
    values, scales, zeros = weight
    torch.library.opcheck(sparse_linear_op, (torch.randn(1, 64), values, torch.zeros(1), [64], scales, zeros))


def on_device(weight: tuple[Tensor, Tensor, Tensor | None]) -> Weight:
    values, scales, zeros = weight
    return Weight(values.to(DEVICE), scales.to(DEVICE), None if zeros is None else zeros.to(DEVICE))


def floats(weight: Weight) -> Tensor:
    values, scales, zeros, _ = weight
    assert scales is not None
    return dequantize_file.launch(values, scales, zeros)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize(
    "K,group,B,bits,dtype",
    [
        (192, 32, 1, 4, torch.bfloat16),
        (192, 32, 3, 4, torch.float32),
        (192, 64, 3, 8, torch.bfloat16),
        (96, 96, 1, 8, torch.float32),
        (200, 40, 1, 4, torch.float16),
        (160, 80, 8, 4, torch.bfloat16),
        (16, 16, 1, 8, torch.float16),
    ],
    ids=str,
)
def test_the_triton_kernels(K: int, group: int, B: int, bits: int, dtype: torch.dtype) -> None:
    packed, exact = random_weight(K, 128, group, dtype, bits)
    weight, exact, segments = on_device(packed), exact.to(DEVICE), [64, 32, 32]
    for part, expected in ((weight, exact), (weight.columns(32, 96), exact[:, 32:96])):
        assert torch.equal(floats(part), expected.to(dtype))
    x = torch.randn(B, K, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    limits = torch.tensor([0.3, 0.9, 0.0], device=DEVICE)
    expected = sparse_linear_reference(x, exact, limits, segments)
    for splits in (None, 1, 3):
        tile = GemvTile(64, 2, 8, splits, 1) if splits else None
        found = sparse_gemv_file.launch(x, weight.values, limits, segments, *weight[1:], tile).sum(0)
        assert relative_error(found, expected) <= 1e-5, f"product in {splits} splits"  # sums are fp32 of exact products
    x[0, K // 2] = math.nan
    assert sparse_gemv(x, weight.values, limits, segments, *weight[1:]).sum(0)[0].isnan().all()


@pytest.mark.parametrize(
    "B,K,group,splits,span,bits,dtype",
    [
        (1, 192, 64, 3, 1, 4, torch.bfloat16),
        (1, 256, 32, 2, 4, 4, torch.float16),
        (1, 192, 96, 4, 1, 8, torch.bfloat16),
        (1, 192, 64, 1, 3, 8, torch.float16),
        (1, 320, 160, 6, 2, 4, torch.bfloat16),
        (3, 128, 32, 2, 2, 4, torch.bfloat16),
        (7, 160, 80, 4, 2, 8, torch.bfloat16),
        (8, 100, 50, 1, 1, 4, torch.bfloat16),
    ],
    ids=str,
)
def test_the_sum_on_tensor_cores(
    B: int, K: int, group: int, splits: int, span: int, bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes.emulate(monkeypatch)
    packed, exact = random_weight(K, 416, group, dtype, bits)
    weight, exact, segments = on_device(packed), exact.to(DEVICE), [288, 128]
    x = torch.randn(B, K, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    limits, tile = torch.tensor([0.3, 0.9], device=DEVICE), GemvTile(2048 // bits, 4, 4, splits, 2)
    meta = launch.plan_gemv(weight, limits, segments, B, tile).meta
    assert meta.TENSOR_CORE and span == meta.SPAN
    found = sparse_gemv_file.launch(x, weight.values, limits, segments, *weight[1:], tile).sum(0)
    assert relative_error(found, sparse_linear_reference(x, exact, limits, segments)) <= 1e-5, "product"
    x[0, K // 2] = math.inf  # stays within its row
    found = sparse_gemv_file.launch(x, weight.values, limits, segments, *weight[1:], tile).sum(0)
    assert not found[0].isfinite().any() and found[1:].isfinite().all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("B", [1, 2])
def test_the_fused_products(B: int, bits: int) -> None:
    K, N = 64, 96
    packed, exact = random_weight(K, N, 32, torch.float32, bits)
    weight, exact = on_device(packed), exact.to(DEVICE)
    values, *scales = weight
    limits, norm = torch.tensor([0.6], device=DEVICE), torch.rand(K, device=DEVICE) + 0.5
    x = torch.randn(B, K, device=DEVICE)
    found = norm_gemv(x, norm, 1e-5, values, limits, [N], *scales).sum(0)
    normed = rms_norm_reference(x, norm, 1e-5)
    assert relative_error(found, sparse_linear_reference(normed, exact, limits, [N])) <= 1e-5, "norm"
    gate_up = torch.randn(3, B, 2 * K, device=DEVICE)
    hidden = silu_reference(*gate_up.sum(0).chunk(2, dim=-1))
    found = activation_gemv(gate_up, values, limits, *scales).sum(0)
    assert relative_error(found, sparse_linear_reference(hidden, exact, limits, [N])) <= 1e-5, "silu"
    sums, one = torch.randn(B, 4, 1, 16, device=DEVICE), torch.ones(B, 4, 1, device=DEVICE)
    found = attention_gemv(sums, 0 * one, one, values, limits, *scales).sum(0)
    assert relative_error(found, sparse_linear_reference(sums.view(B, K), exact, limits, [N])) <= 1e-5, "attention"
    torch.library.opcheck(sparse_gemv, (x, values, limits, [N], *scales))


def test_a_run_of_channels_is_whole_groups_or_a_part_of_one() -> None:
    for K, group in ((4096, 128), (14336, 128), (28672, 32), (4096, 4096), (200, 40), (320, 160), (5120, 64)):
        for splits in (1, 5, 14, 33, 66, 99, 128):
            run = input_run(K, group, splits)
            assert (run % group == 0 and run <= MAX_SPAN * group) or (run % 16 == 0 and run < group)
            programs = -(-K // run)
            assert programs >= min(splits, K // group) // 2
            assert programs <= 2 * max(splits, -(-K // (MAX_SPAN * group)))
    assert input_run(4096, 128, 66) == 64 and input_run(14336, 32, 99) == 128


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
