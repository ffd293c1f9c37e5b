"""vocab.json with merges.txt gives the ids that transformers gives, and its tokenizer.json where there is one."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from teal.checkpoint.tokenizer import load_tokenizer
from teal.errors import UserError
from tests.tokenizer_kinds import SAMPLES

CLASSES = {"Qwen2Tokenizer": transformers.Qwen2Tokenizer, "GPT2Tokenizer": transformers.GPT2Tokenizer}
NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]


def write(folder: Path, name: str, byte_level: str) -> dict[str, Any]:
    """The two files and tokenizer_config.json; the model's part of tokenizer.json."""
    model = json.loads(byte_level)["model"]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    first = len(model["vocab"])
    known = [n for n in NAMES if n not in model["vocab"]]
    ids = {n: model["vocab"].get(n, first + known.index(n) if n in known else 0) for n in NAMES}
    added = {str(i): {"content": n, "special": n != "<think>"} for n, i in ids.items()}
    config = {"tokenizer_class": name, "added_tokens_decoder": added, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("suffix", ["", "Fast"])
@pytest.mark.parametrize("name", CLASSES)
def test_ids_are_those_of_transformers(name: str, suffix: str, byte_level_tokenizer_json: str, tmp_path: Path) -> None:
    model = write(tmp_path, name + suffix, byte_level_tokenizer_json)
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    theirs: Any = CLASSES[name](vocab=model["vocab"], merges=merges)
    ours = load_tokenizer(tmp_path)
    for sample in [*SAMPLES.values(), "don't 12345  \n\n x", "e\u0301tude"]:
        assert ours.encode(sample) == theirs.encode(sample, add_special_tokens=False), sample
    assert ours.decode(ours.encode("Größe 12")) == "Größe 12"


def test_added_tokens_have_their_ids(byte_level_tokenizer_json: str, tmp_path: Path) -> None:
    write(tmp_path, "Qwen2Tokenizer", byte_level_tokenizer_json)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    tokenizer = load_tokenizer(tmp_path)
    for i, token in config["added_tokens_decoder"].items():
        assert tokenizer.token_bytes(int(i)) == token["content"].encode()
    [end] = [int(i) for i, token in config["added_tokens_decoder"].items() if token["content"] == "<|im_end|>"]
    assert end in tokenizer.eos_ids and tokenizer.decode([end]) == ""
    config["added_tokens_decoder"]["9999"] = {"content": "<far>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="added token '<far>' has id 9999; expected"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["BertTokenizer", None, 3])
def test_other_classes_are_refused(name: Any, byte_level_tokenizer_json: str, tmp_path: Path) -> None:
    """They split text in another way, which neither file tells."""
    write(tmp_path, name, byte_level_tokenizer_json)
    with pytest.raises(UserError, match=f"tokenizer_class {name!r} with vocab.json is not supported; expected Qwen2"):
        load_tokenizer(tmp_path)


def test_damaged_files_are_refused(byte_level_tokenizer_json: str, tmp_path: Path) -> None:
    write(tmp_path, "GPT2Tokenizer", byte_level_tokenizer_json)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nno-such nothing\n")
    with pytest.raises(UserError, match=r"merges.txt: not readable with vocab.json .* download both again"):
        load_tokenizer(tmp_path)
