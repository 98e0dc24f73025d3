"""Counts the rows of one split that stand in another one too, case and punctuation aside.

    python -c "from data import overlap; print(overlap.count_repeated(['The cat sat.'], ['the cat sat']))"

CoLA's own files share 19 sentences: a score on rows that were trained on flatters.
"""
from __future__ import annotations

import unicodedata
from collections.abc import Iterable


class _Punctuation(dict):
    """A table for `str.translate` that removes punctuation; characters are looked up once."""

    def __missing__(self, code: int) -> str | None:
        # By category, not by `isalnum`: the vowel signs of Devanagari and the accents of Vietnamese are no punctuation.
        self[code] = None if unicodedata.category(chr(code)).startswith("P") else chr(code)
        return self[code]


_PUNCTUATION = _Punctuation()


def without_punctuation(text: str) -> str:
    """Returns a text in lower case, without punctuation, its words separated by single spaces.

    A text of punctuation alone keeps it: all such texts would be one text otherwise. The transfer set has a coarser key
    (`distillation.transfer_set.letters_and_digits`): there a hit costs one sentence, here it is a figure that is reported.
    """
    letters = text.casefold().translate(_PUNCTUATION)
    return " ".join((letters if letters.strip() else text).split())


def count_repeated(rows: Iterable[str], training: Iterable[str]) -> int:
    """Returns the number of rows that equal a training row, case and punctuation aside."""
    found = [without_punctuation(text) for text in rows]
    # Of the two, the training rows are many: only the keys of those that are met again are held.
    wanted = set(found)
    known = {key for key in map(without_punctuation, training) if key in wanted}
    return sum(key in known for key in found)
