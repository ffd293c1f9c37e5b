"""Bits by energy in memory: which channels the budget refines, and what a second row of 4 bits leaves of an error."""

import math

import pytest
import torch
from torch import Tensor

from teal.calibration.energy import ChannelEnergy
from teal.errors import UserError
from teal.kernels.formats.packing import dequantize
from teal.layers.quantized_linear import QuantConfig, round_in_two_terms, round_to_nearest
from teal.quantization import refinement
from teal.quantization.gptq import gptq
from teal.quantization.refinement import UNIT, Costs, best_channels, channel_costs
from tests.conftest import assert_near, relative_error

SHAPES = [(64, 160), (64, 96), (96, 32), (32, 320)]  # modules K x N of no common size


def modules(seed: int = 0) -> list[Costs]:
    generator = torch.Generator().manual_seed(seed)
    return [Costs(torch.rand(K, generator=generator) ** 4, N) for K, N in SHAPES]


def average_bits(costs: list[Costs], refined: list[Tensor]) -> float:
    weights = sum(len(c.channels) * c.columns for c in costs)
    return 4 + 4 * sum(len(r) * c.columns for r, c in zip(refined, costs, strict=True)) / weights


@pytest.mark.parametrize("bits", [4, 4.1, 4.25, 4.5, 6.3, 7.99, 8])
def test_the_budget_is_spent_and_never_exceeded(bits: float) -> None:
    costs = modules()
    refined = best_channels(costs, bits)
    least = 4 * UNIT * min(N for _, N in SHAPES) / sum(K * N for K, N in SHAPES)
    assert bits - least < average_bits(costs, refined) <= bits
    for (K, _), channels in zip(SHAPES, refined, strict=True):
        assert channels.dtype == torch.int32 and len(channels) % UNIT == 0
        assert channels.tolist() == sorted(set(channels.tolist())) and all(0 <= c < K for c in channels.tolist())
    if bits in (4, 8):
        assert [len(r) for r in refined] == [0 if bits == 4 else K for K, _ in SHAPES]


def test_no_other_choice_of_as_many_bytes_costs_less() -> None:
    """Of modules of one size, by trying all: 2 units of 3 modules with 2 units each."""
    costs = [Costs(c.channels[:32], 64) for c in modules(seed=1)[:3]]

    def left(refined: list[Tensor]) -> float:
        return sum(float(c.channels.sum() - c.channels[r.long()].sum()) for c, r in zip(costs, refined, strict=True))

    best = left(best_channels(costs, 4 + 4 * 2 / 6))
    orders = [c.channels.argsort(descending=True) for c in costs]
    counts = [(a, b, 2 - a - b) for a in range(3) for b in range(3 - a)]
    others = [left([o[: UNIT * n] for o, n in zip(orders, own, strict=True)]) for own in counts]
    assert best == pytest.approx(min(others)) and best < 0.99 * sorted(others)[1]


def test_what_a_byte_takes_off_decides() -> None:
    """Narrow channels that cost half of what wide ones do, at a tenth of the bytes, come first."""
    wide, narrow = Costs(torch.full((UNIT,), 2.0), 320), Costs(torch.full((2 * UNIT,), 1.0), 32)
    first, second = best_channels([wide, narrow], 4 + 4 * 320 / (320 + 64))
    assert len(first) == 0 and len(second) == 2 * UNIT


def test_costs_are_by_definition_and_find_a_planted_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refinement, "WEIGHTS_AT_ONCE", 960)  # ten channels
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 96, generator=generator)
    inputs, more = torch.rand(64, generator=generator) + 0.5, torch.rand(32, generator=generator)
    inputs[37] = 1000.0
    costs = channel_costs(weight, [64, 32], [ChannelEnergy(inputs, 0.25), ChannelEnergy(2 * inputs, more)], 32)
    error = (weight - dequantize(*round_to_nearest(weight, 4, 32))).double().square()
    expected = inputs * (0.25 * error[:, :64].sum(1) + 2 * (error[:, 64:] * more).sum(1)) / 2
    assert_near("costs", costs.channels, expected, 1e-6)
    assert costs.columns == 96 and int(costs.channels.argmax()) == 37
    other = Costs(costs.channels.where(costs.channels < 100, 0.0), 96)
    first, second = best_channels([other, costs], 4 + 4 * UNIT / 128)  # one unit in all
    assert len(first) == 0 and len(second) == UNIT and 37 in second.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_a_second_row_leaves_a_two_hundredth_of_the_error(group_size: int, dtype: torch.dtype) -> None:
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    refined = torch.tensor([0, 5, 6, 31, 47], dtype=torch.int32)
    values, scales, zeros = round_in_two_terms(weight, refined, group_size)
    assert values.shape == (53, 32) and scales.shape == (53, 256 // group_size) and scales.dtype == dtype
    both = dequantize(values, scales.float(), zeros, refined)
    one = dequantize(*(t[:48].float() if t is scales else t[:48] for t in (values, scales, zeros)))  # type: ignore[index]
    error, first = ((w - weight.float()).square().sum(1) for w in (both, one))
    is_refined = torch.zeros(48, dtype=torch.bool).index_fill(0, refined.long(), True)
    assert float(error[is_refined].sum()) <= float(first[is_refined].sum()) / 200
    assert torch.equal(both[~is_refined], one[~is_refined])
    for plain, part in zip(round_to_nearest(weight, 4, group_size), (values, scales, zeros), strict=True):
        assert plain is not None and part is not None and torch.equal(plain, part[:48])


def test_no_refined_channel_is_rounding_to_nearest() -> None:
    weight = torch.randn(8, 64)
    for found, expected in zip(
        round_in_two_terms(weight, torch.empty(0, dtype=torch.int32), 32), round_to_nearest(weight, 4, 32), strict=True
    ):
        assert found is not None and expected is not None and torch.equal(found, expected)


@pytest.fixture
def correlated() -> tuple[Tensor, Tensor]:
    """Inputs [T, 96] of correlated channels, some of them energetic, and a weight [96, 64]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 24, generator=generator) @ torch.randn(24, 96, generator=generator) / 5
    x += 0.5 * torch.randn(400, 96, generator=generator)
    return x * torch.logspace(0, 1.5, 96), torch.randn(96, 64, generator=generator)


def test_gptq_makes_up_for_what_both_rows_leave(correlated: tuple[Tensor, Tensor]) -> None:
    x, weight = correlated
    refined = torch.arange(80, 96, dtype=torch.int32)
    hessian, exact = x.t() @ x, x @ weight

    def error(packed: tuple[Tensor, Tensor, Tensor | None], channels: Tensor | None) -> float:
        return relative_error(x @ dequantize(*packed, channels), exact)

    mixed = error(gptq(weight, hessian, 4, 32, refined), refined)
    plain, nearest = error(gptq(weight, hessian, 4, 32), None), error(round_in_two_terms(weight, refined, 32), refined)
    assert mixed < 0.7 * min(plain, nearest), f"mixed {mixed:.4f}, int4 {plain:.4f}, nearest {nearest:.4f}"


def test_gptq_of_independent_channels_is_rounding_in_two_terms() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    refined = torch.tensor([3, 17, 60], dtype=torch.int32)
    found, expected = gptq(weight, torch.eye(64), 4, 32, refined), round_in_two_terms(weight, refined, 32)
    assert_near("weight", dequantize(*found, refined), dequantize(*expected, refined), 1e-6)


def test_bits_that_are_no_number_are_no_budget() -> None:
    for bits in (3.99, 8.01, math.nan, None):
        with pytest.raises(UserError, match="out of range; expected 4 <= bits <= 8"):
            QuantConfig("mixed", 32, average_bits=bits)
