"""OpenAI's chat and plain completions on a Scheduler: from a checked request to texts, and to OpenAI's answers."""

import asyncio
import codecs
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, TypeVar

from teal.checkpoint.chat_template import ChatOptions
from teal.decoding.constrained import Grammars, JsonMatcher
from teal.decoding.engine import Engine
from teal.decoding.requests import Done, Piece, Request, TokenLogprob
from teal.decoding.scheduler import Scheduler
from teal.errors import UserError
from teal.options import SamplingParams, unknown_id
from teal.plan import SparsityPlan
from teal.serving.openai_schema import BadRequest, ChatRequest, CompletionRequest, Sampling
from teal.serving.tool_calls import THINK_OPEN, Arguments, CallStart, Content, Delta, ToolCallParser

THINK_TOKENS = 8  # of a prompt's end, in which it may open the answer's thoughts
NOTED_FIELDS = 100  # names of ignored fields in the log at most
LEAST_LOGPROB = -9999.0  # JSON has no infinity
Emit = Callable[[int, Piece | Done], None]  # the number of a choice, and what happened to it
Prepared = TypeVar("Prepared")
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Choice:
    """One text of an answer, as it has come so far."""

    request: Request
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    offsets: "TextOffsets" = field(default_factory=lambda: TextOffsets())


class TextOffsets:
    """Where tokens' texts begin, in characters."""

    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.length = 0

    def next(self, content: bytes) -> int:
        """The offset of the next token, whose bytes are these."""
        start = self.length
        self.length += len(self.decoder.decode(content))
        return start


class Service:
    """A model behind the API.

    names: it answers to all and calls itself the first. plans: by sparsity, beside its own.
    """

    def __init__(
        self, engine: Engine, scheduler: Scheduler, names: tuple[str, ...], plans: dict[float, SparsityPlan]
    ) -> None:  # fmt: skip
        self.engine = engine
        self.scheduler = scheduler
        self.names = names
        self.plans = plans
        self.noted: set[str] = set()
        self.grammars = Grammars(engine.tokenizer, engine.model.config.vocab_size)
        self.started = int(time.time())

    def chat_prompt(self, body: ChatRequest) -> list[int]:
        """Token ids of a conversation. Raises BadRequest if the model's template takes no such one."""
        messages = [message.as_template_input() for message in body.messages]
        prompting = (
            not body.continue_final_message if body.add_generation_prompt is None else body.add_generation_prompt
        )
        options = ChatOptions(
            documents=body.documents, add_generation_prompt=prompting,
            continue_final_message=body.continue_final_message, template_kwargs=body.chat_template_kwargs,
        )  # fmt: skip
        try:
            return self.engine.tokenizer.encode_chat(messages, body.described_tools, options, self.scheduler.context)
        except UserError as error:
            raise BadRequest(f"messages: {error}", "messages") from None

    def completion_prompts(self, body: CompletionRequest) -> list[list[int]]:
        """Token ids of each prompt. Raises BadRequest for ids that the model does not have."""
        prompts = body.prompt
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]  # type: ignore[assignment]
        encode = self.engine.tokenizer.encode
        context = self.scheduler.context
        found = [
            encode(p, allow_special=body.parse_special, context=context) if isinstance(p, str) else list(p)  # type: ignore[arg-type]
            for p in prompts
        ]
        for ids in found:
            self._check_ids("prompt", ids)
        return found

    def _check_ids(self, field: str, ids: Iterable[int]) -> None:
        size = self.engine.model.config.vocab_size
        if (wrong := unknown_id(ids, size)) is not None:
            raise BadRequest(f"{field}: token id {wrong} is none of this model's; expected 0 to {size - 1}", field)

    def requests(
        self, body: Sampling, prompts: list[list[int]], limit: int | None, top_logprobs: int | None,
        schema: dict[str, Any] | None, emit: Emit,
    ) -> list[Request]:  # fmt: skip
        """n requests for each prompt; emit gets the number of the choice. Raises BadRequest."""
        self._note_ignored(body)
        self.check_model(body.model)
        self._check_room(body, prompts)
        self._check_ids("logit_bias", body.biases)
        plan = None
        if body.sparsity is not None:
            plan = self.plans.get(body.sparsity)
            if plan is None:
                known = ", ".join(f"{s:g}" for s in sorted(self.plans)) or "none"
                raise BadRequest(f"sparsity {body.sparsity:g} is not loaded; this server has {known}", "sparsity")
        seed = int(time.time_ns()) if body.seed is None else body.seed
        matcher = None if schema is None else self._matcher(body, schema)
        try:
            given = {f.name: getattr(body, f.name) for f in fields(SamplingParams)}
            params = SamplingParams(**given | {"seed": seed % 2**63, "logit_bias": body.biases})
        except UserError as error:
            raise BadRequest(str(error)) from None
        return [
            Request(
                prompts[i // body.n], lambda event, i=i: emit(i, event),  # type: ignore[misc]
                replace(params, seed=(seed + i) % 2**63), max_new_tokens=limit or self.scheduler.context,
                stops=body.stops, ignore_eos=body.ignore_eos, top_logprobs=top_logprobs,
                matcher=matcher and matcher.copy(), plan=plan, count_sparsity=body.count_sparsity,
            )
            for i in range(len(prompts) * body.n)
        ]  # fmt: skip

    def check_model(self, name: str | None) -> None:
        """Raises BadRequest for a model that is not served here."""
        if name is not None and name not in self.names:
            known = " or ".join(map(repr, self.names))
            raise BadRequest(f"model {name!r} does not exist; this server has {known}", "model", status=404)

    def _check_room(self, body: Sampling, prompts: list[list[int]]) -> None:
        """Raises BadRequest for what could never be run, however idle the server."""
        field = "messages" if isinstance(body, ChatRequest) else "prompt"
        room, context = self.scheduler.queue, self.scheduler.context
        if (count := len(prompts) * body.n) > room:
            message = f"at most {room} texts at once, got {count} (prompts times n)"
            raise BadRequest(f"{field if len(prompts) > 1 else 'n'}: {message}", field if len(prompts) > 1 else "n")
        for ids in prompts:
            if not ids:
                raise BadRequest(f"{field}: is empty; give at least one token of text", field)
            if len(ids) >= context:
                raise BadRequest(f"{field}: has {len(ids)} tokens; the context of {context} must exceed it", field)

    def _matcher(self, body: Sampling, schema: dict[str, Any]) -> JsonMatcher:
        by_tools = isinstance(body, ChatRequest) and body.must_call_tools
        field = "tools" if by_tools else "response_format"
        try:
            return self.grammars.json(schema)
        except UserError as error:
            raise BadRequest(f"{field}: {error}", field) from None

    def _note_ignored(self, body: Sampling) -> None:
        """Name fields that nobody reads in the log, each once."""
        new = sorted(body.ignored - self.noted)[: NOTED_FIELDS - len(self.noted)]
        if new:
            self.noted.update(new)
            log.warning("ignored fields of requests: %s", ", ".join(repr(name[:40]) for name in new))

    async def begin(
        self, prepare: Callable[[Emit], tuple[Prepared, list[Request]]], time_limit: float
    ) -> "tuple[Prepared, Answer]":
        """Submit the requests that prepare makes, in a worker thread. Raises what it and Scheduler.submit raise."""
        loop = asyncio.get_running_loop()
        answer = Answer(self.scheduler)

        def emit(i: int, event: Piece | Done) -> None:
            loop.call_soon_threadsafe(answer.take, i, event)

        prepared, requests = await asyncio.to_thread(prepare, emit)
        answer.choices = [Choice(request) for request in requests]
        for request in requests:
            request.deadline = time.monotonic() + time_limit
        self.scheduler.submit(*requests)
        return prepared, answer

    def token_entry(self, entry: TokenLogprob) -> dict[str, Any]:
        """As chat's logprobs.content lists it."""
        return self._one(entry.token, entry.logprob) | {"top_logprobs": [self._one(*pair) for pair in entry.top]}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        content = None if token in self._special else list(self.token_bytes(token))
        return {"token": self.token_text(token), "logprob": max(logprob, LEAST_LOGPROB), "bytes": content}

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text: none for special tokens."""
        return b"" if token in self._special else self.engine.tokenizer.token_bytes(token)

    def token_text(self, token: int) -> str:
        """A token alone as text; special tokens by name, parts of characters as OpenAI writes them."""
        if token in self._special:
            return self._special[token]
        content = self.token_bytes(token)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def parser(self, body: ChatRequest, request: Request) -> ToolCallParser:
        """Tells calls of tools from content in an answer to body."""
        end = "".join(map(self.token_text, request.prompt_ids[-THINK_TOKENS:]))
        in_thought = end.rstrip().endswith(THINK_OPEN)
        return ToolCallParser(body.tool_names, in_thought, None if body.parallel_tool_calls else 1)

    @cached_property
    def _special(self) -> dict[int, str]:
        return {i: name for name, i in self.engine.tokenizer.backend.special.items()}


@dataclass(slots=True)
class Answer:
    """The choices of one HTTP request while they are being generated; close it in any case."""

    scheduler: Scheduler
    choices: list[Choice] = field(default_factory=list)
    queue: "asyncio.Queue[tuple[int, Piece | Done]]" = field(default_factory=asyncio.Queue)
    begun: asyncio.Event = field(default_factory=asyncio.Event)  # something has happened to a choice

    def take(self, i: int, event: Piece | Done) -> None:
        """What happened to choice i."""
        self.queue.put_nowait((i, event))
        self.begun.set()

    @property
    def is_running(self) -> bool:
        """Whether the scheduler has begun with any choice."""
        return self.begun.is_set() or any(choice.request.prefilled for choice in self.choices)

    async def events(self) -> AsyncIterator[tuple[int, Piece | Done]]:
        """(number of a choice, what happened to it), until all are finished; choices are up to date then."""
        while any(choice.finish_reason is None for choice in self.choices):
            i, event = await self.queue.get()
            if isinstance(event, Piece):
                self.choices[i].text += event.text
                self.choices[i].logprobs += event.logprobs
            else:
                self.choices[i].finish_reason = event.finish_reason
            yield i, event

    def close(self) -> None:
        """Cancel what is not finished."""
        for choice in self.choices:
            if choice.finish_reason is None:
                self.scheduler.cancel(choice.request)


def usage(choices: list[Choice], n: int) -> dict[str, Any]:
    """OpenAI's usage of an answer with n choices a prompt."""
    prompt = sum(len(choice.request.prompt_ids) for choice in choices[::n])
    completion = sum(choice.request.new_tokens for choice in choices)
    cached = sum(choice.request.reused_tokens for choice in choices[::n])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def call_of(id: str, name: str, arguments: str) -> dict[str, Any]:
    """A tool call in OpenAI's form."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def delta_of(delta: Delta) -> dict[str, Any]:
    """A chat chunk's delta."""
    if isinstance(delta, Content):
        return {"content": delta.text}
    if isinstance(delta, CallStart):
        return {"tool_calls": [{"index": delta.index, **call_of(delta.id, delta.name, "")}]}
    assert isinstance(delta, Arguments)
    return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]}


def chat_reason(parser: ToolCallParser, reason: str) -> str:
    """An answer's finish_reason, where tools may be called."""
    return "tool_calls" if reason == "stop" and parser.complete_calls else reason


def may_be_cut(body: ChatRequest, reason: str) -> bool:
    """Whether an answer may end within a call: at a limit, or at a stop string of the client's."""
    return reason == "length" or bool(body.stops)


def chat_choice(service: Service, body: ChatRequest, i: int, choice: Choice) -> dict[str, Any]:
    """A whole answer as chat.completions has it; calls that a limit or a stop string broke off are left out."""
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    reason = choice.finish_reason or "stop"
    if body.may_call_tools:
        parser = service.parser(body, choice.request)
        parser.push(choice.text)
        parser.finish(cut=may_be_cut(body, reason))
        message["content"] = parser.content or (None if parser.calls or may_be_cut(body, reason) else "")
        if parser.complete_calls:
            message["tool_calls"] = [call_of(call.id, call.name, call.arguments) for call in parser.complete_calls]
        reason = chat_reason(parser, reason)
    logprobs = {"content": [service.token_entry(e) for e in choice.logprobs]} if body.logprobs else None
    return {"index": i, "message": message, "logprobs": logprobs, "finish_reason": reason}


def completion_logprobs(service: Service, entries: Sequence[TokenLogprob], offsets: TextOffsets) -> dict[str, Any]:
    """As plain completions list them; offsets go on from the tokens before."""
    return {
        "tokens": [service.token_text(entry.token) for entry in entries],
        "token_logprobs": [max(entry.logprob, LEAST_LOGPROB) for entry in entries],
        "top_logprobs": [
            {service.token_text(token): max(logprob, LEAST_LOGPROB) for token, logprob in entry.top}
            for entry in entries
        ],
        "text_offset": [offsets.next(service.token_bytes(entry.token)) for entry in entries],
    }


def completion_choice(service: Service, body: CompletionRequest, i: int, choice: Choice) -> dict[str, Any]:
    """A whole answer as completions has it."""
    wanted = body.logprobs is not None
    logprobs = completion_logprobs(service, choice.logprobs, choice.offsets) if wanted else None
    return {"index": i, "text": choice.text, "logprobs": logprobs, "finish_reason": choice.finish_reason}
