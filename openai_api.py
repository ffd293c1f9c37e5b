"""OpenAI's chat and plain completions on a Scheduler: from a checked request to texts, and to OpenAI's answers."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar

from constrained import Grammars
from engine import Engine
from errors import UserError
from generation import Done, Piece, Request, TokenLogprob
from openai_schema import BadRequest, ChatRequest, CompletionRequest, Sampling
from params import SamplingParams
from plan import SparsityPlan
from scheduler import Scheduler
from text_length import text_bound

TOOL_OPEN, TOOL_CLOSE = "<tool_call>", "</tool_call>"
Emit = Callable[[int, Piece | Done], None]  # the number of a choice, and what happened to it
Prepared = TypeVar("Prepared")


@dataclass(slots=True)
class Choice:
    """One text of an answer, as it has come so far."""

    request: Request
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None


class Service:
    """A model behind the API. plans: by sparsity, beside the engine's own."""

    def __init__(self, engine: Engine, scheduler: Scheduler, name: str, plans: dict[float, SparsityPlan]) -> None:
        self.engine = engine
        self.scheduler = scheduler
        self.name = name
        self.plans = plans
        self.grammars = Grammars(engine.tokenizer, engine.model.config.vocab_size)
        self.text_bound = text_bound(engine.tokenizer.backend)
        self.started = int(time.time())

    def chat_prompt(self, body: ChatRequest) -> list[int]:
        """Token ids of a conversation. Raises BadRequest if the model's template takes no such one."""
        messages = [message.as_template_input() for message in body.messages]
        tools = [tool.model_dump() for tool in body.tools or []] if body.may_call_tools else None
        try:
            text = self.engine.tokenizer.render_chat(messages, tools)
            return self._encoded(self.engine.tokenizer.backend.encode, text)
        except UserError as error:
            raise BadRequest(str(error), "messages") from None

    def completion_prompts(self, body: CompletionRequest) -> list[list[int]]:
        """Token ids of each prompt. Raises BadRequest for ids that the model does not have."""
        prompts = body.prompt
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]  # type: ignore[assignment]
        encode = self.engine.tokenizer.encode
        found = [self._encoded(encode, p) if isinstance(p, str) else list(p) for p in prompts]  # type: ignore[arg-type]
        size = self.engine.model.config.vocab_size
        for ids in found:
            if wrong := next((i for i in ids if not 0 <= i < size), None):
                raise BadRequest(f"token id {wrong} is none of this model's {size}", "prompt")
        return found

    def _encoded(self, encode: Callable[[str], list[int]], text: str) -> list[int]:
        """Token ids of a text that can fit. Raises UserError for others, before the work."""
        if self.text_bound is not None:
            self.text_bound.check(text, self.scheduler.context)
        return encode(text)

    def requests(
        self, body: Sampling, prompts: list[list[int]], limit: int | None, top_logprobs: int | None,
        schema: dict[str, Any] | None, emit: Emit,
    ) -> list[Request]:  # fmt: skip
        """n requests for each prompt; emit gets the number of the choice. Raises BadRequest."""
        if body.model not in (None, self.name):
            raise BadRequest(f"model {body.model!r} does not exist; this server has {self.name!r}", "model", status=404)
        plan = None
        if body.sparsity is not None:
            plan = self.plans.get(body.sparsity)
            if plan is None:
                known = ", ".join(f"{s:g}" for s in sorted(self.plans)) or "none"
                raise BadRequest(f"sparsity {body.sparsity:g} is not loaded; this server has {known}", "sparsity")
        seed = int(time.time_ns()) if body.seed is None else body.seed
        found = []
        for i in range(len(prompts) * body.n):
            try:
                params = SamplingParams(
                    body.temperature, body.top_k, body.top_p, body.min_p, body.repetition_penalty, (seed + i) % 2**63
                )
                matcher = None if schema is None else self.grammars.json(schema)
            except UserError as error:
                raise BadRequest(str(error)) from None
            found.append(
                Request(
                    prompts[i // body.n], lambda event, i=i: emit(i, event), params,  # type: ignore[misc]
                    max_new_tokens=limit or self.scheduler.context, stops=body.stops, ignore_eos=body.ignore_eos,
                    presence_penalty=body.presence_penalty, frequency_penalty=body.frequency_penalty,
                    top_logprobs=top_logprobs, matcher=matcher, plan=plan, count_sparsity=body.count_sparsity,
                )
            )  # fmt: skip
        return found

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
        text = self.token_text(token)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode("utf-8"))}

    def token_text(self, token: int) -> str:
        """A token alone as text; special tokens by name."""
        return self._special.get(token) or self.engine.tokenizer.decode([token])

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


def tool_calls(text: str, names: list[str]) -> list[dict[str, Any]] | None:
    """The calls that a text consists of, in OpenAI's form; None if it is no call of one of these tools."""
    stripped = text.strip()
    if stripped.startswith(TOOL_OPEN):
        parts = [part.split(TOOL_CLOSE)[0] for part in stripped.split(TOOL_OPEN)[1:]]
    else:
        parts = [stripped]
    calls = []
    for part in parts:
        try:
            call = json.loads(part)
        except ValueError:
            return None
        if not isinstance(call, dict) or call.get("name") not in names or not isinstance(call.get("arguments"), dict):
            return None
        function = {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
        calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
    return calls


def chat_choice(service: Service, body: ChatRequest, i: int, choice: Choice) -> dict[str, Any]:
    """A whole answer as chat.completions has it."""
    calls = tool_calls(choice.text, body.tool_names) if body.may_call_tools else None
    message: dict[str, Any] = {"role": "assistant", "content": None if calls else choice.text, "refusal": None}
    if calls:
        message["tool_calls"] = calls
    logprobs = {"content": [service.token_entry(e) for e in choice.logprobs]} if body.logprobs else None
    reason = "tool_calls" if calls else choice.finish_reason
    return {"index": i, "message": message, "logprobs": logprobs, "finish_reason": reason}


def completion_logprobs(service: Service, entries: list[TokenLogprob], offset: int) -> dict[str, Any]:
    """As plain completions list them; offset: where the first token's text begins."""
    tokens = [service.token_text(entry.token) for entry in entries]
    offsets = list(accumulate(map(len, tokens), initial=offset))[:-1]
    top = [{service.token_text(token): logprob for token, logprob in entry.top} for entry in entries]
    return {
        "tokens": tokens,
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": top,
        "text_offset": offsets,
    }
