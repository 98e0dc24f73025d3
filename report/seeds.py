"""Writes means over seeds, their intervals and paired differences for the terminal and for LaTeX."""

import math
import re

from report.latex import escape, tabular
from report.records import Record, shown_splits, spoken
from report.studies import aligned

NAMES = {"accuracy": "accuracy (%)", "mcc": "MCC"}
ENTRIES = {"student": "student with KD", "scratch": "no-KD baseline"}


def spoken_entry(name: str) -> str:
    """Returns an entry's name in a table."""
    return ENTRIES.get(name, name)


def cell(spread: Record, key: str, signed: bool = False) -> tuple[str, str]:
    """Returns mean with sample standard deviation, and the interval, which a single seed does not have."""
    factor, digits, sign = *((100, 1) if key == "accuracy" else (1, 3)), "+" if signed else ""
    mean, sd = factor * spread.number("mean"), factor * spread.number("sd")
    interval = spread.get("interval")
    return (f"{mean:{sign}.{digits}f}" + ("" if math.isnan(sd) else f" \u00b1 {sd:.{digits}f}"),
            f"[{factor * interval[0]:{sign}.{digits}f}, {factor * interval[1]:{sign}.{digits}f}]" if interval else "")


def interval_rows(study: Record) -> tuple[list[str], list[list[str]]]:
    """Returns head and rows, as plain text, of every entry's scores and of the paired differences."""
    rows, splits = [], shown_splits(study.section("selection")["splits"])
    lines = [(spoken_entry(entry["entry"]), entry, False) for entry in study["entries"]]
    lines += [(f"{spoken_entry(row['entry'])} minus {spoken_entry(row['minus'])}", row, True)
              for row in study.get("differences", [])]
    for name, row, signed in lines:
        for which in ("best", "last"):
            for split in splits if which in row else []:
                scores = row.section(which).section(split)
                rows.append([name, str(len(row["seeds"])), which, spoken(split),
                             *(text for key in NAMES for text in cell(scores.section(key), key, signed))])
                name = ""
    return ["", "seeds", "epoch", "split", *(text for name in NAMES.values() for text in (name, "95 % interval"))], rows


def intervals_text(study: Record) -> str:
    """Returns the table of intervals for the terminal, and what must be known beside the table."""
    head, rows = interval_rows(study)
    return "\n".join([*aligned([head, *rows]), *interval_notes(study)])


def intervals_latex(study: Record) -> str:
    """Returns the table of intervals for a paper."""
    head, rows = interval_rows(study)
    return tabular("lrllrrrr", " & ".join(map(escape, head)), [[_latex(text) for text in row] for row in rows])


def _latex(text: str) -> str:
    """A plain cell as LaTeX: a number's minus is no hyphen."""
    return re.sub(r"(?<!\w)-(?=\d)", "$-$", escape(text))


def interval_notes(study: Record) -> list[str]:
    """Returns what a reader must know beside the intervals."""
    seeds = study["seeds"]
    if len(seeds) == 1:
        return [f"One seed ({seeds[0]}): no standard deviation and no interval; --seeds 3 or more gives them."]
    notes = [f"Mean \u00b1 sample standard deviation over {len(seeds)} seeds ({seeds[0]} to {seeds[-1]}); 95 % interval of "
             "the mean by Student's t."]
    if study.get("differences"):
        notes.append("Differences are paired by seed; an interval that holds 0 shows no difference.")
    return notes


def seeds_text(study: Record) -> str:
    """Returns a study of seeds for the terminal."""
    majority = ", ".join(f"{spoken(split)} {100 * study.section('majority_accuracy').number(split):.1f} %"
                         for split in shown_splits(list(study.section("majority_accuracy"))))
    diverged = [run["seed"] for run in study["runs"] if run["status"] == "diverged"]
    notes = [f"The majority class has an accuracy of {majority}, and MCC 0."]
    if len(study.get("teachers", [])) == 1 and len(study["seeds"]) > 1:
        notes.append(f"All students have one teacher, {study['teachers'][0]}: the intervals are of the students' "
                     "seeds alone.")
    if diverged:
        notes.append(f"Diverged, and left out: {', '.join(diverged)}.")
    return "\n".join([f"{study['model']} on {study['task']}, {study['of']}", intervals_text(study), *notes])
