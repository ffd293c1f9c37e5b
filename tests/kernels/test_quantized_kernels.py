"""The Triton kernels on weights of 8 and 4 bits against plain fp32; interpreted on a CPU, real on CUDA."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from teal.checkpoint.weights import load_model
from teal.cli import quantize
from teal.decoding.backend import Backend, EagerBackend
from teal.decoding.backends import FusedBackend
from teal.kernels import dequantize as dequantize_file
from teal.kernels import sparse_gemv as sparse_gemv_file
from teal.kernels.activation_gemv import activation_gemv
from teal.kernels.attention_gemv import attention_gemv
from teal.kernels.formats.packing import Weight, dequantize
from teal.kernels.gemv import launch
from teal.kernels.gemv.tuning import GemvTile, default_tile
from teal.kernels.norm_gemv import norm_gemv
from teal.kernels.reference import rms_norm_reference, silu_reference, sparse_linear_reference
from teal.kernels.sparse_gemv import sparse_gemv
from teal.layers.quantized_linear import QuantConfig, round_to_nearest
from teal.model import KVCache
from teal.plan import ProjectionPlan, SparsityPlan, config_fields
from teal.teal_layers import sparsify
from tests import lanes
from tests.conftest import PROJECTIONS, QUANTIZABLE, relative_error, save_tiny_model, tiny_config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.usefixtures("nan_filled_empty")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
Packed = tuple[Tensor, Tensor, Tensor | None]


def make(B: int, K: int, N: int, bits: int, group: int, dtype: torch.dtype) -> tuple[Tensor, Packed, Tensor]:
    """x [B, K], a quantized weight [K, N] and the weight it stands for, fp32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, K, generator=generator).to(DEVICE, dtype)
    values, scales, zeros = round_to_nearest(torch.randn(K, N, generator=generator).to(DEVICE, dtype), bits, group)
    return x, (values, scales, zeros), dequantize(values, scales.float(), zeros)


def tolerance(B: int, dtype: torch.dtype) -> float:
    """Sums are fp32, of terms much larger than the wanted ones; several rows take weights rounded to the dtype, as
    tensor cores need them."""
    return 1e-5 if B == 1 else {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 4e-6}[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize(
    "K,segments,group", [(1, [32], 32), (97, [64, 32, 32], 32), (300, [192], 64), (64, [384, 128], 128)]
)
def test_sparse_gemv(K: int, segments: list[int], group: int, B: int, bits: int, dtype: torch.dtype) -> None:
    x, (values, scales, zeros), exact = make(B, K, sum(segments), bits, group, dtype)
    limits = torch.linspace(0.0, 0.9, len(segments)).to(DEVICE)
    expected = sparse_linear_reference(x, exact, limits, segments)
    actual = sparse_gemv(x, values, limits, segments, scales, zeros).sum(0)
    assert relative_error(actual, expected) <= tolerance(B, dtype), "rule's tile"
    tile = GemvTile(group, 2, 8, 3, 1)
    weight = Weight(values, scales, zeros)
    actual = sparse_gemv_file.launch(x, weight.values, limits, segments, *weight[1:], tile).sum(0)
    assert relative_error(actual, expected) <= tolerance(B, dtype), tile


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    "bits,K,segments,group",
    [
        (4, 97, [256, 128], 128),
        (4, 64, [320, 64], 64),
        (8, 97, [256, 128], 128),
        (8, 50, [192], 64),
        (8, 5, [64, 96], 32),
    ],
)
def test_the_sum_on_tensor_cores(
    monkeypatch: pytest.MonkeyPatch, bits: int, K: int, segments: list[int], group: int, dtype: torch.dtype
) -> None:
    lanes.emulate(monkeypatch)
    x, (values, scales, zeros), exact = make(1, K, sum(segments), bits, group, dtype)
    limits = torch.linspace(0.0, 0.9, len(segments)).to(DEVICE)
    weight, tile = Weight(values, scales, zeros), GemvTile(2048 // bits, 4, 4, 3, 2)
    assert launch.plan_gemv(weight, limits, segments, 1, tile).meta.TENSOR_CORE
    actual = sparse_gemv_file.launch(x, weight.values, limits, segments, *weight[1:], tile).sum(0)
    assert relative_error(actual, sparse_linear_reference(x, exact, limits, segments)) <= 1e-5, "product"
    for wild in (math.nan, math.inf):
        x[0, K // 2] = wild
        assert (
            not sparse_gemv_file.launch(x, weight.values, limits, segments, *weight[1:], tile).sum(0).isfinite().any()
        )


@pytest.mark.parametrize(
    "B,bits,K,segments,group",
    [(3, 4, 97, [256, 128], 128), (5, 4, 64, [320, 64], 64), (8, 8, 97, [256, 128], 128), (2, 8, 50, [192], 64),
     (7, 8, 40, [64, 96], 32), (8, 4, 97, [256, 128], 128), (6, 4, 50, [384], 128), (7, 8, 97, [128, 64], 64)],
)  # fmt: skip
def test_sums_of_several_rows_on_tensor_cores(
    monkeypatch: pytest.MonkeyPatch, B: int, bits: int, K: int, segments: list[int], group: int
) -> None:
    lanes.emulate(monkeypatch)
    x, (values, scales, zeros), exact = make(B, K, sum(segments), bits, group, torch.bfloat16)
    limits = torch.linspace(0.6, 0.9, len(segments)).to(DEVICE)
    weight, tile = Weight(values, scales, zeros), GemvTile(2048 // bits, 4, 4, 3, 2)
    assert launch.plan_gemv(weight, limits, segments, B, tile).meta.TENSOR_CORE
    found = sparse_gemv_file.launch(x, weight.values, limits, segments, *weight[1:], tile).sum(0)
    expected = sparse_linear_reference(x, exact, limits, segments)
    for row in range(B):
        assert relative_error(found[row], expected[row]) <= 2e-3, f"row {row}"
    x[B - 1, K // 2] = math.nan  # stays within its row
    found = sparse_gemv_file.launch(x, weight.values, limits, segments, *weight[1:], tile).sum(0)
    assert found[B - 1].isnan().all() and found[: B - 1].isfinite().all()


def test_tensor_cores_are_used_only_where_the_sum_fits_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "has_tensor_cores", lambda device: True)
    good = GemvTile(512, 4, 4, 3, 2)
    for bits, group, dtype, B, tile, expected in (
        (4, 128, torch.bfloat16, 1, good, True),
        (4, 128, torch.bfloat16, 2, good, True),
        (4, 128, torch.float16, 1, good, True),
        (4, 128, torch.float16, 2, good, False),
        (4, 128, torch.float32, 1, good, False),
        (4, 32, torch.bfloat16, 1, good, False),
        (4, 128, torch.bfloat16, 1, GemvTile(512, 1, 8, 3, 2), False),
        (4, 128, torch.bfloat16, 1, GemvTile(512, 4, 4, 3, 4), False),
    ):
        weight = Weight(*make(1, 32, 512, bits, group, dtype)[1])
        plan = launch.plan_gemv(weight, torch.zeros(1, device=DEVICE), [512], B, tile)
        assert expected == plan.meta.TENSOR_CORE, (bits, group, dtype, B, tile)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("K,N,group", [(1, 32, 32), (37, 320, 64), (16, 640, 128)])
def test_weights_become_floats(K: int, N: int, group: int, bits: int, dtype: torch.dtype) -> None:
    _, (values, scales, zeros), exact = make(1, K, N, bits, group, dtype)
    whole = dequantize_file.launch(values, scales, zeros)
    assert torch.equal(dequantize_file.launch(values, scales, zeros, None, torch.empty_like(whole)), whole)
    with pytest.raises(ValueError, match="out is"):
        dequantize_file.launch(values, scales, zeros, None, torch.empty_like(whole).t())
    assert torch.equal(whole, exact.to(dtype))  # rounded once
    half = N // group // 2 or 1
    words = values.shape[1] // (N // group) * half
    part = dequantize_file.launch(values[:, :words], scales[:, :half], None if zeros is None else zeros[:, :half])
    assert torch.equal(part, exact[:, : half * group].to(dtype))
    with pytest.raises(ValueError, match="must be contiguous"):
        dequantize_file.launch(values, scales.t().contiguous().t() if K > 1 else scales.expand(2, -1).t(), zeros)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("threshold", [0.0, math.inf])
def test_extreme_thresholds_and_skipped_rows(threshold: float, bits: int) -> None:
    x, (values, scales, zeros), exact = make(1, 130, 96, bits, 32, torch.bfloat16)
    limits = torch.tensor([threshold], device=DEVICE)
    expected = sparse_linear_reference(x, exact, limits, [96])
    actual = sparse_gemv(x, values, limits, [96], scales, zeros).sum(0)
    assert relative_error(actual, expected) <= 4e-6 if threshold == 0 else actual.abs().max() == 0, "product"
    half = torch.tensor([0.7], device=DEVICE)
    expected = sparse_linear_reference(x, exact, half, [96])
    scales[(x.abs() < half.bfloat16())[0]] = math.nan  # a dropped channel's scales are not read
    found = sparse_gemv(x, values, half, [96], scales, zeros).sum(0)
    assert relative_error(found, expected) <= 4e-6, "product beside poisoned scales"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("B", [1, 2])
def test_the_fused_products(B: int, bits: int) -> None:
    K, N, dtype = 64, 96, torch.float32
    x, (values, scales, zeros), exact = make(B, K, N, bits, 32, dtype)
    limits = torch.tensor([0.6], device=DEVICE)
    norm = torch.rand(K, device=DEVICE) + 0.5
    normed = rms_norm_reference(x, norm, 1e-5)
    actual = norm_gemv(x, norm, 1e-5, values, limits, [N], scales, zeros).sum(0)
    assert relative_error(actual, sparse_linear_reference(normed, exact, limits, [N])) <= 1e-5, "norm"
    gate_up = torch.randn(3, B, 2 * K, device=DEVICE)
    hidden = silu_reference(*gate_up.sum(0).chunk(2, dim=-1))
    actual = activation_gemv(gate_up, values, limits, scales, zeros).sum(0)
    assert relative_error(actual, sparse_linear_reference(hidden, exact, limits, [N])) <= 1e-5, "silu"
    sums, one = torch.randn(B, 4, 1, 16, device=DEVICE), torch.ones(B, 4, 1, device=DEVICE)
    actual = attention_gemv(sums, 0 * one, one, values, limits, scales, zeros).sum(0)
    assert relative_error(actual, sparse_linear_reference(sums.view(B, K), exact, limits, [N])) <= 1e-5, "attention"


@pytest.mark.parametrize("B", [1, 2])
def test_opcheck(B: int) -> None:
    x, (values, scales, zeros), _ = make(B, 64, 96, 4, 32, torch.float32)
    limits = torch.tensor([0.6], device=DEVICE)
    torch.library.opcheck(sparse_gemv, (x, values, limits, [96], scales, zeros))
    one = torch.ones(64, device=DEVICE)
    torch.library.opcheck(norm_gemv, (x, one, 1e-5, values, limits, [96], scales, zeros))
    torch.library.opcheck(activation_gemv, (torch.randn(2, B, 128, device=DEVICE), values, limits, scales, zeros))


def test_bad_arguments_are_refused_before_a_launch() -> None:
    x, (values, scales, zeros), _ = make(1, 64, 96, 4, 32, torch.float32)
    limits = torch.zeros(1, device=DEVICE)
    for message, arguments in {
        "zeros: expected": (x, values, limits, [96], scales, None),
        "expected the same": (x.bfloat16(), values, limits, [96], scales, zeros),
        "no multiples of the group size": (x, values, torch.zeros(2, device=DEVICE), [48, 48], scales, zeros),
        "must be contiguous": (x, values, limits, [96], scales.t().contiguous().t(), zeros),
    }.items():
        with pytest.raises(ValueError) as error:
            sparse_gemv(*arguments)
        assert message in str(error.value), message
    with pytest.raises(ValueError, match="at least the group size"):
        sparse_gemv_file.launch(x, values, limits, [96], scales, zeros, tile=GemvTile(16, 1, 4, 1, 1))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("B", [1, 4])
def test_the_rule_gives_usable_tiles(B: int, bits: int) -> None:
    for K, N in ((4096, 6144), (4096, 28672), (14336, 4096), (576, 960), (64, 96), (8192, 128256)):
        tile = default_tile(K, N, B, 132, bits)
        assert tile.block_n >= 128 and tile.lanes * tile.unroll >= (1 if B == 1 else 16)
        if B == 1:  # 128 bytes of 16 rows to a warp
            assert tile.lanes * tile.unroll == 16 and tile.num_warps * 1024 // bits == tile.block_n
            programs = tile.splits * -(-N // tile.block_n)
            assert programs <= 132 * 3 * 2 and (K < 4096 or programs >= 0.75 * 132 * 3)


@torch.inference_mode()
def decode_logits(backend: Backend, B: int) -> Tensor:
    ids = torch.randint(0, 199, (B, 11), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    cache = KVCache(backend.model.config, B, 32, DEVICE, torch.float32)
    at = torch.arange(11, device=DEVICE).expand(B, -1)
    parts = [backend.prefill(ids[:, :8], at[:, :8], cache)]
    parts += [backend.decode(ids[:, i : i + 1], at[:, i : i + 1], cache) for i in range(8, 11)]
    return backend.logits(torch.cat(parts, dim=1))


@pytest.mark.parametrize("mode,grouping", [("int8", "output"), ("int4", "output"), ("int4", "input")])
@pytest.mark.parametrize("B", [1, 2])
def test_a_fused_quantized_model_equals_the_unfused_one(tmp_path: Path, B: int, mode: str, grouping: str) -> None:
    config = tiny_config("llama", **QUANTIZABLE, num_hidden_layers=2)
    save_tiny_model(config, tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    quantize.quantize_folder(tmp_path / "dense", tmp_path / "quantized", QuantConfig(mode, 32, grouping=grouping))
    model = load_model(tmp_path / "quantized", DEVICE, torch.float32)
    layer = {name: ProjectionPlan(0.4, 0.3) for name in PROJECTIONS}
    plan = SparsityPlan(config_fields(model.config), "uniform", 0.4, (layer,) * model.config.num_layers)
    sparsify(model, plan)
    expected = decode_logits(EagerBackend(model, "test"), B)
    fused = FusedBackend(model, "test", compile=False)
    assert relative_error(decode_logits(fused, B), expected) <= 1e-4, "logits"
