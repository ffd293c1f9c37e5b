"""Three tokenizer formats, told apart by content; round trips; streaming; chat templates."""

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from teal.checkpoint.control_tokens import END_TOKENS
from teal.checkpoint.gguf_config import Metadata
from teal.checkpoint.token_backends import LLAMA3_PATTERN, JsonBackend, SentencePieceBackend, TiktokenBackend
from teal.checkpoint.tokenizer import Tokenizer, load_tokenizer
from teal.decoding.streaming import StopStrings, StreamDecoder
from teal.errors import UserError
from tests.tokenizer_kinds import SAMPLES, sentencepiece_file, tiktoken_file


@pytest.fixture(scope="session")
def files(byte_level_tokenizer_json: str) -> dict[str, bytes]:
    return {
        "json": byte_level_tokenizer_json.encode(),
        "sentencepiece": sentencepiece_file(user_defined_symbols=["\n", "\t"]),
        "tiktoken": tiktoken_file(),
    }


@pytest.fixture(params=["json", "sentencepiece", "tiktoken"])
def tokenizer(request: pytest.FixtureRequest, files: dict[str, bytes], tmp_path: Path) -> Tokenizer:
    name = "tokenizer.json" if request.param == "json" else "tokenizer.model"
    (tmp_path / name).write_bytes(files[request.param])
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "original/tokenizer.model"])
def test_format_is_read_from_content_not_from_the_name(name: str, files: dict[str, bytes], tmp_path: Path) -> None:
    expected = {"json": JsonBackend, "sentencepiece": SentencePieceBackend, "tiktoken": TiktokenBackend}
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    for kind, content in files.items():
        path.write_bytes(content)
        assert type(load_tokenizer(tmp_path).backend) is expected[kind], f"{kind} as {name}"


@pytest.mark.parametrize("sample", SAMPLES)
def test_round_trip(tokenizer: Tokenizer, sample: str) -> None:
    assert tokenizer.decode(tokenizer.encode(SAMPLES[sample])) == SAMPLES[sample]


def test_ids_equal_the_library_that_owns_the_format(files: dict[str, bytes], tmp_path: Path) -> None:
    sp = sentencepiece.SentencePieceProcessor(model_proto=files["sentencepiece"])
    inner = tokenizers.Tokenizer.from_str(files["json"].decode())
    ranks = {base64.b64decode(a): int(b) for a, b in (line.split() for line in files["tiktoken"].splitlines())}
    tik = tiktoken.Encoding("test", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    bos = len(ranks)
    expected: dict[str, Callable[[str], list[int]]] = {
        "json": lambda text: inner.encode(text).ids,
        "sentencepiece": lambda text: [sp.bos_id(), *sp.encode(text)],
        "tiktoken": lambda text: [bos, *tik.encode(text)],
    }
    for kind, content in files.items():
        (tmp_path / "tokenizer.model").write_bytes(content)
        tokenizer = load_tokenizer(tmp_path)
        for sample in SAMPLES.values():
            assert tokenizer.encode(sample) == expected[kind](sample), kind


@pytest.mark.parametrize("sample", SAMPLES)
def test_streaming_adds_up_and_never_splits_a_character(tokenizer: Tokenizer, sample: str) -> None:
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(i) for i in tokenizer.encode(SAMPLES[sample], add_bos=False)] + [decoder.flush()]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == SAMPLES[sample]


def test_streaming_shows_each_character_as_soon_as_it_is_whole(files: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(files["tiktoken"])
    tokenizer = load_tokenizer(tmp_path)
    decoder = StreamDecoder(tokenizer)
    ids = list("a🦞b".encode())  # the first 256 ids are the bytes
    assert [decoder.push(i) for i in ids] == ["a", "", "", "", "🦞", "b"]


def test_streaming_lets_invalid_bytes_pass_as_replacement_characters(files: dict[str, bytes], tmp_path: Path) -> None:
    """A model may emit bytes that are no text; they must neither hang the stream nor swallow what follows."""
    (tmp_path / "tokenizer.model").write_bytes(files["tiktoken"])
    decoder = StreamDecoder(load_tokenizer(tmp_path))
    text = "".join(decoder.push(i) for i in [0xFF] * 9 + list(b"end")) + decoder.flush()
    assert text.endswith("end") and text.startswith("\ufffd")


def test_unfinished_character_at_the_end_is_dropped(files: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(files["tiktoken"])
    decoder = StreamDecoder(load_tokenizer(tmp_path))
    assert "".join(decoder.push(i) for i in "x🦞".encode()[:-1]) + decoder.flush() == "x"


@given(st.lists(st.text("ab<|", max_size=4)), st.lists(st.text("ab<|", min_size=1, max_size=3), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_stop_strings_cut_at_the_first_one_however_the_text_is_split(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    filter = StopStrings(tuple(stops))
    shown = ""
    for piece in pieces:
        shown += filter.push(piece)
        if filter.stopped:
            break
    shown += filter.flush()
    assert not any(stop in shown for stop in stops)
    assert text.startswith(shown)
    assert filter.stopped == any(stop in text for stop in stops)
    if not filter.stopped:
        assert shown == text


def test_special_tokens_in_a_prompt_become_their_ids(files: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(files["json"])
    tokenizer = load_tokenizer(tmp_path)
    inner = tokenizers.Tokenizer.from_str(files["json"].decode())
    assert tokenizer.encode("<|im_end|>", allow_special=True) == [inner.token_to_id("<|im_end|>")]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(files["sentencepiece"])
    declared = {"added_tokens_decoder": {"480": {"content": "<|im_end|>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(declared))
    assert load_tokenizer(tmp_path).encode("a<|im_end|>", allow_special=True)[-1] == 480
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(files["tiktoken"])
    tokenizer = load_tokenizer(tmp_path)
    first = len(files["tiktoken"].splitlines())
    assert tokenizer.encode("<|eot_id|>", allow_special=True) == [first, first + 9]
    assert tokenizer.decode([first, *b"ok", first + 9]) == "ok"


def test_end_tokens_come_from_every_place_that_names_them(files: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(files["json"])
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    inner = tokenizers.Tokenizer.from_str(files["json"].decode())
    named = {inner.token_to_id("</s>"), inner.token_to_id("<|im_end|>")}
    assert load_tokenizer(tmp_path).eos_ids == {7, 8, 9} | named


def test_end_tokens_are_the_same_of_folders_and_gguf_files(files: dict[str, bytes], tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer.from_str(files["json"].decode())
    inner.add_special_tokens(list(END_TOKENS))
    inner.save(str(tmp_path / "tokenizer.json"))
    assert {inner.token_to_id(name) for name in END_TOKENS} <= load_tokenizer(tmp_path).eos_ids
    entries = {"general.architecture": "llama", "tokenizer.ggml.tokens": ["a", *END_TOKENS, "</s>"]}
    assert Metadata(tmp_path / "m.gguf", entries).end_ids() == list(range(1, len(END_TOKENS) + 1))


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def with_template(folder: Path, files: dict[str, bytes], template: str) -> Tokenizer:
    (folder / "tokenizer.json").write_bytes(files["json"])
    config = {"chat_template": template, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


def test_chat_template_sees_what_transformers_gives_it(files: dict[str, bytes], tmp_path: Path) -> None:
    import transformers

    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[{{ m.content | trim }}]{% continue %}"
        "{% endif %}\n    <|im_start|>{{ m['role'] }} {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    tokenizer = with_template(tmp_path, files, template)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(files["json"].decode()), bos_token="<s>", eos_token="</s>"
    )
    theirs.chat_template = template
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert tokenizer.render_chat(MESSAGES) == expected
    assert tokenizer.encode_chat(MESSAGES) == theirs.encode(expected, add_special_tokens=False)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception('roles must alternate') }}",
        "{% for %}",
    ],
)
def test_chat_template_runs_in_a_sandbox(attack: str, files: dict[str, bytes], tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, files, attack)
    with pytest.raises(UserError, match="chat template"):
        tokenizer.render_chat(MESSAGES)


def test_template_files_and_named_templates(files: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(files["json"])
    config = {"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).render_chat(MESSAGES) == "D"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "J"}')
    assert load_tokenizer(tmp_path).render_chat(MESSAGES) == "J"
    (tmp_path / "chat_template.jinja").write_text("F")
    assert load_tokenizer(tmp_path).render_chat(MESSAGES) == "F"


def test_no_chat_template(files: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(files["json"])
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(tmp_path).render_chat(MESSAGES)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\x00\x01garbage", b"YWJj not-a-rank\n"])
def test_damaged_tokenizer_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json: not a readable tokenizer"):
        load_tokenizer(tmp_path)
