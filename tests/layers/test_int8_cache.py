"""A KV cache in 8 bits: what it keeps, what the model makes of it, and that every way of decoding takes it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teal.checkpoint.loading import load_for_decoding
from teal.decoding.engine import Engine
from teal.decoding.scheduler import generate_batch
from teal.errors import UserError
from teal.kernels.formats.kv_int8 import pack_int8, packed_width, unpack_int8
from teal.layers.phase import decoding
from teal.model import KVCache
from teal.options import ModelOptions
from tests.conftest import relative_error

PROMPT = [5, 9, 33, 120, 7, 250, 61]


@settings(deadline=None, max_examples=50)
@given(D=st.integers(1, 40).map(lambda n: 2 * n), power=st.integers(-30, 30), seed=st.integers(0, 99))
def test_a_vector_comes_back_within_half_a_step(D: int, power: int, seed: int) -> None:
    x = 10.0**power * torch.randn(2, 3, D, generator=torch.Generator().manual_seed(seed))
    packed = pack_int8(x)
    assert packed.shape == (2, 3, packed_width(D)) and packed_width(D) % 16 == 0
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((unpack_int8(packed, D, torch.float32) - x).abs() <= 0.501 * step).all()


def test_zeros_stay_zeros() -> None:
    assert not unpack_int8(pack_int8(torch.zeros(3, 16)), 16, torch.bfloat16).any()


def test_logits_stay_near_those_of_a_float_cache(tiny_folder: Path) -> None:
    ids = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(40)[None]
    logits = []
    for kind in ("float", "int8"):
        model = load_for_decoding(ModelOptions(str(tiny_folder), device="cpu", dtype="fp32", kv_cache=kind)).model
        cache = model.new_cache(1, 64)
        with torch.inference_mode():
            parts = [model(ids[:, :30], positions[:, :30], cache)]
            with decoding(model):
                parts += [model(ids[:, i : i + 1], positions[:, i : i + 1], cache) for i in range(30, 40)]
        logits.append(torch.cat(parts, dim=1))
    assert 0 < relative_error(logits[1], logits[0]) < 0.02, "logits"
    assert isinstance(cache, KVCache) and cache.k.dtype == torch.int8


@pytest.mark.parametrize("options", [{}, {"sparsity": 0.4}, {"compile": True}, {"quant": "int8"}], ids=str)
def test_every_way_of_decoding_takes_it(quantizable_folder: Path, options: dict[str, Any]) -> None:
    engine = Engine.load(str(quantizable_folder), device="cpu", dtype="fp32", kv_cache="int8", **options)
    assert engine.cache.k.dtype == torch.int8
    first = list(engine.generate(PROMPT, max_new_tokens=300, ignore_eos=True))  # the cache grows within
    if "sparsity" not in options:  # a prompt's keys are those of the dense model, an answer's are not
        again = list(engine.generate([*PROMPT, *first[:9]], max_new_tokens=20, ignore_eos=True))  # from what it kept
        engine.cached_ids = []
        assert list(engine.generate([*PROMPT, *first[:9]], max_new_tokens=20, ignore_eos=True)) == again
    if not options.get("compile"):
        texts = generate_batch(engine, [PROMPT, PROMPT[:3]], max_new_tokens=20, ignore_eos=True)
        engine.cached_ids = []
        assert texts[0] == "".join(engine.stream(PROMPT, max_new_tokens=20, ignore_eos=True))


def test_an_unknown_kind_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(UserError, match="kv_cache int4: unknown; expected one of float, int8"):
        Engine.load(str(tiny_folder), device="cpu", kv_cache="int4")
