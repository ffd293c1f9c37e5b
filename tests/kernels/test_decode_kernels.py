"""The Triton kernels of a decode step against their fp32 definitions; interpreted on a CPU, real on CUDA."""

import math
import os
import subprocess
import sys

import pytest
import torch

from teal.kernels import activation_gemv as activation_gemv_file
from teal.kernels import attention_gemv as attention_gemv_file
from teal.kernels import norm_gemv as norm_gemv_file
from teal.kernels import sparse_gemv as sparse_gemv_file
from teal.kernels.activation_gemv import activation_gemv
from teal.kernels.argmax import argmax_step
from teal.kernels.attention_gemv import attention_gemv
from teal.kernels.gemv.tuning import GemvTile
from teal.kernels.norm_gemv import norm_gemv
from teal.kernels.norm_residual import norm_residual
from teal.kernels.reduce_partials import reduce_partials
from teal.kernels.reference import (
    gelu_tanh_reference,
    layer_norm_reference,
    rms_norm_reference,
    silu_reference,
)
from teal.kernels.rope_attention import rope_attention
from teal.kernels.sparse_gemv import sparse_gemv
from tests.conftest import ROOT, relative_error
from tests.products import DEVICE, DTYPES, FP32_SUMS, boundary_error, close, make, reference

pytestmark = pytest.mark.usefixtures("nan_filled_empty")
# (K, segments): one channel, odd sizes, three segments, more columns than a block, the default model's shapes
SHAPES = [(1, [1]), (31, [64]), (64, [31, 1, 7]), (97, [130]), (576, [96, 32, 32]), (300, [70, 50])]
TILES = {1: [GemvTile(64, 1, 4, 3, 2), GemvTile(32, 2, 2, 1, 1)], 4: [GemvTile(64, 4, 4, 3, 4)]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B", [1, 3, 8])
@pytest.mark.parametrize("K,segments", SHAPES)
def test_sparse_gemv(K: int, segments: list[int], B: int, dtype: torch.dtype) -> None:
    x, weight, thresholds = make(B, K, segments, dtype)
    expected = reference(x, weight, thresholds, segments)
    close(sparse_gemv(x, weight, thresholds, segments), expected, "rule's tile")
    for tile in TILES[1 if B == 1 else 4]:
        close(sparse_gemv_file.launch(x, weight, thresholds, segments, tile=tile), expected, str(tile))


@pytest.mark.parametrize("threshold,kept", [(0.0, "all"), (math.inf, "none")])
@pytest.mark.parametrize("B", [1, 3])
def test_extreme_thresholds(threshold: float, kept: str, B: int) -> None:
    x, weight, _ = make(B, 130, [70], torch.bfloat16)
    limits = torch.tensor([threshold], device=DEVICE)
    expected = x.double() @ weight.double() if kept == "all" else torch.zeros(B, 70, device=DEVICE)
    close(sparse_gemv(x, weight, limits, [70]), expected, kept)


@pytest.mark.parametrize("B", [1, 3])
def test_zeros_are_dropped_unless_the_threshold_is_zero(B: int) -> None:
    """Dropped rows hold NaN: had one been read into the sum, 0 x NaN would show."""
    x, weight, limits = make(B, 96, [64], torch.bfloat16)
    x[:, ::2] = 0
    expected = reference(x, weight, limits, [64])
    weight[(x.abs() < limits.bfloat16()).all(dim=0)] = math.nan
    close(sparse_gemv(x, weight, limits, [64]), expected, "poisoned rows")
    zero = torch.zeros_like(x)
    close(sparse_gemv(zero, weight.nan_to_num(0), limits, [64]), torch.zeros(B, 64, device=DEVICE), "all zero")


@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_stay_visible(value: float, B: int) -> None:
    x, weight, limits = make(B, 64, [48], torch.bfloat16)
    x[-1, 7] = value
    y = sparse_gemv(x, weight, limits, [48]).sum(0)
    assert not y[-1].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B", [1, 3])
def test_rows_in_fp32_are_rounded_to_the_weights_dtype(B: int, dtype: torch.dtype) -> None:
    x, weight, limits = make(B, 97, [31, 7], torch.float32)
    weight = weight.to(dtype)
    close(sparse_gemv(x, weight, limits, [31, 7]), reference(x.to(dtype), weight, limits, [31, 7]), "rounded rows")


def test_rows_of_a_wider_weight() -> None:
    x, weight, limits = make(1, 64, [48], torch.bfloat16)
    wide = torch.full((64, 80), math.nan, dtype=torch.bfloat16, device=DEVICE)
    wide[:, :48] = weight
    close(sparse_gemv(x, wide[:, :48], limits, [48]), reference(x, weight, limits, [48]), "strided rows")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B", [1, 3, 8])
@pytest.mark.parametrize("K,segments", [(64, [31, 1, 7]), (576, [96, 32, 32]), (4100, [40])])
@pytest.mark.parametrize("stream", [None, torch.float32], ids=["weight's", "fp32"])
def test_norm_gemv(
    K: int, segments: list[int], B: int, dtype: torch.dtype, stream: torch.dtype | None
) -> None:  # fmt: skip
    x, weight, thresholds = make(B, K, segments, dtype)
    x = x.to(stream or dtype)
    norm = (torch.rand(K, generator=torch.Generator().manual_seed(1)) + 0.5).to(DEVICE, dtype)
    normed = rms_norm_reference(x, norm, 1e-5)
    # An entry within rounding of its threshold may fall on either side.
    actual = norm_gemv(x, norm, 1e-5, weight, thresholds, segments)
    tolerance = max(FP32_SUMS, boundary_error(normed, weight, thresholds, segments))
    close(actual, reference(normed, weight, thresholds, segments), "norm", tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B,K", [(1, 64), (3, 576), (1, 4100)])
def test_norm_gemv_of_a_layer_norm(B: int, K: int, dtype: torch.dtype) -> None:
    """Rows have a mean far from 0, which a variance from squares alone would lose."""
    x, weight, limits = make(B, K, [40], torch.float32)
    x, weight = x + 30, weight.to(dtype)
    generator = torch.Generator().manual_seed(1)
    norm, bias = ((torch.rand(K, generator=generator) + shift).to(DEVICE, dtype) for shift in (0.5, -0.5))
    normed = layer_norm_reference(x, norm, bias, 1e-5)
    tolerance = max(5e-6, boundary_error(normed, weight, limits, [40]))
    actual = norm_gemv(x, norm, 1e-5, weight, limits, [40], bias=bias)
    close(actual, reference(normed, weight, limits, [40]), "layer norm", tolerance)


@pytest.mark.parametrize("layer_norm", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B,N", [(1, 1), (3, 300), (8, 640), (1, 5376), (1, 8200)])
def test_norm_residual(B: int, N: int, dtype: torch.dtype, layer_norm: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    y, residual = (torch.randn(B, N, generator=generator).to(DEVICE) for _ in range(2))
    norm, bias = ((torch.rand(N, generator=generator) + 0.5).to(DEVICE, dtype) for _ in range(2))
    exact = norm.float()
    if layer_norm:
        expected = residual + layer_norm_reference(y, exact, bias.float(), 1e-5)
    else:
        expected = residual + rms_norm_reference(y, exact, 1e-5)
    actual = norm_residual(y, norm, bias if layer_norm else None, 1e-5, residual)
    assert actual.dtype == torch.float32 and relative_error(actual, expected) <= 1e-6, "sum"
    assert relative_error(residual, actual) > 1e-2 or (layer_norm and N == 1), "what was added"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B", [1, 3, 8])
@pytest.mark.parametrize("splits,activation", [(1, "silu"), (5, "silu"), (5, "gelu_tanh")])
def test_activation_gemv(splits: int, activation: str, B: int, dtype: torch.dtype) -> None:
    K, N = 90, 70
    _, weight, thresholds = make(B, K, [N], dtype)
    gate_up = torch.randn(splits, B, 2 * K, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    gate, up = gate_up.sum(0).to(dtype).chunk(2, dim=-1)
    x = {"silu": silu_reference, "gelu_tanh": gelu_tanh_reference}[activation](gate, up)
    actual = activation_gemv(gate_up, weight, thresholds, activation=activation)
    close(
        actual,
        reference(x, weight, thresholds, [N]),
        activation,
        max(FP32_SUMS, boundary_error(x, weight, thresholds, [N])),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B,N,splits", [(1, 1, 1), (1, 576, 7), (3, 300, 16), (8, 31, 66)])
@pytest.mark.parametrize("bias,residual", [(False, False), (True, False), (False, True), (True, True)])
def test_reduce_partials(B: int, N: int, splits: int, dtype: torch.dtype, bias: bool, residual: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(splits, B, N, generator=generator).to(DEVICE)
    b = torch.randn(N, generator=generator).to(DEVICE, dtype) if bias else None
    r = torch.randn(B, N, generator=generator).to(DEVICE, dtype) if residual else None
    expected = parts.double().sum(0) + (0 if b is None else b.double())
    expected = expected if r is None else expected.to(dtype).double() + r.double()
    actual = reduce_partials(parts, dtype, b, r)
    tolerance = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}[dtype]
    assert actual.dtype == dtype and relative_error(actual, expected) <= tolerance, "sum of partials"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B,V", [(1, 1), (3, 300), (1, 49_152), (8, 1000), (2, 70_001)])
def test_argmax_step(B: int, V: int, dtype: torch.dtype) -> None:
    logits = torch.randn(B, V, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)  # 16 bits have many ties
    token, position = torch.full((B, 1), -1, device=DEVICE), torch.arange(B, device=DEVICE)[:, None].contiguous()
    argmax_step(logits, token, position)
    assert torch.equal(logits.gather(1, token), logits.amax(1, keepdim=True))
    first = (logits == logits.amax(1, keepdim=True)).int().argmax(1, keepdim=True)
    assert torch.equal(token, first) and position.flatten().tolist() == list(range(1, B + 1))
    logits[0, V // 2] = math.nan
    logits[-1] = -math.inf if B > 1 else logits[-1]
    argmax_step(logits, token, position)
    assert token[0] == V // 2 and (B == 1 or token[-1] == 0)


@pytest.mark.parametrize("B", [1, 4])
def test_same_bits_every_run(B: int) -> None:
    x, weight, thresholds = make(B, 300, [70, 50], torch.bfloat16)
    first = sparse_gemv(x, weight, thresholds, [70, 50])
    repeats = 1000 if DEVICE.type == "cuda" else 5
    assert all(torch.equal(first, sparse_gemv(x, weight, thresholds, [70, 50])) for _ in range(repeats))


def test_opcheck() -> None:
    for B in (1, 3):
        x, weight, thresholds = make(B, 64, [40, 24], torch.float32)
        torch.library.opcheck(sparse_gemv, (x, weight, thresholds, [40, 24]))
        torch.library.opcheck(norm_gemv, (x, torch.ones(64, device=DEVICE), 1e-5, weight, thresholds, [40, 24]))
        torch.library.opcheck(activation_gemv, (torch.randn(2, B, 128, device=DEVICE), weight, thresholds[:1]))
        parts = torch.randn(2, B, 64, device=DEVICE)
        torch.library.opcheck(reduce_partials, (parts, torch.bfloat16, None, None))
        torch.library.opcheck(norm_residual, (parts[0], torch.ones(64, device=DEVICE), None, 1e-5, parts[1]))
        where = (torch.zeros(B, 1, dtype=torch.int64, device=DEVICE) for _ in range(2))
        torch.library.opcheck(argmax_step, (torch.randn(B, 300, device=DEVICE), *where))
        cache = torch.randn(B, 2, 8, 16, device=DEVICE)
        positions = torch.full((B, 1), 5, device=DEVICE)
        angles = torch.randn(B, 8, device=DEVICE)
        parts = torch.randn(2, B, 8 * 16, device=DEVICE)
        rope = (
            parts,
            None,
            None,
            None,
            1e-5,
            angles.cos(),
            angles.sin(),
            positions,
            cache,
            cache.clone(),
            4,
            0,
            parts.dtype,
        )
        torch.library.opcheck(rope_attention, rope)
        torch.library.opcheck(attention_gemv, (*rope_attention(*rope), weight, thresholds[:1]))


def test_bad_arguments_are_refused_before_a_launch() -> None:
    x, weight, limits = make(1, 64, [48], torch.float32)
    bad = {
        "expected contiguous [B, K]": (torch.ones(1, 128, device=DEVICE)[:, ::2], weight, limits, [48]),
        "expected the same": (x.bfloat16(), weight, limits, [48]),
        "floats [64, N]": (x, weight[:60], limits, [48]),
        "rows must be contiguous": (x, torch.ones(48, 64, device=DEVICE).t(), limits, [48]),
        "do not cut": (x, weight, limits, [47]),
        "into 1 to 3 parts": (x, weight, torch.zeros(4, device=DEVICE), [12] * 4),
        "expected fp32 [1]": (x, weight, limits.double(), [48]),
        "1 to 8": (torch.ones(9, 64, device=DEVICE), weight, limits, [48]),
    }
    for message, arguments in bad.items():
        with pytest.raises(ValueError) as error:
            sparse_gemv(*arguments)
        assert message in str(error.value), message
    one, cache = torch.ones(2, 8, device=DEVICE), torch.ones(2, 2, 4, 16, device=DEVICE)
    same_row = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE).expand(2, 1)
    parts = torch.ones(2, 2, 8 * 16, device=DEVICE)
    with pytest.raises(ValueError, match="2 contiguous int64"):
        rope_attention(parts, None, None, None, 1e-5, one, one, same_row, cache, cache.clone(), 4, 0, one.dtype)
    for call in (
        lambda: norm_gemv(x, torch.ones(63, device=DEVICE), 1e-5, weight, limits, [48]),
        lambda: norm_gemv(x, one[0], 1e-5, weight, limits, [48], bias=torch.ones(63, device=DEVICE)),
        lambda: norm_residual(one, torch.ones(7, device=DEVICE), None, 1e-5, one),
        lambda: norm_residual(one, one[0], one[0].double(), 1e-5, one),
        lambda: norm_residual(one, one[0], None, 1e-5, one[:1]),
        lambda: norm_residual(one.double(), one[0], None, 1e-5, one.double()),
        lambda: activation_gemv(torch.ones(2, 1, 64, device=DEVICE), weight, limits),
        lambda: activation_gemv(torch.ones(2, 1, 128, device=DEVICE), weight, limits, activation="relu"),
        lambda: argmax_step(torch.ones(2, 8, device=DEVICE), torch.zeros(2, 1, device=DEVICE), same_row.clone()),
        lambda: argmax_step(torch.ones(2, 8, device=DEVICE).t(), same_row.clone(), same_row.clone()),
        lambda: argmax_step(torch.ones(3, 8, device=DEVICE), same_row.clone(), same_row.clone()),
        lambda: reduce_partials(torch.ones(2, 1, 8, device=DEVICE), torch.float64, None, None),
        lambda: reduce_partials(torch.ones(2, 1, 8, device=DEVICE), torch.float32, torch.ones(7, device=DEVICE), None),
        lambda: rope_attention(
            torch.ones(2, 1, 7 * 16, device=DEVICE), None, None, None, 1e-5, *(torch.ones(1, 8, device=DEVICE),) * 2,
            torch.zeros(1, 1, dtype=torch.int64, device=DEVICE),
            *(torch.ones(1, 2, 4, 16, device=DEVICE) for _ in range(2)), 3, 0, torch.float32,
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            call()


def test_every_launcher_takes_a_tile() -> None:
    """bench.tune measures tiles through the launchers: each of them must obey."""
    x, weight, limits = make(1, 64, [48], torch.bfloat16)
    tile = GemvTile(16, 1, 2, 4, 1)
    one = torch.ones(64, dtype=torch.bfloat16, device=DEVICE)
    sums, ones = torch.rand(1, 4, 2, 16, device=DEVICE), torch.ones(1, 4, 2, device=DEVICE)
    for partials in (
        sparse_gemv_file.launch(x, weight, limits, [48], tile=tile),
        norm_gemv_file.launch(x, one, 1e-5, weight, limits, [48], tile=tile),
        activation_gemv_file.launch(torch.randn(2, 1, 128, device=DEVICE), weight, limits, tile=tile),
        attention_gemv_file.launch(sums, ones, ones, weight, limits, tile=tile),
    ):
        assert partials.shape == (4, 1, 48) and partials.isfinite().all()


def test_every_kernel_compiles_for_hopper() -> None:
    """The interpreter accepts code that the compiler refuses; no GPU is needed to compile."""
    script = ROOT / "tests" / "compile_for_hopper.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "of 11 kernels compiled" in done.stdout
