"""What the server grants a client, and the reading of a body within it."""

import re
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from teal.serving.http_errors import error_response
from teal.serving.openai_schema import BadRequest

MAX_NODES = 65_536  # of a body: json.loads and pydantic keep the interpreter for 1 us a node or more
JSON_TYPE = re.compile(r"application/([\w.+-]+\+)?json", re.IGNORECASE)
JSON_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the server grants a client; serve.py has the defaults."""

    body_bytes: int  # of one request
    held_bytes: int  # of all requests that are not answered yet
    connections: int
    client_seconds: float  # to send a request whole, and to take more of an answer
    seconds: float  # for one answer
    drain_seconds: float  # for answers to end at shutdown
    api_key: str | None


class BodyMeter:
    """ASGI middleware: bounds a request's body, and the bytes of all bodies whose requests are not answered yet."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app = app
        self.limits = limits
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        declared = Headers(scope=scope).get("content-length", "0")  # digits: the protocol refuses anything else
        if int(declared) > self.limits.body_bytes:
            return await error_response(self._too_large(), 413)(scope, receive, send)
        held = 0

        async def metered() -> Message:
            nonlocal held
            message = await receive()
            size = len(message.get("body", b""))
            held += size
            self.held += size
            if held > self.limits.body_bytes:
                raise HTTPException(413, self._too_large())
            if self.held > self.limits.held_bytes:
                raise HTTPException(503, f"the requests being served hold {self.limits.held_bytes} bytes; try again")
            return message

        try:
            await self.app(scope, metered, send)
        finally:
            self.held -= held

    def _too_large(self) -> str:
        return f"the body is larger than {self.limits.body_bytes} bytes"


async def read_body(request: Request) -> bytes:
    """The body of a request, which must say that it is JSON. Raises BadRequest, and what BodyMeter raises."""
    given = request.headers.get("content-type")
    if given is None or not JSON_TYPE.fullmatch(given.partition(";")[0].strip()):
        raise BadRequest(f"Content-Type: {given or 'missing'}; send application/json", status=415)
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise BadRequest(f"Content-Encoding: {encoding}; send the body as it is", status=415)
    return b"".join([part async for part in request.stream()])


def check_nodes(body: bytes) -> None:
    """Raise BadRequest for JSON of more than MAX_NODES arrays, objects and members, before it is parsed."""
    if body.count(b"[") + body.count(b"{") + body.count(b":") <= MAX_NODES:
        return
    nodes = end = 0  # these characters may stand in texts: count those between them
    for text in JSON_STRING.finditer(body):
        nodes += sum(body.count(mark, end, text.start()) for mark in (b"[", b"{", b":"))
        end = text.end()
        if nodes > MAX_NODES:
            break
    nodes += sum(body.count(mark, end) for mark in (b"[", b"{", b":"))
    if nodes > MAX_NODES:
        raise BadRequest(f"the body has more than {MAX_NODES} arrays, objects and members")
