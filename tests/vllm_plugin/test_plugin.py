"""The plugin within a stand-in for vLLM: which layers it takes, which batches are sparse, and what the log says."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teal.errors import UserError
from teal.kernels.formats.packing import dequantize
from teal.layers.quantized_linear import round_to_nearest
from teal.model import ModelConfig
from teal.plan import ProjectionPlan, even_plan
from tests.conftest import ROOT, assert_near
from tests.vllm_plugin import standin
from tests.vllm_plugin.standin import SIZES, CUDAGraphMode, Engine, ForwardContext, bare

THRESHOLD = 0.4


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
    """Of users' tokens alone: not of trial runs, which take no more tokens than a graph, or prompts of a few."""
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
    trials = [(NONE, context(NONE)), (graphs, context(PIECEWISE, 99)), (graphs, context(NONE, 2))]
    for mode, step in (*trials, (graphs, context(NONE, 99))):
        engine.compilation_config.cudagraph_mode, engine.context = mode, step
        engine.compilation_config.max_cudagraph_capture_size = 8 if step is trials[-1][1] else achieved.TOKENS
        for layer in layers:
            layer(x)
    assert not caplog.records
    engine.compilation_config.max_cudagraph_capture_size = achieved.TOKENS - 1
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


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [16, 8])
def test_floats_are_sparse_for_few_texts_on_a_gpu(engine: Engine, bits: int) -> None:
    """cuBLAS is faster for more; a rounded weight has no faster product."""
    from teal.vllm_plugin.product import FLOAT_ROWS, Shared, phased_linear

    Shared.compilation, Shared.sparse_prompts = engine.compilation_config, False
    weight, thresholds = torch.randn(128, 256), torch.tensor([THRESHOLD], device="cuda")
    stored: list[Tensor | None] = [weight]
    if bits == 8:
        packed = round_to_nearest(weight, bits, 64)
        stored, weight = list(packed), dequantize(*packed)
    values, *packing = [None if t is None else t.cuda() for t in stored]
    for rows in (1, FLOAT_ROWS, FLOAT_ROWS + 1, 8, 9):
        x = torch.randn(rows, 128)
        is_sparse = rows <= (FLOAT_ROWS if bits == 16 else 8)
        expected = (torch.where(x.abs() >= THRESHOLD, x, 0) if is_sparse else x) @ weight
        y = phased_linear(x.cuda(), values, thresholds, [256], 0, *packing)
        assert_near(f"{rows} rows", y.cpu(), expected, 1e-2)


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
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points."vllm.general_plugins"]\nteal = "teal.vllm_plugin.register:register"\n' in project
