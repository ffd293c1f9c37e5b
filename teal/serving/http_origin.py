"""Who may call: the names a browser may reach this server by, and the pages that may use it.

A page of another site can make a browser send requests here. The name may be that site's own, which now points at
this machine (DNS rebinding). Two headers that a page cannot forge tell: Host and Origin.
"""

import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from teal.errors import ParameterError
from teal.serving.http_errors import error_response

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
DEFAULT_PORTS = {"http": 80, "https": 443}
ANY = "*"


def is_every_network(host: str) -> bool:
    """Whether listening on host means listening on every network."""
    return host == "" or (_is_address(host) and ipaddress.ip_address(host).is_unspecified)


def is_local(host: str) -> bool:
    """Whether only this machine reaches host."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def check_origin(origin: str) -> str:
    """An origin as browsers send it. Raises UserError for anything else."""
    if origin in (ANY, "null"):
        return origin
    parts = urlsplit(origin)
    if not (parts.scheme and parts.netloc) or origin.lower() != f"{parts.scheme}://{parts.netloc}".lower():
        raise ParameterError(
            "{allow_origin} {} is no origin; expected one such as https://example.org, or {}", origin, ANY
        )
    return origin.lower()


@dataclass(frozen=True, slots=True)
class Callers:
    """Who may call. host: what the server listens on. names: further ones, or ANY. origins: of pages, or ANY."""

    host: str
    names: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()


class CallerCheck:
    """ASGI middleware: 403 for a Host that is not this server's and for an Origin that may not use it."""

    def __init__(self, app: ASGIApp, callers: Callers) -> None:
        self.app = app
        self.takes_addresses = is_every_network(callers.host)  # rebinding needs a name
        own = socket.gethostname() if self.takes_addresses else callers.host
        self.names = frozenset(name.lower() for name in (*LOCAL_NAMES, own, *callers.names))
        self.origins = callers.origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._problem(Headers(scope=scope)) if scope["type"] == "http" else None
        if problem is None:
            await self.app(scope, receive, send)
        else:
            await error_response(problem, 403)(scope, receive, send)

    def _problem(self, headers: Headers) -> str | None:
        host, origin = headers.get("host"), headers.get("origin")
        if host is not None and not self._is_own(host):
            return f"Host: {host} is not this server's; start it with --allow-host {_split(host)[0] or 'NAME'}"
        if origin is None or ANY in self.origins or origin.lower() in self.origins:
            return None
        scheme = urlsplit(origin).scheme if "://" in origin else ""
        port = DEFAULT_PORTS.get(scheme)
        if host is None or not scheme or _split(origin.partition("://")[2], port) != _split(host, port):
            return f"Origin: {origin} may not use this server; start it with --allow-origin {origin}"
        return None

    def _is_own(self, host: str) -> bool:
        name = _split(host)[0]
        return ANY in self.names or name in self.names or (self.takes_addresses and _is_address(name))


def _split(authority: str, default_port: int | None = None) -> tuple[str, int | None]:
    """(name in lower case without brackets, port); the name is empty if it is malformed."""
    try:
        parts = urlsplit(f"//{authority}")
        return (parts.hostname or "").removesuffix("."), parts.port or default_port
    except ValueError:
        return "", None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
