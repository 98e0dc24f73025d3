"""Soft labels of a file: every line is checked, and each teacher and each file counts alike in the mean."""
import json

import numpy as np
import pytest
import torch
from conftest import one_line
from hypothesis import given
from hypothesis import strategies as st

from distillation.soft_labels import FLOOR, SoftLabels, check_labels, read_labels, with_labels
from machine.errors import UserError
from metrics.problems import PROBLEMS

CLASSES = ("no", "yes")


def written(folder, *lines) -> str:
    path = folder / "labels.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def test_probabilities_and_logits_by_name_and_in_order_are_the_same_labels(tmp_path):
    by_name = {"yes": 0.9, "no": 0.1}
    path = written(tmp_path, {"text": " The  cat sat.", "probabilities": by_name, "label": "yes", "probability": 0.9},
                   {"text": "b", "probabilities": [0.1, 0.9]}, {"text": "c", "logits": {"yes": 2, "no": -1.5}},
                   {"text": "d", "logits": [-1.5, 2]}, {"text": "e", "probabilities": [0, 1]}, "",
                   {"text": "The cat sat.", "probabilities": by_name})
    found, digest = read_labels(path, CLASSES)
    assert len(digest) == 64 and list(found.rows) == ["The cat sat.", "b", "c", "d", "e"]
    np.testing.assert_allclose(found.logits.double().softmax(-1)[:2], [[0.1, 0.9]] * 2, rtol=1e-6)
    np.testing.assert_allclose(found.logits[:2].sum(-1), 0, atol=1e-6)
    assert found.logits[2:4].tolist() == [[-1.5, 2.0]] * 2
    assert float(found.logits[4, 1] - found.logits[4, 0]) == pytest.approx(-np.log(FLOOR), rel=1e-6)


@pytest.mark.parametrize(("line", "said"), [
    ("[1]", "not a JSON object"), ("{", "not a JSON object"), ({"error": "too long", "line": 3}, "text is missing"),
    ({"text": " ", "logits": [1, 2]}, "text is missing, empty"), ({"text": "x"}, 'expected "probabilities" or "logits"'),
    ({"text": "x", "logits": [1]}, "expected 2 numbers, one for each of no, yes"),
    ({"text": "x", "logits": "1"}, "2 numbers"),
    ({"text": "x", "logits": [1, True]}, "2 numbers"), ('{"text": "x", "logits": [1, NaN]}', "2 numbers"),
    ('{"text": "x", "logits": [1, 1e999]}', "2 numbers"),
    ({"text": "x", "logits": {"no": 1, "maybe": 2}}, "of the classes no, maybe; expected no, yes"),
    ({"text": "x", "probabilities": [0.5, 0.6]}, "a sum of 1.1; expected"),
    ({"text": "x", "probabilities": [-0.5, 1.5]}, "at least 0"),
    ({"text": "good", "logits": [3, 4]}, "another label for the text of line 1")])
def test_a_wrong_line_is_named(tmp_path, line, said):
    path = written(tmp_path, {"text": "good", "logits": [1, 2]}, line)
    with pytest.raises(UserError) as error:
        read_labels(path, CLASSES)
    assert one_line(error).startswith(f"--labels {path}, line 2: ") and said in one_line(error)


def test_labels_of_other_problems(tmp_path):
    path = written(tmp_path, {"text": "a", "probabilities": {"yes": 0.9, "no": 0.9}}, {"text": "b", "probabilities": [0, 1]},
                   {"text": "c", "logits": [3, 4]})
    found = read_labels(path, CLASSES, PROBLEMS["multi-label"])[0].logits.double()
    np.testing.assert_allclose(found.sigmoid(), [[0.9, 0.9], [FLOOR, 1 - FLOOR], 1 / (1 + np.exp([-3.0, -4.0]))], rtol=1e-5)
    path = written(tmp_path, {"text": "A  cat.\tA dog.", "score": 2.5}, {"text": "A cat. [SEP] A bird.", "score": -1})
    found, _ = read_labels(path, ("score",), PROBLEMS["regression"], "[SEP]")
    assert found.logits.tolist() == [[2.5], [-1.0]]
    places, logits = found.of(["A cat. [SEP] A bird.", "A cat. A dog.", "A cat. [SEP] A dog."])
    assert places.tolist() == [0, 2] and logits.tolist() == [[-1.0], [2.5]]


@pytest.mark.parametrize(("problem", "line", "said"), [
    ("multi-label", {"text": "x", "probabilities": [0.5, 1.5]}, "expected numbers from 0 to 1"),
    ("multi-label", {"text": "x", "probabilities": [0.5]}, "expected 2 numbers"),
    ("regression", {"text": "x", "probabilities": [1]}, 'expected "score" or "logits"'),
    ("regression", {"text": "x", "score": "high"}, "score: expected a number"),
    ("regression", {"text": "x", "score": True}, "score: expected a number")])
def test_a_wrong_line_of_other_problems_is_named(tmp_path, problem, line, said):
    path = written(tmp_path, line)
    with pytest.raises(UserError) as error:
        read_labels(path, CLASSES[:1 if problem == "regression" else 2], PROBLEMS[problem])
    assert one_line(error).startswith(f"--labels {path}, line 1: ") and said in one_line(error)


@pytest.mark.parametrize("content", [None, "", "\n\n"])
def test_a_file_without_a_line_is_one_line(tmp_path, content):
    path = tmp_path / "labels.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as error:
        read_labels(str(path), CLASSES)
    assert str(path) in one_line(error)


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=9), st.lists(st.sets(st.sampled_from("abcdef"), min_size=1),
                                                                             max_size=3), st.integers(1, 3), st.booleans())
def test_the_mean_is_over_all_that_label_a_sentence(sentences, known, teachers, alone):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(teachers, len(sentences), 2))
    files = []
    for texts in known:
        rows = {text: row for row, text in enumerate(sorted(texts))}
        files.append(SoftLabels("x", rows, torch.tensor(rng.normal(size=(len(texts), 2)), dtype=torch.float32)))
    found = with_labels(torch.tensor(logits.mean(0)).float(), teachers, files, sentences, alone)
    for at, text in enumerate(sentences):
        own = [file.logits[file.rows[text]].double().numpy() for file in files if text in file.rows]
        parts = own if alone and own else [*logits[:, at], *own]
        np.testing.assert_allclose(found[at], np.mean(parts, axis=0), rtol=1e-4, atol=1e-5)


def test_missing_sentences_are_counted_and_a_file_of_other_sentences_is_refused():
    file = SoftLabels("labels.jsonl", {"a b": 0}, torch.zeros(1, 2))
    with pytest.warns(UserWarning, match="labels.jsonl: 1 of 2 sentences .* the labels of the other files and teachers"):
        check_labels([file], ["a  b", "c"])
    with pytest.raises(UserError, match="labels none of the 1 sentences"):
        check_labels([file], ["c"])
