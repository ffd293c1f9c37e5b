"""Reading and cutting texts."""

import json
from pathlib import Path

import pytest

from teal.calibration.texts import default_text, first_tokens, read_texts, split_text, token_sequences
from teal.errors import UserError


def encode(text: str) -> list[int]:
    return list(text.encode())


def test_text_files_are_joined_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Größe")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": word}) + "\n\n" for word in ("one", "two")))
    assert read_texts([tmp_path / "a.txt", tmp_path / "b.jsonl"], "body") == "Größe\n\none\n\ntwo"
    assert read_texts([], "text") == default_text()


@pytest.mark.parametrize(
    "name,content,fragment",
    [
        ("a.txt", b"ok \xff", "byte 3 is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"other": 1}', "line 2"),
        ("a.jsonl", b"[1]", "line 1"),
        ("a.jsonl", b"{", "line 1"),
        ("a.jsonl", b'{"text": 3}', "no string"),
    ],
)
def test_bad_files_are_named(name: str, content: bytes, fragment: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as error:
        read_texts([tmp_path / name], "text")
    assert fragment in str(error.value)
    with pytest.raises(UserError, match="No such file"):
        read_texts([tmp_path / "missing.txt"], "text")


def test_sequences_are_spread_over_the_text() -> None:
    text = "".join(chr(ord("a") + i // 100) for i in range(2600))
    sequences = token_sequences(encode, text, 13, 50)
    assert sequences.shape == (13, 50)
    assert [row[0] for row in sequences.tolist()] == [ord("a") + 2 * i for i in range(13)]


def test_too_short_a_text_says_what_is_needed() -> None:
    with pytest.raises(UserError, match="4 sequences of 100 tokens are needed, the shortest has 50"):
        token_sequences(encode, "x" * 200, 4, 100)
    with pytest.raises(UserError, match="the shortest has 0"):
        token_sequences(encode, "", 4, 100)


def test_first_tokens() -> None:
    assert first_tokens(encode, "abc", 2).tolist() == [97, 98]
    assert first_tokens(encode, "abc", 9).tolist() == [97, 98, 99]


def test_held_out_text_is_apart() -> None:
    text = "".join(f"{i:06d}," for i in range(20_000))
    calibration_part, held_out = split_text(text)
    assert len(calibration_part) + len(held_out) == len(text)
    assert not set(calibration_part.split(",")[1:-1]) & {n for n in held_out.split(",") if len(n) == 6}
    assert 0.15 < len(held_out) / len(text) < 0.25
