"""Edits of sentences: one place, always another sentence, the same seed the same edit."""
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import edits

WORDS = st.lists(st.sampled_from("the a cat dogs has have saw Mary John to of who he walks is quickly I".split()),
                 min_size=1, max_size=9)


@given(WORDS, st.integers(0, 10 ** 6), st.sampled_from([".", "?", "!", ""]))
def test_an_edit_is_another_sentence_with_the_same_end(words, seed, end):
    sentence = " ".join(words) + end
    found = edits.edit(sentence, random.Random(seed))
    assert found == edits.edit(sentence, random.Random(seed))
    if found is not None:
        assert found.rstrip(".?!").lower() != sentence.rstrip(".?!").lower() or found != sentence
        assert found[len(found.rstrip(".?! ")):] == end and abs(len(found.split()) - len(words)) <= 1


@given(WORDS, st.integers(0, 10 ** 6))
def test_what_is_moved_is_not_lost(words, seed):
    for change in (edits.swap_neighbours, edits.move_word, edits.exchange_arguments):
        found = change(words, random.Random(seed))
        assert found is None or sorted(found) == sorted(words)


@given(WORDS, st.integers(0, 10 ** 6))
def test_what_is_exchanged_is_one_word(words, seed):
    for change in (edits.break_agreement, edits.exchange_function_word):
        found = change(words, random.Random(seed))
        assert found is None or sum(a != b for a, b in zip(words, found, strict=True)) == 1


@pytest.mark.parametrize(("kind", "before", "after"), [
    (edits.break_agreement, "Dogs has", "Dogs have"), (edits.break_agreement, "It walks", "It walk"),
    (edits.exchange_arguments, "The cat saw a dog.", "A dog saw the cat."),
    (edits.exchange_function_word, "Kim met he", "Kim met him"), (edits.double_word, "Go!", "Go Go!")])
def test_an_edit_of_each_kind(kind, before, after):
    assert edits.edit(before, random.Random(0), (kind,)) == after


def test_where_there_is_no_place_there_is_no_edit():
    assert edits.edit("...", random.Random(0)) is None
    assert edits.edit("Go.", random.Random(0), (edits.swap_neighbours, edits.drop_word)) is None


SENTENCES = st.lists(st.lists(st.sampled_from("the a cat dogs has saw Mary John to of he walks is I".split()), min_size=1,
                              max_size=25).map(" ".join), max_size=30)


@given(SENTENCES)
def test_half_of_the_task_s_sentences_are_real_and_the_others_edited(sentences):
    split = edits.real_or_edited(sentences)
    assert split == edits.real_or_edited(sentences)
    usable = {sentence for sentence in sentences if 3 <= len(sentence.split()) <= 18}
    real = {sentence for sentence, label in zip(split.sentences, split.labels, strict=True) if label}
    assert real <= usable and len(real) == split.labels.count(1) == len(usable) // 2
    assert split.labels.count(0) <= len(usable) - len(real)


def test_an_edited_sentence_is_one_that_does_not_stand_among_the_real_ones():
    split = edits.real_or_edited(f"The cat saw number {number} of all of them." for number in range(200))
    numbers = {0: set(), 1: set()}
    for sentence, label in zip(split.sentences, split.labels, strict=True):
        number = next(filter(str.isdigit, sentence.split()), "left out")
        assert (sentence == f"The cat saw number {number} of all of them.") == label
        numbers[label].add(number)
    assert len(numbers[1]) == split.labels.count(0) == 100 and not numbers[0] & numbers[1]
