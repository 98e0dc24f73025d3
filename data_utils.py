"""Turns tasks into token ids and token ids into length-bucketed batches.

    python -c "import data_utils; print(data_utils.load_task('cola', 'DIR_WITH_THE_TSV_FILES').train.labels[:5])"

A task is a training split and one or more named development splits (data/tasks.py). Batches are made of sentences of
about the same length, so that almost no pad token is computed. The sentences of a batch are fixed for the whole run, so
that cached features and logits are exactly reusable; the order of the batches is shuffled by the seed in each epoch.
"""
from __future__ import annotations

import collections
import itertools
import math
import random
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data.segments import arguments_of
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
from machine.errors import UserError
from machine.hardware import send

if TYPE_CHECKING:
    import torch

LARGE = 2  # times the mean batch's tokens: a larger batch is computed in micro-batches
TOKENISED = 10_000  # sentences that are tokenised at a time
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

    def pin(self) -> None:
        """Moves the tensors to pinned memory: they are copied to a GPU while the GPU computes."""
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
        # Cuts at equal distances: no micro-batch is a small rest.
        cuts = [rows * i // count for i in range(count + 1)]
        return [self.part(start, end) for start, end in itertools.pairwise(cuts)]

    def inputs(self) -> tuple[torch.Tensor | None, ...]:
        """Returns the arguments of a model's forward pass."""
        return (self.input_ids, self.attention_mask) + (() if self.features is None else (self.features,))


# ---------------------------------------------------------------- token ids

def encode(tokenizer, sentences: list[str], max_length: int, truncate: str = "tail") -> list[list[int]]:
    """Returns the token ids of each sentence, cut to `max_length` tokens; one warning counts the sentences cut.

    Args:
        truncate: the part of a sentence that is cut if it is too long: its `head` (the end of a review holds
            the verdict), its `tail`, or its `middle`. The tokenizer's own special tokens at both ends stay.

    Raises:
        UserError: a sentence without a token, or a `max_length` without room for one.
    """
    ids, cut = [], 0
    # In parts: the library's record of a text takes many times the memory of its ids.
    for start in range(0, len(sentences), TOKENISED):
        texts = arguments_of(tokenizer, sentences[start:start + TOKENISED])
        encoded = tokenizer(*texts, add_special_tokens=True, truncation=False, verbose=False,
                            return_special_tokens_mask=True)
        if len(texts) == 2:
            encoded, shortened = _shortened(tokenizer, texts, encoded, max_length, truncate)
            cut += shortened
        for tokens, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
            if not tokens:
                raise UserError(f"row {len(ids) + 1}: the tokenizer makes no token of {sentences[len(ids)]!r}")
            # The tokenizer's own truncation knows no middle.
            if len(tokens) > max_length:
                tokens, cut = _cut(tokens, special, max_length, truncate), cut + 1
            ids.append(tokens)
    if cut:
        warnings.warn(f"{cut} of {len(ids)} sentences are longer than {max_length} tokens and were truncated "
                      f"({truncate} cut)", stacklevel=2)
    return ids


def _shortened(tokenizer, pairs: tuple[list[str], ...], encoded: dict, max_length: int, truncate: str
               ) -> tuple[dict, int]:
    """Cuts the longer text of each pair, token by token, as the tokenizer does; returns the ids and the number of cuts.

    Raises:
        UserError: the tokenizer has no way to cut the middle, or `max_length` has no room for two texts.
    """
    long = [row for row, tokens in enumerate(encoded["input_ids"]) if len(tokens) > max_length]
    found = {key: list(encoded[key]) for key in ("input_ids", "special_tokens_mask")}
    if not long:
        return found, 0
    if truncate == "middle":
        raise UserError("--truncate middle: not for pairs of texts, of which the tokenizer cuts the longer one; expected "
                        "tail or head")
    own = tokenizer.num_special_tokens_to_add(pair=True)
    if max_length < own + 2:
        raise UserError(f"--max-length {max_length}: no room for two texts beside the tokenizer's {own} own tokens")
    side, tokenizer.truncation_side = tokenizer.truncation_side, {"tail": "right", "head": "left"}[truncate]
    try:
        firsts, seconds = pairs
        shorter = tokenizer([firsts[row] for row in long], [seconds[row] for row in long], truncation="longest_first",
                            max_length=max_length, return_special_tokens_mask=True)
    finally:
        tokenizer.truncation_side = side
    for at, row in enumerate(long):
        for key, values in found.items():
            values[row] = shorter[key][at]
    return found, len(long)


def _cut(tokens: list[int], special: list[int], max_length: int, truncate: str) -> list[int]:
    """Cuts one sentence's tokens to `max_length`; special tokens at both ends stay."""
    # Special tokens before the first and after the last token of text.
    opening = special.index(0) if 0 in special else len(tokens)
    closing = special[::-1].index(0) if 0 in special else 0
    room = max_length - opening - closing
    if room < 1:
        raise UserError(f"--max-length {max_length}: no room for a token beside the tokenizer's {opening + closing} own")
    body = tokens[opening:len(tokens) - closing]
    # Tokens that stay at the front; the others stay at the end.
    first = {"tail": room, "head": 0, "middle": room // 2}[truncate]
    return tokens[:opening] + body[:first] + body[len(body) - (room - first):] + tokens[len(tokens) - closing:]


# ---------------------------------------------------------------- batches

def bucket_by_length(lengths: list[int], batch_size: int, seed: int, batch_tokens: int | None = None,
                     shared_prefixes: list[list[int]] | None = None) -> list[list[int]]:
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
    shuffle = random.Random(seed)
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], shuffle.random()))
    if shared_prefixes is not None:
        order = _neighbours(order, lengths, shared_prefixes, shuffle)
    batches, current = [], []
    for row in order:
        # Rows are sorted, so this one is the longest of its batch so far: all would be padded to it.
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
    # A random key for each token id: prefixes meet when rows are sorted by it, in an order that the seed decides.
    rank = collections.defaultdict(shuffle.random)
    ordered = []
    for _, rows in itertools.groupby(order, key=lambda row: lengths[row]):
        rows = sorted(rows, key=lambda row: [rank[token] for token in ids[row]])
        groups = [rows[i:i + NEIGHBOURS] for i in range(0, len(rows), NEIGHBOURS)]
        shuffle.shuffle(groups)
        ordered += itertools.chain(*groups)
    return ordered


def collate(ids: list[list[int]], labels: list[Label], rows: list[int], pad_id: int,
            features: list[list[float]] | None = None) -> Batch:
    """Right-pads the given rows into one `Batch`."""
    import torch

    lengths = [len(ids[row]) for row in rows]
    width = max(lengths)
    input_ids = torch.tensor([ids[row] + [pad_id] * (width - len(ids[row])) for row in rows])
    attention_mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    # Features stay float64: the head standardises them before it computes in float32.
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
    """Gives micro-batches to each batch that this process does not compute in one piece.

    Each of several processes computes a part of every batch's rows. A batch, or such a part, of more than LARGE times the
    mean's tokens is cut into micro-batches below that size: large batches alone would set a training's peak memory. The
    gradients of all micro-batches add up to the batch's gradient.

    Args:
        rank: number of this process.
        count: number of processes; with more of them than rows in a batch, some have no row of that batch.
    """
    # The mean of all batches, not of this process's: every process cuts alike.
    most = LARGE * sum(batch.input_ids.numel() for batch in batches) / len(batches) / count
    for batch in batches:
        start, end = (len(batch.rows) * i // count for i in (rank, rank + 1))
        # No row of this batch: an empty list, as None would mean the whole batch.
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
    """Returns the order of the batches in epoch `epoch` (from 1); the seed fixes it."""
    order = list(range(batches))
    # A generator of its own for each epoch: a resumed run needs no state of the epochs before.
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def padding_percent(batches: list[Batch]) -> float:
    """Returns the share of the computed tokens that are pads, in percent."""
    computed = sum(batch.input_ids.numel() for batch in batches)
    return 100.0 * (1 - sum(batch.tokens for batch in batches) / computed)
