"""Makes tables of comparisons and sweeps, for the terminal and for LaTeX."""

import math
import operator
from itertools import chain

from report.latex import cell, escape, grouped, plain_table, tabular
from report.records import Record, ReportError, shown_splits, spoken

COLUMNS = 100  # of a line on the terminal
SHORTEST = 22  # characters that a cut cell keeps

# ---------------------------------------------------------------- comparisons

def _spread(spread: Record, key: str) -> str:
    """Returns mean ± sample standard deviation as plain text; of a single seed the mean alone."""
    factor, digits = (100, 1) if key == "accuracy" else (1, 3)
    mean, sd = factor * spread.number("mean"), factor * spread.number("sd")
    return f"{mean:.{digits}f}" + ("" if math.isnan(sd) else f" \u00b1 {sd:.{digits}f}")


def _scores_of(entries: list[Record]) -> dict[str, str]:
    """Returns the scores that every entry has on every split, as recorded key -> name of the column."""
    names = {"accuracy": "acc. %", "mcc": "MCC", "macro_f1": "macro-F1", "f1_micro": "micro-F1", "f1_macro": "macro-F1",
             "pearson": "Pearson", "spearman": "Spearman", "mse": "MSE"}
    # Comparisons recorded before macro-F1 lack it.
    recorded = [set(scores) for entry in entries for scores in entry.section("best").values()]
    common = set.intersection(*recorded)
    return {key: name for key, name in names.items() if key in common}


def _score(study: Record) -> str:
    """Returns the name of the score that chose."""
    return {"f1_micro": "micro F1", "spearman": "Spearman correlation"}.get(study.section("selection").get("score"), "MCC")


def compare_rows(compare: Record) -> tuple[list[str], dict[str, list[str]], list[str], list[list[str]]]:
    """Returns head and rows of a comparison as plain text.

    Returns:
        columns before the scores, names of the scores by split, columns after the scores, and rows: the majority class, if
        there is one, then best and last epoch of each entry.

    Raises ReportError if every run diverged.
    """
    done = [entry for entry in compare["entries"] if "best" in entry]
    if not done:
        raise ReportError(f"{compare.source}: every run diverged; lower --lr-grid")
    splits, scores = shown_splits(compare.section("selection")["splits"]), _scores_of(done)
    rows = []
    # Several labels at once and numbers have no majority class.
    if "majority_accuracy" in done[0]:
        majority = done[0].section("majority_accuracy")
        of_majority = [{"accuracy": f"{100 * majority.number(split):.1f}", "mcc": "0"}.get(key, "")
                       for split in splits for key in scores]
        rows = [["majority class", "", "", "", "", *of_majority, "", "", ""]]
    for entry in compare["entries"]:
        name, seeds = entry["entry"], len(entry["seeds"])
        if entry not in done:
            rows.append([name, "", "", "", "diverged"] + [""] * (len(splits) * len(scores) + 3))
            continue
        counts, rate = entry.section("parameters"), entry["learning_rate"]
        size = [f"{counts.number('trainable'):,.0f}", f"{counts.number('trainable_percent'):.3g}",
                "" if rate is None else f"{rate:g}"]
        cost = [f"{entry.number('seconds_per_epoch'):.3g}", f"{entry.number('peak_memory_bytes') / 2 ** 20:,.0f}",
                f"{entry.number('size_bytes') / 1e6:.3g}"]
        # A mean of fewer seeds than the others' says so next to its name.
        few = f" ({seeds} of {len(compare['seeds'])} seeds)" if seeds < len(compare["seeds"]) else ""
        # An entry without a learning rate trains nothing: it has one epoch, the one before training.
        for which in ("best",) if rate is None else ("best", "last"):
            epoch = "untrained" if rate is None else f"{which} ({entry.section(which + '_epoch').number('mean'):.3g})"
            values = [_spread(entry.section(which).section(split).section(key), key) for split in splits for key in scores]
            first = which == "best"
            rows.append([name + few if first else ""] + (size if first else [""] * 3) + [epoch] + values
                        + (cost if first else [""] * 3))
    return (["entry", "trained", "%", "lr", "epoch"], {split: list(scores.values()) for split in splits},
            ["s/epoch", "peak MiB", "MB on disk"], rows)


def compare_notes(compare: Record) -> list[str]:
    """Returns the notes below a comparison: seeds, the split that chose, learning rates at the edge of the grid."""
    selection, seeds = compare.section("selection"), compare["seeds"]
    main = selection["split"]
    others = [split for split in shown_splits(selection["splits"]) if split != main]
    tried = max(len(entry["tried"]) for entry in compare["entries"])
    chose = ("the epoch" if tried == 1 else f"the epoch, and the learning rate (of {tried}, on the first seed)") + (
        f" by its {_score(compare)}")
    split = (f"The {spoken(main)} split chose {chose}; {spoken(others[0])} took part in no choice." if others else
             f"The {spoken(main)} split chose {chose}, and is the one reported: its figures flatter a little.")
    # The best of a grid at its edge may have a better neighbour outside.
    edge = []
    for entry in compare["entries"]:
        rates = sorted(run["learning_rate"] for run in entry["tried"] if run["learning_rate"] is not None)
        if len(rates) > 2 and entry["learning_rate"] in (rates[0], rates[-1]):
            edge.append(f"{entry['entry']} ({entry['learning_rate']:g})")
    return [(f"Mean \u00b1 sample standard deviation over {len(seeds)} seeds ({seeds[0]} to {seeds[-1]})."
             if len(seeds) > 1 else f"One seed ({seeds[0]})."), split,
            "Seconds per epoch are of training alone; if frozen results are cached, one pass over the data comes first.",
            *([f"Chosen at the edge of the grid: {', '.join(edge)}; a wider grid may do better."] if edge else [])]


def aligned(rows: list[list[str]]) -> list[str]:
    """Returns rows as lines of text, the first column aligned to the left, the others to the right.

    The first column's long cells are cut where the lines would be longer than COLUMNS.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if (room := COLUMNS - sum(widths[1:]) - 2 * len(widths[1:])) < widths[0]:
        widths[0] = max(room, SHORTEST)
        rows = [[first if len(first) <= widths[0] else first[:widths[0] - 3] + "...", *others] for first, *others in rows]
    lines = []
    for first, *others in rows:
        line = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append("  ".join(line).rstrip())
    return lines


def compare_text(compare: Record) -> str:
    """Returns a comparison for the terminal: a table of each split's scores, a table of sizes and costs, and the notes."""
    before, groups, after, rows = compare_rows(compare)
    head = [*before, *chain.from_iterable(groups.values()), *after]
    lines, start = [f"{compare['model']} on {compare['task']}"], len(before)

    def add(title: str, columns: list[int], chosen: list[list[str]]) -> None:
        part = operator.itemgetter(*columns)
        lines.extend(["", title, *aligned(list(map(part, (head, *chosen))))])

    # One table of all columns would be too wide for a terminal.
    for split, names in groups.items():
        add(spoken(split), [0, head.index("lr"), head.index("epoch"), *range(start, start + len(names))], rows)
        start += len(names)
    # Only an entry's first row has sizes and costs.
    entries = [row for row in rows if row[head.index("trained")]]
    add("size and cost", [0, head.index("trained"), head.index("%"), *range(start, len(head))], entries)
    return "\n".join([*lines, "", *compare_notes(compare)])


def compare_latex(compare: Record) -> str:
    """Returns the table of a comparison for the report."""
    before, groups, after, rows = compare_rows(compare)
    head = grouped(list(map(escape, before)), {split: list(map(escape, names)) for split, names in groups.items()},
                    list(map(escape, after)))
    scores = sum(map(len, groups.values()))
    return tabular("lrrrl" + "r" * (scores + len(after)), head, [list(map(cell, row)) for row in rows])


# ---------------------------------------------------------------- sweeps

def sweep_rows(sweep: Record, most: int = 10) -> tuple[list[str], list[list[str]]]:
    """Returns head and rows of the best trials of a sweep, at most `most`, as plain text."""
    split, options = sweep.section("selection")["split"], list(sweep.section("search"))
    # Of trials with the same score the smaller model stands first.
    complete = sorted((trial for trial in sweep["trials"] if trial["state"] == "complete"),
                      key=lambda trial: (-trial.number("score"), trial.section("parameters").number("trainable")))
    rows, classes = [], _score(sweep) == "MCC"
    for trial in complete[:most]:
        counts, values = trial.section("parameters"), trial.section("params")
        trained, scores = counts.number("trainable"), trial.section("validation").section(split)
        rows.append([str(trial["number"]), f"{trial.number('score'):.3f}",
                     *([f"{100 * scores.number('accuracy'):.1f}"] if classes else []), f"{trained:,.0f}",
                     f"{100 * trained / counts.number('total'):.3g}", f"{trial.number('best_epoch'):g}"]
                    + [f"{values[name]:.3g}" if isinstance(values[name], float) else str(values[name]) for name in options])
    return ["trial", _score(sweep), *(["acc. %"] if classes else []), "trained", "%", "epoch"] + options, rows


def sweep_notes(sweep: Record) -> list[str]:
    """Returns the notes below a sweep: states of the trials, how the best was chosen, importance of the options."""
    states = [trial["state"] for trial in sweep["trials"]]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    split = spoken(sweep.section("selection")["split"])
    notes = [f"{len(states)} trials with one seed ({sweep['sr']}): {', '.join(counts)}.",
             f"A trial's score is its best epoch's {_score(sweep)} on the {split} split, which chose the best trial too: "
             "its figures flatter."]
    if majority := _sweep_majority(sweep):
        notes.append(f"The majority class has an accuracy of {100 * majority:.1f} % and MCC 0.")
    if sweep["importance"]:
        shares = ", ".join(f"{name} {share:.2f}" for name, share in sweep["importance"].items())
        notes.append(f"Share of the scores' variance that each option explains (fANOVA): {shares}.")
    return notes


def _sweep_majority(sweep: Record) -> float | None:
    """Returns the accuracy of the majority class on the split that chose, or None if no trial was scored."""
    split = sweep.section("selection")["split"]
    return next((trial.section("validation").section(split).number("majority_accuracy") for trial in sweep["trials"]
                 if trial["validation"] and "majority_accuracy" in trial["validation"][split]), None)


def sweep_text(sweep: Record) -> str:
    """Returns the table of the best trials of a sweep for the terminal, with its notes."""
    head, rows = sweep_rows(sweep)
    return "\n".join([f"{sweep['model']} on {sweep['task']}: the best trials", *aligned([head, *rows]), *sweep_notes(sweep)])


def sweep_latex(sweep: Record) -> str:
    """Returns the table of the best trials of a sweep for the report."""
    head, rows = sweep_rows(sweep)
    return plain_table("r" * len(head), head, rows)


# Mode of a study -> its table for the report, and its notes.
STUDY_TABLES = {"compare": (compare_latex, compare_notes), "sweep": (sweep_latex, sweep_notes)}
