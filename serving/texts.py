"""Texts to classes and probabilities: tokenised, batched by length, answered in their order.

    results = classify(tokenizer, [(reading, "A sentence."), ...], logits)

A text that cannot be read gets an error in its place; the others are not disturbed.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import data_utils
from data_utils import Batch
from machine.errors import UserError

BATCH_SIZE, BATCH_TOKENS = 64, 4096  # sentences, and tokens with pads, that are computed at a time


@dataclass(frozen=True)
class Reading:
    """How a model reads a text, and what its classes are called."""

    classes: tuple[str, ...]
    max_length: int  # tokens
    truncate: str = "tail"  # the part of a longer text that is cut

    @classmethod
    def of(cls, config: dict) -> Reading:
        """Returns a run's, from its config.json."""
        options = config["options"]
        return cls(tuple(config.get("classes", data_utils.COLA_CLASSES)), options["max_length"],
                   options.get("truncate", "tail"))


def encode(tokenizer, reading: Reading, texts: list[str]) -> list[list[int] | UserError]:
    """Returns the token ids of each text, or what is wrong with the text."""
    wrong = [_wrong(text) for text in texts]
    good = [text for text, error in zip(texts, wrong, strict=True) if error is None]
    try:
        found = iter(data_utils.encode(tokenizer, good, reading.max_length, reading.truncate) if good else [])
    except UserError as error:  # find out which text it is
        if len(texts) == 1:
            return [UserError(str(error).removeprefix("row 1: "))]
        return [ids for text in texts for ids in encode(tokenizer, reading, [text])]
    return [next(found) if error is None else error for error in wrong]


def _wrong(text: str) -> UserError | None:
    """Returns why a text cannot be read, or None."""
    if not text.strip():
        return UserError("the text is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        return UserError("the text is no valid Unicode (it has half of a surrogate pair)")
    return None


@torch.inference_mode()
def classify(tokenizer, rows: list[tuple[Reading, str]], logits: Callable[[Batch, list[int]], list[Tensor] | Tensor],
             features: list[list[float]] | None = None) -> list[dict | UserError]:
    """Returns label, probability and probabilities of each text, or its error.

    Args:
        rows: how a text is read, and the text.
        logits: of a batch and its rows' numbers: (classes,) for each.
        features: numbers of each row, for a model that reads them.
    """
    results: list[dict | UserError | None] = [None] * len(rows)
    by_reading: dict[Reading, list[int]] = {}
    for row, (reading, _) in enumerate(rows):
        by_reading.setdefault(reading, []).append(row)
    ids: list[list[int]] = [[]] * len(rows)
    for reading, numbers in by_reading.items():
        for row, tokens in zip(numbers, encode(tokenizer, reading, [rows[row][1] for row in numbers]), strict=True):
            if isinstance(tokens, UserError):
                results[row] = tokens
            else:
                ids[row] = tokens
    readable = [row for row in range(len(rows)) if results[row] is None]
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    for places in _batches([len(ids[row]) for row in readable]):
        batch_rows = [readable[place] for place in places]
        batch = data_utils.collate(ids, [0] * len(rows), batch_rows, pad_id, features)
        for row, values in zip(batch_rows, logits(batch, batch_rows), strict=True):
            results[row] = _result(rows[row][0].classes, values.float().softmax(-1).tolist())
    return results


def _batches(lengths: list[int]) -> list[list[int]]:
    """Groups rows of about equal length, at most BATCH_SIZE of them and BATCH_TOKENS tokens."""
    return [rows[start:start + BATCH_SIZE]
            for rows in data_utils.bucket_by_length(lengths, BATCH_SIZE, 0, BATCH_TOKENS)
            for start in range(0, len(rows), BATCH_SIZE)]


def _result(classes: tuple[str, ...], probabilities: list[float]) -> dict:
    best = max(range(len(classes)), key=probabilities.__getitem__)
    return {"label": classes[best], "probability": probabilities[best],
            "probabilities": dict(zip(classes, probabilities, strict=True))}
