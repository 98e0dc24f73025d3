"""Files that several processes and threads make together, each file once.

    share({folder / "1": 512, folder / "2": 512}, make, check_stop, threads=2)

Runs of several seeds share one cache in this way. A killed process loses the file that it was writing. On a CPU two threads
with one core each finish two files sooner than two cores one file after the other.
"""
from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import filelock
import torch

from machine.hardware import device
from machine.progress import Bar

POLL = 0.5  # seconds between two looks at the files of other processes


def cores() -> int:
    """Returns the number of threads that may compute at a time: PyTorch's on a CPU, one on a GPU."""
    return torch.get_num_threads() if device().type == "cpu" else 1


def share(wanted: dict[Path, int], make: Callable[[Path], None], check_stop: Callable[[], None], threads: int = 1,
          name: str = "") -> None:
    """Makes the missing files, each in one process and thread alone; returns when all exist, whoever made them.

    Args:
        wanted: files, and the number of sentences in each.
        make: writes a file.
        check_stop: called before each file; raises if the process was asked to stop.
        threads: number of threads; each makes one file at a time on one core. An error in one ends the others after their
            files.
        name: label of the progress bar, in sentences; no bar without it.
    """
    # Threads cannot be stopped from outside: each looks at this event between two files.
    ended = threading.Event()

    def done() -> int:
        return sum(count for path, count in wanted.items() if path.exists())

    def work(bar: Bar) -> None:
        while not ended.is_set() and (missing := [path for path in wanted if not path.exists()]):
            for path in missing:
                check_stop()
                with suppress(filelock.Timeout), filelock.FileLock(f"{path}.lock", blocking=False):
                    try:
                        # Another process may have made it between the look and the lock.
                        if not path.exists():
                            make(path)
                            # Looked up anew: meanwhile others have made some of the files.
                            break
                    finally:
                        # Safe: a process that gets the lock later finds the file before it makes it.
                        Path(f"{path}.lock").unlink(missing_ok=True)
            else:
                # All missing files are in the hands of others.
                time.sleep(POLL)
            bar.n = done()
            bar.update(0)

    def work_on_one_core(bar: Bar) -> None:
        try:
            torch.set_num_threads(1)
            work(bar)
        finally:
            # After an error the others stop; after the last file there is nothing left for them.
            ended.set()

    # No thread without a file to make.
    threads = min(threads, sum(not path.exists() for path in wanted))
    before = torch.get_num_threads()
    with Bar(total=sum(wanted.values()), initial=done(), unit="sentence", desc=name, delay=2,
              disable=not name) as bar:
        if threads < 2:
            work(bar)
            return
        try:
            with ThreadPoolExecutor(threads) as pool:
                try:
                    for future in [pool.submit(work_on_one_core, bar) for _ in range(threads)]:
                        future.result()
                finally:
                    # An interruption too: the pool is left only when its threads have ended.
                    ended.set()
        finally:
            # PyTorch has one number for all threads that start later.
            torch.set_num_threads(before)
