"""Grammars for tokenizers and configs that do not quite fit each other."""

import json
from pathlib import Path

import pytest
import torch

from teal.checkpoint.tokenizer import load_tokenizer
from teal.decoding.constrained import Grammars


@pytest.mark.parametrize("ends", [{}, {"eos_token_id": 5000}, {"eos_token_id": [5000, 7]}])
def test_ends_that_the_tokenizer_lacks(ends: dict[str, object], tmp_path: Path, byte_level_tokenizer_json: str) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_level_tokenizer_json, encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps(ends), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    vocabulary = 8192  # of the model, which may be padded
    matcher = Grammars(tokenizer, vocabulary).json({"enum": ["Rome", "Oslo"]})
    logits, made, complete = torch.zeros(1, vocabulary), [], False
    logits[0, tokenizer.encode("R", add_bos=False)[0]] = 1.0
    while not complete:
        made.append(int(matcher.mask(logits).argmax()))
        complete = matcher.accept(made[-1])
    assert tokenizer.decode(made) == '"Rome"'
