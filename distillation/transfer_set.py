"""The transfer set: sentences without gold labels, from several sources that take turns. Pure iterators, no files.

    kinds = transfer_set(train, known, plain, written)
    list(itertools.islice(kinds, 40_000))    # the first 40,000; a smaller set is the beginning of a larger one

The sources: edits of training sentences, sentences written by the teacher's language model (distillation/writer.py), plain
sentences, and edits of the latter two.
"""
from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from data.edits import edit

TRIES = 1000  # sentences in a row that are not new: then the source is exhausted


class New(NamedTuple):
    """A sentence of the transfer set."""

    kind: str  # its source
    text: str
    original: str | None = None  # of an edited sentence, the one that was edited


class Edited(NamedTuple):
    """An edited sentence, empty where there is no edit, and the one that was edited."""

    text: str
    original: str


def letters_and_digits(sentence: str) -> str:
    """Returns a sentence in lower case, every other character than a letter or digit replaced by a space.

    Duplicates and development sentences are recognised by it. `data.overlap.without_punctuation` keeps signs and combining
    accents, because it counts equal rows. Here too many hits do no harm: a sentence less in the transfer set.
    """
    return " ".join("".join(c if c.isalnum() else " " for c in sentence.casefold()).split())


def longest_length(sentences: list[str]) -> int:
    """Returns the 95th percentile of the sentences' lengths in words."""
    # Not the longest one: a single long sentence would let in texts of any length.
    lengths = sorted(len(sentence.split()) for sentence in sentences)
    return lengths[len(lengths) * 95 // 100]


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


def edits_of(sentences: list[str], seed: int) -> Iterator[Edited]:
    """Yields edits of randomly chosen sentences without end, and an empty text where a sentence has no edit.

    The list may grow between two edits.
    """
    rng = random.Random(seed)
    while True:
        original = rng.choice(sentences) if sentences else ""
        # An edited sentence has single spaces. So has the other, or each further one would count as an edit.
        yield Edited(edit(original, rng) or "" if original else "", " ".join(original.split()))


def transfer_set(train: list[str], known: set[str], plain: list[str], written: Iterator[str] | None) -> Iterator[New]:
    """Yields new sentences, the kinds in turns, until every source is exhausted. No sentence comes twice.

    Args:
        train: the training sentences, for edits.
        known: keys (`letters_and_digits`) of the task's sentences; none of these is yielded.
        plain: plain sentences, see `plain_sentences`.
        written: sentences of a language model; None: the teacher is an encoder and has none.
    """
    # Seen sentences count as known: no duplicate, whatever its source.
    seen, others = set(known), list(plain)
    sources = {"edit of training": edits_of(train, 1)}
    if written is not None:
        sources["written"] = written
    if plain:
        sources["plain"] = iter(plain)
    # Edits of all but training sentences; what is written becomes a source of edits, too.
    if written is not None or plain:
        sources["edit of others"] = edits_of(others, 2)
    turns = list(sources)
    # Without plain sentences the language model has their turn.
    if written is not None and not plain:
        turns.append("written")
    while turns:
        for kind in list(turns):
            tried = (one if isinstance(one, Edited) else Edited(one, "") for one in itertools.islice(sources[kind], TRIES))
            found = next((one for one in tried if (key := letters_and_digits(one.text)) and key not in seen), None)
            # An exhausted source has no further turn; the others go on.
            if found is None:
                turns.remove(kind)
                continue
            if kind == "written":
                others.append(found.text)
            seen.add(letters_and_digits(found.text))
            yield New(kind, found.text, found.original or None)
