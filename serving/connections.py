"""Limits on connections: their number, the time to send a request's headers, and the time to read an answer.

    Server(app, ConnectionLimits()).run([bound_socket])

uvicorn limits neither the number of connections that send nothing nor the time that they take. Each holds a file of the
process; once there is none left, no client is heard any more. `BoundedProtocol` adds the limits to uvicorn's protocol.
"""
from __future__ import annotations

import asyncio
import functools
import http
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.guard import HEADERS, log_access

# Connections that the event loop accepts before it does anything else. They hold files before `connection_made` can count
# them, so a burst must be small against the share of the files that `most_connections` leaves.
ACCEPTED_TOGETHER = 4
WAITING_TO_BE_ACCEPTED = 1024  # connections that the kernel holds meanwhile
UNREAD = 1 << 17  # bytes of answers that the kernel holds for a client; Linux doubles the number


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits on the connections of all clients together."""

    connections: int = 512
    header_seconds: float = 10.0  # from the connection, or the last answer, to the end of a request's headers
    answer_seconds: float = 30.0  # to read an answer


def most_connections(wanted: int) -> int:
    """Returns the number of connections that the process has files for: `wanted`, or half of the files it may open."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return wanted
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if files == resource.RLIM_INFINITY else max(1, min(wanted, files // 2))


class Server(uvicorn.Server):
    """uvicorn's server with `BoundedProtocol`.

    Args:
        app: the ASGI application.
        limits: of all connections together.
        stop_seconds: until accepted requests are given up after a signal to stop.
        say: is told the address once the server listens.
    """

    def __init__(self, app, limits: ConnectionLimits, stop_seconds: int = 45, say: Callable[[str], None] = lambda _: None):
        super().__init__(uvicorn.Config(
            app, http=functools.partial(BoundedProtocol, limits), ws="none", loop="asyncio", backlog=ACCEPTED_TOGETHER,
            proxy_headers=False, server_header=False, access_log=False, log_level="error",
            timeout_graceful_shutdown=stop_seconds))
        self.say = say

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # uvicorn's backlog is both the kernel's queue and asyncio's burst of accepts. Only the burst has to be small.
        sockets[0].listen(WAITING_TO_BE_ACCEPTED)
        # Accepted connections inherit the size. By itself it grows to megabytes for a client that reads nothing.
        sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNREAD)
        host, port = sockets[0].getsockname()[:2]
        self.say(f"serving on http://{f'[{host}]' if ':' in host else host}:{port}")


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 on one connection, within limits.

    A connection is `receiving` until a whole request has arrived. Where there are too many connections, the one that has
    been receiving for longest is closed for the new one: clients that send nothing keep nobody out.
    """

    def __init__(self, limits: ConnectionLimits, *arguments, **named):
        super().__init__(*arguments, **named)
        self.limits = limits
        self.receiving_since = self.loop.time()
        self._headers_due: asyncio.TimerHandle | None = None
        self._answer_due: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------ state

    @property
    def answering(self) -> bool:
        """Whether a request has begun that is not yet answered."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def receiving(self) -> bool:
        """Whether the client has yet to send the rest of a request, or to close."""
        return not (self.answering and self.conn.their_state in (h11.DONE, h11.MUST_CLOSE))

    def _watch(self) -> None:
        """Starts the clock for the next request's headers, or stops it where a request has begun."""
        if self.answering:
            self._headers_due = _cancelled(self._headers_due)
        elif self._headers_due is None:
            self.receiving_since = self.loop.time()
            self._headers_due = self.loop.call_later(self.limits.header_seconds, self._headers_are_late)

    # ------------------------------------------------------------ called by the event loop and by uvicorn

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > self.limits.connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._headers_due, self._answer_due = _cancelled(self._headers_due), _cancelled(self._answer_due)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        """Starts the clock for the answer: the client has left so much of it unread that uvicorn stops writing."""
        super().pause_writing()
        self._answer_due = self.loop.call_later(self.limits.answer_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._answer_due = _cancelled(self._answer_due)

    def send_400_response(self, msg: str) -> None:
        """Answers bytes that are no HTTP; uvicorn's own answer is plain text."""
        self._refuse(400, "no request of HTTP/1.1")

    # ------------------------------------------------------------ ends of a connection

    def _make_room(self) -> None:
        others = [one for one in self.connections if one is not self and one.receiving]
        if others:
            oldest = min(others, key=lambda one: one.receiving_since)
            # The event loop reports the loss later; until then it would be counted, and another one closed for it.
            self.connections.discard(oldest)
            oldest.transport.abort()
        else:
            self._refuse(503, f"{self.limits.connections} connections are being answered; try again")

    def _headers_are_late(self) -> None:
        self._headers_due = None
        if self.transport.is_closing():
            self.transport.abort()
        elif self.conn.trailing_data[0]:
            self._refuse(408, f"the headers did not arrive within {self.limits.header_seconds:g} s")
        else:
            self._close()

    def _close(self) -> None:
        self.transport.close()
        # The transport first sends the rest of an answer, which never ends where the client does not read.
        if self._headers_due is None:
            self._headers_due = self.loop.call_later(self.limits.header_seconds, self.transport.abort)

    def _refuse(self, status: int, message: str) -> None:
        """Answers without the application, in its form, and closes the connection."""
        # After the first bytes of another answer there is no place for this one.
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        body = json.dumps({"error": message}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), (b"connection", b"close")]
        start = h11.Response(status_code=status, headers=headers + HEADERS, reason=http.HTTPStatus(status).phrase)
        for event in (start, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self._close()
        log_access(self.client, "- -", status, self.loop.time() - self.receiving_since)


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
