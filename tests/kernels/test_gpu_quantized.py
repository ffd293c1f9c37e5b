"""On a CUDA device: quantized models give the CPU's text, dense and sparse, captured in a graph."""

from pathlib import Path

import pytest
import torch

from teal.cli import quantize
from teal.decoding.engine import Engine
from teal.layers.quantized_linear import QuantConfig
from teal.options import SamplingParams
from tests.conftest import QUANTIZABLE, save_tiny_model, save_uniform_plan, tiny_config

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("grouping", ["output", "input"])
@pytest.mark.parametrize("sparsity", [0.0, 0.4])
def test_text_equals_the_cpus(
    tmp_path: Path, byte_level_tokenizer_json: str, sparsity: float, grouping: str, mode: str
) -> None:  # fmt: skip
    config = tiny_config(
        "llama", **QUANTIZABLE, vocab_size=320
    )  # fmt: skip
    source, folder = tmp_path / "dense", tmp_path / "quantized"
    save_tiny_model(config, source)
    (source / "tokenizer.json").write_text(byte_level_tokenizer_json, encoding="utf-8")
    quantize.quantize_folder(source, folder, QuantConfig(mode, 32, lm_head=True, grouping=grouping))
    plan = save_uniform_plan(folder, sparsity, tmp_path / "plan.json") if sparsity else None
    texts = []
    for device, compile in (("cpu", False), ("cuda", False), ("cuda", True)):
        engine = Engine.load(str(folder), device=device, dtype="fp32", plan=plan, compile=compile)
        assert engine.use_graph == compile
        texts.append(list(engine.generate([5, 9, 33, 120, 7], SamplingParams(), 40, ignore_eos=True)))
        torch._dynamo.reset()
    assert texts[0] == texts[1] == texts[2]
