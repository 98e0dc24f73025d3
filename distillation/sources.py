"""The sources of a task's transfer set, and the set itself, made once for all runs that share them.

    make_transfer_set(inputs, cache, 40_000)
"""
from __future__ import annotations

import itertools
import json
import random
import warnings
from collections.abc import Iterable
from pathlib import Path

from data import edits
from data.segments import reads_pairs
from data_utils import Task
from distillation import transfer_set as mixing
from distillation.cache import Cache, digest
from distillation.teachers import Inputs
from distillation.transfer_set import New, letters_and_digits, transfer_set
from distillation.writer import CHUNKS, Writer, longest_length
from machine.progress import Bar


def make_transfer_set(inputs: Inputs, cache: Cache, count: int, version: int) -> list[New]:
    """Returns the first `count` sentences of the transfer set, or all of them with a warning if there are fewer.

    They are made once for all runs with the same sources and the same code of edits.

    Args:
        version: 1: edits without a dictionary, and the writer's large chunks, as in early runs; 2: neither.
    """
    if not count:
        return []
    # The folder of the cache stands for base and task; left-out development sentences are known, and not in its name.
    code = [Path(file).read_text(encoding="utf-8") for file in (edits.__file__, mixing.__file__, __file__)]
    pairs = ["pairs"] if reads_pairs(inputs.tokenizer) else []
    key = digest(json.dumps([count, inputs.teachers[0].model.decoder, digest("\n".join(inputs.plain)),
                             inputs.task.left_out, code, version, *pairs]))
    found = cache.read_sentences(key)
    if found is None:
        found = new_sentences(inputs, cache, count, version)
        cache.write_sentences(key, found)
    if len(found) < count:
        warnings.warn(f"--augment {count}: only {len(found):,} different sentences can be had", stacklevel=2)
    return found


def new_sentences(inputs: Inputs, cache: Cache, count: int, version: int) -> list[New]:
    """Makes the first `count` sentences of the transfer set, or all of them if there are fewer."""
    train, known = inputs.task.train.sentences, known_sentences(inputs.task)
    # Plain sentences as long as training sentences, and none of the task.
    plain, written = plain_sentences(inputs.plain, known, longest_length(train)), None
    # A decoder's base writes sentences: one of four kinds, or of two turns out of four. It ends at the mark between two
    # texts, and so it writes no pairs.
    if inputs.teachers[0].model.decoder and not reads_pairs(inputs.tokenizer):
        writer = Writer(cache, inputs.base.model, inputs.tokenizer, train, CHUNKS[version])
        written = writer.written(least=count // (4 if plain else 2))
    # The first of an order that does not depend on the number: a smaller set is the beginning of a larger one.
    sentences = transfer_set(train, known, plain, written, edits.EDITS_BY["suffix" if version == 1 else "dictionary"])
    # A task of pairs has new pairs: plain sentences and edits without a separator are none.
    if reads_pairs(inputs.tokenizer):
        separator = inputs.tokenizer.pair_separator
        sentences = (one for one in sentences if one.text.count(separator) == 1 and all(one.text.split(separator)))
    sentences = itertools.islice(sentences, count)
    return list(Bar(sentences, total=count, unit="sentence", desc="transfer set", delay=2))


def known_sentences(task: Task) -> set[str]:
    """Returns the keys of a task's sentences, left-out development sentences among them: the transfer set holds none."""
    known = set(map(letters_and_digits, task.left_out))
    for split in (task.train, *task.dev.values()):
        known.update(map(letters_and_digits, split.sentences))
    return known


def plain_sentences(text: Iterable[str], known: set[str], longest: int) -> list[str]:
    """Returns the sentences of at most `longest` words, shuffled, without duplicates and without known ones.

    Args:
        known: keys (`letters_and_digits`) of the task's sentences.
    """
    kept = {letters_and_digits(sentence): sentence for sentence in text if len(sentence.split()) <= longest}
    found = [sentence for key, sentence in kept.items() if key and key not in known]
    # One order for all seeds of the run: they share the transfer set.
    random.Random(0).shuffle(found)
    return found


def pretraining_text(inputs: Inputs, new: list[New]) -> list[str]:
    """Returns the plain text of pretraining: sentences of any length, but none twice, of the task or among the new ones."""
    seen = {*known_sentences(inputs.task), *(letters_and_digits(one.text) for one in new)}
    return [sentence for sentence in dict.fromkeys(inputs.plain) if letters_and_digits(sentence) not in seen]


def free_of_teacher(new: list[New]) -> list[int]:
    """Returns the rows of the transfer set without a sentence of a teacher's language model, or an edit of one."""
    written = {one.text for one in new if one.kind == "written"}
    return [row for row, one in enumerate(new) if one.kind != "written" and one.original not in written]
