"""Answers the rows of a file in order, in constant memory: reading, tokenising, computing and writing overlap.

    for answer in predict_file(predictor, Path("FILE.csv")): print(answer)

Rows are answered a window at a time, in batches by length. Each stage is a thread, a few windows ahead of the next.
"""
from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from data import stream
from machine.ahead import ahead
from machine.errors import UserError
from machine.progress import Bar
from record.answers import Answers, check_file, opened
from record.files import sha256

if TYPE_CHECKING:
    import pyarrow

WINDOW = 512  # rows read, batched by length and answered at a time
PART_WINDOWS = 32  # windows in a part of a file of answers, which is computed again after a kill
EXAMPLES = 5  # unknown words that a warning names

_encode_json = json.JSONEncoder(ensure_ascii=False).encode


@dataclass
class Counts:
    """Counts the rows of a file, and those with an error or with unknown words."""

    rows: int = 0
    errors: int = 0
    unknown: int = 0
    words: dict[str, None] = field(default_factory=dict)  # a few of the unknown words

    def add(self, answers: list[dict]) -> None:
        """Counts a window's answers."""
        self.rows += len(answers)
        for answer in answers:
            if "error" in answer:
                self.errors += 1
            elif "unknown_words" in answer:
                self.unknown += 1
                self._add_words(answer["unknown_words"])

    def merge(self, other: Counts) -> None:
        """Adds the counts of other rows."""
        self.rows += other.rows
        self.errors += other.errors
        self.unknown += other.unknown
        self._add_words(other.words)

    def _add_words(self, words: Iterable[str]) -> None:
        # A few are enough, and a long file has thousands.
        for word in words if len(self.words) < EXAMPLES else ():
            if len(self.words) < EXAMPLES:
                self.words[word] = None


def predict_file(predictor, path: Path, kind: str | None = None,
                 progress: Callable[[int, stream.Rows], None] = lambda rows, file: None) -> Iterator[dict]:
    """Answers a file's rows in order; see `windows`.

    Args:
        progress: called after each window with its number of rows and the file.
    """
    rows = open_rows(predictor, path, kind)
    with contextlib.closing(windows(predictor, rows)) as found:
        for answers in found:
            yield from answers
            progress(len(answers), rows)


def open_rows(predictor, path: Path, kind: str | None = None) -> stream.Rows:
    """Opens a file for a predictor (`predict.RunPredictor` or `BankPredictor`) and checks its header.

    Args:
        kind: one of `stream.FORMATS`; by the file's ending if None.

    Raises:
        UserError: the file cannot be read at all.
    """
    if str(path) == "-":
        kind = kind or predictor.standard_kind
    rows = stream.open_rows(path, kind, predictor.headless, predictor.columns)
    predictor.check(rows)
    return rows


def windows(predictor, rows: stream.Rows) -> Iterator[list[dict]]:
    """Answers an open file's rows, a window at a time.

    Yields:
        text, label, probability and probabilities of each row, and `truncated` where the text was cut; or error and line of
        a bad one.
    """
    def encoded() -> Iterator[tuple]:
        while window := list(itertools.islice(rows.rows, WINDOW)):
            parsed = predictor.rows(rows.path, rows.kind, window)
            good = [row for row in parsed if not isinstance(row, UserError)]
            yield window, parsed, good, predictor.encode(good)

    def answered() -> Iterator[list[dict]]:
        with contextlib.closing(ahead(encoded())) as ready:
            for window, parsed, good, ids in ready:
                # Good rows are answered together, and dealt out again in the file's order.
                answers = iter(predictor.classify(good, ids))
                found = []
                for row, given in zip(window, parsed, strict=True):
                    answer = given if isinstance(given, UserError) else next(answers)
                    found.append({"error": str(answer), "line": row.line} if isinstance(answer, UserError) else
                                 {"text": given[0], **answer})
                yield found

    return ahead(answered())


def decided(result: dict, at_least: float | None) -> dict:
    """Returns a result; without a label where its probability is below `at_least`."""
    if at_least is None or result.get("probability", 1) >= at_least:
        return result
    return {**result, **{key: None for key in ("label", "name") if key in result}}


def line_of(result: dict, as_json: bool) -> str:
    """Formats a result as a line: JSON, or label, probability (a number has none) and text between tabs."""
    if as_json:
        return _encode_json(result)
    if "error" in result:
        return f"error\tline {result['line']}\t{result['error']}"
    label = "undecided" if result["label"] is None else result.get("name", result["label"])
    probability = [f"{result['probability']:.4f}"] if "probability" in result else []
    return "\t".join([label, *probability, " ".join(result["text"].split())])


@contextlib.contextmanager
def _bar_of(rows: stream.Rows) -> Iterator[Callable[[int], None]]:
    """Shows a bar; yields the function that moves it after a number of rows."""
    with Bar(unit="rows", delay=2) as bar:
        # The bar counts a file's bytes, because its number of rows is not known, and the rows of standard input.
        if rows.size:
            bar.unit, bar.unit_scale, bar.total = "B", True, rows.size
        yield lambda count: bar.update(rows.file.tell() - bar.n if rows.size else count)


def print_answers(predictor, path: Path, kind: str | None, at_least: float | None, as_json: bool) -> Counts:
    """Prints the answers to a file's rows, a line each; returns their counts."""
    counts, rows = Counts(), open_rows(predictor, path, kind)
    with _bar_of(rows) as move, contextlib.closing(windows(predictor, rows)) as found:
        for answers in found:
            counts.add(answers)
            # To stdout, with the bar out of the way: a window at a time, as each call costs as much as many rows.
            Bar.write("\n".join(line_of(decided(answer, at_least), as_json) for answer in answers))
            # The next program of a pipe has its rows at once.
            sys.stdout.flush()
            move(len(answers))
    return counts


# ---------------------------------------------------------------- a file of answers

def check_out(path: Path, out: Path) -> None:
    """Checks --out before a model is loaded.

    Raises:
        UserError: without a file that can be read twice, or a file that may not be written.
    """
    if path is None or str(path) == "-":
        raise UserError("predict: --out is for --file FILE; sentences and standard input are answered on "
                        "standard output")
    check_file(out)


def write_answers(predictor, path: Path, out: Path, about: dict, at_least: float | None, kind: str | None = None
                  ) -> Counts:
    """Writes the answers to a file's rows into another file; goes on where the same command was stopped.

    Args:
        about: the models and options that the answers depend on.

    Returns:
        Counts of the rows that this call answered.

    Raises:
        UserError: the file changed meanwhile, or see `record.answers`.
    """
    counts = Counts()
    digest = sha256(path)
    with opened(out, {**about, "file": digest}, schema_of(predictor.readings)) as answers:
        if not answers.joined:
            _write_parts(predictor, open_rows(predictor, path, kind), answers, at_least, counts)
            # Answers to half of one file and half of another are no answers.
            if sha256(path) != digest:
                raise UserError(f"{path}: changed while it was read; remove {answers.folder} and start again")
            answers.join()
    return counts


def _write_parts(predictor, rows: stream.Rows, answers: Answers, at_least: float | None, counts: Counts) -> None:
    """Answers the rows that no finished part has."""
    # A part is a number of whole windows: the batches are those of a program that was not stopped.
    skipped = sum(1 for _ in itertools.islice(rows.rows, answers.done))
    if skipped < answers.done:
        raise UserError(f"{rows.path}: has fewer rows than were answered already; remove {answers.folder} and start again")
    with _bar_of(rows) as move, contextlib.closing(windows(predictor, rows)) as found:
        while part := list(itertools.chain.from_iterable(itertools.islice(found, PART_WINDOWS))):
            counts.add(part)
            part = [decided(answer, at_least) for answer in part]
            answers.add(part, (line_of(answer, True) for answer in part))
            move(len(part))


def schema_of(readings: list) -> pyarrow.Schema:
    """Returns the columns of a Parquet file of answers: those that some reading (`serving.texts.Reading`) needs."""
    import pyarrow

    text, number = pyarrow.string(), pyarrow.float64()
    names = dict.fromkeys(itertools.chain.from_iterable(reading.classes for reading in readings
                                                         if reading.problem.name != "regression"))
    columns = {"text": text, "label": text}
    if any(reading.names for reading in readings):
        columns["name"] = text
    if names:
        columns["probability"] = number
        columns["probabilities"] = pyarrow.struct([(name, number) for name in names])
    if any(reading.problem.name == "regression" for reading in readings):
        columns["score"] = number
    if any(reading.problem.name == "multi-label" for reading in readings):
        columns["labels"] = pyarrow.list_(text)
    columns["truncated"] = pyarrow.bool_()
    if any(reading.tiny for reading in readings):
        columns["unknown_words"] = pyarrow.list_(text)
    return pyarrow.schema({**columns, "error": text, "line": pyarrow.int64()})
