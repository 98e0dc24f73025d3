"""Tables of many variants: Holm's correction against its step-down test, p values against SciPy's t test."""
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from report.records import Record
from report.variants import difference_cells, holm, p_value


def spread(values: list[float]) -> Record:
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    half = None if sd is None else float(stats.t.ppf(0.975, len(values) - 1)) * sd / math.sqrt(len(values))
    mean = float(np.mean(values))
    return Record({"mean": mean, "sd": sd, "values": values,
                   "interval": None if half is None else [mean - half, mean + half]}, "made up")


def rejected(values: list[float], level: float) -> list[bool]:
    """Holm 1979: the smallest p against level / m, the next against level / (m - 1), until one is not below."""
    order, found = np.argsort(values, kind="stable"), [False] * len(values)
    for rank, i in enumerate(order):
        if values[i] > level / (len(values) - rank):
            break
        found[i] = True
    return found


@given(values=st.lists(st.floats(1e-6, 1), min_size=1, max_size=8), level=st.floats(0.001, 0.999))
def test_a_corrected_p_is_the_level_at_which_holms_test_rejects(values, level):
    corrected = holm(values)
    if min(abs(p - level) for p in corrected) > 1e-9:
        assert [p <= level for p in corrected] == rejected(values, level)


def test_rows_without_a_p_are_not_counted():
    assert holm([0.01, math.nan, 0.04, 0.03])[::2] == pytest.approx([0.03, 0.06])
    assert math.isnan(holm([math.nan])[0])


@pytest.mark.parametrize("values", [[0.01, 0.02, 0.015], [-0.01, 0.02, 0.0, 0.003, 0.01]])
def test_p_is_students(values):
    assert p_value(spread(values)) == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue)


def test_one_seed_has_no_p_and_equal_differences_no_doubt():
    assert math.isnan(p_value(spread([0.1]))) and p_value(spread([0.1, 0.1])) == 0.0 and p_value(spread([0.0, 0.0])) == 1.0


def test_the_interval_of_a_row_is_its_own_and_p_that_of_all_rows():
    def row(values: list[float]) -> Record:
        return Record({"best": Record({"dev": Record({"mcc": spread(values)}, "made up")}, "made up")}, "made up")

    rows = [row(values) for values in ([0.01, 0.02, 0.015], [-0.3, -0.31, -0.29])]
    cells = difference_cells(rows, "dev")
    assert cells[0][0] == "+0.015" and cells[1][0] == "$-$0.300" and cells[0][1].startswith("[+0.00")
    assert float(cells[1][2]) == pytest.approx(2 * stats.ttest_1samp([-0.3, -0.31, -0.29], 0.0).pvalue, abs=6e-4)
