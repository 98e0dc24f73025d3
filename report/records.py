"""Reads the files of runs and studies, with errors that name file, line and field.

    summary = read_json(Path("runs/LoRA-12345/summary.json"))
    summary.section("train").number("seconds")
"""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The recorded name of the baseline, the student without a teacher. Old runs have it, so files keep it.
BASELINE = "scratch"
# The two students of a distillation, in the order of tables and figures.
STUDENTS = ("student", BASELINE)
# Recorded name -> name in tables, figures and on the terminal.
MODELS = {"teacher": "teacher", "student": "student with KD", BASELINE: "baseline", "language_model": "bare language model"}


class ReportError(ValueError):
    """Reports an error of the user's in one line: a malformed file, a missing program, an impossible name."""


class Record(dict):
    """Holds a JSON object and the name of its file, so that an error about a field names the file."""

    def __init__(self, fields: dict, source: str) -> None:
        super().__init__(fields)
        self.source = source

    def __missing__(self, key: str) -> None:
        raise ReportError(f"{self.source}: {key!r} is missing")

    def section(self, key: str) -> "Record":
        """Returns the object under `key`. Raises ReportError for any other type."""
        if not isinstance(self[key], Record):
            raise ReportError(f"{self.source}: {key!r} must be an object, not {json.dumps(self[key])[:60]}")
        return self[key]

    def number(self, key: str) -> float:
        """Returns the number under `key`, NaN for null. Raises ReportError for any other type."""
        value = self[key]
        # JSON has no NaN: a run records null. Python counts true and false as numbers, a score is neither.
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ReportError(f"{self.source}: {key!r} must be a number, not {json.dumps(value)[:60]}")
        return math.nan if value is None else value


def _records(path: Path, by_line: bool) -> list[Record]:
    """Returns the JSON object of a file, or with `by_line` the object of each line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror} (has the run finished?)") from None
    records = []
    for number, text in enumerate(content.splitlines() if by_line else [content], start=1):
        source = f"{path}, line {number}" if by_line else str(path)
        try:
            record = json.loads(text, object_hook=lambda fields, source=source: Record(fields, source))
        # Bytes that are not UTF-8 are a ValueError too.
        except ValueError as error:
            raise ReportError(f"{source}: not valid JSON ({error})") from None
        if not isinstance(record, Record):
            raise ReportError(f"{source}: must be a JSON object, not {json.dumps(record)[:60]}")
        records.append(record)
    return records


def read_json(path: Path) -> Record:
    """Returns the JSON object of a file. Raises ReportError with its name if the file is missing or malformed."""
    return _records(path, by_line=False)[0]


def read_metrics(path: Path) -> list[Record]:
    """Returns the epochs of `metrics.jsonl` in their order. Raises ReportError with file and line if one is malformed."""
    if not (epochs := _records(path, by_line=True)):
        raise ReportError(f"{path}: no epoch in it")
    return epochs


def last_stage(metrics: list[Record]) -> list[Record]:
    """Returns the epochs on the training set, the last stage of a distillation."""
    # Earlier stages have other objectives and other scores: one axis cannot show both.
    return [row for row in metrics if row.get("stage", "gold") == "gold"]


def main_split(validation: Record) -> str:
    """Returns the name of the split that chooses the best epoch: `in_domain` for CoLA, else the first one."""
    if not validation:
        raise ReportError(f"{validation.source}: 'validation' has no split")
    return "in_domain" if "in_domain" in validation else next(iter(validation))


def shown_splits(splits: list[str]) -> list[str]:
    """Returns the splits without `all`."""
    # `all` is in- and out-of-domain together, and a column too many in a wide table.
    return [split for split in splits if split != "all"]


def by_class(summary: Record) -> tuple[str, Record]:
    """Returns the split that chose the epoch and its scores by class; of a distillation, those of the student with KD."""
    scores = (summary.section("student") if summary["mode"] == "distil" else summary).section("by_class")
    split = main_split(scores)
    return split, scores.section(split)


def model_name(recorded: str) -> str:
    """Returns the name of a model in tables, figures and on the terminal."""
    return MODELS.get(recorded, recorded)


def spoken(split: str) -> str:
    """Returns the name of a split in prose: in-domain for in_domain."""
    return split.replace("_", "-")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to `path`, and renames it to `path` at the end: readers never see half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, hence on the same file system: a rename replaces the old file in one step.
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
