"""The HTTP application: OpenAI's endpoints, health, Prometheus metrics and the page, on Starlette."""

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from errors import UserError
from generation import Done, Observer, Piece
from generation import Request as Generation
from openai_api import Answer, Choice, Service, chat_choice, completion_logprobs, usage
from openai_schema import BadRequest, ChatRequest, CompletionRequest, Sampling, parse
from scheduler import QueueFull

WEB = Path(__file__).with_name("web")
RETRY_AFTER_S = 1
DISCONNECT_POLL_S = 0.05
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}
Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server grants a request."""

    body_bytes: int = 4_000_000
    seconds: float = 600.0
    api_key: str | None = None
    drain_seconds: float = 30.0


class Metrics(Observer):
    """Prometheus counters, filled by the scheduler's thread."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("teal_requests", "Finished generations by reason", ["reason"], **common)
        self.prompt = Counter("teal_prompt_tokens", "Prompt tokens of finished generations", **common)
        self.cached = Counter("teal_cached_prompt_tokens", "Of these, taken from the KV cache", **common)
        self.generated = Counter("teal_generated_tokens", "Tokens generated", **common)
        self.first = Histogram("teal_first_token_seconds", "From arrival to the first token", buckets=SECONDS, **common)
        self.gap = Histogram("teal_token_gap_seconds", "Between tokens of one generation", buckets=SECONDS, **common)
        self.rejected = Counter("teal_rejected_requests", "Requests refused with status 429", **common)
        self.draft = Counter("teal_drafted_tokens", "Tokens drafted by speculative decoding", **common)
        self.accepted = Counter("teal_accepted_tokens", "Of these, the dense model's own", **common)
        waiting = Gauge("teal_waiting", "Generations in the queue", **common)
        running = Gauge("teal_running", "Generations being decoded", **common)
        waiting.set_function(lambda: service.scheduler.load[0])
        running.set_function(lambda: service.scheduler.load[1])

    def first_token(self, seconds: float) -> None:
        self.first.observe(seconds)
        self.generated.inc()

    def next_token(self, seconds: float) -> None:
        self.gap.observe(seconds)
        self.generated.inc()

    def drafted(self, tokens: int, accepted: int) -> None:
        self.draft.inc(tokens)
        self.accepted.inc(accepted)

    def finished(self, request: Generation, reason: str) -> None:
        self.requests.labels(reason).inc()
        self.prompt.inc(len(request.prompt_ids))
        self.cached.inc(request.reused_tokens)


def error_response(message: str, status: int, param: str | None = None) -> JSONResponse:
    """An error in OpenAI's shape."""
    kind = ERROR_TYPES.get(status, "invalid_request_error")
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 429 else None
    body = {"message": message, "type": kind, "param": param, "code": None}
    return JSONResponse({"error": body}, status, headers)


def event_line(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


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


class Api:
    """The endpoints of one service."""

    def __init__(self, service: Service, limits: Limits) -> None:
        self.service = service
        self.limits = limits
        self.metrics = Metrics(service)
        service.scheduler.observer = self.metrics

    async def body_of(self, request: Request) -> bytes:
        """The request's body. Raises BadRequest if it is larger than granted."""
        parts, size = [], 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > self.limits.body_bytes:
                raise BadRequest(f"the body is larger than {self.limits.body_bytes} bytes", status=413)
        return b"".join(parts)

    async def chat(self, http: Request) -> Response:
        body: ChatRequest = parse(ChatRequest, await self.body_of(http))
        prompts = [self.service.chat_prompt(body)]
        top = body.top_logprobs if body.logprobs else None
        answer = self._begin(body, prompts, body.answer_limit, top, body.answer_schema())
        head = self._head("chatcmpl", "chat.completion")
        if body.stream:
            return EventStream(answer, self._lines(body, answer, head | {"object": "chat.completion.chunk"}))
        if not await self._finished(http, answer):
            return Response(status_code=499)
        choices = [chat_choice(self.service, body, i, choice) for i, choice in enumerate(answer.choices)]
        return JSONResponse(head | {"choices": choices, "usage": usage(answer.choices, body.n)})

    async def completion(self, http: Request) -> Response:
        body: CompletionRequest = parse(CompletionRequest, await self.body_of(http))
        prompts = self.service.completion_prompts(body)
        answer = self._begin(body, prompts, body.answer_limit, body.logprobs, None)
        head = self._head("cmpl", "text_completion")
        if body.stream:
            return EventStream(answer, self._lines(body, answer, head))
        if not await self._finished(http, answer):
            return Response(status_code=499)
        choices = []
        for i, choice in enumerate(answer.choices):
            logprobs = None if body.logprobs is None else completion_logprobs(self.service, choice.logprobs, 0)
            found = {"index": i, "text": choice.text, "logprobs": logprobs, "finish_reason": choice.finish_reason}
            choices.append(found)
        return JSONResponse(head | {"choices": choices, "usage": usage(answer.choices, body.n)})

    def _head(self, prefix: str, kind: str) -> dict[str, Any]:
        identity = f"{prefix}-{uuid.uuid4().hex}"
        return {"id": identity, "object": kind, "created": int(time.time()), "model": self.service.name}

    def _begin(
        self, body: Sampling, prompts: list[list[int]], limit: int | None, top: int | None, schema: dict[str, Any] | None
    ) -> Answer:  # fmt: skip
        return self.service.begin(
            lambda emit: self.service.requests(body, prompts, limit, top, schema, emit), self.limits.seconds
        )

    async def _finished(self, http: Request, answer: Answer) -> bool:
        """Wait for all choices; False if the client left before. Raises HTTPException for a failed generation."""

        async def collect() -> None:
            async for _, event in answer.events():
                if isinstance(event, Done) and event.error is not None:
                    raise HTTPException(500, event.error)

        async def gone() -> None:
            while not await http.is_disconnected():
                await asyncio.sleep(DISCONNECT_POLL_S)

        work, watch = asyncio.create_task(collect()), asyncio.create_task(gone())
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            return work.done()
        finally:
            answer.close()
            for task in (work, watch):
                task.cancel()

    async def _lines(self, body: Any, answer: Answer, head: dict[str, Any]) -> AsyncIterator[str]:
        """Server-sent events of an answer."""
        is_chat = isinstance(body, ChatRequest)
        if is_chat:
            for i in range(len(answer.choices)):
                opening = {"index": i, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                yield event_line(head | {"choices": [opening]})
        async for i, event in answer.events():
            if isinstance(event, Done) and event.error is not None:
                yield event_line({"error": {"message": event.error, "type": "server_error"}})
                return
            delta = (self._chat_delta if is_chat else self._completion_delta)(body, answer.choices, i, event)
            if delta is not None:
                yield event_line(head | {"choices": [delta]})
        if body.stream_options is not None and body.stream_options.include_usage:
            yield event_line(head | {"choices": [], "usage": usage(answer.choices, body.n)})
        yield "data: [DONE]\n\n"

    def _chat_delta(
        self, body: ChatRequest, choices: list[Choice], i: int, event: Piece | Done
    ) -> dict[str, Any] | None:
        """A chat chunk's choice; calls of tools come whole, with the end."""
        if isinstance(event, Piece):
            if body.may_call_tools:
                return None
            entries = [self.service.token_entry(e) for e in event.logprobs]
            logprobs = {"content": entries} if body.logprobs else None
            return {"index": i, "delta": {"content": event.text}, "logprobs": logprobs, "finish_reason": None}
        if not body.may_call_tools:
            return {"index": i, "delta": {}, "finish_reason": event.finish_reason}
        answer = chat_choice(self.service, body, i, choices[i])
        calls = [{"index": j, **call} for j, call in enumerate(answer["message"].get("tool_calls", []))]
        delta = {"tool_calls": calls} if calls else {"content": choices[i].text}
        return {"index": i, "delta": delta, "finish_reason": answer["finish_reason"]}

    def _completion_delta(
        self, body: CompletionRequest, choices: list[Choice], i: int, event: Piece | Done
    ) -> dict[str, Any]:
        if isinstance(event, Done):
            return {"index": i, "text": "", "logprobs": None, "finish_reason": event.finish_reason}
        offset = len(choices[i].text) - len(event.text)
        logprobs = None if body.logprobs is None else completion_logprobs(self.service, list(event.logprobs), offset)
        return {"index": i, "text": event.text, "logprobs": logprobs, "finish_reason": None}

    async def models(self, http: Request) -> Response:
        entry = {"id": self.service.name, "object": "model", "created": self.service.started, "owned_by": "teal"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def health(self, http: Request) -> Response:
        waiting, running = self.service.scheduler.load
        alive = not self.service.scheduler.ended.is_set()
        body = {"status": "ok" if alive else "stopped", "waiting": waiting, "running": running}
        return JSONResponse(body, 200 if alive else 503)

    async def metrics_text(self, http: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def sparsity(self, http: Request) -> Response:
        """The plans a request may name, and what the last counted generation dropped by layer and projection."""
        plans = sorted(self.service.plans)
        own = self.service.scheduler.own_plan
        achieved = self.service.scheduler.achieved
        return JSONResponse({"plans": plans, "own": own.target if own else 0.0, "achieved": achieved})

    def guarded(self, endpoint: Endpoint) -> Endpoint:
        """endpoint behind the API key, with errors in OpenAI's shape."""

        async def answer(http: Request) -> Response:
            key = self.limits.api_key
            given = http.headers.get("authorization", "").removeprefix("Bearer ")
            if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
                return error_response("the API key is missing or wrong; send Authorization: Bearer KEY", 401)
            try:
                return await endpoint(http)
            except BadRequest as error:
                return error_response(str(error), error.status, error.param)
            except UserError as error:
                return error_response(str(error), 400)
            except QueueFull:
                self.metrics.rejected.inc()
                return error_response("too many requests wait already; try again", 429)
            except HTTPException as error:
                return error_response(error.detail, error.status_code)
            except ClientDisconnect:
                return Response(status_code=499)

        return answer


def build_app(service: Service, limits: Limits) -> Starlette:
    """The application; its end is the end of the scheduler, which someone else runs."""
    api = Api(service, limits)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.scheduler.close, limits.drain_seconds)

    async def page(http: Request) -> Response:
        return FileResponse(WEB / "index.html")

    async def failure(http: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 500)
        return error_response(f"{http.method} {http.url.path}: {getattr(error, 'detail', 'server error')}", status)

    guarded = {
        "/v1/chat/completions": (api.chat, "POST"),
        "/v1/completions": (api.completion, "POST"),
        "/v1/models": (api.models, "GET"),
        "/sparsity": (api.sparsity, "GET"),
        "/metrics": (api.metrics_text, "GET"),
    }
    routes: list[Any] = [Route(path, api.guarded(run), methods=[method]) for path, (run, method) in guarded.items()]
    routes += [Route("/health", api.health), Route("/", page), Mount("/web", StaticFiles(directory=WEB))]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={404: failure, 405: failure, 500: failure})
