"""The greedy method's error of a block's output, where a token has massive activations."""

from pathlib import Path

import pytest
import torch

from teal.calibration.greedy import block_error
from teal.calibration.thresholds import calibrate
from teal.checkpoint.weights import load_model
from teal.model import Transformer
from teal.options import Settings

SINK = 7  # the token whose activations are massive
LENGTH = 48


def test_ordinary_tokens_count_as_in_the_paper() -> None:
    """Tokens to which the block adds as much: the error is the paper's, over the norm of what it adds."""
    x = torch.zeros(1, 3, 2)
    expected = torch.tensor([[[3.0, 4.0], [-5.0, 0.0], [0.0, 5.0]]])
    output = expected + torch.tensor([[[1.0, 0.0], [0.0, 2.0], [2.0, 0.0]]])
    assert block_error(output, expected, x) == pytest.approx((1 + 4 + 4) ** 0.5 / 5)
    assert block_error(expected, expected, x) == 0


@pytest.mark.parametrize(
    "first,shift,expected", [(1000.0, 500.0, (0.25 + 2) ** 0.5), (0.1, 1.0, 3**0.5)], ids=["massive", "vanishing"]
)
def test_no_token_rules(first: float, shift: float, expected: float) -> None:
    """Half of what is added to the first token is half a token's error; nothing added does not divide by nothing."""
    x = torch.tensor([[[9.0], [9.0], [9.0]]])
    added = torch.tensor([[[first], [1.0], [1.0]]])
    output = x + added + torch.tensor([[[shift], [1.0], [1.0]]])
    assert block_error(output, x + added, x) == pytest.approx(expected)


def test_a_block_that_adds_nothing() -> None:
    x = torch.ones(1, 4, 2)
    assert block_error(x, x, x) == 0


def plant_sink(model: Transformer) -> None:
    """Have the first block add a vector of thousands to the token SINK, and nothing unusual to others."""
    block = model.blocks[0]
    with torch.no_grad():
        model.embedding.weight[:, 0] = 0.0
        model.embedding.weight[SINK, 0] = 20.0
        block.attention.wo.weight[0] = 0.0  # attention carries the entry to no other token
        gate, up = block.feed_forward.gate_up.weight.chunk(2)
        gate[0, 0] = up[0, 0] = 20.0  # one inner channel answers to the entry that only SINK has


def sparsities(folder: Path, first: int) -> dict[str, float]:
    """What the greedy method gives the projections of the planted block, for sequences that begin with a token."""
    model = load_model(folder, torch.device("cpu"), torch.float32)
    plant_sink(model)
    sequences = torch.randint(10, 300, (4, LENGTH), generator=torch.Generator().manual_seed(3))
    sequences[:, 0] = first
    [plan] = calibrate(model, sequences, Settings((0.5,), "greedy"), {})
    return {name: p.sparsity for name, p in plan.layers[0].items()}


def test_a_massive_token_leaves_the_allocation_as_it_is(tiny_folder: Path) -> None:
    """The paper's L2 error has q, k and down 95% sparse here, q by 60 points more than without the token."""
    with_sink, without = sparsities(tiny_folder, SINK), sparsities(tiny_folder, 8)
    assert with_sink == pytest.approx(without, abs=0.1)
