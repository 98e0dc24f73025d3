"""Edits a sentence in one place, which breaks its grammar or keeps it; the label comes from elsewhere.

    python -m data.edits        prints an edit of each kind
"""
from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable
from pathlib import Path

from data.arrow import Column
from data.lines import read_sentences
from data.splits import Split
from machine.errors import UserError

Words = list[str]
Edit = Callable[[Words, random.Random], Words | None]  # None: there is no place for it

AGREEMENT = {one: other for pair in ("is are", "was were", "has have", "does do", "isn't aren't", "wasn't weren't",
                                     "hasn't haven't", "doesn't don't") for one, other in (pair.split(), pair.split()[::-1])}
PREPOSITIONS = ("to", "for", "of", "in", "on", "at", "by", "with", "from", "about")
DETERMINERS = ("a", "an", "the", "this", "these", "that", "those", "some", "any", "every", "many", "much", "no")
PRONOUNS = {"he": "him", "him": "he", "she": "her", "her": "she", "they": "them", "them": "they", "i": "me", "me": "I",
            "we": "us", "us": "we", "himself": "themselves", "herself": "himself", "themselves": "itself",
            "itself": "themselves", "who": "which", "which": "who"}
FUNCTION_WORDS = {*DETERMINERS, *PREPOSITIONS, *PRONOUNS, *AGREEMENT, "it", "you", "there", "what", "how", "why", "when",
                  "not", "and", "or", "but", "if", "that", "as", "so"} - {"i"}
NUMBERS = {"NOUN": (("NN", "NNS"),), "VERB": (("VB", "VBZ"), ("VBP", "VBZ"))}  # Penn's tags of forms that differ in number
PAST_AND_ING = ("VBD", "VBN", "VBG")
ENDS = ".?!"
WORDS = range(3, 19)  # in a sentence of `real_or_edited`: about as many as in a linguist's example


def swap_neighbours(words: Words, rng: random.Random) -> Words | None:
    if len(words) < 2:
        return None
    at = rng.randrange(len(words) - 1)
    return [*words[:at], words[at + 1], words[at], *words[at + 2:]]


def drop_word(words: Words, rng: random.Random) -> Words | None:
    if len(words) < 3:
        return None
    at = rng.randrange(len(words))
    return words[:at] + words[at + 1:]


def double_word(words: Words, rng: random.Random) -> Words:
    at = rng.randrange(len(words))
    return words[:at + 1] + words[at:]


def move_word(words: Words, rng: random.Random) -> Words | None:
    if len(words) < 3:
        return None
    left = list(words)
    word = left.pop(rng.randrange(len(left)))
    left.insert(rng.randrange(len(left) + 1), word)
    return left


def break_agreement(words: Words, rng: random.Random) -> Words | None:
    """Exchanges is/are, was/were, has/have ..., or a noun or verb for its form in the other number (`other_number`)."""
    return _exchange(words, rng, lambda word: _other_form(word, other_number))


def break_agreement_by_suffix(words: Words, rng: random.Random) -> Words | None:
    """Exchanges as `break_agreement` does, without a dictionary (`other_suffix`)."""
    return _exchange(words, rng, lambda word: _other_form(word, other_suffix))


def _other_form(word: str, other: Callable[[str], str | None]) -> str | None:
    if word.lower() in AGREEMENT:
        return AGREEMENT[word.lower()]
    return other(word) if word.isalpha() and word.islower() and word not in FUNCTION_WORDS else None


def other_suffix(word: str) -> str | None:
    """Adds or removes the -s of a noun or verb: the rule of early runs, which makes non-words too (childs)."""
    if len(word) < 3 or word.endswith("ss"):
        return None
    return word[:-1] if word.endswith("s") else word + ("es" if word.endswith(("x", "ch", "sh")) else "s")


@functools.cache
def other_number(word: str) -> str | None:
    """Returns a noun's plural or singular, or a verb's present tense in the other number, from lemminflect's dictionary.

    Returns:
        None for a word that is not in the dictionary, that has no other form, or that may be something else than a noun or a
        verb in the present tense: "question" and "questions" are each other's form, "questioned" and "should" have none.
    """
    # Late: the dictionary takes a third of a second to load, and most commands edit nothing.
    from lemminflect import getAllInflections, getAllLemmas

    readings = getAllLemmas(word)
    # An adjective, adverb or auxiliary that is also a noun ("well", "will") rarely stands for the noun.
    if not readings.keys() <= NUMBERS.keys():
        return None
    # Inflected forms first: "comes" is a form of "come" rather than the singular of "comites".
    pairs = sorted((lemma == word, kind, lemma) for kind, lemmas in readings.items() for lemma in lemmas)
    found = []
    for base, kind, lemma in pairs:
        forms = getAllInflections(lemma, kind)
        # "saw" is the past of "see" rather than a tool; but the past "put" looks like the present.
        if not base and any(word in forms.get(tag, ()) for tag in PAST_AND_ING):
            return None
        for one, other in NUMBERS[kind]:
            for here, there in ((one, other), (other, one)):
                if word in forms.get(here, ()):
                    found += [form for form in forms.get(there, ()) if form != word]
    return found[0] if found else None


def exchange_function_word(words: Words, rng: random.Random) -> Words | None:
    """Puts another preposition or determiner, or a pronoun's other form, in a word's place."""
    def other(word: str) -> str | None:
        for group in (PREPOSITIONS, DETERMINERS):
            if word.lower() in group:
                return rng.choice([one for one in group if one != word.lower()])
        return PRONOUNS.get(word.lower())
    return _exchange(words, rng, other)


def exchange_arguments(words: Words, rng: random.Random) -> Words | None:
    """Exchanges two noun phrases: a determiner with the word after it, or a name."""
    spans = []
    # Spans of noun phrases, as far as they can be told without a parser.
    for at, word in enumerate(words):
        if word.lower() in DETERMINERS and at + 1 < len(words) and words[at + 1].lower() not in FUNCTION_WORDS:
            spans.append((at, at + 2))
        elif word.istitle() and word.isalpha() and at and word.lower() not in FUNCTION_WORDS:
            spans.append((at, at + 1))
    pairs = [(one, other) for one in spans for other in spans if one[1] <= other[0]]
    if not pairs:
        return None
    (a, b), (c, d) = rng.choice(pairs)
    return words[:a] + words[c:d] + words[b:c] + words[a:b] + words[d:]


EDITS: tuple[Edit, ...] = (swap_neighbours, drop_word, double_word, move_word, break_agreement, exchange_function_word,
                           exchange_arguments)
# By --agreement.
EDITS_BY = {"dictionary": EDITS,
            "suffix": tuple(break_agreement_by_suffix if one is break_agreement else one for one in EDITS)}


def _exchange(words: Words, rng: random.Random, other: Callable[[str], str | None]) -> Words | None:
    """Replaces one random word among those for which `other` returns one."""
    # Choices first, then one random number: a sentence without a place for the edit uses up none.
    found = [(at, new) for at, word in enumerate(words) if (new := other(word))]
    if not found:
        return None
    at, new = rng.choice(found)
    return [*words[:at], new, *words[at + 1:]]


def edit(sentence: str, rng: random.Random, edits: tuple[Edit, ...] = EDITS) -> str | None:
    """Edits a sentence once, in a random way among those that find a place for it.

    The mark at its end stays there, and its first letter keeps its case.

    Returns:
        The edited sentence, or None where every edit leaves it as it was.
    """
    body = sentence.rstrip(ENDS + " ")
    end, words = sentence[len(body):], body.split()
    if not words:
        return None
    # In random order, until one of them finds a place.
    for change in rng.sample(edits, len(edits)):
        # A function word that began the sentence is written small once it stands inside.
        small = [words[0].lower() if words[0].lower() in FUNCTION_WORDS else words[0], *words[1:]]
        changed = change(small, rng)
        if changed and changed != small:
            text = " ".join(changed) + end
            return text[0].upper() + text[1:] if words[0][0].isupper() else text
    return None


def real_or_edited(sentences: Iterable[str], edits: tuple[Edit, ...] = EDITS) -> Split:
    """Makes a task of plain sentences, with labels that cost nothing: half as they are (label 1), half edited (label 0).

    The same sentences make the same task, whatever the seed of a run. Sentences of other lengths than WORDS, second copies,
    and those that no edit changes are left out.
    """
    # Not the run's seed: an intermediate task is one task for all runs.
    rng = random.Random(0)
    rows = [sentence for sentence in dict.fromkeys(sentences) if len(sentence.split()) in WORDS]
    rng.shuffle(rows)
    labels = [row % 2 for row in range(len(rows))]
    texts = [sentence if label else edit(sentence, rng, edits) for sentence, label in zip(rows, labels, strict=True)]
    kept = [(text, label) for text, label in zip(texts, labels, strict=True) if text]
    return Split(Column.of(text for text, _ in kept), Column.of(label for _, label in kept))


def read_real_or_edited(data: Path, agreement: str = "dictionary") -> tuple[Split, dict[str, str]]:
    """Makes the task of a text file, or of all text files of a folder.

    Args:
        agreement: a key of `EDITS_BY`.

    Returns:
        The task's rows, and the SHA-256 of each file by name.

    Raises:
        UserError: no such file, or none with a sentence of WORDS.
    """
    files = sorted(data.glob("*.txt")) if data.is_dir() else [data]
    if not files:
        raise UserError(f"--data {data}: no .txt file in it; --task edits reads text files, one sentence a line")
    sentences, digests = [], {}
    for file in files:
        found, digests[str(file)] = read_sentences(file)
        sentences += found
    split = real_or_edited(sentences, EDITS_BY[agreement])
    if not split.labels:
        raise UserError(f"{data}: no sentence of {WORDS[0]} to {WORDS[-1]} words in it")
    return split, digests


if __name__ == "__main__":
    for kind in EDITS:
        print(kind.__name__, edit("The teacher has given a book to Mary.", random.Random(), (kind,)), sep="\n    ")
