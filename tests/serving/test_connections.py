"""Idle and slow connections: each is closed in time, and none keeps others out."""
import asyncio
import contextlib
import json
import socket
import threading
import time

import pytest
import toy
from prometheus_client import CollectorRegistry, Counter

from benchmarks import fuzz_service
from experiments.serve import listen
from serving import connections
from serving.connections import ConnectionLimits, Server, most_connections
from serving.guard import Guard, Limits

pytestmark = pytest.mark.slow
GET = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"
SHORT = ConnectionLimits(connections=40, header_seconds=0.6, answer_seconds=0.6)


class App:
    """Answers 20 kB, once `go` is set."""

    def __init__(self):
        self.go, self.begun = asyncio.Event(), 0
        self.go.set()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        self.begun += 1
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"20000")]})
        await send({"type": "http.response.body", "body": b"x" * 20000})


@contextlib.contextmanager
def running(limits: ConnectionLimits):
    """A served `App`, its port and the server."""
    app, bound = App(), listen("127.0.0.1", 0)
    counter = Counter("requests", "", ["path", "status"], registry=CollectorRegistry())
    server = Server(Guard(app, Limits(body_seconds=0.6), counter), limits)
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    try:
        toy.until(lambda: server.started, 30)
        yield app, bound.getsockname()[1], server
    finally:
        app.go.set()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def connect(port: int, *pieces: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), 10)
    for piece in pieces:
        connection.sendall(piece)
    return connection


def closed(connection: socket.socket) -> bool:
    """Whether the other side has closed a connection from which there is nothing more to read."""
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


@pytest.mark.parametrize("kind", fuzz_service.SLOW, ids=lambda kind: kind.name.replace(" ", "_"))
def test_a_slow_client_loses_its_connection_and_leaves_nothing(kind):
    with running(SHORT) as (_, port, server):
        assert asyncio.run(fuzz_service._hold_one(port, kind, 60))
        toy.until(lambda: not server.server_state.connections and not server.server_state.tasks, 5)


@pytest.mark.parametrize("sent, status, says", [
    (b"GET / HTTP/1.1\r\nhost: local", 408, "the headers did not arrive within 0.6 s"),
    (GET + b"GET /", 408, "the headers did not arrive within 0.6 s"),
    (b"\x16\x03\x01 tls\r\n\r\n", 400, "no request of HTTP/1.1"),
    (b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 40000, 400, "no request of HTTP/1.1")])
def test_refusals_without_a_request_are_json_with_the_same_headers(sent, status, says):
    with running(SHORT) as (_, port, _), connect(port, sent) as connection:
        answer = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(65536):
                answer += piece
        head, body = answer[answer.rindex(b"HTTP/1.1 "):].split(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d" % status) and json.loads(body) == {"error": says}
        assert b"content-security-policy" in head and b"connection: close" in head


def test_a_client_in_time_is_served_and_may_come_again():
    with running(SHORT) as (_, port, _), connect(port) as connection:
        for _ in range(6):  # longer than header_seconds in all
            time.sleep(0.3)
            connection.sendall(GET)
            answer = b""
            while len(answer) < 20000:
                answer += connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200")


def test_more_connections_than_allowed_close_the_one_that_has_been_silent_for_longest():
    limits = ConnectionLimits(connections=20, header_seconds=60)
    with running(limits) as (_, port, server), contextlib.ExitStack() as stack:
        # A few at a time: a burst arrives in no order.
        idle = []
        for _ in range(60):
            idle.append(stack.enter_context(connect(port)))
            toy.until(lambda: len(server.server_state.connections) >= min(len(idle), 20), 5)
            time.sleep(0.005)
        start = time.monotonic()
        with connect(port, GET) as connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        assert time.monotonic() - start < 5
        toy.until(lambda: sum(map(closed, idle)) >= 40, 5)
        assert all(map(closed, idle[:35])) and not any(map(closed, idle[-15:]))
        assert len(server.server_state.connections) <= 20


def test_a_request_that_is_being_answered_is_never_closed_for_another():
    limits = ConnectionLimits(connections=5, header_seconds=60)
    with running(limits) as (app, port, _), contextlib.ExitStack() as stack:
        app.go.clear()
        busy = [stack.enter_context(connect(port, GET)) for _ in range(5)]
        toy.until(lambda: app.begun == 5, 10)
        with connect(port) as late:
            assert late.recv(100).startswith(b"HTTP/1.1 503")
        app.go.set()
        for connection in busy:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")


def test_half_of_the_files_are_left_to_the_process(monkeypatch):
    import resource

    for files, expected in ((256, 128), (1, 1), (1024, 512), (1 << 20, 600), (resource.RLIM_INFINITY, 600)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, files=files: (files, files))
        assert most_connections(600) == expected


def test_where_there_is_no_module_resource_the_number_stands(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "resource", None)
    assert connections.most_connections(600) == 600
