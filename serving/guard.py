"""The door of the service: limits on requests, the Host check, security headers, and one access log line per request.

    app = Guard(application, Limits(), counter)

ASGI around the whole application (https://asgi.readthedocs.io/en/latest/specs/www.html). The limits on connections, which
begin before there is a request, are in serving/connections.py.
"""
from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import re
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import Counter
from starlette.responses import Response

ACCESS = logging.getLogger("serving.access")
DRAINED = 8  # a body up to this many times the largest accepted one is read before the refusal
LONGEST_PATH = 200  # characters of a path in the access log
# The page shows texts and class names of anybody: it may run its own script alone, and stand in no other page.
HEADERS = [(b"content-security-policy",
            b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
            b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
           (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"), (b"cache-control", b"no-store")]
HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:/@\s]+))(?::\d*)?")  # [IPv6] or a name, then a port


@dataclass(frozen=True)
class Hosts:
    """The Host headers that the service answers to.

    A page of another site can point a name of its own at 127.0.0.1 (DNS rebinding); the browser then takes the service for
    that site's, and lets its scripts add and remove adapters. The Host header still holds the foreign name. An IP address
    is no name that anybody could rebind.
    """

    names: frozenset[str] = frozenset({"localhost"})
    any_address: bool = False  # every IP address, not the loopback ones alone

    @classmethod
    def of(cls, host: str, address: str, more: Iterable[str] = ()) -> Hosts:
        """Returns the hosts of a service: loopback alone, unless it listens on another address.

        Args:
            host: as given by --host.
            address: of the bound socket.
            more: further names, of a proxy for example.
        """
        # A zone (fe80::1%eth0) is the machine's own affair and stands in no Host header.
        outside = not ipaddress.ip_address(address.partition("%")[0]).is_loopback
        own = [socket.gethostname()] if outside else []
        return cls(frozenset(name.lower() for name in ("localhost", host, *own, *more)), outside)

    def allows(self, header: bytes | None) -> bool:
        """Returns whether a Host header, with or without a port, names this service."""
        found = HOST.fullmatch((header or b"").decode("latin-1").lower())
        if found is None:
            return False
        name = found[1] or found[2]
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name in self.names
        return self.any_address or address.is_loopback or name in self.names


@dataclass(frozen=True)
class Limits:
    """Limits on the requests of a client."""

    texts: int = 256  # of a request
    characters: int = 20000  # of a text
    body: int = 1 << 20  # bytes of a request's body
    body_seconds: float = 10.0  # to send it
    seconds: float = 30.0  # to answer it
    adapters: int = 1024  # loaded at a time
    adapters_root: Path | None = None  # the folder of the adapters that clients may add; None: they may add none
    hosts: Hosts = field(default_factory=Hosts)


def json_response(value, status: int = 200, headers: dict | None = None) -> Response:
    """Returns JSON for any strings: lone surrogates are escaped."""
    return Response(json.dumps(value), status, headers, "application/json")


def error_response(status: int, message, headers: dict | None = None) -> Response:
    """Returns `{"error": message}`, the form of every error."""
    return json_response({"error": str(message)[:1000]}, status, headers)


class Guard:
    """Checks the host, reads the body within its limits, adds the security headers, counts and logs the answer.

    Args:
        app: the application.
        requests: counts answers by the labels path and status.
    """

    def __init__(self, app, limits: Limits, requests: Counter):
        self.app, self.limits, self.requests = app, limits, requests

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.perf_counter(), None

        # Headers, count and log need the status of whatever answers: the application, or a refusal of the guard's own.
        async def guarded(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                # Label by route: a label by path would be a new series for each path that a client makes up.
                self.requests.labels(getattr(scope.get("route"), "path", "other"), status).inc()
                message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
            await send(message)

        try:
            await self._answer(scope, receive, guarded)
        finally:
            log_access(scope["client"], f"{scope['method']} {scope['raw_path'].decode('latin-1')[:LONGEST_PATH]}", status,
                       time.perf_counter() - start)

    async def _answer(self, scope, receive, send) -> None:
        # Before the body is read: a refused client must not cost its memory.
        host = dict(scope["headers"]).get(b"host")
        if not self.limits.hosts.allows(host):
            given = "is missing" if host is None else f"names {host.decode('latin-1')[:80]!r}"
            refused = error_response(400, f"the Host header {given}; expected an address or name of this service "
                                          "(--allowed-host adds one)", {"connection": "close"})
            return await refused(scope, receive, send)
        body, refused = await self._body(scope, receive)
        if refused is not None:
            return await refused(scope, receive, send)
        # Without a body and a refusal the client has gone.
        if body is None:
            return None
        # The application asks for the body once more, and afterwards only to learn that the client has gone.
        given = False

        async def replay():
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return await self.app(scope, replay, send)

    async def _body(self, scope, receive) -> tuple[bytes | None, Response | None]:
        """Reads the body; returns it, or the answer that refuses it.

        A body that is too large is read to its end and dropped, unless it is far too large: most clients read no answer
        before they have sent everything.
        """
        most, close = self.limits.body, {"connection": "close"}
        too_large = error_response(413, f"the body is larger than {most:,} bytes", close)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > DRAINED * most:
            return None, too_large
        parts, size = [], 0
        # One deadline for the whole body: a deadline for each part would let a client send a byte at a time for ever.
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None, None
                    size += len(message.get("body", b""))
                    # The rest of a body that is too large costs time, but no memory.
                    if size <= most:
                        parts.append(message.get("body", b""))
                    ended = not message.get("more_body", False)
                    if size > DRAINED * most or ended and size > most:
                        return None, too_large
                    if ended:
                        return b"".join(parts), None
        except TimeoutError:
            return None, error_response(408, f"the body did not arrive within {self.limits.body_seconds:g} s", close)


def log_access(client: tuple[str, int] | None, request: str, status: int | None, seconds: float) -> None:
    """Logs one request: client, method and path as they were sent, status (- without an answer), milliseconds.

    Method and path hold no space and no control character (h11 refuses others), so a line has the same fields always.
    """
    ACCESS.info("%s %s %s %.1f ms", client[0] if client else "-", request, status or "-", 1000 * seconds)
