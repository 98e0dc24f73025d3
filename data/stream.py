"""Rows of a file one after the other, in bounded memory: text, CSV, TSV, JSON Lines or Parquet.

    for row in stream.open_rows("FILE.csv").rows: print(row.line, row.columns, row.error)

tables.py reads a whole table to learn from and refuses it at the first mistake; here a bad line is an error in its
place and the rest goes on.
"""
from __future__ import annotations

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data import tables
from machine.errors import UserError

LONGEST = 1 << 20  # bytes of a line
FORMATS = {"text": "text", **{suffix.removeprefix("."): name for suffix, name in tables.SUFFIXES.items()}}
COLA_COLUMNS = ("source", "label", "mark", "sentence")


@dataclass(frozen=True)
class Row:
    """A row, or what is wrong with it."""

    line: int  # in the file, from 1; a row's number in Parquet
    columns: dict | None
    error: str | None = None


@dataclass(frozen=True)
class Rows:
    """A file that is being read."""

    path: Path
    kind: str  # text, csv, tsv, jsonl or parquet
    names: list[str] | None  # of the columns, where the file says them at its beginning
    rows: Iterator[Row]
    file: BinaryIO
    size: int | None  # bytes; None where it is not known


def open_rows(path: Path | str, kind: str | None = None, cola: bool = False) -> Rows:
    """Opens a file, `-` for standard input.

    Args:
        kind: one of FORMATS; by the file's ending if None (text where it is another one), by the first line of standard
            input (JSON Lines where that is a JSON object, else text).
        cola: whether a TSV may be one without a header, as CoLA's are.

    Raises:
        UserError: it cannot be read, or its header can not.
    """
    path, standard = Path(path), str(path) == "-"
    try:
        file = sys.stdin.buffer if standard else open(path, "rb")  # noqa: SIM115 (read on after this function)
        first, newline, _ = file.peek(LONGEST).partition(b"\n")
        size = None if standard else path.stat().st_size
    except (OSError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', error)}); expected a text, CSV, TSV, JSON "
                        "Lines or Parquet file") from None
    if kind is None and standard:
        is_json = isinstance(_json(first), dict) if newline else first.startswith(b"{")
        kind = "jsonl" if is_json else "text"
    kind = kind or path.suffix.lower().removeprefix(".")
    kind = kind if kind in FORMATS else "text"
    if kind == "parquet":
        if standard:
            raise UserError("--file -: Parquet cannot be read from standard input; give the file's name")
        return Rows(path, kind, *_parquet(path, file), file, size)
    if kind != "text" and first.startswith(b"PAR1"):
        raise UserError(f"{path}: a Parquet file, not the {FORMATS[kind]} file its ending says")
    lines = _lines(file)
    if kind in ("csv", "tsv"):
        cells = first.decode("utf-8", "replace").split("\t")
        headless = cola and kind == "tsv" and len(cells) == len(COLA_COLUMNS) and cells[1] in ("0", "1")
        return Rows(path, kind, *_separated(path, lines, kind, headless), file, size)
    return Rows(path, kind, None, map({"text": _text, "jsonl": _json_line}[kind], lines), file, size)


def _lines(file: BinaryIO) -> Iterator[tuple[int, str, str | None]]:
    """Yields number, text and error of each line; bytes that are not UTF-8 stand as lone surrogates."""
    number = 0
    while line := file.readline(LONGEST):
        number, error = number + 1, None
        if len(line) == LONGEST and not line.endswith(b"\n"):
            error = f"the line is longer than {LONGEST:,} bytes"
            while line and not line.endswith(b"\n"):
                line = file.readline(LONGEST)
            line = b"\n"
        text = line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")
        yield number, text, error or _not_utf8(text)


def _not_utf8(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"not UTF-8 (byte 0x{ord(text[error.start]) & 0xFF:02x})"
    return None


def _text(line: tuple[int, str, str | None]) -> Row:
    number, text, error = line
    return Row(number, None if error else {"text": text.rstrip("\r\n")}, error)


def _json(text: str | bytes):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json_line(line: tuple[int, str, str | None]) -> Row:
    number, text, error = line
    row = None if error else _json(text)
    if not error and not isinstance(row, dict):
        error = "not a JSON object"
    return Row(number, None if error else row, error)


def _separated(path: Path, lines: Iterator[tuple[int, str, str | None]], kind: str, headless: bool
               ) -> tuple[list[str], Iterator[Row]]:
    """Returns the header of a CSV or TSV, and an iterator over its rows."""
    errors: dict[int, str] = {}  # of lines that belong to the record that is read

    def texts() -> Iterator[str]:
        for number, text, error in lines:
            if error:
                errors[number] = error
            yield text

    quoting = csv.QUOTE_NONE if headless else csv.QUOTE_MINIMAL
    reader = csv.reader(texts(), delimiter="," if kind == "csv" else "\t", quoting=quoting)
    try:
        names = list(COLA_COLUMNS) if headless else next(reader, [])
    except csv.Error as error:
        raise UserError(f"{path}: not a readable {FORMATS[kind]} header ({error})") from None
    if errors:
        raise UserError(f"{path}, line 1: {next(iter(errors.values()))}")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{path}: two columns are called {twice[0]!r}")

    def rows() -> Iterator[Row]:
        while True:
            line = reader.line_num + 1
            try:
                cells, error = next(reader), None
            except StopIteration:
                return
            except csv.Error as found:  # a field beyond csv's limit, which an open quote makes of the rest of the file
                cells, error = [], f"not a readable {FORMATS[kind]} row ({found})"
            if errors:
                error = next(iter(errors.values()))
                errors.clear()
            elif not error and not cells:
                continue  # a blank line
            elif not error and len(cells) != len(names):
                error = f"{len(cells)} columns; expected {len(names)}"
            yield Row(line, None if error else dict(zip(names, cells, strict=True)), error)
    return names, rows()


def _parquet(path: Path, file: io.BufferedReader) -> tuple[list[str], Iterator[Row]]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0][:200]})") from None

    def rows() -> Iterator[Row]:
        number = 0
        try:
            for batch in table.iter_batches(batch_size=256):
                for columns in batch.to_pylist():
                    number += 1
                    yield Row(number, columns)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{path}: damaged after row {number} ({str(error).splitlines()[0][:200]})") from None
    return table.schema_arrow.names, rows()
