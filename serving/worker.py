"""The one thread that computes: requests that arrive within a few milliseconds share a batch, across adapters.

    worker = Worker(bank, students)
    worker.start()                                    # in the event loop
    results = await worker.classify(("adapter", "cola"), ["A sentence."])
    await worker.stop()                               # answers the accepted requests
"""
from __future__ import annotations

import asyncio
import queue
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from machine.errors import UserError
from machine.hardware import device
from serving.bank import NAME, AdapterBank, LoadedAdapter
from serving.texts import Reading, classify

WINDOW = 0.003  # seconds that a batch stays open for the next request
SHARE, LONGEST = 0.025, 4  # or this share of the last batch's seconds; LONGEST times as long in all
BATCH_TEXTS = 64  # enough to begin at once

Key = tuple[str, str]  # ("adapter" or "student", name)


@dataclass(frozen=True)
class Student:
    """A distilled model that the service offers next to the adapters."""

    model: torch.nn.Module
    tokenizer: object
    reading: Reading
    task: str
    teacher_sha256: frozenset[str]  # of its teacher's files of weights

    def classify(self, texts: list[str]) -> list[dict | UserError]:
        """Returns label, probability and probabilities of each text, or its error; see `texts.classify`."""
        return classify(self.tokenizer, [(self.reading, text) for text in texts],
                        lambda batch, _: self.model(batch.input_ids.to(device()), batch.attention_mask))


class Full(Exception):
    """The queue holds its largest number of texts."""


def check_name(kind: str, name: str) -> None:
    """Checks the name of an adapter or student, which stands in URLs, metrics and logs.

    Raises:
        UserError: the name has other characters than these, or too many.
    """
    if not re.fullmatch(NAME, name):
        raise UserError(f"{kind} name {name[:80]!r}: expected up to 64 letters, digits, dots, dashes and underscores")


@dataclass
class _Job:
    """Texts to classify, or a call that changes the bank."""

    future: asyncio.Future
    loop: asyncio.AbstractEventLoop
    key: Key | None = None
    texts: list[str] | None = None
    call: Callable | None = None

    def resolve(self, result=None, error: BaseException | None = None) -> None:
        """Answers the job; callable from any thread."""
        def set_it() -> None:
            # A client that went away has cancelled its future.
            if not self.future.done():
                self.future.set_exception(error) if error else self.future.set_result(result)
        self.loop.call_soon_threadsafe(set_it)


class Worker:
    """Collects requests into batches and computes them in a thread of its own.

    Args:
        bank: the adapters; None if only students are served. The worker's thread alone reads and changes its weights.
        students: by name.
        max_queue: the largest number of texts in the queue.
        on_batch: called with each batch's number of texts and seconds.
    """

    def __init__(self, bank: AdapterBank | None, students: dict[str, Student], max_queue: int = 1024,
                 on_batch: Callable[[int, float], None] = lambda texts, seconds: None):
        self.bank, self.students, self.max_queue, self.on_batch = bank, students, max_queue, on_batch
        # The event loop alone writes these three, so that they need no lock.
        self.waiting = 0  # texts that are accepted and not yet answered
        self.accepted = self.answered = 0  # requests
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)

    @property
    def adapters(self) -> dict[str, LoadedAdapter]:
        """The loaded adapters by name."""
        return self.bank.entries if self.bank else {}

    def serves(self, key: Key) -> bool:
        """Returns whether a model is loaded."""
        kind, name = key
        return name in (self.adapters if kind == "adapter" else self.students)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread once every accepted request is answered."""
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    def find(self, name: str, kinds: tuple[str, ...] = ("adapter", "student")) -> Key:
        """Returns the model of a name: an adapter, else a student.

        Raises:
            UserError: there is none.
        """
        for kind in kinds:
            if self.serves((kind, name)):
                return kind, name
        tables = {"adapter": self.adapters, "student": self.students}
        known = ", ".join([name for kind in kinds for name in tables[kind]][:20]) or "none"
        raise UserError(f"unknown {kinds[0]} {name[:80]!r}; expected one of {known}")

    async def classify(self, key: Key, texts: list[str]) -> list[dict | UserError]:
        """Returns label, probability and probabilities of each text, or its error.

        Raises:
            Full: the queue has no room for them.
        """
        return await self._submit(len(texts), key=key, texts=texts)

    async def call(self, function: Callable, *arguments):
        """Calls a function between two batches, in the worker's thread: the function may change the bank.

        Raises:
            Full: the queue has no room for it.
        """
        return await self._submit(1, call=lambda: function(*arguments))

    async def _submit(self, weight: int, **job):
        if self.waiting + weight > self.max_queue:
            raise Full
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self.waiting += weight
        self.accepted += 1
        self._queue.put(_Job(future, loop, **job))
        try:
            return await future
        finally:
            self.waiting -= weight
            self.answered += 1

    # ------------------------------------------------------------ the worker's thread

    def _run(self) -> None:
        """Collects jobs into batches until `stop` puts None into the queue."""
        window = WINDOW
        while True:
            job = self._queue.get()
            if job is None:
                return
            # A batch stays open for `window` after each job, so that clients that ask at the same time share it.
            jobs, end = [job], time.monotonic() + LONGEST * window
            while job is not None and sum(len(job.texts or ()) for job in jobs) < BATCH_TEXTS:
                try:
                    job = self._queue.get(timeout=min(window, max(0.0, end - time.monotonic())))
                except queue.Empty:
                    if time.monotonic() < end and self._delivering(len(jobs)):
                        continue
                    break
                if job is not None:
                    jobs.append(job)
            start = time.monotonic()
            # Nobody reads the answer of a request that timed out in the queue.
            self._work([job for job in jobs if not job.future.done()])
            # After a long batch the window is longer: the clients of that batch ask again together, and the first few of
            # them alone would make a small batch that delays all the others.
            window = max(WINDOW, SHARE * (time.monotonic() - start))
            if job is None:
                return

    def _delivering(self, taken: int) -> bool:
        """Returns whether the event loop is still handing out answers. It reads no request meanwhile."""
        return self.accepted - self.answered > taken + self._queue.qsize()

    def _work(self, jobs: list[_Job]) -> None:
        """Answers jobs in order: those before a call see the bank as it was, those after it the changed one."""
        batch: list[_Job] = []
        for job in jobs:
            if job.call is None:
                batch.append(job)
                continue
            self._classify(batch)
            batch = []
            try:
                job.resolve(job.call())
            except Exception as error:
                job.resolve(error=error)
        self._classify(batch)

    def _classify(self, jobs: list[_Job]) -> None:
        """Answers jobs: one batch for the bank, and one for each student."""
        groups: dict[Key | str, list[_Job]] = {}
        for job in jobs:
            groups.setdefault("bank" if job.key[0] == "adapter" else job.key, []).append(job)
        for together in groups.values():
            # An error here must not end the thread: it would leave every later request without an answer.
            start = time.perf_counter()
            try:
                results = iter(self._results(together))
            except Exception as error:
                # One request may have caused the error. Alone, each of the others gets its answer.
                if len(together) > 1:
                    for job in together:
                        self._classify([job])
                else:
                    together[0].resolve(error=error)
                continue
            # Count first: a client that reads the metrics after its answer finds the batch in them.
            self.on_batch(sum(len(job.texts) for job in together), time.perf_counter() - start)
            for job in together:
                job.resolve([next(results) for _ in job.texts])

    def _results(self, jobs: list[_Job]) -> list[dict | UserError]:
        kind, name = jobs[0].key
        if kind == "adapter":
            return self.bank.classify([(job.key[1], text) for job in jobs for text in job.texts])
        return self.students[name].classify([text for job in jobs for text in job.texts])
