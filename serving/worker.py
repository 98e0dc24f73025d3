"""The one thread that computes: requests that arrive within a few milliseconds are one batch, whatever adapters they name.

    worker = Worker(bank, students)
    worker.start()                                    # in the event loop
    results = await worker.classify(("adapter", "cola"), ["A sentence."])
    await worker.stop()                               # answers what it accepted
"""
from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from machine.errors import UserError
from machine.hardware import device
from serving.bank import AdapterBank
from serving.texts import Reading, classify

WINDOW = 0.003  # seconds that a batch waits for the next request
SHARE, LONGEST = 0.025, 4  # or a share of the last batch's time; in all, at most so many times as long
BATCH_TEXTS = 64  # that are enough to begin

Key = tuple[str, str]  # ("adapter" or "student", name)


@dataclass(frozen=True)
class Student:
    """A distilled model that the service offers beside the adapters."""

    model: torch.nn.Module
    tokenizer: object
    reading: Reading
    task: str
    teacher_sha256: frozenset[str]  # of its teacher's files of weights

    def classify(self, texts: list[str]) -> list[dict | UserError]:
        return classify(self.tokenizer, [(self.reading, text) for text in texts],
                        lambda batch, _: self.model(batch.input_ids.to(device()), batch.attention_mask))


class Full(Exception):
    """The queue holds as much as it may."""


@dataclass
class _Job:
    """Texts to classify, or a call that changes the bank."""

    future: asyncio.Future
    loop: asyncio.AbstractEventLoop
    key: Key | None = None
    texts: list[str] | None = None
    call: Callable | None = None

    def resolve(self, result=None, error: BaseException | None = None) -> None:
        """Answers, from any thread; one that nobody waits for any more is left alone."""
        def set_it() -> None:
            if not self.future.done():
                self.future.set_exception(error) if error else self.future.set_result(result)
        self.loop.call_soon_threadsafe(set_it)


class Worker:
    """Batches and computes.

    Args:
        bank: the adapters; None if only students are served. Only the worker's thread touches its weights.
        students: by name.
        max_queue: texts that may wait at a time.
        on_batch: told the number of texts of each batch, and its seconds.
    """

    def __init__(self, bank: AdapterBank | None, students: dict[str, Student], max_queue: int = 1024,
                 on_batch: Callable[[int, float], None] = lambda texts, seconds: None):
        self.bank, self.students, self.max_queue, self.on_batch = bank, students, max_queue, on_batch
        self.waiting = 0  # texts accepted and not yet answered; written by the event loop alone, as are these two
        self.accepted = self.answered = 0  # requests
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    async def stop(self) -> None:
        """Waits until everything that was accepted is answered."""
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    def find(self, name: str, kinds: tuple[str, ...] = ("adapter", "student")) -> Key:
        """Returns the model of a name: an adapter, else a student.

        Raises:
            UserError: there is none.
        """
        tables = {"adapter": self.bank.entries if self.bank else {}, "student": self.students}
        for kind in kinds:
            if name in tables[kind]:
                return kind, name
        known = ", ".join([name for kind in kinds for name in tables[kind]][:20]) or "none"
        raise UserError(f"unknown {kinds[0]} {name[:80]!r}; expected one of {known}")

    async def classify(self, key: Key, texts: list[str]) -> list[dict | UserError]:
        """Returns label, probability and probabilities of each text, or its error.

        Raises:
            Full: too many texts wait already.
        """
        return await self._submit(len(texts), key=key, texts=texts)

    async def call(self, function: Callable, *arguments):
        """Calls a function between two batches, so that it may change the bank."""
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
        window = WINDOW
        while True:
            job = self._queue.get()
            if job is None:
                return
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
            self._work([job for job in jobs if not job.future.done()])
            # Wait longer after a long batch: its clients ask again together, and the first few of them alone would make a
            # small batch for which all the others wait.
            window = max(WINDOW, SHARE * (time.monotonic() - start))
            if job is None:
                return

    def _delivering(self, taken: int) -> bool:
        """Returns whether the event loop still hands out answers, so that it reads no request yet."""
        return self.accepted - self.answered > taken + self._queue.qsize()

    def _work(self, jobs: list[_Job]) -> None:
        """Answers jobs; those on either side of a call see the bank before and after it."""
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
        """Answers jobs in one batch of the bank, and one of each student."""
        groups: dict[Key | str, list[_Job]] = {}
        for job in jobs:
            groups.setdefault("bank" if job.key[0] == "adapter" else job.key, []).append(job)
        for together in groups.values():
            start = time.perf_counter()
            try:
                results = iter(self._results(together))
            except Exception as error:
                if len(together) > 1:  # answer the others, whatever is wrong with one
                    for job in together:
                        self._classify([job])
                else:
                    together[0].resolve(error=error)
                continue
            # Count first: whoever has an answer finds it counted.
            self.on_batch(sum(len(job.texts) for job in together), time.perf_counter() - start)
            for job in together:
                job.resolve([next(results) for _ in job.texts])

    def _results(self, jobs: list[_Job]) -> list[dict | UserError]:
        kind, name = jobs[0].key
        if kind == "adapter":
            return self.bank.classify([(job.key[1], text) for job in jobs for text in job.texts])
        return self.students[name].classify([text for job in jobs for text in job.texts])
