"""quantize.py on every kind of checkpoint: methods, dtypes, biases, tied heads, groupings, widths of many factors."""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from teal.checkpoint.loading import load_for_decoding
from teal.checkpoint.weights import load_model
from teal.cli import quantize
from teal.decoding.engine import Engine
from teal.errors import UserError
from teal.layers.quantized_linear import QuantConfig, pick_group_size
from teal.model import Transformer
from teal.options import ModelOptions
from tests.conftest import relative_error, save_tiny_model, tiny_config

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "no-bias": ("llama", {}),
    "qkv-bias": ("qwen2", {}),
    "qkvo-bias": ("llama", {"attention_bias": True}),
    "qk-norm": ("qwen3", {"head_dim": 32}),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDTHS = {  # multiples of 32 and of little else
    "hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 3, "num_key_value_heads": 1,
    "num_hidden_layers": 2, "vocab_size": 352, "max_position_embeddings": 128,
}  # fmt: skip
# Mode, grouping, whether the head is quantized, and the relative error of logits that is allowed.
SCHEMES = [("int4", "output", False, 0.45), ("int8", "input", True, 0.04), ("int4", "input", True, 0.45)]


def make(folder: Path, family: str, dtype: str, tied: bool, **sizes: int) -> Path:
    """A checkpoint with weights and biases of this dtype; the tokenizer is not needed."""
    kind, options = FAMILIES[family]
    model = save_tiny_model(tiny_config(kind, **WIDTHS | options | sizes, tie_word_embeddings=tied), folder)
    torch.nn.Module.to(model, DTYPES[dtype])
    model.save_pretrained(folder)
    return folder


@torch.inference_mode()
def logits(model: Transformer) -> torch.Tensor:
    ids = torch.arange(40)[None] * 7 % 199
    return model(ids, torch.arange(40)[None], model.new_cache(1, 40))[0]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def matrix() -> Iterator[Any]:
    """All combinations of method, dtype, family and tied head. Every second one, of each three values all, in CI."""
    levels = [[*enumerate(values)] for values in (("rtn", "hqq", "gptq"), DTYPES, FAMILIES, ("untied", "tied"))]
    for combination in itertools.product(*levels):
        method, dtype, family, head = (str(value) for _, value in combination)
        marks = pytest.mark.slow if sum(i for i, _ in combination) % 2 else ()
        yield pytest.param(method, dtype, family, head == "tied", id=f"{method}-{dtype}-{family}-{head}", marks=marks)


@pytest.mark.parametrize("method,dtype,family,tied", matrix())
def test_the_result_decodes_and_is_near_the_model(
    method: str, dtype: str, family: str, tied: bool, tmp_path: Path
) -> None:  # fmt: skip
    source = make(tmp_path / "source", family, dtype, tied)
    before, cpu = digests(source), torch.device("cpu")
    expected = logits(load_model(source, cpu, torch.float32))
    sequences = torch.randint(0, 199, (4, 64), generator=torch.Generator().manual_seed(0))
    for mode, grouping, head, tolerance in SCHEMES:
        out = tmp_path / f"{mode}-{grouping}"
        scheme = QuantConfig(mode, 32, head, grouping)
        quantize.quantize_folder(source, out, scheme, method, sequences if method == "gptq" else None, "cpu")
        assert relative_error(logits(load_model(out, cpu, torch.float32)), expected) < tolerance, out.name
        own = load_model(out, cpu, DTYPES[dtype])
        assert relative_error(logits(own).float(), expected) < tolerance + 0.03, out.name
    assert digests(source) == before


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("dtype,family", [("fp32", "qkvo-bias"), ("bf16", "qkv-bias"), ("fp16", "qk-norm")])
def test_mixed_bits_lie_between(dtype: str, family: str, method: str, tmp_path: Path) -> None:
    """Of a tied model: 6 bits on average, head included, err less than 4 and more than 8."""
    source = make(tmp_path / "source", family, dtype, tied=True)
    cpu = torch.device("cpu")
    expected = logits(load_model(source, cpu, torch.float32))
    sequences = torch.randint(0, 199, (4, 64), generator=torch.Generator().manual_seed(0))
    errors = []
    for bits in (4.0, 6.0, 8.0):
        scheme = QuantConfig("mixed", 32, lm_head=True, average_bits=bits, head_bits=4)
        quantize.quantize_folder(source, tmp_path / f"{bits}", scheme, method, sequences, "cpu")
        errors.append(relative_error(logits(load_model(tmp_path / f"{bits}", cpu, torch.float32)), expected))
        own = load_model(tmp_path / f"{bits}", cpu, DTYPES[dtype])
        assert relative_error(logits(own).float(), expected) < errors[-1] + 0.03, f"logits of {bits} bits in {dtype}"
    assert errors[0] > 1.5 * errors[1] > 3 * errors[2], errors


def test_a_bf16_model_with_biases_decodes_after_gptq(tmp_path: Path, byte_level_tokenizer_json: str) -> None:
    source = make(tmp_path / "source", "qkv-bias", "bf16", tied=True)
    (source / "tokenizer.json").write_text(byte_level_tokenizer_json, encoding="utf-8")
    sequences = torch.randint(0, 199, (4, 64), generator=torch.Generator().manual_seed(0))
    quantize.quantize_folder(source, tmp_path / "out", QuantConfig("int4", 32), "gptq", sequences, "cpu")
    engine = Engine.load(str(tmp_path / "out"), device="cpu", dtype="bf16")
    assert len(list(engine.generate([5, 9, 33], max_new_tokens=6, ignore_eos=True))) == 6


def test_a_head_of_an_odd_width_is_refused_by_name(tmp_path: Path, byte_level_tokenizer_json: str) -> None:
    source = make(tmp_path / "source", "no-bias", "fp32", tied=False, vocab_size=331)
    (source / "tokenizer.json").write_text(byte_level_tokenizer_json, encoding="utf-8")
    config = load_model(source, torch.device("cpu"), torch.float32).config
    assert pick_group_size(config, None) == 32
    with pytest.raises(UserError, match=r"the vocabulary \(quant_lm_head\) width 331"):
        pick_group_size(config, None, lm_head=True)
    with pytest.raises(UserError, match=r"the vocabulary \(quant_lm_head\) width 331"):
        load_for_decoding(ModelOptions(str(source), device="cpu", dtype="fp32", quant="int8", quant_lm_head="int4"))
