"""The estimate of what dropping entries costs: gradients as autograd gives them, divergences as they are measured."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from teal.calibration import sensitivity
from teal.calibration.sensitivity import GRID, Samples, probes, sample_sensitivity
from teal.checkpoint.weights import load_model
from teal.layers.quantized_linear import QuantConfig, use_quantized_linears
from teal.model import Transformer
from teal.plan import keep_all_plan
from teal.teal_layers import sparse_layers, sparse_prefill, sparsify
from tests.conftest import PROJECTIONS, assert_near, relative_error

CPU = torch.device("cpu")


@pytest.fixture
def sequences() -> Tensor:
    return torch.randint(5, 300, (6, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(quantizable_folder: Path) -> Transformer:
    return load_model(quantizable_folder, CPU, torch.float32)


@pytest.fixture
def every_token(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Noted, in their order."""
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n))
    yield


@pytest.mark.usefixtures("every_token")
def test_gradients_are_those_of_autograd(model: Transformer, sequences: Tensor) -> None:
    """v = W g for each projection, with g at its output as autograd gives it, for the labels that were drawn."""
    found = sample_sensitivity(model, sequences[:1])
    ids, generator = sequences[0], torch.Generator().manual_seed(0)
    outputs: dict[tuple[int, str], Tensor] = {}
    inputs: dict[tuple[int, str], Tensor] = {}

    def note(layer: int, name: str, x: Tensor, y: Tensor) -> None:
        y.retain_grad()
        inputs[layer, name], outputs[layer, name] = x[0].detach(), y

    handles = [
        block.get_submodule(p.module).register_forward_hook(
            lambda m, x, y, i=i, name=p.name: note(i, name, x[0], y)
        )
        for i, block in enumerate(model.blocks) for p in block.projections()
    ]  # fmt: skip
    x = model.embed(ids[None]).requires_grad_()
    for i, block in enumerate(model.blocks):
        x = block(x, *sensitivity.BlockStages(model, i, len(ids)).context)
    logits = model.logits(x)[0]
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    F.cross_entropy(logits, labels, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    kept = found[0]["q"].inputs.shape[0]
    assert kept == 16
    for i, block in enumerate(model.blocks):
        for p in block.projections():
            gradient = outputs[i, p.name].grad
            assert gradient is not None
            weight = block.get_submodule(p.module).weight
            parts = zip(p.names, gradient[0].split(p.sizes, dim=1), weight.split(p.sizes), strict=True)  # type: ignore[operator]
            for name, g, w in parts:
                assert_near(f"{i} {name} inputs", found[i][name].inputs, inputs[i, p.name][:kept], 1e-5)
                assert_near(f"{i} {name} gradients", found[i][name].gradients, (g @ w)[:kept], 1e-4)


@pytest.mark.parametrize("kind", ["float", "sparse", "int8"])
def test_the_model_is_left_as_it_was(kind: str, model: Transformer, sequences: Tensor) -> None:
    if kind == "sparse":
        sparsify(model, keep_all_plan(model.config))
    if kind == "int8":
        use_quantized_linears(model, QuantConfig("int8", 32), fill=True)
    modules = {name: id(module) for name, module in model.named_modules()}
    with torch.inference_mode():
        found = sample_sensitivity(model, sequences)
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert [set(layer) for layer in found] == [set(PROJECTIONS)] * model.config.num_layers
    assert all(bool(s.gradients.any()) and s.inputs.shape == s.gradients.shape for s in found[0].values())


def test_the_model_is_left_as_it_was_after_an_error(model: Transformer) -> None:
    modules = dict(model.named_modules())
    with pytest.raises(KeyError), probes(model):
        raise KeyError
    assert dict(model.named_modules()) == modules


def test_errors_at_the_grids_sparsities() -> None:
    """By definition: drop what is below the quantile, and average over all pairs of inputs and gradients."""
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(50, 40, generator=generator), torch.randn(50, 40, generator=generator)
    errors = Samples(x, v).errors()
    assert len(errors) == len(GRID) and errors[0] == 0 and errors == sorted(errors)
    for i in (4, 20, 38):
        limit = x.abs().flatten().sort().values[int(GRID[i] * x.numel())]
        dropped = torch.where(x.abs() < limit, x, 0.0).double()
        fisher = v.double().t() @ v.double() / len(v)
        expected = float(torch.einsum("ni,ij,nj->n", dropped, fisher, dropped).mean()) / 2
        assert errors[i] == pytest.approx(expected, rel=1e-5)


@torch.inference_mode()
def divergence(model: Transformer, sequences: Tensor, layer: int, name: str, sparsity: float) -> float:
    """KL from the dense model in nats a token, with this share of one projection's input dropped."""
    positions = torch.arange(sequences.shape[1]).expand_as(sequences)
    dense = model(sequences, positions, model.new_cache(*sequences.shape)).log_softmax(-1)
    module = next(m for m in sparse_layers(model)[layer] if name in m.names)
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda m, x: inputs.append(x[0]))
    model(sequences, positions, model.new_cache(*sequences.shape))
    handle.remove()
    ordered = inputs[0].abs().flatten().sort().values
    module.set_thresholds([float(ordered[int(sparsity * len(ordered))]) * (n == name) for n in module.names])
    with sparse_prefill(model):
        sparse = model(sequences, positions, model.new_cache(*sequences.shape)).log_softmax(-1)
    module.set_thresholds([0.0] * len(module.names))
    return float(F.kl_div(sparse, dense, log_target=True, reduction="none").sum(-1).mean())


def test_estimates_are_what_is_measured(default_folder: Path) -> None:
    """Of the default model, a fifth of one projection's input dropped at a time."""
    model = load_model(default_folder, CPU, torch.float32)
    generator = torch.Generator().manual_seed(1)
    sequences = torch.randint(100, 20_000, (16, 64), generator=generator)
    found = sample_sensitivity(model, sequences)
    sparsify(model, keep_all_plan(model.config))
    at = GRID.index(0.2)
    ratios = []
    for layer, name in ((2, "q"), (9, "o"), (14, "gate"), (20, "up"), (26, "down"), (5, "v")):
        measured = divergence(model, sequences, layer, name, GRID[at])
        ratios.append(found[layer][name].errors()[at] / measured)
    assert all(0.4 < ratio < 2.5 for ratio in ratios), ratios
    assert relative_error(torch.tensor(ratios), torch.ones(len(ratios))) < 0.6, ratios
