"""Checkpoints that store otherwise what model.py holds: text parts of larger models, 8-bit floats, packed weights."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from teal.checkpoint.config import load_config, parse_config
from teal.checkpoint.layout import ShardView, open_shard
from teal.checkpoint.presets import PRESETS
from teal.checkpoint.weights import load_model
from teal.errors import UserError
from teal.model import Transformer
from tests.conftest import ROOT, assert_near, save_tiny_model, tiny_config
from tests.gguf_files import write_and_close

CPU = torch.device("cpu")
FILE = "model.safetensors"


@torch.inference_mode()
def logits(model: Transformer) -> Tensor:
    ids = torch.arange(3, 43)[None]
    return model(ids, torch.arange(40)[None], model.new_cache(1, 40))


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def text_part(family: str, tmp_path: Path) -> Tensor:
    """A folder of the text model alone; its logits."""
    save_tiny_model(tiny_config(family, head_dim=12, tie_word_embeddings=family == "gemma3_text"), tmp_path)
    return logits(load_model(tmp_path, CPU, torch.float32))


PREFIXES = {  # transformers 5, and 4.50 as on the hub
    "new": lambda n: n if n.startswith("lm_head") else "model.language_model." + n.removeprefix("model."),
    "old": lambda n: "language_model." + n,
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    "family,whole", [("gemma3_text", "gemma3"), ("mistral", "mistral3"), ("ministral3", "mistral3")]
)
def test_the_text_part_of_a_multimodal_model(family: str, whole: str, prefix: str, tmp_path: Path) -> None:
    expected = text_part(family, tmp_path)
    tensors = {PREFIXES[prefix](name): tensor for name, tensor in load_file(tmp_path / FILE).items()}
    seen = ("model.vision_tower.a.weight", "vision_tower.b.weight", "multi_modal_projector.c.weight")
    save_file(tensors | {name: torch.ones(2, 2) for name in seen}, tmp_path / FILE)
    text = json.loads((tmp_path / "config.json").read_text())
    config = {"model_type": whole, "text_config": text, "vision_config": {"hidden_size": 8}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load_model(tmp_path, CPU, torch.float32)), expected)


def test_transformers_folder_of_a_multimodal_model(tmp_path: Path) -> None:
    """A whole Gemma 3 as transformers writes it, its vision part included."""
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    text = tiny_config("gemma3_text", head_dim=12, tie_word_embeddings=True).to_dict()
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    with torch.inference_mode():
        expected = theirs(torch.arange(3, 43)[None]).logits
    assert_near("logits", logits(load_model(tmp_path, CPU, torch.float32)), expected, 1e-5)


def fp8(weight: Tensor, block: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """An 8-bit float weight, and what its blocks, or all of it, are to be multiplied by."""
    rows, columns = block or weight.shape
    parts = [[part.abs().amax() / 448 for part in row.split(columns, 1)] for row in weight.split(rows)]
    scales = torch.tensor(parts)
    spread = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: weight.shape[0], : weight.shape[1]]
    return (weight / spread).to(torch.float8_e4m3fn), scales if block else scales[0, 0]


@pytest.mark.parametrize("block", [(16, 32), None], ids=["blocks", "one scale"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_8_bit_floats(family: str, block: tuple[int, int] | None, tmp_path: Path) -> None:
    """Weights in fp8 are their product with the scales, rounded to bf16; the last block of a dimension is short."""
    save_tiny_model(tiny_config(family), tmp_path)
    plain = load_file(tmp_path / FILE)
    tensors: dict[str, Tensor] = {}
    for name, tensor in plain.items():
        if tensor.dim() == 2 and ".layers." in name:
            values, scales = fp8(tensor, block)
            rows, columns = block or tensor.shape
            spread = scales.expand(1, 1) if block is None else scales
            spread = spread.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            plain[name] = (values.float() * spread[: tensor.shape[0], : tensor.shape[1]]).bfloat16().float()
            tensors |= {name: values, name + "_scale_inv": scales}
            tensors[name.removesuffix("weight") + "activation_scale"] = torch.ones(())
        else:
            tensors[name] = tensor
    save_file(plain, tmp_path / FILE)
    expected = logits(load_model(tmp_path, CPU, torch.float32))
    save_file(tensors, tmp_path / FILE)
    scheme = {"quant_method": "fp8", "weight_block_size": None if block is None else list(block)}
    edit_config(tmp_path, quantization_config=scheme)
    assert torch.equal(logits(load_model(tmp_path, CPU, torch.float32)), expected)


def test_8_bit_floats_without_their_scale_are_refused(tmp_path: Path) -> None:
    save_tiny_model(tiny_config("llama"), tmp_path)
    tensors = load_file(tmp_path / FILE)
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, tmp_path / FILE)
    edit_config(tmp_path, quantization_config={"quant_method": "fp8"})
    with pytest.raises(UserError, match=f"{name}_scale_inv is in no file of the folder"):
        load_model(tmp_path, CPU, torch.float32)


def test_packed_weights_of_a_family_that_stores_them_otherwise_are_refused(tmp_path: Path) -> None:
    save_tiny_model(tiny_config("granite", residual_multiplier=0.22), tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 32})
    with pytest.raises(UserError, match="awq weights of this family are not supported; start from its floats"):
        load_model(tmp_path, CPU, torch.float32)


@pytest.mark.parametrize(
    "name,said",
    [
        (
            "qwen3_moe",
            "model_type 'qwen3_moe' is not supported (the nearest by name is qwen3); expected one of llama, ",
        ),
        ("mixtral", "the nearest by name is mistral)"),
        ("t5", "model_type 't5' is not supported (the nearest by name is "),
        (None, "model_type None is not supported; expected one of "),
        (["a"], "model_type ['a'] is not supported; expected one of "),
    ],
)
def test_unknown_families_are_named_with_the_nearest(name: Any, said: str, tmp_path: Path) -> None:
    save_tiny_model(tiny_config("llama"), tmp_path)
    edit_config(tmp_path, model_type=name)
    with pytest.raises(UserError) as error:
        load_config(tmp_path)
    assert said in str(error.value)


NO_TORCH = """
import sys
from teal.cli import generate, quantize
from teal.errors import UserError
try:
    {command}.main()
except UserError as error:
    print(error)
print([name for name in ("torch", "transformers") if name in sys.modules])
"""


@pytest.mark.parametrize("command", ["generate --prompt a", "quantize --mode int8 -o out"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_unknown_families_are_told_at_once(kind: str, command: str, tmp_path: Path) -> None:
    """Before torch is imported, which takes a second."""
    if kind == "file":
        write_and_close(gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2moe"))
    else:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen2_moe"}')
    checkpoint = tmp_path / ("m.gguf" if kind == "file" else "model")
    name, *options = command.split()
    program = [sys.executable, "-c", NO_TORCH.format(command=name), *options, "--checkpoint", str(checkpoint)]
    path = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, cwd=tmp_path, env=path, capture_output=True, text=True)
    said, modules = done.stdout.splitlines()
    assert "is not supported (the nearest by name is qwen2); expected one of llama" in said and modules == "[]"


@pytest.mark.parametrize(
    "family,fields,longest",
    [
        ("phi3", {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}, 4096),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, 256),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 1024),
    ],
)
def test_texts_end_where_a_scaling_would_turn_cached_keys_anew(
    family: str, fields: dict[str, Any], longest: int, tmp_path: Path
) -> None:
    save_tiny_model(tiny_config(family), tmp_path)
    edit_config(tmp_path, **fields)
    if family == "phi3":
        rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
        edit_config(tmp_path, rope_parameters=rope)
    assert load_config(tmp_path).max_seq_len == longest


@pytest.mark.parametrize("family,name", [("phi3", "self_attn.qkv_proj"), ("glm4", "mlp.gate_up_proj")])
def test_stacked_tensors_of_other_sizes_are_refused(family: str, name: str, tmp_path: Path) -> None:
    """Also those with rows to spare."""
    save_tiny_model(tiny_config(family), tmp_path)
    tensors = load_file(tmp_path / FILE)
    own = f"model.layers.1.{name}.weight"
    for rows in (-8, 8):
        weight = torch.zeros(len(tensors[own]) + rows, tensors[own].shape[1])
        save_file(tensors | {own: weight}, tmp_path / FILE)
        with pytest.raises(UserError, match="says it should be"):
            load_model(tmp_path, CPU, torch.float32)


@pytest.mark.parametrize("family", ["phi3", "glm4", "granite", "gemma3_text"])
def test_rows_are_those_of_the_whole_tensor(family: str, tmp_path: Path) -> None:
    """As identities and comparisons read them, without the others."""
    extra = {"residual_multiplier": 0.22, "logits_scaling": 3.0} if family == "granite" else {}
    save_tiny_model(tiny_config(family, **extra), tmp_path)
    with open_shard(tmp_path / FILE) as shard:
        assert isinstance(shard, ShardView)
        for name in shard.keys():  # noqa: SIM118 - as of safetensors
            whole, part = shard.get_tensor(name), shard.get_slice(name)
            assert list(whole.shape) == part.get_shape()
            assert {"F32": torch.float32}[part.get_dtype()] == whole.dtype
            for rows in (slice(0, 1), slice(3, 9), slice(len(whole) - 1, len(whole))):
                assert torch.equal(part[rows], whole[rows]), name


HUB_GEMMA3_4B = {  # as published, tokens and vision aside
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
}


def test_a_published_config_that_lists_only_what_differs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HUB_GEMMA3_4B))
    assert load_config(tmp_path) == PRESETS["Gemma-3-4B"]
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).text_config
    rope, (local, *_) = theirs.rope_parameters, theirs.layer_types
    ours = load_config(tmp_path)
    assert (ours.rope_theta, ours.local_rope_theta) == (
        rope["full_attention"]["rope_theta"],
        rope["sliding_attention"]["rope_theta"],
    )
    assert local == "sliding_attention" and ours.sliding_windows[0] == theirs.sliding_window
    assert [w is None for w in ours.sliding_windows] == [kind == "full_attention" for kind in theirs.layer_types]


def test_a_description_needs_no_folder() -> None:
    assert parse_config(HUB_GEMMA3_4B, Path("a model")) == PRESETS["Gemma-3-4B"]
    with pytest.raises(UserError, match=r"^a model: model_type 'gemma9' is not supported"):
        parse_config({"model_type": "gemma9"}, Path("a model"))
