"""The HTTP service: adapters and students by name, a page that asks them, and numbers for Prometheus.

    app = create_app(Worker(bank, students), Limits())

`POST /v1/classify` `{"adapter": NAME, "texts": [...]}`, `GET /v1/adapters`, `POST /v1/adapters`,
`DELETE /v1/adapters/{name}`, `GET /healthz`, `GET /metrics`, and the page at `/`. Every error is JSON: `{"error": "..."}`.
"""
from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from machine.errors import UserError
from serving.bank import NAME
from serving.worker import Full, Worker

PAGE = Path(__file__).parent / "page"
MEDIA = {"index.html": "text/html", "page.js": "text/javascript", "style.css": "text/css"}
DRAINED = 8  # times the largest body that is taken: so much of a larger one is read before it is refused
HEADERS = [(b"content-security-policy",
            b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; "
            b"form-action 'none'; frame-ancestors 'none'"),
           (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"), (b"cache-control", b"no-store")]


@dataclass(frozen=True)
class Limits:
    """What a client may ask for."""

    texts: int = 256  # of a request
    characters: int = 20000  # of a text
    body: int = 1 << 20  # bytes of a request's body
    body_seconds: float = 10.0  # to send it
    seconds: float = 30.0  # to answer it
    adapters_root: Path | None = None  # from which adapters may be added


class Question(BaseModel):
    """Texts for an adapter, or for a student."""

    model_config = ConfigDict(extra="forbid")
    adapter: str | None = Field(None, description="name of an adapter, or of a student where no adapter has it")
    student: str | None = Field(None, description="name of a student, instead of adapter")
    texts: Annotated[list[str], Field(min_length=1)]


class Result(BaseModel):
    label: str
    probability: float
    probabilities: dict[str, float]


class Answer(BaseModel):
    adapter: str | None = None
    student: str | None = None
    results: list[Result]


class NewAdapter(BaseModel):
    """A run's folder to serve under a name."""

    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    folder: Annotated[str, Field(min_length=1, description="below --adapters-root")]


class Error(BaseModel):
    error: str


def _errors(*statuses: int) -> dict:
    return {status: {"model": Error} for status in (400, 408, 413, 422, 429, 500, 504, *statuses)}


def _json(value, status: int = 200, headers: dict | None = None) -> Response:
    """Returns JSON whatever the strings hold: lone surrogates are escaped."""
    return Response(json.dumps(value), status, headers, "application/json")


def _error(status: int, message, headers: dict | None = None) -> Response:
    return _json({"error": str(message)[:1000]}, status, headers)


class Metrics:
    """What Prometheus is told."""

    def __init__(self, worker: Worker):
        self.registry = CollectorRegistry()
        self.requests = Counter("requests", "Answered requests", ["path", "status"], registry=self.registry)
        self.texts = Counter("texts", "Classified texts", ["kind", "model"], registry=self.registry)
        self.seconds = Histogram("classify_seconds", "From a request's arrival to its answer", registry=self.registry)
        self.batch_texts = Histogram("batch_texts", "Texts of a batch", registry=self.registry,
                                     buckets=[1, 2, 4, 8, 16, 32, 64, 128, 256])
        self.batch_seconds = Histogram("batch_seconds", "Seconds that a batch was computed", registry=self.registry)
        Gauge("queue_texts", "Texts that wait for their answer", registry=self.registry).set_function(lambda: worker.waiting)
        Gauge("adapters", "Adapters that are loaded", registry=self.registry).set_function(
            lambda: len(worker.bank.entries) if worker.bank else 0)
        worker.on_batch = self.batch

    def batch(self, texts: int, seconds: float) -> None:
        self.batch_texts.observe(texts)
        self.batch_seconds.observe(seconds)


class Guard:
    """Reads a request's body within its limits of size and time; puts the security headers on every answer, and counts it.

    ASGI around the whole application (https://asgi.readthedocs.io/en/latest/specs/www.html).
    """

    def __init__(self, app, limits: Limits, metrics: Metrics):
        self.app, self.limits, self.metrics = app, limits, metrics

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def guarded(message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(getattr(scope.get("route"), "path", "other"), message["status"]).inc()
                message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
            await send(message)

        body, refused = await self._body(scope, receive)
        if refused is not None:
            return await refused(scope, receive, guarded)
        if body is None:
            return None  # the client went away
        given = False

        async def replay():
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return await self.app(scope, replay, guarded)

    async def _body(self, scope, receive) -> tuple[bytes | None, Response | None]:
        """Reads the body; returns it, or the answer that refuses it.

        A body that is too large is read to its end, and dropped, unless it is far too large: most clients read no answer
        before they have sent everything.
        """
        most, close = self.limits.body, {"connection": "close"}
        too_large = _error(413, f"the body is larger than {most:,} bytes", close)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > DRAINED * most:
            return None, too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None, None
                    size += len(message.get("body", b""))
                    if size <= most:
                        parts.append(message.get("body", b""))
                    ended = not message.get("more_body", False)
                    if size > DRAINED * most or ended and size > most:
                        return None, too_large
                    if ended:
                        return b"".join(parts), None
        except TimeoutError:
            return None, _error(408, f"the body did not arrive within {self.limits.body_seconds:g} s", close)


def create_app(worker: Worker, limits: Limits) -> Guard:
    """Makes the ASGI application, which starts and stops the worker."""
    metrics = Metrics(worker)

    @contextlib.asynccontextmanager
    async def lifespan(_):
        worker.start()
        yield
        await worker.stop()

    app = FastAPI(title="Text classification", docs_url=None, redoc_url=None, lifespan=lifespan)
    _add_errors(app)
    _add_classification(app, worker, limits, metrics)
    _add_adapters(app, worker, limits)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Says that the service is up."""
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {CONTENT_TYPE_LATEST.split(";")[0]: {}}}})
    async def prometheus() -> Response:
        """Numbers for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    for path, name in (("/", "index.html"), ("/page.js", "page.js"), ("/style.css", "style.css")):
        app.add_api_route(path, _file(name), include_in_schema=False)
    return Guard(app, limits, metrics)


def _file(name: str) -> Callable[[], Response]:
    """Returns the endpoint of one of the page's files."""
    content = (PAGE / name).read_bytes()

    def file() -> Response:
        return Response(content, media_type=MEDIA[name])
    return file


def _add_errors(app: FastAPI) -> None:
    """Makes every error JSON."""
    @app.exception_handler(RequestValidationError)
    async def invalid(_, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        if first["type"] == "json_invalid":
            return _error(400, f"not JSON: {first.get('ctx', {}).get('error', first['msg'])} at character {where}")
        return _error(422, f"{where or 'the body'}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def refused(_, error: HTTPException) -> Response:
        return _error(error.status_code, error.detail, error.headers)

    @app.exception_handler(Exception)
    async def failed(_, error: Exception) -> Response:
        return _error(500, f"the service failed ({type(error).__name__})")


def _add_classification(app: FastAPI, worker: Worker, limits: Limits, metrics: Metrics) -> None:
    @app.post("/v1/classify", response_model=Answer, response_model_exclude_none=True, responses=_errors(404))
    async def classify(question: Question) -> Response:
        """Returns label and probabilities of each text."""
        start = time.perf_counter()
        if (question.adapter is None) == (question.student is None):
            return _error(422, "expected either adapter or student")
        try:
            key = worker.find(question.adapter) if question.student is None else worker.find(question.student, ("student",))
        except UserError as error:
            return _error(404, error)
        most = min(limits.texts, worker.max_queue)  # refuse what the queue could never hold
        if len(question.texts) > most:
            return _error(413, f"{len(question.texts)} texts; expected at most {most} in a request")
        for number, text in enumerate(question.texts):
            if len(text) > limits.characters:
                return _error(413, f"texts.{number}: {len(text):,} characters; expected at most {limits.characters:,}")
        try:
            async with asyncio.timeout(limits.seconds):
                results = await worker.classify(key, question.texts)
        except Full:
            return _error(429, f"{worker.waiting} texts wait already; try again", {"retry-after": "1"})
        except TimeoutError:
            return _error(504, f"no answer within {limits.seconds:g} s")
        for number, result in enumerate(results):
            if isinstance(result, UserError):
                removed = str(result).startswith("unknown adapter")  # removed while the request waited
                return _error(404, result) if removed else _error(422, f"texts.{number}: {result}")
        metrics.texts.labels(*key).inc(len(results))
        metrics.seconds.observe(time.perf_counter() - start)
        asked = {"adapter": question.adapter} if question.student is None else {"student": question.student}
        return _json({**asked, "results": results})


def _add_adapters(app: FastAPI, worker: Worker, limits: Limits) -> None:
    @app.get("/v1/adapters")
    async def adapters() -> Response:
        """Lists the adapters and students that are served."""
        entries = dict(worker.bank.entries) if worker.bank else {}
        return _json({
            "base": worker.bank.model if worker.bank else None,
            "adapters": [{"name": name, "task": entry.task, "classes": entry.reading.classes, "parameters": entry.parameters}
                         for name, entry in entries.items()],
            "students": [{"name": name, "task": student.task, "classes": student.reading.classes,
                          "parameters": sum(p.numel() for p in student.model.parameters()),
                          "teacher": name if name in entries else next(
                              (other for other, entry in entries.items() if entry.sha256 in student.teacher_sha256), None)}
                         for name, student in worker.students.items()]})

    @app.post("/v1/adapters", status_code=201, responses=_errors(403, 404, 409))
    async def add(new: NewAdapter) -> Response:
        """Adds an adapter from a folder below --adapters-root."""
        if limits.adapters_root is None or worker.bank is None:
            return _error(403, "adapters can be added only where the service was started with --adapter and --adapters-root")
        root = limits.adapters_root.resolve()
        try:
            folder = (root / new.folder).resolve()
        except (OSError, ValueError, RuntimeError):  # too long, with a NUL, or a loop of links
            return _error(404, "folder: no such folder below --adapters-root")
        if not folder.is_relative_to(root):
            return _error(403, "folder: outside --adapters-root")
        if not _is_folder(folder):
            return _error(404, "folder: no such folder below --adapters-root")
        if new.name in worker.bank.entries or new.name in worker.students:
            return _error(409, f"adapter {new.name}: the name is taken")
        try:
            await worker.call(worker.bank.load, new.name, folder)
        except Full:
            return _error(429, "too many requests wait; try again", {"retry-after": "1"})
        except UserError as error:
            taken = new.name in worker.bank.entries
            # Name the folder as the client does: where the root stands is no client's business.
            return _error(409 if taken else 400, str(error).replace(str(folder), new.folder))
        return _json({"name": new.name}, 201)

    @app.delete("/v1/adapters/{name}", responses=_errors(404))
    async def remove(name: str) -> Response:
        """Removes an adapter; requests that were accepted before are answered."""
        if worker.bank is None or name not in worker.bank.entries:
            return _error(404, f"unknown adapter {name[:80]!r}")
        try:
            await worker.call(worker.bank.remove, name)
        except Full:
            return _error(429, "too many requests wait; try again", {"retry-after": "1"})
        except UserError as error:  # removed by another request
            return _error(404, error)
        return _json({"name": name})


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False
