"""The pictures of memory in docstrings are what the code does: their lines are read and compared."""

import re
from typing import Any

import numpy as np
import pytest
import torch

from teal.kernels import reduce_partials, sparse_gemv
from teal.kernels.formats import kv_int8, packing
from teal.kernels.gemv import gather_tensor_core
from teal.kernels.gemv.tuning import GemvTile
from tests import lanes
from tests.products import DEVICE


def lines(module: Any, pattern: str) -> list[list[int]]:
    """The numbers in each line of the module's docstring that matches."""
    found = [line for line in module.__doc__.splitlines() if re.search(pattern, line)]
    assert found, pattern
    return [[int(number) for number in re.findall(r"\b\d+", line)] for line in found]


def test_words_of_4_bits() -> None:
    table = lines(packing, r"word \d +bytes")
    assert [word for word, *_ in table] == [0, 1, 2, 3]
    for word, first, last, *columns in table:
        assert (first, last) == (4 * word, 4 * word + 3)
        for nibble, column in enumerate(columns):
            values = torch.zeros(1, 32, dtype=torch.int32)
            values[0, column] = 9
            expected = torch.zeros(16, dtype=torch.uint8)
            expected[first + nibble // 2] = 9 << 4 * (nibble % 2)
            assert packing.pack_int4(values, 32).view(torch.uint8)[0].equal(expected), (word, column)


@pytest.mark.parametrize("bits", [8, 4])
def test_which_scale_a_weight_has(bits: int) -> None:
    """Groups along the output are columns of one channel, those along the input channels of one column."""
    K, N, group = 64, 128, 32
    ones = torch.ones(K, N, dtype=torch.int8)
    values = ones if bits == 8 else packing.pack_int4(ones, group)
    by_output, by_input = torch.rand(K, N // group), torch.rand(K // group, N)
    for scales, expected in (
        (by_output, by_output.repeat_interleave(group, dim=1)),
        (by_input, by_input.repeat_interleave(group, dim=0)),
    ):
        zeros = None if bits == 8 else torch.zeros_like(scales, dtype=torch.uint8)
        assert packing.dequantize(values, scales, zeros).equal(expected)


def test_a_vector_of_the_kv_cache_in_8_bits() -> None:
    D, width = lines(kv_int8, "For D =")[0][-2:]
    vector = torch.linspace(-2, 3, D)
    packed = kv_int8.pack_int8(vector)
    assert packed.shape == (width,) == (kv_int8.packed_width(D),)
    scale = np.float32(3) / np.float32(127)
    contents = {"values": np.round(vector.numpy() / scale).astype(np.int8).tobytes(), "scale": scale.tobytes()}
    for name, content in contents.items():
        [(first, last, *_)] = lines(kv_int8, f"bytes.*{name},")
        assert packed[first : last + 1].numpy().tobytes() == content, name
    for first, last, *_ in lines(kv_int8, "bytes.*unused"):
        assert not packed[first : last + 1].any()


def test_what_the_lanes_of_a_warp_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each lane in the picture of gather_tensor_core.py, which rows and bytes it loads in a step."""
    if torch.cuda.is_available():
        pytest.skip("the assembly's addresses are seen only where the interpreter runs it")
    lanes.emulate(monkeypatch)
    loads: list[np.ndarray] = []

    def load_weights(address: Any, policy: Any) -> tuple:
        loads.append(lanes.numbers(address).copy())
        return lanes.load_four(address)

    monkeypatch.setattr(gather_tensor_core, "load_weights", load_weights)
    weight = torch.zeros(16, 256 // 8, dtype=torch.int32)  # 16 rows of 128 bytes
    scales, zeros = torch.ones(16, 2, dtype=torch.bfloat16), torch.zeros(16, 2, dtype=torch.uint8)
    x, tile = torch.ones(1, 16, dtype=torch.bfloat16), GemvTile(256, 4, 4, 1, 1)
    sparse_gemv.launch(x, weight, torch.zeros(1), [256], scales, zeros, None, tile)
    offsets = np.stack(loads[:4]) - weight.data_ptr()  # [row of four, lane]
    begins = lines(gather_tensor_core, r"bytes 0\.\.15")[0][::2]
    for first, last, *picture in lines(gather_tensor_core, r"rows +\d+\.\.\d+ +lane"):
        for begin, lane in zip(begins, picture[: len(begins)], strict=True):
            assert offsets[:, lane].tolist() == [128 * row + begin for row in range(first, last + 1)], lane


def test_partial_sums_stand_split_by_split() -> None:
    assert "(s B + b) N + n is split s, row b, column n" in str(reduce_partials.__doc__)
    S, B, N = 3, 2, 5
    flat, found = torch.rand(S * B * N), torch.zeros(B, N)
    for s, b, n in np.ndindex(S, B, N):
        found[b, n] += flat[(s * B + b) * N + n]
    actual = reduce_partials.launch(flat.view(S, B, N).to(DEVICE), torch.float32, None, None)
    assert torch.allclose(actual.cpu(), found)
