"""Fields of OpenAI's API: what is wrong in the client's words, what is refused, ignored, and what each one does."""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teal.serving.openai_schema import BadRequest, ChatRequest, CompletionRequest, parse
from tests.server_process import QUESTION, Server, serving

USER = {"role": "user", "content": "x"}
FOUR_KINDS = "a string, a list of strings, a list of token ids or a list of such lists"


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[Server]:
    with serving(tiny_folder, "--served-model-name", "tiny", "org/tiny", "--queue", "12") as running:
        yield running


def chat(**fields: Any) -> tuple[Any, dict[str, Any]]:
    return ChatRequest, {"messages": [USER], **fields}


def plain(**fields: Any) -> tuple[Any, dict[str, Any]]:
    return CompletionRequest, {"prompt": "x", **fields}


MISTAKES: list[tuple[tuple[Any, dict[str, Any]], str]] = [
    (plain(prompt=["x"] * 65), "prompt: at most 64 prompts, got 65"),
    (plain(prompt=[[1]] * 65), "prompt: at most 64 prompts, got 65"),
    (plain(prompt=[]), "prompt: at least 1 prompt, got 0"),
    (plain(prompt=5), f"prompt: expected {FOUR_KINDS}, got 5"),
    (plain(prompt=None), "prompt: is missing; it is required"),
    (plain(prompt=["a", 1]), "prompt.1: expected a string, got 1"),
    (plain(prompt=[1, "a"]), 'prompt.1: expected a whole number, got "a"'),
    (plain(prompt=[[1], [2, 0.5]]), "prompt.1.1: expected a whole number, got 0.5"),
    (plain(temperature="1"), 'temperature: expected a number, got "1"'),
    (plain(temperature=3), "temperature: at most 2, got 3"),
    (plain(top_p=-0.1), "top_p: at least 0, got -0.1"),
    (plain(min_p=1), "min_p: less than 1, got 1"),
    (plain(seed=2**63), f"seed: less than {2**63}, got {2**63}"),
    (plain(stop=5), "stop: expected a string or a list of strings, got 5"),
    (plain(stop=["a"] * 17), "stop: at most 16 stop strings, got 17"),
    (plain(stop=["a", 5]), "stop.1: expected a string, got 5"),
    (plain(stream="y" * 90), f'stream: expected true or false, got "{"y" * 59}…'),
    (plain(stream_options={"include_usage": 1}), "stream_options.include_usage: expected true or false, got 1"),
    (plain(logit_bias={"the": 1}), "logit_bias: expected token ids as names, got 'the'"),
    (plain(logit_bias={"5": 101}), "logit_bias.5: at most 100, got 101"),
    (plain(best_of=3, n=2), "best_of: expected n (2), as all texts are returned; got 3"),
    (plain(echo=True), "echo: is not supported here; put the prompt before the answer yourself"),
    (plain(suffix="x"), "suffix: is not supported here; texts are continued at their end only"),
    (chat(messages=[]), "messages: at least 1 message, got 0"),
    (chat(messages=[USER, 5]), "messages.1: expected an object, got 5"),
    (
        chat(messages=[USER, USER, {"role": "king"}]),
        "messages.2.role: expected 'system', 'developer', 'user', 'assistant' or 'tool', got \"king\"",
    ),
    (
        chat(messages=[USER, {"role": "user", "content": 5}]),
        "messages.1.content: expected a string or a list of text parts, got 5",
    ),
    (
        chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        "messages.0.content.0.type: expected 'text', got \"image_url\"",
    ),
    (
        chat(messages=[{"role": "user", "content": [{"type": "text"}]}]),
        "messages.0.content.0.text: is missing; it is required",
    ),
    (chat(tools=[{"type": "function"}]), "tools.0.function: is missing; it is required"),
    (
        chat(tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]),
        "tools.0.function.parameters: expected a schema of type 'object', got 'string'",
    ),
    (chat(tool_choice="some"), "tool_choice: expected 'none', 'auto' or 'required', got \"some\""),
    (chat(tool_choice=5), "tool_choice: expected 'none', 'auto', 'required' or an object, got 5"),
    (chat(tool_choice={"type": "function"}), "tool_choice.function: is missing; it is required"),
    (chat(tool_choice="required"), "tool_choice: needs tools"),
    (chat(response_format={"type": "json_schema"}), "response_format: type json_schema needs json_schema.schema"),
    (chat(top_logprobs=3), "top_logprobs: needs logprobs true"),
    (
        chat(add_generation_prompt=True, continue_final_message=True),
        "continue_final_message: a final message that is continued takes no generation prompt; send one of the two",
    ),
    (
        chat(continue_final_message=True),
        "continue_final_message: the last message is the user's; expected the assistant's",
    ),
    (chat(documents=["a"]), 'documents.0: expected an object, got "a"'),
    (chat(functions=[{"name": "f"}]), "functions: is not supported here; use tools"),
    (chat(function_call="auto"), "function_call: is not supported here; use tool_choice"),
    (chat(modalities=["text", "audio"]), "modalities: is not supported here; answers are text"),
    (chat(audio={"voice": "ash"}), "audio: is not supported here; answers are text"),
    (chat(prediction={"type": "content", "content": "x"}), "prediction: is not supported here; leave it out"),
    (chat(web_search_options={}), "web_search_options: is not supported here; describe a search of your own in tools"),
    (
        chat(reasoning_effort="high"),
        "reasoning_effort: is not supported here; chat_template_kwargs passes what the model's chat template knows",
    ),
    (chat(verbosity="low"), "verbosity: is not supported here; say it in a message"),
]


@pytest.mark.parametrize("request_of,message", MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_is_told_in_the_clients_words(request_of: tuple[Any, dict[str, Any]], message: str) -> None:
    kind, body = request_of
    with pytest.raises(BadRequest) as error:
        parse(kind, json.dumps(body).encode())
    assert str(error.value) == message and error.value.param == message.split(":")[0]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 200) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "role", "content", "function", "name", "schema", "json_schema", "5"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_mistake_names_a_field_that_the_client_sent(data: st.DataObject) -> None:
    kind, body = data.draw(st.sampled_from([chat(), plain()]))
    name = data.draw(st.sampled_from(sorted({*kind.model_fields, *kind.unsupported})))
    body[name] = data.draw(JSON)
    try:
        parse(kind, json.dumps(body).encode())
    except BadRequest as error:
        message, path = str(error), (error.param or "").split(".")
        assert message.startswith(f"{error.param}: ")
        assert not re.search(r"pydantic|valid |list\[|constrained|function-", message.partition(", got ")[0])
        value: Any = body
        for i, part in enumerate(path):
            if isinstance(value, dict) and part not in value:
                assert i == len(path) - 1, "only the last field may be missing"
                break
            value = value[int(part)] if isinstance(value, list) else value[part]


def test_neutral_values_are_taken() -> None:
    for kind, body in (
        chat(functions=[], function_call="none", modalities=["text"], audio=None, prediction=None, verbosity="medium"),
        chat(
            reasoning_effort="medium", user="u", store=True, metadata={}, service_tier="auto", parallel_tool_calls=True
        ),
        plain(echo=False, suffix="", best_of=1, n=2, user="u", top_k=-1, top_p=0, logit_bias={}),
        plain(best_of=2, n=2, suffix=None, logit_bias=None),
    ):
        assert parse(kind, json.dumps(body).encode()).ignored == set()


def test_unknown_fields_are_listed_once_in_the_log(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    from teal.decoding.engine import Engine
    from teal.decoding.scheduler import Scheduler
    from teal.serving.openai_api import Service

    engine = Engine.load(str(tiny_folder), device="cpu", dtype="fp32")
    service = Service(engine, Scheduler(engine, rows=1), ("tiny",), {})
    with caplog.at_level(logging.WARNING):
        for i in range(300):
            kind, body = plain(user="u", mirostat=2, **{f"field-{i}\n{'x' * 1000}": i})
            service.requests(parse(kind, json.dumps(body).encode()), [[1]], 4, None, None, lambda *_: None)
    text = " ".join(record.getMessage() for record in caplog.records)
    assert text.count("mirostat") == 1 and "'user'" not in text
    assert text.count("field-") == 99 and len(text) < 20_000 and "\n" not in text


def complete(server: Server, extra: dict[str, Any] | None = None, **options: Any) -> Any:
    common = {"model": "tiny", "prompt": "The", "max_tokens": 12, "temperature": 0, "seed": 1}
    return server.client.completions.create(**common | options, extra_body={"ignore_eos": True, **(extra or {})})


def test_values_that_mean_greedy_and_off(server: Server) -> None:
    greedy = complete(server).choices[0].text
    assert complete(server, temperature=1e-320).choices[0].text == greedy
    assert complete(server, temperature=1e-38).choices[0].text == greedy
    assert complete(server, temperature=1.5, top_p=0).choices[0].text == greedy
    hot = complete(server, temperature=1.5).choices[0].text
    assert hot != greedy and complete(server, {"top_k": -1}, temperature=1.5).choices[0].text == hot


def test_max_tokens_beyond_the_context_are_cut(server: Server) -> None:
    for count in (100_000, 10**30):
        answer = complete(server, max_tokens=count)
        assert answer.usage.total_tokens == 400 and answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.5}, {"temperature": 1.5, "top_p": 0.5}, {"frequency_penalty": 2},
     {"temperature": 1.0, "extra": {"repetition_penalty": 9.0, "top_k": 3}}],
    ids=["greedy", "sampled", "top-p", "penalized", "repetition"],
)  # fmt: skip
def test_logit_bias_forces_and_bans(server: Server, options: dict[str, Any]) -> None:
    free = complete(server, logprobs=0, **options).choices[0].logprobs.tokens
    forced = complete(server, logit_bias={"70": 100}, logprobs=0, **options).choices[0].logprobs.tokens
    assert len(set(forced)) == 1 and len(forced) == 12
    two = complete(server, logit_bias={"70": 100, "75": 100}, logprobs=0, **options).choices[0].logprobs.tokens
    assert set(two) <= {*forced, *complete(server, logit_bias={"75": 100}, logprobs=0).choices[0].logprobs.tokens}
    assert len(set(free)) > 1
    banned = complete(server, logit_bias={str(i): -100 for i in range(300) if i not in (80, 81)}, logprobs=0, **options)
    allowed = {
        complete(server, logit_bias={str(i): 100}, logprobs=0, max_tokens=1).choices[0].logprobs.tokens[0]
        for i in (80, 81)
    }
    assert set(banned.choices[0].logprobs.tokens) <= allowed


def test_logit_bias_within_a_grammar(server: Server, byte_level_tokenizer_json: str) -> None:
    vocabulary = json.loads(byte_level_tokenizer_json)["model"]["vocab"]
    wanted: dict[str, Any] = {"type": "json_schema", "json_schema": {"schema": {"enum": ["Rome", "Oslo", "Ulm"]}}}

    def answer(**bias: int) -> str:
        ids = {str(i): bias[text[0]] for text, i in vocabulary.items() if text[0] in bias}
        return server.client.chat.completions.create(
            model="tiny", messages=QUESTION, response_format=wanted, temperature=1.0, seed=1, logit_bias=ids
        ).choices[0].message.content  # fmt: skip

    assert (
        answer(R=-100, O=-100) == '"Ulm"'
        and answer(O=100) == '"Oslo"'
        and answer(z=100) in ('"Rome"', '"Oslo"', '"Ulm"')
    )
    with pytest.raises(openai.BadRequestError, match="logit_bias bans every token"):
        answer(R=-100, O=-100, U=-100)
    assert answer(R=100) == '"Rome"'  # the server lives on


def test_logit_bias_of_unknown_tokens_is_refused(server: Server) -> None:
    with pytest.raises(
        openai.BadRequestError, match="logit_bias: token id 300 is none of this model's; expected 0 to 299"
    ):
        complete(server, logit_bias={"300": 1})
    with pytest.raises(openai.BadRequestError, match="prompt: token id 300 is none"):
        complete(server, prompt=[5, 300])


IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "itself-in-itself": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"type": "object", "properties": {"x": {"$ref": "#/$defs/a"}}, "required": ["x"]}},
    },
    "lists-without-end": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}, "minItems": 1}},
    },
    "nothing": {"enum": []},
    "contradiction": {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 5, "maximum": 2}},
        "required": ["a"],
    },
    "look-ahead": {"type": "string", "pattern": "^(?=x)y$"},
    "unknown-keyword": {"not": {"type": "string"}},
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_schema_without_an_answer_is_refused(server: Server, name: str) -> None:
    schema = IMPOSSIBLE[name]
    common: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "max_tokens": 50}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="response_format: the JSON schema"):
            kind = {"type": "json_schema", "json_schema": {"schema": schema}}
            server.client.chat.completions.create(**common, response_format=kind, stream=stream)


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_ends_nowhere_is_an_error_later(server: Server, stream: bool) -> None:
    """Where the dead end comes after a choice, only the answer finds it."""
    endless = IMPOSSIBLE["itself-in-itself"]
    schema = {
        "type": "object",
        "properties": {"k": {"enum": ["p", "q"]}, "q": {"$ref": "#/$defs/a"}},
        "$defs": endless["$defs"],
        "required": ["k", "q"],
        "additionalProperties": False,
    }
    kind = {"type": "json_schema", "json_schema": {"schema": schema}}
    error = openai.APIError if stream else openai.BadRequestError
    with pytest.raises(error, match="cannot be followed to an end"):
        answer = server.client.chat.completions.create(
            model="tiny", messages=QUESTION, max_tokens=50, response_format=kind, stream=stream
        )
        assert stream and not any(choice.finish_reason for chunk in answer for choice in chunk.choices)
    assert complete(server).choices[0].text


def test_what_can_never_be_served_is_refused_for_good(server: Server) -> None:
    """429 would make a client try again."""
    with pytest.raises(openai.BadRequestError, match=r"prompt: at most 12 texts at once, got 14 \(prompts times n\)"):
        complete(server, prompt=["a"] * 7, n=2, max_tokens=1)
    assert len(complete(server, prompt=["a"] * 6, n=2, max_tokens=1).choices) == 12
    with pytest.raises(openai.BadRequestError, match=r"prompt: has \d+ tokens; the context of 400 must exceed it"):
        complete(server, prompt="word " * 500)
    with pytest.raises(openai.BadRequestError, match=r"messages: has \d+ tokens; the context of 400 must exceed it"):
        server.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "word " * 500}])
    with pytest.raises(openai.BadRequestError, match="prompt: is empty"):
        complete(server, prompt="")


def test_models_by_name(server: Server) -> None:
    assert [model.id for model in server.client.models.list()] == ["tiny", "org/tiny"]
    for name in ("tiny", "org/tiny"):
        assert server.client.models.retrieve(name).id == name
        assert complete(server, model=name).model == "tiny"
    with pytest.raises(
        openai.NotFoundError, match=r"model 'org/other' does not exist; this server has 'tiny' or 'org/tiny'"
    ):
        server.client.models.retrieve("org/other")
    status, text, _ = server.send("GET", "/v1/models/gpt-9")
    assert status == 404 and json.loads(text)["error"]["type"] == "not_found_error"


def test_names_without_an_option(tiny_folder: Path) -> None:
    from argparse import Namespace

    from teal.cli.serve import model_names
    from teal.decoding.engine import Engine

    engine = Engine.load(str(tiny_folder), device="cpu", dtype="fp32")

    def names(checkpoint: str | None, name: str, *served: str) -> tuple[str, ...]:
        engine.name = name
        options = {"checkpoint": checkpoint, "random_weights": None, "adapter": None}
        return model_names(Namespace(**options, served_model_name=served or None), engine)

    assert names(None, "SmolLM2-135M-Instruct-v1") == ("SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct-v1")
    assert names("org/name", "org/name") == ("name", "org/name")
    assert names(str(tiny_folder), str(tiny_folder)) == (tiny_folder.name,)
    assert names(None, "SmolLM2-135M-Instruct-v1", "a", "b") == ("a", "b")


def test_what_the_chat_template_gets(tiny_folder: Path, tmp_path: Path) -> None:
    """The answer's prompt is told by its usage: each option adds what it adds to the text."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% for d in documents or [] %}{{ d['text'] }}{% endfor %}{{ 'a' * (thoughts or 0) }}"
        "{% if add_generation_prompt %}bbbbb{% endif %}"
    )
    with serving(folder, "--name", "tiny") as server:

        def count(messages: list[dict[str, Any]], **extra: Any) -> int:
            return server.client.chat.completions.create(
                model="tiny", messages=messages, max_tokens=1, extra_body=extra
            ).usage.prompt_tokens  # fmt: skip

        one, answer = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "It is"}
        base = count([one])
        assert count([one], chat_template_kwargs={"thoughts": 7}) == base + 7
        assert count([one], documents=[{"text": "zzz"}]) == base + 3
        assert count([one], add_generation_prompt=False) == base - 5
        parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
        assert count([{"role": "user", "content": parts}]) == base
        closed = count([one, answer], add_generation_prompt=False)
        assert count([one, answer], continue_final_message=True) == closed - 1


def test_names_of_special_tokens_in_a_prompt_are_text_unless_told(server: Server) -> None:
    def count(**extra: Any) -> int:
        return complete(server, extra, prompt="a<|im_end|>b", max_tokens=1).usage.prompt_tokens

    assert count(parse_special=True) == 3 < count() == count(parse_special=False)
