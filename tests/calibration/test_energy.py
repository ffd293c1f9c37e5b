"""Energies of channels: those that autograd gives, and the divergence that they say rounding costs."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teal.calibration.energy import channel_energies, head_energy
from teal.calibration.sensitivity import drawn
from teal.calibration.stages import Positions
from teal.calibration.texts import default_text
from teal.checkpoint.tokenizer import load_tokenizer
from teal.checkpoint.weights import load_model
from teal.kernels.formats.packing import dequantize
from teal.layers.quantized_linear import round_to_nearest
from teal.model import Transformer
from teal.quantization.refinement import channel_costs
from tests.conftest import PROJECTIONS, assert_near

CPU = torch.device("cpu")


@pytest.fixture
def sequences() -> Tensor:
    return torch.randint(5, 300, (3, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(quantizable_folder: Path) -> Transformer:
    return load_model(quantizable_folder, CPU, torch.float32)


def test_energies_are_those_of_autograd(model: Transformer, sequences: Tensor) -> None:
    """Inputs and gradients at each projection's output, for the labels that were drawn: of one sequence."""
    found = channel_energies(model, sequences[:1])
    ids, passed = sequences[0], {}
    for i, block in enumerate(model.blocks):
        for p in block.projections():
            block.get_submodule(p.module).register_forward_hook(
                lambda _, x, y, key=(i, p.name): (y.retain_grad(), passed.update({key: (x[0].detach()[0], y)}))[0]
            )
    x = model.embed(ids[None]).requires_grad_()
    for i, block in enumerate(model.blocks):
        x = block(x, *Positions(model, len(ids)).context(i))
    logits = model.logits(x)[0]
    labels = drawn(logits.detach().softmax(-1), torch.Generator().manual_seed(0))[:, 0]
    F.cross_entropy(logits, labels, reduction="sum").backward()
    for i, block in enumerate(model.blocks):
        assert set(found[i]) == set(PROJECTIONS)
        for p in block.projections():
            inputs, y = passed[i, p.name]
            for name, g in zip(p.names, y.grad[0].double().split(p.sizes, dim=1), strict=True):
                weights = g.square().mean(1)
                expected = (inputs.double().square() * weights[:, None]).sum(0) / weights.sum()
                assert_near(f"{i} {name} inputs", found[i][name].inputs, expected, 1e-4)
                assert found[i][name].gradients == pytest.approx(float(weights.mean()), rel=1e-4)


@torch.inference_mode()
def test_the_heads_energy_is_that_of_its_own_distribution(model: Transformer, sequences: Tensor) -> None:
    """E[g^2] by definition: over labels drawn from p, g is p less one at the label."""
    found = head_energy(model, sequences)
    positions = torch.arange(64).expand(3, 64)
    normed = model.norm(model.hidden_states(sequences, positions, model.new_cache(3, 64))).flatten(0, 1).double()
    p = (normed @ model.lm_head.weight.double().t()).softmax(-1)
    squares = p.square() * (1 - p) + (p - 1).square() * p
    assert isinstance(found.gradients, Tensor)
    assert_near("gradients", found.gradients, squares.mean(0), 1e-4)
    weights = squares.mean(1)
    assert_near("inputs", found.inputs, weights @ normed.square() / weights.sum(), 1e-4)


def test_the_model_is_left_as_it_was(model: Transformer, sequences: Tensor) -> None:
    with torch.inference_mode():
        channel_energies(model, sequences)
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@torch.no_grad()
def test_costs_are_what_rounding_costs(default_folder: Path) -> None:
    """Of the default model: the divergence with one module in 4 bits, against the sum over its channels."""
    model = load_model(default_folder, CPU, torch.float32)
    ids = torch.tensor(load_tokenizer(default_folder).encode(default_text())[: 3 * 96]).view(3, 96)
    energies, positions = channel_energies(model, ids), torch.arange(96).expand(2, 96)

    def log_probabilities() -> Tensor:
        return model(ids[:2], positions, model.new_cache(2, 96)).log_softmax(-1)

    dense, ratios = log_probabilities(), []
    for layer, p in ((2, 0), (9, 1), (14, 2), (26, 3)):
        projection = model.blocks[layer].projections()[p]
        linear = model.blocks[layer].get_submodule(projection.module)
        assert isinstance(linear, nn.Linear)
        original = linear.weight.data
        weight, own = original.t().contiguous(), [energies[layer][name] for name in projection.names]
        estimate = float(channel_costs(weight, projection.sizes, own, 64).channels.sum())
        linear.weight.data = dequantize(*round_to_nearest(weight, 4, 64)).t().contiguous()
        found = F.kl_div(log_probabilities(), dense, log_target=True, reduction="none").sum(-1).mean()
        linear.weight.data = original
        ratios.append(estimate / float(found))
    assert min(ratios) > 0.3 and max(ratios) < 3, ratios
