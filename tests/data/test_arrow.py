"""Columns read like lists of the same values, whatever Arrow makes of them; files give back what was written."""
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import arrow
from data.arrow import Column, read_columns, write_columns

FAST = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
CELLS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.lists(st.integers())
ALIKE = st.sampled_from([st.text(), st.integers(-9, 9), st.floats(allow_nan=False), st.booleans(), st.none() | st.text(),
                         CELLS])
VALUES = ALIKE.flatmap(lambda kind: st.lists(kind, max_size=20))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(arrow, "AT_A_TIME", 3)


def kinds(values) -> list[tuple]:
    """Python holds 1, 1.0 and True for equal."""
    return [(type(value), value) for value in values]


@FAST
@given(values=VALUES, data=st.data())
def test_a_column_reads_like_its_list(values, data):
    column = Column.of(iter(values))
    assert kinds(column) == kinds(values) and len(column) == len(values) and column == values
    start, stop, step = (data.draw(st.none() | st.integers(-25, 25)) for _ in range(3))
    assert kinds(column[start:stop:step or None]) == kinds(values[start:stop:step or None])
    rows = data.draw(st.lists(st.sampled_from(range(len(values))), max_size=9)) if values else []
    assert kinds(column.take(rows)) == kinds(column[row] for row in rows) == kinds(values[row] for row in rows)
    assert column != [*values, "more"] and bool(column) == bool(values)
    with pytest.raises(IndexError):
        column[len(values)]


@FAST
@given(texts=st.lists(st.text(), min_size=1, max_size=20), cut=st.integers(0, 20))
def test_a_digest_is_that_of_the_texts_not_of_their_chunks(texts, cut):
    digest = Column.of(texts).sha256()
    in_two = Column([*Column.of(texts[:cut]).chunks, *Column.of(texts[cut:]).chunks])
    assert in_two.sha256() == digest == Column.of(["before", *texts]).take(range(1, len(texts) + 1)).sha256()
    assert digest != Column.of([*texts, ""]).sha256() != Column.of([texts[0] + "x", *texts[1:]]).sha256()
    assert Column.of(["ab", "c"]).sha256() != Column.of(["a", "bc"]).sha256()


@pytest.mark.parametrize("values", [np.arange(8), np.array([0.5, math.nan, 1e300]), np.arange(14.0).reshape(7, 2)])
def test_numbers_come_back_as_an_array(values):
    column = Column.of_array(values)
    np.testing.assert_array_equal(np.asarray(column), values)
    assert np.asarray(column).dtype == values.dtype
    np.testing.assert_array_equal(np.asarray(column.take([2, 0])), values[[2, 0]])
    assert column[1] == pytest.approx(values[1].tolist(), nan_ok=True)
    assert isinstance(column[1], tuple) == (values.ndim == 2)


def test_a_file_gives_back_what_was_written(tmp_path):
    columns = {"texts": Column.of(["a", "é", "", "d"]), "labels": Column.of_array(np.arange(8.0).reshape(4, 2))}
    write_columns(tmp_path / "columns.arrow", columns, {"classes": ["x", "ü"]})
    found, about = read_columns(tmp_path / "columns.arrow")
    assert found == columns and about == {"classes": ["x", "ü"]}
    whole = (tmp_path / "columns.arrow").read_bytes()
    for damaged in (b"", whole[:-20], whole[:50]):
        (tmp_path / "damaged.arrow").write_bytes(damaged)
        with pytest.raises((ValueError, OSError)):
            read_columns(tmp_path / "damaged.arrow")
