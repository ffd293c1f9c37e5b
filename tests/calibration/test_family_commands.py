"""Families whose blocks are not plain: calibrated, sparsified, quantized, and refused where a backend lacks a part."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from teal.calibration.sensitivity import BackwardPass, drawn
from teal.calibration.stages import BlockStages, Positions, Stream
from teal.calibration.thresholds import Settings, calibrate, measure_sparsity
from teal.checkpoint.identity import weights_identity
from teal.checkpoint.weights import load_model
from teal.decoding import backends
from teal.decoding.backends import choose_backend
from teal.errors import UserError
from teal.extras import block_extras, extras
from teal.layers.int8_cache import use_int8_cache
from teal.layers.quantized_linear import QuantConfig
from teal.layers.rounding import quantize
from teal.model import Transformer
from teal.plan import keep_all_plan
from teal.teal_layers import sparsify
from tests.conftest import QUANTIZABLE, assert_near, save_tiny_model, tiny_config

CPU = torch.device("cpu")
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "head_dim": 32, "sliding_window": 9, "sliding_window_pattern": 2, "tie_word_embeddings": True,
        "final_logit_softcapping": 3.0,
    },
    "gemma2": {"head_dim": 32, "sliding_window": 9, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "olmo2": {},
    "stablelm": {"use_qkv_bias": True},
    "granite": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 4.0},
}  # fmt: skip
NAMED = {  # what each has beyond a plain model, within blocks, or nothing, and in all
    "gemma3_text": ("activation gelu_tanh", "rotations that differ by layer"),
    "gemma2": ("a soft cap of attention scores", "a soft cap of logits"),
    "olmo2": ("norms after sublayers", "norms of q and k over all heads"),
    "stablelm": ("layer norms", "layer norms"),
    "granite": ("", "a scaled embedding"),
}


def folder_of(family: str, tmp_path: Path) -> Path:
    config = tiny_config(family, **QUANTIZABLE | FAMILIES[family] | {"vocab_size": 192})
    save_tiny_model(config, tmp_path)
    return tmp_path


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str, tmp_path: Path) -> Transformer:
    return load_model(folder_of(family, tmp_path), CPU, torch.float32)


def sequences(count: int = 4, length: int = 48) -> Tensor:
    return torch.randint(3, 190, (count, length), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def logits(model: Transformer) -> Tensor:
    ids = sequences(2, 24)
    return model(ids, torch.arange(24).expand(2, 24), model.new_cache(2, 24))


@torch.inference_mode()
def test_stages_give_what_the_block_gives(model: Transformer) -> None:
    """Projection by projection, with what ends a sublayer before it is added."""
    ids = sequences()
    positions, stream = Positions(model, ids.shape[1]), Stream.embedded(model, ids, offload=False)
    for i in range(len(model.blocks)):
        stages, x = BlockStages(positions, i), stream
        for p in stages.projections:
            x = stages.after(p, x, stages.inputs(p, x))
        stream = stream.map(stages.forward)
        for part, expected in zip(x.parts, stream.parts, strict=True):
            assert_near(f"block {i}", part, expected, 1e-5)


@pytest.mark.parametrize("method", ["uniform", "greedy", "global"])
def test_calibrated(method: str, model: Transformer) -> None:
    """The sparsity is what was asked for, and a plan of nothing changes nothing."""
    ids, dense = sequences(8, 64), logits(model)
    [plan] = calibrate(model, ids, Settings((0.5,), method), {})
    achieved = measure_sparsity(model, ids)
    for layer, own in zip(plan.layers, achieved, strict=True):
        for name, projection in layer.items():
            assert own[name] == pytest.approx(projection.sparsity, abs=0.03), name
    assert_near("logits of a plan of nothing", logits(sparsify(model, keep_all_plan(model.config))), dense, 1e-5)


def test_gradients_of_the_head(model: Transformer) -> None:
    """The likelihood falls and rises as they say, also through a soft cap: along one, by its own square."""
    backward = BackwardPass(model, sequences(1, 16), 16)
    backward.forward()
    ids = backward.pieces[:1]
    x = model.hidden_states(ids, torch.arange(16)[None], model.new_cache(1, 16)).detach().requires_grad_()
    p = model.logits(x)[0].log_softmax(-1)
    # drawn again, as BackwardPass draws them
    labels = drawn(p.detach().exp(), torch.Generator().manual_seed(0))
    [expected] = torch.autograd.grad(-p.gather(1, labels).sum(), x)
    assert_near("gradient", backward.gradients[0], expected, 1e-4)


@pytest.mark.parametrize("mode,limit", [("int8", 0.05), ("int4", 0.6)])
def test_quantized(mode: str, limit: float, model: Transformer) -> None:
    dense = logits(model)
    assert_near("logits", logits(quantize(model, mode)), dense, limit)


@pytest.mark.parametrize("method,mode", [("rtn", "int8"), ("rtn", "int4"), ("gptq", "int4"), ("gptq", "int8")])
def test_quantized_folders(method: str, mode: str, family: str, tmp_path: Path) -> None:
    """Tensors that were changed as they were read are not changed again."""
    from teal.cli.quantize import quantize_folder

    source = folder_of(family, tmp_path / "a")
    quantize_folder(source, tmp_path / "b", QuantConfig(mode, 32), method, sequences(8, 64))
    dense, rounded = (load_model(tmp_path / name, CPU, torch.float32) for name in "ab")
    assert dense.config == rounded.config
    limit = {"int8": 0.05, "int4": 0.6}[mode]
    assert_near("logits", logits(rounded), logits(dense), limit)
    if method == "rtn":
        assert_near("logits", logits(rounded), logits(quantize(dense, mode, 32)), 1e-6)
    assert weights_identity(source) != weights_identity(tmp_path / "b")


def test_fused_kernels_refuse_what_they_do_not_compute(
    family: str, model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    within, around = NAMED[family]
    assert within in ", ".join(block_extras(model.config)) and bool(within) == bool(block_extras(model.config))
    assert around in extras(model.config)
    assert choose_backend(model).name == "program", "a CPU's program computes them all"
    assert choose_backend(model, forced="fused").name == "fused"
    monkeypatch.setattr(backends, "FUSED_EXTRAS", frozenset())
    if within:
        with pytest.raises(UserError, match=f"fused cannot run: its kernels do not compute .*{within}"):
            choose_backend(model, forced="fused")


@torch.inference_mode()
@pytest.mark.parametrize("family", ["gemma2", pytest.param("gemma3_text", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kept", ["floats", pytest.param("int8", marks=pytest.mark.slow)])
def test_compiled_blocks_agree(kept: str, family: str, tmp_path: Path) -> None:
    """Prefill and decoding, also with keys and values in 8 bits; and what surrounds the blocks."""
    model, ids = load_model(folder_of(family, tmp_path), CPU, torch.float32), sequences(2, 12)
    if kept == "int8":
        use_int8_cache(model)
    found = []
    for backend in (choose_backend(model, forced=name) for name in ("eager", "compiled")):
        cache = model.new_cache(2, 16)
        backend.prefill(ids, torch.arange(12).expand(2, 12), cache)
        hidden = backend.decode(ids[:, -1:], torch.full((2, 1), 12), cache)
        found.append(backend.logits(hidden))
        assert_near("logits", found[-1], model.logits(hidden), 1e-6)
    assert_near("logits", found[1], found[0], 1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["gemma3_text"])
def test_position_tensors_compile_as_a_whole(model: Transformer) -> None:
    positions = torch.tensor([[3], [5]])
    expected = model.position_tensors(positions, 16)
    for own, other in zip(torch.compile(model.position_tensors, fullgraph=True)(positions, 16), expected, strict=True):
        for a, b in zip(own, other, strict=True):
            assert_near("cos, sin or mask", a.float(), b.float(), 1e-6)
