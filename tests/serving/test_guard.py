"""The Host check, and the access log of requests as clients send them."""
import asyncio
import logging

import pytest
from prometheus_client import CollectorRegistry, Counter

from serving import guard
from serving.guard import Guard, Hosts, Limits

OWN = ("localhost", "localhost:8000", "LOCALHOST:8000", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000", "[::1]")
OUTSIDE = ("192.168.1.7:8000", "[fe80::1]:80", "0.0.0.0:8000", "gpu.lab:8000", "proxy.example", "this-machine")
FOREIGN = ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example",
           "localhost:8000@evil.example", "evil.example/localhost", "localhost evil.example", "[::1].evil.example", "[::1",
           "::1", "", ":8000", "localhost:port", "*", "lo\xf6calhost", None)


@pytest.mark.parametrize("header", [*OWN, *OUTSIDE, *FOREIGN])
def test_only_names_of_the_service_itself_are_allowed(monkeypatch, header):
    monkeypatch.setattr(guard.socket, "gethostname", lambda: "This-Machine")
    sent = None if header is None else header.encode("latin-1")
    assert Hosts().allows(sent) == (header in OWN)
    for host, address in (("127.0.0.1",) * 2, ("localhost", "127.0.0.1"), ("::1",) * 2, ("127.0.0.2",) * 2):
        assert Hosts.of(host, address).allows(sent) == (header in OWN)
    for host, address in (("0.0.0.0",) * 2, ("::",) * 2, ("GPU.lab", "192.168.1.7"), ("fe80::1%eth0",) * 2):
        hosts = Hosts.of(host, address, ("gpu.lab", "Proxy.example"))
        assert hosts.allows(sent) == (header in OWN + OUTSIDE)
        if header == "gpu.lab:8000":
            assert Hosts.of(host, address).allows(sent) == (host == "GPU.lab")
    behind_a_proxy = Hosts.of("127.0.0.1", "127.0.0.1", ["proxy.example"])
    assert behind_a_proxy.allows(sent) == (header in (*OWN, "proxy.example"))


def answer(path: bytes = b"/", host: bytes = b"localhost", app=None, messages=None, method: str = "GET") -> list[dict]:
    """The messages that a guarded application sends."""
    sent, messages = [], iter(messages or [{"type": "http.request", "body": b""}])

    async def receive():
        return next(messages)

    async def send(message):
        sent.append(message)

    async def hello(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello"})
    counter = Counter("requests", "", ["path", "status"], registry=CollectorRegistry())
    scope = {"type": "http", "method": method, "raw_path": path, "headers": [(b"host", host)], "client": ("10.0.0.9", 5)}
    asyncio.run(Guard(app or hello, Limits(), counter)(scope, receive, send))
    return sent


@pytest.mark.parametrize("path, logged", [
    (b"/v1/adapters", "/v1/adapters"), (b"/%0A10.0.0.9%20GET%20/secret", "/%0A10.0.0.9%20GET%20/secret"),
    (b"/" + b"x" * 9000, "/" + "x" * (guard.LONGEST_PATH - 1))])
def test_a_line_for_each_request_whatever_its_path(caplog, path, logged):
    with caplog.at_level(logging.INFO, "serving.access"):
        assert answer(path)[0]["status"] == 200
        answer(path, b"evil.example", method="DELETE")
        answer(path, messages=[{"type": "http.disconnect"}])
    client, method, where, status, _, unit = caplog.messages[0].split()
    assert (client, method, where, status, unit) == ("10.0.0.9", "GET", logged, "200", "ms")
    assert [message.split()[1:4] for message in caplog.messages[1:]] == [["DELETE", logged, "400"], ["GET", logged, "-"]]


def test_an_application_that_fails_is_logged_too(caplog):
    async def failing(scope, receive, send):
        raise RuntimeError
    with caplog.at_level(logging.INFO, "serving.access"), pytest.raises(RuntimeError):
        answer(app=failing)
    assert [message.split()[3] for message in caplog.messages] == ["-"]
