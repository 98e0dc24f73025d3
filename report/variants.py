"""Makes the tables of many variants against one: differences paired by seed, with Holm's correction over the rows.

    holm([0.01, 0.04, 0.03])    # [0.03, 0.06, 0.06]
"""

import math

from report.latex import escape, tabular
from report.records import Record


def p_value(difference: Record) -> float:
    """Returns the two-sided p of Student's t for a mean difference of 0; nan for a single seed.

    Args:
        difference: mean, sd and values, as experiments/significance.py writes a spread.
    """
    # Imported late: SciPy's statistics take half a second.
    from scipy import stats

    n, sd = len(difference["values"]), difference.number("sd")
    if n < 2 or math.isnan(sd):
        return math.nan
    mean = difference.number("mean")
    # Equal differences on every seed: no doubt, or no difference.
    if sd == 0:
        return float(mean == 0)
    return float(2 * stats.t.sf(abs(mean) / (sd / math.sqrt(n)), n - 1))


def holm(values: list[float]) -> list[float]:
    """Returns the p values after Holm's step-down correction (1979), in their order; nan stays and is not counted."""
    order = sorted((i for i, value in enumerate(values) if not math.isnan(value)), key=lambda i: values[i])
    found, largest = list(values), 0.0
    for rank, i in enumerate(order):
        # The smallest p is multiplied by the number of rows, the next by one less; none may be below the one before.
        largest = max(largest, min(1.0, (len(order) - rank) * values[i]))
        found[i] = largest
    return found


def difference_cells(differences: list[Record], split: str) -> list[list[str]]:
    """Returns for each difference its MCC, its 95 % interval, and p after Holm's correction over these rows.

    Args:
        differences: with `best` scores on the split.
    """
    spreads = [row.section("best").section(split).section("mcc") for row in differences]
    cells = []
    for spread, p in zip(spreads, holm([p_value(spread) for spread in spreads]), strict=True):
        interval = spread.get("interval")
        cells.append([_signed(spread.number("mean")),
                      f"[{_signed(interval[0])}, {_signed(interval[1])}]" if interval else "",
                      "" if math.isnan(p) else f"{p:.3f}"])
    return cells


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "$-$")


def table(study: Record, others: list[Record]) -> str:
    """Makes the table of a comparison against one entry: MCC, macro-F1, difference and cost of each entry.

    Args:
        study: compare.json.
        others: entries of other comparisons, shown first: plain LoRA without a chosen rate.
    """
    split = study.section("selection")["splits"][-1]
    entries = [*others, *(entry for entry in study["entries"] if "best" in entry)]
    differences = [row for row in study["differences"] if "best" in row]
    by_entry = dict(zip((row["entry"] for row in differences), difference_cells(differences, split), strict=True))
    rows = []
    for number, entry in enumerate(entries):
        scores = entry.section("best").section(split)
        name = f"{escape(entry['entry'])} (default rate)" if number < len(others) else escape(entry["entry"])
        rate = entry["learning_rate"]
        rows.append([name, f"{entry.section('parameters').number('trainable'):,.0f}", "" if rate is None else f"{rate:g}",
                     *(f"{scores.section(key).number('mean'):.3f}" if key in scores else "" for key in ("mcc", "macro_f1")),
                     *(by_entry.get(entry["entry"], [""] * 3) if number >= len(others) else [""] * 3),
                     f"{entry.number('seconds_per_epoch'):.3g}", f"{entry.number('peak_memory_bytes') / 2 ** 20:,.0f}",
                     f"{entry.number('size_bytes') / 1e6:.3g}"])
    head = (r"entry & trained & rate & MCC & macro-F1 & difference & 95\,\% interval & $p$ (Holm) & s/epoch & peak MiB & "
            r"MB on disk")
    return tabular("lrrrrrlrrrr", head, rows)


def loss_table(rows: list[tuple[str, Record, Record | None]], split: str) -> str:
    """Makes the table of the KD losses: MCC of each student, and its difference from the one under KL.

    Args:
        rows: name, the student's entry, and its difference from KL; None for KL itself.
    """
    known = [difference for _, _, difference in rows if difference]
    cells = iter(difference_cells(known, split))
    lines = [[escape(name), f"{entry.section('best').section(split).section('mcc').number('mean'):.3f}",
              *(next(cells) if difference else [""] * 3)] for name, entry, difference in rows]
    return tabular("lrrlr", r"student and loss & MCC & minus KL & 95\,\% interval & $p$ (Holm)", lines)
