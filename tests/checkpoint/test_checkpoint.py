"""Reading Hugging Face folders: shards, memory, and a clear refusal of everything damaged or unsupported."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from teal.checkpoint.identity import model_identity
from teal.checkpoint.weights import load_model
from teal.errors import UserError
from tests.conftest import ROOT, assert_one_line_error, save_tiny_model, tiny_config

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_model(tiny_config("llama"), tmp_path)
    return tmp_path


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_sharded_equals_single(tmp_path: Path) -> None:
    config = tiny_config("llama")
    save_tiny_model(config, tmp_path / "single")
    save_tiny_model(config, tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    single = load_model(tmp_path / "single", CPU, torch.float32)
    sharded = load_model(tmp_path / "sharded", CPU, torch.float32)
    for (name, a), b in zip(single.named_parameters(), sharded.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_dtype_is_converted_while_loading(folder: Path) -> None:
    full = load_model(folder, CPU, torch.float32)
    half = load_model(folder, CPU, torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    assert torch.equal(full.embedding.weight.bfloat16(), half.embedding.weight)


def test_identity_follows_content(folder: Path) -> None:
    before = model_identity(folder)
    assert model_identity(folder) == before
    edit_tensors(folder, lambda t: t["model.norm.weight"].add_(1))
    assert model_identity(folder) != before


PEAK_MEMORY_SCRIPT = """
import resource, sys, torch
from pathlib import Path
from teal.checkpoint.weights import load_model
from teal.model import KVCache
load_model(Path(sys.argv[1]) / "small", torch.device("cpu"), torch.float32)  # imports and pools are warm
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_model(Path(sys.argv[1]) / "large", torch.device("cpu"), torch.float32)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before), sum(p.nbytes for p in model.parameters()))
"""


def test_peak_host_memory(tmp_path: Path) -> None:
    """Beside the model itself, loading needs less than 1.2x its largest shard (a loader that reads all needs 8x)."""
    save_tiny_model(tiny_config("llama"), tmp_path / "small")
    large = tiny_config("llama", vocab_size=1000, hidden_size=768, intermediate_size=4096, num_hidden_layers=8)
    save_tiny_model(large, tmp_path / "large", max_shard_size="48MB")
    shard = max(p.stat().st_size for p in (tmp_path / "large").glob("*.safetensors"))
    command = [sys.executable, "-c", PEAK_MEMORY_SCRIPT, str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    peak, model_bytes = map(int, output.split())
    assert model_bytes > 5 * shard
    assert peak - model_bytes <= 1.2 * shard, f"{(peak - model_bytes) / shard:.2f} x the largest shard"


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def corrupt_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[20:60] = b"\xff" * 40
    path.write_bytes(content)


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def lose_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def two_files_no_index(folder: Path) -> None:
    (folder / "a.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").rename(folder / "b.safetensors")


DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no-config": (lambda f: (f / "config.json").unlink(), ("config.json", "no such file")),
    "config-not-json": (lambda f: (f / "config.json").write_text("{"), ("config.json", "not readable as JSON")),
    "config-not-object": (lambda f: (f / "config.json").write_text("[]"), ("config.json", "JSON object")),
    "unknown-model-type": (lambda f: edit_config(f, model_type="gpt2"), ("model_type 'gpt2'", "llama")),
    "unsupported-activation": (lambda f: edit_config(f, hidden_act="gelu"), ("hidden_act 'gelu'", "silu")),
    "foreign-quantization": (lambda f: edit_config(f, quantization_config={"bits": 4}), ("quantization_config",)),
    "unsupported-rope": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "proportional", "rope_theta": 1e4, "factor": 2.0}),
        ("rope_scaling type 'proportional'", "llama3"),
    ),
    "odd-rope": (lambda f: edit_config(f, rope_parameters=3), ("rope_parameters 3", "object")),
    "odd-window-layers": (
        lambda f: edit_config(
            f, model_type="qwen2", use_sliding_window=True, sliding_window=7, layer_types=None, max_window_layers="x"
        ),
        ("max_window_layers 'x'", "whole number"),
    ),
    "odd-layer-types": (
        lambda f: edit_config(f, model_type="qwen2", use_sliding_window=True, sliding_window=7, layer_types=[[1]]),
        ("layer_types holds [1]", "full_attention"),
    ),
    "negative-layers": (lambda f: edit_config(f, num_hidden_layers=-1), ("num_hidden_layers -1", "positive")),
    "heads-do-not-divide": (lambda f: edit_config(f, num_key_value_heads=4), ("num_kv_heads 4",)),
    "truncated": (truncate, ("model.safetensors", "truncated or corrupt")),
    "empty-file": (lambda f: (f / "model.safetensors").write_bytes(b""), ("truncated or corrupt",)),
    "corrupt-header": (corrupt_header, ("model.safetensors", "truncated or corrupt")),
    "missing-tensor": (
        lambda f: edit_tensors(f, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        ("missing tensor model.layers.1.mlp.up_proj.weight",),
    ),
    "unexpected-tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)})),
        ("unexpected tensor model.layers.0.self_attn.q_proj.bias",),
    ),
    "wrong-shape": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.norm.weight": torch.zeros(47)})),
        ("model.norm.weight", "[47]", "[48]"),
    ),
    "extra-dtype": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.norm.weight": torch.zeros(48, dtype=torch.int8)})),
        ("model.norm.weight", "I8", "BF16"),
    ),
    "only-pickle": (only_pickle, ("pytorch_model.bin", "use safetensors")),
    "no-weights": (lambda f: (f / "model.safetensors").unlink(), ("no *.safetensors file",)),
    "lost-shard": (lose_a_shard, ("b.safetensors", "missing")),
    "index-without-map": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), ("weight_map",)),
    "two-files-no-index": (two_files_no_index, ("2 safetensors files", "index")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folder_is_refused_in_one_line(
    name: str, folder: Path, byte_level_tokenizer_json: str, invoke: Callable[..., tuple[int, str, str]]
) -> None:
    (folder / "tokenizer.json").write_text(byte_level_tokenizer_json, encoding="utf-8")
    damage, fragments = DAMAGES[name]
    damage(folder)
    code, out, err = invoke("--checkpoint", folder, "--prompt", "a")
    assert out == ""
    assert_one_line_error(code, err, *fragments)


def test_no_tokenizer(folder: Path, invoke: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = invoke("--checkpoint", folder, "--prompt", "a")
    assert_one_line_error(code, err, "no tokenizer", "tokenizer.json")


def test_pickle_is_never_read(folder: Path) -> None:
    only_pickle(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(UserError, match="can run code"):
        load_model(folder, CPU, torch.float32)
