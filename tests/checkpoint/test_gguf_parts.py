"""GGUF files: models in several parts, the tokens that end a generation, damaged weights, and cached conversions."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file

from teal.checkpoint.gguf import convert_gguf
from teal.checkpoint.source import converted_gguf
from teal.checkpoint.tokenizer import Tokenizer, load_tokenizer
from teal.checkpoint.weights import load_model
from teal.errors import UserError
from teal.files import fingerprint
from tests.conftest import assert_one_line_error, save_tiny_model, tiny_config
from tests.gguf_files import byte_level_vocabulary, sentencepiece_vocabulary, write_gguf

CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path: Path) -> transformers.PreTrainedModel:
    return save_tiny_model(tiny_config("llama", vocab_size=300), tmp_path / "hf")


@pytest.fixture
def parts(
    model: transformers.PreTrainedModel, tmp_path: Path, byte_level_tokenizer_json: str, monkeypatch: pytest.MonkeyPatch
) -> list[Path]:
    """A model in GGUF parts, as the gguf package splits it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    vocabulary = byte_level_vocabulary(byte_level_tokenizer_json)
    write_gguf(tmp_path / "m.gguf", model, Type.F32, vocabulary, split_max_tensors=12)
    found = sorted(tmp_path.glob("m-*.gguf"))
    assert [p.name for p in found] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return found


def test_parts_are_read_whole_from_any_of_them(parts: list[Path], model: transformers.PreTrainedModel) -> None:
    folders = {converted_gguf(part) for part in parts}
    assert len(folders) == 1
    ours = load_model(folders.pop(), CPU, torch.float32)
    tokens = torch.arange(9)[None] + 3
    with torch.inference_mode():
        logits = ours(tokens, torch.arange(9)[None], ours.new_cache(1, 16))
        assert torch.allclose(logits, model(tokens).logits, atol=1e-4)


@pytest.mark.parametrize("missing,opened", [(0, 2), (1, 0), (2, 0)])
def test_a_missing_part_is_named(
    missing: int, opened: int, parts: list[Path], invoke: Callable[..., tuple[int, str, str]]
) -> None:
    parts[missing].unlink()
    code, out, err = invoke("--checkpoint", parts[opened], "--prompt", "a")
    assert out == ""
    assert_one_line_error(code, err, f"part {missing + 1} of 3 is missing", parts[missing].name)


def test_a_part_under_another_name_is_refused(parts: list[Path], tmp_path: Path) -> None:
    alone = shutil.copyfile(parts[0], tmp_path / "alone.gguf")
    with pytest.raises(UserError, match=r"alone\.gguf: holds part 1 of 3"):
        converted_gguf(alone)
    shutil.copyfile(parts[1], parts[2])
    with pytest.raises(UserError, match=r"m-00003-of-00003\.gguf: holds part 2 of 3"):
        converted_gguf(parts[0])


def test_a_changed_part_is_converted_anew(parts: list[Path]) -> None:
    before = converted_gguf(parts[0])
    content = bytearray(parts[2].read_bytes())
    content[-4:] = np.float32(0.5).tobytes()  # of the last tensor
    parts[2].write_bytes(content)
    assert converted_gguf(parts[0]) != before


def test_fingerprints_follow_layers_of_large_files(tmp_path: Path) -> None:
    """Of 64 MB, 64 kB in the second quarter differ, as of one small layer: none of the three places once sampled."""
    path = tmp_path / "large"
    content = np.zeros(64 << 20, np.uint8)
    content.tofile(path)
    before = fingerprint(path)
    content[20 << 20 : (20 << 20) + (64 << 10)] = 1
    content.tofile(path)
    assert fingerprint(path) != before


def convert(
    tmp_path: Path, model: transformers.PreTrainedModel, vocabulary: Callable[[gguf.GGUFWriter], None]
) -> Tokenizer:
    """The tokenizer of the model's GGUF file with this vocabulary."""
    write_gguf(tmp_path / "m.gguf", model, Type.F32, vocabulary)
    (tmp_path / "out").mkdir()
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    return load_tokenizer(tmp_path / "out")


def with_token(content: str, place: int, name: str) -> str:
    """A tokenizer.json whose token at place has this name, as an ordinary one."""
    raw = json.loads(content)
    old = next(token for token, i in raw["model"]["vocab"].items() if i == place)
    raw["model"]["vocab"] = {name if token == old else token: i for token, i in raw["model"]["vocab"].items()}
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["id"] != place]
    return json.dumps(raw)


def test_end_of_turn_and_message_ids_stop(
    tmp_path: Path, model: transformers.PreTrainedModel, byte_level_tokenizer_json: str
) -> None:
    """Tokens of any name that the metadata calls eos, eot or eom, one of them also for the end of text."""

    def write(writer: gguf.GGUFWriter) -> None:
        byte_level_vocabulary(with_token(byte_level_tokenizer_json, 3, "<over>"))(writer)
        writer.add_eot_token_id(3)
        writer.add_uint32("tokenizer.ggml.eom_token_id", 1)

    tokenizer = convert(tmp_path, model, write)
    assert tokenizer.eos_ids == {1, 2, 3, 4}  # <s>, </s>, <over>, <|im_end|>
    assert tokenizer.backend.special["<over>"] == 3 and tokenizer.decode([3]) == ""
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert set(generation["eos_token_id"]) == {1, 2, 3, 4}


@pytest.mark.parametrize(
    "name", ["<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>"]
)
def test_known_ends_stop_though_the_file_calls_them_text(
    name: str, tmp_path: Path, model: transformers.PreTrainedModel, byte_level_tokenizer_json: str
) -> None:
    tokenizer = convert(tmp_path, model, byte_level_vocabulary(with_token(byte_level_tokenizer_json, 4, name)))
    assert 4 in tokenizer.eos_ids
    assert tokenizer.encode(f"a{name}", allow_special=True)[-1] == 4


def test_ids_that_are_no_token_are_left_out(
    tmp_path: Path, model: transformers.PreTrainedModel, byte_level_tokenizer_json: str
) -> None:
    def write(writer: gguf.GGUFWriter) -> None:
        byte_level_vocabulary(byte_level_tokenizer_json)(writer)
        writer.add_bos_token_id(2**32 - 1)  # -1, as some converters write it
        writer.add_eot_token_id(300)

    tokenizer = convert(tmp_path, model, write)
    assert tokenizer.eos_ids == {2, 4} and tokenizer.bos_ids == []


@pytest.mark.parametrize(
    "scheme,add,expected", [("llama-bpe", None, [1]), ("llama-bpe", False, []), ("gpt-2", None, [])]
)
def test_llama3_files_begin_with_bos_unless_they_say_otherwise(
    scheme: str,
    add: bool | None,
    expected: list[int],
    tmp_path: Path,
    model: transformers.PreTrainedModel,
    byte_level_tokenizer_json: str,
) -> None:
    def write(writer: gguf.GGUFWriter) -> None:
        byte_level_vocabulary(byte_level_tokenizer_json)(writer)
        writer.kv_data[0]["tokenizer.ggml.pre"].value = scheme
        writer.add_bos_token_id(1)
        if add is not None:
            writer.add_add_bos_token(add)

    tokenizer = convert(tmp_path, model, write)
    assert tokenizer.bos_ids == expected
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["bos_token_id"] == 1


def test_named_chat_templates_survive(
    tmp_path: Path, model: transformers.PreTrainedModel, byte_level_tokenizer_json: str
) -> None:
    def write(writer: gguf.GGUFWriter) -> None:
        byte_level_vocabulary(byte_level_tokenizer_json)(writer)
        writer.add_string("tokenizer.chat_template.tool_use", "tools")

    convert(tmp_path, model, write)
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert {entry["name"]: entry["template"] for entry in config["chat_template"]} == {
        "default": "{{ messages[0]['content'] }}",
        "tool_use": "tools",
    }


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0], ids=lambda kind: kind.name)
def test_damaged_weights_are_refused_by_name(
    kind: Type, tmp_path: Path, model: transformers.PreTrainedModel, byte_level_tokenizer_json: str
) -> None:
    model = save_tiny_model(
        tiny_config("llama", vocab_size=300, hidden_size=64, intermediate_size=96, num_attention_heads=2),
        tmp_path / "64",
    )
    path = tmp_path / "m.gguf"
    write_gguf(path, model, kind, byte_level_vocabulary(byte_level_tokenizer_json))
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight")
    content = bytearray(path.read_bytes())
    nan = {Type.F32: b"\x00\x00\xc0\x7f", Type.BF16: b"\xc0\x7f"}.get(kind, b"\x00\x7e")  # of the first weight or scale
    content[tensor.data_offset : tensor.data_offset + len(nan)] = nan
    path.write_bytes(content)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=re.escape("tensor blk.1.ffn_up.weight holds NaN or infinity")):
        convert_gguf(path, tmp_path / "out")


def test_values_beyond_fp16_keep_fp32(tmp_path: Path, byte_level_tokenizer_json: str) -> None:
    """A Q4_1 block spans minimum to maximum: scale and minimum fit fp16, 15 times the one plus the other does not."""
    model = save_tiny_model(
        tiny_config("llama", vocab_size=300, hidden_size=64, intermediate_size=96, num_attention_heads=2),
        tmp_path / "64",
    )
    path = tmp_path / "m.gguf"
    write_gguf(path, model, Type.Q4_1, byte_level_vocabulary(byte_level_tokenizer_json))
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight")
    content = bytearray(path.read_bytes())
    content[tensor.data_offset : tensor.data_offset + 4] = np.array([60000, 0], np.float16).tobytes()
    path.write_bytes(content)
    (tmp_path / "out").mkdir()
    convert_gguf(path, tmp_path / "out")
    weight = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert weight.dtype == torch.float32 and 65504 < weight.abs().max() < torch.inf
    load_model(tmp_path / "out", CPU, torch.bfloat16)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight reaches .* fp16"):
        load_model(tmp_path / "out", CPU, torch.float16)


def test_a_damaged_tokenizer_is_refused(
    tmp_path: Path, model: transformers.PreTrainedModel, byte_level_tokenizer_json: str
) -> None:
    def write(writer: gguf.GGUFWriter) -> None:
        byte_level_vocabulary(byte_level_tokenizer_json)(writer)
        writer.kv_data[0]["tokenizer.ggml.merges"].value.append("no token")

    with pytest.raises(UserError, match=r"m\.gguf: the tokenizer .*damaged"):
        convert(tmp_path, model, write)


def test_sentencepiece_ends_stop(tmp_path: Path, sentencepiece_model: bytes) -> None:
    model = save_tiny_model(tiny_config("llama", vocab_size=420), tmp_path / "hf")

    def write(writer: gguf.GGUFWriter) -> None:
        sentencepiece_vocabulary(sentencepiece_model)(writer)
        writer.add_eot_token_id(7)

    tokenizer: Any = convert(tmp_path, model, write)
    assert tokenizer.eos_ids == {2, 7} and tokenizer.bos_ids == [1]
