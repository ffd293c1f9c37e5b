"""Modules with quantized weights: one product by two ways, chosen by phase, or in the head by the number of rows."""

import pytest
import torch
from torch import nn

from teal.kernels.formats.packing import dequantize
from teal.layers import quantized_linear
from teal.layers.phase import decoding
from teal.layers.quantized_linear import QuantizedHead, QuantizedLinear, round_in_two_terms, round_to_nearest
from teal.options import MAX_ROWS
from teal.teal_layers import SparseLinear
from tests.conftest import assert_near, relative_error

K, N = 64, 96
REFINED = torch.tensor([0, 3, 40, 63], dtype=torch.int32)


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


def mixed_linear(dtype: torch.dtype = torch.float32) -> tuple[QuantizedLinear, nn.Linear]:
    torch.manual_seed(0)
    linear = nn.Linear(K, N, bias=False, dtype=dtype).requires_grad_(False)
    module = QuantizedLinear(linear, 4, 32, refined_channels=len(REFINED))
    module.set_weight(*round_in_two_terms(linear.weight.t().contiguous(), REFINED, 32), REFINED)
    return module, linear


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 1)], ids=str)
def test_refined_channels_have_errors_of_8_bits(shape: tuple[int, int]) -> None:
    module, linear = mixed_linear()
    error = (module.dequantized() - linear.weight.t()).abs().amax(1)
    others = torch.ones(K, dtype=torch.bool).index_fill(0, REFINED.long(), False)
    assert error[REFINED].max() < error[others].min() / 8
    x = torch.randn(*shape, K)
    expected = x @ module.dequantized()
    assert_near("prefill", module(x), expected, 1e-6)
    with decoding(module):
        assert_near("decode", module(x), expected, 1e-6)
    assert module.state_dict()["refined"].equal(REFINED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_head_with_refined_channels(dtype: torch.dtype) -> None:
    module, linear = mixed_linear(dtype)
    head = QuantizedHead(linear, 32, bits=4, refined_channels=len(REFINED))
    head.load_state_dict(module.state_dict())
    x = torch.randn(1, MAX_ROWS + 1, K).to(dtype)
    exact = dequantize(head.weight, head.scales.float(), head.zeros, head.refined)
    for part in (x, x[:, :2]):
        assert head(part).dtype == torch.float32
        assert_near("logits", head(part), part.float() @ exact, 1e-6)


def test_weights_that_do_not_fit_a_module_are_refused() -> None:
    module, linear = mixed_linear()
    packed = round_in_two_terms(linear.weight.t().contiguous(), REFINED, 32)
    before = module.weight.clone()
    for message, refined in {
        "0 refined channels: expected 4": None,
        "3 refined channels: expected 4": REFINED[:3],
        "refined channel 3 follows 40: expected rising order": REFINED[[0, 2, 1, 3]],
        "refined channels are 1 to 64: expected 0 to 63": REFINED + 1,
    }.items():
        with pytest.raises(ValueError, match=message):
            module.set_weight(*packed, refined)
    with pytest.raises(ValueError, match="4 refined channels: expected 0"):
        QuantizedLinear(linear, 4, 32).set_weight(*packed, REFINED)
    assert module.weight.equal(before)


def test_bytes_count_both_rows_of_the_channels_that_are_kept() -> None:
    module, _ = mixed_linear()
    sparse = SparseLinear(module, ("gate", "up"), [64, 32])
    sparse.set_thresholds([1.0, 2.0])
    total = sum(t.nbytes for t in (module.weight, module.scales, module.zeros) if t is not None)
    assert sparse.bytes_read() == total
    x = torch.zeros(1, 2, K)
    x[0, 0, [0, 1, 3]], x[0, 1, 40] = 1.5, 2.5  # gate keeps rows 0 1 3, and 40, of both tokens; up only 40
    sparse.state.counting = True
    with decoding(sparse):
        assert_near("product", sparse(x)[..., :64], x @ module.dequantized()[:, :64], 1e-6)
    row = total / (K + len(REFINED))
    assert sparse.kept.tolist() == [[4, 1], [3, 1]]
    assert sparse.bytes_read() == pytest.approx(row * (64 / 96 * 7 + 32 / 96 * 2) / 2)
