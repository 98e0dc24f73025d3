"""Reads labelled tables (CSV, TSV, JSON Lines, Parquet) into texts, classes and numeric features.

    python -c "from data import tables; print(tables.read_table('FILE.csv').columns.keys())"

Files are read by `datasets`. What a cell means is decided here and nowhere else: in CSV and TSV nothing
is guessed from its looks (a review that says "NA" is a text), and every mistake is named by file and row.
"""
from __future__ import annotations

import json
import math
import random
import re
import string
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from machine.errors import UserError
from options.schema import TableOptions

SUFFIXES = {".csv": "CSV", ".tsv": "TSV", ".jsonl": "JSON Lines", ".parquet": "Parquet"}
EVAL_SPLITS = ("validation", "dev", "eval", "val")  # in this order, where --eval-split does not say
TEXT_COLUMNS = ("text", "sentence", "review")  # the first of them that exists, where --text-column does not say
MISSING = ("", "na", "n/a", "nan", "null", "none")  # of a number


@dataclass(frozen=True)
class Split:
    """Holds labelled sentences, in file order."""

    sentences: list[str]
    labels: list[int]
    sources: list[str] = field(default_factory=list)  # CoLA's source code: the publication, or the phenomenon
    features: list[list[float]] = field(default_factory=list)  # for each sentence its numbers, NaN where one is missing

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows) -> Split:
        """Returns the given rows, in that order."""
        return Split(*([values[row] for row in rows] if values else []
                       for values in (self.sentences, self.labels, self.sources, self.features)))


@dataclass(frozen=True)
class Table:
    """Holds the columns of a file, all of the same length."""

    path: Path
    columns: dict[str, list]
    names: dict[str, list[str]] = field(default_factory=dict)  # column -> names of the classes that its numbers stand for

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def column(self, name: str, option: str) -> list:
        """Returns the values under `name`.

        Raises:
            UserError: no such column; the ones that exist are named.
        """
        if name not in self.columns:
            known = ", ".join(list(self.columns)[:20]) + (", ..." if len(self.columns) > 20 else "")
            raise UserError(f"{option}: {self.path} has no column {name!r}; it has {known}")
        return self.columns[name]


# ---------------------------------------------------------------- files

def read_table(path: Path | str) -> Table:
    """Reads a CSV, TSV (both with a header), JSON Lines or Parquet file, as its name's ending says.

    Cells of CSV and TSV are strings as they stand; those of JSON Lines and Parquet keep their types.

    Raises:
        UserError: missing, empty, of an unknown ending, or not what its ending says.
    """
    path = Path(path)
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        plain = "; plain sentences, without labels, are for --task edits" if path.suffix.lower() == ".txt" else ""
        raise UserError(f"{path}: unknown ending; expected one of {', '.join(SUFFIXES)}{plain}")
    try:
        with open(path, "rb") as file:
            start = file.read(1 << 20)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a {kind} file") from None
    if not start.strip():
        raise UserError(f"{path}: the file is empty; expected a {kind} file with rows")
    if (start[:4] == b"PAR1") != (kind == "Parquet"):
        raise UserError(f"{path}: {'' if kind == 'Parquet' else 'a Parquet file, '}not the {kind} file its ending says")
    table = _read(path, kind, _header(path, kind, start) if kind in ("CSV", "TSV") else None)
    if not table.columns or not len(table):
        raise UserError(f"{path}: no rows in it; expected a {kind} file with rows")
    return table


def read_sentences(path: Path | str) -> list[str]:
    """Reads a text file, one sentence a line; empty lines are left out, and several spaces are one.

    Raises:
        UserError: missing, not UTF-8, or without a sentence.
    """
    try:
        lines = [" ".join(line.split()) for line in Path(path).read_bytes().decode("utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start})") from None
    if not any(lines):
        raise UserError(f"{path}: no sentence in it; expected one a line")
    return [line for line in lines if line]


def _read(path: Path, kind: str, header: list[str] | None) -> Table:
    """Reads a file's columns, CSV and Parquet through `datasets`, whose cache folder is removed at once."""
    if kind == "JSON Lines":
        rows = _json_lines(path)
        names = dict.fromkeys(key for row in rows for key in row)
        return Table(path, {name: [row.get(name) for row in rows] for name in names})
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the library raises what it logs
    arguments, read = {}, datasets.Dataset.from_parquet
    if header is not None:
        read = datasets.Dataset.from_csv
        arguments = {"sep": "," if kind == "CSV" else "\t", "keep_default_na": False, "encoding_errors": "strict",
                     "features": datasets.Features({name: datasets.Value("string") for name in header})}
    try:
        with tempfile.TemporaryDirectory() as cache:
            rows = read(str(path), cache_dir=cache, keep_in_memory=True, **arguments)
            return Table(path, rows[:], {name: feature.names for name, feature in rows.features.items()
                                         if isinstance(feature, datasets.ClassLabel)})
    except Exception as error:  # pandas', pyarrow's and the library's own classes; some are wrapped
        cause = error.__cause__ or error
        if "corresponds to no data" in str(cause):
            return Table(path, {})
        said = (str(cause).strip() or type(cause).__name__).splitlines()[0][:200]
        raise UserError(f"{path}: not a readable {kind} file ({said})") from None


def _header(path: Path, kind: str, start: bytes) -> list[str]:
    """Returns the names of a CSV's or TSV's columns.

    Raises:
        UserError: not UTF-8, JSON, separated by another character, or two columns of the same name.
    """
    import csv

    try:
        first = start.decode("utf-8-sig", errors="strict" if len(start) < 1 << 20 else "ignore").lstrip("\n\r")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte 0x{start[error.start]:02x} at {error.start}); expected a {kind} "
                        "file") from None
    delimiter, other = (",", "\t") if kind == "CSV" else ("\t", ",")
    line = first.splitlines()[0]
    try:
        if isinstance(json.loads(line), dict):
            raise UserError(f"{path}: holds JSON, not the {kind} its ending says")
    except ValueError as error:
        if isinstance(error, UserError):
            raise
    if delimiter not in line and other in line:
        raise UserError(f"{path}: its columns are separated by {'tabs' if other == chr(9) else 'commas'}, which is not the "
                        f"{kind} its ending says")
    try:
        header = next(csv.reader(first.splitlines(keepends=True), delimiter=delimiter))
    except csv.Error as error:
        raise UserError(f"{path}: not a readable {kind} header ({error})") from None
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise UserError(f"{path}: two columns are called {twice[0]!r}")
    return header


def one_hot_columns(path: Path, rows: list[dict]) -> Table:
    """Turns keys like "guess:Ishmael": 1 into a column `guess` with the value "Ishmael".

    The quiz-bowl sets are written like that: their text was once the input of a linear model.
    """
    decoded = []
    for row in rows:
        plain = {key: value for key, value in row.items() if ":" not in key}
        decoded.append({**plain, **dict(key.split(":", 1) for key in row if ":" in key)})
    names = list(dict.fromkeys(name for row in decoded for name in row))
    return Table(path, {name: [row.get(name) for row in decoded] for name in names})


def read_one_hot_jsonl(path: Path | str) -> Table:
    """Reads a JSON Lines file whose rows name their text as one-hot keys; see `one_hot_columns`.

    Raises:
        UserError: unreadable, empty, or a line that is no JSON object.
    """
    rows = _json_lines(Path(path))
    if not any(rows):
        raise UserError(f"{path}: no rows in it; expected a JSON Lines file with rows")
    return one_hot_columns(Path(path), rows)


def _json_lines(path: Path) -> list[dict]:
    """Reads the objects of a JSON Lines file and skips blank lines.

    `datasets` is not used: its reader (pyarrow's) ends in a segmentation fault if the first line is `null`.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a JSON Lines file") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object; expected a JSON Lines file")
        rows.append(row)
    return rows


# ---------------------------------------------------------------- columns

def texts_of(table: Table, options: TableOptions, separator: str) -> list[str]:
    """Returns the text of each row: the filled template, or the text columns joined by the tokenizer's separator.

    Raises:
        UserError: an unknown column, a malformed template, an empty text.
    """
    if options.template is not None:
        try:
            parts = list(string.Formatter().parse(options.template))
        except ValueError as error:
            raise UserError(f"--template {options.template!r}: {error}") from None
        names = [name for _, name, _, _ in parts if name is not None]
        if not names or any(spec or conversion for _, name, spec, conversion in parts if name is not None):
            raise UserError(f"--template {options.template!r}: expected column names in braces, such as "
                            '"Q: {question} A: {guess}"')
        values = {name: table.column(name, "--template") for name in names}
        blank = [all(_as_text(values[name][row]).strip() == "" for name in names) for row in range(len(table))]
        texts = ["".join(literal + ("" if name is None else _as_text(values[name][row])) for literal, name, _, _ in parts)
                 for row in range(len(table))]
    else:
        names = options.text_column or tuple(name for name in TEXT_COLUMNS if name in table.columns)[:1]
        if not names:
            table.column("text", "--text-column")  # raises, naming the columns that exist
        columns = [table.column(name, "--text-column") for name in names]
        filled = [[text for text in map(_as_text, row) if text.strip()] for row in zip(*columns, strict=True)]
        texts, blank = [separator.join(row) for row in filled], [not row for row in filled]
    if any(blank):
        raise UserError(f"{table.path}, row {blank.index(True) + 1}: the text ({', '.join(names)}) is empty")
    return texts


def _as_text(value) -> str:
    return "" if value is None else value if isinstance(value, str) else str(value)


def labels_of(table: Table, column: str) -> list[str]:
    """Returns each row's class by name: strings as they are, whole numbers in digits, booleans as false and true.

    Raises:
        UserError: no such column, a missing label, labels of mixed types, or numbers with a fraction.
    """
    kinds: dict[str, tuple[int, object]] = {}  # type -> the first row of it, and its label
    names = []
    for row, value in enumerate(table.column(column, "--label-column"), 1):
        if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
            raise UserError(f"{table.path}, row {row}: the label ({column}) is missing")
        if isinstance(value, bool):
            kind, name = "boolean", str(value).lower()
        elif isinstance(value, int) or isinstance(value, float) and value.is_integer():
            kind, name = "whole number", str(int(value))
            if column in table.names and 0 <= value < len(table.names[column]):
                name = table.names[column][int(value)]
        elif isinstance(value, str):
            looks = re.fullmatch(r"\s*[+-]?\d+\s*", value) is not None
            kind, name = ("whole number", str(int(value))) if looks else ("text", value.strip())
        else:
            raise UserError(f"{table.path}, row {row}: label {str(value)[:40]!r}; expected a string, a boolean or a whole "
                            "number")
        kinds.setdefault(kind, (row, value))
        names.append(name)
    if len(kinds) > 1:
        (one, (row, value)), (other, (row2, value2)) = list(kinds.items())[:2]
        raise UserError(f"{table.path}: labels of mixed types in {column}: a {one} ({str(value)[:40]!r}, row {row}) and a "
                        f"{other} ({str(value2)[:40]!r}, row {row2})")
    return names


def classes_of(names: list[str], where: str) -> list[str]:
    """Returns the classes in order: numbers by value, false before true, strings by the alphabet.

    Raises:
        UserError: fewer than two classes, or classes numbered from 0 with one left out.
    """
    classes = sorted(set(names), key=lambda name: (int(name), "") if re.fullmatch(r"-?\d+", name) else (0, name))
    if len(classes) < 2:
        raise UserError(f"{where}: every label is {classes[0]}; training needs at least two classes")
    if classes[0] == "0" and classes[-1].isdigit() and (last := int(classes[-1])) >= len(classes):
        missing = next(str(i) for i in range(last) if str(i) not in classes)
        raise UserError(f"{where}: class {missing} has no example (labels run from 0 to {last}); every class needs one")
    return classes


def features_of(table: Table, columns: tuple[str, ...]) -> list[list[float]]:
    """Returns the numeric columns by row, NaN where a cell is empty.

    Raises:
        UserError: an unknown column, or a cell that is neither a finite number nor empty.
    """
    rows = [[] for _ in range(len(table))]
    for column in columns:
        for row, value in enumerate(table.column(column, "--feature-columns")):
            try:
                missing = value is None or (isinstance(value, str) and value.strip().lower() in MISSING)
                number = math.nan if missing else float(value)
            except (TypeError, ValueError):
                number = math.inf
            if math.isinf(number):
                raise UserError(f"{table.path}, row {row + 1}: feature {column} is {str(value)[:40]!r}; expected a finite "
                                "number or an empty cell")
            rows[row].append(number)
    return rows if columns else []


def read_split(table: Table, options: TableOptions, separator: str, classes: list[str] | None = None
               ) -> tuple[Split, list[str]]:
    """Makes a labelled split of a table; returns it and its classes.

    Args:
        classes: of the training split; those found here if None.

    Raises:
        UserError: see `texts_of`, `labels_of`, `features_of`; or a label that training lacks.
    """
    texts, names = texts_of(table, options, separator), labels_of(table, options.label_column)
    if classes is None:
        where = f"{table.path}, column {options.label_column}"
        classes = classes_of(names, where)
        unused = [name for name in table.names.get(options.label_column, []) if name not in classes]
        if unused:
            raise UserError(f"{where}: class {unused[0]} has no example; every class needs one")
    index = {name: number for number, name in enumerate(classes)}
    for row, name in enumerate(names, 1):
        if name not in index:
            raise UserError(f"{table.path}, row {row}: label {name!r}, which the training data lacks; it has "
                            f"{', '.join(classes[:20])}")
    return Split(texts, [index[name] for name in names], [], features_of(table, options.feature_columns)), classes


def check_features(train: Split, columns: tuple[str, ...], where: str) -> dict[str, int]:
    """Counts the missing values of each feature in the training split.

    Raises:
        UserError: a feature without a single value.
    """
    missing = {}
    for i, column in enumerate(columns):
        missing[column] = sum(math.isnan(row[i]) for row in train.features)
        if missing[column] == len(train):
            raise UserError(f"--feature-columns: {where} has no value at all under {column!r}")
    return missing


# ---------------------------------------------------------------- splits

def split_files(data: Path, eval_split: str | None) -> tuple[Path, dict[str, Path] | float]:
    """Finds the training file, and the evaluation files by name or the share of the training rows to set aside.

    Args:
        data: a file, or a folder with `train` and, say, `validation` in one of the formats.
        eval_split: see `TableOptions`.

    Raises:
        UserError: no such file or split; those that exist are named.
    """
    share = _share(eval_split)
    if not data.is_dir():
        if not data.exists():
            raise UserError(f"--data {data}: no such file or folder")
        if share is None and eval_split is not None:
            if not Path(eval_split).is_file():
                raise UserError(f"--eval-split {eval_split}: no such file; expected one, or a share such as 0.1")
            return data, {Path(eval_split).stem: Path(eval_split)}
        return data, share or 0.1
    files: dict[str, list[Path]] = {}
    for path in sorted(data.iterdir()):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            files.setdefault(path.stem, []).append(path)
    if "train" not in files:
        raise UserError(f"--data {data}: no training file; expected train{', train'.join(SUFFIXES)}"
                        + (f" (it has {', '.join(files)})" if files else ""))
    train, chosen = choose_splits(list(files), eval_split, str(data), "file")
    for name in [train, *(chosen if isinstance(chosen, list) else [])]:
        if len(files[name]) > 1:
            raise UserError(f"--data {data}: {name} stands there twice ({', '.join(p.name for p in files[name])})")
    return files[train][0], {name: files[name][0] for name in chosen} if isinstance(chosen, list) else chosen


def choose_splits(there: list[str], eval_split: str | None, where: str, kind: str = "split"
                  ) -> tuple[str, list[str] | float]:
    """The training split, and the evaluation split in a list or the share of the training rows to set aside.

    A split called `test` is evaluated on only where `eval_split` names it: public ones often have no labels.

    Raises:
        UserError: no such split; those that exist are named.
    """
    if "train" not in there:
        raise UserError(f"{where}: no {kind} called train; it has {', '.join(there)}")
    if share := _share(eval_split):
        return "train", share
    names = [eval_split] if eval_split else [name for name in EVAL_SPLITS if name in there][:1]
    if names and names[0] not in there:
        raise UserError(f"--eval-split {names[0]}: {where} has no such {kind}; it has {', '.join(there)}")
    return "train", names or 0.1


def _share(eval_split: str | None) -> float | None:
    """`--eval-split` as a share of the training rows, if it is one."""
    if eval_split is None or not re.fullmatch(r"0?\.\d+", eval_split):
        return None
    if not 0 < float(eval_split) < 1:
        raise UserError(f"--eval-split {eval_split}: expected a share of the training rows between 0 and 1")
    return float(eval_split)


def set_aside(split: Split, share: float, where: str) -> tuple[Split, Split]:
    """Takes `share` of each class out of a split, always the same rows.

    Raises:
        UserError: a class too small to be divided.
    """
    draw, taken = random.Random(0), set()
    for label in sorted(set(split.labels)):
        rows = [row for row, other in enumerate(split.labels) if other == label]
        count = round(share * len(rows)) or 1
        if count == len(rows):
            raise UserError(f"{where}: a class has {len(rows)} row(s), too few to set {share:g} of them aside for "
                            "evaluation; give --eval-split FILE")
        taken.update(draw.sample(rows, count))
    return (split.take([row for row in range(len(split)) if row not in taken]), split.take(sorted(taken)))
