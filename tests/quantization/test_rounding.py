"""Quantized weights in memory: layout, rounding by each method, and products against plain fp32."""

import math

import pytest
import torch

from teal.checkpoint.presets import PRESETS
from teal.errors import UserError
from teal.kernels.formats.packing import dequantize, pack_int4, unpack_int4
from teal.kernels.quantized_matmul import quantized_matmul
from teal.kernels.reference import sparse_linear_reference
from teal.kernels.sparse_linear import sparse_linear, sparse_linear_op
from teal.layers.quantized_linear import pick_group_size, round_in_two_terms, round_to_nearest
from teal.quantization.gptq import gptq, gptq_input_groups
from teal.quantization.half_quadratic import half_quadratic
from tests.conftest import assert_near, relative_error

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_packing_is_undone_by_unpacking(group_size: int) -> None:
    values = torch.randint(0, 16, (5, 256), generator=torch.Generator().manual_seed(0))
    words = pack_int4(values, group_size)
    assert words.dtype == torch.int32 and words.shape == (5, 32)
    assert torch.equal(unpack_int4(words, group_size), values.to(torch.uint8))
    # the documented place of a column: nibble j of word w of group g
    g, j, w = 1, 5, 2
    column = g * group_size + j * group_size // 8 + w
    assert int(words[3, g * group_size // 8 + w]) >> 4 * j & 15 == int(values[3, column])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_errs_by_half_a_step(bits: int, dtype: torch.dtype) -> None:
    weight = torch.randn(20, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    values, scales, zeros = round_to_nearest(weight, bits, 32)
    assert scales.dtype == dtype and (zeros is None) == (bits == 8)
    exact = dequantize(values, scales.float(), zeros)
    steps = scales.float().repeat_interleave(32, dim=1)
    # int4: the zero point is rounded as well, which can cut off half a step at one end
    assert ((exact - weight.float()).abs() <= steps * (0.51 if bits == 8 else 1.01)).all()
    assert_near("weight", exact, weight.float(), 0.01 if bits == 8 else 0.11)


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-3])
def test_small_weights_of_fp16_are_rounded_as_large_ones(size: float) -> None:
    """Their scales are below the smallest normal number. A rotation makes such rows; as zeros they cost 0.14 nats."""
    weight = (size * torch.randn(6, 128, generator=torch.Generator().manual_seed(0))).half()
    refined = torch.arange(6, dtype=torch.int32)
    packed = {
        "8 bits": (round_to_nearest(weight, 8, 64), None, 0.01),
        "4 bits": (round_to_nearest(weight, 4, 64), None, 0.12),
        "both rows": (round_in_two_terms(weight, refined, 64), refined, 0.02),
    }
    x = torch.randn(1, 6, generator=torch.Generator().manual_seed(1)).half()
    for name, (parts, rows, limit) in packed.items():
        assert_near(name, dequantize(*parts, rows), weight, limit)
        product = sparse_linear(x, parts[0], torch.zeros(1), [128], parts[1], parts[2], rows, torch.float32)
        assert_near(f"product of {name}", product, x.float() @ weight.float(), 2 * limit)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [0.0, 3.0, -0.25, 1e-30])
def test_constant_rows_are_exact(value: float, bits: int) -> None:
    weight = torch.full((3, 64), value)
    values, scales, zeros = round_to_nearest(weight, bits, 32)
    assert torch.allclose(dequantize(values, scales, zeros), weight, rtol=1e-6, atol=1e-29)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("B", [1, 2, 4, 9])
def test_products_equal_those_of_the_dequantized_weight(
    B: int, group_size: int, bits: int, dtype: torch.dtype
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, 77, generator=generator).to(dtype)
    weight = round_to_nearest(torch.randn(77, 1152, generator=generator).to(dtype), bits, group_size)
    values, scales, zeros = weight
    exact = dequantize(values, scales.float(), zeros)
    thresholds, segments = torch.tensor([0.3, 0.9, 0.0]), [640, 384, 128]
    actual = sparse_linear(x, values, thresholds, segments, scales, zeros)
    expected = sparse_linear_reference(x, exact, thresholds, segments)
    assert actual.dtype == dtype
    assert_near("sparse product", actual, expected, TOLERANCE[dtype])
    dense = quantized_matmul(x, *weight)
    assert_near("dense product", dense, x.float() @ exact, 2 * TOLERANCE[dtype])


def test_a_product_in_several_blocks_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(3, 16), torch.randn(16, 320)
    packed = round_to_nearest(weight, 4, 32)
    whole = quantized_matmul(x, *packed)
    monkeypatch.setattr("teal.kernels.quantized_matmul.COLUMNS_AT_ONCE", 96)
    assert_near("product in blocks", quantized_matmul(x, *packed), whole, 1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_compiled_product_with_many_rows(bits: int) -> None:
    x, packed = torch.randn(3, 16), round_to_nearest(torch.randn(16, 320), bits, 32)
    compiled = torch.compile(quantized_matmul, fullgraph=True)(x, *packed)
    assert_near("compiled product", compiled, x @ dequantize(*packed), 1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_that_x_drops_are_never_read(bits: int) -> None:
    x = torch.randn(1, 64)
    values, scales, zeros = round_to_nearest(torch.randn(64, 96), bits, 32)
    limits = torch.tensor([0.7])
    expected = sparse_linear_reference(x, dequantize(values, scales, zeros), limits, [96])
    scales[(x.abs() < limits)[0]] = math.nan
    found = sparse_linear(x, values, limits, [96], scales, zeros)
    assert_near("product beside poisoned scales", found, expected, 2e-6)


def test_bad_quantized_arguments_are_refused() -> None:
    x, limits = torch.ones(1, 4), torch.zeros(1)
    values, scales, zeros = round_to_nearest(torch.ones(4, 64), 4, 32)
    bad = {
        "zeros: expected": (x, values, limits, [64], scales, None),
        "expected the same": (x.bfloat16(), values, limits, [64], scales, zeros),
        "expected floats": (x, values, limits, [64], scales[:3], zeros),
        "expected uint8": (x, values, limits, [64], scales, scales),
        "no multiples of the group size": (x, values, torch.zeros(2), [48, 16], scales, zeros),
        "do not cover": (x, values, limits, [32], scales, zeros),
        "expected int8 or int32": (x, values.to(torch.int64), limits, [64], scales, zeros),
    }
    for message, arguments in bad.items():
        with pytest.raises(ValueError) as error:
            sparse_linear(*arguments)
        assert message in str(error.value), message


def test_opcheck() -> None:
    values, scales, zeros = round_to_nearest(torch.randn(16, 64), 4, 32)
    torch.library.opcheck(sparse_linear_op, (torch.randn(1, 16), values, torch.zeros(1), [64], scales, zeros))


@pytest.mark.parametrize("bits", [8, 4])
def test_gptq_changes_the_product_less_than_rounding(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 96, generator=generator) @ torch.randn(96, 96, generator=generator)  # correlated channels
    x[:, 7] = 0  # a channel that no token uses
    weight = torch.randn(96, 128, generator=generator)
    nearest, better = (
        dequantize(*packed) for packed in (round_to_nearest(weight, bits, 32), gptq(weight, x.t() @ x, bits, 32))
    )
    assert relative_error(x @ better, x @ weight) <= 0.8 * relative_error(x @ nearest, x @ weight), "product"
    assert_near("weights of the unused channel", better[7], nearest[7], 0.2)


@pytest.mark.parametrize("bits", [8, 4])
def test_gptq_with_groups_along_the_input(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    weight = torch.randn(96, 128, generator=generator)
    nearest = dequantize(*round_to_nearest(weight.t().contiguous(), bits, 32)).t()
    better = dequantize(*gptq_input_groups(weight, x.t() @ x, bits, 32))
    assert relative_error(x @ better, x @ weight) <= 0.8 * relative_error(x @ nearest, x @ weight), "product"
    of_independent_channels = dequantize(*gptq_input_groups(weight, torch.eye(96), bits, 32))
    assert torch.equal(of_independent_channels, nearest)  # rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_hqq_lowers_the_norm_it_is_for_in_every_group(bits: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.distributions.StudentT(3.0).sample((24, 192)).to(dtype)
    weight[5, 64:128], weight[6, :64] = 0.0, torch.rand(64, generator=generator).to(dtype) + 3.0

    def norms(packed: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
        exact = dequantize(packed[0], packed[1].float(), packed[2])
        return ((exact - weight.float()).abs() ** 0.7).view(24, 3, 64).sum(-1)

    found, rounded = norms(half_quadratic(weight, bits, 64)), norms(round_to_nearest(weight, bits, 64))
    assert (found <= rounded * (1 + 1e-6)).all() and found.sum() <= (0.98 if bits == 4 else 1.0) * rounded.sum()


def test_gptq_of_independent_channels_is_rounding() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for found, expected in zip(gptq(weight, torch.eye(64), 4, 32), round_to_nearest(weight, 4, 32), strict=True):
        assert found is not None and expected is not None and torch.equal(found, expected)


def test_group_sizes() -> None:
    assert pick_group_size(PRESETS["Llama-3-8B"], None) == 128
    assert pick_group_size(PRESETS["SmolLM2-135M"], None) == 64
    assert pick_group_size(PRESETS["SmolLM2-135M"], 32) == 32
    with pytest.raises(UserError, match="128 does not fit the q width 576"):
        pick_group_size(PRESETS["SmolLM2-135M"], 128)
