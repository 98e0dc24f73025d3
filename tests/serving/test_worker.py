"""Which requests the worker takes into a batch: those that come while it waits."""
import asyncio
import time

from serving import worker as worker_module
from serving.worker import Worker


class Stub:
    """Stands in for a bank: takes its time, and notes the texts of each batch."""

    def __init__(self, seconds: float):
        self.seconds, self.batches = seconds, []

    def classify(self, rows):
        self.batches.append([text for _, text in rows])
        time.sleep(self.seconds)
        return [{} for _ in rows]


def test_the_window_grows_with_the_time_that_a_batch_takes(monkeypatch):
    """Clients that got their answers together ask again one after the other, and still share a batch."""
    monkeypatch.setattr(worker_module, "SHARE", 1.0)
    bank = Stub(0.5)
    worker = Worker(bank, {})

    async def ask() -> None:
        worker.start()
        await worker.classify(("adapter", "a"), ["first"])
        again = []
        for text in ("a", "b", "c"):
            again.append(asyncio.create_task(worker.classify(("adapter", "a"), [text])))
            await asyncio.sleep(10 * worker_module.WINDOW)
        await asyncio.gather(*again)
        await worker.stop()
    asyncio.run(ask())
    assert bank.batches == [["first"], ["a", "b", "c"]]


def test_a_batch_waits_while_answers_are_handed_out(monkeypatch):
    """A request that the event loop has yet to read, for it still writes answers, is in the next batch."""
    monkeypatch.setattr(worker_module, "LONGEST", 1000)
    bank = Stub(0.1)
    worker, key = Worker(bank, {}), ("adapter", "a")

    async def first() -> None:
        await worker.classify(key, ["1"])
        time.sleep(10 * worker_module.WINDOW)  # not asyncio's: the loop is busy, and hands out the answer of 2 later
        await worker.classify(key, ["4"])

    async def third() -> None:
        while not bank.batches:
            await asyncio.sleep(0.01)
        await worker.classify(key, ["3"])

    async def ask() -> None:
        asked = [asyncio.create_task(task) for task in (first(), worker.classify(key, ["2"]), third())]
        await asyncio.sleep(0)  # both are submitted before the worker starts
        worker.start()
        await asyncio.gather(*asked)
        await worker.stop()
    asyncio.run(ask())
    assert bank.batches == [["1", "2"], ["3", "4"]]
