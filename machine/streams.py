"""The standard streams: made usable, and written to in single lines; of several processes one writes a line."""
from __future__ import annotations

import os
import sys

from machine import processes


def open_streams() -> None:
    """Makes output possible with a closed stream, or one that cannot write every character."""
    # In this order: the lowest free file descriptor is taken, and no file of a run must become standard output.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    # In a file the Hub's bars would be a line for each step.
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def note(text: str) -> None:
    """Prints a line on stderr that is no result; one process of several does so."""
    if processes.claim_once(text):
        # Bars exist only where this module was imported. A printed line would stick to the end of one.
        progress = sys.modules.get("machine.progress")
        progress.write(text) if progress else print(text, file=sys.stderr, flush=True)


def complain(message) -> None:
    """Prints an error as one line on stderr; of several processes the first that fails does so."""
    # A message may quote a file's line breaks.
    if processes.claim_once("the end"):
        print("run.py:", str(message).replace("\n", " "), file=sys.stderr, flush=True)
