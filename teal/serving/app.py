"""The HTTP application: OpenAI's endpoints, health, Prometheus metrics and the page, on Starlette."""

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from teal.decoding.requests import Observer
from teal.decoding.requests import Request as Generation
from teal.decoding.scheduler import QueueFull
from teal.errors import UserError
from teal.serving.endpoints import Endpoints
from teal.serving.http_errors import STOPPING, error_response
from teal.serving.http_limits import BodyMeter, Limits
from teal.serving.http_origin import CallerCheck, Callers
from teal.serving.openai_api import Service
from teal.serving.openai_schema import BadRequest

WEB = Path(__file__).with_name("web")
WORKERS = 2  # threads that parse, render, tokenize and compile, off the event loop
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
CORS: dict[str, Any] = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"], "expose_headers": ["Retry-After"]}
BEARER = {"WWW-Authenticate": "Bearer"}
Endpoint = Callable[[Request], Awaitable[Response]]


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


class Api:
    """Guards the endpoints of one service, and answers for its state."""

    def __init__(self, service: Service, limits: Limits) -> None:
        self.service = service
        self.limits = limits
        self.metrics = Metrics(service)
        service.scheduler.decoder.observer = self.metrics

    async def health(self, http: Request) -> Response:
        waiting, running = self.service.scheduler.load
        alive = not self.service.scheduler.ended.is_set()
        body = {"status": "ok" if alive else "stopped", "waiting": waiting, "running": running}
        return JSONResponse(body, 200 if alive else 503)

    async def metrics_text(self, http: Request) -> Response:
        text = await asyncio.to_thread(generate_latest, self.metrics.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def sparsity(self, http: Request) -> Response:
        """The plans a request may name, and what the last counted generation dropped by layer and projection."""
        plans = sorted(self.service.plans)
        own = self.service.scheduler.decoder.own_plan
        achieved = self.service.scheduler.decoder.achieved
        return JSONResponse({"plans": plans, "own": own.target if own else 0.0, "achieved": achieved})

    def guarded(self, endpoint: Endpoint) -> Endpoint:
        """endpoint behind the API key, with errors in OpenAI's shape."""

        async def answer(http: Request) -> Response:
            if not self._has_key(http):
                return error_response(
                    "the API key is missing or wrong; send Authorization: Bearer KEY", 401, headers=BEARER
                )
            try:
                return await endpoint(http)
            except BadRequest as error:
                return error_response(str(error), error.status, error.param)
            except UserError as error:
                return error_response(str(error), 400)
            except QueueFull:
                if self.service.scheduler.closing:
                    return error_response(STOPPING, 503)
                self.metrics.rejected.inc()
                return error_response("too many requests wait already; try again", 429)
            except HTTPException as error:
                return error_response(error.detail, error.status_code, headers=error.headers)
            except ClientDisconnect:
                return Response(status_code=499)

        return answer

    def _has_key(self, http: Request) -> bool:
        key = self.limits.api_key
        scheme, _, given = http.headers.get("authorization", "").partition(" ")
        return key is None or (scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), key.encode()))


def method_refused(http: Request, error: HTTPException) -> Response:
    """405 with the methods that the path takes; OPTIONS asks for no more than these."""
    allowed = (error.headers or {}).get("Allow", "GET, HEAD")
    headers = {"Allow": ", ".join(sorted({*allowed.split(", "), "OPTIONS"}))}
    if http.method == "OPTIONS":
        return Response(status_code=204, headers=headers)
    return error_response(f"{http.method} {http.url.path}: expected {headers['Allow']}", 405, headers=headers)


def build_app(service: Service, limits: Limits, callers: Callers) -> Starlette:
    """The application; its end is the end of the scheduler, which someone else runs."""
    api, endpoints = Api(service, limits), Endpoints(service, limits)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(WORKERS, "worker"))
        yield
        await asyncio.to_thread(service.scheduler.close, limits.drain_seconds)

    async def page(http: Request) -> Response:
        return FileResponse(WEB / "index.html")

    async def failure(http: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 500)
        if isinstance(error, HTTPException) and status == 405:
            return method_refused(http, error)
        return error_response(f"{http.method} {http.url.path}: {getattr(error, 'detail', 'server error')}", status)

    guarded = {
        "/v1/chat/completions": (endpoints.chat, "POST"),
        "/v1/completions": (endpoints.completion, "POST"),
        "/v1/models": (endpoints.models, "GET"),
        "/v1/models/{name:path}": (endpoints.model, "GET"),
        "/sparsity": (api.sparsity, "GET"),
        "/metrics": (api.metrics_text, "GET"),
    }
    routes: list[Any] = [Route(path, api.guarded(run), methods=[method]) for path, (run, method) in guarded.items()]
    routes += [Route("/health", api.health), Route("/", page), Mount("/web", StaticFiles(directory=WEB))]
    middleware = [Middleware(CallerCheck, callers=callers)]
    if callers.origins:
        middleware.append(Middleware(CORSMiddleware, allow_origins=callers.origins, **CORS))
    middleware.append(Middleware(BodyMeter, limits=limits))
    handlers: dict[Any, Any] = {404: failure, 405: failure, 500: failure}
    return Starlette(routes=routes, middleware=middleware, lifespan=lifespan, exception_handlers=handlers)
