"""What a checkpoint's weights are: its head, finite numbers, and a name by their content."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from teal.checkpoint.config import load_config
from teal.checkpoint.families import FAMILIES
from teal.checkpoint.weights import load_model
from teal.cli import quantize
from teal.errors import UserError
from teal.layers.quantized_linear import QuantizedLinear
from teal.model import Transformer
from tests.checkpoint.test_awq_gptq import AWQ, GPTQ, write
from tests.conftest import QUANTIZABLE, assert_near, assert_one_line_error, save_tiny_model, tiny_config

CPU = torch.device("cpu")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A checkpoint whose config ties head and embedding and whose file holds the embedding alone."""
    save_tiny_model(tiny_config("qwen2", **QUANTIZABLE, vocab_size=320, tie_word_embeddings=True), tmp_path / "tied")
    assert HEAD not in load_file(tmp_path / "tied" / "model.safetensors")
    return tmp_path / "tied"


def with_own_head(folder: Path) -> Path:
    """folder, with a head that a fine-tune has moved away from the embedding."""
    edit_tensors(folder, lambda t: t.update({HEAD: t[EMBEDDING].roll(1, 0).contiguous()}))
    return folder


@torch.inference_mode()
def logits(model: Transformer) -> Tensor:
    positions = torch.arange(9)[None]
    return model(positions + 3, positions, model.new_cache(1, 16)).float()


def test_a_head_unlike_the_embedding_is_the_head(tied: Path) -> None:
    """Its logits are those of transformers, which does not tie such a head either."""
    model = load_model(with_own_head(tied), CPU, torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, load_file(tied / "model.safetensors")[HEAD])
    assert not model.config.tie_embeddings
    with torch.inference_mode():
        assert_near("logits", logits(model), theirs(torch.arange(9)[None] + 3).logits, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_copy_of_the_embedding_stays_tied(dtype: torch.dtype, tied: Path) -> None:
    edit_tensors(tied, lambda t: t.update({HEAD: t[EMBEDDING].to(dtype, copy=True)}))
    model = load_model(tied, CPU, torch.float32)
    assert model.lm_head.weight is model.embedding.weight


def test_the_head_is_found_in_another_shard(tied: Path) -> None:
    tensors = load_file(with_own_head(tied) / "model.safetensors")
    (tied / "model.safetensors").unlink()
    save_file({HEAD: tensors.pop(HEAD)}, tied / "b.safetensors", {"format": "pt"})
    save_file(tensors, tied / "a.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(tensors, "a.safetensors") | {HEAD: "b.safetensors"}}
    (tied / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not load_model(tied, CPU, torch.float32).config.tie_embeddings


@pytest.mark.parametrize("config", [AWQ, GPTQ], ids=["awq", "gptq"])
def test_packed_checkpoints_keep_a_head_of_their_own(config: dict[str, Any], tmp_path: Path) -> None:
    packed, _ = write(tmp_path, config)
    edit_config(packed, tie_word_embeddings=True)
    head = load_file(packed / "model.safetensors")[HEAD]
    assert torch.equal(load_model(packed, CPU, torch.float32).lm_head.weight, head)


@pytest.mark.parametrize("lm_head", ["none", "int8"])
def test_quantize_keeps_a_head_of_its_own(lm_head: str, tied: Path, call_main: Callable[..., Any]) -> None:
    expected = load_file(with_own_head(tied) / "model.safetensors")[HEAD]
    out = tied.parent / "quantized"
    arguments = ("--checkpoint", tied, "--mode", "int8", "--lm-head", lm_head, "-o", out)
    code, _, err = call_main(quantize.main, *arguments)
    assert code == 0, err
    model = load_model(out, CPU, torch.float32)
    head = model.lm_head.dequantized().t() if isinstance(model.lm_head, QuantizedLinear) else model.lm_head.weight
    assert_near("output head", head, expected, 0.01)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", [None, False, True], ids=["missing", "false", "true"])
def test_tying_follows_transformers(value: bool | None, family: str, tmp_path: Path) -> None:
    save_tiny_model(tiny_config(family), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(raw if value is None else raw | {"tie_word_embeddings": value}))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert load_config(tmp_path).tie_embeddings == theirs.tie_word_embeddings


BAD = {"nan": float("nan"), "inf": float("inf"), "minus-inf": -float("inf")}


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.bias", "model.layers.2.mlp.down_proj.weight"])
def test_what_is_not_finite_is_refused_by_name(name: str, dtype: torch.dtype, value: float, tied: Path) -> None:
    """One entry, the last, of a tensor in any dtype."""
    edit_tensors(tied, lambda t: t.update({n: v.to(dtype) for n, v in t.items()}))
    edit_tensors(tied, lambda t: t[name].view(-1)[-1:].fill_(value))
    with pytest.raises(UserError, match=f"model.safetensors: {name} holds NaN or infinity"):
        load_model(tied, CPU, torch.bfloat16)


def test_a_value_beyond_the_dtype_is_refused_by_name(
    tied: Path, byte_level_tokenizer_json: str, invoke: Callable[..., tuple[int, str, str]]
) -> None:
    (tied / "tokenizer.json").write_text(byte_level_tokenizer_json, encoding="utf-8")
    edit_tensors(tied, lambda t: t["model.layers.0.mlp.up_proj.weight"][3, 5:6].fill_(-1e5))
    load_model(tied, CPU, torch.bfloat16)
    code, out, err = invoke("--checkpoint", tied, "--dtype", "fp16", "--prompt", "a")
    assert out == ""
    assert_one_line_error(code, err, "model.layers.0.mlp.up_proj.weight", "1e+05", "fp16", "--dtype bf16 or fp32")


@pytest.mark.parametrize("sizes", [{}, QUANTIZABLE], ids=["as floats", "as integers"])
@pytest.mark.parametrize("config", [AWQ, GPTQ], ids=["awq", "gptq"])
def test_scales_that_are_not_finite_are_refused(config: dict[str, Any], sizes: dict[str, int], tmp_path: Path) -> None:
    packed, _ = write(tmp_path, config, **sizes)
    edit_tensors(packed, lambda t: t["model.layers.1.mlp.up_proj.scales"][0, 3:4].fill_(float("nan")))
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.\w+ holds NaN"):
        load_model(packed, CPU, torch.float32)


def test_own_scales_that_are_not_finite_are_refused(tied: Path, call_main: Callable[..., Any]) -> None:
    out = tied.parent / "quantized"
    code, _, err = call_main(quantize.main, "--checkpoint", tied, "--mode", "int4", "-o", out)
    assert code == 0, err
    shard = next(out.glob("model-00002*.safetensors"))
    tensors = load_file(shard)
    name = "model.layers.1.mlp.up_proj.scales"
    tensors[name].view(-1)[:1].fill_(float("inf"))
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(UserError, match=f"{name} holds NaN or infinity"):
        load_model(out, CPU, torch.float32)


@pytest.mark.parametrize("name", [EMBEDDING, "model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_quantize_refuses_what_is_not_finite(name: str, tied: Path, call_main: Callable[..., Any]) -> None:
    edit_tensors(tied, lambda t: t[name].view(-1)[:1].fill_(float("nan")))
    code, _, err = call_main(quantize.main, "--checkpoint", tied, "--mode", "int8", "-o", tied.parent / "quantized")
    assert code == 1 and f"{name} holds NaN or infinity" in err.splitlines()[-1]


def test_an_infinite_setting_is_refused(tied: Path) -> None:
    edit_config(tied, rms_norm_eps=float("inf"))
    with pytest.raises(UserError, match="rms_norm_eps inf is not usable"):
        load_config(tied)
