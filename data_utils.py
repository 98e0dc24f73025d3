"""Turns tasks into token ids and token ids into length-bucketed batches.

    python -c "import data_utils; print(data_utils.load_task('cola', 'DIR_WITH_THE_TSV_FILES').train.labels[:5])"

A task is a training split and one or more named development splits. Batches are made of sentences of
about the same length, so that almost no pad token is computed. Which sentences a batch holds is fixed for the
whole run, so that cached features and logits are exactly reusable; the order of the batches is shuffled by the seed
in each epoch.
"""
from __future__ import annotations

import collections
import hashlib
import itertools
import json
import math
import random
import tempfile
import warnings
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from data import edits, tables
from data.hub import hub_unreachable, is_dataset_name, load_dataset, read_dataset
from data.tables import Split, Table
from machine.errors import UserError
from machine.hardware import send
from options.schema import TableOptions
from record.files import sha256

if TYPE_CHECKING:
    import torch

COLA_FILES = {"train": "in_domain_train.tsv", "in_domain": "in_domain_dev.tsv", "out_of_domain": "out_of_domain_dev.tsv"}
# GLUE's CoLA validation set is the two public development files, one after the other.
GLUE_IN_DOMAIN_ROWS, GLUE_VALIDATION_ROWS = 527, 1043
GLUE_REPOSITORY = "nyu-mll/glue"
COLA_CLASSES = ("0", "1")
DEFAULT_COLUMNS = TableOptions()
# Public data sets on the Hub: repository, and the file of each split.
HUB_TABLES = {
    "rotten_tomatoes": ("cornell-movie-review-data/rotten_tomatoes",
                        {"train": "train.parquet", "validation": "validation.parquet"}),
    "imdb": ("stanfordnlp/imdb", {"train": "plain_text/train-00000-of-00001.parquet",
                                  "test": "plain_text/test-00000-of-00001.parquet"}),
}
# The quiz-bowl set names these as one-hot keys; its numbers are for --feature-columns.
BUZZER_TEMPLATE = "{guess} ({Category_subcategory}, {Category_tournament})"
LARGE = 2  # times the mean batch's tokens: a larger batch is computed in micro-batches
HELD_OUT = 0.02  # of the sentences of `edits`, for development
NEIGHBOURS = 4  # sentences with a shared prefix that stand together in a batch
TASKS = ("cola", "edits", "rotten_tomatoes", "imdb", "buzzer", "csv", "tiny")
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

    @property
    def num_labels(self) -> int:
        return len(self.classes)

    def limit(self, rows: int) -> Task:
        """Returns the same task with `rows` rows of each split, evenly spaced (files are often sorted by label).

        Raises:
            UserError: if the shortened training split lacks a class, or a feature has no value in it.
        """
        train, *shortened = (split.take([i * len(split) // rows for i in range(rows)] if rows < len(split) else
                                        range(len(split))) for split in (self.train, *self.dev.values()))
        dev, where = dict(zip(self.dev, shortened, strict=True)), f"the {rows} training rows"
        lacking = [name for label, name in enumerate(self.classes) if label not in set(train.labels)]
        if lacking:
            raise UserError(f"--limit {rows}: {where} have no example of class {lacking[0]}")
        return replace(self, train=train, dev=dev, missing=tables.check_features(train, tuple(self.missing), where))


@dataclass
class Batch:
    """Holds right-padded token ids, and the labels, row numbers and features of their sentences."""

    input_ids: torch.Tensor  # (B, T) int64
    attention_mask: torch.Tensor  # (B, T) int64: 1 for a real token
    labels: torch.Tensor  # (B,) int64
    rows: torch.Tensor  # (B,) int64: each sentence's row in its split
    tokens: int  # real tokens, pads not counted
    features: torch.Tensor | None = None  # (B, F) float64 as in the file, NaN where a value is missing
    micro: list[Batch] | None = None  # micro-batches that this process computes instead (`split_large`); None: the whole

    def to(self, device: torch.device) -> Batch:
        """Copies it to a device, but for the mask: models ask the mask about lengths, and a GPU would answer late."""
        input_ids, labels, rows, features = (None if t is None else send(t, device) for t in (
            self.input_ids, self.labels, self.rows, self.features))
        return Batch(input_ids, self.attention_mask, labels, rows, self.tokens, features)

    def pin(self) -> None:
        """Lets its copies to a GPU go on beside what the GPU computes."""
        for name in ("input_ids", "attention_mask", "labels", "rows", "features"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor.pin_memory())

    def micro_batches(self) -> list[Batch]:
        """Returns the micro-batches that this process computes one after the other: the batch itself if it has none."""
        return [self] if self.micro is None else self.micro

    def part(self, start: int, end: int) -> Batch:
        """Returns the rows from `start` to before `end` (at least one row), as wide as the longest of them."""
        mask = self.attention_mask[start:end]
        width = int(mask.sum(1).max())
        return Batch(self.input_ids[start:end, :width], mask[:, :width], self.labels[start:end], self.rows[start:end],
                     int(mask.sum()), features=None if self.features is None else self.features[start:end])

    def split(self, tokens: float) -> list[Batch]:
        """Cuts the rows into as few micro-batches as hold at most `tokens` tokens each, pads included.

        Each micro-batch is as wide as its longest row; a single row longer than that is a micro-batch of its own.
        """
        rows, longest = len(self.rows), self.input_ids.shape[1]
        count = math.ceil(rows / max(1, int(tokens // longest)))
        return [self.part(start, end) for start, end in itertools.pairwise(rows * i // count for i in range(count + 1))]

    def inputs(self) -> tuple[torch.Tensor | None, ...]:
        """Returns the arguments of a model's forward pass."""
        return (self.input_ids, self.attention_mask) + (() if self.features is None else (self.features,))


# ---------------------------------------------------------------- reading

def read_cola_tsv(path: Path | str) -> Split:
    """Reads CoLA's format: source code, label (0 or 1), author's mark, sentence; tab-separated, no header.

    Raises:
        UserError: missing or empty file, a row with other than four columns, a label other than 0 or
            1, an empty sentence, bytes that are not UTF-8; file and line are named.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a CoLA TSV file") from None
    if lines[-1] == b"":
        lines.pop()
    if not lines:
        raise UserError(f"{path}: the file is empty; expected rows of source, label, mark and sentence")
    split = Split([], [], [])
    for number, raw in enumerate(lines, 1):
        try:
            columns = raw.removesuffix(b"\r").decode("utf-8").split("\t")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {number}: not UTF-8 (byte 0x{raw[error.start]:02x})") from None
        if len(columns) != 4:
            raise UserError(f"{path}, line {number}: {len(columns)} column(s); expected 4, separated by tabs: "
                            "source, label, mark, sentence")
        source, label, _, sentence = columns
        if label not in ("0", "1"):
            raise UserError(f"{path}, line {number}: label {label[:20]!r}; expected 0 or 1")
        if not sentence.strip():
            raise UserError(f"{path}, line {number}: the sentence is empty")
        split.sources.append(source)
        split.labels.append(int(label))
        split.sentences.append(sentence)
    return split


def load_task(name: str, data: Path | str | None = None, options: TableOptions = DEFAULT_COLUMNS, separator: str = " "
              ) -> Task:
    """Loads a task by name.

    Args:
        name: `cola`, `rotten_tomatoes` and `imdb` (from `data`, else from the Hugging Face Hub), `buzzer` and
            `csv` (from `data`), `edits` (plain sentences of `data`, real against edited), or `tiny`.
        data: for `cola` the folder with its three public TSV files, for `edits` a text file or a folder of them; else a
            table, a folder of tables, or the name of a data set on the Hub.
        options: which columns are what; not for FIXED tasks.
        separator: what joins several text columns: the tokenizer's.

    Raises:
        UserError: unknown task, missing or malformed files, a class without an example, or a Hub that
            cannot be reached.
    """
    if name not in TASKS:
        raise UserError(f"--task {name}: unknown; expected one of {', '.join(TASKS)}")
    if name in FIXED:
        given = [f.name for f in fields(options) if f.name != "truncate" and getattr(options, f.name) != f.default]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')}: not for --task {name}, whose format is fixed; --task csv "
                            "takes tables of any columns")
        if data is not None and is_dataset_name(data):
            load_dataset(str(data))  # or says that there is none
            raise UserError(f"--data {data}: a data set of the Hugging Face Hub, for --task csv")
        if name == "edits":
            return _edits(data)
        if data is not None:
            return _cola_folder(name, Path(data))
        return _tiny() if name == "tiny" else _glue_cola()
    if data is not None and is_dataset_name(data):
        return _hub_dataset(name, str(data), options, separator)
    if data is not None:
        return _tables(name, Path(data), options, separator)
    if name not in HUB_TABLES:
        raise UserError(f"--task {name}: needs --data, a folder with train and validation files or one file "
                        f"({', '.join(tables.SUFFIXES)})")
    if options.eval_split is not None:
        raise UserError(f"--eval-split: with the Hub's {name} the split is {list(HUB_TABLES[name][1])[1]}; give --data")
    repository, names = HUB_TABLES[name]
    paths = {split: _hub_file(name, repository, file) for split, file in names.items()}
    train = paths.pop("train")
    return _table_task(name, train, paths, options, separator,
                       {f"{repository}/{names[split]}": path for split, path in {"train": train, **paths}.items()})


def read_rows(path: Path | str, task: str, options: TableOptions, separator: str, classes: list[str]) -> Split:
    """Reads a labelled file in the format of a task, for scoring.

    Raises:
        UserError: see `read_cola_tsv`, `tables.read_sentences` and `tables.read_split`.
    """
    if task in ("cola", "tiny"):
        return read_cola_tsv(path)
    if task == "edits" and Path(path).suffix.lower() not in tables.SUFFIXES:
        return edits.read(Path(path))[0]
    table, options = _read(task, Path(path), options)
    return tables.read_split(table, options, separator, classes)[0]


def _read(task: str, path: Path, options: TableOptions) -> tuple[Table, TableOptions]:
    """Reads a table in the format of a task; returns it and the options with the task's own defaults in them."""
    if task != "buzzer":
        return tables.read_table(path), options
    if options.template is None and not options.text_column:
        options = replace(options, template=BUZZER_TEMPLATE)
    return tables.read_one_hot_jsonl(path), options


def _tables(name: str, data: Path, options: TableOptions, separator: str) -> Task:
    """Makes a task from a file, or from a folder with one file for each split."""
    train, others = tables.split_files(data, options.eval_split)
    return _table_task(name, train, others, options, separator,
                       {str(path): path for path in (train, *(others.values() if isinstance(others, dict) else ()))})


def _hub_dataset(name: str, data: str, options: TableOptions, separator: str) -> Task:
    """A task from the splits of a data set on the Hub; one of them, or a share of the training rows, for evaluation."""
    train, chosen = tables.choose_splits(list(load_dataset(data)), options.eval_split, f"--data {data}")
    split, classes = tables.read_split(read_dataset(data, train), options, separator)
    if isinstance(chosen, list):
        dev = {key: tables.read_split(read_dataset(data, key), options, separator, classes)[0] for key in chosen}
    else:
        split, held_out = tables.set_aside(split, chosen, data)
        dev = {"held_out": held_out}
    missing = tables.check_features(split, options.feature_columns, data)
    return Task(name, split, dev, {f"{data}/{key}": _content_digest(rows) for key, rows in {train: split, **dev}.items()},
                tuple(classes), missing)


def _content_digest(split: Split) -> str:
    """The SHA-256 of a split's rows, for the library keeps no file of the Hub's as it was."""
    return hashlib.sha256(json.dumps([split.sentences, split.labels, split.features]).encode()).hexdigest()


def _table_task(name: str, train: Path, others: dict[str, Path] | float, options: TableOptions, separator: str,
                files: dict[str, Path]) -> Task:
    """Makes a task from its training file and the evaluation files (or the share of the training rows to set aside)."""
    table, options = _read(name, train, options)
    split, classes = tables.read_split(table, options, separator)
    if isinstance(others, dict):
        dev = {key: tables.read_split(_read(name, path, options)[0], options, separator, classes)[0]
               for key, path in others.items()}
    else:
        split, held_out = tables.set_aside(split, others, str(train))
        dev = {"held_out": held_out}
    missing = tables.check_features(split, options.feature_columns, str(train))
    return Task(name, split, dev, {key: sha256(path) for key, path in files.items()}, tuple(classes), missing)


def _edits(data: Path | str | None) -> Task:
    if data is None:
        raise UserError("--task edits: needs --data, a text file with one sentence a line, or a folder of .txt files")
    rows, files = edits.read(Path(data))
    train, held_out = tables.set_aside(_two_classes(rows, str(data)), HELD_OUT, str(data))
    return Task("edits", train, {"held_out": held_out}, {str(file): sha256(file) for file in files})


def _tiny() -> Task:
    from data import grammar

    with tempfile.TemporaryDirectory() as folder:
        grammar.write_tiny_task(Path(folder))
        task = _cola_folder("tiny", Path(folder))
    return replace(task, files={f"tiny/{Path(path).name}": digest for path, digest in task.files.items()})


def _cola_folder(name: str, folder: Path) -> Task:
    if not folder.is_dir():
        raise UserError(f"--data {folder}: not a folder; expected one with {', '.join(COLA_FILES.values())}")
    paths = {split: folder / file for split, file in COLA_FILES.items()}
    splits = {split: read_cola_tsv(path) for split, path in paths.items()}
    train = _two_classes(splits.pop("train"), str(paths["train"]))
    return Task(name, train, splits, {str(path): sha256(path) for path in paths.values()})


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
        rows = tables.read_table(path).columns
        splits[split] = Split(rows["sentence"], rows["label"], ["glue"] * len(rows["label"]))
        files[f"{GLUE_REPOSITORY}/{file}"] = sha256(path)
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


# ---------------------------------------------------------------- token ids

def encode(tokenizer, sentences: list[str], max_length: int, truncate: str = "tail") -> list[list[int]]:
    """Returns the token ids of each sentence, cut to `max_length` tokens; one warning counts the sentences cut.

    Args:
        truncate: the part of a sentence that is cut if it is too long: its `head` (the end of a review holds
            the verdict), its `tail`, or its `middle`. The tokenizer's own special tokens at both ends stay.

    Raises:
        UserError: a sentence of which the tokenizer makes no token at all, or no room for any.
    """
    encoded = tokenizer(sentences, add_special_tokens=True, truncation=False, verbose=False,
                        return_special_tokens_mask=True)
    ids, cut = encoded["input_ids"], 0
    for row, tokens in enumerate(ids):
        if not tokens:
            raise UserError(f"row {row + 1}: the tokenizer makes no token of {sentences[row]!r}")
        if len(tokens) > max_length:
            ids[row] = _cut(tokens, encoded["special_tokens_mask"][row], max_length, truncate)
            cut += 1
    if cut:
        warnings.warn(f"{cut} of {len(ids)} sentences are longer than {max_length} tokens and were truncated "
                      f"({truncate} cut)", stacklevel=2)
    return ids


def _cut(tokens: list[int], special: list[int], max_length: int, truncate: str) -> list[int]:
    """Cuts one sentence's tokens to `max_length`; special tokens at both ends stay."""
    opening = special.index(0) if 0 in special else len(tokens)
    closing = special[::-1].index(0) if 0 in special else 0
    room = max_length - opening - closing
    if room < 1:
        raise UserError(f"--max-length {max_length}: no room for a token beside the tokenizer's {opening + closing} own")
    body = tokens[opening:len(tokens) - closing]
    first = {"tail": room, "head": 0, "middle": room // 2}[truncate]  # tokens that stay at the front
    return tokens[:opening] + body[:first] + body[len(body) - (room - first):] + tokens[len(tokens) - closing:]


# ---------------------------------------------------------------- batches

def bucket_by_length(lengths: list[int], batch_size: int, seed: int, batch_tokens: int | None = None,
                     shared_prefixes: list[list[int]] | None = None) -> list[list[int]]:
    """Groups rows into batches of about equal length.

    Rows are sorted by length, ties broken by the seed, and cut into runs. Every row stands in exactly
    one batch, and the same arguments give the same batches.

    Args:
        lengths: tokens in each row.
        batch_size: rows in a batch.
        seed: breaks ties between rows of equal length.
        batch_tokens: if given, bounds rows x longest row of a batch instead of counting rows (a
            single row longer than that still makes a batch of its own).
        shared_prefixes: the rows' token ids, if rows of equal length with a shared prefix shall stand together, NEIGHBOURS
            at a time.
    """
    shuffle = random.Random(seed)
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], shuffle.random()))
    if shared_prefixes is not None:
        order = _neighbours(order, lengths, shared_prefixes, shuffle)
    batches, current = [], []
    for row in order:
        full = len(current) == batch_size if batch_tokens is None else (len(current) + 1) * lengths[row] > batch_tokens
        if current and full:
            batches.append(current)
            current = []
        current.append(row)
    return batches + [current] if current else batches


def _neighbours(order: list[int], lengths: list[int], ids: list[list[int]], shuffle: random.Random) -> list[int]:
    """Reorders the rows of each length: rows with a shared prefix in groups of NEIGHBOURS, the groups shuffled.

    The groups are small because a batch of nothing but rows with one prefix is a poor sample of the split.
    """
    rank = collections.defaultdict(shuffle.random)  # token id -> random key by which rows are sorted
    ordered = []
    for _, rows in itertools.groupby(order, key=lambda row: lengths[row]):
        rows = sorted(rows, key=lambda row: [rank[token] for token in ids[row]])
        groups = [rows[i:i + NEIGHBOURS] for i in range(0, len(rows), NEIGHBOURS)]
        shuffle.shuffle(groups)
        ordered += itertools.chain(*groups)
    return ordered


def collate(ids: list[list[int]], labels: list[int], rows: list[int], pad_id: int,
            features: list[list[float]] | None = None) -> Batch:
    """Right-pads the given rows into one `Batch`."""
    import torch

    lengths = [len(ids[row]) for row in rows]
    width = max(lengths)
    input_ids = torch.tensor([ids[row] + [pad_id] * (width - len(ids[row])) for row in rows])
    attention_mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    numbers = torch.tensor([features[row] for row in rows], dtype=torch.float64) if features else None
    return Batch(input_ids, attention_mask, torch.tensor([labels[row] for row in rows]), torch.tensor(rows),
                 sum(lengths), features=numbers)


def make_batches(split: Split, tokenizer, max_length: int, batch_size: int, seed: int,
                 batch_tokens: int | None = None, truncate: str = "tail", shared_prefixes: bool = False) -> list[Batch]:
    """Makes length-bucketed batches of a split, tokenised and padded once for the whole run.

    Args:
        shared_prefixes: whether sentences of equal length with a shared prefix stand together, a few at a time: a decoder
            computes the prefix once (`fast/blocks.py`).
    """
    ids = encode(tokenizer, split.sentences, max_length, truncate)
    # Any id serves as padding: pads are masked and never pooled. GPT-2 has none of its own.
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    buckets = bucket_by_length([len(tokens) for tokens in ids], batch_size, seed, batch_tokens,
                               ids if shared_prefixes else None)
    return [collate(ids, split.labels, rows, pad_id, split.features) for rows in buckets]


def split_large(batches: list[Batch], rank: int = 0, count: int = 1) -> list[Batch]:
    """Gives each batch that this process does not compute at once its micro-batches.

    Each of several processes computes a part of every batch's rows. A batch, or such a part, of more than LARGE times the
    mean's tokens is cut into micro-batches below that size: large batches alone would set a training's peak memory. The
    gradients of all micro-batches add up to the batch's gradient.

    Args:
        rank: number of this process.
        count: processes; where they are more than a batch's rows, some have no row of that batch.
    """
    most = LARGE * sum(batch.input_ids.numel() for batch in batches) / len(batches) / count
    for batch in batches:
        start, end = (len(batch.rows) * i // count for i in (rank, rank + 1))
        if start == end:
            batch.micro = []
            continue
        own = batch if count == 1 else batch.part(start, end)
        if own.input_ids.numel() > most and len(own.rows) > 1:
            batch.micro = own.split(most)
        elif count > 1:
            batch.micro = [own]
    return batches


def epoch_order(batches: int, seed: int, epoch: int) -> list[int]:
    """Returns the order in which epoch `epoch` (from 1) takes the batches; the seed fixes it."""
    order = list(range(batches))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def padding_percent(batches: list[Batch]) -> float:
    """Returns the share of the computed tokens that are pads, in percent."""
    computed = sum(batch.input_ids.numel() for batch in batches)
    return 100.0 * (1 - sum(batch.tokens for batch in batches) / computed)
