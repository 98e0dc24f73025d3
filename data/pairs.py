"""Reads minimal pairs: two sentences that differ in one respect, the first acceptable.

    python -c "from data import pairs; print(pairs.read_pairs('blimp/pairs.tsv')[0])"

A file of pairs is BLiMP's (Warstadt et al. 2020) as one table: tab-separated, with a header that has `phenomenon`,
`paradigm`, `good` and `bad`. Published accuracies of other models stand in `published.tsv` next to it: `paradigm`,
and a column for each model.
"""
from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from data import grammar, stream
from machine.errors import UserError


class Pair(NamedTuple):
    """Holds an acceptable sentence and its unacceptable twin; several paradigms make up a phenomenon."""

    phenomenon: str
    paradigm: str
    good: str
    bad: str


def built_in(limit: int) -> list[Pair]:
    """Returns `limit` pairs of each phenomenon of the built-in grammar; each phenomenon has one paradigm, itself."""
    return [Pair(phenomenon, phenomenon, good, bad) for phenomenon, good, bad in grammar.draw_pairs(limit)]


def read_pairs(path: Path, limit: int | None = None) -> list[Pair]:
    """Reads a file of pairs, or the first `limit` of each paradigm.

    Raises:
        UserError: missing, not UTF-8, or without a column or a sentence; names the line.
    """
    rows, count, found = _tsv_rows(path, Pair._fields), {}, []
    for number, row in rows:
        pair = Pair(*(row[field].strip() for field in Pair._fields))
        if not all(pair):
            raise UserError(f"{path}, line {number}: {Pair._fields[pair.index('')]} is empty")
        # The limit is of each paradigm, in the file's order.
        count[pair.paradigm] = count.get(pair.paradigm, 0) + 1
        if limit is None or count[pair.paradigm] <= limit:
            found.append(pair)
    return found


def read_published(path: Path) -> dict[str, dict[str, float]]:
    """Reads published accuracies (0 to 1): model -> paradigm -> accuracy.

    Raises:
        UserError: see `read_pairs`; or an accuracy that is no number from 0 to 1.
    """
    found: dict[str, dict[str, float]] = {}
    for number, row in _tsv_rows(path, ("paradigm",)):
        for model, text in row.items():
            if model in ("paradigm", "phenomenon", "field"):
                continue
            # A cell that is no number is refused like one out of range.
            try:
                value = float(text)
            except ValueError:
                value = -1.0
            if not 0 <= value <= 1:
                raise UserError(f"{path}, line {number}: {model} is {text[:20]!r}; expected an accuracy from 0 to 1")
            found.setdefault(model, {})[row["paradigm"]] = value
    return found


def _tsv_rows(path: Path, needed: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    """Returns number and cells of each line of a TSV with a header; at least one."""
    rows = stream.open_rows(path, "tsv")
    with rows.file:
        # Columns may stand in any order, and there may be others.
        if lacking := [name for name in needed if name not in rows.names]:
            raise UserError(f"{path}: no column {lacking[0]}; expected a header with {', '.join(needed)}, separated by tabs")
        found = []
        for row in rows.rows:
            if row.error:
                raise UserError(f"{path}, line {row.line}: {row.error}")
            found.append((row.line, row.columns))
    if not found:
        raise UserError(f"{path}: no row below its header")
    return found
