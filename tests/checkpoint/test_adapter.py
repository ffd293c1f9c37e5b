"""LoRA adapters: the merged folder holds W + scale * B A, and what cannot be merged is refused by name."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from teal.checkpoint.identity import weights_identity
from teal.checkpoint.source import resolve_checkpoint
from teal.checkpoint.weights import load_model
from teal.errors import UserError
from teal.model import Transformer
from tests.conftest import assert_near, save_tiny_model, tiny_config

CPU = torch.device("cpu")
RANK, ALPHA = 4, 12


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@torch.inference_mode()
def logits(model: Transformer) -> Tensor:
    ids = torch.arange(3, 43)[None]
    return model(ids, torch.arange(40)[None], model.new_cache(1, 40))


def adapter_of(base: Path, folder: Path, endings: tuple[str, ...], **config: Any) -> dict[str, Tensor]:
    """An adapter folder for those weights of base; what it adds to each, before it is scaled."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    for path in sorted(base.glob("*.safetensors")):
        for name, weight in load_file(path).items():
            if name.endswith(endings):
                a = torch.randn(RANK, weight.shape[1], generator=generator) / 8
                b = torch.randn(weight.shape[0], RANK, generator=generator) / 8
                key = "base_model.model." + name.removesuffix(".weight")
                tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
                added[name] = b @ a
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "base_model_name_or_path": str(base), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    return added


@pytest.mark.parametrize("rslora", [False, True], ids=["alpha over r", "alpha over its root"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text"])
@pytest.mark.parametrize("shard_size", ["1GB", "60KB"], ids=["one file", "several files"])
def test_merged(shard_size: str, family: str, rslora: bool, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_tiny_model(tiny_config(family), base, max_shard_size=shard_size)
    (base / "teal-0.5.json").write_text("{}")  # a plan of the base's weights
    endings = ("qkv_proj.weight", "q_proj.weight", "down_proj.weight")
    added = adapter_of(base, adapter, endings, use_rslora=rslora)
    assert len(added) == 6
    plain = logits(load_model(base, CPU, torch.float32))
    merged = resolve_checkpoint(str(adapter))
    assert not (merged / "teal-0.5.json").exists() and weights_identity(merged) != weights_identity(base)
    scale = ALPHA / (math.sqrt(RANK) if rslora else RANK)
    for path in base.glob("*.safetensors"):
        tensors = load_file(path)
        save_file({n: t + scale * added[n] if n in added else t for n, t in tensors.items()}, path, {"format": "pt"})
    expected = logits(load_model(base, CPU, torch.float32))
    assert not torch.allclose(plain, expected, atol=0.1)
    assert_near("logits", logits(load_model(merged, CPU, torch.float32)), expected, 1e-6)


def test_merged_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_tiny_model(tiny_config("llama"), base)
    adapter_of(base, adapter, ("q_proj.weight",))
    first = resolve_checkpoint(str(adapter))
    assert "merging" in capsys.readouterr().err
    assert resolve_checkpoint(str(adapter)) == first and capsys.readouterr().err == ""
    fields = json.loads((adapter / "adapter_config.json").read_text()) | {"lora_alpha": 1}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    assert resolve_checkpoint(str(adapter)) != first


@pytest.mark.parametrize(
    "fields,said",
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported; expected 'LORA'"),
        ({"use_dora": True}, "use_dora True is not supported; expected False"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\] is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern .* is not supported"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path 3 is not usable"),
        (
            {"base_model_name_or_path": "/nowhere/at/all"},
            "base model: base_model_name_or_path /nowhere/at/all: no such",
        ),
        ({"r": 0}, "r 0 is not usable; expected a positive int"),
    ],
)
def test_other_adapters_are_refused(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_tiny_model(tiny_config("llama"), base)
    adapter_of(base, adapter, ("q_proj.weight",), **fields)
    with pytest.raises(UserError, match=said):
        resolve_checkpoint(str(adapter))


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "edit,said",
    [
        (lambda t: t.update({A: t[A][:, 1:].contiguous()}), r"q_proj.weight of \[48, 4\] times \[4, 47\] does not fit"),
        (lambda t: t.pop(A), "q_proj.weight lacks lora_A or lora_B"),
        (lambda t: t.update({A: t[A] * math.nan}), "or holds NaN or infinity"),
        (
            lambda t: t.update({A.replace("lora_A", "lora_embedding_A"): t[A].clone()}),
            "lora_embedding_A.* not supported",
        ),
        (
            lambda t: t.update({n.replace("q_proj", "x_proj"): v.clone() for n, v in t.items()}),
            r"x_proj.weight is no weight of .* \(3 unknown in all\)",
        ),
    ],
    ids=["shape", "half", "nan", "embedding", "unknown"],
)
def test_damaged_adapters_are_refused(edit: Any, said: str, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_tiny_model(tiny_config("llama"), base)
    adapter_of(base, adapter, ("q_proj.weight",))
    tensors = load_file(adapter / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=said):
        resolve_checkpoint(str(adapter))
    assert not list((tmp_path / "cache").rglob("config.json"))
