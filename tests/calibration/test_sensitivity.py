"""The estimate of what dropping entries costs: gradients as autograd gives them, divergences as they are measured."""

import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teal.calibration import sensitivity
from teal.calibration.curves import GRID, ErrorCurve, error_curve, error_curves, norms_behind
from teal.calibration.sensitivity import BackwardPass, Samples, drawn, pieces_of, probes
from teal.calibration.stages import Positions
from teal.calibration.texts import default_text
from teal.checkpoint.tokenizer import load_tokenizer
from teal.checkpoint.weights import load_model
from teal.errors import UserError
from teal.layers.int8_cache import use_int8_cache
from teal.layers.quantized_linear import QuantConfig, QuantizedLinear, use_quantized_linears
from teal.model import Transformer
from teal.plan import keep_all_plan
from teal.teal_layers import sparse_layers, sparse_prefill, sparsify
from tests.conftest import PROJECTIONS, assert_near, save_tiny_model, tiny_config

CPU = torch.device("cpu")


@pytest.fixture
def sequences() -> Tensor:
    return torch.randint(5, 300, (6, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(quantizable_folder: Path) -> Transformer:
    return load_model(quantizable_folder, CPU, torch.float32)


def sample_sensitivity(model: Transformer, sequences: Tensor) -> list[dict[str, Samples]]:
    """[layer][projection]"""
    backward = BackwardPass(model, sequences, 1 << 20)
    backward.forward()
    return [backward.samples(i) for i in reversed(range(len(model.blocks)))][::-1]


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
        x = block(x, *Positions(model, len(ids)).context(i))
    logits = model.logits(x)[0]
    labels = drawn(logits.detach().softmax(-1), generator)[:, 0]
    F.cross_entropy(logits, labels, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    for i, block in enumerate(model.blocks):
        for p in block.projections():
            gradient = outputs[i, p.name].grad
            assert gradient is not None
            weight = block.get_submodule(p.module).weight
            parts = zip(p.names, gradient[0].split(p.sizes, dim=1), weight.split(p.sizes), strict=True)  # type: ignore[operator]
            for name, g, w in parts:
                assert_near(f"{i} {name} inputs", found[i][name].inputs, inputs[i, p.name], 1e-5)
                assert_near(f"{i} {name} gradients", found[i][name].gradients, g @ w, 1e-4)


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
    with pytest.raises(KeyError), probes(model.blocks[0], lambda *_: None):
        raise KeyError
    assert dict(model.named_modules()) == modules


def test_errors_at_the_grids_sparsities() -> None:
    """By definition: drop what is below the quantile, and let each token's dropped entries meet its own gradient."""
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(50, 40, generator=generator), torch.randn(50, 40, generator=generator)
    errors = error_curve(x, v)
    assert len(errors) == len(GRID) and errors[0] == 0
    for i in (2, 10, 19):
        limit = x.abs().flatten().sort().values[int(GRID[i] * x.numel())]
        dropped = torch.where(x.abs() < limit, x, 0.0).double()
        expected = float(torch.einsum("ni,ni->n", dropped, v.double()).square().mean()) / 2
        assert errors[i] == pytest.approx(expected, rel=1e-5)


def test_what_a_token_does_not_need_costs_nothing_to_drop() -> None:
    """Gradients stand in channels that the token keeps: no pair of one token's d and v meets, others' would."""
    x = torch.full((64, 32), 0.1)
    x[::2, :16] = x[1::2, 16:] = torch.linspace(1.0, 2.0, 16)
    v = torch.where(x >= 1.0, 1.0, 0.0)
    errors = error_curve(x, v)
    assert errors[GRID.index(0.5)] == 0 < errors[GRID.index(0.6)]


@torch.inference_mode()
def divergences(model: Transformer, sequences: Tensor, places: list[tuple[int, str]], sparsity: float) -> list[float]:
    """KL from the dense model in nats a token, with this share of one projection's input dropped, for each place."""
    positions = torch.arange(sequences.shape[1]).expand_as(sequences)

    def log_probabilities() -> Tensor:
        return model(sequences, positions, model.new_cache(*sequences.shape)).log_softmax(-1)

    modules = [next(m for m in sparse_layers(model)[layer] if name in m.names) for layer, name in places]
    inputs: list[Tensor] = []
    handles = [module.register_forward_pre_hook(lambda m, x: inputs.append(x[0])) for module in modules]
    dense, found = log_probabilities(), []
    for handle in handles:
        handle.remove()
    for module, x, (_, name) in zip(modules, list(inputs), places, strict=True):
        limit = float(x.abs().flatten().sort().values[int(sparsity * x.numel())])
        module.set_thresholds([limit * (n == name) for n in module.names])
        with sparse_prefill(model):
            found.append(float(F.kl_div(log_probabilities(), dense, log_target=True, reduction="none").sum(-1).mean()))
        module.set_thresholds([0.0] * len(module.names))
    return found


def test_estimates_are_what_is_measured(default_folder: Path) -> None:
    """Of the default model, with 30% of one projection's input dropped at a time."""
    model = load_model(default_folder, CPU, torch.float32)
    text = load_tokenizer(default_folder).encode(default_text())[: 6 * 64]
    found = sample_sensitivity(model, torch.tensor(text).view(6, 64))
    sparsify(model, keep_all_plan(model.config))
    places = [(5, "v"), (9, "o"), (14, "gate"), (17, "q"), (20, "up"), (26, "down")]  # in the forward pass's order
    measured = divergences(model, torch.tensor(text[: 3 * 64]).view(3, 64), places, 0.3)
    samples = [found[layer][name] for layer, name in places]
    estimates = [error_curve(own.inputs, own.gradients)[GRID.index(0.3)] for own in samples]
    ratios = sorted(estimate / kl for estimate, kl in zip(estimates, measured, strict=True))
    assert 0.7 < ratios[2] <= ratios[3] < 1.4 and ratios[0] > 0.1 and ratios[-1] < 3, ratios


def test_what_a_norm_undoes_is_not_free(tmp_path: Path) -> None:
    """Of a Gemma 3, with norms behind q, k, o and down: gradients before them miss large changes."""
    save_tiny_model(tiny_config("gemma3_text", head_dim=16, hidden_size=64, num_attention_heads=4), tmp_path)
    model = load_model(tmp_path, CPU, torch.float32)
    assert set(norms_behind(model.blocks[1])) == {"q", "k", "o", "down"}
    sequences = torch.randint(0, 199, (8, 64), generator=torch.Generator().manual_seed(1))
    errors = error_curves(model, sequences, 512)[1]
    sparsify(model, keep_all_plan(model.config))
    places = [(1, name) for name in ("q", "k", "o", "gate", "up", "down")]
    for sparsity in (0.3, 0.9):
        for (_, name), measured in zip(places, divergences(model, sequences, places, sparsity), strict=True):
            assert 0.6 < errors[name][GRID.index(sparsity)] / measured < 1.7, (name, sparsity)


def test_rounded_keys_and_values_are_refused(model: Transformer, sequences: Tensor) -> None:
    use_int8_cache(model)
    with pytest.raises(UserError, match="method global needs keys and values in floats"):
        sample_sensitivity(model, sequences)


def test_a_quantized_head_has_the_gradient_of_its_weights(model: Transformer, sequences: Tensor) -> None:
    use_quantized_linears(model, QuantConfig("int8", 32, lm_head=True), fill=True)
    quantized = sample_sensitivity(model, sequences[:2])
    plain = load_dequantized(model)
    for name, samples in sample_sensitivity(plain, sequences[:2])[1].items():
        assert_near(f"{name} gradients", quantized[1][name].gradients, samples.gradients, 1e-3)


def load_dequantized(model: Transformer) -> Transformer:
    """The same model with its integers as floats."""
    plain = Transformer(model.config)
    shapes = {name: value.shape for name, value in plain.state_dict().items()}
    same = {name: value for name, value in model.state_dict().items() if shapes.get(name) == value.shape}
    plain.load_state_dict(same, strict=False)
    for block, original in zip(plain.blocks, model.blocks, strict=True):
        for p in block.projections():
            linear, module = block.get_submodule(p.module), original.get_submodule(p.module)
            assert isinstance(linear, nn.Linear) and isinstance(module, QuantizedLinear)
            linear.weight.data, linear.bias = module.dequantized().t().contiguous(), module.bias
    head: nn.Module = model.lm_head
    assert isinstance(head, QuantizedLinear)
    plain.lm_head.weight = nn.Parameter(head.dequantized().t().contiguous())  # of its own, where it was tied
    return plain.requires_grad_(False)


def test_an_interrupted_pass_goes_on_where_it_stopped(
    model: Transformer, sequences: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, notes = error_curves(model, sequences, 1 << 20), tmp_path / "notes.safetensors"
    done: list[int] = []
    original = BackwardPass.through

    def through(self: BackwardPass, i: int) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(i)
        original(self, i)

    monkeypatch.setattr(BackwardPass, "through", through)
    with pytest.raises(KeyboardInterrupt):
        error_curves(model, sequences, 1 << 20, notes, "one")
    assert done == [2, 1]
    done.clear()
    assert error_curves(model, sequences, 1 << 20, notes, "one") == expected and done == [0]
    monkeypatch.setattr(BackwardPass, "forward", None)
    assert error_curves(model, sequences, 1 << 20, notes, "one") == expected, "all is known"
    monkeypatch.undo()
    assert error_curves(model, sequences[:3], 1 << 20, notes, "another") != expected
    notes.write_bytes(b"damaged")
    assert error_curves(model, sequences, 1 << 20, notes, "one") == expected


def test_curves_are_those_of_all_tokens_and_keep_none(
    model: Transformer, sequences: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Piece by piece they are the curves of all samples together. What came before is gone when a piece comes."""
    samples = sample_sensitivity(model, sequences)
    alive: dict[int, weakref.ref[Tensor]] = {}
    original = ErrorCurve.add

    def add(self: ErrorCurve, x: Tensor, v: Tensor) -> None:
        assert id(self) not in alive or alive[id(self)]() is None, "the tokens of an earlier piece"
        alive[id(self)] = weakref.ref(v)
        original(self, x, v)

    monkeypatch.setattr(ErrorCurve, "add", add)
    curves = error_curves(model, sequences, 1 << 20)
    assert len(alive) > 0
    monkeypatch.undo()
    for layer, own in zip(curves, samples, strict=True):
        for name, errors in layer.items():
            assert errors == pytest.approx(error_curve(own[name].inputs, own[name].gradients), rel=1e-4), name


def test_a_long_text_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "GRADIENT_LENGTH", 512)
    sequences = torch.arange(10 * 1030).view(10, 1030)
    pieces = pieces_of(sequences, 4 * 512 - 5)
    assert pieces.shape == (4, 512) and pieces[0, 0] == 0 and pieces[-1, -1] == 9 * 1030 + 1023
    assert pieces_of(sequences[:2, :7], 100).shape == (2, 7)


def test_labels_are_drawn_by_their_probabilities() -> None:
    row = torch.tensor([0.0, 0.5, 0.0, 0.125, 0.375, 0.0])
    labels = drawn(row.expand(20_000, 6), torch.Generator().manual_seed(0))
    shares = labels.flatten().bincount(minlength=6) / len(labels)
    assert labels.shape == (20_000, 1)
    assert shares[row == 0].sum() == 0
    assert (shares - row).abs().max() < 0.015  # four standard deviations
    assert torch.equal(labels, drawn(row.expand(20_000, 6), torch.Generator().manual_seed(0)))
