"""The transfer set: sentences without gold labels, from several sources that take turns. Pure iterators, no files.

    kinds = transfer_set(train, known, plain, written)
    list(itertools.islice(kinds, 40_000))    # the first 40,000; a smaller set is the beginning of a larger one

The sources: edits of training sentences, sentences written by the teacher's language model (writer.py), plain sentences,
and edits of the latter two.
"""
from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import NamedTuple

from data.edits import EDITS, Edit, edit

TRIES = 1000  # sentences in a row that are not new: then the source is exhausted


class New(NamedTuple):
    """A sentence of the transfer set."""

    kind: str  # its source
    text: str
    original: str | None = None  # of an edited sentence, the one that was edited


def letters_and_digits(sentence: str) -> str:
    """Returns a sentence in lower case, every other character than a letter or digit replaced by a space.

    Duplicates and development sentences are recognised by it. Too many hits do no harm: a sentence less in the set.
    """
    return " ".join("".join(c if c.isalnum() else " " for c in sentence.casefold()).split())


def edits_of(sentences: list[str], seed: int, edits: tuple[Edit, ...] = EDITS) -> Iterator[tuple[str, str]]:
    """Yields edits of randomly chosen sentences without end, each with its original; empty where a sentence has no edit.

    The list may grow between two edits.
    """
    rng = random.Random(seed)
    while True:
        original = rng.choice(sentences) if sentences else ""
        # An edited sentence has single spaces. So has the other, or each further one would count as an edit.
        yield edit(original, rng, edits) or "" if original else "", " ".join(original.split())


def transfer_set(train: list[str], known: set[str], plain: list[str], written: Iterator[str] | None,
                 edits: tuple[Edit, ...] = EDITS) -> Iterator[New]:
    """Yields new sentences, the kinds in turns, until every source is exhausted. No sentence comes twice.

    Args:
        train: the training sentences, for edits.
        known: keys (`letters_and_digits`) of the task's sentences; none of these is yielded.
        plain: plain sentences, see `sources.plain_sentences`.
        written: sentences of a language model; None: the teacher is an encoder and has none.
        edits: the kinds of edits.
    """
    # Seen sentences count as known: no duplicate, whatever its source.
    seen, others = set(known), list(plain)
    sources = {"edit of training": edits_of(train, 1, edits)}
    if written is not None:
        sources["written"] = ((text, None) for text in written)
    if plain:
        sources["plain"] = ((text, None) for text in plain)
    # Edits of all but training sentences; what is written becomes a source of edits, too.
    if written is not None or plain:
        sources["edit of others"] = edits_of(others, 2, edits)
    turns = list(sources)
    # Without plain sentences the language model has their turn.
    if written is not None and not plain:
        turns.append("written")
    while turns:
        for kind in list(turns):
            tried = itertools.islice(sources[kind], TRIES)
            found = next((one for one in tried if (key := letters_and_digits(one[0])) and key not in seen), None)
            # An exhausted source has no further turn; the others go on.
            if found is None:
                turns.remove(kind)
                continue
            text, original = found
            if kind == "written":
                others.append(text)
            seen.add(letters_and_digits(text))
            yield New(kind, text, original)
