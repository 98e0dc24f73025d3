"""Reads tables row by row in bounded memory: CSV, TSV, JSON Lines, Parquet, or text with a sentence a line.

    for row in stream.open_rows("FILE.csv").rows: print(row.line, row.columns, row.error)

Training, evaluation and prediction all read tables here, by the rules of docs/data.md. A bad row is an error in its place
and the rows after it are read: prediction answers those, while training (tables.py) refuses the file.
"""
from __future__ import annotations

import csv
import itertools
import json
import re
import sys
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data.lines import LONGEST, Line, decoded_lines, open_binary
from machine.errors import UserError
from options.schema import TableOptions

SUFFIXES = {".csv": "CSV", ".tsv": "TSV", ".jsonl": "JSON Lines", ".parquet": "Parquet"}
FORMATS = {"text": "text", **{suffix.removeprefix("."): name for suffix, name in SUFFIXES.items()}}
COLA_COLUMNS = ("source", "label", "mark", "sentence")
DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
# What people type for a tab, which a shell does not pass on easily.
TABS = ("\\t", "tab")
PARQUET_START = b"PAR1"
PARQUET_ROWS = 256  # decoded at a time
DEFAULT_COLUMNS = TableOptions()


class Row(NamedTuple):
    """Holds a row's cells by column, or its error."""

    line: int  # in the file, from 1: the first of the row's lines; in Parquet the row's number
    columns: dict | None
    error: str | None = None


@dataclass(frozen=True)
class Rows:
    """Holds a file that is being read."""

    path: Path
    kind: str  # text, csv, tsv, jsonl or parquet
    names: list[str] | None  # of the columns, where the file says them at its beginning
    rows: Iterator[Row]
    file: BinaryIO
    size: int | None  # bytes; None where it is not known
    class_names: dict[str, list[str]] = field(default_factory=dict)  # of Parquet's ClassLabel columns
    batches: Iterator[dict[str, list]] | None = None  # of Parquet, instead of `rows`: many rows at a time, by column


def open_rows(path: Path | str, kind: str | None = None, headless: bool | None = False,
              options: TableOptions = DEFAULT_COLUMNS, file: BinaryIO | None = None) -> Rows:
    """Opens a file, `-` for standard input.

    Args:
        kind: one of FORMATS; by the file's ending if None (text where it is another one), by the first line of standard
            input (JSON Lines where that is a JSON object, else text).
        headless: whether a TSV has CoLA's four columns and no header; None: if its first line looks so.
        options: delimiter and encoding.
        file: the file's bytes (`lines.read_whole`); None: it is opened.

    Raises:
        UserError: it cannot be read, is empty, or is of another format than its ending says.
    """
    path, standard = Path(path), str(path) == "-"
    suffix = path.suffix.lower().removeprefix(".")
    expected = f"a {FORMATS.get(kind or suffix, 'text')} file"
    try:
        file = file or (sys.stdin.buffer if standard else open_binary(path, expected))
        start = file.peek(LONGEST)
        size = None if standard else path.stat().st_size
    except (OSError, AttributeError) as error:  # AttributeError: standard input is closed
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', error)}); expected {expected}") from None
    if kind is None and standard:
        kind = "jsonl" if _begins_with_an_object(start) else "text"
    kind = kind or suffix
    kind = kind if kind in FORMATS else "text"
    if kind == "parquet":
        if standard:
            raise UserError("--file -: Parquet cannot be read from standard input; give the file's name")
        if not start.startswith(PARQUET_START):
            what = "not the Parquet file its ending says" if start.strip() else "the file is empty; expected a Parquet file"
            raise UserError(f"{path}: {what}")
        names, batches, class_names = _parquet(path, file)
        return Rows(path, kind, names, _parquet_rows(batches), file, size, class_names, batches)
    # A text may begin with these letters; in Parquet, the header of a page follows them.
    if start.startswith(PARQUET_START + b"\x15") and kind != "text":
        raise UserError(f"{path}: a Parquet file, not the {FORMATS[kind]} file its ending says")
    # Every other format is text, a row a line; only a quoted cell of CSV spans lines.
    lines = decoded_lines(file, path, options.encoding)
    if kind == "text":
        return Rows(path, kind, None, map(_text_row, lines), file, size)
    first, lines = _first_line(lines)
    if first is None:
        raise UserError(f"{path}: the file is empty; expected a {FORMATS[kind]} file with rows")
    if kind == "jsonl":
        return Rows(path, kind, None, _json_rows(lines), file, size)
    delimiter = _delimiter(kind, options.delimiter)
    # A sentence in the second column is no digit: CoLA's files are told from tables with a header by their first line.
    cells = first.text.split("\t")
    if headless or headless is None and kind == "tsv" and len(cells) == len(COLA_COLUMNS) and cells[1] in ("0", "1"):
        return Rows(path, kind, list(COLA_COLUMNS), _cola_rows(lines), file, size)
    _check_header(path, kind, first, delimiter, options.delimiter is not None)
    return Rows(path, kind, *_separated(path, kind, lines, delimiter), file, size)


def _first_line(lines: Iterator[Line]) -> tuple[Line | None, Iterator[Line]]:
    """Returns the first line that is not blank, and all lines."""
    before = []
    for line in lines:
        before.append(line)
        if line.error or not is_blank(line.text):
            return line, itertools.chain(before, lines)
    return None, iter(())


def is_blank(text: str) -> bool:
    """Returns whether a text is nothing but spaces and byte order marks (spaces of no width)."""
    return not text.strip() or not text.replace("\ufeff", "").strip()


def _text_row(line: Line) -> Row:
    return Row(line.number, None if line.error else {"text": line.text.rstrip("\r\n")}, line.error)


# ---------------------------------------------------------------- JSON Lines

class _DuplicateKeyError(ValueError):
    """A JSON object has a key twice."""


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter([key for key, _ in pairs])
        twice = next(key for key, count in counts.items() if count > 1)
        raise _DuplicateKeyError(f"two keys are called {twice!r}")
    return found


# A decoder of its own: `json.loads` makes a new one at each call that names a hook.
_decode_json = json.JSONDecoder(object_pairs_hook=_unique_keys).decode


def _begins_with_an_object(start: bytes) -> bool:
    """Returns whether the first line of a file is a JSON object, or the beginning of a long one."""
    first, newline, _ = start.partition(b"\n")
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return not newline and first.startswith(b"{")


def _json_rows(lines: Iterator[Line]) -> Iterator[Row]:
    """Yields the objects of a JSON Lines file; blank lines are left out.

    `datasets` is not used: its reader (pyarrow's) ends in a segmentation fault if the first line is `null`.
    """
    for number, text, error in lines:
        row = None
        if not error:
            if is_blank(text):
                continue
            try:
                row = _decode_json(text.removeprefix("\ufeff"))
            except (_DuplicateKeyError, RecursionError) as found:
                error = str(found)
            except json.JSONDecodeError:
                pass
            except ValueError:
                error = "a number of more than 4,300 digits"
            if not error and not isinstance(row, dict):
                row, error = None, "not a JSON object; expected a JSON Lines file"
        yield Row(number, row, error)


# ---------------------------------------------------------------- CSV and TSV

def _delimiter(kind: str, given: str | None) -> str:
    """Returns the character between cells.

    Raises:
        UserError: the one that was given cannot be one.
    """
    if given is None:
        return "," if kind == "csv" else "\t"
    if given in TABS:
        return "\t"
    if len(given) != 1 or given in '\r\n"\0 ' or "\ud800" <= given <= "\udfff":
        raise UserError(f"--delimiter {given!r}: expected one character, such as ';' or tab")
    return given


def _check_header(path: Path, kind: str, first: Line, delimiter: str, given: bool) -> None:
    """Checks that the first line of a CSV or TSV is a header of that format.

    Raises:
        UserError: it is something else; names that, and the remedy.
    """
    if first.error:
        raise UserError(f"{path}, line {first.number}: {first.error}; expected a {FORMATS[kind]} file")
    line = first.text.rstrip("\r\n")
    if "\0" in line:
        raise UserError(f"{path}, line {first.number}: holds NUL characters, as UTF-16 without a byte order mark does; "
                        "give --encoding utf-16-le, or save it as UTF-8")
    if note := re.fullmatch(r'"?sep=(.*?)"?', line, re.IGNORECASE):
        other = f", and give --delimiter {_shown(note[1])}" if note[1] not in ("", delimiter) else ""
        raise UserError(f"{path}: its first line is {line[:20]!r}, a note to Excel and no header; delete that line{other}")
    # A JSON Lines file under the wrong name would be a table of one column.
    if line.startswith("{"):
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            pass
        else:
            raise UserError(f"{path}: holds JSON, not the {FORMATS[kind]} its ending says")
    # A header without its delimiter is one column, or a table with another delimiter.
    if delimiter not in line:
        for other, name in DELIMITERS.items():
            if other in line:
                said = "as --delimiter says" if given else f"which is not the {FORMATS[kind]} its ending says"
                expected = f"not by {delimiter!r} {said}" if given else said
                raise UserError(f"{path}: its columns are separated by {name}, {expected}; give --delimiter {_shown(other)}")


def _shown(delimiter: str) -> str:
    """Returns a delimiter as it is typed in a shell."""
    return "tab" if delimiter == "\t" else repr(delimiter)


def _separated(path: Path, kind: str, lines: Iterator[Line], delimiter: str) -> tuple[list[str], Iterator[Row]]:
    """Returns the names of the columns of a CSV or TSV, and an iterator over its rows.

    Columns without a name (the index that pandas writes) are read and left out.
    """
    records = (_csv_records if kind == "csv" else _tsv_records)(lines, delimiter)
    # The first record is the header: names without the spaces around them.
    number, header, error = next(records, (1, [], None))
    if error:
        raise UserError(f"{path}, line {number}: not a readable {FORMATS[kind]} header ({error})")
    header = [name.strip().strip("\ufeff").strip() for name in header]
    names = [name for name in header if name]
    if not names:
        raise UserError(f"{path}: its first line names no column; expected a header such as text,label")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{path}: two columns are called {twice[0]!r}; if its first line is a row, put a header above it, "
                        "such as text,label")
    cause = f"; a cell that holds {delimiter!r} stands in double quotes" if kind == "csv" else \
        "; cells of a TSV are not quoted and hold no tab and no line end"

    def rows() -> Iterator[Row]:
        width, all_named = len(header), len(names) == len(header)
        for number, cells, error in records:
            if len(cells) != width and not error:
                # Spreadsheets write empty cells as far as their widest row; anything else has slipped into another column.
                if len(cells) < width or any(cell.strip() for cell in cells[width:]):
                    error = f"{len(cells)} cells, and the header has {width} ({', '.join(names)[:60]}){cause}"
                cells = cells[:width]
            if error:
                yield Row(number, None, error)
                continue
            columns = dict(zip(header, cells, strict=True))
            if not all_named:
                columns.pop("", None)
            yield Row(number, columns)
    return names, rows()


def _tsv_records(lines: Iterator[Line], delimiter: str) -> Iterator[tuple[int, list[str], str | None]]:
    """Yields number, cells and error of each line that is not empty: in a TSV a quote is a character like others."""
    for number, text, error in lines:
        text = text.rstrip("\r\n")
        if text or error:
            yield number, text.split(delimiter), error


def _csv_records(lines: Iterator[Line], delimiter: str) -> Iterator[tuple[int, list[str], str | None]]:
    """Yields first line, cells and error of each record of a CSV; a cell in quotes may span lines."""
    waiting: deque[Line] = deque()
    taken: list[Line] = []  # lines of the record that is being read
    wrong: list[str] = []  # errors of these

    def feed() -> Iterator[str]:
        while True:
            line = waiting.popleft() if waiting else next(lines, None)
            if line is None:
                return
            taken.append(line)
            if line.error:
                wrong.append(line.error)
            yield line.text

    # The limit belongs to the process; the module's own is too low for a long document.
    csv.field_size_limit(LONGEST)
    # Strict: a lenient reader drops quotes, and joins rows, without a word.
    reader = csv.reader(feed(), delimiter=delimiter, strict=True)
    while True:
        taken.clear()
        try:
            cells, error = next(reader), None
        except StopIteration:
            return
        except csv.Error as found:
            cells, error = [], _quote_error(str(found), taken)
            # An open quote has swallowed rows that may be good. They are read again, as rows.
            waiting.extendleft(reversed(taken[1:]))
            del taken[1:]
            wrong[:] = filter(None, [taken[0].error])
            reader = csv.reader(feed(), delimiter=delimiter, strict=True)
        if wrong:
            error = wrong[0]
            wrong.clear()
        if cells or error:
            yield taken[0].number, cells, error


def _quote_error(found: str, taken: list[Line]) -> str:
    """Returns the error of a record with wrong quotes, from the message of Python's csv module."""
    if "limit" in found:
        return f"a cell of more than {LONGEST:,} characters, or a double quote that is not closed"
    if "end of data" in found:
        return "a double quote that is not closed"
    last = taken[-1].number
    where = f" (line {last})" if last != taken[0].number else ""
    return f"text after a closing double quote{where}: inside a cell in quotes a double quote is written twice"


def _cola_rows(lines: Iterator[Line]) -> Iterator[Row]:
    """Yields the rows of one of CoLA's files: four columns, no header."""
    for number, text, error in lines:
        cells = text.rstrip("\r\n").split("\t")
        if not error and len(cells) != len(COLA_COLUMNS):
            error = f"{len(cells)} column(s); expected {len(COLA_COLUMNS)}, separated by tabs: {', '.join(COLA_COLUMNS)}"
        yield Row(number, None if error else dict(zip(COLA_COLUMNS, cells, strict=True)), error)


# ---------------------------------------------------------------- Parquet

def _parquet(path: Path, file: BinaryIO) -> tuple[list[str], Iterator[dict[str, list]], dict[str, list[str]]]:
    """Returns the names of the columns of a Parquet file, batches of rows by column, and the names of its classes."""
    import pyarrow.parquet

    # Rows are decoded a batch at a time; the file's end, which has the schema, is read first.
    try:
        table = pyarrow.parquet.ParquetFile(file)
        schema = table.schema_arrow
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({_first_words(error)})") from None
    if twice := [name for name, count in Counter(schema.names).items() if count > 1]:
        raise UserError(f"{path}: two columns are called {twice[0]!r}")

    def batches() -> Iterator[dict[str, list]]:
        number = 0
        try:
            for batch in table.iter_batches(batch_size=PARQUET_ROWS):
                yield batch.to_pydict()
                number += batch.num_rows
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            raise UserError(f"{path}: damaged after row {number} ({_first_words(error)})") from None
    return schema.names, batches(), _class_names(schema.metadata or {})


def _parquet_rows(batches: Iterator[dict[str, list]]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for cells in zip(*batch.values(), strict=True):
            number += 1
            yield Row(number, dict(zip(batch, cells, strict=True)))


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Returns the names of the classes of each ClassLabel column: `datasets` writes them into a Parquet file's metadata."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        # A list of classes has them in its items.
        kinds = {name: feature.get("feature", feature) for name, feature in features.items()}
        found = {name: kind["names"] for name, kind in kinds.items() if kind.get("_type") == "ClassLabel"}
    # None, or metadata of another program.
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return {}
    return {name: names for name, names in found.items() if _are_names(names)}


def _are_names(value) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _first_words(error: Exception) -> str:
    """Returns the beginning of a library's message, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
