"""Errors in OpenAI's shape, for every layer of the server that refuses something."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

RETRY_AFTER_S = 1
STOPPING = "the server is stopping; try again later"
ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


def error_body(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    kind = ERROR_TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def error_headers(status: int) -> dict[str, str]:
    """Headers that belong to the status: when to try again, if that helps."""
    return {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else {}


def error_response(
    message: str, status: int, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An error with its status and headers."""
    return JSONResponse(error_body(message, status, param), status, {**error_headers(status), **(headers or {})})
