"""Labels of other problems: lists, several columns, numbers; which problem a table is; strata and folds."""
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import one_line as text_of
from hypothesis import given
from hypothesis import strategies as st

from data.columns import label_sets_of, problem_in, scores_of
from data.splits import Split, fold_of, read_split, set_aside, strata
from data.tables import Table
from data.tasks import Task
from machine.errors import UserError
from options.schema import TableOptions


def table(names=None, **columns) -> Table:
    return Table(Path("t.csv"), {"text": ["x"] * len(next(iter(columns.values()))), **columns}, names or {})


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    return text_of(error)


@pytest.mark.parametrize("values, expected", [
    (["a", "b"], "single-label"), (["0", "1"], "single-label"), ([0, 1], "single-label"), (["1.0", "2.0"], "single-label"),
    ([1.0, None, 2.0], "single-label"), (["5.000", "3.800"], "regression"), ([5, 3.8], "regression"),
    (["1e-3", "2"], "regression"), (["0.5", "a"], "single-label"), ([0.5, float("nan")], "single-label"),
    ([["a"], []], "multi-label"), ([True, False], "single-label")])
def test_the_problem_is_guessed_from_the_labels(values, expected):
    assert problem_in(table(label=values), "label") == expected


def test_several_columns_are_several_labels():
    found = table(a=["0", "1", "1"], b=[True, False, True])
    assert problem_in(found, "a,b") == "multi-label"
    assert label_sets_of(found, "a, b") == [["b"], ["a"], ["a", "b"]]
    split, classes = read_split(found, TableOptions(label_column="b,a", problem="multi-label"), " ")
    assert classes == ["b", "a"] and split.labels == [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]
    assert "row 2: the label (a) '2'; expected 0 or 1" in refusal(label_sets_of, table(a=["0", "2"], b=["1", "1"]), "a,b")


def test_lists_are_labels_by_name_and_development_rows_have_those_of_training():
    options = TableOptions(problem="multi-label")
    split, classes = read_split(table(label=[["b", "a", "b"], [], ["c"]]), options, " ")
    assert classes == ["a", "b", "c"] and split.labels == [(1.0, 1.0, 0.0), (0.0, 0.0, 0.0), (0.0, 0.0, 1.0)]
    assert "row 1: label 'd', which the training data lacks" in refusal(
        read_split, table(label=[["d"]]), options, " ", classes)
    numbered = table({"label": ["joy", "love"]}, label=[[1], [0, 1]])
    assert read_split(numbered, options, " ")[1] == ["joy", "love"]
    assert "class love has no example" in refusal(read_split, table({"label": ["joy", "love", "fear"]}, label=[[0], [2]]),
                                                  options, " ")


@pytest.mark.parametrize("value, said", [
    ("a", "the label (label) is of type str; expected a list of names"), (None, "the label (label) is missing"),
    ([["a"]], "the label (label) is a list"), ([None], "has a name that is missing")])
def test_a_cell_that_is_no_list_of_names_is_named(value, said):
    assert said in refusal(label_sets_of, table(label=[["a"], value]), "label").removeprefix("t.csv, row 2: ")


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_numbers_are_read_as_they_are_written(values):
    assert scores_of(table(label=[str(value) for value in values]), "label") == values


@pytest.mark.parametrize("value, said", [("", "is missing"), ("high", "'high'"), (True, "is a boolean"), ("inf", "'inf'"),
                                         (None, "is missing"), ([1.0], "a list")])
def test_a_cell_that_is_no_number_is_named(value, said):
    found = refusal(scores_of, table(label=[1.5, value]), "label")
    assert found.startswith("t.csv, row 2: the label (label) ") and said in found and "expected a finite number" in found


def test_strata_are_classes_the_rarest_label_and_tenths():
    assert strata([2, 0, 1]) == [2, 0, 1]
    assert strata([(1.0, 0.0), (1.0, 1.0), (0.0, 0.0), (1.0, 0.0)]) == [0, 1, -1, 0]
    assert Counter(strata([float(i) for i in range(100)])) == Counter({tenth: 10 for tenth in range(10)})
    assert strata([3.0, 1.0]) == [0, 0]


@pytest.mark.parametrize("labels", [[row % 3 for row in range(30)], [float(row) for row in range(30)],
                                    [(float(row % 2), float(row % 3 == 0)) for row in range(30)]])
def test_folds_part_the_rows_with_all_groups_in_the_same_shares(labels):
    split = Split([str(row) for row in range(30)], labels)
    held_out = []
    for number in range(1, 4):
        train, fold = fold_of(split, number, 3, seed=5)
        assert sorted(train.sentences + fold.sentences) == sorted(split.sentences) and len(fold) == 10
        groups = Counter(strata(labels)[int(text)] for text in fold.sentences)
        assert all(abs(count - Counter(strata(labels))[group] / 3) < 1.01 for group, count in groups.items())
        held_out += fold.sentences
    assert sorted(held_out) == sorted(split.sentences)
    again, other = fold_of(split, 1, 3, seed=5)[1], fold_of(split, 1, 3, seed=6)[1]
    assert again.sentences == held_out[:10] and other.sentences != again.sentences
    assert "--folds 40: 30 training rows are too few" in refusal(fold_of, split, 1, 40, 0)


@pytest.mark.parametrize("fold", ["3/2:12345", "0/2:12345", "1/1:12345"])
def test_a_fold_that_is_none_is_refused(fold):
    assert refusal_of(Task("csv", Split(["a"] * 8, [0, 1] * 4), {}, {}).fold, fold).startswith(f"--fold {fold}: expected")


def test_a_fold_whose_training_rows_lack_a_class_or_every_value_of_a_feature_is_refused():
    train = Split([str(row) for row in range(10)], [0] * 5 + [1] * 4 + [2], features=[[1.0]] + [[math.nan]] * 9)
    task = Task("csv", train, {}, {}, classes=("a", "b", "c"), missing={"size": 9})
    refused = [one for one in (refusal_of(task.fold, f"{number}/2:12345") for number in (1, 2)) if one]
    assert any("--folds 2: the training rows of fold" in one and "no example of class c" in one for one in refused)
    whole = replace(task, train=replace(train, labels=[0] * 5 + [1] * 5), classes=("a", "b"))
    refused = [refusal_of(whole.fold, f"{number}/2:12345") for number in (1, 2)]
    assert sum("size" in one for one in refused) == 1 and refused.count("") == 1


def refusal_of(call, *arguments) -> str:
    """Returns the text of an error; empty if there is none."""
    try:
        call(*arguments)
    except UserError as error:
        return str(error)
    return ""


def test_a_share_is_set_aside_of_numbers_and_of_rare_labels():
    train, held_out = set_aside(Split(["x"] * 50, [float(i) for i in range(50)]), 0.2, "t")
    assert len(held_out) == 10 and min(held_out.labels) < 10 and max(held_out.labels) > 40
    rare = [(1.0, 0.0)] * 20 + [(0.0, 1.0)]
    train, held_out = set_aside(Split(["x"] * 21, rare), 0.1, "t")
    assert (0.0, 1.0) in train.labels and len(held_out) == 2
    assert "too few to set 0.1 of them aside" in refusal(set_aside, Split(["x"], [1.5]), 0.1, "t")
