"""The decode program with a KV cache in 8 bits: what it reads, and the bytes that it writes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from teal.decoding.backends import FusedBackend
from teal.decoding.cuda_program import CudaProgramBackend
from teal.kernels.formats.kv_int8 import pack_int8, unpack_int8
from teal.kernels.program.compiler import compile_source, compiler_obstacle
from teal.kernels.program.plan import plan
from teal.kernels.program.shapes import Device
from teal.layers.int8_cache import use_int8_cache
from teal.model import KVCache, Transformer
from teal.teal_layers import SparseLinear
from tests.conftest import assert_near
from tests.kernels.emulated_program import COMPILER, emulated_backend
from tests.kernels.program_models import (
    A100,
    FAMILIES,
    H100,
    LLAMA_1B,
    LLAMA_3_8B,
    PROMPT,
    RTX_4090,
    STEPS,
    TINY,
    described,
    program_logits,
    random_model,
    reference,
    some_ids,
)
from tests.token_logits import step_logits

DTYPES = [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
ROUNDED_OTHERWISE = 1e-2  # of a vector whose entries may be the next integer: a scale is 2^-7 of the largest
by_dtype = pytest.mark.parametrize("dtype,limit", DTYPES, ids=["bf16", "fp16"])
by_family = pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
on_a_cpu = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def int8_model(changes: dict[str, Any], dtype: torch.dtype, device: str) -> Transformer:
    model = random_model(replace(TINY, **changes), dtype, None, False, False, device)
    use_int8_cache(model)
    return model


@torch.inference_mode()
def expected_steps(model: Transformer, ids: Tensor, filled: KVCache) -> tuple[Tensor, KVCache]:
    """Logits [STEPS, 1, V] of the reference's steps after a prompt that filled holds, and its cache then."""
    plain = reference(model)
    cache = plain.new_cache(1, PROMPT + STEPS)
    cache.k[..., :PROMPT, :], cache.v[..., :PROMPT, :] = filled.k[..., :PROMPT, :], filled.v[..., :PROMPT, :]
    places = torch.arange(PROMPT, PROMPT + STEPS, device=ids.device)[:, None, None]
    return torch.stack([plain(ids[:, int(p) : int(p) + 1], p, cache)[:, 0] for p in places]), cache


def check_steps(backend: CudaProgramBackend, limit: float) -> None:
    """The program's logits and the vectors that it stored are the reference's."""
    model = backend.model
    ids, D = some_ids(model), model.config.head_dim
    logits, cache = step_logits(backend, ids, PROMPT)
    expected, its_cache = expected_steps(model, ids, cache)
    assert_near("logits", logits, expected, limit)
    assert_near("logits of the program's head", program_logits(backend, ids)[1], expected[0], limit)
    new = slice(PROMPT, PROMPT + STEPS)
    for name, mine, its in (("keys", cache.k, its_cache.k), ("values", cache.v, its_cache.v)):
        mine, its = (unpack_int8(x[..., new, :], D, torch.float32) for x in (mine, its))
        assert_near(name, mine, its, max(limit, ROUNDED_OTHERWISE))
        assert not cache.k[..., PROMPT + STEPS :, :].any() and not cache.v[..., PROMPT + STEPS :, :].any()


def given_values(model: Transformer) -> Tensor:
    """Values [KV, D] that every token of a model with qkv_bias is made to have: zeros, and those with an infinity."""
    config = model.config
    values = torch.randn(config.num_kv_heads, config.head_dim, generator=torch.Generator().manual_seed(3))
    values[1] = 0.0
    values[2, 5] = torch.inf
    for block in model.blocks:
        module = block.attention.wqkv
        assert isinstance(module, SparseLinear) and module.bias is not None
        module.weight[:, -config.kv_size :] = 0
        module.bias[-config.kv_size :] = values.flatten()
    return values.to(model.dtype)


def check_bytes(model: Transformer, backend: CudaProgramBackend) -> None:
    """A step stores the very bytes of pack_int8."""
    expected = pack_int8(given_values(model))
    cache, ids = model.new_cache(1, 8), torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with torch.inference_mode():
        backend.decode(ids, torch.full_like(ids, 3), cache)
    stored = cache.v[0, 0, :, 3].cpu()  # of the first layer: infinities become all of x behind it
    scales, its_scales = (x[:, -16:-12].view(torch.float32) for x in (stored, expected))
    assert torch.equal(stored[:, :-16], expected[:, :-16]) and not stored[:, -12:].any()
    assert torch.equal(scales[:2], its_scales[:2]) and scales[2].isnan() and its_scales[2].isnan()


BYTES = {"qkv_bias": True, "num_heads": 6, "num_kv_heads": 3}


@on_a_cpu
@by_dtype
@by_family
def test_steps_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], dtype: torch.dtype, limit: float
) -> None:
    check_steps(emulated_backend(int8_model(changes, dtype, "cpu"), tmp_path, monkeypatch), limit)


@on_a_cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_bytes_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    model = int8_model(BYTES, dtype, "cpu")
    check_bytes(model, emulated_backend(model, tmp_path, monkeypatch))


@on_a_cpu
@torch.inference_mode()
def test_a_token_attends_to_what_the_cache_gives_back_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token attends to its own value alone; unrounded, the output is 5e-3 off."""
    model = int8_model({}, torch.float16, "cpu")
    backend, first = emulated_backend(model, tmp_path, monkeypatch), torch.zeros(1, 1, dtype=torch.int64)
    hidden = backend.decode(first, first.clone(), model.new_cache(1, 8))
    plain = reference(model)
    assert_near("hidden", hidden, plain.hidden_states(first, first, plain.new_cache(1, 8)), 3e-3)


@pytest.mark.gpu
@by_dtype
@by_family
def test_steps(changes: dict[str, Any], dtype: torch.dtype, limit: float) -> None:
    check_steps(CudaProgramBackend(FusedBackend(int8_model(changes, dtype, "cuda"), "test", compile=False)), limit)


@pytest.mark.gpu
def test_bytes() -> None:
    model = int8_model(BYTES, torch.bfloat16, "cuda")
    check_bytes(model, CudaProgramBackend(FusedBackend(model, "test", compile=False)))


@pytest.mark.skipif(bool(compiler_obstacle()), reason="no NVRTC")
@pytest.mark.parametrize("device", [A100, RTX_4090, H100], ids=["sm_80", "sm_89", "sm_90"])
@pytest.mark.parametrize("config", [LLAMA_3_8B, LLAMA_1B], ids=["8B", "1B"])
def test_it_compiles_without_a_gpu(config: Any, device: Device) -> None:
    found = plan(replace(described(config, 8, 8), cache_bits=8), device)
    assert b"decode_step" in compile_source(found.source, f"sm_{device.capability[0]}{device.capability[1]}")
