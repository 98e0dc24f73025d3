"""Runs an iterator in a thread of its own, a few items ahead of whoever reads it.

    for item in ahead(slow_items()): ...

Stages chained by it overlap wherever they wait or leave Python's lock: files, tokenizers and PyTorch do. The order stays,
and the queue between two stages is bounded, so that memory does not grow.
"""
from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

Item = TypeVar("Item")

MOST = 4  # items that wait between two stages
PATIENCE = 0.1  # seconds after which a stage that waits looks whether it is still needed


def ahead(items: Iterator[Item], most: int = MOST) -> Iterator[Item]:
    """Yields the items of an iterator that a thread runs; its exceptions are raised here, in their place.

    Args:
        items: used in the thread alone; a generator is closed there.
        most: items that are kept for the reader.
    """
    found: queue.Queue = queue.Queue(most)
    stop = threading.Event()

    def put(kind: str, value) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                return found.put((kind, value), timeout=PATIENCE)

    def work() -> None:
        try:
            for item in items:
                put("item", item)
                if stop.is_set():
                    break
            put("end", None)
        # BaseException: whatever ends this stage is news for the reader, who would wait for ever.
        except BaseException as error:
            put("error", error)
        finally:
            if hasattr(items, "close"):
                items.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = found.get()
            if kind == "item":
                yield value
            elif kind == "end":
                return
            else:
                raise value
    finally:
        stop.set()
        # A stage that waits for standard input may do so for ever; it ends with the process.
        thread.join(timeout=1)
