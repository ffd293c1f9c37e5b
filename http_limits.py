"""What the server grants a request, and the reading of a body within it."""

from dataclasses import dataclass

from starlette.requests import Request

from openai_schema import BadRequest


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server grants a request."""

    body_bytes: int = 4_000_000
    seconds: float = 600.0
    api_key: str | None = None
    drain_seconds: float = 30.0


async def read_body(request: Request, limits: Limits) -> bytes:
    """The request's body. Raises BadRequest if it is larger than granted."""
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > limits.body_bytes:
            raise BadRequest(f"the body is larger than {limits.body_bytes} bytes", status=413)
    return b"".join(parts)
