"""quantize(model): weights rounded in memory, as quantize.py rounds those of a folder, alone and with sparsity."""

from pathlib import Path
from typing import Any

import pytest
import torch

from teal import quantize, sparsify
from teal.checkpoint.weights import load_model
from teal.errors import UserError
from teal.kernels.formats.packing import dequantize
from teal.layers.quantized_linear import QuantizedLinear, replace_projections, round_to_nearest
from teal.model import Transformer
from teal.plan import keep_all_plan
from tests.conftest import assert_near

IDS = torch.arange(5, 35)[None]


@pytest.fixture
def model(quantizable_folder: Path) -> Transformer:
    return load_model(quantizable_folder, torch.device("cpu"), torch.float32)


@torch.inference_mode()
def logits(model: Transformer) -> torch.Tensor:
    """Of the last token of IDS, decoded after the others: [1, 1, V]."""
    cache, positions = model.new_cache(1, 40), torch.arange(IDS.shape[1])[None]
    model(IDS[:, :-1], positions[:, :-1], cache)
    return model(IDS[:, -1:], positions[:, -1:], cache)


@pytest.mark.parametrize("mode,bits", [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("lm_head,head_bits", [(None, 0), ("int8", 8), ("int4", 4)])
def test_it_computes_with_the_rounded_weights(
    model: Transformer, quantizable_folder: Path, mode: str, bits: int, lm_head: str | None, head_bits: int
) -> None:
    twin = load_model(quantizable_folder, torch.device("cpu"), torch.float32)

    def rounded(linear: torch.nn.Linear, bits: int = bits) -> torch.nn.Linear:
        weight = dequantize(*round_to_nearest(linear.weight.t().contiguous(), bits, 32)).t()
        linear.weight = torch.nn.Parameter(weight.contiguous(), requires_grad=False)
        return linear

    replace_projections(twin, rounded)
    if head_bits:
        rounded(twin.lm_head, head_bits)
    assert quantize(model, mode, 32, lm_head) is model
    assert isinstance(model.lm_head, QuantizedLinear) == bool(head_bits)
    assert_near("logits", logits(model), logits(twin), 1e-5)


def test_the_default_is_four_bits_and_the_largest_group(model: Transformer) -> None:
    quantize(model)
    modules = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert modules and {(module.bits, module.group_size) for module in modules} == {(4, 32)}  # k and v are 32 wide


def test_sparsity_comes_after_rounding(model: Transformer) -> None:
    expected = logits(quantize(model, "int8"))
    assert_near("logits of a plan that keeps all", logits(sparsify(model, keep_all_plan(model.config))), expected, 1e-5)
    with pytest.raises(UserError, match="sparse already; quantize it first"):
        quantize(model)


@pytest.mark.parametrize(
    "arguments,fragment",
    [
        ({"mode": "int5"}, "int5"),
        ({"group_size": 128}, "128"),
        ({"grouping": "rows"}, "rows"),
        ({"lm_head": True}, "lm_head True: unknown; expected one of int8, int4"),
    ],
    ids=["mode", "group_size", "grouping", "lm_head"],
)
def test_mistakes(model: Transformer, arguments: dict[str, Any], fragment: str) -> None:
    with pytest.raises(UserError, match=fragment):
        quantize(model, **arguments)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules()), "changed before it was refused"


def test_twice_is_a_mistake(model: Transformer) -> None:
    with pytest.raises(UserError, match="quantized already"):
        quantize(quantize(model))
