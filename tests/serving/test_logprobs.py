"""Log probabilities: whose they are, the bytes of their tokens, and where they end."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from teal.decoding.engine import Engine
from teal.decoding.requests import Done, Piece, Request, TokenLogprob
from teal.decoding.scheduler import Scheduler
from tests.scripted import Script
from tests.server_process import QUESTION, Server, serving

TEXTS = ["The lobster lives.", "Größe, 東京の天気, 👩‍🚀🙂 end", "é"]


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[Server]:
    with serving(tiny_folder, "--name", "tiny", program=("-m", "tests.scripted")) as running:
        yield running


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_tokens_join_to_the_text(server: Server, text: str, stream: bool) -> None:
    answer: Any = server.client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=200, logprobs=True, top_logprobs=4, stream=stream,
        extra_body={"script": text},
    )  # fmt: skip
    choices = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
    entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == text
    for entry in [one for whole in entries for one in (whole, *whole.top_logprobs)]:
        if entry.bytes is None:
            assert entry.token in ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
        elif entry.token.startswith("bytes:"):
            assert entry.token == "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry.bytes)
        else:
            assert bytes(entry.bytes).decode() == entry.token
    for entry in entries:
        assert len({top.token for top in entry.top_logprobs}) == 4, "two tokens of one name"


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_of_plain_completions_are_in_characters(server: Server, stream: bool) -> None:
    text = TEXTS[1]
    answer: Any = server.client.completions.create(
        model="tiny", prompt="The", max_tokens=200, logprobs=0, stream=stream, stop="end", extra_body={"script": text}
    )
    choices = [choice for chunk in (answer if stream else [answer]) for choice in chunk.choices]
    logprobs = [choice.logprobs for choice in choices if choice.logprobs]
    tokens = [token for some in logprobs for token in some.tokens]
    offsets = [offset for some in logprobs for offset in some.text_offset]
    assert "".join(choice.text for choice in choices) == text.removesuffix("end")
    for token, offset in zip(tokens, offsets, strict=True):
        assert token.startswith("bytes:") or text.startswith(token, offset)
    assert offsets == sorted(offsets) and offsets[-1] < len(text) - 3


def emitted(engine: Engine, ids: list[int], **options: Any) -> tuple[str, list[TokenLogprob]]:
    """Text and log probabilities of an answer with these tokens."""
    scheduler, events = Scheduler(engine, rows=1), list[Piece | Done]()
    options = {"max_new_tokens": 100, "top_logprobs": 0, **options}
    scheduler.submit(Request(engine.tokenizer.encode("The"), events.append, matcher=Script(ids), **options))
    scheduler.close_when_idle()
    scheduler.run()
    *pieces, end = events
    assert end == Done("stop")
    found = [piece for piece in pieces if isinstance(piece, Piece)]
    return "".join(piece.text for piece in found), [entry for piece in found for entry in piece.logprobs]


def test_log_probabilities_end_where_the_text_ends(tiny_folder: Path) -> None:
    engine = Engine.load(str(tiny_folder), device="cpu", dtype="fp32")
    encode, bos = engine.tokenizer.encode, len(engine.tokenizer.bos_ids)
    ids = encode("one two three")[bos:]
    [eos] = [min(engine.tokenizer.eos_ids)]
    assert [entry.token for entry in emitted(engine, ids)[1]] == ids
    assert [entry.token for entry in emitted(engine, [*ids, eos])[1]] == ids
    for stop in ("three", "hree", "two three", "on"):
        text, entries = emitted(engine, [*ids, eos], stops=(stop,))
        assert text == "one two three".partition(stop)[0]
        tokens = [entry.token for entry in entries]
        assert tokens == ids[: len(tokens)]
        # The last token may be part of the stop string, but begins before it.
        assert engine.tokenizer.decode(tokens[:-1]) != text or not text
        assert engine.tokenizer.decode(tokens).startswith(text)


def test_tokens_held_back_for_a_stop_string_come_with_their_text(tiny_folder: Path) -> None:
    engine = Engine.load(str(tiny_folder), device="cpu", dtype="fp32")
    ids = engine.tokenizer.encode("aaab aaac")[len(engine.tokenizer.bos_ids) :]
    text, entries = emitted(engine, ids, stops=("aaad",))
    assert text == "aaab aaac" and [entry.token for entry in entries] == ids
