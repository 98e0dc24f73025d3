"""The built-in grammar and its task: format, no leaks between files, violations that are violations."""

import csv
import random
import re

import pytest

from data import grammar

FILES = {"in_domain_train.tsv": 4000, "in_domain_dev.tsv": 500, "out_of_domain_dev.tsv": 500}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Each file's rows: (source, label, mark, sentence), all strings."""
    folder = tmp_path_factory.mktemp("task")
    grammar.write_tiny_task(folder)
    rows = {}
    for name in FILES:
        with open(folder / name, encoding="utf-8", newline="") as file:
            rows[name] = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return rows


@pytest.fixture(scope="module")
def corpus():
    return grammar.draw_corpus()


def words(sentence):
    return set(re.findall(r"\w+", sentence.lower()))


def open_words(which):
    """Every form of every word of the open classes."""
    forms = set()
    for kind, entries in grammar.lexicon(which).items():
        for entry in (entry.partition(":")[0] for entry in entries):
            if kind in ("m", "f", "n", "thing", "place"):
                singular, _, plural = entry.partition("/")
                forms |= {singular, plural or grammar.add_s(singular)}
            elif kind.startswith("name"):
                forms.add(entry.lower())
            else:
                forms |= {entry} if kind in ("old", "heavy") else set(grammar.inflect(entry))
    return forms


def test_files_have_colas_format_and_the_stated_sizes(task):
    assert {name: len(rows) for name, rows in task.items()} == FILES
    for rows in task.values():
        for source, label, mark, sentence in rows:
            assert source in {**grammar.IN_DOMAIN, **grammar.HELD_OUT}
            assert (label, mark) in {("1", ""), ("0", "*")}
            assert re.fullmatch(r"[A-Z][A-Za-z ]*[.?]", sentence) and "  " not in sentence, sentence
        assert 0.6 <= sum(row[1] == "1" for row in rows) / len(rows) <= 0.7


def test_the_task_is_the_same_bytes_each_time_and_leaves_the_callers_random_state(tmp_path):
    random.seed(1)
    state = random.getstate()
    for name in ("a", "b"):
        grammar.write_tiny_task(tmp_path / "made" / name)
    assert random.getstate() == state
    for name in FILES:
        assert (tmp_path / "made/a" / name).read_bytes() == (tmp_path / "made/b" / name).read_bytes()


def test_no_sentence_occurs_twice_in_the_task_or_in_the_corpus(task, corpus):
    sentences = [row[3] for rows in task.values() for row in rows]
    assert len(corpus) == grammar.N_CORPUS
    assert len({*sentences, *corpus}) == len(sentences) + len(corpus)


def test_every_phenomenon_has_both_labels_and_lengths_do_not_tell_them_apart(task):
    for name, sources in (("in_domain_train.tsv", grammar.IN_DOMAIN), ("in_domain_dev.tsv", grammar.IN_DOMAIN)):
        assert {(row[0], row[1]) for row in task[name]} == {(source, label) for source in sources for label in "01"}
    assert {row[0] for row in task["out_of_domain_dev.tsv"]} == {*grammar.IN_DOMAIN, *grammar.HELD_OUT}
    lengths = {label: [len(row[3].split()) for row in task["in_domain_train.tsv"] if row[1] == label] for label in "01"}
    good, bad = (sum(lengths[label]) / len(lengths[label]) for label in "10")
    assert abs(good - bad) < 0.5


def test_held_out_words_are_in_the_corpus_and_out_of_domain_only(task, corpus):
    held_out = open_words("held-out") - open_words("train")
    assert len(held_out) > 100
    in_domain = words(" ".join(row[3] for name in ("in_domain_train.tsv", "in_domain_dev.tsv") for row in task[name]))
    assert not held_out & in_domain
    assert len(held_out & words(" ".join(row[3] for row in task["out_of_domain_dev.tsv"]))) > 60
    assert len(held_out & words(" ".join(corpus))) > 0.9 * len(held_out)
    sources = {row[0] for name in ("in_domain_train.tsv", "in_domain_dev.tsv") for row in task[name]}
    assert not sources & set(grammar.HELD_OUT)


@pytest.mark.parametrize("phenomenon", [*grammar.IN_DOMAIN, *grammar.HELD_OUT])
def test_a_violation_is_never_an_acceptable_sentence(phenomenon, corpus):
    rng, entries = random.Random(5), grammar.lexicon("all")
    pairs = [grammar.pair(phenomenon, rng, entries) for _ in range(300)]
    acceptable = {*corpus, *(good for good, _ in pairs)}
    assert all(good != bad for good, bad in pairs)
    assert not acceptable & {bad for _, bad in pairs}


@pytest.mark.parametrize(("entry", "forms"), [
    ("arrive", "arrive arrives arrived arrived arriving"),
    ("deny", "deny denies denied denied denying"),
    ("smash", "smash smashes smashed smashed smashing"),
    ("destroy", "destroy destroys destroyed destroyed destroying"),
    ("show/showed/shown", "show shows showed shown showing"),
    ("die/died/died/dying", "die dies died died dying"),
])
def test_inflection(entry, forms):
    assert list(grammar.inflect(entry)) == forms.split()


def test_finish_writes_an_before_a_vowel_only():
    assert grammar.finish("a uncle thanked a artist and a nurse.") == "An uncle thanked an artist and a nurse."


def test_single_words_do_not_give_the_label_away(task):
    """A naive Bayes classifier over single words, written out, stays near chance in MCC."""
    from collections import Counter
    from math import log, sqrt

    counts, labels = {"0": Counter(), "1": Counter()}, Counter()
    for _, label, _, sentence in task["in_domain_train.tsv"]:
        labels[label] += 1
        counts[label].update(words(sentence))
    table = Counter()
    for _, label, _, sentence in task["in_domain_dev.tsv"]:
        score = {
            guess: log(labels[guess]) + sum(log((counts[guess][w] + 1) / (labels[guess] + 2)) for w in words(sentence))
            for guess in "01"
        }
        table[label, max(score, key=score.get)] += 1
    tp, tn, fp, fn = (table[key] for key in (("1", "1"), ("0", "0"), ("0", "1"), ("1", "0")))
    assert (tp * tn - fp * fn) / sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) < 0.4
