"""Turns the columns of a table into texts, names of classes and numbers, and refuses cells that are none of these.

    python -c "from data import columns, tables; print(columns.labels_of(tables.read_table('FILE.csv'), 'label'))"

Nothing is guessed from a cell's looks: a review that says "NA" is a text, and `01` and `1` are two classes. A list, a number
or a boolean is no text: its Python form would be trained on in silence.
"""
from __future__ import annotations

import itertools
import math
import re
import string
from collections.abc import Iterator, Sequence
from decimal import Decimal

from data.arrow import Column
from data.stream import is_blank
from data.tables import Table
from machine.errors import UserError
from options.schema import TableOptions

TEXT_COLUMNS = ("text", "sentence", "review")  # the first of them that exists, where --text-column does not say
MISSING = ("", "na", "n/a", "nan", "null", "none")  # of a number
LONGEST_NAME = 200  # characters of a class's name
# Standardising sums squares over all rows: beyond this size the sum leaves float64.
LARGEST_NUMBER = 1e150

SURROGATE = re.compile("[\ud800-\udfff]")
# Ends of lines, other control characters and the byte order mark, which no table or plot shows.
INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]")
DIGITS = re.compile("[+-]?[0-9]+")
FRACTION = re.compile(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?[0-9]+[eE][+-]?[0-9]+")
PLAIN_NUMBER = re.compile("0|-?[1-9][0-9]*")
EXPECTED_LABEL = "expected a string, a boolean or a whole number"
NO_CLASS = -1  # of a ClassLabel column: the row has no label
TYPES = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object", bytes: "bytes"}


class _CellError(ValueError):
    """A cell does not serve its column; says why, without naming file and row."""


# ---------------------------------------------------------------- texts

def texts_of(table: Table, options: TableOptions, separator: str) -> Column:
    """Returns the text of each row: the filled template, or the text columns joined by the tokenizer's separator.

    Raises:
        UserError: an unknown column, a malformed template, a cell that is no text, an empty text.
    """
    if options.template is not None:
        option, (literals, names) = "--template", _template(options.template)
    else:
        option, literals = "--text-column", None
        names = options.text_column or tuple(name for name in TEXT_COLUMNS if name in table.columns)[:1]
        if not names:
            table.column("text", option)  # raises, naming the columns that exist
    # A template may name a column twice; it is read and checked once.
    cells = {name: Column.of(_strings(table, name, option)) for name in dict.fromkeys(names)}
    return Column.of(_joined(table, cells, names, literals, separator, options.pairs))


def _joined(table: Table, cells: dict[str, Column], names: Sequence[str], literals: list[str] | None, separator: str,
            pairs: bool) -> Iterator[str]:
    """Yields the text of each row.

    Args:
        literals: the texts around the columns of a template; None: the separator stands between the columns.
        pairs: whether two columns are a pair.
    """
    for number, row in enumerate(zip(*map(cells.get, names), strict=True), 1):
        if all(map(is_blank, row)):
            raise UserError(f"{table.path}, row {number}: the text ({', '.join(names)}) is empty")
        # A part that is missing leaves no separator behind; in a pair and in a template its place stays empty.
        if literals is None:
            yield separator.join(cell for cell in row if pairs or not is_blank(cell))
        else:
            yield "".join(itertools.chain(*zip(literals, (*row, ""), strict=True)))


def _template(template: str) -> tuple[list[str], list[str]]:
    """Splits a template into the literal texts around its columns (one more than columns) and the columns' names.

    Raises:
        UserError: it is malformed, or names no column.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"--template {template!r}: {error}") from None
    literals, names = [""], []
    for literal, name, spec, conversion in parts:
        literals[-1] += literal
        if name is None:
            continue
        # "{x:.2f}" and "{x!r}" would format a number: columns are texts.
        if spec or conversion:
            names = []
            break
        names.append(name)
        literals.append("")
    if not names:
        raise UserError(f"--template {template!r}: expected column names in braces, such as "
                        '"Q: {question} A: {guess}"')
    return literals, names


def _strings(table: Table, name: str, option: str) -> Iterator[str]:
    """Yields a column's cells as texts, "" where one is missing.

    Raises:
        UserError: no such column, or a cell that is no text; names the row.
    """
    for row, value in enumerate(table.column(name, option), 1):
        try:
            yield _text(value)
        except _CellError as error:
            raise UserError(f"{table.path}, row {row}: the text ({name}) {error}") from None


def _text(value) -> str:
    if value is None:
        return ""
    # Parquet written by other programs often holds text as bytes.
    if isinstance(value, bytes):
        value = _decoded(value)
    if not isinstance(value, str):
        raise _CellError(f"is {_type_of(value)}; expected a string")
    if not value.isascii() and (half := SURROGATE.search(value)):
        raise _CellError(f"holds half of a surrogate pair (U+{ord(half[0]):04X}), which is no character")
    return value


def _decoded(value: bytes, subject: str = "") -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise _CellError(f"{subject}is bytes that are not UTF-8; expected a string") from None


def _type_of(value) -> str:
    if isinstance(value, float) and math.isnan(value):
        return "not a number (NaN)"
    return TYPES.get(type(value), f"of type {type(value).__name__}")


# ---------------------------------------------------------------- labels

def labels_of(table: Table, column: str) -> list[str]:
    """Returns each row's class by name: strings as they are, whole numbers in digits, booleans as false and true.

    Raises:
        UserError: no such column, a missing label, labels of mixed types, or one that is no name of a class.
    """
    class_names = table.names.get(column)
    kinds: dict[str, tuple[int, object]] = {}  # type -> the first row of it, and its label
    # Few classes stand for many rows: each value of a type is looked at once.
    seen: dict[tuple[type, object], str] = {}
    names = []
    for row, value in enumerate(table.column(column, "--label-column"), 1):
        key = (type(value), value) if isinstance(value, str | int | float) else None
        name = seen.get(key)
        if name is None:
            try:
                if _is_missing(value, class_names):
                    raise _CellError(f"the label ({column}) is missing")
                kind, name = _class_of(value, class_names)
            except _CellError as error:
                raise UserError(f"{table.path}, row {row}: {error}") from None
            kinds.setdefault(kind, (row, value))
            if key is not None:
                seen[key] = name
        names.append(name)
    # "1" and "positive" in one column are two codes for one thing, or a row that slipped.
    if len(kinds) > 1:
        (one, (row, value)), (other, (row2, value2)) = list(kinds.items())[:2]
        raise UserError(f"{table.path}: labels of mixed types in {column}: a {one} ({_quoted(value)}, row {row}) and a "
                        f"{other} ({_quoted(value2)}, row {row2})")
    return names


def _is_missing(value, class_names: list[str] | None) -> bool:
    """Returns whether a row has no label: nothing, spaces, NaN, or the -1 of a ClassLabel column."""
    if isinstance(value, str):
        return is_blank(value)
    return value is None or isinstance(value, float) and math.isnan(value) or class_names is not None and value == NO_CLASS


def _class_of(value, class_names: list[str] | None) -> tuple[str, str]:
    """Returns the type of a label and the name of its class.

    Raises:
        _CellError: it is no name of a class.
    """
    if isinstance(value, bytes):
        value = _decoded(value, "label ")
    # Before numbers: Python counts booleans as numbers.
    if isinstance(value, bool):
        return "boolean", str(value).lower()
    if isinstance(value, int) or isinstance(value, float) and value.is_integer():
        if class_names is None:
            return "whole number", _name(_digits(int(value)))
        if not 0 <= value < len(class_names):
            raise _CellError(f"label {_quoted(value)}; the file has names for 0 to {len(class_names) - 1}")
        return "whole number", _name(class_names[int(value)])
    if not isinstance(value, str):
        what = _quoted(value) if isinstance(value, float) else f"is {_type_of(value)}"
        raise _CellError(f"label {what}; {EXPECTED_LABEL}")
    name = _name(value)
    # Digits stay as they are written: 01 may be a code.
    if DIGITS.fullmatch(name):
        return "whole number", name
    # Programs write whole numbers as 1.0 once a cell of their column was empty; any other fraction is a score, no class.
    if FRACTION.fullmatch(name):
        whole, _, fraction = name.partition(".")
        if not DIGITS.fullmatch(whole) or fraction.strip("0"):
            raise _CellError(f"label {_quoted(name)}; {EXPECTED_LABEL}")
        return "decimal number", whole
    return "text", name


def _name(value: str) -> str:
    """Returns the name of a class without the spaces around it.

    Raises:
        _CellError: it is empty or too long, or holds a character that cannot be seen or written.
    """
    name = value.strip().strip("\ufeff").strip()
    if not 0 < len(name) <= LONGEST_NAME:
        raise _CellError(f"label of {len(name):,} characters; expected the name of a class, of at most {LONGEST_NAME}")
    if wrong := SURROGATE.search(name) or INVISIBLE.search(name):
        raise _CellError(f"label {_quoted(name)} holds the character U+{ord(wrong[0]):04X}, which cannot be shown; expected "
                         "the name of a class")
    return name


def _digits(value: int) -> str:
    """Returns a whole number in digits; Python refuses to write thousands of them."""
    return str(value) if abs(value) < 10 ** LONGEST_NAME else "9" * (LONGEST_NAME + 1)


def _quoted(value) -> str:
    """Returns the beginning of a cell in quotes, on one line, with escapes where it cannot be seen."""
    try:
        return repr(str(value)[:40])
    except ValueError:
        return "a number of thousands of digits"


def classes_of(names: list[str], where: str) -> list[str]:
    """Returns the classes in order: whole numbers by value, false before true, strings by the alphabet.

    Raises:
        UserError: fewer than two classes.
    """
    classes = sorted(set(names))
    if all(map(PLAIN_NUMBER.fullmatch, classes)):
        classes.sort(key=Decimal)  # which has no limit of digits
    if len(classes) < 2:
        raise UserError(f"{where}: every label is {classes[0]}; training needs at least two classes")
    return classes


# ---------------------------------------------------------------- several labels, and labels that are numbers

def label_columns(table: Table, columns: str) -> list[str]:
    """Returns the names in --label-column: one column, or several with commas between them."""
    return [columns] if columns in table.columns or "," not in columns else [name.strip() for name in columns.split(",")]


def problem_in(table: Table, columns: str) -> str:
    """Guesses the problem of a table's labels: multi-label, regression or single-label.

    Lists, and several columns, are any number of labels at once; numbers, some of them with a fraction, are scores. Whole
    numbers are classes. Any other column is left to the reader of classes: its errors name the cell.
    """
    names = label_columns(table, columns)
    if len(names) > 1:
        return "multi-label"
    column = table.column(names[0], "--label-column")
    if isinstance(next((value for value in column if value is not None), None), list):
        return "multi-label"
    # Few classes stand for many rows: each value of a type is looked at once. Other cells are no score, like None.
    found = {(type(value), value if isinstance(value, str | int | float) else None) for value in column if value is not None}
    values = [value for _, value in found]
    return "regression" if any(map(_is_fraction, values)) and all(map(_is_score, values)) else "single-label"


def _is_score(value) -> bool:
    try:
        return not isinstance(value, bool) and not math.isnan(_number(value))
    except _CellError:
        return False


def _is_fraction(value) -> bool:
    # A year is no fraction, and neither is 1.0: programs write whole numbers so.
    if isinstance(value, str) and not FRACTION.fullmatch(value.strip()):
        return False
    return isinstance(value, str | float) and _is_score(value) and not float(value).is_integer()


def scores_of(table: Table, column: str) -> list[float]:
    """Returns each row's label as a number.

    Raises:
        UserError: no such column, a missing label, or one that is no finite number.
    """
    found = []
    for row, value in enumerate(table.column(column, "--label-column"), 1):
        try:
            number = _number(value)
            if isinstance(value, bool) or math.isnan(number):
                raise _CellError(f"is {_type_of(value)}" if isinstance(value, bool) else "is missing")
        except _CellError as error:
            what = str(error) if str(error).startswith("is ") else f"is {str(error).partition(';')[0]}"
            raise UserError(f"{table.path}, row {row}: the label ({column}) {what}; expected a finite number") from None
        found.append(number)
    return found


def label_sets_of(table: Table, columns: str) -> list[list[str]]:
    """Returns the names of each row's labels: those in its list, or of the columns that say 1 or true. They may be none.

    Raises:
        UserError: no such column, a missing label, or one that is no name of a class, no list, or neither 0 nor 1.
    """
    names = label_columns(table, columns)
    found: list[list[str]] = [[] for _ in range(len(table))]
    for name in names:
        class_names = table.names.get(name)
        for row, value in enumerate(table.column(name, "--label-column")):
            try:
                found[row] += _names_in(value, class_names) if len(names) == 1 else [name] * _is_there(value)
            except _CellError as error:
                raise UserError(f"{table.path}, row {row + 1}: {str(error).replace('label', f'the label ({name})', 1)}"
                                ) from None
    return found


def _names_in(value, class_names: list[str] | None) -> list[str]:
    if not isinstance(value, list):
        what = "is missing" if _is_missing(value, None) else f"is {_type_of(value)}"
        raise _CellError(f"label {what}; expected a list of names (JSON Lines or Parquet), or several --label-column a,b of "
                         "0 and 1")
    if any(_is_missing(one, class_names) for one in value):
        raise _CellError("label has a name that is missing")
    # In the order of the list, each once.
    return list(dict.fromkeys(_class_of(one, class_names)[1] for one in value))


def _is_there(value) -> bool:
    known = {"0": False, "1": True, "false": False, "true": True, "0.0": False, "1.0": True}
    text = str(value).strip().lower()
    if text not in known:
        raise _CellError(f"label {_quoted(value)}; expected 0 or 1 in each of several columns")
    return known[text]


# ---------------------------------------------------------------- numbers

def features_of(table: Table, columns: tuple[str, ...]) -> list[list[float]]:
    """Returns the numeric columns by row, NaN where a cell is empty.

    Raises:
        UserError: an unknown column, or a cell that is neither empty nor a number whose square is finite.
    """
    rows = [[] for _ in range(len(table))]
    for column in columns:
        for row, value in enumerate(table.column(column, "--feature-columns")):
            try:
                rows[row].append(_number(value))
            except _CellError as error:
                raise UserError(f"{table.path}, row {row + 1}: feature {column} is {error}") from None
    return rows if columns else []


def _number(value) -> float:
    if value is None or isinstance(value, str) and value.strip().lower() in MISSING:
        return math.nan
    try:
        if isinstance(value, str) and "_" in value:  # Python's own way of writing a number
            raise ValueError
        number = float(value)
    except (TypeError, ValueError):
        number = None
    except OverflowError:  # a whole number beyond float64
        number = math.inf
    if number is None or math.isinf(number):
        what = _quoted(value) if isinstance(value, str | int | float) else _type_of(value)
        raise _CellError(f"{what}; expected a finite number or an empty cell")
    if abs(number) > LARGEST_NUMBER:
        raise _CellError(f"{_quoted(value)}; expected a number of at most {LARGEST_NUMBER:g}, whose square is finite")
    return number
