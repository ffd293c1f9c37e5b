"""Requests of OpenAI's HTTP API as this server takes them, checked by pydantic.

Fields of that API which this server does not have are refused if they would change the answer; others stay unread.
"""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from teal.serving.request_errors import describe

MAX_CHOICES = 8
MAX_STOPS = 16
MAX_PROMPTS = 64
MAX_DEPTH = 64  # of a request's JSON
# Fields of OpenAI's API that change no answer, here or there.
HARMLESS = {
    "user", "metadata", "store", "service_tier", "safety_identifier",
    "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options",
}  # fmt: skip
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


class BadRequest(Exception):
    """Something a client can mend: message, the field's name, HTTP status."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.status = status


class Strict(BaseModel):
    """No silent conversions: "1" is no number and 1 no string."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, data: Any) -> Any:
        """null means the default, as in OpenAI's API."""
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


def one_of(expected: str, **kinds: type) -> Discriminator:
    """Tells a union's members, which are tagged by these names, by the type of a value's JSON."""

    def tag(value: Any) -> str | None:
        return next((name for name, kind in kinds.items() if isinstance(value, kind)), None)

    return Discriminator(tag, custom_error_type="kind", custom_error_message=f"expected {expected}")


def prompt_kind(prompt: Any) -> str | None:
    """Which of the four kinds of prompts it is meant to be, by its first element."""
    if isinstance(prompt, str):
        return "text"
    if not isinstance(prompt, list):
        return None
    first = prompt[0] if prompt else ""
    return "ids" if isinstance(first, (int, float)) else "lists" if isinstance(first, list) else "texts"


class StreamOptions(Strict):
    include_usage: bool = False


class Sampling(Strict):
    """What chat and plain completions share; unknown fields are kept in model_extra, to be named in the log."""

    model_config = ConfigDict(extra="allow")
    # Fields that would change the answer, with the values that would not and what to do instead.
    unsupported: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = {}

    model: str | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, lt=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: (
        Annotated[
            Annotated[str, Tag("text")] | Annotated[list[str], Field(max_length=MAX_STOPS), Tag("texts")],
            one_of("a string or a list of strings", text=str, texts=list),
        ]
        | None
    ) = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    ignore_eos: bool = False
    sparsity: float | None = Field(None, ge=0, lt=1)
    count_sparsity: bool = False

    @field_validator("logit_bias")
    @classmethod
    def has_ids(cls, bias: dict[str, float]) -> dict[str, float]:
        if wrong := next((key for key in bias if not (key.isascii() and key.isdecimal()) or len(key) > 9), None):
            raise ValueError(f"expected token ids as names, got {wrong[:20]!r}")
        return bias

    @property
    def biases(self) -> dict[int, float]:
        """By token id."""
        return {int(key): value for key, value in self.logit_bias.items()}

    @property
    def ignored(self) -> set[str]:
        """Names of fields that nobody reads and that are none of OpenAI's harmless ones."""
        return set(self.model_extra or {}) - HARMLESS - set(self.unsupported)

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(filter(None, [self.stop] if isinstance(self.stop, str) else self.stop or []))


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn; further fields (tool_calls, tool_call_id, name) go to the chat template as they are."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Annotated[
            Annotated[str, Tag("text")] | Annotated[list[TextPart], Tag("parts")],
            one_of("a string or a list of text parts", text=str, parts=list),
        ]
        | None
    ) = None

    def as_template_input(self) -> dict[str, Any]:
        content = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content or [])
        role = "system" if self.role == "developer" else self.role
        return {**(self.model_extra or {}), "role": role, "content": content}


class JsonSchema(Strict):
    name: str = "schema"
    json_schema: dict[str, Any] | None = Field(None, alias="schema")


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def has_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.json_schema is None):
            raise ValueError("type json_schema needs json_schema.schema")
        return self


class Function(Strict):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: dict(NO_PARAMETERS))

    @field_validator("parameters")
    @classmethod
    def are_an_object(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        """Empty parameters are none, as omitted ones are; arguments are an object in any case."""
        if parameters.get("type", "object") != "object":
            raise ValueError(f"expected a schema of type 'object', got {str(parameters['type'])[:40]!r}")
        return {"type": "object", **parameters} if parameters else dict(NO_PARAMETERS)

    def described(self) -> dict[str, Any]:
        """As a chat template takes it: what the client said, and parameters in any case."""
        return {**self.model_dump(exclude_unset=True), "parameters": self.parameters}


class Tool(Strict):
    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    name: str


class ToolChoice(Strict):
    type: Literal["function"]
    function: FunctionName


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Annotated[
        Annotated[Literal["none", "auto", "required"], Tag("mode")] | Annotated[ToolChoice, Tag("tool")],
        one_of("'none', 'auto', 'required' or an object", mode=str, tool=dict),
    ] = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None  # the default is to, unless the final message is continued
    continue_final_message: bool = False
    unsupported: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = {
        "functions": (([],), "use tools"),
        "function_call": (("none",), "use tool_choice"),
        "modalities": ((["text"], []), "answers are text"),
        "audio": ((), "answers are text"),
        "prediction": ((), "leave it out"),
        "web_search_options": ((), "describe a search of your own in tools"),
        "reasoning_effort": (("medium",), "chat_template_kwargs passes what the model's chat template knows"),
        "verbosity": (("medium",), "say it in a message"),
    }

    @model_validator(mode="after")
    def consistent(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("top_logprobs: needs logprobs true", "top_logprobs")
        if self.add_generation_prompt and self.continue_final_message:
            message = "a final message that is continued takes no generation prompt; send one of the two"
            raise BadRequest(f"continue_final_message: {message}", "continue_final_message")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            message = f"the last message is the {self.messages[-1].role}'s; expected the assistant's"
            raise BadRequest(f"continue_final_message: {message}", "continue_final_message")
        if not self.tools and self.tool_choice not in ("none", "auto"):
            raise BadRequest("tool_choice: needs tools", "tool_choice")
        if isinstance(self.tool_choice, ToolChoice) and self.tool_choice.function.name not in self.tool_names:
            message = f"{self.tool_choice.function.name!r} is none of the request's tools"
            raise BadRequest(f"tool_choice.function.name: {message}", "tool_choice.function.name")
        return self

    @property
    def described_tools(self) -> list[dict[str, Any]] | None:
        """The tools as a chat template takes them; None if none may be called."""
        if not self.may_call_tools:
            return None
        return [{"type": tool.type, "function": tool.function.described()} for tool in self.tools or []]

    @property
    def tool_names(self) -> list[str]:
        return [tool.function.name for tool in self.tools or []]

    @property
    def may_call_tools(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def answer_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def must_call_tools(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, ToolChoice)

    def answer_schema(self) -> dict[str, Any] | None:
        """The JSON schema that the answer must have, if any."""
        if self.must_call_tools:
            wanted = self.tool_choice.function.name if isinstance(self.tool_choice, ToolChoice) else None
            calls = [tool.function for tool in self.tools or [] if wanted in (None, tool.function.name)]
            if len(calls) == 1:
                return call_schema(calls[0], "#")
            return {"anyOf": [call_schema(function, f"#/anyOf/{i}") for i, function in enumerate(calls)]}
        kind = self.response_format
        if kind is None or kind.type == "text":
            return None
        return {"type": "object"} if kind.json_schema is None else kind.json_schema.json_schema


def call_schema(function: Function, place: str) -> dict[str, Any]:
    """The JSON schema of a call of function, for a place in a schema: references are made for it."""
    arguments = rebased(function.parameters, f"{place}/properties/arguments")
    shape = {"name": {"const": function.name}, "arguments": arguments}
    return {"type": "object", "properties": shape, "required": list(shape), "additionalProperties": False}


def rebased(schema: Any, place: str) -> Any:
    """schema with its references to itself as they are when it stands at this place of another."""
    if isinstance(schema, list):
        return [rebased(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: rebased(part, place) for name, part in schema.items()}
    if isinstance(reference := found.get("$ref"), str) and reference.startswith("#"):
        found["$ref"] = place + reference[1:]
    return found


class CompletionRequest(Sampling):
    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS), Tag("texts")]
        | Annotated[list[int], Field(min_length=1), Tag("ids")]
        | Annotated[list[list[int]], Field(min_length=1, max_length=MAX_PROMPTS), Tag("lists")],
        Discriminator(
            prompt_kind,
            custom_error_type="kind",
            custom_error_message="expected a string, a list of strings, a list of token ids or a list of such lists",
        ),
    ]
    parse_special: bool = False  # whether names of special tokens in a text prompt stand for those tokens
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: int = 1
    unsupported: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = {
        "echo": ((False,), "put the prompt before the answer yourself"),
        "suffix": (("",), "texts are continued at their end only"),
    }

    @model_validator(mode="after")
    def returns_all(self) -> "CompletionRequest":
        if self.best_of not in (1, self.n):
            raise BadRequest(
                f"best_of: expected n ({self.n}), as all texts are returned; got {self.best_of}", "best_of"
            )
        return self

    @property
    def answer_limit(self) -> int | None:
        return self.max_tokens or 16  # OpenAI's default


def parse(kind: type[Sampling], body: bytes) -> Any:
    """A request of this kind. Raises BadRequest, naming the field, for anything else."""
    try:
        data = json.loads(body)
        json.dumps(data, ensure_ascii=False).encode("utf-8")  # lone surrogates are no text
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    except (ValueError, UnicodeError) as error:
        raise BadRequest(f"the body is not JSON in UTF-8 ({str(error)[:100]})") from None
    if not isinstance(data, dict):
        raise BadRequest(f"the body is a JSON {type(data).__name__}; expected an object")
    if _depth(data) > MAX_DEPTH:
        raise BadRequest(f"the body is nested deeper than {MAX_DEPTH} levels")
    for name, (neutral, remedy) in kind.unsupported.items():
        if data.get(name) is not None and data[name] not in neutral:
            raise BadRequest(f"{name}: is not supported here; {remedy}", name)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise BadRequest(*describe(error, data)) from None


def _depth(data: Any) -> int:
    level, depth = [data], 0
    while level and depth <= MAX_DEPTH:
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
        ]
        depth += 1
    return depth
