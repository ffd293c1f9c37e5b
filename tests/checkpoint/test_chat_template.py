"""Chat templates: the text is transformers', for every construct that well-known families use."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from teal.checkpoint.chat_template import ChatOptions
from teal.checkpoint.tokenizer import Tokenizer, load_tokenizer
from teal.errors import UserError
from tests.chat_families import FAMILIES, QWEN3, QWEN25, conversations, tools
from tests.tokenizer_kinds import KINDS, Kind, with_chat_template

TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "a <b> & 'ü'",
        "parameters": {"type": "object", "properties": {"z": {}, "a": {}}},
    },
}
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Kind:
    return KINDS["byte-level"](tmp_path_factory.mktemp("byte-level"))


@pytest.fixture(scope="module")
def load(byte_level: Kind, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Our tokenizer with a chat template, or several by name."""
    content = byte_level.ours.backend.inner.to_str()  # type: ignore[attr-defined]

    def load(template: str | dict[str, str]) -> Tokenizer:
        folder = tmp_path_factory.mktemp("chat")
        (folder / "tokenizer.json").write_text(content, encoding="utf-8")
        named = template if isinstance(template, str) else [{"name": n, "template": t} for n, t in template.items()]
        config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": named}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return load_tokenizer(folder)

    return load


@pytest.fixture(scope="module")
def families(load: Any) -> dict[str, Tokenizer]:
    return {name: load(template) for name, template in FAMILIES.items()}


def with_strings(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Arguments as OpenAI's API has them: a JSON string."""
    messages = copy.deepcopy(messages)
    for call in (call for m in messages for call in m.get("tool_calls") or []):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return messages


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_text_is_that_of_transformers(
    family: str, families: dict[str, Tokenizer], byte_level: Kind, data: st.DataObject
) -> None:
    messages = data.draw(conversations())
    template = FAMILIES[family]
    takes_tools = "tools" in (template if isinstance(template, str) else template["tool_use"])
    given_tools = data.draw(st.one_of(st.none(), tools())) if takes_tools else None
    prompt = data.draw(st.booleans())
    variables: dict[str, Any] = data.draw(st.sampled_from([{}, {"enable_thinking": False}, {"date_string": "1 <May>"}]))
    options = ChatOptions(add_generation_prompt=prompt, template_kwargs=variables)
    ours = families[family]
    sent = data.draw(st.sampled_from([messages, with_strings(messages)]))
    theirs = byte_level.theirs
    theirs.chat_template = template
    try:
        expected = theirs.apply_chat_template(
            messages, tools=given_tools, tokenize=False, add_generation_prompt=prompt, **variables
        )
    except Exception:
        with pytest.raises(UserError):
            ours.render_chat(sent, given_tools, options)
        return
    assert ours.render_chat(sent, given_tools, options) == expected


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_ids_are_those_of_transformers(kind: str, kinds: dict[str, Kind], data: st.DataObject) -> None:
    """Where no content names a control token."""
    pair = kinds[kind]
    messages, given_tools = data.draw(conversations(marked=False)), data.draw(st.one_of(st.none(), tools()))
    expected = pair.theirs.apply_chat_template(
        messages, tools=given_tools, tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert pair.ours.encode_chat(with_strings(messages), given_tools) == expected


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    """Every kind of tokenizer with a chat template, here and in transformers."""
    return {name: with_chat_template(make, tmp_path_factory.mktemp(name), QWEN25) for name, make in KINDS.items()}


def test_json_is_neither_escaped_for_html_nor_sorted(load: Any) -> None:
    assert load("{{ tools[0] | tojson }}").render_chat(USER, [TOOL]) == json.dumps(TOOL, ensure_ascii=False)
    form = "{{ tools[0] | tojson(indent=2, separators=(',', '='), sort_keys=true, ensure_ascii=true) }}"
    expected = json.dumps(TOOL, indent=2, separators=(",", "="), sort_keys=True)
    assert load(form).render_chat(USER, [TOOL]) == expected


def test_arguments_are_an_object_and_where_the_template_adds_strings_json(load: Any) -> None:
    call: dict[str, Any] = {"type": "function", "function": {"name": "f", "arguments": '{"ü": "<"}'}}
    messages: list[dict[str, Any]] = [*USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    template = (
        "{% set a = messages[1].tool_calls[0].function.arguments %}"
        "{{ a['ü'] }} {{ a|tojson }} {{ '=' + a + ';' }}{{ a }}"
    )
    as_json = '{"ü": "<"}'
    assert load(template).render_chat(messages) == f"< {as_json} ={as_json};{as_json}"
    assert messages[1]["tool_calls"] == [call]  # the caller's own are as they were
    call["function"]["arguments"] = "not JSON"
    assert load("{{ messages[1].tool_calls[0].function.arguments }}").render_chat(messages) == "not JSON"


@pytest.mark.parametrize("content", ["So far", "So far ", "", "<|im_end|> so", [{"type": "text", "text": "So far "}]])
@pytest.mark.parametrize("trim", ["", " | trim"])
def test_continued_message_stays_open(content: Any, trim: str, load: Any, byte_level: Kind) -> None:
    value = "m.content" if isinstance(content, str) else "m.content[0].text"
    user: Any = "Hi" if isinstance(content, str) else [{"type": "text", "text": "Hi"}]
    template = f"{{% for m in messages %}}<|im_start|>{{{{ {value}{trim} }}}}<|im_end|>\n{{% endfor %}}"
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": content}]
    byte_level.theirs.chat_template = template
    expected = byte_level.theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    ours = load(template)
    is_open = ChatOptions(continue_final_message=True)
    assert ours.render_chat(messages, options=is_open) == expected
    assert ours.decode(ours.encode_chat(messages, options=is_open)).endswith(expected.split("start|>")[-1])


def test_message_that_the_template_hides_cannot_be_continued(load: Any) -> None:
    messages = [*USER, {"role": "assistant", "content": "So far"}]
    with pytest.raises(UserError, match="continue_final_message: the chat template does not show"):
        load("{{ messages[0].content }}").render_chat(messages, options=ChatOptions(continue_final_message=True))
    calls = [*USER, {"role": "assistant", "content": None, "tool_calls": []}]
    with pytest.raises(UserError, match="continue_final_message: the last message has no text"):
        load(QWEN25).render_chat(calls, options=ChatOptions(continue_final_message=True))


def test_thinking_is_switched_off_and_documents_arrive(load: Any) -> None:
    ours = load(QWEN3)
    off = ours.render_chat(USER, options=ChatOptions(template_kwargs={"enable_thinking": False}))
    assert off == ours.render_chat(USER) + "<think>\n\n</think>\n\n"
    assert not ours.render_chat(USER, options=ChatOptions(add_generation_prompt=False)).endswith("assistant\n")
    ours = load("{% for d in documents %}{{ d.title }}: {{ d.text }}{% endfor %}{{ messages[0].content }}")
    assert ours.render_chat(USER, options=ChatOptions(documents=[{"title": "A", "text": "b"}])) == "A: bHi"
    with pytest.raises(UserError, match="chat_template_kwargs: messages is set by the request"):
        ours.render_chat(USER, options=ChatOptions(template_kwargs={"messages": []}))


@pytest.mark.parametrize("wanted", ["string", "parts", "either"])
def test_content_has_the_form_that_the_template_reads(wanted: str, load: Any) -> None:
    text, parts = "{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}"
    either = f"{{% if m.content is string %}}{text}{{% else %}}{parts}{{% endif %}}"
    body = {"string": text, "parts": parts, "either": either}[wanted]
    ours = load(f"{{{{ bos_token + '' }}}}{{% for m in messages %}}{body};{{% endfor %}}")
    listed = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert ours.render_chat([*USER, {"role": "user", "content": listed}]) == "<s>Hi;ab;"


def test_templates_of_a_folder_by_name(load: Any, tmp_path: Path) -> None:
    ours = load({"default": "D", "tool_use": "T {{ tools|length }}"})
    assert (ours.render_chat(USER), ours.render_chat(USER, [TOOL])) == ("D", "T 1")
    with pytest.raises(UserError, match="chat templates a, b, and none named default"):
        load({"a": "A", "b": "B"}).render_chat(USER)
    (tmp_path / "tokenizer.json").write_text(ours.backend.inner.to_str(), encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text("D")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("T {{ tools|length }}")
    ours = load_tokenizer(tmp_path)
    theirs: Any = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for given_tools in (None, [TOOL]):
        expected = theirs.apply_chat_template(USER, tools=given_tools, tokenize=False)
        assert ours.render_chat(USER, given_tools) == expected


def test_special_tokens_come_from_the_older_file_too(load: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(load("").backend.inner.to_str(), encoding="utf-8")
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}')
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}")
    assert load_tokenizer(tmp_path).render_chat(USER) == "<s></s>False"
