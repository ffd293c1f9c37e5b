"""sparsify: the same model with small inputs dropped, at the sparsity asked for, measured."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from teal.calibration import thresholds as calibration
from teal.calibration.texts import default_text, split_text, token_sequences
from teal.calibration.thresholds import HELD_OUT_SEQUENCES, calibrate_quickly, measure_sparsity
from teal.checkpoint.tokenizer import load_tokenizer
from teal.checkpoint.weights import load_model
from teal.decoding.engine import Engine
from teal.errors import UserError
from teal.hardware import pick_dtype
from teal.layers.phase import decoding
from teal.model import KVCache, Transformer
from teal.options import Settings
from teal.plan import ProjectionPlan, SparsityPlan, config_fields
from teal.teal_layers import achieved_sparsity, set_counting, sparse_layers, sparse_prefill, sparsify
from tests.conftest import DEFAULT_OR_SHALLOW, PROJECTIONS, assert_near, relative_error, save_tiny_model, tiny_config

CPU = torch.device("cpu")
TOKENS = torch.arange(24)[None]


@pytest.fixture(params=["llama", "qwen2"])  # qwen2 has biases
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save_tiny_model(tiny_config(request.param), tmp_path)
    return tmp_path


def plan_with(model: Transformer, thresholds: dict[str, float]) -> SparsityPlan:
    layer = {name: ProjectionPlan(0.5, thresholds.get(name, 0.0)) for name in PROJECTIONS}
    return SparsityPlan(config_fields(model.config), "test", 0.5, (layer,) * model.config.num_layers)


@torch.inference_mode()
def logits(model: Transformer, prompt: int = 8) -> torch.Tensor:
    """Logits of TOKENS: the first prompt of them in one call, the others one by one."""
    cache = KVCache(model.config, 1, 32, CPU, torch.float32)
    positions = torch.arange(TOKENS.shape[1])[None]
    out = [model(TOKENS[:, :prompt], positions[:, :prompt], cache)] if prompt else []
    with decoding(model):
        out += [model(TOKENS[:, i : i + 1], positions[:, i : i + 1], cache) for i in range(prompt, TOKENS.shape[1])]
    return torch.cat(out, dim=1)[0]


def test_threshold_zero_is_the_dense_model(folder: Path) -> None:
    dense = load_model(folder, CPU, torch.float32)
    sparse = sparsify(load_model(folder, CPU, torch.float32), plan_with(dense, {}))
    assert_near("logits", logits(sparse), logits(dense), 1e-6)


@pytest.mark.parametrize(
    "thresholds",
    [
        dict.fromkeys(PROJECTIONS, 0.3),
        {"q": 0.2, "k": 0.6, "v": 0.4, "o": 0.1, "gate": 0.3, "up": 0.7, "down": 0.05},
        {"k": 0.5, "up": 0.5},
        {"down": 1e9},
    ],
    ids=["one-for-all", "each-its-own", "some-dense", "nothing-kept"],
)
def test_projections_equal_the_definition(folder: Path, thresholds: dict[str, float]) -> None:
    """Each projection's output is W (x masked at its own threshold) + b, in decoding and in sparse prefill.

    Compared module by module on inputs recorded from the dense model. Over a whole model, an entry
    within rounding of its threshold may fall on either side.
    """
    dense, sparse = (load_model(folder, CPU, torch.float32) for _ in range(2))
    sparsify(sparse, plan_with(sparse, thresholds))
    c = dense.config
    sizes = {"q": c.q_size, "k": c.kv_size, "v": c.kv_size, "o": c.hidden_size, "down": c.hidden_size}
    sizes |= dict.fromkeys(("gate", "up"), c.intermediate_size)
    paths = {"attention.wqkv": "qkv", "attention.wo": "o", "feed_forward.gate_up": ("gate", "up")}
    paths |= {"feed_forward.down": ("down",)}
    inputs: dict[str, torch.Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _, x: inputs.update({name: x[0]})

    for i, block in enumerate(dense.blocks):
        for path in paths:
            block.get_submodule(path).register_forward_pre_hook(record(f"layers.{i}.{path}"))
    logits(dense, prompt=TOKENS.shape[1])
    assert len(inputs) == 4 * c.num_layers
    for name, x in inputs.items():
        linear, module = dense.get_submodule(name), sparse.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        names = paths[name.split(".", 2)[2]]
        weights = linear.weight.split([sizes[n] for n in names])
        masked = [torch.where(x.abs() >= thresholds.get(n, 0.0), x, 0.0) for n in names]
        expected = torch.cat([m @ w.T for m, w in zip(masked, weights, strict=True)], dim=-1)
        expected = expected if linear.bias is None else expected + linear.bias
        with decoding(sparse):
            rows = torch.cat([module(x[:, t : t + 1]) for t in range(x.shape[1])], dim=1)
        torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5, msg=name)
        with sparse_prefill(sparse):
            torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


def test_prefill_is_dense(folder: Path) -> None:
    dense = load_model(folder, CPU, torch.float32)
    sparse = load_model(folder, CPU, torch.float32)
    sparsify(sparse, plan_with(sparse, dict.fromkeys(PROJECTIONS, 0.3)))
    assert_near("logits of prefill", logits(sparse)[:8], logits(dense)[:8], 1e-6)
    assert relative_error(logits(sparse)[8:], logits(dense)[8:]) > 1e-3, "logits of decode steps"


def test_new_thresholds_on_a_sparse_model(folder: Path) -> None:
    once, twice = (load_model(folder, CPU, torch.float32) for _ in range(2))
    sparsify(once, plan_with(once, {"q": 0.2, "up": 0.4}))
    sparsify(twice, plan_with(twice, dict.fromkeys(PROJECTIONS, 0.9)))
    sparsify(twice, plan_with(twice, {"q": 0.2, "up": 0.4}))
    assert torch.equal(logits(once), logits(twice))


def test_weights_are_not_copied_twice(folder: Path) -> None:
    model = load_model(folder, CPU, torch.float32)
    before = sum(p.nbytes for p in model.parameters())
    sparsify(model, plan_with(model, {}))
    assert sum(p.nbytes for p in model.parameters()) == before
    for layer in sparse_layers(model):
        weights = [module.weight for module in layer]
        assert [isinstance(weight, torch.Tensor) and weight.is_contiguous() for weight in weights] == [True] * 4


def test_counting_counts_what_is_dropped(folder: Path) -> None:
    model = load_model(folder, CPU, torch.float32)
    sparsify(model, plan_with(model, {"q": 0.0, "k": 1e9, "v": 0.5, "down": 0.2}))
    assert achieved_sparsity(model) == [{}] * 3
    set_counting(model, True)
    inputs: list[torch.Tensor] = []
    model.blocks[0].attention.wqkv.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    logits(model, prompt=0)
    first = achieved_sparsity(model)[0]
    assert first["q"] == 0.0 and first["k"] == 1.0 and first["gate"] == 0.0
    assert first["v"] == pytest.approx(float((torch.cat(inputs).abs() < 0.5).float().mean()), abs=1e-6)
    set_counting(model, False)
    logits(model, prompt=0)
    assert achieved_sparsity(model) == [{}] * 3


def test_plan_for_another_depth_is_refused(folder: Path) -> None:
    model = load_model(folder, CPU, torch.float32)
    plan = plan_with(model, {})
    with pytest.raises(UserError, match=r"2 layers \(this model: 3\)"):
        sparsify(model, replace(plan, layers=plan.layers[:2]))


def test_an_engine_is_no_model(tiny_folder: Path) -> None:
    engine: Any = Engine.load(str(tiny_folder), device="cpu", dtype="fp32")
    with pytest.raises(UserError, match=r"takes a model, not Engine; an Engine's is engine\.model"):
        sparsify(engine, plan_with(engine.model, {}))


def tensor_bytes() -> int:
    """Bytes of all tensors alive in this process, shared storages once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter) and not thing.is_meta:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def test_a_sparse_model_takes_no_more_memory(default_folder: Path) -> None:
    """One copy of the weights, transposed, serves prefill and decode."""
    before = tensor_bytes()
    model = load_model(default_folder, CPU, torch.bfloat16)
    dense = tensor_bytes() - before
    layer = {name: ProjectionPlan(0.5, 0.1) for name in PROJECTIONS}
    sparsify(model, SparsityPlan({}, "test", 0.5, (layer,) * model.config.num_layers))
    with torch.inference_mode():
        cache = model.new_cache(1, 32)
        model(TOKENS, TOKENS, cache)
        with decoding(model):
            model(TOKENS[:, :1], TOKENS[:, -1:] + 1, cache)
    del cache
    assert dense > 2e8 and tensor_bytes() - before <= 1.02 * dense


def test_text_too_short_to_calibrate_is_refused(folder: Path) -> None:
    model = load_model(folder, CPU, torch.float32)
    with pytest.raises(UserError, match="too short"):
        calibrate_quickly(model, lambda text: list(text.encode()), Settings(), "a few words")


@DEFAULT_OR_SHALLOW
def test_achieved_sparsity_on_held_out_text(real_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every projection of the default model comes within 2 points of the target on text calibration never saw."""
    sparsity, texts = 0.5, []

    def measure(model: Transformer, sequences: torch.Tensor) -> list[dict[str, float]]:
        texts.append(sequences)
        return measure_sparsity(model, sequences)

    monkeypatch.setattr(calibration, "measure_sparsity", measure)
    model = load_model(real_folder, CPU, pick_dtype("auto", CPU, sparse=True).dtype)
    encode = load_tokenizer(real_folder).encode
    plan = calibrate_quickly(model, encode, Settings((sparsity,), "uniform"), default_text())
    _, held_out = split_text(default_text())
    assert torch.equal(torch.stack(texts), token_sequences(encode, held_out, HELD_OUT_SEQUENCES, 512)[None])
    for i, layer in enumerate(plan.layers):
        for name, projection in layer.items():
            achieved = projection.achieved
            assert achieved is not None and abs(achieved - sparsity) <= 0.02, f"layer {i} {name}: {achieved}"
