"""GGUF's block types: the layout against the gguf package, products against fp32, bits, and what is not read."""

import pytest
import torch
from torch import Tensor

from teal.kernels import block_linear
from teal.kernels.block_linear import block_columns, block_floats, block_matmul, tiles
from teal.kernels.cpu.native import native_kernels
from teal.kernels.formats.blocks import (
    BLOCK_TYPES,
    STRIP,
    Blocks,
    column,
    columns,
    dequantize,
    pack,
    sections,
    size_of,
    unpack,
)
from tests.block_models import KINDS, floats_of, random_blocks, random_rows
from tests.conftest import assert_near

product = block_linear.block_linear
# Of x, as blocks.cpp rounds it: 24 bits relative to a group's largest, or 16.
TOLERANCES = [(torch.float32, 1e-6), (torch.bfloat16, 8e-5), (torch.float16, 8e-5)]
FLOAT_TOLERANCES = [(torch.float32, 2e-6), (torch.bfloat16, 6e-3), (torch.float16, 8e-4)]  # weights are rounded, too
COMPILED_MATMULS = ["block_matmul", "integer_matmul"]  # of many rows: each if the processor has instructions for it
SHAPES = [(256, 32), (768, 200), (1536, 128), (512, 1300)]


@pytest.mark.parametrize("K,N", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_is_exact(kind: str, K: int, N: int) -> None:
    rows = random_rows(kind, N, K)
    weight, expected = pack(kind, torch.from_numpy(rows)), floats_of(kind, rows).t()
    assert (weight.K, weight.N) == (K, N)
    assert torch.equal(dequantize(weight), expected)
    for n in {0, N // 2, N - 1}:
        assert torch.equal(column(weight, n), expected[:, n]), n
    assert torch.equal(block_floats([weight], torch.float32), expected)
    assert torch.equal(block_columns(weight, torch.tensor([N - 1, 0])), expected.t()[[N - 1, 0]])


@pytest.mark.parametrize("kind", KINDS)
def test_floats_are_rounded_once(kind: str) -> None:
    weight = random_blocks(kind, 512, 100)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(block_floats([weight], dtype), dequantize(weight).to(dtype))
    parts = [weight, random_blocks("Q6_K", 512, 130), weight]
    expected = torch.cat([dequantize(part) for part in parts], dim=1).bfloat16()
    assert torch.equal(block_floats(parts, torch.bfloat16), expected), "several parts"


def test_a_large_tensor_is_packed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.from_numpy(random_rows("Q5_1", 700, 64))
    expected = pack("Q5_1", rows)
    monkeypatch.setattr("teal.kernels.formats.blocks.ROWS_AT_ONCE", 2 * STRIP)
    assert torch.equal(pack("Q5_1", rows).data, expected.data)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_cut(kind: str) -> None:
    weight = random_blocks(kind, 256, 400)
    for begin, end in ((0, 400), (128, 300), (256, 257), (384, 400)):
        assert torch.equal(dequantize(columns(weight, begin, end)), dequantize(weight)[:, begin:end]), (begin, end)
    with pytest.raises(ValueError, match="begin is 64: expected a multiple of 128"):
        columns(weight, 64, 128)


def by_way(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows go by a compiled op, by torch and compiled floats, or by torch alone."""
    if way in COMPILED_MATMULS:
        if not hasattr(native_kernels(), way):
            pytest.skip("takes a processor that has bf16 or VNNI")
        monkeypatch.setattr(block_linear, "_compiled_matmul", lambda dtype: way if dtype.itemsize == 2 else None)
    else:
        monkeypatch.setattr(block_linear, "_compiled_matmul", lambda dtype: None)
    if way == "torch":
        monkeypatch.setattr(block_linear, "native_kernels", lambda: None)


@pytest.mark.parametrize("way", [*COMPILED_MATMULS, "floats", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_products_by_tiles(kind: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts whose borders are no tiles' borders, and weights that are one tile."""
    by_way(way, monkeypatch)
    parts = [random_blocks(kind, 512, 300), random_blocks("Q6_K", 512, 70), random_blocks(kind, 512, 129, seed=1)]
    weight = torch.cat([dequantize(part) for part in parts], dim=1)
    x = torch.randn(40, 512, generator=torch.Generator().manual_seed(4))
    for tile in (1, 512 * 256, 1 << 21):
        monkeypatch.setattr(block_linear, "TILE", tile)
        for dtype, limit in FLOAT_TOLERANCES:
            if way == "block_matmul" and dtype == torch.float16:
                continue
            found, expected = block_matmul(x.to(dtype), parts), x.to(dtype).double() @ weight.double()
            assert found.dtype == dtype
            assert_near(f"{dtype}, tiles of {tile}", found.float(), expected.float(), limit)


def test_only_a_tile_is_held_in_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [random_blocks("Q4_0", 256, N) for N in (200, 1000, 100, 128)]
    monkeypatch.setattr(block_linear, "TILE", 256 * 384)
    sizes: list[int] = []
    original = torch.empty

    def counted(K: int, N: int, dtype: torch.dtype) -> Tensor:
        sizes.append(N)
        return original(K, N, dtype=dtype)

    monkeypatch.setattr(torch, "empty", counted)
    block_matmul(torch.ones(32, 256), parts)
    assert sum(sizes) == 1428 and max(sizes) <= 384 and len(sizes) <= 5
    pieces = [piece for tile in tiles(parts) for piece in tile]
    for part in parts:
        own = [(begin, end) for weight, begin, end in pieces if weight is part]
        assert [begin for begin, _ in own] == [0, *(end for _, end in own[:-1])] and own[-1][1] == part.N


def test_gradients_pass_many_rows() -> None:
    weight, x = random_blocks("Q4_1", 256, 200), torch.randn(30, 256, requires_grad=True)
    block_matmul(x, [weight]).sum().backward()
    assert x.grad is not None
    assert_near("gradient", x.grad[0], dequantize(weight).sum(1), 1e-5)


def kept(x: Tensor, threshold: float) -> Tensor:
    return torch.where(x.abs() < torch.tensor(threshold).to(x.dtype), 0, x.float())


@pytest.mark.parametrize("threshold", [0.0, 0.7], ids=["dense", "sparse"])
@pytest.mark.parametrize("K,N", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_products(kind: str, K: int, N: int, threshold: float) -> None:
    weight = random_blocks(kind, K, N)
    generator = torch.Generator().manual_seed(1)
    for dtype, limit in TOLERANCES:
        for rows in (*range(1, 9), 30):
            x = torch.randn(rows, K, generator=generator).to(dtype)
            expected = kept(x, threshold).double() @ dequantize(weight).double()
            assert_near(f"{rows} rows of {dtype}", product(x, weight, threshold), expected.float(), limit)


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K", "Q8_0"])
def test_products_without_a_compiler(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = random_blocks(kind, 512, 200), torch.randn(3, 512)
    expected = kept(x, 0.5) @ dequantize(weight)
    monkeypatch.setattr(block_linear, "native_kernels", lambda: None)
    assert_near("product", product(x, weight, 0.5), expected, 1e-6)
    assert torch.equal(block_columns(weight, torch.tensor([7])), dequantize(weight)[:, 7][None])


@pytest.mark.parametrize("kind", KINDS)
def test_bits_depend_on_neither_threads_nor_other_rows(kind: str) -> None:
    weight, x = (
        random_blocks(kind, 768, 900),
        torch.randn(8, 768, generator=torch.Generator().manual_seed(2)).bfloat16(),
    )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = product(x, weight, 0.6)
        torch.set_num_threads(3)
        assert torch.equal(product(x, weight, 0.6), expected), "threads"
    finally:
        torch.set_num_threads(threads)
    for r in range(8):
        assert torch.equal(product(x[r : r + 1], weight, 0.6)[0], expected[r]), f"row {r} alone"


@pytest.mark.parametrize("way", COMPILED_MATMULS)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_many_rows_depend_on_neither_threads_nor_other_rows(
    kind: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_way(way, monkeypatch)
    parts = [random_blocks(kind, 768, 500), random_blocks(kind, 768, 200, seed=1)]
    x = torch.randn(71, 768, generator=torch.Generator().manual_seed(5)).bfloat16()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = block_matmul(x, parts)
        torch.set_num_threads(3)
        assert torch.equal(block_matmul(x, parts), expected), "threads"
    finally:
        torch.set_num_threads(threads)
    for begin, end in ((0, 1), (3, 40), (70, 71)):
        assert torch.equal(block_matmul(x[begin:end], parts), expected[begin:end]), (begin, end)


@pytest.mark.parametrize("way", COMPILED_MATMULS)
@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_of_any_channels(kind: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels that are no whole tiles, and a row that is not finite beside others."""
    by_way(way, monkeypatch)
    for K in (256, 1280) if BLOCK_TYPES[kind].nested else (32, 288, 544):
        weight = random_blocks(kind, K, 200)
        x = torch.randn(26, K, generator=torch.Generator().manual_seed(K)).bfloat16()
        expected = x.double() @ dequantize(weight).double()
        x[3, 5] = torch.inf
        found = block_matmul(x, [weight])
        others = [r for r in range(26) if r != 3]
        assert_near(f"{K} channels", found[others].float(), expected[others].float(), 2**-8)
        assert not found[3].isfinite().any()


def test_hard_rows() -> None:
    """One entry; one far larger than the others of its group; tiny ones; nothing kept."""
    weight = random_blocks("Q4_K", 256, 130)
    for values in ({7: 1.0}, {7: 3e4, 8: 1.0, 40: -1e-3}, dict.fromkeys(range(256), 1e-28)):
        x = torch.zeros(1, 256)
        for k, value in values.items():
            x[0, k] = value
        expected = x.double() @ dequantize(weight).double()
        assert_near(str(values)[:20], product(x, weight, 1e-35), expected.float(), 1e-6)
    assert not product(torch.full((1, 256), 1e-39), weight).any() and not product(torch.ones(1, 256), weight, 2.0).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_none(value: float) -> None:
    x = torch.ones(2, 256)
    x[1, 100] = value
    found = product(x, random_blocks("Q4_1", 256, 64), 0.5)
    assert not found[1].isfinite().any() and found[0].isfinite().all()


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q6_K", "Q8_0"])
def test_dropped_rows_are_never_read(kind: str) -> None:
    """Values of rows that only dropped entries meet change nothing."""
    weight = random_blocks(kind, 512, 256)
    x = torch.randn(1, 512, generator=torch.Generator().manual_seed(3))
    expected = product(x, weight, 0.8)
    other = Blocks(*weight[:3], weight.data.clone())
    sections(other)[0][x[0].abs() < 0.8] = 255
    assert torch.equal(product(x, other, 0.8), expected)


def test_bad_arguments_are_refused() -> None:
    weight = random_blocks("Q4_0", 64, 40)
    with pytest.raises(ValueError, match="x has 32 channels: expected 64"):
        product(torch.ones(1, 32), weight)
    with pytest.raises(ValueError, match="a Q4_K weight has 64 channels and 40 outputs: expected whole blocks of 256"):
        size_of("Q4_K", 64, 40)
    with pytest.raises(ValueError, match=r"data is torch.uint8 \(7,\): expected uint8"):
        unpack(Blocks("Q4_0", 64, 40, torch.zeros(7, dtype=torch.uint8)))
    with pytest.raises(ValueError, match="column 40: expected 0 to 39"):
        block_columns(weight, torch.tensor([40]))
    with pytest.raises(ValueError, match="column 40: expected 0 to 39"):
        column(weight, 40)
    assert native_kernels() is not None
