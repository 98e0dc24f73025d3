"""The marks of edited tokens: what has no mark was there before, in the same order."""
import random
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.edits import EDITS, edit
from distillation.edited import mark_edits, touched
from distillation.transfer_set import edits_of, transfer_set

IDS = st.lists(st.integers(0, 5), min_size=1, max_size=12)


def is_part(one: list[int], whole: list[int]) -> bool:
    """Whether all of `one` stand in `whole`, in that order."""
    left = iter(whole)
    return all(token in left for token in one)


@given(IDS, IDS)
def test_tokens_without_a_mark_were_there_before_in_that_order(original, edited):
    marks = touched(original, edited)
    assert (marks == []) == (original == edited) and set(marks) <= set(range(len(edited)))
    assert is_part([token for at, token in enumerate(edited) if at not in marks], original)


@pytest.mark.parametrize(("edited", "marks"), [
    ([1, 2, 3, 4, 5], []), ([1, 2, 9, 4, 5], [2]), ([1, 2, 2, 3, 4, 5], [2]), ([1, 2, 4, 5], [2]), ([1, 2, 3, 4], [3]),
    ([2, 3, 4, 5], [0]), ([1, 2, 3, 4, 5, 9], [5]), ([9, 8, 2, 3, 4, 5], [0, 1])])
def test_new_tokens_and_the_one_after_a_gap_are_marked(edited, marks):
    assert touched([1, 2, 3, 4, 5], edited) == marks


def test_moved_words_are_marked_and_the_others_are_not():
    # Two neighbours changed places: one of them is in order, the other is new there, and the one after its gap is marked.
    assert touched([1, 2, 3, 4], [1, 3, 2, 4]) in ([1, 3], [2, 3], [1, 2])
    assert len(touched([1, 2, 3, 4, 5, 6, 7, 8], [1, 8, 2, 3, 4, 5, 6, 7])) <= 2


@pytest.mark.parametrize("kind", EDITS, ids=lambda one: one.__name__)
def test_each_edit_touches_a_few_words(kind):
    sentence = "Yesterday the old teacher has given a very good book to Mary in the garden"
    numbers: dict[str, int] = {}
    for seed in range(30):
        if changed := edit(sentence, random.Random(seed), (kind,)):
            one, other = ([numbers.setdefault(word, len(numbers)) for word in text.split()] for text in (sentence, changed))
            assert 1 <= len(touched(one, other)) <= 9 and len(touched(one, other)) < len(other)


def test_rows_have_their_own_marks_and_sentences_that_were_not_edited_none():
    ids = [[1, 2, 3], [7], [1, 3], [4, 5, 6, 6]]
    marks = mark_edits(ids, {2: [1, 2, 3], 3: [4, 5, 6]})
    assert marks.of(torch.tensor([3, 0, 2, 1])).tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 1, 0]
    assert marks.of(torch.arange(4)).tolist() == list(chain([0, 0, 0], [0], [0, 1], [0, 0, 0, 1]))


def test_the_transfer_set_knows_what_was_edited():
    train = [f"the old cat saw a red dog number {number}" for number in range(5)]
    plain = [f"A bird fed the dogs of house {number}" for number in range(9)]
    new = [one for _, one in zip(range(40), transfer_set(train, set(), plain, None), strict=False)]
    sources = {"edit of training": set(train), "edit of others": set(plain)}
    assert {one.kind for one in new} == {*sources, "plain"}
    for one in new:
        assert one.original in sources.get(one.kind, {None}) and one.original != one.text
    # The same edits as those of a stream of their own.
    assert (new[0].text, new[0].original) == next(edits_of(train, 1))
    assert np.mean([one.original is not None for one in new]) > 0.5
