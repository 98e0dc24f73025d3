"""Batches of token ids for the stages and for teachers: rows of one length together, or neighbouring rows; their weight."""
from __future__ import annotations

import itertools
import random
from collections.abc import Callable

from data_utils import Batch, collate


def pad_id(tokenizer) -> int:
    """Returns the tokenizer's pad token; any id serves where there is none, because pads are masked."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def equal_length_batches(ids: list[list[int]], labels: list[int], rows: list[int], tokens: int, tokenizer, seed: int = 0
                         ) -> list[Batch]:
    """Makes batches of at most `tokens` tokens, in random order; the rows of a batch have one length.

    Without pads nothing has to be packed, and an RNN runs three times as fast on a CPU.

    Args:
        ids: token ids of all sentences.
        labels: of all sentences.
        rows: the chosen sentences; a row may be chosen several times.
        tokens: in a batch; a longer row is a batch of its own.
    """
    lengths, rng, buckets = [len(ids[row]) for row in rows], random.Random(seed), []
    # Rows of one length in random order, so that other seeds have other batches.
    order = sorted(range(len(rows)), key=lambda at: (lengths[at], rng.random()))
    for length, group in itertools.groupby(order, key=lambda at: lengths[at]):
        # As many rows as the tokens allow, and at least one.
        same, size = [rows[at] for at in group], max(1, tokens // length)
        buckets += [same[start:start + size] for start in range(0, len(same), size)]
    # Sorted batches would teach short sentences first.
    rng.shuffle(buckets)
    return [collate(ids, labels, bucket, pad_id(tokenizer)) for bucket in buckets]


def neighbour_batches(ids: list[list[int]], labels: list[int], rows: list[int], tokens: int, tokenizer) -> list[Batch]:
    """Makes batches of at most `tokens` tokens, pads included, from rows in the given order, whatever their lengths."""
    found, first, width = [], 0, 0
    for at, row in enumerate(rows):
        width = max(width, len(ids[row]))
        # The row would make the batch too large: the batch ends before it.
        if at > first and width * (at + 1 - first) > tokens:
            found.append(rows[first:at])
            first, width = at, len(ids[row])
    return [collate(ids, labels, some, pad_id(tokenizer)) for some in [*found, rows[first:]]]


def ids_by_row(batches: list[Batch]) -> list[list[int]]:
    """Returns the token ids of each row of some batches, in the split's own order."""
    found = {}
    for batch in batches:
        for row, tokens, mask in zip(batch.rows.tolist(), batch.input_ids, batch.attention_mask.bool(), strict=True):
            found[row] = tokens[mask].tolist()
    return [found[row] for row in range(len(found))]


def share_of_step(batch: Batch, count: Callable[[Batch], int]) -> float:
    """Returns the factor that turns a batch's weight by rows in an optimiser step into its weight by tokens.

    `train_utils.fit` weighs each batch of a step by its rows. A mean over tokens has to be weighed by tokens, or several
    batches would train something else than one large batch. The factor is 1 for a batch that is a whole step.

    Args:
        count: returns the number of tokens of a batch in the mean.
    """
    step = batch.step or [batch]
    tokens, rows = sum(map(count, step)), sum(len(one.rows) for one in step)
    # No token in the whole step: the mean is 0, whatever its weight.
    return (count(batch) / tokens if tokens else 0.0) / (len(batch.rows) / rows)
