"""columns.py: a text is text, a label is a label, a number is one whose square is finite; in every format."""
from __future__ import annotations

import datetime
import decimal
import json
import math

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.columns import LARGEST_NUMBER, LONGEST_NAME, classes_of, features_of, labels_of, texts_of
from data.tables import Table, read_table
from machine.errors import UserError
from options.schema import TableOptions

FAST = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def table(**columns) -> Table:
    return Table("rows.jsonl", columns)


def one_line(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500
    return str(caught.value)


# ---------------------------------------------------------------- texts

def type_and_place(value) -> str:
    """Names a case: pytest would write out a number of thousands of digits."""
    return type(value).__name__


NO_TEXTS = [["a"], [], {"a": 1}, 1, 0, 2.5, math.nan, math.inf, True, False, b"\xff\xfe", datetime.date(2020, 1, 1),
            decimal.Decimal("1.5"), 10 ** 5000, "a \ud83d b", "\udc80"]


@pytest.mark.parametrize("value", NO_TEXTS, ids=type_and_place)
@pytest.mark.parametrize("options", [TableOptions(), TableOptions(template="T: {text}"),
                                     TableOptions(text_column=("other", "text"))])
def test_what_is_no_text_is_refused_by_its_row(value, options):
    said = one_line(lambda: texts_of(table(text=["a", value], other=["x", "y"]), options, " "))
    assert said.startswith("rows.jsonl, row 2: the text (text) ")


@FAST
@given(value=st.recursive(st.booleans() | st.integers() | st.floats(), lambda inner: st.lists(inner) |
                          st.dictionaries(st.text(), inner)))
def test_no_other_type_is_a_text(value):
    assert "row 1: the text (text) is " in one_line(lambda: texts_of(table(text=[value]), TableOptions(), " "))


@pytest.mark.parametrize("value", [None, "", "  ", "\u3000\n", "\ufeff", " \ufeff\t"])
def test_a_text_of_nothing_that_can_be_seen_is_empty(value):
    assert "row 1: the text (text) is empty" in one_line(lambda: texts_of(table(text=[value]), TableOptions(), " "))


def test_bytes_in_parquet_are_read_as_utf8(tmp_path):
    rows = pyarrow.table({"text": pyarrow.array(["caf\u00e9".encode(), b"b"], pyarrow.binary()),
                          "label": pyarrow.array([b"x", b"y"], pyarrow.binary())})
    pyarrow.parquet.write_table(rows, tmp_path / "rows.parquet")
    found = read_table(tmp_path / "rows.parquet")
    assert texts_of(found, TableOptions(), " ") == ["caf\u00e9", "b"] and labels_of(found, "label") == ["x", "y"]


def test_whole_surrogate_pairs_are_text(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n')
    assert texts_of(read_table(tmp_path / "rows.jsonl"), TableOptions(), " ") == ["\U0001f600"]


# ---------------------------------------------------------------- labels

@pytest.mark.parametrize("values, expected", [
    (["01", "1", "002", "2"], ["01", "1", "002", "2"]), (["007", "7"], ["007", "7"]), (["+1", "1"], ["+1", "1"]),
    ([" a ", "b\n"], ["a", "b"]), (["\ufeffpos", "pos"], ["pos", "pos"]), ([0, 4], ["0", "4"]), ([2.0, 4.0], ["2", "4"]),
    (["0.0", "1.0"], ["0", "1"]), ([True, False], ["true", "false"]), (["NA", "none"], ["NA", "none"]),
    (["$5 to $10$", "x"], ["$5 to $10$", "x"]), (["3", "3"], ["3", "3"]), (["2.0.1", "1e"], ["2.0.1", "1e"]),
    ([10 ** 20, -5], ["1" + "0" * 20, "-5"]), (["9" * LONGEST_NAME, "1"], ["9" * LONGEST_NAME, "1"])])
def test_a_label_is_the_name_that_stands_there(values, expected):
    assert labels_of(table(label=values), "label") == expected


@pytest.mark.parametrize("value", [None, "", " ", "\t", "\ufeff", math.nan])
def test_a_blank_label_is_missing(value):
    assert "row 2: the label (label) is missing" in one_line(lambda: labels_of(table(label=["a", value]), "label"))


@pytest.mark.parametrize("value", [
    0.5, "0.5", "-1.25", ".5", "1e3", "1.5e-3", math.inf, 1e300, [1], {}, b"\xff", datetime.date(2020, 1, 1), 10 ** 5000,
    "7" * 5000, "x" * (LONGEST_NAME + 1), "a\nb", "a\x00b", "po\ufeffs", "half \ud83d", "a\u2028b"], ids=type_and_place)
def test_what_is_no_label_is_one_line(value):
    said = one_line(lambda: labels_of(table(label=[value, "a"]), "label"))
    assert said.startswith("rows.jsonl, row 1: label ")


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
@pytest.mark.parametrize("fraction", ["0.5", "1.75", "-0.25"])
def test_a_fraction_is_refused_in_every_format(tmp_path, ending, fraction):
    path = tmp_path / f"rows.{ending}"
    delimiter = "," if ending == "csv" else "\t"
    path.write_text(f'{{"text": "a", "label": {fraction}}}\n' if ending == "jsonl" else
                    f"text{delimiter}label\na{delimiter}{fraction}\n")
    assert f"row 1: label '{fraction}'" in one_line(lambda: labels_of(read_table(path), "label"))


@pytest.mark.parametrize("values", [["1", "a"], ["1", "1.0"], [True, 1], [True, "true"], ["01", "x"]])
def test_labels_of_two_types_are_refused(values):
    assert "labels of mixed types" in one_line(lambda: labels_of(table(label=values), "label"))


@FAST
@given(names=st.lists(st.from_regex(r"[0-9]{1,5}", fullmatch=True) | st.just("0"), min_size=2, unique=True))
def test_digits_that_are_written_differently_are_classes_of_their_own(tmp_path, names):
    (tmp_path / "rows.csv").write_text("label\n" + "".join(f"{name}\n" for name in names))
    found = labels_of(read_table(tmp_path / "rows.csv"), "label")
    assert found == names and len(classes_of(found, "x")) == len(names)


@FAST
@given(numbers=st.lists(st.integers(-10 ** 30, 10 ** 30), min_size=2, unique=True))
def test_whole_numbers_are_classes_of_that_name_in_order_of_value(numbers):
    assert classes_of(labels_of(table(label=numbers), "label"), "x") == [str(number) for number in sorted(numbers)]


def test_no_class_of_a_classlabel_is_a_missing_label(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    for labels, said in (([0, 1, -1], "row 3: the label .label. is missing"),
                         ([0, 7], "row 2: label '7'; the file has names for 0 to 1")):
        path = tmp_path / "rows.parquet"
        schema = features.arrow_schema
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * len(labels), "label": labels}, schema=schema), path)
        with pytest.raises(UserError, match=said):
            labels_of(read_table(path), "label")
    plain = pyarrow.table({"text": ["a", "b"], "label": [-1, 1]})
    pyarrow.parquet.write_table(plain, tmp_path / "plain.parquet")
    assert labels_of(read_table(tmp_path / "plain.parquet"), "label") == ["-1", "1"]


@pytest.mark.parametrize("metadata", [b"", b"null", b"[]", b'{"info": 1}', b'{"info": {"features": {"label": 3}}}',
                                      b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": 3}}}}'])
def test_metadata_that_somebody_else_wrote_is_no_error(tmp_path, metadata):
    rows = pyarrow.table({"text": ["a"], "label": [1]}).replace_schema_metadata({"huggingface": metadata})
    pyarrow.parquet.write_table(rows, tmp_path / "rows.parquet")
    assert labels_of(read_table(tmp_path / "rows.parquet"), "label") == ["1"]


# ---------------------------------------------------------------- numbers

@pytest.mark.parametrize("value", ["1e400", 10 ** 400, 10 ** 5000, math.inf, -math.inf, "1e200", 1e200, -(10 ** 160), "inf",
                                   "1_000", "one", [1], {}, datetime.date(2020, 1, 1), "0x10"], ids=type_and_place)
def test_a_number_that_is_none_or_whose_square_is_not_finite_is_one_line(value):
    said = one_line(lambda: features_of(table(x=[1, value]), ("x",)))
    assert said.startswith("rows.jsonl, row 2: feature x is ")


@FAST
@given(values=st.lists(st.floats(-LARGEST_NUMBER, LARGEST_NUMBER) | st.none() | st.integers(-10 ** 140, 10 ** 140),
                       min_size=1))
def test_other_numbers_are_read_alike_from_digits_and_from_json(tmp_path, values):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"x": value}) + "\n" for value in values))
    (tmp_path / "rows.tsv").write_text("i\tx\n" + "".join(f"0\t{'' if value is None else value}\n" for value in values))
    one, other = (features_of(read_table(tmp_path / name), ("x",)) for name in ("rows.jsonl", "rows.tsv"))
    expected = [math.nan if value is None else float(value) for value in values]
    assert str(one) == str(other) == str([[value] for value in expected])
