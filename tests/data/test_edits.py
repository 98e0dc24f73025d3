"""Edits of sentences: one place, always another sentence, the same seed the same edit, and no word that is none."""
import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import lemminflect
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import edits, grammar

WORDS = st.lists(st.sampled_from("the a cat dogs has have saw Mary John to of who he walks is quickly I".split()),
                 min_size=1, max_size=9)
ROOT = Path(__file__).parents[2]
COLA = Path(os.environ.get("LORA_DISTIL_DATA") or ROOT.parent / "shared" / "data") / "cola"
# Words of each kind that the old rule, which added or removed an s, made into none.
HARD = ("questioned should study cities irregularities dry children mice feet knife taller together been through quickly "
        "very into than saw left given putting watch passes goes police data sheep clothes money comes lives news")


def forms_of(word: str) -> set[str]:
    """Returns all forms of a word's lemmas as nouns and verbs."""
    return {form for kind in ("NOUN", "VERB") for lemma in lemminflect.getAllLemmas(word, kind).get(kind, ())
            for forms in lemminflect.getAllInflections(lemma, kind).values() for form in forms}


def real_sentences() -> list[str]:
    """Returns CoLA's training sentences; where they are absent, hard words in one sentence each."""
    if not COLA.is_dir():
        return [f"The {word} of dogs walk." for word in HARD.split()]
    return [line.split("\t")[3] for line in (COLA / "in_domain_train.tsv").read_text().splitlines()]


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


def test_early_runs_have_their_edits_still():
    """The digest is that of the rules' first version."""
    rng = random.Random(1)
    found = [edits.edit(text, rng, edits.EDITS_BY["suffix"]) or "" for text in grammar.draw_corpus()[:300]]
    digest = hashlib.sha256("\n".join(found).encode()).hexdigest()
    assert digest == "26bbc1752b91db928ed70d0565bd698af2a199aa740910b7f309d3f7479d2a68"


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


def test_a_broken_agreement_in_real_sentences_has_a_real_form_of_the_same_word():
    made = 0
    for seed, sentence in enumerate(real_sentences()):
        words = sentence.rstrip(".?! ").split()
        changed = edits.break_agreement(words, random.Random(seed))
        if changed is None:
            continue
        (before, after), = [(a, b) for a, b in zip(words, changed, strict=True) if a != b]
        made += 1
        if before.lower() not in edits.AGREEMENT:
            assert after in forms_of(before) and set(lemminflect.getAllLemmas(after)) & {"NOUN", "VERB"}, (before, after)
    assert made > 0.8 * len(real_sentences())


@given(st.sampled_from(HARD.split()) | st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=8) | st.text(max_size=8))
def test_no_form_is_made_up(word):
    found = edits.other_number(word)
    assert found is None or found != word and found in forms_of(word)


@pytest.mark.parametrize(("word", "other"), [
    ("question", "questions"), ("questions", "question"), ("studies", "study"), ("study", "studies"), ("child", "children"),
    ("mice", "mouse"), ("knife", "knives"), ("watches", "watch"), ("go", "goes"), ("comes", "come"), ("put", "puts"),
    *[(word, None) for word in "questioned should will well taller quickly saw given sheep walking been zzz".split()]])
def test_the_other_number_of_a_word(word, other):
    assert edits.other_number(word) == other


def test_the_dictionary_is_loaded_with_the_first_edit():
    code = ("import sys, random; from data import edits; assert 'lemminflect' not in sys.modules; "
            "print(edits.edit('He walks', random.Random(0), (edits.break_agreement,)))")
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert found.stdout == "He walk\n", found.stderr
