"""Sends a running service bodies by the thousand, made from its OpenAPI schema, and slow connections by the hundred.

    python run.py serve --adapter cola=RUN_DIR --adapters-root runs --quiet &
    python benchmarks/fuzz_service.py http://127.0.0.1:8000 --cases 2500 --connections 400

The bodies, valid and not, are schemathesis's. Each answer must be one that the schema documents, JSON where it says so, and
no server error; the service must still answer afterwards. The connections send nothing, or too slowly, or read no answer.
The service must answer other clients meanwhile, and must have closed each of them within --seconds. Exit status 0 if
nothing failed.
"""
from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parent.parent))

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

from benchmarks import load

LOOPBACK = ("127.0.0.1", "localhost")
PAUSE = 0.2  # seconds between two bytes of a slow client
PROBE_SECONDS = 5.0  # to answer another client meanwhile
POST = b"POST /v1/classify HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
GET = b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n"


@dataclass(frozen=True)
class Slow:
    """A client that holds its connection."""

    name: str
    first: bytes = b""  # sent at once
    more: bytes = b""  # sent after each pause
    reads: bool = True  # the answers


SLOW = (Slow("sends nothing"),
        Slow("sends its headers byte by byte", b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nx: ", b"x"),
        Slow("sends headers without end", POST, b"x: y\r\n"),
        Slow("sends its body byte by byte", POST + b"content-length: 1000\r\n\r\n", b"["),
        Slow("sends chunks without end", POST + b"transfer-encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        Slow("keeps its connection after an answer", GET),
        Slow("sends the next headers slowly", GET + b"GET /healthz HTTP/1.1\r\n", b"x"),
        Slow("speaks another protocol", b"\x16\x03\x01\x02\x00\x01", b"\x00"),
        Slow("reads no answer", 60 * GET, GET, reads=False))


def fuzz(url: str, cases: int, number: int = 0) -> dict:
    """Tries this many bodies on each operation that takes one, and as many names on the others.

    Every second body with texts names a served adapter or student, so that its texts are classified.

    Returns:
        tried and classified, their numbers, and failed, a description of each failure.
    """
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    served = served_names(url)
    result = {"tried": 0, "classified": 0, "failed": []}
    load_all_checks()
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    for operation in (found.ok() for found in schema.get_all_operations() if found.ok().method in ("post", "delete")):
        for mode in GenerationMode:
            @seed(number)
            @settings(max_examples=cases, deadline=None, database=None, phases=[Phase.generate],
                      suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def one(case) -> None:
                result["tried"] += 1
                asks = case.path == "/v1/classify" and isinstance(case.body, dict)
                if asks and result["tried"] % 2:
                    case.body.pop("student", None)
                    case.body["adapter"] = served[result["tried"] // 2 % len(served)]
                response = case.call(timeout=30)
                result["classified"] += asks and response.status_code == 200
                case.validate_response(response, checks=checks)
            try:
                one()
            except Unsatisfiable:  # nothing about the operation can be wrong
                pass
            except Exception as error:
                result["failed"].append(f"{operation.label}: {str(error)[:600]}")
    with urllib.request.urlopen(f"{url}/healthz", timeout=10) as answer:
        if json.load(answer) != {"status": "ok"}:
            result["failed"].append("the service no longer answers")
    return result


def served_names(url: str) -> list[str]:
    """Returns the names of the served adapters and students."""
    with urllib.request.urlopen(f"{url}/v1/adapters", timeout=10) as answer:
        listed = json.load(answer)
    return [entry["name"] for entry in (*listed["adapters"], *listed["students"])]


def hold(url: str, connections: int, seconds: float) -> dict:
    """Holds connections of every slow kind at once, and asks the service meanwhile on connections of its own.

    Args:
        url: of a service on this machine; others are refused.
        connections: their number.
        seconds: until the service must have closed all of them.

    Returns:
        tried (connections and requests meanwhile), slowest (seconds of such a request), and failed, a description of each
        failure.
    """
    address = urlsplit(url)
    if address.hostname not in LOOPBACK:
        raise SystemExit(f"{url}: slow connections are for a service on this machine; expected one of {', '.join(LOOPBACK)}")
    question = {"adapter": served_names(url)[0], "texts": ["A sentence."]}
    return asyncio.run(_hold(address.port, connections, seconds, question))


async def _hold(port: int, connections: int, seconds: float, question: dict) -> dict:
    kinds = [SLOW[i % len(SLOW)] for i in range(connections)]
    clients = [asyncio.create_task(_hold_one(port, kind, seconds)) for kind in kinds]
    result = {"tried": connections, "slowest": 0.0, "failed": []}
    # All of them share this process with the requests below, and first have to be connected.
    await asyncio.sleep(1)
    while not all(client.done() for client in clients):
        for method, path, body in (("GET", "/healthz", None), ("POST", "/v1/classify", question)):
            result["tried"] += 1
            # A client of its own each time: the service has to accept new connections, not to keep the old ones.
            client, start = load.Client(port), time.monotonic()
            try:
                async with asyncio.timeout(PROBE_SECONDS):
                    answer = await client.call(method, path, body)
                if answer.status != 200:
                    result["failed"].append(f"{path} meanwhile: {answer.status} {answer.body}")
            except TimeoutError:
                result["failed"].append(f"{path} meanwhile: no answer within {PROBE_SECONDS:g} s")
            client.close()
            result["slowest"] = max(result["slowest"], time.monotonic() - start)
        await asyncio.sleep(PAUSE)
    for kind, client in zip(kinds, clients, strict=True):
        if not client.result():
            result["failed"].append(f"a client that {kind.name} still had its connection after {seconds:g} s")
    return result


async def _hold_one(port: int, kind: Slow, seconds: float) -> bool:
    """Holds one connection; returns whether the service closed it in time."""
    loop = asyncio.get_running_loop()
    with socket.socket() as connection:
        connection.setblocking(False)
        # A small buffer here, so that unread answers fill the service's.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        try:
            async with asyncio.timeout(seconds):
                await loop.sock_connect(connection, ("127.0.0.1", port))
                await loop.sock_sendall(connection, kind.first)
                while True:
                    if not kind.reads:
                        await asyncio.sleep(PAUSE)
                    elif await _closed(loop, connection):
                        return True
                    await loop.sock_sendall(connection, kind.more)
        except TimeoutError:
            return False
        except OSError:
            return True


async def _closed(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> bool:
    """Reads for a pause; returns whether the other side closed the connection."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PAUSE):
            while await loop.sock_recv(connection, 65536):
                pass
            return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--cases", type=int, default=2500, help="of each operation, valid and not")
    parser.add_argument("--connections", type=int, default=400, help="slow ones, held at the same time")
    parser.add_argument("--seconds", type=float, default=60.0, help="until the service must have closed each of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    result, held = fuzz(args.url.rstrip("/"), args.cases, args.seed), hold(args.url, args.connections, args.seconds)
    result = {**result, "tried": result["tried"] + held["tried"], "connections": args.connections,
              "slowest_meanwhile": round(held["slowest"], 3), "failed": result["failed"] + held["failed"]}
    if args.json:
        from benchmarks import common  # late: it sets the environment that libraries read when imported

        print(common.result({"seed": args.seed, **result}))
    else:
        print(f"{result['tried']:,} tried, {result['classified']:,} of them classified, {args.connections:,} of them slow "
              f"(slowest answer meanwhile {held['slowest']:.2f} s), {len(result['failed'])} failed",
              *result["failed"], sep="\n  ")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
