"""Counts the rows of one split that stand in another one too, case and punctuation aside.

    python -c "from data import overlap; print(overlap.count_repeated(['The cat sat.'], ['the cat sat']))"

CoLA's own files share 19 sentences: a score on rows that were trained on flatters.
"""
from __future__ import annotations

import unicodedata
from collections.abc import Iterable


def normalised(text: str) -> str:
    """Returns a text in lower case, without punctuation, its words separated by single spaces.

    A text of punctuation alone keeps it: all such texts would be one text otherwise.
    """
    # By category, not by `isalnum`: the vowel signs of Devanagari and the accents of Vietnamese are no punctuation.
    letters = "".join(c for c in text.casefold() if not unicodedata.category(c).startswith("P"))
    return " ".join((letters if letters.strip() else text).split())


def count_repeated(rows: Iterable[str], training: Iterable[str]) -> int:
    """Returns the number of rows whose normalised text is one of the training rows' too."""
    known = {normalised(text) for text in training}
    return sum(normalised(text) in known for text in rows)
