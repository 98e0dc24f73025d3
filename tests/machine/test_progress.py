"""Bars: drawn on a terminal, a line each in a file; lines and libraries' warnings stand above the bars."""
import io
import logging
import sys

import pytest

from machine.progress import Bar, logs_above_bars
from machine.streams import note


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def as_stderr(monkeypatch, kind=io.StringIO) -> io.StringIO:
    """A stream that is standard error until the test ends."""
    monkeypatch.setattr(sys, "stderr", stream := kind())
    return stream


def drawn(terminal: Terminal) -> list[str]:
    """The lines of a terminal after everything that was drawn over."""
    return [line.rpartition("\r")[2].rstrip() for line in terminal.getvalue().split("\n")]


def test_a_bar_in_a_file_is_one_line_at_its_end(monkeypatch):
    stderr = as_stderr(monkeypatch)
    for epoch in (1, 2):
        with Bar(range(500), desc=f"epoch {epoch}/2", unit="batch") as bar:
            for _ in bar:
                bar.set_postfix_str("loss 0.5")
                bar.refresh()
                assert len(stderr.getvalue().splitlines()) == epoch - 1
    lines = stderr.getvalue().splitlines()
    assert [line[:15] for line in lines] == ["epoch 1/2: 100%", "epoch 2/2: 100%"] and "\r" not in stderr.getvalue()
    assert all("500/500" in line and "loss 0.5" in line and len(line) <= 100 for line in lines)


def test_a_bar_that_ended_before_it_was_due_is_no_line(monkeypatch):
    stderr = as_stderr(monkeypatch)
    with Bar(total=3, delay=60) as bar:
        bar.update(3)
    with Bar(total=3, disable=True) as bar:
        bar.update(3)
    assert stderr.getvalue() == ""


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_notes_and_the_libraries_warnings_do_not_stick_to_a_bar(monkeypatch, kind):
    stderr = as_stderr(monkeypatch, kind)
    logger = logging.getLogger("transformers")
    before = logger.handlers
    logger.handlers = [logging.StreamHandler(stderr)]
    try:
        with logs_above_bars(), Bar(total=2, desc="epoch 1/1", mininterval=0) as bar:
            bar.update()
            note("warning: a text is long")
            logger.error("a library's warning")
            bar.update()
    finally:
        logger.handlers = before
    lines = drawn(stderr)
    assert lines[:2] == ["warning: a text is long", "a library's warning"]
    assert lines[2].startswith("epoch 1/1: 100%") and lines[3:] == [""]


def test_a_logger_that_writes_elsewhere_goes_on_there(monkeypatch):
    stderr = as_stderr(monkeypatch)
    elsewhere, logger = io.StringIO(), logging.getLogger("datasets")
    before = logger.handlers
    logger.handlers = [logging.StreamHandler(elsewhere)]
    try:
        with logs_above_bars():
            logger.error("to a file")
    finally:
        logger.handlers = before
    assert elsewhere.getvalue() == "to a file\n" and stderr.getvalue() == ""
