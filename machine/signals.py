"""Handles SIGINT and SIGTERM: at once outside a training step, after the step inside it.

    signals.install()
    with signals.deferred():   # a signal changes nothing in this block; at its end `Interrupted` is raised
        ...
"""
from __future__ import annotations

import os
import signal
from contextlib import contextmanager

# The signal that arrived, if one did; and the number of `deferred` blocks around the statement that runs.
_received: list[int] = []
_deferring = 0


class Interrupted(KeyboardInterrupt):
    """Reports a signal that asks the process to stop.

    It is no `Exception`: a library's `except Exception` must not swallow it.
    """

    def __init__(self, number: int):
        super().__init__(f"signal {number}")
        self.signal = number


def install() -> None:
    """Handles both signals from now on. SIGINT after either of them ends the process at once.

    A second SIGTERM changes nothing: launchers repeat it, and Linux sends a parent's death signal once for every thread of
    the parent that the child was handed to (PR_SET_PDEATHSIG of prctl(2)).
    """
    _received.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _handle)


def _handle(number: int, frame) -> None:
    # A person who presses Ctrl-C twice does not wait for the end of a long step.
    if _received and number == signal.SIGINT:
        os._exit(128 + number)
    if _received:
        return
    _received.append(number)
    if not _deferring:
        raise Interrupted(number)


def received() -> int | None:
    """Returns the signal that arrived, or None."""
    return _received[0] if _received else None


@contextmanager
def deferred():
    """Lets the body of the `with` statement finish, then raises `Interrupted` if a signal has arrived.

    Blocks may be nested: the end of the outermost one raises.
    """
    global _deferring
    _deferring += 1
    try:
        yield
    finally:
        _deferring -= 1
    # Outside `finally`, so that an error of the body is not hidden by the signal.
    if _received and not _deferring:
        raise Interrupted(_received[0])
