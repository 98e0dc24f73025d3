"""Reads whole labelled tables (CSV, TSV, JSON Lines, Parquet), column by column.

    python -c "from data import tables; print(tables.read_table('FILE.csv').columns.keys())"

Rows come from stream.py, and the first bad one refuses the table, named by file and row. The rules for the content of a
cell are in columns.py.
"""
from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from data import stream
from data.arrow import AT_A_TIME, Column, in_parts, packed
from data.lines import read_whole
from data.stream import DEFAULT_COLUMNS, SUFFIXES, Rows
from machine.errors import UserError
from options.schema import TableOptions


@dataclass(frozen=True)
class Table:
    """Holds the columns of a file, all of the same length."""

    path: Path
    columns: dict[str, Sequence]  # lists, or Arrow columns of a whole file
    names: dict[str, list[str]] = field(default_factory=dict)  # column -> names of the classes that its numbers stand for
    has_header: bool = False  # whether the names of its columns were read from its first line
    sha256: str = ""  # of the bytes that were parsed

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def column(self, name: str, option: str) -> Sequence:
        """Returns the values under `name`.

        Raises:
            UserError: no such column; the ones that exist are named.
        """
        if name not in self.columns:
            # At most twenty names, shortened: without a header they are whole sentences.
            known = [key if key.isprintable() else ascii(key) for key in list(self.columns)[:20]]
            known = ", ".join(key if len(key) <= 40 else key[:40] + "..." for key in known)
            more = ", ..." if len(self.columns) > 20 else ""
            line = " (its first line; if that is a row, put a header above it, such as text,label)" * self.has_header
            raise UserError(f"{option}: {self.path} has no column {name!r}; it has {known}{more}{line}")
        return self.columns[name]


def read_table(path: Path | str, options: TableOptions = DEFAULT_COLUMNS) -> Table:
    """Reads a CSV, TSV (both with a header), JSON Lines or Parquet file, as its name's ending says.

    Cells of CSV and TSV are strings as they stand; those of JSON Lines and Parquet keep their types.

    Args:
        options: delimiter and encoding.

    Raises:
        UserError: missing, empty, of an unknown ending, of another format than its ending says, or with a bad row; names
            file and row.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        plain = "; plain sentences, without labels, are for --task edits" if path.suffix.lower() == ".txt" else ""
        raise UserError(f"{path}: unknown ending; expected one of {', '.join(SUFFIXES)}{plain}")
    file, digest = read_whole(path, f"a {SUFFIXES[path.suffix.lower()]} file")
    rows = stream.open_rows(path, options=options, file=file)
    # Parquet comes by column already: to take it apart into rows would cost four times the time.
    with rows.file:
        columns = _columns_of(path, good_rows(rows), rows.names) if rows.batches is None else _joined(rows)
    return Table(path, columns, rows.class_names, rows.kind in ("csv", "tsv"), digest)


def read_one_hot_jsonl(path: Path | str, options: TableOptions = DEFAULT_COLUMNS) -> Table:
    """Reads a JSON Lines file of rows with one-hot keys; see `one_hot_columns`.

    Raises:
        UserError: see `read_table`.
    """
    file, digest = read_whole(path, "a JSON Lines file")
    rows = stream.open_rows(path, "jsonl", options=options, file=file)
    with rows.file:
        return replace(one_hot_columns(Path(path), good_rows(rows)), sha256=digest)


def good_rows(rows: Rows) -> Iterator[dict]:
    """Yields the cells of each row by column.

    Raises:
        UserError: the first bad row, or no row at all; names the file and the row.
    """
    number = 0
    for number, row in enumerate(rows.rows, 1):
        # Rows are what a table's user counts; an editor counts lines.
        if row.error:
            where = f"line {row.line}" if rows.kind == "jsonl" else f"row {number} (line {row.line})"
            advice = "; --encoding names another encoding" if row.error.startswith("not UTF-8") else ""
            raise UserError(f"{rows.path}, {where}: {row.error}{advice}")
        yield row.columns
    if number == 0:
        raise UserError(f"{rows.path}: no rows in it; expected a {stream.FORMATS[rows.kind]} file with rows")


def _columns_of(path: Path, rows: Iterable[dict], names: list[str] | None = None) -> dict[str, Column]:
    """Returns the columns of rows, in the order of their first appearance; None where a row lacks one.

    Raises:
        UserError: no row has a column.
    """
    chunks, before = {name: [] for name in names or ()}, 0
    for part in in_parts(rows):
        # JSON objects may have different keys. A dictionary keeps them in order.
        if names is None:
            found = dict.fromkeys(itertools.chain(*part))
            chunks |= {name: [packed([None] * before)] for name in found if name not in chunks}
        for name, found in chunks.items():
            found.append(packed([row.get(name) for row in part]))
        before += len(part)
    if not chunks:
        raise UserError(f"{path}: no rows in it; expected rows with columns")
    return {name: Column(found) for name, found in chunks.items()}


def _joined(rows: Rows) -> dict[str, Column]:
    """Returns the columns of a Parquet file.

    Raises:
        UserError: damaged, or without rows.
    """
    chunks, waiting = {name: [] for name in rows.names}, {name: [] for name in rows.names}
    for batch in itertools.chain(rows.batches, [None]):
        for name, cells in (batch or {}).items():
            waiting[name] += cells
        # A file's batches are small, because its rows may be large.
        if batch is None or len(next(iter(waiting.values()))) >= AT_A_TIME:
            for name, cells in waiting.items():
                chunks[name].append(packed(cells))
            waiting = {name: [] for name in rows.names}
    columns = {name: Column(found) for name, found in chunks.items()}
    if not any(columns.values()):
        raise UserError(f"{rows.path}: no rows in it; expected a Parquet file with rows")
    return columns


def one_hot_columns(path: Path, rows: Iterable[dict]) -> Table:
    """Turns keys like "guess:Ishmael": 1 into a column `guess` with the value "Ishmael".

    The quiz-bowl sets are written like that: their text was once the input of a linear model.
    """
    return Table(path, _columns_of(path, map(_decoded, rows)))


def _decoded(row: dict) -> dict:
    # "guess:Ishmael" is a column and its value; keys without a colon are columns already.
    plain = {key: value for key, value in row.items() if ":" not in key}
    return {**plain, **dict(key.split(":", 1) for key in row if ":" in key)}
