"""The plugin's layers within a stand-in for vLLM: what they load, how ranks share it, and when they are sparse."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomllib
import torch
from safetensors import safe_open
from torch import Tensor, nn

from teal.checkpoint.weights import find_shards, load_model
from teal.errors import UserError
from teal.layers.quantized_linear import QuantConfig
from teal.model import ModelConfig, Transformer
from teal.plan import ProjectionPlan, even_plan
from teal.teal_layers import sparse_layers, sparse_prefill, sparsify
from tests.conftest import ROOT, assert_near, run_command, save_tiny_model, tiny_config
from tests.vllm_plugin import standin
from tests.vllm_plugin.standin import CUDAGraphMode, Engine, ForwardContext

THRESHOLD = 0.4
SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
    "head_dim": 32, "max_seq_len": 64,
}  # fmt: skip
FORMATS: dict[str, tuple[str, ...]] = {
    "floats": (),
    "int8": ("--mode", "int8", "--embedding", "int8", "--lm-head", "int8"),
    "int4": ("--mode", "int4", "--lm-head", "int4"),
    "int4-input": ("--mode", "int4", "--grouping", "input"),
    "mixed": ("--mode", "mixed", "--bits", "5", "--lm-head", "mixed", "--sequences", "1", "--length", "32"),
}


@pytest.fixture
def engine() -> Iterator[Engine]:
    with standin.installed() as found:
        yield found


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


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in find_shards(folder):
        with safe_open(path, "pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 - no dict
    return found


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
    parameters, tensors = dict(layer.named_parameters()), tensors_of(folder)
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
    layer, tensors = kind(config.model.vocab_size, config.model.hidden_size, config, prefix), tensors_of(folder)
    for name, parameter in layer.named_parameters():
        load = getattr(parameter, "weight_loader", lambda own, new: own.data.copy_(new))
        load(parameter, tensors[f"{prefix}.{name}"])
    return layer


def bare(kind: Any) -> Any:
    """An instance without weights, as vLLM shows it to get_quant_method."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
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


def test_layers_that_are_not_known_are_refused_or_left_alone(engine: Engine) -> None:
    from teal.vllm_plugin.config import TealConfig

    class FusedMoE(nn.Module):
        pass

    config = TealConfig()
    config.model = ModelConfig(**SIZES)
    with pytest.raises(UserError, match=r"layer model\.layers\.0\.mlp\.experts of experts is not supported by teal"):
        config.get_quant_method(FusedMoE(), "model.layers.0.mlp.experts")
    with pytest.raises(UserError, match=r"layer model\.layers\.0\.mlp\.router is not supported by teal"):
        standin.LinearBase(64, [64], config, "model.layers.0.mlp.router")
    with pytest.raises(UserError, match=r"qkv_proj stacks 4 projections, expected 3: this model is not supported"):
        standin.LinearBase(64, [64, 32, 32, 32], config, "model.layers.0.self_attn.qkv_proj")
    assert config.get_quant_method(standin.Attention(), "model.layers.0.self_attn.attn") is None
    other = config.get_quant_method(bare(standin.LinearBase), "vision_tower.layers.0.mlp.fc1")
    assert isinstance(other, standin.UnquantizedLinearMethod)


def context(mode: CUDAGraphMode, longest: int | None = None, in_parts: bool = False) -> ForwardContext:
    metadata: Any = None if longest is None else {"layer.0": SimpleNamespace(max_query_len=longest)}
    return ForwardContext({}, [metadata] if in_parts else metadata, {}, mode)


NONE, PIECEWISE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL


@pytest.mark.parametrize(
    ("mode", "step", "decodes"),
    [
        (NONE, None, True),  # outside of an engine
        (NONE, context(NONE), True),  # a trial run
        (NONE, context(NONE, 1), True),
        (NONE, context(NONE, 1, in_parts=True), True),
        (NONE, context(NONE, 5), False),
        (CUDAGraphMode.FULL_AND_PIECEWISE, context(FULL, 1), True),
        (CUDAGraphMode.FULL_AND_PIECEWISE, context(PIECEWISE, 3), False),
        (CUDAGraphMode.FULL_AND_PIECEWISE, context(NONE, 3), False),
        (PIECEWISE, context(PIECEWISE, 3), True),  # one graph for both phases
        (FULL, context(FULL, 3), True),
    ],
)
def test_phases(engine: Engine, mode: CUDAGraphMode, step: ForwardContext | None, decodes: bool) -> None:
    from teal.vllm_plugin.phase import is_decode

    engine.compilation_config.cudagraph_mode, engine.context = mode, step
    assert is_decode(engine.compilation_config) == decodes


def test_prompts_are_dense_unless_asked_for(engine: Engine) -> None:
    """Also short ones, and each step that has a token of a prompt in it."""
    from teal.vllm_plugin.config import TealConfig
    from teal.vllm_plugin.product import Shared

    config = TealConfig()
    config.model = ModelConfig(**SIZES)
    config.plan = even_plan(config.model, ProjectionPlan(0.5, THRESHOLD))
    layer = standin.RowParallelLinear(96, [64], config, "model.layers.0.mlp.down_proj")
    nn.init.normal_(layer.weight)
    weight = layer.weight.clone()
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, 96)
    dense, sparse = x @ weight.t(), torch.where(x.abs() >= THRESHOLD, x, 0) @ weight.t()
    for longest, expected in ((1, sparse), (3, dense)):
        engine.context = context(NONE, longest)
        assert_near(str(longest), layer(x), expected, 1e-6)
    Shared.sparse_prompts = True
    assert_near("asked for", layer(x), sparse, 1e-6)


def test_achieved_sparsity_is_logged_once(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """Of users' tokens alone: not of trial runs, and not while graphs are captured."""
    from teal.vllm_plugin import achieved
    from teal.vllm_plugin.config import TealConfig

    config = TealConfig()
    config.model = ModelConfig(**SIZES)
    config.plan = even_plan(config.model, ProjectionPlan(0.3, 0.5))
    layers = [standin.RowParallelLinear(96, [64], config, f"model.layers.{i}.mlp.down_proj") for i in (0, 1)]
    for layer in layers:
        nn.init.normal_(layer.weight)
        layer.quant_method.process_weights_after_loading(layer)
    caplog.set_level("INFO", "vllm.teal")
    x = torch.linspace(-1, 1, achieved.TOKENS * 96).view(-1, 96)  # half of it is below 0.5
    graphs = CUDAGraphMode.FULL_AND_PIECEWISE
    for mode, step in ((NONE, context(NONE)), (graphs, context(PIECEWISE, 9)), (graphs, context(NONE, 9))):
        engine.compilation_config.cudagraph_mode, engine.context = mode, step
        for layer in layers:
            layer(x)
    assert not caplog.records
    engine.compilation_config.cudagraph_mode = NONE
    for _ in range(2):
        for layer in layers:
            layer(x)
    assert [record.getMessage() for record in caplog.records] == ["teal: sparsity 50.0% achieved, 30% planned"]


def test_one_graph_takes_all_batches(engine: Engine) -> None:
    """torch.compile sees one op, whose choice it cannot freeze."""
    from teal.vllm_plugin.product import Shared, phased_linear

    weight, thresholds = torch.randn(96, 64), torch.tensor([THRESHOLD, 0.0])
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def step(x: Tensor) -> Tensor:
        return phased_linear(x * 2, weight, thresholds, [32, 32], 0) + 1

    Shared.compilation, Shared.sparse_prompts = engine.compilation_config, False
    for rows in (5, 8, 9, 40):
        x = torch.randn(rows, 96)
        kept = torch.where((2 * x).abs() >= THRESHOLD, 2 * x, 0) if rows <= 8 else 2 * x
        expected = torch.cat((kept @ weight[:, :32], 2 * x @ weight[:, 32:]), dim=1) + 1
        assert_near(f"{rows} rows", step(x), expected, 1e-6)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("version", "registered", "warning"),
    [
        ("0.19.1", False, "teal: vLLM 0.19.1 is not supported; expected 0.20 to"),
        ("0.20.0", True, None),
        ("0.32.1rc1.dev3", True, None),
        ("99.0", True, "teal: vLLM 99.0 is newer than"),
        ("dev", True, None),
    ],
)
def test_versions(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str, registered: bool,
    warning: str | None,
) -> None:  # fmt: skip
    """An old one is left as it is: a plugin that raised would keep it from serving any model."""
    import vllm

    from teal.vllm_plugin.register import register

    monkeypatch.setattr(vllm, "__version__", version)
    register()
    register()
    assert set(standin.METHODS) == ({"teal"} if registered else set())
    messages = [record.getMessage() for record in caplog.records]
    assert all(warning is not None and message.startswith(warning) for message in messages)
    assert bool(messages) == (warning is not None)


def test_vllm_finds_the_plugin() -> None:
    """By the entry point that pyproject.toml names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"teal": "teal.vllm_plugin.register:register"}
    assert project["optional-dependencies"]["vllm"] == ["vllm>=0.20"]
