"""Loads tasks: a training split and one or more named development splits, with the digest of every file read.

    python -c "from data import tasks; print(tasks.load_task('cola', 'DIR_WITH_THE_TSV_FILES').train.labels[:5])"

A new task is a name in TASKS and a branch in `load_task`.
"""
from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import BinaryIO

from data import columns, edits, stream, tables
from data.arrow import Column, in_parts, packed
from data.glue import GLUE
from data.glue import REPOSITORY as GLUE_REPOSITORY
from data.hub import hub_unreachable, is_dataset_name, load_dataset, read_dataset
from data.lines import read_whole
from data.splits import Split, check_features, choose_splits, fold_of, kept_split, read_split, set_aside, split_files
from data.stream import DEFAULT_COLUMNS, is_blank
from data.tables import Table
from machine.errors import UserError
from options.schema import TableOptions
from record.files import sha256

COLA_FILES = {"train": "in_domain_train.tsv", "in_domain": "in_domain_dev.tsv", "out_of_domain": "out_of_domain_dev.tsv"}
# GLUE's CoLA validation set is the two public development files, one after the other.
GLUE_IN_DOMAIN_ROWS, GLUE_VALIDATION_ROWS = 527, 1043
COLA_CLASSES = ("0", "1")
# Displayed names of classes, by task. The files of these tasks have 0 and 1; a label is an index into the names.
CLASS_NAMES = {"cola": ("unacceptable", "acceptable"), "tiny": ("unacceptable", "acceptable"),
               "edits": ("edited", "as written")}
# Public data sets on the Hub: repository, and the file of each split.
HUB_TABLES = {
    "rotten_tomatoes": ("cornell-movie-review-data/rotten_tomatoes",
                        {"train": "train.parquet", "validation": "validation.parquet"}),
    "imdb": ("stanfordnlp/imdb", {"train": "plain_text/train-00000-of-00001.parquet",
                                  "test": "plain_text/test-00000-of-00001.parquet"}),
    **{name: (GLUE_REPOSITORY, task.files(name)) for name, task in GLUE.items()},
}
# The quiz-bowl set names these as one-hot keys; its numbers are for --feature-columns.
BUZZER_TEMPLATE = "{guess} ({Category_subcategory}, {Category_tournament})"
# Above these sizes a table's rows are parsed once, and mapped from the cache into memory afterwards.
LARGE_FILE, LARGE_ROWS = 4 << 20, 20_000  # bytes of a file; rows of a data set of the Hub
HELD_OUT = 0.02  # of the sentences of `edits`, for development
TASKS = ("cola", *GLUE, "edits", "rotten_tomatoes", "imdb", "buzzer", "csv", "tiny")
FIXED = ("cola", "edits", "tiny")  # their files have no columns to choose


@dataclass(frozen=True)
class Task:
    """Holds a training split and the development splits by name, with the SHA-256 of every file read."""

    name: str
    train: Split
    dev: dict[str, Split]
    files: dict[str, str]
    classes: tuple[str, ...] = COLA_CLASSES  # names of the classes; a label is an index into them
    missing: dict[str, int] = field(default_factory=dict)  # training rows without a value, by feature
    left_out: tuple[str, ...] = ()  # development sentences that `limit` left out
    problem: str = "single-label"  # a name in metrics/problems.py

    @property
    def num_labels(self) -> int:
        return len(self.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Returns the classes' names for readers: those of the files, or words where the files have numbers."""
        return CLASS_NAMES.get(self.name, self.classes)

    def limit(self, rows: int) -> Task:
        """Returns the same task with `rows` rows of each split, evenly spaced (files are often sorted by label).

        The development sentences that are left out stay known: a transfer set must hold none of them either.

        Raises:
            UserError: if the shortened training split lacks a class, or a feature has no value in it.
        """
        train = _spaced(self.train, rows)
        dev = {name: _spaced(split, rows) for name, split in self.dev.items()}
        where = f"the {rows} training rows"
        self._check_classes(train, f"--limit {rows}: {where}")
        left_out = list(self.left_out)
        for name, split in self.dev.items():
            kept = set(dev[name].sentences)
            left_out += [sentence for sentence in split.sentences if sentence not in kept]
        return replace(self, train=train, dev=dev, missing=check_features(train, tuple(self.missing), where),
                       left_out=tuple(left_out))

    def fold(self, text: str) -> Task:
        """Returns the same task with one fold of the training rows as its only development split.

        Args:
            text: number of the fold, from 1, that of all folds, and the seed that shuffles the rows: 2/5:12345.

        Raises:
            UserError: no such fold, or fewer rows of a class than folds.
        """
        number, count, seed = map(int, re.split("[/:]", text))
        if not 1 <= number <= count >= 2:
            raise UserError(f"--fold {text}: expected N/K:SEED, N from 1 to K and K of at least 2")
        train, held_out = fold_of(self.train, number, count, seed)
        where = f"the training rows of fold {number}"
        self._check_classes(train, f"--folds {count}: {where}")
        # Development files stay unseen: their sentences are in no transfer set.
        unseen = [sentence for split in self.dev.values() for sentence in split.sentences]
        return replace(self, train=train, dev={"held_out": held_out}, left_out=(*self.left_out, *unseen),
                       missing=check_features(train, tuple(self.missing), where))

    def _check_classes(self, train: Split, where: str) -> None:
        # Of several labels a rare one may be lacking; a number has no classes.
        present = set(train.labels) if self.problem == "single-label" else range(self.num_labels)
        lacking = [name for label, name in enumerate(self.classes) if label not in present]
        if lacking:
            raise UserError(f"{where} have no example of class {lacking[0]}")


def _spaced(split: Split, rows: int) -> Split:
    """Returns at most `rows` rows of a split, evenly spaced."""
    return split.take([i * len(split) // rows for i in range(rows)] if rows < len(split) else range(len(split)))


def load_task(name: str, data: Path | str | None = None, options: TableOptions = DEFAULT_COLUMNS, separator: str = " "
              ) -> Task:
    """Loads a task by name.

    Args:
        name: `cola`, GLUE's other tasks, `rotten_tomatoes` and `imdb` (from `data`, else from the Hugging Face Hub),
            `buzzer` and `csv` (from `data`), `edits` (plain sentences of `data`, real against edited), or `tiny`.
        data: for `cola` the folder with its three public TSV files, for `edits` a text file or a folder of them; else a
            table, a folder of tables, or the name of a data set on the Hub.
        options: the roles of the columns; not for FIXED tasks.
        separator: between several text columns: the tokenizer's.

    Raises:
        UserError: unknown task, missing or malformed files, a class without an example, or a Hub that
            cannot be reached.
    """
    if name not in TASKS:
        raise UserError(f"--task {name}: unknown; expected one of {', '.join(TASKS)}")
    if name in FIXED:
        # Options that would be ignored are refused.
        given = [f.name for f in fields(options)
                 if f.name not in ("truncate", "join", "agreement") and getattr(options, f.name) != f.default]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')}: not for --task {name}, whose format is fixed; --task csv "
                            "takes tables of any columns")
        if data is not None and is_dataset_name(data):
            load_dataset(str(data))  # raises where the Hub has no such data set
            raise UserError(f"--data {data}: a data set of the Hugging Face Hub, for --task csv")
        if name == "edits":
            return _edits_task(data, options.agreement)
        if data is not None:
            return _cola_folder(name, Path(data))
        return _tiny_task() if name == "tiny" else _glue_cola()
    if data is not None and is_dataset_name(data):
        return _hub_dataset(name, str(data), options, separator)
    if data is not None:
        return _table_files(name, Path(data), options, separator)
    if name not in HUB_TABLES:
        raise UserError(f"--task {name}: needs --data, a folder with train and validation files or one file "
                        f"({', '.join(stream.SUFFIXES)})")
    if options.eval_split is not None:
        raise UserError(f"--eval-split: with the Hub's {name} the split is {list(HUB_TABLES[name][1])[1]}; give --data")
    # The Hub's own files are read by the same reader as a user's.
    repository, names = HUB_TABLES[name]
    paths = {split: _hub_file(name, repository, file) for split, file in names.items()}
    train = paths.pop("train")
    files = {f"{repository}/{names[split]}": path for split, path in {"train": train, **paths}.items()}
    return _task_of_tables(name, train, paths, options, separator, files)


def with_columns(name: str, options: TableOptions) -> TableOptions:
    """Returns the options of a table, with GLUE's own text columns where the user named none."""
    given = options.text_column or options.template is not None
    return options if given or name not in GLUE else replace(options, text_column=GLUE[name].columns)


def read_rows(path: Path | str, task: str, options: TableOptions, separator: str, classes: list[str]) -> Split:
    """Reads a labelled file in the format of a task, for scoring.

    Raises:
        UserError: see `read_cola_tsv`, `lines.read_sentences` and `splits.read_split`.
    """
    if task in ("cola", "tiny"):
        return read_cola_tsv(path)
    if task == "edits" and Path(path).suffix.lower() not in stream.SUFFIXES:
        return edits.read_real_or_edited(Path(path), options.agreement)[0]
    # A run from before there were other problems recorded none.
    options = replace(options, problem=options.problem or "single-label")
    return _read_file(task, Path(path), options, separator, classes)[0]


def _read_table(task: str, path: Path, options: TableOptions) -> tuple[Table, TableOptions]:
    """Reads a table in the format of a task; returns it and the options with the task's own defaults in them."""
    options = with_columns(task, options)
    if task != "buzzer":
        return tables.read_table(path, options), options
    if options.template is None and not options.text_column:
        options = replace(options, template=BUZZER_TEMPLATE)
    return tables.read_one_hot_jsonl(path, options), options


def _table_files(name: str, data: Path, options: TableOptions, separator: str) -> Task:
    """Makes a task from a file, or from a folder with one file for each split."""
    train, others = split_files(data, options.eval_split)
    paths = [train, *(others.values() if isinstance(others, dict) else ())]
    return _task_of_tables(name, train, others, options, separator, {str(path): path for path in paths})


def _hub_dataset(name: str, data: str, options: TableOptions, separator: str) -> Task:
    """Makes a task of a data set on the Hub; one of its splits, or a share of the training rows, is for evaluation."""
    # Splits come from the library's cache, as they have no files of their own here.
    train, chosen = choose_splits(list(load_dataset(data)), options.eval_split, f"--data {data}")

    def read(key: str, options: TableOptions, classes: list[str] | None = None) -> tuple[Split, list[str], TableOptions]:
        rows, options = load_dataset(data)[key], with_columns(name, options)
        return _read_split(lambda: (read_dataset(data, key), options), options, separator, classes,
                           (name, rows._fingerprint) if len(rows) > LARGE_ROWS else None)

    split, classes, options = read(train, options)
    if isinstance(chosen, list):
        dev = {key: read(key, options, classes)[0] for key in chosen}
    else:
        split, held_out = set_aside(split, chosen, data)
        dev = {"held_out": held_out}
    missing = check_features(split, options.feature_columns, data)
    return Task(name, split, dev, {f"{data}/{key}": _content_digest(rows) for key, rows in {train: split, **dev}.items()},
                tuple(classes), missing, problem=options.problem)


def _content_digest(split: Split) -> str:
    """Returns the SHA-256 of a split's rows as JSON: the library keeps no file of the Hub's as it was."""
    digest = hashlib.sha256(b"[")
    for before, values in (("[", split.sentences), ("], [", split.labels), ("], [", split.features)):
        digest.update(before.encode())
        for number, part in enumerate(in_parts(values)):
            # A part of the list, without its brackets.
            digest.update((", " * (number > 0) + json.dumps(part)[1:-1]).encode())
    digest.update(b"]]")
    return digest.hexdigest()


def _read_file(task: str, path: Path, options: TableOptions, separator: str, classes: list[str] | None = None
               ) -> tuple[Split, list[str], TableOptions]:
    """Reads a labelled file; see `_read_split`."""
    large = path.is_file() and path.stat().st_size > LARGE_FILE
    # The ending tells the format.
    key = (task, path.suffix.lower(), sha256(path)) if large else None
    return _read_split(lambda: _read_table(task, path, options), options, separator, classes, key)


def _read_split(read: Callable[[], tuple[Table, TableOptions]], options: TableOptions, separator: str,
                classes: list[str] | None, key: tuple[str, ...] | None) -> tuple[Split, list[str], TableOptions]:
    """Makes a labelled split of a table.

    Args:
        read: reads the table, and returns it with the options of its task.
        classes: of the training split; those found here if None.
        key: of a large table, whose rows are parsed once and come from the cache afterwards; its last part is the digest.
            None: the rows are parsed.

    Returns:
        The split, its classes, and the options with the problem of its labels, if none was given.
    """
    def parse() -> tuple[Split, list[str], str]:
        table, own = read()
        own = replace(own, problem=own.problem or columns.problem_in(table, own.label_column))
        split, found = read_split(table, own, separator, classes)
        # Digests of the bytes that were parsed: a file may be replaced at any moment.
        if key and split.sha256 not in ("", key[-1]):
            raise UserError(f"{table.path}: changed while it was read; start again")
        return split, found, own.problem

    split, found, problem = parse() if key is None else kept_split([*key, options, separator, classes], parse)
    return split, found, replace(options, problem=problem)


def _task_of_tables(name: str, train: Path, others: dict[str, Path] | float, options: TableOptions, separator: str,
                files: dict[str, Path]) -> Task:
    """Makes a task from its training file and the evaluation files (or the share of the training rows to set aside)."""
    # Problem and classes are those of the training rows; every evaluation file is read with them.
    split, classes, options = _read_file(name, train, options, separator)
    digests = {train: split.sha256}
    if isinstance(others, dict):
        dev = {}
        for key, path in others.items():
            dev[key] = _read_file(name, path, options, separator, classes)[0]
            digests[path] = dev[key].sha256
    else:
        split, held_out = set_aside(split, others, str(train))
        dev = {"held_out": held_out}
    # After the split: without a value in the training rows a feature has no mean.
    missing = check_features(split, options.feature_columns, str(train))
    return Task(name, split, dev, {key: digests[path] for key, path in files.items()}, tuple(classes), missing,
                problem=options.problem)


def _edits_task(data: Path | str | None, agreement: str) -> Task:
    if data is None:
        raise UserError("--task edits: needs --data, a text file with one sentence a line, or a folder of .txt files")
    rows, files = edits.read_real_or_edited(Path(data), agreement)
    train, held_out = set_aside(_two_classes(rows, str(data)), HELD_OUT, str(data))
    return Task("edits", train, {"held_out": held_out}, files)


# ---------------------------------------------------------------- CoLA, and the built-in task in its format

def read_cola_tsv(path: Path | str) -> Split:
    """Reads CoLA's format: source code, label (0 or 1), author's mark, sentence; tab-separated, no header.

    Raises:
        UserError: missing or empty file, a row with other than four columns, a label other than 0 or
            1, an empty sentence, bytes that are not UTF-8; file and line are named.
    """
    file, digest = read_whole(path, "a TSV file")
    chunks = [], [], []
    with file:
        for part in in_parts(_cola_rows(path, file)):
            for found, values in zip(chunks, zip(*part, strict=True), strict=True):
                found.append(packed(values))
    sources, labels, sentences = map(Column, chunks)
    return Split(sentences, labels, sources, sha256=digest)


def _cola_rows(path: Path | str, file: BinaryIO) -> Iterator[tuple[str, int, str]]:
    """Yields source, label and sentence of each row."""
    for row in stream.open_rows(path, "tsv", headless=True, file=file).rows:
        where = f"{path}, line {row.line}"
        if row.error:
            raise UserError(f"{where}: {row.error}")
        source, label, _, sentence = row.columns.values()
        if label not in COLA_CLASSES:
            raise UserError(f"{where}: label {label[:20]!r}; expected 0 or 1")
        if is_blank(sentence):
            raise UserError(f"{where}: the sentence is empty")
        yield source, int(label), sentence


def _tiny_task() -> Task:
    from data import grammar

    with tempfile.TemporaryDirectory() as folder:
        # Through files, so that the built-in task takes the same way as CoLA.
        grammar.write_tiny_task(Path(folder))
        task = _cola_folder("tiny", Path(folder))
    return replace(task, files={f"tiny/{Path(path).name}": digest for path, digest in task.files.items()})


def _cola_folder(name: str, folder: Path) -> Task:
    if not folder.is_dir():
        raise UserError(f"--data {folder}: not a folder; expected one with {', '.join(COLA_FILES.values())}")
    paths = {split: folder / file for split, file in COLA_FILES.items()}
    splits = {split: read_cola_tsv(path) for split, path in paths.items()}
    digests = {str(path): splits[split].sha256 for split, path in paths.items()}
    train = _two_classes(splits.pop("train"), str(paths["train"]))
    return Task(name, train, splits, digests)


def _hub_file(task: str, repository: str, file: str) -> Path:
    """Returns the path of a data set's file of the Hub, taken from the cache if it is there."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset", local_files_only=hub_unreachable()))
    except (OSError, ValueError) as error:  # offline and not cached, or no such file
        expected = f"DIR with {', '.join(COLA_FILES.values())}" if task == "cola" else "a folder with its files"
        raise UserError(f"--task {task}: {repository} is not cached and the Hugging Face Hub cannot be reached "
                        f"({type(error).__name__}); give --data {expected}") from None


def _glue_cola() -> Task:
    splits, files = {}, {}
    for split in ("train", "validation"):
        file = f"cola/{split}-00000-of-00001.parquet"
        path = _hub_file("cola", GLUE_REPOSITORY, file)
        table = tables.read_table(path)
        rows = table.columns
        splits[split] = Split(rows["sentence"], rows["label"], ["glue"] * len(rows["label"]))
        files[f"{GLUE_REPOSITORY}/{file}"] = table.sha256
    # GLUE joined CoLA's two development files; they are taken apart again.
    both = splits["validation"]
    if len(both) != GLUE_VALIDATION_ROWS:
        raise UserError(f"{GLUE_REPOSITORY}: {len(both)} validation rows; expected {GLUE_VALIDATION_ROWS}, of which "
                        f"the first {GLUE_IN_DOMAIN_ROWS} are in-domain")
    dev = {"in_domain": both.take(range(GLUE_IN_DOMAIN_ROWS)),
           "out_of_domain": both.take(range(GLUE_IN_DOMAIN_ROWS, GLUE_VALIDATION_ROWS))}
    return Task("cola", _two_classes(splits["train"], GLUE_REPOSITORY), dev, files)


def _two_classes(split: Split, where: str) -> Split:
    if len(set(split.labels)) < 2:
        raise UserError(f"{where}: every label is {split.labels[0]}; training needs both classes")
    return split
