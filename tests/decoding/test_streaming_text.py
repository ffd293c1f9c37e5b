"""Text of tokens, streamed and whole, and their bytes: transformers' on every kind of tokenizer and prompt."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from teal.checkpoint.tokenizer import load_tokenizer
from teal.decoding.streaming import StreamDecoder
from tests.tokenizer_kinds import KINDS, SAMPLES, SPECIAL, Kind

TEXTS = st.lists(st.sampled_from(["word", " ", "  ", "\n", "é", "日本", "🚀", "👩‍🚀", " it's", "x"]), max_size=6).map(
    "".join
)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in KINDS.items()}


def streamed(kind: Kind, prompt: list[int], answer: list[int]) -> str:
    decoder = StreamDecoder(kind.ours, prompt)
    pieces = [decoder.push(token) for token in answer] + [decoder.flush()]
    assert not any("\ufffd" in piece for piece in pieces)
    return "".join(pieces)


@pytest.mark.parametrize("end", ["", "The", "The quick br", "The ", "  ", "<|im_end|>", "a<|im_start|>", "a\n", "日"])
@pytest.mark.parametrize("kind", KINDS)
def test_continuation_is_what_decoding_adds(kind: str, end: str, kinds: dict[str, Kind]) -> None:
    pair = kinds[kind]
    prompt = pair.ours.encode(end, allow_special=True)
    for sample in SAMPLES.values():
        whole = pair.theirs.encode(f"{end}{sample}", add_special_tokens=False)
        answers = [pair.theirs.encode(text, add_special_tokens=False) for text in (sample, f" {sample}")]
        for answer in (*answers, [*answers[0], *whole]):
            assert streamed(pair, prompt, answer) == pair.their_continuation(prompt, answer)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_streamed_text_for_any_cut(kind: str, kinds: dict[str, Kind], data: st.DataObject) -> None:
    """A text cut anywhere, within a character too, and special tokens anywhere."""
    pair = kinds[kind]
    special = st.sampled_from([pair.ours.backend.special[name] for name in SPECIAL])
    ids: list[int] = []
    for text in data.draw(st.lists(TEXTS, max_size=3)):
        ids += pair.ours.encode(text, add_bos=False)
        ids += data.draw(st.lists(special, max_size=1))
    cut = data.draw(st.integers(0, len(ids)))
    assert pair.ours.decode(ids) == pair.theirs.decode(ids, skip_special_tokens=True)
    assert streamed(pair, ids[:cut], ids[cut:]) == pair.their_continuation(ids[:cut], ids[cut:])


@pytest.mark.parametrize("kind", ["llama2-prepend", "sentencepiece"])
def test_space_before_the_first_continued_word(kind: str, kinds: dict[str, Kind]) -> None:
    ours = kinds[kind].ours
    prompt, answer = ours.encode("The European"), ours.encode("lobster", add_bos=False)
    assert streamed(kinds[kind], prompt, answer) == " lobster"
    assert streamed(kinds[kind], ours.bos_ids, answer) == "lobster"  # a text begins without one


def test_word_after_a_special_token_has_no_space_of_its_own(kinds: dict[str, Kind]) -> None:
    ours = kinds["sentencepiece"].ours
    ids = ours.encode("<|im_start|>The", allow_special=True, add_bos=False)
    assert ours.token_bytes(ids[1]) == b"The"[: len(ours.token_bytes(ids[1]))]


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
@settings(max_examples=60, deadline=None)
def test_bytes_of_tokens_are_the_texts_utf8(kind: str, kinds: dict[str, Kind], text: str) -> None:
    ours = kinds[kind].ours
    found = b"".join(map(ours.token_bytes, ours.encode(text, add_bos=False)))
    assert found.removeprefix(b" ") == text.encode().removeprefix(b" ") or found == b" " + text.encode()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sample", SAMPLES)
def test_bytes_of_samples(kind: str, sample: str, kinds: dict[str, Kind]) -> None:
    ours, text = kinds[kind].ours, SAMPLES[sample]
    found = [ours.token_bytes(i) for i in ours.encode(text, add_bos=False)]
    assert b"".join(found) in (text.encode(), b" " + text.encode())
    assert sample != "emoji" or any(_is_part_of_a_character(data) for data in found)


def _is_part_of_a_character(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return True
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_special_and_of_missing_tokens(kind: str, kinds: dict[str, Kind]) -> None:
    ours = kinds[kind].ours
    assert ours.token_bytes(ours.backend.special["<|im_end|>"]) == b"<|im_end|>"
    assert ours.token_bytes(10_000) == b""


@pytest.mark.parametrize("kind", ["llama2-prepend", "sentencepiece"])
def test_prompt_with_a_beginning_token_gets_no_second_one(kind: str, kinds: dict[str, Kind]) -> None:
    ours = kinds[kind].ours
    bos = ours.backend.special["<s>"]
    assert ours.encode("<s>Hi", allow_special=True).count(bos) == ours.encode("Hi").count(bos) == 1
    assert ours.encode("Hi")[0] == bos and ours.encode("<s>Hi").count(bos) == 1


def test_end_token_that_a_post_processor_appends_begins_no_prompt(
    byte_level_tokenizer_json: str, tmp_path: Path
) -> None:
    inner = tokenizers.Tokenizer.from_str(byte_level_tokenizer_json)
    ends = [(name, inner.token_to_id(name)) for name in ("<s>", "</s>")]
    for single, bos in (("<s> $A </s>", [ends[0][1]]), ("$A </s>", []), ("$A", [])):
        inner.post_processor = processors.TemplateProcessing(single=single, pair="$A $B", special_tokens=ends)
        inner.save(str(tmp_path / "tokenizer.json"))
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.bos_ids == bos
        assert tokenizer.encode("Hi") == bos + inner.encode("Hi", add_special_tokens=False).ids


@pytest.mark.parametrize("wanted", [None, False, True])
def test_config_says_whether_a_text_begins_with_a_token(
    wanted: bool | None, byte_level_tokenizer_json: str, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_level_tokenizer_json, encoding="utf-8")
    config = {"bos_token": "<s>"} | ({} if wanted is None else {"add_bos_token": wanted})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_ids == ([tokenizer.backend.special["<s>"]] if wanted else [])
