"""Builds the report's PDF and the zip file that is handed in; reads files alone, and imports no PyTorch.

    python run.py report 12345
    python run.py submit 12345 --first-name Ada --last-name Lovelace
"""
from __future__ import annotations

from types import SimpleNamespace

from options.declare import ROOT
from record.files import check_sums
from report import build


def report(args) -> None:
    """Builds the PDF and prints its path."""
    # A table of damaged files would be worse than none.
    for mode in ("LoRA", "distil"):
        check_sums(args.runs / f"{mode}-{args.sr}")
    print(f"report: {build.build_report(args.sr, args.runs, args.plots, ROOT / 'report', args.author)}")


def submit(args) -> None:
    """Makes the zip file and prints its path; a report without an author gets the names of the submission."""
    # Only where it can be built again: the PDF may have come from another machine.
    if build.can_sign(args.sr, args.runs, ROOT / "report"):
        report(SimpleNamespace(**{**vars(args), "author": f"{args.first_name} {args.last_name}"}))
    print(build.make_submission(args.sr, args.first_name, args.last_name, ROOT))
