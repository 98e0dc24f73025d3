"""Minimal pairs of the built-in grammar and of a file, and published figures."""
import random

import pytest

from data import grammar, pairs
from machine.errors import UserError


def test_built_in_pairs_are_fixed_differ_and_stand_nowhere_else():
    found = pairs.built_in(20)
    assert found[0] == pairs.Pair("agreement", "agreement",
                                  "My bankers near the judge are famous.",
                                  "My bankers near the judge is famous.")
    assert {pair.phenomenon for pair in found} == {*grammar.IN_DOMAIN, *grammar.HELD_OUT} and len(found) == 14 * 20
    sentences = [text for pair in found for text in (pair.good, pair.bad)]
    assert len(set(sentences)) == len(sentences)
    task = grammar.draw_task(random.Random(grammar.SEED), set())
    assert not {row[2] for rows in task.values() for row in rows} & set(sentences)
    assert not set(grammar.draw_corpus()) & set(sentences)


def test_a_limit_is_of_each_paradigm(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("bad\tgood\tparadigm\tphenomenon\tnote\n" + "".join(f"b{i}\tg \"{i}\tq{i % 2}\tp\t\n" for i in range(9)))
    assert [pair.bad for pair in pairs.read_pairs(path, 2)] == ["b0", "b1", "b2", "b3"]
    assert pairs.read_pairs(path)[8] == pairs.Pair("p", "q0", 'g "8', "b8")


@pytest.mark.parametrize("content, said", [
    (b"paradigm\tlstm\nq\t1.5\n", "line 2: lstm is '1.5'; expected an accuracy from 0 to 1"),
    (b"paradigm\tlstm\nq\tnan\n", "line 2: lstm is 'nan'"), (b"paradigm\n\xff\n", "not UTF-8"),
    (b"", "the file is empty"), (b"lstm\n0.5\n", "no column paradigm")])
def test_bad_published_figures_are_one_line(tmp_path, content, said):
    (tmp_path / "published.tsv").write_bytes(content)
    with pytest.raises(UserError, match="published.tsv") as error:
        pairs.read_published(tmp_path / "published.tsv")
    assert said in str(error.value)
