"""Makes tables of several seeds for the terminal and for LaTeX: means, 95 % intervals, paired differences."""

import math
from itertools import chain

from report.latex import plain_table
from report.records import Record, model_name, shown_splits, spoken
from report.studies import aligned

# Recorded score -> name of its column.
NAMES = {"accuracy": "accuracy (%)", "mcc": "MCC", "f1_micro": "micro F1", "f1_macro": "macro F1", "pearson": "Pearson",
         "spearman": "Spearman", "mse": "MSE"}


def cell(spread: Record, key: str, signed: bool = False) -> tuple[str, str]:
    """Returns two cells: mean ± sample standard deviation, and the interval. A single seed has the mean alone."""
    factor, digits, sign = *((100, 1) if key == "accuracy" else (1, 3)), "+" if signed else ""
    mean, sd = factor * spread.number("mean"), factor * spread.number("sd")
    interval = spread.get("interval")
    return (f"{mean:{sign}.{digits}f}" + ("" if math.isnan(sd) else f" \u00b1 {sd:.{digits}f}"),
            f"[{factor * interval[0]:{sign}.{digits}f}, {factor * interval[1]:{sign}.{digits}f}]" if interval else "")


def interval_rows(study: Record) -> tuple[list[str], list[list[str]]]:
    """Returns head and rows of the table as plain text: the scores of each entry, then the paired differences."""
    splits, names = shown_splits(study.section("selection")["splits"]), names_of(study)
    lines = [(model_name(entry["entry"]), entry, False) for entry in study["entries"]]
    lines += [(f"{model_name(row['entry']).removesuffix(' with KD')} minus {model_name(row['minus'])}", row, True)
              for row in study.get("differences", [])]
    rows = []
    for name, row, signed in lines:
        for which in ("best", "last"):
            for split in splits if which in row else []:
                scores = row.section(which).section(split)
                cells = [cell(scores.section(key), key, signed) for key in names]
                rows.append([name, str(len(row["seeds"])), which, spoken(split), *chain.from_iterable(cells)])
                # The name stands in the first of its rows alone.
                name = ""
    columns = [(name, "95 % interval") for name in names.values()]
    return ["", "seeds", "epoch", "split", *chain.from_iterable(columns)], rows


def names_of(study: Record) -> dict[str, str]:
    """Returns the columns of the scores that a study recorded."""
    for entry in study["entries"]:
        for scores in entry.get("best", {}).values():
            return {key: name for key, name in NAMES.items() if key in scores}
    return {key: NAMES[key] for key in ("accuracy", "mcc")}


def intervals_text(study: Record) -> str:
    """Returns the table of intervals for the terminal, with its notes."""
    head, rows = interval_rows(study)
    return "\n".join([*aligned([head, *rows]), *interval_notes(study)])


def intervals_latex(study: Record) -> str:
    """Returns the table of intervals for a paper."""
    return plain_table("lrll" + "rr" * len(names_of(study)), *interval_rows(study))


def folds_latex(folds: Record) -> str:
    """Returns the table of a cross-validation for the report: each score over the folds, best and last epoch."""
    intervals, rows = folds.section("intervals"), []
    for which in ("best", "last"):
        for split, scores in intervals.section(which).items():
            names = {key: name for key, name in NAMES.items() if key in scores}
            cells = [cell(scores.section(key), key) for key in names]
            rows.append([which, spoken(split), *chain.from_iterable(cells)])
    columns = [(name, "95 % interval") for name in names.values()]
    return plain_table("ll" + "rr" * len(names), ["epoch", "split", *chain.from_iterable(columns)], rows)


def folds_note(folds: Record) -> str:
    """Returns the note below the table of a cross-validation."""
    # Bengio and Grandvalet 2004, "No Unbiased Estimator of the Variance of K-Fold Cross-Validation".
    return (f"Mean \u00b1 sample standard deviation over {folds.number('folds'):.0f} folds of the training rows; 95 % "
            "interval of the mean by Student's t. The folds train on rows in common, so that a true interval is somewhat "
            "wider.")


def interval_notes(study: Record) -> list[str]:
    """Returns the notes below a table of intervals: number of seeds, kind of interval, how differences are paired."""
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
    # A diverged run has no score: the mean is of the others, and the reader must know.
    diverged = [run["seed"] for run in study["runs"] if run["status"] == "diverged"]
    notes = []
    # Several labels at once and numbers have no majority class.
    if "majority_accuracy" in study:
        majority = ", ".join(f"{spoken(split)} {100 * study.section('majority_accuracy').number(split):.1f} %"
                             for split in shown_splits(list(study.section("majority_accuracy"))))
        notes.append(f"The majority class has an accuracy of {majority}, and MCC 0.")
    if len(study.get("teachers", [])) == 1 and len(study["seeds"]) > 1:
        notes.append(f"All students have one teacher, {study['teachers'][0]}: the intervals are of the students' "
                     "seeds alone.")
    if diverged:
        notes.append(f"Diverged, and left out: {', '.join(diverged)}.")
    return "\n".join([f"{study['model']} on {study['task']}, {study['of']}", intervals_text(study), *notes])
