"""Calls of tools: told from content in any chunking, and as the stock client meets them."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teal.decoding.engine import Engine
from teal.decoding.requests import Request
from teal.decoding.scheduler import Scheduler
from teal.serving.openai_api import Service
from teal.serving.openai_schema import ChatRequest, parse
from teal.serving.tool_calls import Arguments, CallStart, Content, Delta, ToolCallParser
from tests.server_process import QUESTION, WEATHER, Server, serving
from tests.serving.test_openai_fields import IMPOSSIBLE

NAMES = ["weather", "now"]
ROME = '{"name": "weather", "arguments": {"city": "Rome"}}'
OSLO = '{"name": "weather", "arguments": {"city": "O\\"s}lo", "days": [1, {"a": 2}]}}'
CALL = {"Rome": ("weather", {"city": "Rome"}), "Oslo": ("weather", {"city": 'O"s}lo', "days": [1, {"a": 2}]})}


def tagged(call: str) -> str:
    return f"<tool_call>\n{call}\n</tool_call>"


def read(text: str, sizes: list[int], cut: bool = False, **options: Any) -> tuple[list[Delta], ToolCallParser]:
    """The deltas of text in pieces of these sizes, in turn."""
    parser, found, at, i = ToolCallParser(NAMES, **options), [], 0, 0
    while at < len(text):
        found += parser.push(text[at : at + sizes[i % len(sizes)]])
        at, i = at + sizes[i % len(sizes)], i + 1
    return found + parser.finish(cut), parser


def put_together(deltas: list[Delta]) -> tuple[str, list[tuple[str, str]]]:
    """(content, [(name, arguments)]) as a client gathers them."""
    content, calls = "", list[list[str]]()
    for delta in deltas:
        if isinstance(delta, Content):
            content += delta.text
        elif isinstance(delta, CallStart):
            assert delta.index == len(calls) and delta.id.startswith("call_")
            calls.append([delta.name, ""])
        else:
            assert delta.index == len(calls) - 1
            calls[-1][1] += delta.text
    return content, [(name, arguments) for name, arguments in calls]


# text, its content, its calls
ANSWERS: dict[str, tuple[str, str, list[Any]]] = {
    "plain": ("The sky is blue.\n\n", "The sky is blue.\n\n", []),
    "tagged": (tagged(ROME), "", [CALL["Rome"]]),
    "untagged": (f" {ROME}\n", "", [CALL["Rome"]]),
    "after-thoughts": (
        f"<think>\n{tagged(OSLO)}? No.</think>\n\n{tagged(ROME)}",
        f"<think>\n{tagged(OSLO)}? No.</think>",
        [CALL["Rome"]],
    ),
    "untagged-after-thoughts": (f"<think>Hm.</think>\n{ROME}", "<think>Hm.</think>", [CALL["Rome"]]),
    "two": (f"{tagged(ROME)}\n{tagged(OSLO)}\n", "", [CALL["Rome"], CALL["Oslo"]]),
    "text-before": (f"Let me look.\n\n{tagged(ROME)}", "Let me look.", [CALL["Rome"]]),
    "text-after": (f"{tagged(ROME)}\nSo.", "\nSo.", [CALL["Rome"]]),
    "parameters": ('{"name": "weather", "parameters": {"city": "Rome"}}', "", [CALL["Rome"]]),
    "no-arguments": (tagged('{"name": "now"}'), "", [("now", {})]),
    "another-order": (tagged('{"arguments": {"city": "Rome"}, "name": "weather"}'), "", [CALL["Rome"]]),
    "no-closing-tag": (f"<tool_call>{ROME}\n<tool_call>{OSLO}", "", [CALL["Rome"], CALL["Oslo"]]),
    "unknown-tool": (tagged('{"name": "rm", "arguments": {}}'), tagged('{"name": "rm", "arguments": {}}'), []),
    "not-json": ("<tool_call>weather(Rome)</tool_call>!", "<tool_call>weather(Rome)</tool_call>!", []),
    "broken-off": ('<tool_call>{"name": "weather", "argum', '<tool_call>{"name": "weather", "argum', []),
    "json-answer": ('{"name": "Anna", "age": 5}', '{"name": "Anna", "age": 5}', []),
    "nearly-tags": ("a <tool> < b <tool_cal> <think", "a <tool> < b <tool_cal> <think", []),
    "later-thoughts-are-text": (f"So <think> {tagged(ROME)}", "So <think>", [CALL["Rome"]]),
    "unclosed-thoughts": (f"<think>{tagged(ROME)} ", f"<think>{tagged(ROME)} ", []),
}


@pytest.mark.parametrize("name", ANSWERS)
@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_an_answer_is_read_alike_in_any_chunking(name: str, sizes: list[int]) -> None:
    text, content, calls = ANSWERS[name]
    deltas, parser = read(text, sizes)
    found, called = put_together(deltas)
    assert found == content == parser.content
    assert [(tool, json.loads(arguments)) for tool, arguments in called] == calls
    assert [(call.name, json.loads(call.arguments)) for call in parser.complete_calls] == calls


@settings(max_examples=300, deadline=None)
@given(
    text=st.lists(
        st.sampled_from(
            [
                *'{} \n"<>:,',
                "<tool_call>",
                "</tool_call>",
                "<think>",
                "</think>",
                ROME,
                OSLO,
                '"name"',
                '"weather"',
                '"arguments"',
                "hello",
            ]
        ),
        max_size=12,
    ).map("".join),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    cut=st.booleans(),
    limit=st.sampled_from([None, 1]),
)
def test_any_text_is_read_alike_in_any_chunking(text: str, sizes: list[int], cut: bool, limit: int | None) -> None:
    whole, piecewise = (put_together(read(text, some, cut, limit=limit)[0]) for some in ([len(text) or 1], sizes))
    assert whole == piecewise


@pytest.mark.parametrize("call,before", [
    (ROME, ""), (ROME, "<think>\nHm.\n</think>"),
    (tagged(ROME), ""), (tagged(ROME), "Let me look."), (tagged(ROME), "<think>Hm.</think>"),
])  # fmt: skip
def test_a_call_that_is_cut_off_is_no_content(call: str, before: str) -> None:
    text = f"{before}\n{call}" if before else call
    for end in range(len(before) + 2, len(text) - len("</tool_call>")):
        _, parser = read(text[: end + 1], [3], cut=True)
        assert parser.content == before, text[: end + 1]
        complete = '"Rome"}' in text[: end + 1]
        assert [call.name for call in parser.complete_calls] == ["weather"] * complete


def test_what_a_limit_cut_off_and_is_no_call_stays() -> None:
    for text in ("The sky ", "a <", "<think>So <tool_ca"):
        assert read(text, [1], cut=True)[1].content == text


def test_thoughts_that_the_prompt_began() -> None:
    text = f"Maybe {tagged(OSLO)}.</think>{tagged(ROME)}"
    content, calls = put_together(read(text, [5], in_thought=True)[0])
    assert content == f"Maybe {tagged(OSLO)}.</think>" and len(calls) == 1


@pytest.mark.parametrize("end,in_thought", [("<think>\n", True), ("<think>\n\n</think>", False), ("Hello", False)])
def test_thoughts_that_a_prompt_opens_are_noticed(tiny_folder: Path, end: str, in_thought: bool) -> None:
    engine = Engine.load(str(tiny_folder), device="cpu", dtype="fp32")
    service = Service(engine, Scheduler(engine, rows=1), ("tiny",), {})
    body = parse(ChatRequest, json.dumps({"messages": QUESTION, "tools": [WEATHER]}).encode())
    request = Request(engine.tokenizer.encode(f"Why? {end}"), lambda event: None)
    parser = service.parser(body, request)
    parser.push(tagged(ROME))
    assert (parser.calls == []) == in_thought


def test_no_more_calls_than_asked_for() -> None:
    for text in (tagged(ROME) + tagged(OSLO) + "so", tagged(ROME) + tagged('{"arguments": {}, "name": "now"}') + "so"):
        content, calls = put_together(read(text, [4], limit=1)[0])
        assert content == "" and [name for name, _ in calls] == ["weather"]


def test_nothing_is_held_back_longer_than_it_is_open() -> None:
    parser = ToolCallParser(NAMES)
    assert parser.push("Hello") == [Content("Hello")]
    assert parser.push(" wor") == [Content(" wor")]
    assert parser.push("ld <tool") == [Content("ld")]
    [start] = parser.push('_call>{"name": "weather", "arguments": {')[:1]
    assert isinstance(start, CallStart) and start.name == "weather"
    assert parser.push('"city": "Ro') == [Arguments(0, '"city": "Ro')]
    parser = ToolCallParser(NAMES)
    assert parser.push('{"name": "w') == [] and parser.push("ater") == [Content('{"name": "water')]


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose answers the requests tell, with room for long ones."""
    folder = tmp_path_factory.mktemp("longer") / "tiny"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    with serving(folder, "--name", "tiny", program=("-m", "tests.scripted")) as running:
        yield running


def ask(server: Server, script: str, **options: Any) -> Any:
    """A chat with a tool whose answer is this text."""
    common: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "tools": [WEATHER], "max_tokens": 500}
    return server.client.chat.completions.create(**common | options, extra_body={"script": script})


@pytest.mark.parametrize(
    "name", ["plain", "tagged", "untagged", "after-thoughts", "two", "text-before", "another-order"]
)
def test_streams_and_whole_answers_agree(server: Server, name: str) -> None:
    text, content, calls = ANSWERS[name]
    [whole] = ask(server, text).choices
    assert (whole.message.content or "") == content
    assert [(c.function.name, json.loads(c.function.arguments)) for c in whole.message.tool_calls or []] == calls
    assert whole.finish_reason == ("tool_calls" if calls else "stop")
    assert whole.message.content is None or whole.message.content
    streamed = [choice for chunk in ask(server, text, stream=True) for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in streamed) == content
    found: list[Any] = [{} for _ in calls]
    for call in (call for choice in streamed for call in choice.delta.tool_calls or []):
        if call.id is not None:
            assert not found[call.index] and call.type == "function" and call.function.arguments == ""
            found[call.index] = {"name": call.function.name, "arguments": ""}
        else:
            found[call.index]["arguments"] += call.function.arguments
    assert [(call["name"], json.loads(call["arguments"])) for call in found] == calls
    assert [choice.finish_reason for choice in streamed if choice.finish_reason] == [whole.finish_reason]


def test_a_plain_answer_streams_token_by_token_with_its_logprobs(server: Server) -> None:
    text = "The European lobster lives in the eastern Atlantic."
    options: dict[str, Any] = {"logprobs": True, "top_logprobs": 2}
    [whole] = ask(server, text, **options).choices
    pieces = [c for chunk in ask(server, text, stream=True, **options) for c in chunk.choices if c.delta.content]
    assert len(pieces) > 10 and "".join(piece.delta.content for piece in pieces) == text
    entries = [entry for piece in pieces for entry in piece.logprobs.content]
    assert entries == whole.logprobs.content and len(entries) >= len(pieces)


def test_calls_stream_in_parts_that_the_stock_helper_reads(server: Server) -> None:
    strict = json.loads(json.dumps(WEATHER))
    strict["function"]["strict"] = True
    with server.client.chat.completions.stream(
        model="tiny", messages=QUESTION, tools=[strict], max_tokens=200, extra_body={"script": f"Hm. {tagged(ROME)}"}
    ) as stream:
        parts = [event.arguments_delta for event in stream if event.type == "tool_calls.function.arguments.delta"]
        final = stream.get_final_completion().choices[0]
    assert len([part for part in parts if part]) > 3 and "".join(parts) == '{"city": "Rome"}'
    assert final.finish_reason == "tool_calls" and final.message.content == "Hm."
    assert final.message.tool_calls[0].function.parsed_arguments == {"city": "Rome"}


def test_a_cut_off_call_is_said_to_be_cut_off(server: Server) -> None:
    for script, content in ((tagged(ROME), None), (ROME, None), (f"Let me look.\n{tagged(ROME)}", "Let me look.")):
        count = ask(server, script).usage.completion_tokens
        for tokens in range(count // 2, count - 20):
            [answer] = ask(server, script, max_tokens=tokens).choices
            assert (answer.finish_reason, answer.message.content, answer.message.tool_calls) == (
                "length",
                content,
                None,
            )
            streamed = [c for chunk in ask(server, script, max_tokens=tokens, stream=True) for c in chunk.choices]
            assert "".join(c.delta.content or "" for c in streamed) == (content or "")
            assert streamed[-1].finish_reason == "length"


def test_a_call_that_a_stop_string_cuts_off_is_no_content(server: Server) -> None:
    for script in (tagged(ROME), ROME):
        [answer] = ask(server, script, stop=["city"]).choices
        assert (answer.finish_reason, answer.message.content, answer.message.tool_calls) == ("stop", None, None)
        streamed = [c for chunk in ask(server, script, stop=["city"], stream=True) for c in chunk.choices]
        assert "".join(c.delta.content or "" for c in streamed) == ""


def test_tools_without_parameters_take_none(server: Server) -> None:
    some: list[dict[str, Any]] = [{}, {"parameters": None}, {"parameters": {}}]
    for parameters in some:
        tool = {"type": "function", "function": {"name": "now", **parameters}}
        answer = server.client.chat.completions.create(
            model="tiny",
            messages=QUESTION,
            tools=[tool],
            tool_choice="required",
            max_tokens=60,
            temperature=1.5,
            seed=3,
        )
        assert [c.function.arguments for c in answer.choices[0].message.tool_calls] == ["{}"]


def test_one_call_where_parallel_ones_are_not_wanted(server: Server) -> None:
    text = ANSWERS["two"][0]
    assert len(ask(server, text).choices[0].message.tool_calls) == 2
    assert len(ask(server, text, parallel_tool_calls=False).choices[0].message.tool_calls) == 1


def test_definitions_within_a_tools_parameters_are_found(server: Server) -> None:
    city = {"type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "required": ["city"],
            "additionalProperties": False, "$defs": {"city": {"enum": ["Rome", "Oslo"]}}}  # fmt: skip
    tools = [{"type": "function", "function": {"name": name, "parameters": city}} for name in ("weather", "map")]
    choices: tuple[Any, ...] = ("required", {"type": "function", "function": {"name": "map"}})
    for choice in choices:
        answer = server.client.chat.completions.create(
            model="tiny", messages=QUESTION, max_tokens=90, seed=1, tools=tools, tool_choice=choice
        )
        [call] = answer.choices[0].message.tool_calls
        assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_parameters_that_nothing_fits_are_refused(server: Server, name: str) -> None:
    schema = IMPOSSIBLE[name]
    definitions = {"$defs": schema["$defs"]} if "$defs" in schema else {}
    parameters = {"type": "object", "properties": {"x": schema}, "required": ["x"], **definitions}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    with pytest.raises(openai.BadRequestError, match="tools: the JSON schema"):
        server.client.chat.completions.create(model="tiny", messages=QUESTION, tools=[tool], tool_choice="required")
