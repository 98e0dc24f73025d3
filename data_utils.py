"""Turns tasks into token ids and token ids into length-bucketed batches.

    python -c "import data_utils; print(data_utils.load_task('cola', 'DIR_WITH_THE_TSV_FILES').train.labels[:5])"

A task is a training split and one or more named development splits (data/tasks.py). Batches are made of sentences of
about the same length, so that almost no pad token is computed. The sentences of a batch are fixed for the whole run, so
that cached features and logits are exactly reusable; the order of the batches is shuffled by the seed in each epoch.
"""
from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data.arrow import in_parts
from data.splits import Label, Split

# The name under which everything above this module loads tasks.
from data.tasks import (  # noqa: F401
    BUZZER_TEMPLATE,
    CLASS_NAMES,
    COLA_CLASSES,
    COLA_FILES,
    DEFAULT_COLUMNS,
    GLUE_REPOSITORY,
    HUB_TABLES,
    TASKS,
    Task,
    load_task,
    read_cola_tsv,
    read_rows,
    with_columns,
)
from data.tokens import LARGE_SPLIT, TokenIds, encode, tokenise  # noqa: F401 (encode: for those above)
from machine.hardware import send

if TYPE_CHECKING:
    import torch

LARGE = 2  # times the mean batch's tokens: a larger batch is computed in micro-batches
NEIGHBOURS = 4  # sentences with a shared prefix that stand together in a batch


@dataclass
class Batch:
    """Holds right-padded token ids, and the labels, row numbers and features of their sentences."""

    input_ids: torch.Tensor  # (B, T) int64
    attention_mask: torch.Tensor  # (B, T) int64: 1 for a real token
    labels: torch.Tensor  # (B,) int64; (B, labels) float32 of several labels at once, (B,) float32 of numbers
    rows: torch.Tensor  # (B,) int64: each sentence's row in its split
    tokens: int  # real tokens, pads not counted
    features: torch.Tensor | None = None  # (B, F) float64 as in the file, NaN where a value is missing
    micro: list[Batch] | None = None  # micro-batches that this process computes instead (`split_large`); None: the whole
    step: list[Batch] | None = None  # all batches of the optimiser step that it belongs to; None: it is the only one

    def to(self, device: torch.device) -> Batch:
        """Copies it to a device, but for the mask: models ask the mask about lengths, and a GPU would answer late."""
        input_ids, labels, rows, features = (None if t is None else send(t, device) for t in (
            self.input_ids, self.labels, self.rows, self.features))
        return Batch(input_ids, self.attention_mask, labels, rows, self.tokens, features)

    def pinned(self) -> Batch:
        """Moves the tensors to pinned memory, those of micro-batches too: they are copied while the GPU computes."""
        for batch in self.micro_batches():
            for name in ("input_ids", "attention_mask", "labels", "rows", "features"):
                if (tensor := getattr(batch, name)) is not None:
                    setattr(batch, name, tensor.pin_memory())
        return self

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
        # Cuts at equal distances: no micro-batch is a small rest.
        cuts = [rows * i // count for i in range(count + 1)]
        return [self.part(start, end) for start, end in itertools.pairwise(cuts)]

    def inputs(self) -> tuple[torch.Tensor | None, ...]:
        """Returns the arguments of a model's forward pass."""
        return (self.input_ids, self.attention_mask) + (() if self.features is None else (self.features,))


# ---------------------------------------------------------------- batches

def bucket_by_length(lengths: Sequence[int], batch_size: int, seed: int, batch_tokens: int | None = None,
                     shared_prefixes: TokenIds | None = None) -> list[np.ndarray]:
    """Groups rows into batches of about equal length.

    Rows are sorted by length, ties broken by the seed, and cut into batches. Every row stands in exactly
    one batch, and the same arguments give the same batches.

    Args:
        lengths: tokens in each row.
        batch_size: rows in a batch.
        seed: breaks ties between rows of equal length.
        batch_tokens: if given, bounds rows x longest row of a batch instead of counting rows (a
            single row longer than that still makes a batch of its own).
        shared_prefixes: token ids of the rows, to put rows of equal length with a shared prefix next to each other,
            NEIGHBOURS at a time.
    """
    # Without mixed ties, rows of equal length would stay in the file's order, which often has one class after the other.
    shuffle, lengths = random.Random(seed), np.asarray(lengths, dtype=np.int64)
    ties = np.fromiter((shuffle.random() for _ in range(len(lengths))), np.float64, len(lengths))
    order = np.lexsort((ties, lengths))
    if shared_prefixes is not None and len(order):
        order = _neighbours(order, lengths, shared_prefixes, shuffle)
    if batch_tokens is None:
        cuts = list(range(0, len(order), batch_size))
    else:
        cuts = [0] if len(order) else []
        for at, length in enumerate(lengths[order].tolist()):
            # Rows are sorted, so this one is the longest of its batch so far: all would be padded to it.
            if at > cuts[-1] and (at - cuts[-1] + 1) * length > batch_tokens:
                cuts.append(at)
    return [order[start:end] for start, end in itertools.pairwise([*cuts, len(order)])]


def _neighbours(order: np.ndarray, lengths: np.ndarray, ids: TokenIds, shuffle: random.Random) -> np.ndarray:
    """Reorders the rows of each length: rows with a shared prefix in groups of NEIGHBOURS, the groups shuffled.

    The groups are small because a batch of nothing but rows with one prefix is a poor sample of the split.
    """
    # A random key for each token id: prefixes meet when rows are sorted by it, in an order that the seed decides.
    rank, ordered = np.full(int(ids.ids.max()) + 1, np.nan), []
    for rows in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1):
        rows = rows[_by_rank(ids, rows, rank, shuffle)]
        groups = list(range(0, len(rows), NEIGHBOURS))
        shuffle.shuffle(groups)
        places = np.array(groups)[:, None] + np.arange(NEIGHBOURS)
        ordered.append(rows[places[places < len(rows)]])
    return np.concatenate(ordered)


def _by_rank(ids: TokenIds, rows: np.ndarray, rank: np.ndarray, shuffle: random.Random) -> np.ndarray:
    """Sorts rows of one length by the ranks of their tokens, from the first to the last; returns their places.

    Args:
        rank: of each token id, NaN where none was drawn yet; the missing ones are drawn here.
    """
    # Tokens get their ranks in the order of their first appearance.
    present = np.zeros(len(rank), bool)
    for part in in_parts(rows):
        tokens = ids.padded(part, 0)[0].ravel()
        fresh, first = np.unique(tokens[np.isnan(rank[tokens])], return_index=True)
        rank[fresh[np.argsort(first)]] = [shuffle.random() for _ in fresh]
        present[tokens] = True
    # Ranks as small whole numbers: several tokens make one key, and few keys are quickly sorted.
    found = np.flatnonzero(present)
    number = np.zeros(len(rank), np.uint64)
    number[found[np.argsort(rank[found])]] = np.arange(len(found))
    bits = len(found).bit_length()
    together = 64 // bits
    shifts, keys = np.arange(together, dtype=np.uint64)[::-1] * np.uint64(bits), []
    for part in in_parts(rows):
        numbers = number[ids.padded(part, 0)[0]]
        numbers = np.pad(numbers, ((0, 0), (0, -numbers.shape[1] % together)))
        keys.append(np.bitwise_or.reduce(numbers.reshape(len(part), -1, together) << shifts, axis=2))
    # The last key that is given counts most.
    return np.lexsort(np.concatenate(keys).T[::-1])


def collate(ids: TokenIds | Sequence[Sequence[int]], labels: Sequence[Label], rows: Sequence[int], pad_id: int,
            features: Sequence[Sequence[float]] | None = None) -> Batch:
    """Right-pads the given rows into one `Batch`."""
    import torch

    own = np.asarray(rows)
    if not isinstance(ids, TokenIds):
        ids, own = TokenIds.of([ids[row] for row in rows]), np.arange(len(rows))
    input_ids, mask = ids.padded(own, pad_id)
    # Features stay float64: the head standardises them before it computes in float32.
    numbers = None if features is None or len(features) == 0 else _tensor_of(features, rows, torch.float64)
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(mask).long(), _tensor_of(labels, rows), torch.tensor(rows),
                 int(mask.sum()), features=numbers)


def _tensor_of(values: Sequence, rows: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
    """Returns the values of the given rows: those of an array as they are, others in a type."""
    import torch

    if isinstance(values, np.ndarray):
        return torch.from_numpy(values[rows])
    return torch.tensor([values[row] for row in rows], dtype=dtype)


def label_array(labels: Sequence[Label]) -> np.ndarray:
    """Returns labels as a loss reads them: (N,) int64 of classes, (N, labels) float32 of several, (N,) float32 of numbers.
    """
    found = np.asarray(labels)
    return found.astype(np.int64 if found.dtype.kind == "i" else np.float32)


class Batches(Sequence):
    """The batches of a large split: each is made when it is asked for, and only the order of the rows is held."""

    def __init__(self, make: Callable[[int], Batch], sizes: np.ndarray):
        self.make, self.sizes = make, sizes  # (batches, 2): tokens of each batch without and with pads

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, at):
        if isinstance(at, slice):
            own = range(len(self))[at]
            return Batches(lambda number: self[own[number]], self.sizes[at])
        return self.make(range(len(self))[at])


def changed(batches: Sequence[Batch], change: Callable[[Batch], Batch]) -> Sequence[Batch]:
    """Returns the batches with a change: at once, or of a large split when they are made."""
    if isinstance(batches, Batches):
        return Batches(lambda number: change(batches[number]), batches.sizes)
    return [change(batch) for batch in batches]


def sizes_of(batches: Sequence[Batch]) -> np.ndarray:
    """Returns the tokens of each batch without and with pads, (batches, 2)."""
    if isinstance(batches, Batches):
        return batches.sizes
    return np.array([(batch.tokens, batch.input_ids.numel()) for batch in batches])


def make_batches(split: Split, tokenizer, max_length: int, batch_size: int, seed: int,
                 batch_tokens: int | None = None, truncate: str = "tail", shared_prefixes: bool = False) -> Sequence[Batch]:
    """Makes length-bucketed batches of a split. A batch has the same rows in every epoch.

    Args:
        shared_prefixes: whether sentences of equal length with a shared prefix stand together, a few at a time: a decoder
            computes the prefix once (`fast/blocks.py`).
    """
    ids = tokenise(tokenizer, split.sentences, max_length, truncate)
    # Any id serves as padding: pads are masked and never pooled. GPT-2 has none of its own.
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    lengths, labels = ids.lengths, label_array(split.labels)
    features = np.asarray(split.features) if split.features else None
    buckets = bucket_by_length(lengths, batch_size, seed, batch_tokens, ids if shared_prefixes else None)
    # The last row of a bucket is its longest.
    sizes = [(lengths[rows].sum(), lengths[rows[-1]] * len(rows)) for rows in buckets]
    batches = Batches(lambda number: collate(ids, labels, buckets[number], pad_id, features), np.array(sizes))
    return batches if len(split) > LARGE_SPLIT else list(batches)


def split_large(batches: Sequence[Batch], rank: int = 0, count: int = 1) -> Sequence[Batch]:
    """Gives micro-batches to each batch that this process does not compute in one piece.

    Each of several processes computes a part of every batch's rows. A batch, or such a part, of more than LARGE times the
    mean's tokens is cut into micro-batches below that size: large batches alone would set a training's peak memory. The
    gradients of all micro-batches add up to the batch's gradient.

    Args:
        rank: number of this process.
        count: number of processes; with more of them than rows in a batch, some have no row of that batch.
    """
    # The mean of all batches, not of this process's: every process cuts alike.
    most = LARGE * int(sizes_of(batches)[:, 1].sum()) / len(batches) / count
    return changed(batches, lambda batch: _cut_large(batch, most, rank, count))


def _cut_large(batch: Batch, most: float, rank: int, count: int) -> Batch:
    """Gives a batch its micro-batches of at most `most` tokens, if it needs any, and returns it."""
    start, end = (len(batch.rows) * i // count for i in (rank, rank + 1))
    # No row of this batch: an empty list, as None would mean the whole batch.
    if start == end:
        batch.micro = []
        return batch
    own = batch if count == 1 else batch.part(start, end)
    if own.input_ids.numel() > most and len(own.rows) > 1:
        batch.micro = own.split(most)
    elif count > 1:
        batch.micro = [own]
    return batch


def epoch_order(batches: int, seed: int, epoch: int) -> list[int]:
    """Returns the order of the batches in epoch `epoch` (from 1); the seed fixes it."""
    order = list(range(batches))
    # A generator of its own for each epoch: a resumed run needs no state of the epochs before.
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def padding_percent(batches: Sequence[Batch]) -> float:
    """Returns the share of the computed tokens that are pads, in percent."""
    tokens, computed = sizes_of(batches).sum(0).tolist()
    return 100.0 * (1 - tokens / computed)
