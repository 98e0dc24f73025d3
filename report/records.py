"""Reads what a run left in runs/, for the rest of this folder.

    summary = read_json(Path("runs/LoRA-12345/summary.json"))
    summary.section("train").number("seconds")      # or an error that names the file and the field

The folder reads files only and imports no other folder.
"""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# A distillation's two students, as figures and tables name them.
PHASES = {"student": "student, KD", "scratch": "student, no teacher"}


class ReportError(ValueError):
    """Reports what the user can mend, in one line: a run's file, a missing program, a name."""


class Record(dict):
    """Holds a JSON object and its file's name, so that a missing or wrong field is reported with the file."""

    def __init__(self, fields: dict, source: str) -> None:
        super().__init__(fields)
        self.source = source

    def __missing__(self, key: str) -> None:
        raise ReportError(f"{self.source}: {key!r} is missing")

    def section(self, key: str) -> "Record":
        """Returns the object under `key`."""
        if not isinstance(self[key], Record):
            raise ReportError(f"{self.source}: {key!r} must be an object, not {json.dumps(self[key])[:60]}")
        return self[key]

    def number(self, key: str) -> float:
        """Returns the number under `key`; null (JSON has no NaN) is NaN."""
        value = self[key]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ReportError(f"{self.source}: {key!r} must be a number, not {json.dumps(value)[:60]}")
        return math.nan if value is None else value


def _records(path: Path, by_line: bool) -> list[Record]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror} (has the run finished?)") from None
    records = []
    for number, text in enumerate(content.splitlines() if by_line else [content], start=1):
        source = f"{path}, line {number}" if by_line else str(path)
        try:
            record = json.loads(text, object_hook=lambda fields, source=source: Record(fields, source))
        except ValueError as error:  # no JSON, or no UTF-8
            raise ReportError(f"{source}: not valid JSON ({error})") from None
        if not isinstance(record, Record):
            raise ReportError(f"{source}: must be a JSON object, not {json.dumps(record)[:60]}")
        records.append(record)
    return records


def read_json(path: Path) -> Record:
    """Returns the JSON object in a file. Raises ReportError naming the file where it is missing or malformed."""
    return _records(path, by_line=False)[0]


def read_metrics(path: Path) -> list[Record]:
    """Returns the epochs of `metrics.jsonl`, as written. Raises ReportError naming file and line."""
    if not (epochs := _records(path, by_line=True)):
        raise ReportError(f"{path}: no epoch in it")
    return epochs


def last_stage(metrics: list[Record]) -> list[Record]:
    """Returns the epochs on the training set: those of a distillation's earlier stages have other scales and scores."""
    return [row for row in metrics if row.get("stage", "gold") == "gold"]


def main_split(validation: Record) -> str:
    """Returns the split by which the best epoch is chosen: CoLA's in-domain one, or a task's only (first) one."""
    if not validation:
        raise ReportError(f"{validation.source}: 'validation' has no split")
    return "in_domain" if "in_domain" in validation else next(iter(validation))


def shown_splits(splits: list[str]) -> list[str]:
    """Leaves out `all`, which is in- and out-of-domain together, and one column too many in a wide table."""
    return [split for split in splits if split != "all"]


def by_class(summary: Record) -> tuple[str, Record]:
    """Returns the split that the best epoch was chosen on, and the scores by class there (of two students, the KD one's)."""
    scores = (summary.section("student") if summary["mode"] == "distil" else summary).section("by_class")
    split = main_split(scores)
    return split, scores.section(split)


def spoken(split: str) -> str:
    """Returns a split's name as it stands in a sentence."""
    return split.replace("_", "-")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` and renames it to `path` at the end: readers never see half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
