"""The fused backend equals the eager one on sparse layers, for every family; interpreted on a CPU, real on CUDA."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teal import quantize
from teal.checkpoint.weights import load_model
from teal.decoding.backend import Backend, EagerBackend
from teal.decoding.backends import FusedBackend
from teal.decoding.engine import Engine
from teal.layers.int8_cache import use_int8_cache
from teal.layers.quantized_embedding import QuantizedEmbedding
from teal.layers.quantized_linear import QuantizedLinear, replace_projections, round_in_two_terms
from teal.model import Block, Transformer
from teal.options import SamplingParams
from teal.plan import ProjectionPlan, SparsityPlan
from teal.teal_layers import set_counting, sparse_layers, sparsify
from tests.conftest import PROJECTIONS, QUANTIZABLE, assert_near, relative_error, save_tiny_model, tiny_config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROMPT, STEPS = 6, 3
THRESHOLDS = {"q": 0.2, "k": 0.3, "v": 0.1, "o": 0.05, "gate": 0.3, "up": 0.2, "down": 0.02}
GEMMA: dict[str, Any] = {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 4, "sliding_window_pattern": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-attention-bias": ("llama", {"attention_bias": True}),
    "mistral-sliding": ("mistral", {"sliding_window": 4}),
    "qwen2-bias": ("qwen2", {}),
    "qwen3-head-norms": ("qwen3", {"head_dim": 12}),
    "gemma-gelu": ("gemma", {"head_dim": 12, "hidden_act": "gelu"}),
    "gemma2-soft-cap": ("gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3-norms-after": ("gemma3_text", GEMMA | {"tie_word_embeddings": True}),
    "glm4-norms-after": ("glm4", {"head_dim": 16, "attention_bias": True}),
    "olmo2-norms-of-all-heads": ("olmo2", {}),
    "stablelm-layer-norms": ("stablelm", {"use_qkv_bias": True}),
}


def sparse_model(folder: Path, dtype: torch.dtype, scale: float = 1.0) -> Transformer:
    model = load_model(folder, DEVICE, dtype)
    layer = {name: ProjectionPlan(0.5, scale * THRESHOLDS[name]) for name in PROJECTIONS}
    return sparsify(model, SparsityPlan({}, "test", 0.5, (layer,) * model.config.num_layers))


def eager(model: Transformer) -> Backend:
    return EagerBackend(model, "test")


def fused(model: Transformer) -> FusedBackend:
    return FusedBackend(model, "test", compile=False)


@torch.inference_mode()
def decode_logits(backend: Backend, batch: int, steps: int = STEPS) -> Tensor:
    """Logits [steps, B, V] of steps after a prompt; rows are at different positions."""
    length = PROMPT + STEPS + batch
    cache = backend.model.new_cache(batch, length)
    ids = torch.arange(batch * length, device=DEVICE).view(batch, length) * 7 % 190 + 5
    offsets = torch.arange(batch, device=DEVICE)[:, None]
    positions = torch.arange(PROMPT, device=DEVICE)[None] + offsets
    backend.prefill(ids[:, :PROMPT], positions, cache)
    logits = []
    for i in range(steps):
        column = ids[:, PROMPT + i : PROMPT + i + 1]
        logits.append(backend.logits(backend.decode(column, offsets + PROMPT + i, cache)[:, 0]))
    return torch.stack(logits)


def kind_of_model(kind: str, folder: Path) -> Transformer:
    """The dense model in folder, quantized, or with a cache in 8 bits."""
    model = load_model(folder, DEVICE, torch.float32)
    if kind == "int8 cache":
        use_int8_cache(model)
    return quantize(model, kind) if kind in ("int8", "int4") else model


def count_block_calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts the calls of blocks' forward from now on, by what a call reads."""
    calls: dict[str, int] = {}
    forward = Block.forward

    def counted(block: Block, x: Tensor, *arguments: Any) -> Tensor:
        kind = "decode" if x.shape[1] == 1 else "prefill"
        calls[kind] = calls.get(kind, 0) + 1
        return forward(block, x, *arguments)

    monkeypatch.setattr(Block, "forward", counted)
    return calls


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_the_unfused_layers(
    name: str, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, overrides = FAMILIES[name]
    save_tiny_model(tiny_config(family, num_hidden_layers=2, **overrides), tmp_path)
    model = sparse_model(tmp_path, torch.float32)
    expected = decode_logits(eager(model), batch)
    backend, calls = fused(model), count_block_calls(monkeypatch)
    assert_near("logits", decode_logits(backend, batch), expected, 2e-6)
    assert calls == {"prefill": 2}, "only the prompt goes through the modules"
    assert all(type(block) is Block for block in model.layers)
    dense = decode_logits(eager(sparse_model(tmp_path, torch.float32, 0.0)), batch)
    assert relative_error(dense, expected) > 1e-2, "logits of the dense model"


@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["dense", "int8", "int4", "int8 cache"])
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "glm4", "olmo2", "stablelm"])
def test_families_in_every_format(family: str, kind: str, batch: int, tmp_path: Path) -> None:
    own = {"gemma2": GEMMA | {"attn_logit_softcapping": 2.0}, "gemma3_text": GEMMA}.get(family, {})
    save_tiny_model(tiny_config(family, **own | QUANTIZABLE | {"head_dim": 32, "num_hidden_layers": 1}), tmp_path)
    model = kind_of_model(kind, tmp_path)
    expected = decode_logits(eager(model), batch, 2)
    limit = 1e-3 if kind == "int8 cache" else 1e-5  # a byte may be rounded the other way
    assert_near("logits", decode_logits(fused(model), batch, 2), expected, limit)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["gemma2-soft-cap", "gemma3-norms-after", "olmo2-norms-of-all-heads", "stablelm-layer-norms"]
)
def test_families_in_16_bits(name: str, tmp_path: Path) -> None:
    """As near to the model in fp32 as the unfused layers in bf16 are; dense, as a threshold may cut either way."""
    family, overrides = FAMILIES[name]
    save_tiny_model(tiny_config(family, num_hidden_layers=2, **overrides), tmp_path)
    exact = decode_logits(eager(sparse_model(tmp_path, torch.float32, 0.0)), 3)
    model = sparse_model(tmp_path, torch.bfloat16, 0.0)
    unfused = relative_error(decode_logits(eager(model), 3), exact)
    assert relative_error(decode_logits(fused(model), 3), exact) <= 1.5 * unfused < 0.2, f"logits, unfused {unfused}"


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("batch", [1, 3])
def test_refined_channels_reach_every_product(batch: int, tmp_path: Path) -> None:
    """Each projection has its own. Without the second rows of any one, logits would be others."""
    save_tiny_model(tiny_config("llama", **QUANTIZABLE, num_hidden_layers=2), tmp_path)
    model = load_model(tmp_path, DEVICE, torch.float32)
    generator = torch.Generator().manual_seed(0)

    def refine(linear: nn.Linear) -> QuantizedLinear:
        chosen = torch.randperm(linear.in_features, generator=generator)[:9].sort().values.to(DEVICE, torch.int32)
        module = QuantizedLinear(linear, 4, 32, refined_channels=9)
        module.set_weight(*round_in_two_terms(linear.weight.t().contiguous(), chosen, 32), chosen)
        module.scales[-9:] *= 16  # as large as those of the first rows
        return module

    replace_projections(model, refine)
    layer = {name: ProjectionPlan(0.5, THRESHOLDS[name] / 2) for name in PROJECTIONS}
    sparsify(model, SparsityPlan({}, "test", 0.5, (layer,) * model.config.num_layers))
    expected = decode_logits(eager(model), batch)
    assert_near("logits", decode_logits(fused(model), batch), expected, 1e-5)
    for module in sparse_layers(model)[0]:
        assert module.scales is not None
        second = module.scales[-9:].clone()
        module.scales[-9:] = 0.0
        assert relative_error(decode_logits(eager(model), batch), expected) > 1e-3, f"logits without {module.names}"
        module.scales[-9:] = second


@pytest.mark.parametrize("batch", [1, 3])
def test_an_embedding_in_8_bits(batch: int, tmp_path: Path) -> None:
    save_tiny_model(tiny_config("llama", **QUANTIZABLE, num_hidden_layers=2), tmp_path)
    model = quantize(load_model(tmp_path, DEVICE, torch.float32), "int8", embedding=True)
    expected = decode_logits(eager(model), batch)
    assert_near("logits", decode_logits(fused(model), batch), expected, 1e-5)
    assert isinstance(model.embedding, QuantizedEmbedding)
    model.embedding.scales[:, 0] *= 2
    assert relative_error(decode_logits(fused(model), batch), expected) > 1e-3, "logits of another embedding"


@pytest.mark.parametrize("name,batch", [("mistral-sliding", 1), ("qwen3-head-norms", 3)])
def test_a_cache_in_8_bits(name: str, batch: int, tmp_path: Path) -> None:
    family, overrides = FAMILIES[name]
    save_tiny_model(tiny_config(family, num_hidden_layers=2, **overrides), tmp_path)
    model = sparse_model(tmp_path, torch.float32)
    exact = decode_logits(eager(model), batch)
    use_int8_cache(model)
    expected = decode_logits(eager(model), batch)
    assert_near("logits", decode_logits(fused(model), batch), expected, 1e-3)  # a byte may be rounded the other way
    assert relative_error(expected, exact) > 2e-3, "logits of a cache in 8 bits"


def default_model(folder: Path, dtype: torch.dtype) -> Transformer:
    """The default model, sparse; where its kernels are interpreted, at a second a block, only its first four blocks."""
    model = sparse_model(folder, dtype)
    if DEVICE.type == "cpu":
        model.layers = model.layers[:4]
        model.config = replace(model.config, num_layers=4, sliding_windows=model.config.sliding_windows[:4])
    return model


def test_default_models_logits(default_folder: Path) -> None:
    model = default_model(default_folder, torch.float32)
    expected = decode_logits(eager(model), 1, 1)
    assert_near("logits", decode_logits(fused(model), 1, 1), expected, 1e-5)


@pytest.mark.gpu
def test_default_models_logits_in_16_bits(default_folder: Path) -> None:
    """The real model in bf16: as near to the fp32 sparse model as the unfused bf16 layers are."""
    exact = decode_logits(eager(default_model(default_folder, torch.float32)), 4, 1)
    model = default_model(default_folder, torch.bfloat16)
    unfused = relative_error(decode_logits(eager(model), 4, 1), exact)
    assert relative_error(decode_logits(fused(model), 4, 1), exact) <= 1.3 * unfused < 0.2, f"logits, unfused {unfused}"


def test_counting_and_wide_batches_take_the_unfused_path(tmp_path: Path) -> None:
    save_tiny_model(tiny_config("llama"), tmp_path)
    model = sparse_model(tmp_path, torch.float32)
    backend = fused(model)
    set_counting(model, True)
    decode_logits(backend, 1)
    assert int(sparse_layers(model)[0][0].seen) > 0
    set_counting(model, False)
    expected = decode_logits(eager(sparse_model(tmp_path, torch.float32)), 9)
    assert_near("logits", decode_logits(backend, 9), expected, 2e-6)


def test_weights_are_shared_with_prefill(tmp_path: Path) -> None:
    save_tiny_model(tiny_config("llama"), tmp_path)
    dense = load_model(tmp_path, DEVICE, torch.float32)
    model = sparse_model(tmp_path, torch.float32)
    fused(model)
    assert sum(p.nbytes for p in model.parameters()) == sum(p.nbytes for p in dense.parameters())


@pytest.mark.gpu
def test_fullgraph_compile_of_a_step(tmp_path: Path) -> None:
    """torch.compile takes the whole step, fused blocks included, without a graph break, and gives the same logits."""
    save_tiny_model(tiny_config("llama"), tmp_path)
    backend = fused(sparse_model(tmp_path, torch.bfloat16))
    expected = decode_logits(backend, 1)
    backend._decode = torch.compile(backend._decode, fullgraph=True)  # type: ignore[method-assign]
    assert_near("logits", decode_logits(backend, 1), expected, 1e-2)


@pytest.mark.gpu
def test_captured_step_equals_eager(tiny_folder: Path) -> None:
    """In fp32: in 16 bits the compiled prefill rounds otherwise than the eager one, and a tie may fall differently."""
    options: dict[str, Any] = {"device": "cuda", "dtype": "fp32", "sparsity": 0.5}
    eager = Engine.load(str(tiny_folder), **options, compile=False)
    graph = Engine.load(str(tiny_folder), **options, compile=True)
    prompt = [5, 9, 33, 120, 7, 250, 61]
    texts = [list(e.generate(prompt, SamplingParams(), 60, ignore_eos=True)) for e in (eager, graph)]
    assert texts[0] == texts[1]
    for _ in range(20):
        graph.cached_ids = []
        assert list(graph.generate(prompt, SamplingParams(), 60, ignore_eos=True)) == texts[1]


@pytest.mark.gpu
def test_another_plan_takes_effect_in_a_captured_step(tiny_folder: Path) -> None:
    engine = Engine.load(str(tiny_folder), device="cuda", dtype="fp32", sparsity=0.3, compile=True)
    other = Engine.load(str(tiny_folder), device="cuda", dtype="fp32", sparsity=0.7, compile=True)
    prompt = [5, 9, 33, 120]
    first = list(engine.generate(prompt, SamplingParams(), 40, ignore_eos=True))
    expected = list(other.generate(prompt, SamplingParams(), 40, ignore_eos=True))
    assert engine.plan is not None and other.plan is not None
    keep, graphs = engine.plan, len(engine.decoder.rows.graphs)
    engine.use_plan(other.plan)
    assert list(engine.generate(prompt, SamplingParams(), 40, ignore_eos=True)) == expected != first
    engine.use_plan(keep)
    assert list(engine.generate(prompt, SamplingParams(), 40, ignore_eos=True)) == first
    assert len(engine.decoder.rows.graphs) == graphs
