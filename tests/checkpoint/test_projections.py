"""One description of a block: true of the modules, enough to cut them and to replace them, and nowhere repeated."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teal.calibration.stages import Positions
from teal.calibration.thresholds import Settings, calibrate, measure_sparsity
from teal.checkpoint.weights import hf_projection_names, weight_targets
from teal.errors import UserError
from teal.layers.quantized_linear import QuantConfig, QuantizedLinear, pick_group_size, use_quantized_linears
from teal.model import Attention, Block, FeedForward, ModelConfig, Projection, Transformer
from teal.plan import ProjectionPlan, SparsityPlan, config_fields, keep_all_plan
from teal.teal_layers import sparse_layers, sparsify
from tests.conftest import PROJECTIONS, assert_near

ROOT = Path(__file__).parents[2]
CONFIG = ModelConfig(100, 64, 96, 2, num_heads=4, num_kv_heads=2, head_dim=16, max_seq_len=128)
CONFIGS = {
    "plain": CONFIG,
    "biases": replace(CONFIG, qkv_bias=True, o_bias=True),
    "wide-heads-with-norms": replace(CONFIG, head_dim=24, qk_norm=True),
}
POSITIONS = torch.arange(8)[None]


def run(model: Transformer, tokens: Tensor) -> Tensor:
    return model.hidden_states(tokens, POSITIONS, model.new_cache(1, 8))


def random_model(config: ModelConfig) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config).requires_grad_(False).eval()
    nn.init.normal_(model.embedding.weight)
    return model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_description_is_that_of_the_modules(config: ModelConfig) -> None:
    block = Block(config)
    linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    assert [p.module for p in block.projections()] == [name for name, _ in block.named_modules() if name in linears]
    for p in block.projections():
        module = block.get_submodule(p.module)
        assert isinstance(module, nn.Linear)
        assert (module.in_features, module.out_features) == (p.in_features, sum(p.sizes)), p.name
        assert (module.bias is not None) == p.bias, p.name
        assert len(p.names) == len(p.sizes) == len(p.hf_names), p.name
        cut = p.sizes if p.cut == "output" else (p.in_features,)
        assert all(size % p.unit == 0 for size in cut), p.name
    assert [name for p in block.projections() for name in p.names] == list(PROJECTIONS)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_weight_of_a_block_is_a_projections_or_a_norms(config: ModelConfig) -> None:
    model = random_model(config)
    taken = [t.data_ptr() for t in weight_targets(model).values()]
    assert len(set(taken)) == len(taken)
    assert sum(t.numel() for t in weight_targets(model).values()) == sum(p.numel() for p in model.parameters())
    weights = {name.rpartition(".")[0] for name, t in weight_targets(model).items() if t.dim() > 1}
    assert weights == hf_projection_names(config) | {"model.embed_tokens", "lm_head"}


def test_inputs_are_of_the_kind_they_are_said_to_be() -> None:
    """A normed input is its norm's output; the others come from the modules that were given it."""
    model = random_model(CONFIG)
    block, seen = model.blocks[0], {}
    for name, module in block.named_modules():
        module.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0], y)}))
    run(model, torch.arange(8)[None])
    for p in block.projections():
        inputs, normed = seen[p.module][0], seen[p.norm][1]
        assert (inputs is normed) == (p.input == "normed"), p.name
        if p.ends_sublayer:
            sublayer = p.module.rpartition(".")[0]
            assert seen[sublayer][0] is normed and seen[sublayer][1] is seen[p.module][1], p.name
            assert isinstance(block.get_submodule(sublayer), Attention) == (p.input == "attended"), p.name


def part_of(linear: nn.Linear, p: Projection, rank: int, ranks: int) -> Iterator[Tensor]:
    """The weight, and the bias if there is one, that one of several devices has of a linear layer."""
    sizes = p.sizes if p.cut == "output" else (p.in_features,)
    own = []
    for start, size in zip(torch.tensor((0, *sizes)).cumsum(0).tolist(), sizes, strict=False):
        units = torch.arange(start, start + size).view(-1, p.unit)
        own.append(units.chunk(ranks)[rank].flatten())
    channels = torch.cat(own)
    yield linear.weight[channels] if p.cut == "output" else linear.weight[:, channels]
    if linear.bias is not None:
        yield linear.bias[channels] if p.cut == "output" else linear.bias * (rank == 0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_block_can_be_cut_by_its_description(config: ModelConfig) -> None:
    """Two devices, each with half of the heads and of the hidden channels: what they give adds up to the block's."""
    model, ranks = random_model(config), 2
    block = model.blocks[0]
    x = torch.randn(1, 8, config.hidden_size)
    half = replace(
        config, num_heads=config.num_heads // ranks, num_kv_heads=config.num_kv_heads // ranks,
        intermediate_size=config.intermediate_size // ranks,
    )  # fmt: skip
    parts = []
    for rank in range(ranks):
        part = Transformer(half).requires_grad_(False).eval()
        for p in block.projections():
            whole, own = block.get_submodule(p.module), part.blocks[0].get_submodule(p.module)
            assert isinstance(whole, nn.Linear)
            for parameter, value in zip(own.parameters(), part_of(whole, p, rank, ranks), strict=True):
                parameter.copy_(value)
        parts.append(part)
    context = Positions(model, 8).context(0)
    contexts = [Positions(part, 8).context(0) for part in parts]
    sublayers = [part.blocks[0] for part in parts]
    for name in ("attention", "feed_forward"):
        expected = getattr(block, name)(x, *(context if name == "attention" else ()))
        found = sum(
            getattr(own, name)(x, *(c if name == "attention" else ()))
            for own, c in zip(sublayers, contexts, strict=True)
        )
        assert_near(name, found, expected, 1e-6)


class Ungated(ModelConfig):
    """A family without a gate: down(silu(up(x)))."""

    def projections(self) -> tuple[Projection, ...]:
        qkv, o, gate_up, down = ModelConfig.projections(self)
        up = replace(gate_up, name="up", module="feed_forward.up", names=("up",))
        return qkv, o, replace(up, sizes=gate_up.sizes[1:], hf_names=gate_up.hf_names[1:]), down


class UngatedFeedForward(FeedForward):
    def __init__(self, config: ModelConfig) -> None:
        nn.Module.__init__(self)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


@pytest.fixture
def ungated() -> Transformer:
    model = random_model(Ungated(100, 64, 96, 2, num_heads=4, num_kv_heads=2, head_dim=16, max_seq_len=128))
    for block in model.blocks:
        block.feed_forward = UngatedFeedForward(model.config)
    return model.requires_grad_(False)


SIX = ["q", "k", "v", "o", "up", "down"]


def test_another_familys_checkpoint(ungated: Transformer) -> None:
    layer = {name.removeprefix("model.layers.1.") for name in weight_targets(ungated) if ".1." in name}
    assert "mlp.up_proj.weight" in layer and "mlp.gate_proj.weight" not in layer
    assert sum(t.numel() for t in weight_targets(ungated).values()) == sum(p.numel() for p in ungated.parameters())


def test_another_familys_plans(ungated: Transformer) -> None:
    config = ungated.config
    plan = keep_all_plan(config)
    assert [list(layer) for layer in plan.layers] == [SIX, SIX]
    layer = dict.fromkeys(PROJECTIONS, ProjectionPlan(0.5, 0.1))
    seven = SparsityPlan({}, "uniform", 0.5, (layer,) * 2)
    with pytest.raises(UserError, match=r"layer 0 lists \[.*'gate'.*\] \(this model: "):
        sparsify(ungated, seven)
    with pytest.raises(UserError, match="layer 1 lists"):
        replace(seven, layers=(layer, plan.layers[1]))
    with pytest.raises(UserError, match="layer 0 lists"):
        keep_all_plan(config).check_fits(CONFIG)
    expected = run(ungated, torch.arange(8)[None])
    assert_near("output", run(sparsify(ungated, plan), torch.arange(8)[None]), expected, 1e-6)
    assert [[module.names for module in modules] for modules in sparse_layers(ungated)] == [
        [("q", "k", "v"), ("o",), ("up",), ("down",)]
    ] * 2


@pytest.mark.parametrize("method", ["uniform", "greedy"])
def test_another_family_is_calibrated(method: str, ungated: Transformer) -> None:
    sequences = torch.randint(100, (4, 32), generator=torch.Generator().manual_seed(0))
    [plan] = calibrate(ungated, sequences, Settings((0.4,), method), {})
    assert plan.model == config_fields(ungated.config) and [list(layer) for layer in plan.layers] == [SIX, SIX]
    for layer, shares in zip(plan.layers, measure_sparsity(ungated, sequences), strict=True):
        assert all(shares[name] == pytest.approx(layer[name].sparsity, abs=0.02) for name in SIX), shares


def test_another_family_is_quantized(ungated: Transformer) -> None:
    tokens = torch.arange(8)[None]
    expected = run(ungated, tokens)
    use_quantized_linears(ungated, QuantConfig("int8", pick_group_size(ungated.config, None)), fill=True)
    for block in ungated.blocks:
        assert all(isinstance(block.get_submodule(p.module), QuantizedLinear) for p in block.projections())
    assert_near("output", run(ungated, tokens), expected, 0.02)


# What only the model, the table of families, other attention, and kernels of blocks or steps may name.
ANATOMY = re.compile(
    r"\bwqkv\b|\bgate_up\b|\.wo\b|_proj\b|\bq_size\b|\bkv_size\b|\.attention_norm\b|\.ffn_norm\b|\bfeed_forward\b"
    r"|\"q\", \"k\", \"v\", \"o\""
)
MAY_NAME_IT = {
    "model.py", "families.py", "gguf_families.py", "fused_block.py", "cpu_program.py", "cuda_program.py",
    "int8_cache.py",
}  # fmt: skip


def test_nothing_else_knows_the_anatomy_of_a_block() -> None:
    files = {path.resolve() for folder in ("teal", "bench", "examples") for path in (ROOT / folder).rglob("*.py")}
    files |= set(ROOT.glob("*.py"))
    assert len(files) > 80
    found = {
        str(path.relative_to(ROOT)): sorted(set(ANATOMY.findall(path.read_text(encoding="utf-8"))))
        for path in files
        if path.name not in MAY_NAME_IT and "kernels" not in path.parts
    }
    assert not {name: words for name, words in found.items() if words}
