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
from data.segments import arguments_of, reads_pairs, split_pair
from data.tiny import unknown_words
from data_utils import Batch
from machine.errors import UserError
from metrics.problems import SINGLE_LABEL, Problem, problem_of
from record.calibration import LIKELIEST, Calibration

BATCH_SIZE, BATCH_TOKENS = 64, 4096  # sentences, and tokens with pads, that are computed at a time


@dataclass(frozen=True)
class Reading:
    """The way a model reads a text, the names of its classes, and the rule that chooses one."""

    classes: tuple[str, ...]
    max_length: int  # tokens
    truncate: str = "tail"  # the part of a longer text that is cut: head, tail or middle
    calibration: Calibration = LIKELIEST
    problem: Problem = SINGLE_LABEL
    tiny: bool = False  # the built-in model, which knows a few hundred words
    names: tuple[str, ...] = ()  # of the classes, for readers; empty: no others than `classes`

    @classmethod
    def of(cls, config: dict, calibration: Calibration = LIKELIEST) -> Reading:
        """Returns the reading of a run, from its config.json."""
        options = config["options"]
        return cls(tuple(config.get("classes", data_utils.COLA_CLASSES)), options["max_length"],
                   options.get("truncate", "tail"), calibration, problem_of(config), options.get("model") == "tiny",
                   tuple(config.get("class_names", ())))

    def answer(self, logits: Tensor) -> dict:
        """Returns label, probability and probabilities of logits (classes,), and the label's name if it has another one.

        See each problem's `answer`.
        """
        rule = self.calibration
        found = self.problem.answer(logits.float() / rule.temperature, self.classes)
        if rule.threshold is not None:
            # Two classes: the threshold chooses.
            positive = found["probabilities"][self.classes[rule.positive]]
            label = self.classes[rule.positive if positive >= rule.threshold else 1 - rule.positive]
            found = {**found, "label": label, "probability": found["probabilities"][label]}
        return {**found, "name": self.names[self.classes.index(found["label"])]} if self.names else found


@dataclass(frozen=True)
class Encoded:
    """A text's token ids, and whether they are those of a part of it."""

    ids: list[int]
    truncated: bool


def encode(tokenizer, reading: Reading, texts: list[str]) -> list[Encoded | UserError]:
    """Returns the token ids of each text, or the error of a text that cannot be read."""
    wrong = [_wrong(tokenizer, text) for text in texts]
    good = [text for text, error in zip(texts, wrong, strict=True) if error is None]
    try:
        found = data_utils.encode(tokenizer, good, reading.max_length, reading.truncate) if good else []
    except UserError as error:
        if len(texts) == 1:
            return [UserError(str(error).removeprefix("row 1: "))]
        # The error is that of one text. Alone, each of the others gets its ids.
        return [ids for text in texts for ids in encode(tokenizer, reading, [text])]
    encoded = iter(_with_truncation(tokenizer, reading, good, found))
    return [next(encoded) if error is None else error for error in wrong]


def _with_truncation(tokenizer, reading: Reading, texts: list[str], ids: list[list[int]]) -> list[Encoded]:
    """Finds out which texts were cut."""
    # A text of exactly max_length tokens may be whole. Only such texts are tokenised a second time.
    full = [row for row, tokens in enumerate(ids) if len(tokens) == reading.max_length]
    arguments = arguments_of(tokenizer, [texts[row] for row in full])
    whole = tokenizer(*arguments, truncation=False, verbose=False)["input_ids"] if full else []
    cut = {row for row, tokens in zip(full, whole, strict=True) if len(tokens) > reading.max_length}
    return [Encoded(tokens, row in cut) for row, tokens in enumerate(ids)]


def _wrong(tokenizer, text: str) -> UserError | None:
    """Returns the reason why a text cannot be read, or None."""
    if not text.strip():
        return UserError("the text is empty")
    # Half of a pair would be answered too, and nobody would see it.
    if reads_pairs(tokenizer) and split_pair(text, tokenizer.pair_separator) is None:
        return UserError("one text; expected two of them, with a tab between them")
    try:
        text.encode()
    except UnicodeEncodeError:
        return UserError("the text is no valid Unicode (it has half of a surrogate pair)")
    return None


@torch.inference_mode()
def classify(tokenizer, rows: list[tuple[Reading, str]], logits: Callable[[Batch, list[int]], list[Tensor] | Tensor],
             features: list[list[float]] | None = None) -> list[dict | UserError]:
    """Returns label, probability and probabilities of each text, or its error.

    A result has `truncated` where a text was cut, and `unknown_words` where the built-in model never saw some of its words.

    Args:
        rows: the reading of each text, and the text.
        logits: from a batch and the numbers of its rows to (classes,) for each of them.
        features: numbers of each row, for a model that reads them.
    """
    encoded = _encode_rows(tokenizer, rows)
    results: list[dict | UserError | None] = [text if isinstance(text, UserError) else None for text in encoded]
    readable = [row for row, result in enumerate(results) if result is None]
    # `collate` takes the whole list of ids and the rows of a batch; an unreadable text is in no batch.
    ids = [[] if isinstance(text, UserError) else text.ids for text in encoded]
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    for places in _batches([len(ids[row]) for row in readable]):
        batch_rows = [readable[place] for place in places]
        batch = data_utils.collate(ids, [0] * len(rows), batch_rows, pad_id, features)
        for row, values in zip(batch_rows, logits(batch, batch_rows), strict=True):
            reading, text = rows[row]
            results[row] = reading.answer(values)
            if encoded[row].truncated:
                results[row]["truncated"] = True
            if reading.tiny and (words := unknown_words(tokenizer, text)):
                results[row]["unknown_words"] = words
    return results


def _encode_rows(tokenizer, rows: list[tuple[Reading, str]]) -> list[Encoded | UserError]:
    """Encodes each text by its own reading."""
    # Texts of one reading are tokenised together, which is faster than one by one.
    by_reading: dict[Reading, list[int]] = {}
    for row, (reading, _) in enumerate(rows):
        by_reading.setdefault(reading, []).append(row)
    encoded: list[Encoded | UserError | None] = [None] * len(rows)
    for reading, numbers in by_reading.items():
        for row, text in zip(numbers, encode(tokenizer, reading, [rows[row][1] for row in numbers]), strict=True):
            encoded[row] = text
    return encoded


def _batches(lengths: list[int]) -> list[list[int]]:
    """Groups rows of about equal length, at most BATCH_SIZE of them and BATCH_TOKENS tokens."""
    buckets = data_utils.bucket_by_length(lengths, BATCH_SIZE, 0, BATCH_TOKENS)
    # A bucket of short rows may hold more than BATCH_SIZE of them.
    return [rows[start:start + BATCH_SIZE] for rows in buckets for start in range(0, len(rows), BATCH_SIZE)]
