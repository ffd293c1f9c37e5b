"""OpenAI's endpoints: chat and plain completions, whole or streamed, and the list of models."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from teal.decoding.requests import Done, Piece
from teal.decoding.requests import Request as Generation
from teal.serving.http_errors import STOPPING
from teal.serving.http_limits import Limits, check_nodes, read_body
from teal.serving.openai_api import (
    Answer,
    Choice,
    Emit,
    Service,
    chat_choice,
    chat_reason,
    completion_choice,
    completion_logprobs,
    delta_of,
    may_be_cut,
    usage,
)
from teal.serving.openai_schema import ChatRequest, CompletionRequest, Sampling, parse

DISCONNECT_POLL_S = 0.05
Parsed = TypeVar("Parsed", bound=Sampling)


def event_line(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def status_of(failure: Done) -> int:
    """The HTTP status of a generation that failed: 400 for a schema, say, that has no way on, which no retry mends."""
    return 400 if failure.finish_reason == "refused" else 500


def parsed(kind: type[Parsed], content: bytes) -> Parsed:
    """A body as a request of this kind. Raises BadRequest."""
    check_nodes(content)
    return parse(kind, content)


class EventStream(StreamingResponse):
    """Server-sent events of an answer, which ends with the connection, even one lost before the first event."""

    def __init__(self, answer: Answer, lines: AsyncIterator[str]) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.close()


class ChatStream:
    """The chunks of one choice of a streamed chat; calls of tools come piece by piece."""

    def __init__(self, service: Service, body: ChatRequest, i: int, choice: Choice) -> None:
        self.service, self.body, self.i = service, body, i
        self.parser = service.parser(body, choice.request) if body.may_call_tools else None
        self.logprobs: list[dict[str, Any]] = []  # of text that is held back

    def chunks(self, event: Piece | Done) -> list[dict[str, Any]]:
        """What the client is to know of an event."""
        if isinstance(event, Done):
            deltas = self.parser.finish(cut=may_be_cut(self.body, event.finish_reason)) if self.parser else []
            reason = chat_reason(self.parser, event.finish_reason) if self.parser else event.finish_reason
            return [*(self._chunk(delta_of(delta)) for delta in deltas), self._chunk({}, reason)]
        if self.body.logprobs:
            self.logprobs += [self.service.token_entry(entry) for entry in event.logprobs]
        if self.parser is None:
            return [self._chunk({"content": event.text})]
        return [self._chunk(delta_of(delta)) for delta in self.parser.push(event.text)]

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        logprobs = {"content": self.logprobs} if self.logprobs else None
        self.logprobs = []
        return {"index": self.i, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


class CompletionStream:
    """The chunks of one choice of a streamed plain completion."""

    def __init__(self, service: Service, body: CompletionRequest, i: int, choice: Choice) -> None:
        self.service, self.body, self.i = service, body, i
        self.offsets = choice.offsets

    def chunks(self, event: Piece | Done) -> list[dict[str, Any]]:
        """What the client is to know of an event."""
        if isinstance(event, Done):
            return [{"index": self.i, "text": "", "logprobs": None, "finish_reason": event.finish_reason}]
        wanted = self.body.logprobs is not None
        logprobs = completion_logprobs(self.service, event.logprobs, self.offsets) if wanted else None
        return [{"index": self.i, "text": event.text, "logprobs": logprobs, "finish_reason": None}]


class Endpoints:
    """What clients of OpenAI's API ask of one service."""

    def __init__(self, service: Service, limits: Limits) -> None:
        self.service = service
        self.limits = limits

    async def chat(self, http: Request) -> Response:
        content = await read_body(http)

        def prepare(emit: Emit) -> tuple[ChatRequest, list[Generation]]:
            body = parsed(ChatRequest, content)
            top = body.top_logprobs if body.logprobs else None
            prompts = [self.service.chat_prompt(body)]
            return body, self.service.requests(body, prompts, body.answer_limit, top, body.answer_schema(), emit)

        body, answer = await self.service.begin(prepare, self.limits.seconds)
        head = self._head("chatcmpl", "chat.completion")
        return await self._respond(http, body, answer, head, "chat.completion.chunk", chat_choice)

    async def completion(self, http: Request) -> Response:
        content = await read_body(http)

        def prepare(emit: Emit) -> tuple[CompletionRequest, list[Generation]]:
            body = parsed(CompletionRequest, content)
            prompts = self.service.completion_prompts(body)
            return body, self.service.requests(body, prompts, body.answer_limit, body.logprobs, None, emit)

        body, answer = await self.service.begin(prepare, self.limits.seconds)
        head = self._head("cmpl", "text_completion")
        return await self._respond(http, body, answer, head, "text_completion", completion_choice)

    async def _respond(
        self,
        http: Request,
        body: Any,
        answer: Answer,
        head: dict[str, Any],
        chunk_kind: str,
        choice_of: Callable[[Service, Any, int, Choice], dict[str, Any]],
    ) -> Response:
        """The answer as a stream of chunks, or whole with its choices as choice_of puts them."""
        if body.stream:
            if not await self._while_connected(http, answer, answer.begun.wait()):
                return Response(status_code=499)
            return EventStream(answer, self._lines(body, answer, head | {"object": chunk_kind}))
        if not await self._finished(http, answer):
            return Response(status_code=499)

        def whole() -> Response:
            choices = [choice_of(self.service, body, i, choice) for i, choice in enumerate(answer.choices)]
            return JSONResponse(head | {"choices": choices, "usage": usage(answer.choices, body.n)})

        return await asyncio.to_thread(whole)

    def _head(self, prefix: str, kind: str) -> dict[str, Any]:
        identity = f"{prefix}-{uuid.uuid4().hex}"
        return {"id": identity, "object": kind, "created": int(time.time()), "model": self.service.names[0]}

    async def _finished(self, http: Request, answer: Answer) -> bool:
        """Wait for all choices; False if the client left before. Raises HTTPException for a failed generation."""

        async def collect() -> None:
            async for _, event in answer.events():
                if isinstance(event, Done) and event.error is not None:
                    raise HTTPException(status_of(event), event.error)

        try:
            return await self._while_connected(http, answer, collect())
        finally:
            answer.close()

    async def _while_connected(self, http: Request, answer: Answer, wanted: Awaitable[object]) -> bool:
        """Wait for wanted; False, and the answer closed, if the client left before.

        Raises what wanted raises, and HTTPException if the server stops before the answer has begun.
        """

        scheduler = self.service.scheduler

        async def lost() -> None:
            while not await http.is_disconnected():
                over = scheduler.ended.is_set() or (scheduler.closing and not answer.is_running)
                await asyncio.sleep(DISCONNECT_POLL_S)  # what the scheduler has said by now comes first
                if over:
                    raise HTTPException(503, STOPPING)

        work, watch = asyncio.ensure_future(wanted), asyncio.ensure_future(lost())
        succeeded = False
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            succeeded = work.done()
            await (work if succeeded else watch)
            return succeeded
        finally:
            for task in (work, watch):
                task.cancel()
            if not succeeded:
                answer.close()

    async def _lines(self, body: Any, answer: Answer, head: dict[str, Any]) -> AsyncIterator[str]:
        """Server-sent events of an answer."""
        is_chat = isinstance(body, ChatRequest)
        streams: list[ChatStream | CompletionStream] = [
            ChatStream(self.service, body, i, choice) if is_chat else CompletionStream(self.service, body, i, choice)
            for i, choice in enumerate(answer.choices)
        ]
        if is_chat:
            for i in range(len(answer.choices)):
                opening = {"index": i, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                yield event_line(head | {"choices": [opening]})
        async for i, event in answer.events():
            if isinstance(event, Done) and event.error is not None:
                kind = "server_error" if status_of(event) == 500 else "invalid_request_error"
                yield event_line({"error": {"message": event.error, "type": kind}})
                return
            for chunk in streams[i].chunks(event):
                yield event_line(head | {"choices": [chunk]})
        if body.stream_options is not None and body.stream_options.include_usage:
            yield event_line(head | {"choices": [], "usage": usage(answer.choices, body.n)})
        yield "data: [DONE]\n\n"

    async def models(self, http: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self.service.names]})

    async def model(self, http: Request) -> Response:
        """One model by its name, which may have slashes in it."""
        name = http.path_params["name"]
        self.service.check_model(name)
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.service.started, "owned_by": "teal"}
