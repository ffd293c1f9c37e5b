"""Chat templates: found in a checkpoint folder, and run by Jinja2's sandbox as transformers runs them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from teal.checkpoint.config import read_json
from teal.checkpoint.control_tokens import MARK, ControlTokens
from teal.errors import ParameterError, UserError

TOOLS_MESSAGE = (
    "You can call functions. To call one, answer only with "
    '<tool_call>{"name": NAME, "arguments": OBJECT}</tool_call>. Functions:\n'
)
RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names that templates and clients use for the same
CONTINUED = "\ufdd1 "  # stands where a continued message ends; the space shows whether the template trims


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """How to render a conversation. documents and template_kwargs: what its template may read, each by its own names.

    continue_final_message: the last message stays open, and no generation prompt follows it.
    """

    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: dict[str, Any] | None = None


class Arguments(dict[str, Any]):
    """Arguments of a function call that came as a JSON string: an object, and where a template adds strings, JSON."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __add__(self, other: str) -> str:
        return str(self) + other

    def __radd__(self, other: str) -> str:
        return other + str(self)


class Generation(Extension):
    """{% generation %} … {% endgeneration %}, which marks the assistant's text for training: the text itself here."""

    tags = {"generation"}  # noqa: RUF012 (Jinja2's interface)

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return text.replace(f"\\u{ord(MARK):04x}", MARK) if ensure_ascii else text


def _raise_template_error(message: str) -> None:
    raise jinja2.TemplateError(message)


ENVIRONMENT = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
ENVIRONMENT.filters["tojson"] = _to_json
ENVIRONMENT.globals["raise_exception"] = _raise_template_error
ENVIRONMENT.globals["strftime_now"] = lambda form: datetime.now().strftime(form)


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    return ENVIRONMENT.from_string(source)


class ChatTemplates:
    """A checkpoint's chat templates by name. variables: those that every template sees, such as bos_token."""

    def __init__(self, named: dict[str, str], variables: dict[str, str]) -> None:
        self.named = named
        self.variables = variables
        self._forms: dict[str, Callable[[Any], Any]] = {}

    def source(self, with_tools: bool) -> str:
        """The template to use. Raises UserError if there is none."""
        if not self.named:
            raise ParameterError("this checkpoint has no chat template; use {prompt}, or a chat-tuned checkpoint")
        if with_tools and "tool_use" in self.named:
            return self.named["tool_use"]
        if "default" not in self.named:
            raise UserError(
                f"this checkpoint has chat templates {', '.join(sorted(self.named))}, and none named default"
            )
        return self.named["default"]

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        options: ChatOptions,
        control: ControlTokens | None = None,
    ) -> str:
        """The conversation as text; with control tokens named in its content marked, if control is given.

        Raises UserError.
        """
        source = self.source(tools is not None)
        documents, variables = options.documents, options.template_kwargs or {}
        if wrong := next((name for name in RESERVED if name in variables), None):
            raise UserError(f"chat_template_kwargs: {wrong} is set by the request itself; leave it out here")
        if not messages:
            raise UserError("messages: the conversation is empty; give at least one message")
        messages = [_completed(message) for message in messages]
        if tools and "tools" not in source:
            described = TOOLS_MESSAGE + "\n".join(json.dumps(tool.get("function", tool)) for tool in tools)
            messages = [{"role": "system", "content": described}, *messages]
        if source not in self._forms:
            self._forms[source] = _content_form(source, self.variables)
        convert = self._forms[source]
        messages = [m | {"content": convert(m["content"])} if "content" in m else m for m in messages]
        if control is not None:
            messages = control.mark_messages(messages)
            tools, documents, variables = control.mark(tools), control.mark(documents), control.mark(variables)
        final = _open_end(messages) if options.continue_final_message else None
        text = _run(
            source,
            **self.variables | variables,
            messages=messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=options.add_generation_prompt and not options.continue_final_message,
        )
        return text if final is None else _cut_at_open_end(text, final)


def _run(source: str, **variables: Any) -> str:
    try:
        return _compiled(source).render(variables)
    except Exception as error:  # a template is a program, and messages from outside may be of any shape
        raise UserError(f"the checkpoint's chat template rejected the conversation ({error})") from error


def _completed(message: dict[str, Any]) -> dict[str, Any]:
    """A message without nulls, with its reasoning under the names templates use, and with arguments as objects."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[name] for name in REASONING if name in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    if isinstance(calls := message.get("tool_calls"), list):
        message["tool_calls"] = [_with_object(call) for call in calls]
    return message


def _with_object(call: Any) -> Any:
    """A tool call whose arguments are an object, where they are JSON of one."""
    if not isinstance(call, dict) or not isinstance(function := call.get("function"), dict):
        return call
    try:
        parsed = json.loads(function.get("arguments"))  # type: ignore[arg-type]
    except (TypeError, ValueError, RecursionError):
        return call
    return call | {"function": function | {"arguments": Arguments(parsed)}} if isinstance(parsed, dict) else call


def _content_form(source: str, variables: dict[str, str]) -> Callable[[Any], Any]:
    """What turns content into what the template reads, found by trying: a string, a list of parts, or either."""
    absent: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": False}

    def reads(content: Any) -> bool:
        try:
            text = _run(source, **variables | absent, messages=[{"role": "user", "content": content}])
        except UserError:
            return False
        return "needle" in text and "'text'" not in text and '"text"' not in text

    if not reads([{"type": "text", "text": "needle"}]):
        return _as_string
    return _as_is if reads("needle") else _as_parts


def _as_is(content: Any) -> Any:
    return content


def _as_string(content: Any) -> Any:
    """The text of parts that are all text; other content as it is."""
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    return content


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _open_end(messages: list[dict[str, Any]]) -> str:
    """Put a sign at the end of the last message's text, in place; returns the text before it."""
    message = messages[-1] = dict(messages[-1])
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + CONTINUED
        return content
    for i, part in reversed(list(enumerate(content or []))):
        if isinstance(part, dict) and isinstance(text := part.get("text"), str):
            message["content"] = [*content[:i], part | {"text": text + CONTINUED}, *content[i + 1 :]]  # type: ignore[index]
            return text
    raise UserError("continue_final_message: the last message has no text to continue")


def _cut_at_open_end(text: str, final: str) -> str:
    """Rendered text up to where the last message's text, final, ends."""
    sign = CONTINUED.strip()
    if final.strip() not in text or sign not in text:
        raise UserError("continue_final_message: the chat template does not show the last message as it is")
    before, after = text[: text.rindex(sign)], text[text.rindex(sign) :]
    return before if after.startswith(CONTINUED) else before.rstrip()


def find_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Chat templates of a checkpoint folder by name; one alone is "default". Files come before tokenizer_config.json.

    Raises UserError for a file that is not UTF-8, or a template that is none.
    """
    found = {path.stem: _read(path) for path in sorted(folder.glob("*chat_templates/*.jinja"))}
    if (file := folder / "chat_template.jinja").is_file():
        found["default"] = _read(file)
    if found:
        return found
    beside = folder / "chat_template.json"
    if beside.exists() and (template := read_json(beside).get("chat_template")) is not None:
        return _by_name(template, beside)
    return _by_name(config.get("chat_template"), folder / "tokenizer_config.json")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; download it again") from None


def _by_name(template: Any, path: Path) -> dict[str, str]:
    entries = [{"name": "default", "template": template}] if isinstance(template, str) else template or []
    try:
        named = {entry["name"]: entry["template"] for entry in entries}
    except (TypeError, KeyError):
        named = {"": None}
    if not all(isinstance(text, str) for text in (*named, *named.values())):
        raise UserError(f"{path}: chat_template is not usable; expected a string or a list of named ones")
    return named
