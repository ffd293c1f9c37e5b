"""uvicorn's HTTP/1.1 with what it lacks: bounds on connections and on the time that a client may take.

A request must arrive whole, headers and body, within a deadline that begins with the connection or with the request's
first byte. A client that does not take its answer loses the connection after the same time. Reads are small, since
parsing one must not hold up the event loop: 8 KB of one-byte chunks take h11 5 ms.
"""

import asyncio
import json
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from teal.serving.http_errors import STOPPING, error_body, error_headers, error_response
from teal.serving.http_limits import Limits

READ_BYTES = 8192
REFUSED = 2  # times the connections: those beyond the limit are answered 503, those beyond this are dropped


class LimitedProtocol(H11Protocol):
    """One connection; protocol_of makes the class that knows the limits."""

    limits: Limits

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.arrival: asyncio.TimerHandle | None = None  # runs while a request is on its way
        self.departure: asyncio.TimerHandle | None = None  # runs while an answer is not taken

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.max_size = READ_BYTES  # type: ignore[attr-defined]
        count = len(self.connections)
        if count > REFUSED * self.limits.connections:
            transport.abort()
        elif count > self.limits.connections:
            self.app = _too_many_connections
        self._watch_arrival()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self.arrival, self.departure):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_arrival()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_arrival()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.departure = self.loop.call_later(self.limits.client_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.departure is not None:
            self.departure.cancel()

    def send_400_response(self, msg: str) -> None:
        self.refuse(400, msg)

    def shutdown(self) -> None:
        """Called by uvicorn when it stops: a request that is not here whole does not get in any more."""
        if self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.SEND_RESPONSE:
            self.refuse(503, STOPPING)
        else:
            super().shutdown()

    def _watch_arrival(self) -> None:
        """Run the timer while a request is on its way; between requests uvicorn's own keep-alive timer runs."""
        waits = self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None
        if waits or self.conn.their_state is h11.SEND_BODY:
            if self.arrival is None:
                self.arrival = self.loop.call_later(self.limits.client_seconds, self._too_slow)
        elif self.arrival is not None:
            self.arrival.cancel()
            self.arrival = None

    def _too_slow(self) -> None:
        self.refuse(408, f"the request did not arrive whole within {self.limits.client_seconds:g} s")

    def refuse(self, status: int, message: str) -> None:
        """Answer, if no answer has begun, and hang up."""
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            content = json.dumps(error_body(message, status)).encode()
            headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), "Connection": "close"}
            response = h11.Response(
                status_code=status,
                headers=list({**headers, **error_headers(status)}.items()),
                reason=STATUS_PHRASES[status],
            )
            events = (response, h11.Data(data=content), h11.EndOfMessage())
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()
        if self.cycle is not None:  # the application learns of it as of any client that left
            self.cycle.disconnected = True
            self.cycle.message_event.set()


async def _too_many_connections(scope: Scope, receive: Receive, send: Send) -> None:
    response = error_response("too many connections; try again", 503, headers={"Connection": "close"})
    await response(scope, receive, send)


def protocol_of(granted: Limits) -> type[LimitedProtocol]:
    """The protocol with these limits."""

    class Protocol(LimitedProtocol):
        limits = granted

    return Protocol


def web_server(app: ASGIApp, limits: Limits) -> uvicorn.Server:
    """uvicorn, which logs only faults of the server's own."""
    config = uvicorn.Config(app, http=protocol_of(limits), loop="asyncio", ws="none", log_level="error")
    return uvicorn.Server(config)
