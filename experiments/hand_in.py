"""Builds the report's PDF and the zip file that is handed in; reads files alone, and imports no PyTorch.

    python run.py report 12345
    python run.py submit 12345 --first-name Ada --last-name Lovelace
"""
from __future__ import annotations

from options.declare import ROOT
from record.files import check_sums
from report import build


def report(args) -> None:
    """Builds the PDF and prints its path."""
    # A table of damaged files would be worse than none.
    for mode in ("LoRA", "distil"):
        check_sums(args.runs / f"{mode}-{args.sr}")
    print(f"report: {build.build_report(args.sr, args.runs, args.plots, ROOT / 'report')}")


def submit(args) -> None:
    """Makes the zip file and prints its path."""
    print(build.make_submission(args.sr, args.first_name, args.last_name, ROOT))
