"""The plugin's layers within a stand-in for vLLM: what they load, how ranks share it, and what they multiply."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teal.checkpoint.weights import load_model
from teal.errors import UserError
from teal.layers.quantized_linear import QuantConfig
from teal.model import ModelConfig, Transformer
from teal.plan import ProjectionPlan, even_plan
from teal.teal_layers import sparse_layers, sparse_prefill, sparsify
from tests.conftest import assert_near, float_tensors, run_command, save_tiny_model, tiny_config
from tests.vllm_plugin import standin
from tests.vllm_plugin.standin import SIZES, Engine, bare

THRESHOLD = 0.4
FORMATS: dict[str, tuple[str, ...]] = {
    "floats": (),
    "int8": ("--mode", "int8", "--embedding", "int8", "--lm-head", "int8"),
    "int4": ("--mode", "int4", "--lm-head", "int4"),
    "int4-input": ("--mode", "int4", "--grouping", "input"),
    "mixed": ("--mode", "mixed", "--bits", "5", "--lm-head", "mixed", "--sequences", "1", "--length", "32"),
}


@pytest.fixture(scope="module", params=FORMATS)
def folder(
    request: pytest.FixtureRequest, byte_level_tokenizer_json: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:  # fmt: skip
    """A tiny checkpoint in each format, whose halves are whole groups."""
    floats = tmp_path_factory.mktemp("floats")
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    save_tiny_model(tiny_config("llama", **sizes, vocab_size=320), floats)
    (floats / "tokenizer.json").write_text(byte_level_tokenizer_json, encoding="utf-8")
    if not (options := FORMATS[request.param]):
        return floats
    to = tmp_path_factory.mktemp("rounded") / request.param
    done = run_command("-m", "quantize", "--checkpoint", floats, *options, "--group-size", "32", "-o", to)
    assert done.returncode == 0, done.stderr
    return to


def new_config(folder: Path, threshold: float | None = THRESHOLD) -> Any:
    """The plugin's config of a checkpoint, with the same threshold in all places; None is dense."""
    from teal.checkpoint.config import load_config, load_quantization
    from teal.vllm_plugin.config import TealConfig

    quant = load_quantization(folder)
    assert quant is None or isinstance(quant, QuantConfig)
    config = TealConfig(quant)
    config.model = load_config(folder)
    if threshold is not None:
        config.plan = even_plan(config.model, ProjectionPlan(0.5, threshold))
    return config


def loaded_layer(config: Any, folder: Path, block: int, module: str) -> standin.LinearBase:
    """vLLM's layer of that name with this rank's part of the checkpoint in it."""
    p = {p.name: p for p in config.model.projections()}[module]
    kind = standin.RowParallelLinear if p.cut == "input" else standin.LinearBase
    where = f"model.layers.{block}.{p.hf_names[0].rpartition('.')[0]}.{module}_proj"
    layer = kind(p.in_features, list(p.sizes), config, where)
    parameters, tensors = dict(layer.named_parameters()), float_tensors(folder)
    for shard, hf_name in enumerate(p.hf_names):
        for name, parameter in parameters.items():
            tensor = tensors[f"model.layers.{block}.{hf_name}.{name}"]
            parameter.weight_loader(parameter, tensor, shard)  # type: ignore[attr-defined]
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def expected_products(folder: Path, x: dict[str, Tensor], sparse: bool) -> dict[str, Tensor]:
    """What our own model's modules of block 1 make of x, without biases."""
    model = load_model(folder, torch.device("cpu"), torch.float32)
    sparsify(model, even_plan(model.config, ProjectionPlan(0.5, THRESHOLD if sparse else 0.0)))
    found = {}
    for module, p in zip(sparse_layers(model)[1], model.config.projections(), strict=True):
        module.bias = None  # type: ignore[assignment]
        with sparse_prefill(model):
            found[p.name] = module(x[p.name][None])[0]
    return found


def inputs(model: Any, rows: int) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {p.name: torch.randn(rows, p.in_features) for p in model.projections()}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("rows", [1, 8, 9])
def test_products_are_those_of_our_own_modules(engine: Engine, folder: Path, ranks: int, rows: int) -> None:
    """Sparse up to 8 rows, dense beyond; parts of two ranks make the whole."""
    engine.ranks = ranks
    config = new_config(folder)
    if ranks > 1 and config.quant is not None and config.quant.is_mixed:
        pytest.skip("mixed bits are not cut: see below")
    x = inputs(config.model, rows)
    expected = expected_products(folder, x, sparse=rows <= 8)
    for p in config.model.projections():
        parts = []
        for engine.rank in range(ranks):
            layer = loaded_layer(config, folder, 1, p.name)
            own = x[p.name].chunk(ranks, dim=1)[engine.rank] if p.cut == "input" else x[p.name]
            parts.append(layer(own).split(layer.sizes, dim=1))
        columns = [torch.stack(c).sum(0) if p.cut == "input" else torch.cat(c, 1) for c in zip(*parts, strict=True)]
        assert_near(p.name, torch.cat(columns, dim=1), expected[p.name], 1e-6)


@pytest.fixture
def bf16_by_default() -> Iterator[None]:
    """As vLLM has it while it makes a model of that dtype."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("bf16_by_default")
def test_products_in_16_bits(engine: Engine, folder: Path) -> None:
    """The dtype is of weights, scales and results; thresholds stay fp32."""
    config = new_config(folder)
    x = {name: x.bfloat16() for name, x in inputs(config.model, 2).items()}
    with torch.inference_mode():
        layers = {name: loaded_layer(config, folder, 1, name) for name in x}
        found = {name: layers[name](x[name]) for name in x}
        head = loaded_part(standin.ParallelLMHead, config, folder, "lm_head")
        if head is not None:
            assert head.quant_method.apply(head, x["qkv"]).dtype == torch.float32
    torch.set_default_dtype(torch.float32)
    expected = expected_products(folder, {name: x.float() for name, x in x.items()}, sparse=True)
    for name, y in found.items():
        assert y.dtype == torch.bfloat16 and layers[name].thresholds.dtype == torch.float32
        assert_near(name, y, expected[name], 2e-2)


def test_groups_and_refined_channels_are_not_cut(engine: Engine, folder: Path) -> None:
    """Of 192 inputs a sixty-fourth part are 3."""
    config = new_config(folder)
    if config.quant is None:
        pytest.skip("floats have no groups")
    engine.ranks, block, name = 64, 1, "down" if config.quant.by_input else "gate_up"
    message = "channels a device are not whole groups of 32: use fewer devices"
    if config.quant.is_mixed:
        numbers = {p.name: i for i, p in enumerate(config.model.projections()) if p.cut == "input"}
        refined = config.quant.refined
        block, name = next((b, n) for b in range(len(refined)) for n, i in numbers.items() if refined[b][i])
        engine.ranks, message = 2, "is of mixed bits, whose inputs cannot be cut: serve it on one device"
    with pytest.raises(UserError, match=message):
        loaded_layer(config, folder, block, name)


def test_without_a_plan_products_are_dense(engine: Engine, folder: Path) -> None:
    config = new_config(folder, threshold=None)
    for rows in (1, 9):
        x = inputs(config.model, rows)
        expected = expected_products(folder, x, sparse=False)
        for name in expected:
            assert_near(name, loaded_layer(config, folder, 1, name)(x[name]), expected[name], 1e-6)


def loaded_part(kind: type, config: Any, folder: Path, prefix: str) -> Any:
    """vLLM's embedding or head with this rank's part of the checkpoint in it; None if vLLM's own method has it."""
    from teal.vllm_plugin.vocabulary import TealEmbeddingMethod, TealHeadMethod

    if not isinstance(config.get_quant_method(bare(kind), prefix), (TealEmbeddingMethod, TealHeadMethod)):
        return None
    layer, tensors = kind(config.model.vocab_size, config.model.hidden_size, config, prefix), float_tensors(folder)
    for name, parameter in layer.named_parameters():
        load = getattr(parameter, "weight_loader", lambda own, new: own.data.copy_(new))
        load(parameter, tensors[f"{prefix}.{name}"])
    return layer


@pytest.mark.parametrize("ranks", [1, 2])
def test_embedding_and_head_are_those_of_our_own_model(engine: Engine, folder: Path, ranks: int) -> None:
    """Those that are not rounded are left to vLLM."""
    engine.ranks = ranks
    config = new_config(folder)
    own: Transformer = load_model(folder, torch.device("cpu"), torch.float32)
    tokens, x = torch.arange(own.config.vocab_size), torch.randn(9, own.config.hidden_size)
    embedded, logits = [], []
    for engine.rank in range(ranks):
        embedding = loaded_part(standin.VocabParallelEmbedding, config, folder, "model.embed_tokens")
        head = loaded_part(standin.ParallelLMHead, config, folder, "lm_head")
        assert (embedding is not None) == (config.quant is not None and config.quant.embedding)
        assert (head is not None) == (config.quant is not None and config.quant.lm_head)
        if embedding is not None:
            rows = torch.arange(len(tokens) // ranks)
            embedded.append(embedding.quant_method.embedding(embedding, rows))
        if head is not None:
            logits.append(torch.cat([head.quant_method.apply(head, part) for part in (x[:1], x)]))
    if embedded:
        assert_near("embedding", torch.cat(embedded), own.embedding(tokens), 1e-6)
    if logits:
        assert logits[0].dtype == torch.float32
        assert_near("logits", torch.cat(logits, dim=1), own.lm_head(torch.cat((x[:1], x))), 1e-6)


def test_a_rounded_head_is_not_the_embedding(engine: Engine) -> None:
    """vLLM would skip its tensors, if the config still said that both are one."""
    from teal.vllm_plugin.config import TealConfig

    hf_config = SimpleNamespace(tie_word_embeddings=True)
    engine.model_config = SimpleNamespace(hf_config=hf_config, hf_text_config=hf_config)
    config = TealConfig(QuantConfig("int8", 32, lm_head=True))
    config.model = ModelConfig(**SIZES)
    head = standin.ParallelLMHead(320, 64, config, "lm_head")
    assert hf_config.tie_word_embeddings is False
    assert head.quant_method.tie_weights(head, nn.Module()) is head and not hasattr(head, "weight")


def test_vocabulary_is_padded_with_zeros(engine: Engine) -> None:
    """100 tokens are 128 for vLLM: the second of two ranks has 36 of them and 28 rows of zeros."""
    from teal.vllm_plugin.config import TealConfig

    engine.ranks, engine.rank = 2, 1
    config = TealConfig(QuantConfig("int8", 32, lm_head=True, embedding=True))
    config.model = ModelConfig(**SIZES | {"vocab_size": 100})
    embedding = standin.VocabParallelEmbedding(100, 64, config)
    embedding.qweight.weight_loader(embedding.qweight, torch.ones(100, 64, dtype=torch.int8))
    assert embedding.qweight[:36].eq(1).all() and embedding.qweight[36:].eq(0).all()
    head = standin.ParallelLMHead(96, 64, config, "lm_head")
    head.scales.weight_loader(head.scales, torch.ones(64, 3))
    assert head.scales[:, :1].eq(1).all() and head.scales[:, 1:].eq(0).all()
