"""Soft labels by sentence, from a file: a teacher of any kind, or a service, can teach the student.

    {"text": "The cat sat.", "probabilities": {"0": 0.1, "1": 0.9}}    a line of JSON Lines, as `predict --json` writes it
    {"text": "Cat the sat.", "logits": [1.5, -0.5]}                    a list has the order of the task's classes
    {"text": "A cat.\tA dog.", "score": 2.4}                           a number for a pair

Of several labels at once each probability is one for itself; they need no sum of 1.
"""
from __future__ import annotations

import math
import warnings
from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from data import stream
from data.lines import read_whole
from data.segments import split_pair
from machine.errors import UserError
from metrics.problems import SINGLE_LABEL, Problem

FLOOR = 1e-6  # a probability below it counts as it: log 0 is no target
SUM_ERROR = 0.01  # how far probabilities may be from a sum of 1: a service rounds them


@dataclass(frozen=True)
class SoftLabels:
    """The soft labels of a file."""

    path: str
    rows: dict[str, int]  # `key` of a sentence -> row of the logits
    logits: Tensor  # (rows, labels) float32
    separator: str | None = None  # between the two texts of a pair; None: texts are single

    def of(self, sentences: list[str]) -> tuple[Tensor, Tensor]:
        """Returns the numbers of those sentences that have a label here, (n,), and their logits, (n, labels)."""
        found = [(at, self.rows.get(key(sentence, self.separator))) for at, sentence in enumerate(sentences)]
        known = [(at, row) for at, row in found if row is not None]
        places, rows = (torch.tensor(part, dtype=torch.int64) for part in (zip(*known, strict=True) if known else ((), ())))
        return places, self.logits[rows]


def key(text: str, separator: str | None) -> str:
    """Returns the words of a text, one space apart; a tab between those of a pair, by whatever they were separated."""
    # The transfer set's sentences have single spaces, whatever their sources have.
    parts = (separator and split_pair(text, separator)) or (text,)
    return "\t".join(" ".join(part.split()) for part in parts)


def read_labels(path: str, classes: tuple[str, ...], problem: Problem = SINGLE_LABEL, separator: str | None = None
                ) -> tuple[SoftLabels, str]:
    """Reads a file of soft labels, JSON Lines.

    Args:
        classes: names of the task's classes or labels, in their order.
        separator: between the two texts of a pair, as well as a tab; None: texts are single.

    Returns:
        The labels, and the SHA-256 of the file's bytes.

    Raises:
        UserError: the file cannot be read, has no line, or a line is not as the module says; names file and line.
    """
    file, digest = read_whole(path, "a JSON Lines file")
    rows, logits, lines = {}, array("f"), []
    with file:
        for row in stream.open_rows(path, "jsonl", file=file).rows:
            try:
                if row.error:
                    raise UserError(row.error)
                text, values = _parse(row.columns, classes, problem)
                values = array("f", values)
                # A sentence may come twice, but not with two labels.
                if (first := rows.setdefault(key(text, separator), len(lines))) == len(lines):
                    logits.extend(values)
                    lines.append(row.line)
                elif logits[first * len(classes):(first + 1) * len(classes)] != values:
                    raise UserError(f"another label for the text of line {lines[first]}")
            except UserError as error:
                raise UserError(f"--labels {path}, line {row.line}: {error}") from None
    if not rows:
        raise UserError(f"--labels {path}: no line in it")
    return SoftLabels(path, rows, torch.tensor(logits).view(-1, len(classes)), separator), digest


def _parse(columns: dict, classes: tuple[str, ...], problem: Problem) -> tuple[str, list[float]]:
    """Returns the text and the logits of a line.

    Raises:
        UserError: it has no text, or not a number for each class.
    """
    own = "score" if problem.name == "regression" else "probabilities"
    text, kind = columns.get("text"), "logits" if "logits" in columns else own
    if not isinstance(text, str) or not text.strip():
        raise UserError("text is missing, empty or no string")
    if kind not in columns:
        raise UserError(f'expected "{own}" or "logits" next to the text')
    values = [columns[kind]] if kind == "score" else columns[kind]
    # By name, or in the order of the classes.
    if isinstance(values, dict):
        if set(values) != set(classes):
            raise UserError(f"{kind} of the classes {', '.join(values)[:60]}; expected {', '.join(classes)[:60]}")
        values = [values[name] for name in classes]
    if not isinstance(values, list) or len(values) != len(classes) or not all(map(_is_number, values)):
        numbers = "a number" if kind == "score" else f"{len(classes)} numbers, one for each of {', '.join(classes)[:60]}"
        raise UserError(f"{kind}: expected {numbers}")
    # A number is a logit as it is.
    if kind != "probabilities":
        return text, [float(value) for value in values]
    if problem.name == "multi-label":
        return text, _log_odds(values)
    if min(values) < 0 or abs(sum(values) - 1) > SUM_ERROR:
        raise UserError(f"probabilities with a sum of {sum(values):.4g}; expected numbers of at least 0 with a sum of 1")
    # Probabilities leave a constant of the logits open: their mean is 0.
    logs = [math.log(max(value, FLOOR)) for value in values]
    return text, [value - sum(logs) / len(logs) for value in logs]


def _log_odds(values: list[float]) -> list[float]:
    """Returns log(p / (1 - p)) of the probabilities of several labels at once.

    Raises:
        UserError: a value is not from 0 to 1.
    """
    if min(values) < 0 or max(values) > 1:
        raise UserError("probabilities: expected numbers from 0 to 1")
    kept = [min(max(value, FLOOR), 1 - FLOOR) for value in values]
    return [math.log(value) - math.log1p(-value) for value in kept]


def _is_number(value) -> bool:
    # Python counts true and false as numbers. A float32 ends at 3e38.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def check_labels(files: list[SoftLabels], sentences: list[str]) -> None:
    """Warns of each file that lacks some of the sentences: how many, and their labels all the same.

    Raises:
        UserError: a file has none of them.
    """
    for file in files:
        lacking = sum(key(sentence, file.separator) not in file.rows for sentence in sentences)
        if lacking == len(sentences):
            raise UserError(f"--labels {file.path}: labels none of the {len(sentences):,} sentences of transfer and "
                            "training set")
        if lacking:
            warnings.warn(f"--labels {file.path}: {lacking:,} of {len(sentences):,} sentences of transfer and training set "
                          "are not in it; they have the labels of the other files and teachers", stacklevel=2)


def with_labels(mean: Tensor, teachers: int, files: list[SoftLabels], sentences: list[str], alone: bool = False) -> Tensor:
    """Returns the mean logits (N, labels) of all teachers and of all files that have a sentence.

    Args:
        mean: the teachers' mean logits (N, labels).
        teachers: their number.
        files: soft labels of some or all of the sentences.
        sentences: (N) texts.
        alone: leave the teachers out where a file has the sentence.
    """
    if not files:
        return mean
    # Of the files alone: sums, and the number of files with each sentence.
    total, count = torch.zeros_like(mean), torch.zeros(len(mean), 1)
    for file in files:
        places, logits = file.of(sentences)
        total[places] += logits
        count[places] += 1
    # Each teacher and each file counts alike. Alone, a file leaves the teachers no weight.
    weight = teachers * ((count == 0).float() if alone else torch.ones_like(count))
    return (weight * mean + total) / (weight + count)
