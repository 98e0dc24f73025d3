"""Sends requests to the service on loopback: several clients at a time, each with one kept connection, each request timed.

    answers = asyncio.run(load.ask(port, [{"adapter": "cola", "texts": ["A sentence."]}, ...], clients=64))
"""
from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass

LIMIT = 120  # seconds after which a request counts as lost


@dataclass(frozen=True)
class Answer:
    """Holds a client's answer; the status is None if the connection ended without one."""

    status: int | None
    body: dict
    seconds: float


class Client:
    """Keeps one connection, and opens another after it was closed."""

    def __init__(self, port: int):
        self.port, self.writer = port, None

    async def call(self, method: str, path: str, body=None) -> Answer:
        """Sends a request and reads its answer."""
        start = time.perf_counter()
        try:
            async with asyncio.timeout(LIMIT):
                status, answer = await self._exchange(method, path, body)
        # A lost answer is a result, which the benchmark counts; the connection's state is unknown by then.
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            self.close()
            status, answer = None, {"error": repr(error)}
        return Answer(status, answer, time.perf_counter() - start)

    async def _exchange(self, method: str, path: str, body) -> tuple[int, dict]:
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        content = b"" if body is None else json.dumps(body).encode()
        self.writer.write(f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                          f"content-length: {len(content)}\r\n\r\n".encode() + content)
        # The service sends no chunked bodies: a length stands in every head.
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = int(head.split("content-length:")[1].split("\r\n")[0])
        answer = json.loads(await self.reader.readexactly(length))
        if "connection: close" in head:
            self.close()
        return int(head.split()[1]), answer

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


async def ask(port: int, questions: list[dict], clients: int) -> list[Answer]:
    """Posts questions to /v1/classify from a number of clients; returns the answers in the questions' order."""
    answers: list[Answer | None] = [None] * len(questions)
    # One iterator for all clients: whoever is free takes the next question.
    waiting = iter(enumerate(questions))

    async def work() -> None:
        client = Client(port)
        for number, question in waiting:
            answers[number] = await client.call("POST", "/v1/classify", question)
        client.close()
    await asyncio.gather(*(work() for _ in range(clients)))
    return answers
