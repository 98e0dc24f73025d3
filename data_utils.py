"""Tasks -> token ids -> length-bucketed batches.

    python -c "import data_utils; print(data_utils.load_task('cola', 'DIR_WITH_THE_TSV_FILES').train.labels[:5])"

A task is a training split and one or more named development splits. Batches are made of sentences of
about the same length, so that almost no pad token is computed. Their composition is fixed for the
whole run (which is what makes kept features and logits exactly reusable); their order is shuffled
each epoch by the seed.
"""
from __future__ import annotations

import functools
import random
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from files import UserError, sha256

if TYPE_CHECKING:
    import torch

COLA_FILES = {"train": "in_domain_train.tsv", "in_domain": "in_domain_dev.tsv", "out_of_domain": "out_of_domain_dev.tsv"}
# GLUE's CoLA validation set is the two public development files, one after the other.
GLUE_IN_DOMAIN_ROWS, GLUE_VALIDATION_ROWS = 527, 1043
GLUE_REPOSITORY = "nyu-mll/glue"
TASKS = ("cola", "tiny")


@dataclass(frozen=True)
class Split:
    """Labelled sentences, in file order."""

    sentences: list[str]
    labels: list[int]
    sources: list[str] = field(default_factory=list)  # CoLA's source code: the publication, or the phenomenon

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Task:
    """A training split and the development splits by name, with the SHA-256 of every file read."""

    name: str
    train: Split
    dev: dict[str, Split]
    files: dict[str, str]
    num_labels: int = 2

    def limit(self, rows: int) -> Task:
        """The same task with the first `rows` rows of each split: a quick look.

        Raises:
            UserError: if the shortened training split has one class only.
        """
        dev = {name: _head(split, rows) for name, split in self.dev.items()}
        return Task(self.name, _two_classes(_head(self.train, rows), f"the first {rows} training rows"), dev, self.files)


@dataclass
class Batch:
    """Right-padded token ids and what belongs to them."""

    input_ids: torch.Tensor  # (B, T) int64
    attention_mask: torch.Tensor  # (B, T) int64: 1 for a real token
    labels: torch.Tensor  # (B,) int64
    rows: torch.Tensor  # (B,) int64: each sentence's row in its split
    tokens: int  # real tokens, pads not counted
    kept: torch.Tensor | None = None  # what the frozen part of a classifier makes of it, computed once (frozen.py)

    def to(self, device: torch.device | str) -> Batch:
        tensors = (self.input_ids, self.attention_mask, self.labels, self.rows)
        kept = None if self.kept is None else self.kept.to(device, non_blocking=True)
        return Batch(*(t.to(device, non_blocking=True) for t in tensors), self.tokens, kept)

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What a model's forward pass takes."""
        return (self.input_ids, self.attention_mask) + (() if self.kept is None else (self.kept,))


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


def load_task(name: str, data: Path | str | None = None) -> Task:
    """Loads a task by name.

    Args:
        name: `cola` (from the folder `data`, else GLUE's CoLA from the Hugging Face Hub) or `tiny`.
        data: folder with CoLA's three public TSV files.

    Raises:
        UserError: unknown task, missing or malformed files, a training split with one class only, or
            a Hub that cannot be reached.
    """
    if name not in TASKS:
        raise UserError(f"--task {name}: unknown; expected one of {', '.join(TASKS)}")
    if data is not None:
        return _cola_folder(name, Path(data))
    if name == "tiny":
        import tiny

        with tempfile.TemporaryDirectory() as folder:
            tiny.write_tiny_task(Path(folder))
            task = _cola_folder(name, Path(folder))
        return Task(name, task.train, task.dev, {f"tiny/{Path(p).name}": digest for p, digest in task.files.items()})
    return _glue_cola()


def _cola_folder(name: str, folder: Path) -> Task:
    if not folder.is_dir():
        raise UserError(f"--data {folder}: not a folder; expected one with {', '.join(COLA_FILES.values())}")
    paths = {split: folder / file for split, file in COLA_FILES.items()}
    splits = {split: read_cola_tsv(path) for split, path in paths.items()}
    train = _two_classes(splits.pop("train"), str(paths["train"]))
    return Task(name, train, splits, {str(path): sha256(path) for path in paths.values()})


@functools.cache
def hub_unreachable() -> bool:
    """Whether the Hugging Face Hub gives no answer; its cache alone can be read then.

    Asked once a process: left to itself, the library would retry each file for half a minute.
    """
    from huggingface_hub import constants, get_session

    try:
        return get_session().head(constants.ENDPOINT, timeout=5).status_code >= 500
    except Exception:  # offline by choice, or whatever its HTTP library raises for refused, unknown or timed out
        return True


def _glue_cola() -> Task:
    from datasets import Dataset
    from huggingface_hub import hf_hub_download

    splits, files = {}, {}
    for split in ("train", "validation"):
        file = f"cola/{split}-00000-of-00001.parquet"
        try:
            path = hf_hub_download(GLUE_REPOSITORY, file, repo_type="dataset", local_files_only=hub_unreachable())
        except (OSError, ValueError) as error:  # offline and not cached, or no such file
            raise UserError(f"--task cola: {GLUE_REPOSITORY} is not cached and the Hugging Face Hub cannot be reached "
                            f"({type(error).__name__}); give --data DIR with {', '.join(COLA_FILES.values())}") from None
        rows = Dataset.from_parquet(path, keep_in_memory=True)
        splits[split] = Split(list(rows["sentence"]), list(rows["label"]), ["glue"] * len(rows))
        files[f"{GLUE_REPOSITORY}/{file}"] = sha256(path)
    both = splits["validation"]
    if len(both) != GLUE_VALIDATION_ROWS:
        raise UserError(f"{GLUE_REPOSITORY}: {len(both)} validation rows; expected {GLUE_VALIDATION_ROWS}, of which "
                        f"the first {GLUE_IN_DOMAIN_ROWS} are in-domain")
    dev = {"in_domain": _slice(both, 0, GLUE_IN_DOMAIN_ROWS), "out_of_domain": _slice(both, GLUE_IN_DOMAIN_ROWS, None)}
    return Task("cola", _two_classes(splits["train"], GLUE_REPOSITORY), dev, files)


def _slice(split: Split, start: int, stop: int | None) -> Split:
    return Split(split.sentences[start:stop], split.labels[start:stop], split.sources[start:stop])


def _head(split: Split, rows: int) -> Split:
    return _slice(split, 0, rows)


def _two_classes(split: Split, where: str) -> Split:
    if len(set(split.labels)) < 2:
        raise UserError(f"{where}: every label is {split.labels[0]}; training needs both classes")
    return split


# ---------------------------------------------------------------- token ids

def encode(tokenizer, sentences: list[str], max_length: int) -> list[list[int]]:
    """Token ids of each sentence, cut to `max_length` tokens with one warning that counts the cut ones.

    Raises:
        UserError: a sentence of which the tokenizer makes no token at all.
    """
    ids = tokenizer(sentences, add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
    for row, tokens in enumerate(ids):
        if not tokens:
            raise UserError(f"row {row + 1}: the tokenizer makes no token of {sentences[row]!r}")
    cut = sum(len(tokens) > max_length for tokens in ids)
    if cut:
        warnings.warn(f"{cut} of {len(ids)} sentences are longer than {max_length} tokens and were truncated",
                      stacklevel=2)
        # Re-encoding lets the tokenizer keep its closing special token ([SEP]) where it has one.
        ids = tokenizer(sentences, add_special_tokens=True, truncation=True, max_length=max_length)["input_ids"]
    return ids


# ---------------------------------------------------------------- batches

def bucket_by_length(lengths: list[int], batch_size: int, seed: int, batch_tokens: int | None = None
                     ) -> list[list[int]]:
    """Rows grouped into batches of about equal length.

    Rows are sorted by length, ties broken by the seed, and cut into runs. Every row stands in exactly
    one batch, and the same arguments give the same batches.

    Args:
        lengths: tokens in each row.
        batch_size: rows in a batch.
        seed: breaks ties between rows of equal length.
        batch_tokens: if given, bounds rows x longest row of a batch instead of counting rows (a
            single row longer than that still makes a batch of its own).
    """
    shuffle = random.Random(seed)
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], shuffle.random()))
    batches, current = [], []
    for row in order:
        full = len(current) == batch_size if batch_tokens is None else (len(current) + 1) * lengths[row] > batch_tokens
        if current and full:
            batches.append(current)
            current = []
        current.append(row)
    return batches + [current] if current else batches


def collate(ids: list[list[int]], labels: list[int], rows: list[int], pad_id: int) -> Batch:
    """Right-pads the given rows into one `Batch`."""
    import torch

    width = max(len(ids[row]) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for i, row in enumerate(rows):
        input_ids[i, :len(ids[row])] = torch.tensor(ids[row])
        attention_mask[i, :len(ids[row])] = 1
    return Batch(input_ids, attention_mask, torch.tensor([labels[row] for row in rows]), torch.tensor(rows),
                 sum(len(ids[row]) for row in rows))


def make_batches(split: Split, tokenizer, max_length: int, batch_size: int, seed: int,
                 batch_tokens: int | None = None) -> list[Batch]:
    """A split as length-bucketed batches, tokenised and padded once for the whole run."""
    ids = encode(tokenizer, split.sentences, max_length)
    # Any id serves as padding: pads are masked and never pooled. GPT-2 has none of its own.
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    buckets = bucket_by_length([len(tokens) for tokens in ids], batch_size, seed, batch_tokens)
    return [collate(ids, split.labels, rows, pad_id) for rows in buckets]


def epoch_order(batches: int, seed: int, epoch: int) -> list[int]:
    """The order in which epoch `epoch` (from 1) takes the batches; fixed by the seed."""
    order = list(range(batches))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def padding_percent(batches: list[Batch]) -> float:
    """Share of the computed tokens that are pads, in percent."""
    computed = sum(batch.input_ids.numel() for batch in batches)
    return 100.0 * (1 - sum(batch.tokens for batch in batches) / computed)
