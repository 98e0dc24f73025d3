"""The HTTP service: adapters and students by name, a page that asks them, and numbers for Prometheus.

    app = create_app(Worker(bank, students), Limits())

`POST /v1/classify` `{"adapter": NAME, "texts": [...]}`, `GET /v1/adapters`, `POST /v1/adapters`,
`DELETE /v1/adapters/{name}`, `GET /healthz`, `GET /metrics`, and the page at `/`. Every error is JSON: `{"error": "..."}`.
"""
from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from data.segments import reads_pairs
from machine.errors import UserError
from metrics.problems import recorded_problem
from serving.bank import NAME, AdapterBank, LoadedAdapter
from serving.guard import Guard, Limits, error_response, json_response
from serving.worker import Full, Key, Student, Worker

PAGE = Path(__file__).parent / "page"
MEDIA = {"index.html": "text/html", "page.js": "text/javascript", "style.css": "text/css", "favicon.svg": "image/svg+xml"}
JSON_TYPE = "application/json"


class Question(BaseModel):
    """Texts for an adapter, or for a student."""

    model_config = ConfigDict(extra="forbid")
    adapter: str | None = Field(None, description="name of an adapter, or of a student where no adapter has it")
    student: str | None = Field(None, description="name of a student, instead of adapter")
    texts: Annotated[list[str], Field(min_length=1)]


class Result(BaseModel):
    """The class of a text; several labels of it, or a number."""

    label: str
    name: str | None = Field(None, description="name of the class, where the label is a number of the task's files")
    probability: float | None = Field(None, description="of the label; of several the least; a number has none")
    probabilities: dict[str, float] | None = None
    labels: list[str] | None = Field(None, description="of a model of several labels at once")
    score: float | None = Field(None, description="of a model of numbers")
    truncated: bool | None = Field(None, description="true where the model read only a part of a longer text")
    unknown_words: list[str] | None = Field(None, description="words that the built-in model never saw")


class Answer(BaseModel):
    """The classes of a request's texts, in their order."""

    adapter: str | None = None
    student: str | None = None
    results: list[Result]


class NewAdapter(BaseModel):
    """A run's folder to serve under a name."""

    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    folder: Annotated[str, Field(min_length=1, description="below --adapters-root")]


class Error(BaseModel):
    """The form of every error."""

    error: str


def _errors(*statuses: int) -> dict:
    """Returns the errors of an endpoint for the schema: those of every endpoint, and its own."""
    return {status: {"model": Error} for status in (400, 408, 413, 415, 422, 429, 500, 504, *statuses)}


class Metrics:
    """The numbers for Prometheus.

    No label holds a word that a client makes up, except the names of adapters that clients add; their series go with them.
    """

    def __init__(self, worker: Worker):
        self.registry = CollectorRegistry()
        self.requests = Counter("requests", "Answered requests", ["path", "status"], registry=self.registry)
        self.texts = Counter("texts", "Classified texts", ["kind", "model"], registry=self.registry)
        self.seconds = Histogram("classify_seconds", "From a request's arrival to its answer", registry=self.registry)
        self.batch_texts = Histogram("batch_texts", "Texts of a batch", registry=self.registry,
                                     buckets=[1, 2, 4, 8, 16, 32, 64, 128, 256])
        self.batch_seconds = Histogram("batch_seconds", "Seconds to compute a batch", registry=self.registry)
        Gauge("queue_texts", "Accepted texts without an answer yet", registry=self.registry).set_function(
            lambda: worker.waiting)
        Gauge("adapters", "Loaded adapters", registry=self.registry).set_function(lambda: len(worker.adapters))
        self.worker = worker
        worker.on_batch = self.batch

    def classified(self, key: Key, texts: int, seconds: float) -> None:
        """Counts the texts of an answered request, unless its adapter was removed meanwhile."""
        self.seconds.observe(seconds)
        if self.worker.serves(key):
            self.texts.labels(*key).inc(texts)

    def forget(self, key: Key) -> None:
        """Removes the series of an adapter."""
        # An adapter that classified nothing has no series.
        with contextlib.suppress(KeyError):
            self.texts.remove(*key)

    def batch(self, texts: int, seconds: float) -> None:
        self.batch_texts.observe(texts)
        self.batch_seconds.observe(seconds)


def create_app(worker: Worker, limits: Limits) -> Guard:
    """Makes the ASGI application. It starts and stops the worker."""
    metrics = Metrics(worker)

    @contextlib.asynccontextmanager
    async def lifespan(_):
        worker.start()
        yield
        await worker.stop()

    app = FastAPI(title="Text classification", docs_url=None, redoc_url=None, lifespan=lifespan)
    _add_errors(app)
    _add_classification(app, worker, limits, metrics)
    _add_adapters(app, worker, limits, metrics)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Says that the service is up."""
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {CONTENT_TYPE_LATEST.split(";")[0]: {}}}})
    async def prometheus() -> Response:
        """Numbers for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    # The page is a few small files. A folder of static files would need a check of paths.
    for name in MEDIA:
        app.add_api_route("/" if name == "index.html" else f"/{name}", _file(name), include_in_schema=False)
    return Guard(app, limits, metrics.requests)


def _file(name: str) -> Callable[[], Response]:
    """Returns the endpoint of one of the page's files."""
    content = (PAGE / name).read_bytes()

    def file() -> Response:
        return Response(content, media_type=MEDIA[name])
    return file


def _add_errors(app: FastAPI) -> None:
    """Makes every error JSON."""
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        # FastAPI parses a body of type JSON only, and would call any other "no dictionary".
        if isinstance(error.body, bytes):
            given = request.headers.get("content-type")
            given = "is missing" if given is None else f"is {given[:80]!r}"
            return error_response(415, f"the header Content-Type {given}; expected {JSON_TYPE}")
        # The first error is enough for one line.
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        if first["type"] == "json_invalid":
            return error_response(400, f"not JSON: {first.get('ctx', {}).get('error', first['msg'])} at character {where}")
        return error_response(422, f"{where or 'the body'}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def refused(_, error: HTTPException) -> Response:
        return error_response(error.status_code, error.detail, error.headers)

    @app.exception_handler(Exception)
    async def failed(_, error: Exception) -> Response:
        return error_response(500, f"the service failed ({type(error).__name__})")


def _add_classification(app: FastAPI, worker: Worker, limits: Limits, metrics: Metrics) -> None:
    """Adds the endpoint that classifies."""
    @app.post("/v1/classify", response_model=Answer, response_model_exclude_none=True, responses=_errors(404))
    async def classify(question: Question) -> Response:
        """Returns label and probabilities of each text."""
        start = time.perf_counter()
        if (question.adapter is None) == (question.student is None):
            return error_response(422, "expected either adapter or student")
        try:
            key = worker.find(question.adapter) if question.student is None else worker.find(question.student, ("student",))
        except UserError as error:
            return error_response(404, error)
        # A request that the queue could never hold is refused for its size: to try again would not help.
        most = min(limits.texts, worker.max_queue)
        if len(question.texts) > most:
            return error_response(413, f"{len(question.texts)} texts; expected at most {most} in a request")
        # Tokenisation of a very long text would hold up every other request.
        for number, text in enumerate(question.texts):
            if len(text) > limits.characters:
                return error_response(
                    413, f"texts.{number}: {len(text):,} characters; expected at most {limits.characters:,}")
        try:
            async with asyncio.timeout(limits.seconds):
                results = await worker.classify(key, question.texts)
        except Full:
            return error_response(429, f"{worker.waiting} texts wait already; try again", {"retry-after": "1"})
        except TimeoutError:
            return error_response(504, f"no answer within {limits.seconds:g} s")
        # One bad text refuses its request: a client that misses an error in a list would take it for an answer.
        for number, result in enumerate(results):
            if isinstance(result, UserError):
                # An adapter that was removed while the request waited is unknown, as it would be to the next request.
                removed = str(result).startswith("unknown adapter")
                return error_response(404, result) if removed else error_response(422, f"texts.{number}: {result}")
        metrics.classified(key, len(results), time.perf_counter() - start)
        asked = {"adapter": question.adapter} if question.student is None else {"student": question.student}
        return json_response({**asked, "results": results})


def _listed_adapter(name: str, entry: LoadedAdapter, tokenizer) -> dict:
    return {"name": name, "task": entry.task, "classes": entry.reading.classes, "class_names": entry.reading.names,
            "parameters": entry.parameters, "pairs": reads_pairs(tokenizer), **recorded_problem(entry.reading.problem)}


def _listed_student(name: str, student: Student, adapters: dict[str, LoadedAdapter]) -> dict:
    """Describes a student. Its teacher is the adapter of its name, or the one of the weights that it was distilled from."""
    teachers = [other for other, entry in adapters.items() if entry.sha256 in student.teacher_sha256]
    parameters = sum(p.numel() for p in student.model.parameters())
    return {"name": name, "task": student.task, "classes": student.reading.classes, "class_names": student.reading.names,
            "parameters": parameters, "pairs": reads_pairs(student.tokenizer),
            "teacher": name if name in adapters else next(iter(teachers), None),
            **recorded_problem(student.reading.problem)}


def _add_adapters(app: FastAPI, worker: Worker, limits: Limits, metrics: Metrics) -> None:
    """Adds the endpoints that list, add and remove adapters."""
    def load(bank: AdapterBank, name: str, folder: Path) -> None:
        # The worker's thread runs this between two batches, so that no other request can take the last place meanwhile.
        if len(bank.entries) >= limits.adapters:
            raise _TooMany(f"{limits.adapters} adapters are loaded; expected at most that many, so remove one first")
        bank.add_run(name, folder)

    @app.get("/v1/adapters")
    async def adapters() -> Response:
        """Lists the served adapters and students."""
        # The worker's thread may change the bank's own dictionary meanwhile.
        entries = dict(worker.adapters)
        return json_response({
            "base": worker.bank.model if worker.bank else None,
            "adapters": [_listed_adapter(name, entry, worker.bank.tokenizer) for name, entry in entries.items()],
            "students": [_listed_student(name, student, entries) for name, student in worker.students.items()]})

    @app.post("/v1/adapters", status_code=201, responses=_errors(403, 404, 409))
    async def add(new: NewAdapter) -> Response:
        """Adds an adapter from a folder below --adapters-root."""
        if limits.adapters_root is None or worker.bank is None:
            return error_response(
                403, "adapters can be added only where the service was started with --adapter and --adapters-root")
        # Links are followed before the check, so that none leads out of the root.
        root = limits.adapters_root.resolve()
        try:
            folder = (root / new.folder).resolve()
        except (OSError, ValueError, RuntimeError):
            # The path is too long, holds a NUL, or is a loop of links.
            return error_response(404, "folder: no such folder below --adapters-root")
        if not folder.is_relative_to(root):
            return error_response(403, "folder: outside --adapters-root")
        if not _is_folder(folder):
            return error_response(404, "folder: no such folder below --adapters-root")
        if new.name in worker.bank.entries or new.name in worker.students:
            return error_response(409, f"adapter {new.name}: the name is taken")
        try:
            await worker.call(load, worker.bank, new.name, folder)
        except Full:
            return error_response(429, "too many requests wait; try again", {"retry-after": "1"})
        except _TooMany as error:
            return error_response(409, error)
        except UserError as error:
            taken = new.name in worker.bank.entries
            # Name the folder as the client does: the place of the root is no client's business.
            return error_response(409 if taken else 400, str(error).replace(str(folder), new.folder))
        return json_response({"name": new.name}, 201)

    @app.delete("/v1/adapters/{name}", responses=_errors(404))
    async def remove(name: str) -> Response:
        """Removes an adapter; requests that were accepted before are answered."""
        if name not in worker.adapters:
            return error_response(404, f"unknown adapter {name[:80]!r}")
        try:
            await worker.call(worker.bank.remove, name)
        except Full:
            return error_response(429, "too many requests wait; try again", {"retry-after": "1"})
        except UserError as error:
            # Another request has removed it meanwhile.
            return error_response(404, error)
        metrics.forget(("adapter", name))
        return json_response({"name": name})


class _TooMany(Exception):
    """The bank holds its largest number of adapters."""


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False
