"""Dense projections in 16 bits on a CPU that has no instructions for them."""

from pathlib import Path

import pytest
import torch
from torch import nn

from teal.checkpoint.weights import load_model
from teal.decoding.backend import EagerBackend
from teal.decoding.cpu_program import CpuProgramBackend
from teal.kernels import matmul
from teal.layers.quantized_linear import is_quantized
from teal.layers.wide_linear import WideLinear, use_wide_linears
from teal.model import Transformer
from tests.conftest import assert_near, save_tiny_model, tiny_config

CPU = torch.device("cpu")
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "bf16_kernels", lambda: None)


def projections(model: Transformer) -> list[nn.Module]:
    return [block.get_submodule(p.module) for block in model.blocks for p in block.projections()]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_products(dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few rows nn.Linear's own, with many in fp32, by tiles that do not divide the columns."""
    monkeypatch.setattr(matmul, "TILE", 96 * 70)
    linear = WideLinear(96, 200, bias=bias, dtype=dtype)
    for rows in (1, matmul.MIN_FP32_ROWS[dtype], 40):
        x = torch.randn(2, rows, 96).to(dtype)
        wide = [t.double() for t in (x, *linear.parameters())]
        y = linear(x)
        assert y.dtype == dtype
        assert_near(
            f"{rows} rows", y.float(), nn.functional.linear(*wide).float(), 2 ** (-8 if dtype == HALVES[0] else -11)
        )


@pytest.mark.parametrize("dtype", HALVES)
def test_a_model_computes_as_before(tmp_path: Path, dtype: torch.dtype) -> None:
    save_tiny_model(tiny_config("qwen2"), tmp_path)
    model, wide = load_model(tmp_path, CPU, dtype), load_model(tmp_path, CPU, dtype)
    use_wide_linears(wide)
    assert {type(linear) for linear in projections(wide)} == {WideLinear}
    assert wide.state_dict().keys() == model.state_dict().keys()
    backend = CpuProgramBackend(EagerBackend(wide, "test"))
    tokens = torch.arange(5, 45)[None]
    with torch.inference_mode():
        logits = [m(tokens, torch.arange(40)[None], m.new_cache(1, 48)) for m in (wide, model)]
        step = backend.decode(torch.tensor([[7]]), torch.tensor([[0]]), wide.new_cache(1, 8))
    assert_near("logits", logits[0], logits[1], 2e-2)
    assert step.isfinite().all()


def test_what_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32, and bf16 where the processor multiplies it."""
    save_tiny_model(tiny_config("llama"), tmp_path)
    single = load_model(tmp_path, CPU, torch.float32)
    use_wide_linears(single)
    monkeypatch.setattr(matmul, "bf16_kernels", lambda: object())
    half = load_model(tmp_path, CPU, torch.bfloat16)
    use_wide_linears(half)
    assert {type(linear) for model in (single, half) for linear in projections(model)} == {nn.Linear}
    assert not is_quantized(half)
