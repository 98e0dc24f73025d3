"""Makes labelled splits of tables, and finds the training and the evaluation rows among files, splits and shares.

    python -c "from data import splits; print(splits.split_files(splits.Path('DIR'), None))"
"""
from __future__ import annotations

import collections
import itertools
import random
import re
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.arrow import Column, read_columns, write_columns
from data.cache import cache_folder, fingerprint, kept
from data.columns import classes_of, features_of, label_columns, label_sets_of, labels_of, scores_of, texts_of
from data.stream import SUFFIXES
from data.tables import Table
from machine.errors import UserError
from options.schema import TableOptions

EVAL_SPLITS = ("validation", "dev", "eval", "val")  # in this order, where --eval-split does not say
DEFAULT_SHARE = 0.1  # of the training rows for evaluation, where no split is found
PARTS = ("sentences", "labels", "sources", "features")  # of a split
ROWS = "rows.arrow"
STRATA = 10  # groups of rows with scores of about the same size
# A row's label: the index of its class; 1 and 0 for each label that it may have; or a number.
Label = int | tuple[float, ...] | float


@dataclass(frozen=True)
class Split:
    """Holds labelled sentences, in file order."""

    sentences: Sequence[str]  # lists, or Arrow columns where a file was read
    labels: Sequence[Label]
    sources: Sequence[str] = field(default_factory=list)  # CoLA's source code: the publication, or the phenomenon
    features: Sequence[Sequence[float]] = field(default_factory=list)  # of each sentence, NaN where one is missing
    sha256: str = field(default="", compare=False)  # of the file that was parsed, if the split is a whole file

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows) -> Split:
        """Returns the given rows, in that order."""
        return Split(*(_chosen(getattr(self, name), rows) for name in PARTS))


def _chosen(values: Sequence, rows) -> Sequence:
    """Returns the values of the given rows; none of a list that is empty for all rows."""
    if isinstance(values, Column):
        return values.take(rows)
    return [values[row] for row in rows] if values else []


def read_split(table: Table, options: TableOptions, separator: str, classes: list[str] | None = None
               ) -> tuple[Split, list[str]]:
    """Makes a labelled split of a table; returns it and its classes.

    Args:
        separator: between several text columns: the tokenizer's.
        classes: of the training split; those found here if None.

    Raises:
        UserError: see `texts_of`, `labels_of`, `features_of`; or a label that training lacks.
    """
    labels, classes = READERS[options.problem or "single-label"](table, options.label_column, classes)
    features = features_of(table, options.feature_columns)
    return Split(texts_of(table, options, separator), Column.of_array(np.array(labels)), [],
                 Column.of_array(np.array(features)) if features else [], table.sha256), classes


def kept_split(key: list, read: Callable[[], tuple[Split, list[str], str]]) -> tuple[Split, list[str], str]:
    """Returns a large split, its classes and its problem: read once, and mapped into memory from the cache afterwards.

    Args:
        key: everything that decides the rows.
        read: reads the split.
    """
    def write(folder: Path) -> None:
        split, classes, problem = read()
        columns = {name: getattr(split, name) for name in PARTS if len(getattr(split, name))}
        folder.mkdir()
        write_columns(folder / ROWS, columns, {"classes": classes, "problem": problem, "sha256": split.sha256})

    def mapped(folder: Path) -> tuple[Split, list[str], str]:
        columns, about = read_columns(folder / ROWS)
        return Split(*(columns.get(name, []) for name in PARTS), about["sha256"]), about["classes"], about["problem"]

    found = kept(cache_folder() / f"rows-{fingerprint(*key)}", write, mapped)
    return read() if found is None else found


def read_classes(table: Table, column: str, classes: list[str] | None) -> tuple[list[int], list[str]]:
    """Returns each row's class as an index into the classes, and the classes: those found here if None."""
    names = labels_of(table, column)
    # The training split decides the classes; other splits may lack some of them.
    if classes is None:
        classes = classes_of(names, f"{table.path}, column {column}")
        _check_used(table, column, table.names.get(column, []), classes)
    index = _index(table, ([name] for name in names), classes)
    return [index[name] for name in names], classes


def read_label_sets(table: Table, columns: str, classes: list[str] | None) -> tuple[list[tuple[float, ...]], list[str]]:
    """Returns 1 and 0 for each label of each row, and the labels' names: those found here if None."""
    rows, names = label_sets_of(table, columns), label_columns(table, columns)
    if classes is None:
        found = list(itertools.chain(*rows))
        if not found:
            raise UserError(f"{table.path}, column {columns}: no row has a label")
        # Several columns keep their order.
        classes = classes_of(found, f"{table.path}, column {columns}") if len(names) == 1 else names
        _check_used(table, columns, names if len(names) > 1 else table.names.get(columns, []), found)
    _index(table, rows, classes)
    # Rows with the same labels share one tuple.
    known: dict[tuple[str, ...], tuple[float, ...]] = {}
    for row in map(tuple, rows):
        if row not in known:
            known[row] = tuple(float(name in row) for name in classes)
    return [known[tuple(row)] for row in rows], classes


def read_scores(table: Table, column: str, classes: list[str] | None) -> tuple[list[float], list[str]]:
    """Returns each row's number, and the column's name: that of the model's one output."""
    return scores_of(table, column), classes or [column]


# The reader of each problem's labels.
READERS: dict[str, Callable] = {"single-label": read_classes, "multi-label": read_label_sets, "regression": read_scores}


def _check_used(table: Table, column: str, names: list[str], classes: list[str]) -> None:
    # A head for a class without an example would be trained on nothing, and named in every table.
    unused = [name for name in names if name.strip() not in classes]
    if unused:
        raise UserError(f"{table.path}, column {column}: class {unused[0]} has no example; every class needs one")


def _index(table: Table, rows: Iterable[list[str]], classes: list[str]) -> dict[str, int]:
    """Returns the number of each class by name.

    Raises:
        UserError: a row has another class.
    """
    index = {name: number for number, name in enumerate(classes)}
    for row, names in enumerate(rows, 1):
        for name in names:
            if name not in index:
                raise UserError(f"{table.path}, row {row}: label {name!r}, which the training data lacks; it has "
                                f"{', '.join(classes[:20])}")
    return index


def check_features(train: Split, columns: tuple[str, ...], where: str) -> dict[str, int]:
    """Counts the missing values of each feature in the training split.

    Raises:
        UserError: a feature without a single value.
    """
    features, missing = np.asarray(train.features), {}
    for i, column in enumerate(columns):
        missing[column] = int(np.isnan(features[:, i]).sum())
        if missing[column] == len(train):
            raise UserError(f"--feature-columns: {where} has no value at all under {column!r}")
    return missing


def split_files(data: Path, eval_split: str | None) -> tuple[Path, dict[str, Path] | float]:
    """Finds the training file, and the evaluation files by name or the share of the training rows to set aside.

    Args:
        data: a file, or a folder with `train` and, say, `validation` in one of the formats.
        eval_split: see `TableOptions`.

    Raises:
        UserError: no such file or split; those that exist are named.
    """
    share = _share(eval_split)
    # One file: the evaluation rows are another file, or a share of this one.
    if not data.is_dir():
        if not data.exists():
            raise UserError(f"--data {data}: no such file or folder")
        if share is None and eval_split is not None:
            if not Path(eval_split).is_file():
                raise UserError(f"--eval-split {eval_split}: no such file; expected one, or a share such as 0.1")
            return data, {Path(eval_split).stem: Path(eval_split)}
        return data, share or DEFAULT_SHARE
    # A folder: each file is a split, named by its stem.
    files: dict[str, list[Path]] = {}
    for path in sorted(data.iterdir()):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            files.setdefault(path.stem, []).append(path)
    if "train" not in files:
        raise UserError(f"--data {data}: no training file; expected train{', train'.join(SUFFIXES)}"
                        + (f" (it has {', '.join(files)})" if files else ""))
    train, chosen = choose_splits(list(files), eval_split, str(data), "file")
    # train.csv and train.jsonl: nobody can know which is meant.
    for name in [train, *(chosen if isinstance(chosen, list) else [])]:
        if len(files[name]) > 1:
            raise UserError(f"--data {data}: {name} stands there twice ({', '.join(p.name for p in files[name])})")
    return files[train][0], {name: files[name][0] for name in chosen} if isinstance(chosen, list) else chosen


def choose_splits(there: list[str], eval_split: str | None, where: str, kind: str = "split"
                  ) -> tuple[str, list[str] | float]:
    """Returns the training split, and the evaluation split in a list or the share of the training rows to set aside.

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
    return "train", names or DEFAULT_SHARE


def _share(eval_split: str | None) -> float | None:
    """Returns `--eval-split` as a share of the training rows, None where it is a name.

    Raises:
        UserError: the share is 0.
    """
    if eval_split is None or not re.fullmatch(r"0?\.\d+", eval_split):
        return None
    if not 0 < float(eval_split) < 1:
        raise UserError(f"--eval-split {eval_split}: expected a share of the training rows between 0 and 1")
    return float(eval_split)


def strata(labels: Sequence[Label]) -> Sequence[Hashable]:
    """Returns a group for each row, for samples that have all groups in the same shares.

    The group is the class; of several labels the rarest one; of numbers their tenth, from the smallest to the largest.
    """
    if isinstance(labels[0], float):
        order = np.argsort(np.asarray(labels), kind="stable").tolist()
        # Fewer groups of few rows: each has some to take.
        groups = max(1, min(STRATA, len(labels) // 5))
        place = {row: at * groups // len(labels) for at, row in enumerate(order)}
        return [place[row] for row in range(len(labels))]
    if isinstance(labels[0], tuple):
        counts = np.asarray(labels).sum(0)
        rarest = sorted(range(len(counts)), key=counts.__getitem__)
        return [_rarest_label(row, rarest) for row in labels]
    return labels


def _rarest_label(row: tuple[float, ...], rarest: list[int]) -> int:
    """Returns the first of the labels `rarest` that a row has; -1 for a row without a label."""
    return next((label for label in rarest if row[label]), -1)


def fold_of(split: Split, number: int, count: int, seed: int) -> tuple[Split, Split]:
    """Divides a split into `count` folds, each with all groups of rows (`strata`) in the same shares.

    Returns:
        The rows of all folds but one, and those of fold `number` (from 1).

    Raises:
        UserError: fewer rows of the commonest group than folds.
    """
    from sklearn.model_selection import StratifiedKFold

    groups = strata(split.labels)
    if max(collections.Counter(groups).values()) < count:
        raise UserError(f"--folds {count}: {len(split)} training rows are too few for so many folds")
    with warnings.catch_warnings():
        # A rare class is in fewer folds than there are.
        warnings.simplefilter("ignore", UserWarning)
        folds = list(StratifiedKFold(count, shuffle=True, random_state=seed).split(groups, groups))
    return tuple(split.take(rows.tolist()) for rows in folds[number - 1])


def set_aside(split: Split, share: float, where: str) -> tuple[Split, Split]:
    """Takes `share` of each class (see `strata`) out of a split; the same rows in every run.

    Raises:
        UserError: a class too small to be divided.
    """
    # A fixed seed, not the run's: runs of several seeds are compared on the same rows.
    rng, taken, groups = random.Random(0), set(), strata(split.labels)
    for label in sorted(set(groups)):
        rows = [row for row, other in enumerate(groups) if other == label]
        # At least one row of each class, or the evaluation rows would lack it.
        count = round(share * len(rows)) or 1
        # A rare label of several stays in training.
        if count == len(rows) and groups is not split.labels:
            continue
        if count == len(rows):
            raise UserError(f"{where}: a class has {len(rows)} row(s), too few to set {share:g} of them aside for "
                            "evaluation; give --eval-split FILE")
        taken.update(rng.sample(rows, count))
    if not taken:
        raise UserError(f"{where}: {len(split)} row(s), too few to set {share:g} of them aside for evaluation; give "
                        "--eval-split FILE")
    return (split.take([row for row in range(len(split)) if row not in taken]), split.take(sorted(taken)))
