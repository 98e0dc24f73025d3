"""Rows that stand in two splits are found whatever their case and punctuation, and no others."""
import pytest

from data.overlap import count_repeated, without_punctuation


@pytest.mark.parametrize("one, other", [
    ("The cat sat.", "the cat sat"), ("“John's” dog!", "johns DOG"), ("a  b\tc", "A, b; c?"), ("STRASSE", "straße"),
    ("Über-groß", "übergross"), ("...", "..."), ("I don’t", "i don't"), ("x .", "x")])
def test_case_and_punctuation_make_no_other_text(one, other):
    assert without_punctuation(one) == without_punctuation(other) != ""


@pytest.mark.parametrize("one, other", [
    ("the cat sat", "the cats at"), ("...", "!!!"), ("किताब", "कतब"), ("resume", "résumé"), ("5 $", "5 €"), ("", ".")])
def test_other_letters_signs_and_words_do(one, other):
    assert without_punctuation(one) != without_punctuation(other)


def test_every_row_counts_and_the_training_rows_only_once():
    assert count_repeated(["A.", "a", "b", "c"], ["a", "a!", "C"]) == 3
    assert count_repeated([], ["a"]) == count_repeated(["a"], []) == 0
