"""The sparse product against its fp32 definition: dtypes, odd shapes, segments, and rows that must not be read."""

import math
from pathlib import Path

import pytest
import torch

from teal.kernels.cpu import native
from teal.kernels.cpu.native import native_kernels, native_library
from teal.kernels.reference import sparse_linear_reference
from teal.kernels.sparse_linear import MAX_GATHER_ROWS, drop_small, sparse_linear, sparse_linear_op
from teal.options import MAX_ROWS
from tests.conftest import relative_error

DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]
# Rounding of the output to its dtype bounds the error; sums are fp32. On CPU fp32 sums run in another order.
TOLERANCES = [(torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)]
SHAPES = [
    (1, 64, 64),
    (1, 576, 960),
    (1, 1536, 576),
    (1, 77, 131),
    (2, 576, 192),
    (3, 100, 7),
    (4, 65, 130),
    (7, 96, 33),
    (MAX_ROWS + 1, 96, 33),
]
ROWS = (1, MAX_GATHER_ROWS + 1, MAX_ROWS + 1)  # of one call to the gather kernel, of two, of a dense product


def inputs(B: int, K: int, N: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(B * K + N)
    x = torch.randn(B, K, generator=generator).to(device, dtype)
    weight = torch.randn(K, N, generator=generator).to(device, dtype)
    return x, weight


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype,tolerance", TOLERANCES, ids=lambda v: str(v))
@pytest.mark.parametrize("B,K,N", SHAPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_against_fp32_reference(
    B: int, K: int, N: int, dtype: torch.dtype, tolerance: float, sparsity: float, device: torch.device
) -> None:
    x, weight = inputs(B, K, N, dtype, device)
    limit = math.inf if sparsity == 1 else float(x.abs().float().quantile(sparsity)) if sparsity else 0.0
    thresholds = torch.tensor([limit], device=device)
    actual = sparse_linear(x, weight, thresholds, [N])
    expected = sparse_linear_reference(x, weight, thresholds, [N])
    assert actual.dtype == dtype and actual.shape == (B, N)
    if sparsity == 1:
        assert torch.equal(actual, torch.zeros_like(actual))
    else:
        assert relative_error(actual, expected) <= tolerance, "product"


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("B", [*ROWS, 3])
def test_each_segment_has_its_threshold(B: int, device: torch.device) -> None:
    x, weight = inputs(B, 96, 150, torch.float32, device)
    thresholds = torch.tensor([0.1, 2.0, 0.7], device=device)
    segments = [70, 30, 50]
    actual = sparse_linear(x, weight, thresholds, segments)
    assert relative_error(actual, sparse_linear_reference(x, weight, thresholds, segments)) <= 2e-6, "segments"


def test_dropped_rows_are_never_read() -> None:
    """NaN in every row that a dropped entry would meet: had the product read one, 0 x NaN would show."""
    x, weight = inputs(1, 128, 64, torch.float32, torch.device("cpu"))
    thresholds = torch.tensor([0.7])
    expected = sparse_linear_reference(x, weight, thresholds, [64])
    weight[(x[0].abs() < 0.7)] = math.nan
    assert relative_error(sparse_linear(x, weight, thresholds, [64]), expected) <= 2e-6, "product beside poisoned rows"


def test_threshold_is_compared_in_the_dtype_of_x() -> None:
    """An entry equal to the rounded threshold is kept, in every path."""
    x = torch.full((1, 8), 0.3, dtype=torch.bfloat16)
    weight = torch.ones(8, 8, dtype=torch.bfloat16)
    thresholds = torch.tensor([0.3])  # below it in fp32, equal after rounding
    for rows in ROWS:
        assert (sparse_linear(x.expand(rows, -1).contiguous(), weight, thresholds, [8]) != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_what_is_below_the_threshold_is_dropped(dtype: torch.dtype) -> None:
    threshold = torch.tensor(0.3, dtype=dtype)
    below = torch.nextafter(threshold, torch.zeros_like(threshold))
    x = torch.stack([threshold, -threshold, threshold * 0 + math.inf, below, -below, threshold * 0])
    assert torch.equal(drop_small(x, threshold), torch.cat((x[:3], torch.zeros_like(x[3:]))))
    assert torch.equal(drop_small(x, threshold * 0), x)
    assert drop_small(threshold * 0 + math.nan, threshold).isnan()


def test_nan_is_not_hidden() -> None:
    """A threshold drops small entries; NaN is not small, and a broken activation must stay visible."""
    x = torch.tensor([[0.1, math.nan, 2.0, 3.0]])
    for rows in ROWS:
        y = sparse_linear(x.expand(rows, -1).contiguous(), torch.ones(4, 40), torch.tensor([0.5]), [40])
        assert y.isnan().all()


def test_bits_do_not_depend_on_threads() -> None:
    x, weight = inputs(1, 576, 1000, torch.bfloat16, torch.device("cpu"))
    thresholds = torch.tensor([0.6, 0.3])
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(sparse_linear(x, weight, thresholds, [300, 700]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], r) for r in results)


def test_without_a_compiler_the_result_is_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "/bin/false")
    native_library.cache_clear()
    try:
        x, weight = inputs(1, 77, 131, torch.float32, torch.device("cpu"))
        thresholds = torch.tensor([0.5])
        expected = sparse_linear_reference(x, weight, thresholds, [131])
        found = sparse_linear(x, weight, thresholds, [131])
        assert relative_error(found, expected) <= 2e-6, "product without compiled kernels"
        sparse_linear(x, weight, thresholds, [131])
        err = capsys.readouterr().err.splitlines()
        assert [line for line in err if line.startswith("note: ")] == err[1:] and len(err) == 2, err
    finally:
        native_library.cache_clear()


def test_the_library_shares_torchs_cpp_runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Even from a compiler that would link its own, as one without a shared libstdc++ does."""
    compiler, source, library = tmp_path / "compiler", tmp_path / "source.cpp", tmp_path / "library.so"
    source.write_text("#include <iostream>\nvoid say(int number) { std::cout << number; }\n", encoding="utf-8")
    compiler.write_text('#!/bin/sh\nexec g++ -static-libstdc++ "$@"\n', encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(native, "SOURCES", [source])
    native._compile(library)
    assert b"libstdc++.so.6" in library.read_bytes()


def test_the_compiled_kernel_is_what_runs() -> None:
    """The machine these tests need has a compiler (README); without this, a build failure would pass unseen."""
    assert native_kernels() is not None


@pytest.mark.parametrize("B", [1, 2, MAX_GATHER_ROWS])
def test_same_bits_every_run(B: int) -> None:
    x, weight = inputs(B, 576, 960, torch.bfloat16, torch.device("cpu"))
    thresholds = torch.tensor([0.6])
    first = sparse_linear(x, weight, thresholds, [960])
    assert all(torch.equal(first, sparse_linear(x, weight, thresholds, [960])) for _ in range(50))


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("B", [1, 8])
def test_opcheck(B: int, device: torch.device) -> None:
    x, weight = inputs(B, 32, 48, torch.float32, device)
    thresholds = torch.tensor([0.5, 1.0], device=device)
    torch.library.opcheck(sparse_linear_op, (x, weight, thresholds, [16, 32]))


def test_bad_arguments_are_refused() -> None:
    x, weight, thresholds = torch.ones(1, 4), torch.ones(4, 6), torch.ones(1)
    bad = {
        "expected [B, K]": (torch.ones(1, 5), weight, thresholds, [6]),
        "expected the same": (x.bfloat16(), weight, thresholds, [6]),
        "expected fp32, bf16 or fp16": (x.double(), weight.double(), thresholds, [6]),
        "contiguous": (x, torch.ones(6, 4).t(), thresholds, [6]),
        "do not cover": (x, weight, thresholds, [5]),
        "thresholds (1,)": (x, weight, thresholds, [3, 3]),
    }
    for message, arguments in bad.items():
        with pytest.raises(ValueError) as error:
            sparse_linear(*arguments)
        assert message in str(error.value)
