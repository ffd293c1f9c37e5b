"""The CPU's kernel from quantized weights to floats gives the bits of plain PyTorch."""

import math

import pytest
import torch

from teal.kernels.cpu.native import native_kernels
from teal.kernels.formats.packing import Weight, dequantize
from teal.kernels.quantized_matmul import floats
from teal.layers.quantized_linear import round_to_nearest
from tests.kernels.test_input_groups import TOLERANCE, random_weight


def make(bits: int, group: int, by_input: bool, dtype: torch.dtype) -> Weight:
    if by_input:
        return Weight(*random_weight(128, 384, group, dtype, bits)[0])
    return Weight(*round_to_nearest(torch.randn(37, 384).to(dtype), bits, group))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("by_input", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [8, 4])
def test_bits_are_those_of_torch(bits: int, group: int, by_input: bool, dtype: torch.dtype) -> None:
    assert native_kernels() is not None
    weight = make(bits, group, by_input, dtype)
    assert weight.scales is not None
    weight.scales[0, 0], weight.scales[-1, -1] = math.inf, math.nan
    expected = dequantize(weight.values, weight.scales, weight.zeros)
    assert torch.equal(floats(weight).nan_to_num(7.0), expected.nan_to_num(7.0))
    out = torch.empty(len(expected), 256, dtype=dtype)
    assert floats(weight.columns(128, 384), out) is out
    assert torch.equal(out.nan_to_num(7.0), expected[:, 128:].nan_to_num(7.0))


def test_bad_arguments_are_refused() -> None:
    values, scales, zeros = round_to_nearest(torch.randn(16, 64), 4, 32)
    native, out = native_kernels(), torch.empty(16, 64)
    assert native is not None and zeros is not None
    for message, arguments in {
        "rows must be contiguous": (values, scales, zeros, None, out.t()),
        "expected the weight's": (values, scales, zeros, None, out[:8]),
        "the dtype of scales": (values, scales, zeros, None, out.half()),
        "one layout": (values, scales, zeros[:, :1].t(), None, out),
        "expected 32, 64 or 128": (values, scales.repeat(1, 2), zeros.repeat(1, 2), None, out),
    }.items():
        with pytest.raises(ValueError, match=message):
            native.dequantize(*arguments)
