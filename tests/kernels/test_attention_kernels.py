"""Attention's Triton kernels against their fp32 definitions; interpreted on a CPU, real on CUDA."""

import math

import pytest
import torch
from torch import Tensor

from teal.kernels.attention_gemv import attention_gemv
from teal.kernels.formats.kv_int8 import pack_int8, packed_width, unpack_int8
from teal.kernels.reference import attention_reference, rms_norm_reference, rope_reference
from teal.kernels.rope_attention import attention_splits, rope_attention
from tests.conftest import relative_error
from tests.products import DEVICE, DTYPES, FP32_SUMS, boundary_error, close, make, reference

pytestmark = pytest.mark.usefixtures("nan_filled_empty", "splits_of_a_gpu")


@pytest.fixture
def splits_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere there are fewer where kernels are interpreted."""
    monkeypatch.setattr("teal.kernels.rope_attention.MAX_SPLITS", 16)


def combined(splits: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Attention's output [B, H, D] in fp64 from its splits."""
    sums, max_logits, exp_sums = (t.double() for t in splits)
    factor = (max_logits - max_logits.amax(-1, keepdim=True)).exp()
    return (sums * factor[..., None]).sum(2) / (exp_sums * factor).sum(2)[..., None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "bias,norm,softcap",
    [(False, "", 0.0), (True, "", 0.0), (False, "head", 0.0), (True, "all", 0.0), (False, "", 2.0)],
)
@pytest.mark.parametrize(
    "B,H,KV,D,window", [(1, 4, 2, 16, 0), (3, 6, 2, 12, 5), (8, 2, 2, 64, 0), (2, 8, 1, 64, 70), (1, 3, 1, 256, 80)]
)
def test_rope_attention(
    B: int, H: int, KV: int, D: int, window: int, bias: bool, norm: str, softcap: float, dtype: torch.dtype
) -> None:
    """Keys and values land in the cache where they belong; the splits are attention over it, where NaN waits beyond."""
    generator = torch.Generator().manual_seed(0)
    N, S = (H + 2 * KV) * D, 140
    parts = torch.randn(3, B, N, generator=generator).to(DEVICE)
    b = torch.randn(N, generator=generator).to(DEVICE, dtype) if bias else None
    sizes = (H * D, KV * D) if norm == "all" else (D, D)
    norms = [torch.rand(size, generator=generator).to(DEVICE, dtype) + 0.5 if norm else None for size in sizes]
    angles = torch.randn(B, 1, 1, D // 2, generator=generator).to(DEVICE)
    positions = torch.tensor([[100], [0], [37], [1], [64], [65], [2], [139]][:B], device=DEVICE)
    k, v = (torch.randn(2, B, KV, S, D, generator=generator).to(DEVICE, dtype) for _ in range(2))
    for row, position in enumerate(positions[:, 0].tolist()):
        for cache in (k, v):
            cache[:, row, :, position:] = math.nan
    untouched = k[0].clone(), v[0].clone()
    cosine, sine = angles.cos(), angles.sin()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()  # what the kernel reads early must be older than the kernel before it
    splits = rope_attention(parts, b, *norms, 1e-6, cosine, sine, positions, k[1], v[1], H, window, dtype, softcap)
    linear = (parts.double().sum(0) + (0 if b is None else b.double())).to(dtype)
    heads = [part.view(B, -1, D) for part in linear.split((H * D, KV * D, KV * D), dim=1)]
    for i, w in enumerate(norms):
        if w is not None:
            heads[i] = rms_norm_reference(heads[i].view(B, -1, len(w)), w, 1e-6).view(B, -1, D)
    cos, sin = angles.cos().view(B, -1), angles.sin().view(B, -1)
    q, *expected = rope_reference(heads[0], cos, sin), rope_reference(heads[1], cos, sin), heads[2]
    tolerance = 6e-3 if dtype == torch.bfloat16 else 2e-6
    rows = torch.arange(B, device=DEVICE)
    for cache, value, before, name in zip((k, v), expected, untouched, "kv", strict=True):
        assert relative_error(cache[1][rows, :, positions[:, 0]], value) <= tolerance, name
        assert torch.equal(cache[0].nan_to_num(7.0), before.nan_to_num(7.0)), f"{name} of another layer was written"
        beyond = torch.arange(S, device=DEVICE) > positions  # [B, S]
        assert cache[1].isnan().all(-1).equal(beyond[:, None].expand(B, KV, S)), f"{name} was written elsewhere"
    output = attention_reference(q, k[1].nan_to_num(0), v[1].nan_to_num(0), positions, window, softcap)
    assert relative_error(combined(splits), output) <= tolerance, "attention output"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B,H,KV,D,window", [(1, 4, 2, 16, 0), (3, 6, 2, 12, 5), (2, 8, 1, 64, 70)])
def test_rope_attention_over_a_cache_in_8_bits(
    B: int, H: int, KV: int, D: int, window: int, dtype: torch.dtype
) -> None:
    """The new vectors are packed as pack_int8 packs them, and attention is that over what the cache gives back."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(3, B, (H + 2 * KV) * D, generator=generator).to(DEVICE)
    parts[:, -1, -D:] = 0.0  # a value of zeros
    angles = torch.randn(B, 1, 1, D // 2, generator=generator).to(DEVICE)
    positions = torch.tensor([[100], [0], [37]][:B], device=DEVICE)
    k, v = (torch.randn(B, KV, 140, D, generator=generator).to(DEVICE, dtype) for _ in range(2))
    for row, position in enumerate(positions[:, 0].tolist()):
        k[row, :, position:] = v[row, :, position:] = math.nan
    packed = [pack_int8(k), pack_int8(v)]
    before = [t.clone() for t in packed]
    cosine, sine = angles.cos(), angles.sin()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    splits = rope_attention(parts, None, None, None, 1e-6, cosine, sine, positions, *packed, H, window, dtype)
    heads = [part.view(B, -1, D) for part in parts.double().sum(0).to(dtype).split((H * D, KV * D, KV * D), dim=1)]
    q, key = (rope_reference(heads[i], angles.cos().view(B, -1), angles.sin().view(B, -1)) for i in (0, 1))
    rows = torch.arange(B, device=DEVICE)
    caches = [unpack_int8(t, D, dtype) for t in packed]
    for name, cache, value, new, old in zip("kv", caches, (key, heads[2]), packed, before, strict=True):
        wanted = unpack_int8(pack_int8(value.to(dtype)), D, torch.float64)
        error = relative_error(cache[rows, :, positions[:, 0]], wanted)
        assert error <= 5e-3, name  # a byte may be rounded the other way
        changed = (new != old).any(-1).any(1)
        assert changed.nonzero().tolist() == [[row, int(p)] for row, p in enumerate(positions)]
    finite_k, finite_v = (cache.nan_to_num(0) for cache in caches)
    output = attention_reference(q, finite_k, finite_v, positions, window)
    assert relative_error(combined(splits), output) <= (6e-3 if dtype == torch.bfloat16 else 1e-3), "attention output"


def test_a_nan_shows_in_a_cache_in_8_bits() -> None:
    for bad in (math.nan, math.inf):
        parts, angles = torch.ones(1, 1, 4 * 16, device=DEVICE), torch.zeros(1, 8, device=DEVICE)
        parts[0, 0, -1] = bad
        assert unpack_int8(pack_int8(parts[0]), 64, torch.float32).isnan().all()
        k, v = (torch.zeros(1, 1, 8, packed_width(16), dtype=torch.int8, device=DEVICE) for _ in range(2))
        positions = torch.full((1, 1), 3, device=DEVICE)
        rope_attention(parts, None, None, None, 1e-6, angles, angles, positions, k, v, 2, 0, torch.float32)
        assert unpack_int8(v, 16, torch.float32)[0, 0, 3].isnan().all()
        assert unpack_int8(k, 16, torch.float32).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("B", [1, 3])
def test_attention_gemv(B: int, dtype: torch.dtype) -> None:
    H, D, count = 4, 24, 5
    generator = torch.Generator().manual_seed(0)
    sums = torch.randn(B, H, count, D, generator=generator).to(DEVICE)
    largest = 3 * torch.randn(B, H, count, generator=generator).to(DEVICE)
    weights = (torch.rand(B, H, count, generator=generator) + 0.5).to(DEVICE)
    sums[:, 1, 2], largest[:, 1, 2], weights[:, 1, 2] = 0.0, -math.inf, 0.0  # a split without positions
    _, weight, limits = make(B, H * D, [33], dtype)
    x = combined((sums, largest, weights)).flatten(1).to(dtype)
    tolerance = max(FP32_SUMS, boundary_error(x, weight, limits, [33]))
    close(attention_gemv(sums, largest, weights, weight, limits), reference(x, weight, limits, [33]), "o", tolerance)


def test_splits_fill_a_gpu_and_stay_bounded() -> None:
    assert (
        attention_splits(1, 8) == 16
        and attention_splits(1, 32) == 8
        and attention_splits(8, 32) == 2
        and attention_splits(1, 1) == 16
    )
