"""Texts to classes and probabilities: tokenised, batched by length, answered in their order.

    results = classify(tokenizer, [(reading, "A sentence."), ...], logits)

A text that cannot be read gets an error in its place; the others are not disturbed.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import data_utils
from data.segments import arguments_of, reads_pairs, split_pair
from data.tiny import unknown_words
from data_utils import Batch
from machine.errors import UserError
from metrics.problems import SINGLE_LABEL, Problem, problem_of
from record.calibration import LIKELIEST, Calibration
from serving.answers import texts_of

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

    @property
    def shown(self) -> tuple[str, ...]:
        """Returns the classes as a shipped model tells them: their names for readers, where they have others."""
        return self.names or self.classes

    def answer(self, logits: Tensor) -> dict:
        """Returns label, probability and probabilities of logits (classes,), and the label's name if it has another one.

        See each problem's `answer`.
        """
        return self.answers(logits[None])[0]

    def answers(self, logits: Tensor) -> list[dict]:
        """Returns the `answer` of each row of logits (N, classes)."""
        rule = self.calibration
        found = self.problem.answers(logits.float() / rule.temperature, self.classes)
        if rule.threshold is not None:
            # Two classes: the threshold chooses.
            positive, negative = self.classes[rule.positive], self.classes[1 - rule.positive]
            for answer in found:
                label = positive if answer["probabilities"][positive] >= rule.threshold else negative
                answer.update(label=label, probability=answer["probabilities"][label])
        if self.names:
            names = dict(zip(self.classes, self.names, strict=True))
            for answer in found:
                answer["name"] = names[answer["label"]]
        return found


class Encoded(NamedTuple):
    """A text's token ids, and whether they are those of a part of it."""

    ids: list[int]
    truncated: bool


def encode(tokenizer, reading: Reading, texts: list[str]) -> list[Encoded | UserError]:
    """Returns the token ids of each text, or the error of a text that cannot be read."""
    # Asked once: `transformers` takes longer to look for an attribute than a text takes to check.
    separator = tokenizer.pair_separator if reads_pairs(tokenizer) else None
    wrong = [_wrong(separator, text) for text in texts]
    good = [text for text, error in zip(texts, wrong, strict=True) if error is None]
    if (ids := _short_ids(tokenizer, good, reading.max_length)) is not None:
        encoded = iter(ids)
        return [Encoded(next(encoded), False) if error is None else error for error in wrong]
    try:
        found = data_utils.encode(tokenizer, good, reading.max_length, reading.truncate) if good else []
    except UserError as error:
        if len(texts) == 1:
            return [UserError(str(error).removeprefix("row 1: "))]
        # The error is that of one text. Alone, each of the others gets its ids.
        return [ids for text in texts for ids in encode(tokenizer, reading, [text])]
    encoded = iter(_with_truncation(tokenizer, reading, good, found))
    return [next(encoded) if error is None else error for error in wrong]


def _short_ids(tokenizer, texts: list[str], max_length: int) -> list[list[int]] | None:
    """Returns the token ids of texts; None if one of them has too many or none, and where the library has no fast way.

    `transformers` makes a dictionary of each text's tokens, which takes several times as long as their ids.
    """
    if not texts or not getattr(tokenizer, "is_fast", False):
        return None
    backend = tokenizer.backend_tokenizer
    # What a tokenizer.json says of cutting and padding is not for us, as `data_utils.encode` has it too.
    if backend.truncation is not None or backend.padding is not None:
        backend.no_truncation()
        backend.no_padding()
    # Offsets in the text, which this call leaves out, are not needed.
    ids = [text.ids for text in backend.encode_batch_fast(texts_of(tokenizer, texts), add_special_tokens=True)]
    lengths = list(map(len, ids))
    return ids if min(lengths) > 0 and max(lengths) <= max_length else None


def _with_truncation(tokenizer, reading: Reading, texts: list[str], ids: list[list[int]]) -> list[Encoded]:
    """Finds out which texts were cut."""
    # A text of exactly max_length tokens may be whole. Only such texts are tokenised a second time.
    full = [row for row, tokens in enumerate(ids) if len(tokens) == reading.max_length]
    arguments = arguments_of(tokenizer, [texts[row] for row in full])
    whole = tokenizer(*arguments, truncation=False, verbose=False)["input_ids"] if full else []
    cut = {row for row, tokens in zip(full, whole, strict=True) if len(tokens) > reading.max_length}
    return [Encoded(tokens, row in cut) for row, tokens in enumerate(ids)]


def _wrong(separator: str | None, text: str) -> UserError | None:
    """Returns the reason why a text cannot be read, or None.

    Args:
        separator: between two texts; None: a row is one text.
    """
    if not text.strip():
        return UserError("the text is empty")
    # Half of a pair would be answered too, and nobody would see it.
    if separator is not None and split_pair(text, separator) is None:
        return UserError("one text; expected two of them, with a tab between them")
    try:
        text.encode()
    except UnicodeEncodeError:
        return UserError("the text is no valid Unicode (it has half of a surrogate pair)")
    return None


@torch.inference_mode()
def classify(tokenizer, rows: list[tuple[Reading, str]], logits: Callable[[Batch, list[int]], list[Tensor] | Tensor],
             features: list[list[float]] | None = None, encoded: list[Encoded | UserError] | None = None
             ) -> list[dict | UserError]:
    """Returns label, probability and probabilities of each text, or its error.

    A result has `truncated` where a text was cut, and `unknown_words` where the built-in model never saw some of its words.

    Args:
        rows: the reading of each text, and the text.
        logits: from a batch and the numbers of its rows to (classes,) for each of them.
        features: numbers of each row, for a model that reads them.
        encoded: `encode_rows` of the same rows, if it was called before.
    """
    encoded = encode_rows(tokenizer, rows) if encoded is None else encoded
    results: list[dict | UserError | None] = [text if isinstance(text, UserError) else None for text in encoded]
    readable = [row for row, result in enumerate(results) if result is None]
    # `collate` takes the whole list of ids and the rows of a batch; an unreadable text is in no batch.
    ids = [[] if isinstance(text, UserError) else text.ids for text in encoded]
    labels = [0] * len(rows)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    for places in _batches([len(ids[row]) for row in readable]):
        batch_rows = [readable[place] for place in places]
        values = logits(data_utils.collate(ids, labels, batch_rows, pad_id, features), batch_rows)
        for row, answer in zip(batch_rows, _answers([rows[row][0] for row in batch_rows], values), strict=True):
            reading, text = rows[row]
            results[row] = answer
            if encoded[row].truncated:
                answer["truncated"] = True
            if reading.tiny and (words := unknown_words(tokenizer, text)):
                answer["unknown_words"] = words
    return results


def _answers(readings: list[Reading], values: list[Tensor] | Tensor) -> list[dict]:
    """Returns the answer of each row of a batch."""
    first = readings[0]
    # Together where one model answered: for each row alone the calls of PyTorch cost more than a student's own computing.
    if isinstance(values, Tensor) and all(reading is first for reading in readings):
        return first.answers(values)
    return [reading.answer(row) for reading, row in zip(readings, values, strict=True)]


def encode_rows(tokenizer, rows: list[tuple[Reading, str]]) -> list[Encoded | UserError]:
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
