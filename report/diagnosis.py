"""Writes a diagnosis (diagnose.json) as text, LaTeX tables and plots.

    write(Path("runs/diagnose-LoRA-12345/diagnose.json"), Path("runs/diagnose-LoRA-12345"))
"""

from itertools import chain
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from report.figures import draw_finished
from report.latex import plain_table
from report.records import Record, model_name, read_json, replacing, spoken
from report.studies import aligned
from report.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    PURPLE,
    SET_COLOURS,
    STUDENT_LOOKS,
    VERMILLION,
    literal,
    new_figure,
    save_figure,
    tidy,
)

LOOKS = {"teacher": (GREEN, "D"), **STUDENT_LOOKS, "language_model": (BLACK, "^")}
# Recorded name of a published model -> its name in tables and figures.
PUBLISHED = {"ngram": "5-gram", "lstm": "LSTM", "transformer_xl": "Transformer-XL", "gpt2": "GPT-2"}
PUBLISHED_LOOKS = ((GREY, "x"), (PURPLE, "+"), (SET_COLOURS[4], "1"), (SET_COLOURS[5], "2"))
# Rows of a long table on the terminal; the files have all of them.
SHOWN = 10
PLOTTED_SOURCES = 25


class Table(NamedTuple):
    """Holds a table as plain text cells, the first `left` columns aligned to the left."""

    title: str
    head: list[str]
    rows: list[list[str]]
    left: int = 1


def name_of(diagnosis: Record, model: str) -> str:
    """Returns the name of a model in tables and figures."""
    # A run of LoRA has no student: its classifier is recorded as the teacher, and teaches nobody.
    return "classifier" if diagnosis["of"] == "LoRA" and model == "teacher" else model_name(model)


def tables(diagnosis: Record) -> dict[str, Table]:
    """Returns every table of a diagnosis by the name of its file. A part that was left out has none."""
    classifiers = list(diagnosis.section("scores"))
    names = [name_of(diagnosis, model) for model in classifiers]
    found = {"scores": _scores(diagnosis, classifiers), "calibration": _calibration(diagnosis, classifiers)}
    for key, title in (("source", "By source"), ("length", "By length in words")):
        if groups := diagnosis[f"by_{key}"]:
            head = [key, "n", "majority", *chain.from_iterable((name, "MCC") for name in names)]
            rows = []
            for group in groups:
                scores = [_accuracy_and_mcc(group.section("models").section(model)) for model in classifiers]
                rows.append([group["group"], str(group["n"]), _percent(group.number("majority_accuracy")),
                             *chain.from_iterable(scores)])
            found[key] = Table(f"{title}, all splits together: accuracy (%), MCC", head, rows)
    if pairs := diagnosis["pairs"]:
        for key, title in (("phenomena", "By phenomenon"), ("paradigms", "By paradigm")):
            found[key] = _pairs(diagnosis, pairs, key, title)
        # A grammar with one paradigm for each phenomenon would have the same table twice.
        if all(group["group"] == group["phenomenon"] for group in pairs["paradigms"]):
            del found["paradigms"]
    if rows := diagnosis["disagreements"]:
        found["disagreements"] = _sentences(diagnosis, rows, "Teacher and student disagree most: probability of the label")
    if rows := diagnosis.section("all_wrong")["rows"]:
        n = diagnosis.section("all_wrong")["n"]
        found["all_wrong"] = _sentences(diagnosis, rows, f"All wrong ({n} sentences): probability of the label")
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _accuracy_and_mcc(scores: Record) -> list[str]:
    # A group with a single class has no MCC.
    return [_percent(scores.number("accuracy")), "n/a" if scores["mcc"] is None else f"{scores.number('mcc'):.3f}"]


def _scores(diagnosis: Record, classifiers: list[str]) -> Table:
    """Makes the table of accuracy and MCC on each split, the majority class first."""
    rows = []
    for split, n in diagnosis.section("splits").items():
        parts = [diagnosis.section("scores").section(model).section(split) for model in classifiers]
        rows.append(["majority class", spoken(split), str(n), _percent(parts[0].number("majority_accuracy")), "0"])
        rows += [[name_of(diagnosis, model), spoken(split), str(n), *_accuracy_and_mcc(part)]
                 for model, part in zip(classifiers, parts, strict=True)]
    return Table("Scores", ["model", "split", "n", "accuracy (%)", "MCC"], rows, 2)


def _calibration(diagnosis: Record, classifiers: list[str]) -> Table:
    """Makes the table of calibration error and loss on each split, as measured and at the fitted temperature."""
    rows = []
    for model in classifiers:
        own = diagnosis.section("calibration").section(model)
        for split, values in own.section("splits").items():
            # On the split of the fit, the figures at the temperature flatter.
            fitted = " (fitted here)" if split == own["fitted_on"] else ""
            rows.append([name_of(diagnosis, model), spoken(split), f"{own.number('temperature'):.3g}{fitted}",
                         *(_percent(values.number(key)) for key in ("ece", "ece_scaled")),
                         *(f"{values.number(key):.3f}" for key in ("nll", "nll_scaled"))])
    return Table("Calibration: expected calibration error (ECE, points of 100) and loss (nats), as measured and at the "
                 "fitted temperature",
                 ["model", "split", "temperature", "ECE", "ECE at T", "loss", "loss at T"], rows, 2)


def _pairs(diagnosis: Record, pairs: Record, key: str, title: str) -> Table:
    """Makes the table of minimal pairs by `key` (phenomena or paradigms), with published figures of the same pairs."""
    models, published = list(pairs.section("overall").section("models")), pairs["published"]
    rows = []
    for group in [*pairs[key], Record({**pairs.section("overall"), "group": "all"}, pairs.source)]:
        # A paradigm is a name of BLiMP's files, which a reader may search for; a phenomenon is prose.
        name = group["group"].replace("_", " ") if key == "phenomena" else group["group"]
        shares = [_percent(group.section("models").section(model).number("accuracy")) for model in models]
        others = [_percent(group.section("published").number(other)) if other in group["published"] else ""
                  for other in published]
        rows.append([name, str(group["n"]), *shares, *others])
    return Table(f"{title}: pairs (%) in which the right sentence scores higher; chance is 50"
                 + (", * as published" if published else ""),
                 [key, "pairs", *(name_of(diagnosis, model) for model in models),
                  *(f"{PUBLISHED.get(name, name)}*" for name in published)], rows)


def _sentences(diagnosis: Record, rows: list[Record], title: str) -> Table:
    """Makes a table of sentences, with the probability of the label under each model."""
    models = list(rows[0].section("models"))
    lines = []
    for row in rows:
        sentence = row["sentence"] if len(row["sentence"]) <= 80 else row["sentence"][:77] + "..."
        judged = [row.section("models").section(model).number("probability_of_label") for model in models]
        lines.append([sentence, row["label"], *(f"{probability:.2f}" for probability in judged)])
    return Table(title, ["sentence", "label", *(name_of(diagnosis, model) for model in models)], lines)


def diagnosis_text(diagnosis: Record) -> str:
    """Returns a diagnosis for the terminal: the first rows of every table, and the parts that were left out."""
    lines = [f"{diagnosis['run']} ({diagnosis['of']}): {diagnosis['model']} on {diagnosis['task']}"]
    for name, table in tables(diagnosis).items():
        # 67 paradigms of BLiMP are too long for a terminal; the phenomena sum them up.
        if name == "paradigms":
            continue
        short = name in ("source", "disagreements", "all_wrong") and len(table.rows) > SHOWN
        lines += ["", table.title, *aligned([table.head, *(table.rows[:SHOWN] if short else table.rows)])]
        if short:
            lines.append(f"... and {len(table.rows) - SHOWN} more rows in {name}.tex and diagnose.json")
    pairs = diagnosis["pairs"]
    if pairs and pairs["limit"] and pairs["published"]:
        lines.append(f"The first {pairs['limit']} pairs of each paradigm; the published figures are of 1,000.")
    return "\n".join(lines + ["", *(f"left out: {part}" for part in diagnosis["left_out"])]).rstrip("\n")


def latex(table: Table) -> str:
    """Returns a table for a paper."""
    return plain_table("l" * table.left + "r" * (len(table.head) - table.left), table.head, table.rows)


# ---------------------------------------------------------------- plots

def _title(diagnosis: Record) -> str:
    return literal(f"{diagnosis['model']} on {diagnosis['task']}")


def groups_figure(diagnosis: Record, groups: list[Record], axis_name: str) -> Figure:
    """Draws accuracy and MCC of every classifier in each group, with the accuracy of the majority class as a grey mark."""
    figure = new_figure(9, 1.6 + 0.3 * len(groups))
    left, right = figure.subplots(1, 2, sharey=True)
    y = range(len(groups))
    # The classifiers of a group stand around its line, or their marks would hide each other.
    for i, model in enumerate(classifiers := list(diagnosis.section("scores"))):
        colour, marker = LOOKS[model]
        at = [row + 0.16 * (i - (len(classifiers) - 1) / 2) for row in y]
        scores = [group.section("models").section(model) for group in groups]
        left.plot([100 * score.number("accuracy") for score in scores], at, marker, color=colour, ms=5,
                  label=name_of(diagnosis, model))
        right.plot([score.number("mcc") for score in scores], at, marker, color=colour, ms=5)
    left.plot([100 * group.number("majority_accuracy") for group in groups], y, "|", color=GREY, ms=13,
              label="majority class")
    right.axvline(0, color=GREY, linestyle="--", linewidth=1)
    left.set_yticks(y, [literal(f"{group['group']} (n={group['n']})") for group in groups])
    left.invert_yaxis()
    left.set(xlabel="accuracy (%)", ylabel=axis_name)
    right.set_xlabel("Matthews correlation (0: majority class)")
    tidy(left)
    tidy(right)
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    figure.suptitle(_title(diagnosis))
    return figure


def pairs_figure(diagnosis: Record, pairs: Record) -> Figure:
    """Draws the share of minimal pairs that each model has right, by phenomenon, with the published figures."""
    groups = pairs["phenomena"]
    figure = new_figure(9, 2 + 0.42 * len(groups))
    axes = figure.add_subplot()
    models = list(pairs.section("overall").section("models"))
    for i, model in enumerate(models):
        colour, marker = LOOKS[model]
        at = [row + 0.16 * (i - (len(models) - 1) / 2) for row in range(len(groups))]
        shares = [group.section("models").section(model) for group in groups]
        values = [100 * share.number("accuracy") for share in shares]
        # Matplotlib takes the lengths of the bars to the left and to the right.
        low = [100 * abs(share["interval"][0] - share.number("accuracy")) for share in shares]
        high = [100 * abs(share["interval"][1] - share.number("accuracy")) for share in shares]
        axes.errorbar(values, at, xerr=[low, high], fmt=marker, color=colour, ms=5, linewidth=1,
                      label=name_of(diagnosis, model))
    for name, (colour, marker) in zip(pairs["published"], PUBLISHED_LOOKS, strict=False):
        axes.plot([100 * group.section("published").number(name) if name in group["published"] else float("nan")
                   for group in groups], range(len(groups)), marker, color=colour, ms=8,
                  label=literal(f"{PUBLISHED.get(name, name)}, published"))
    axes.axvline(50, color=GREY, linestyle="--", linewidth=1, label="chance")
    axes.set_yticks(range(len(groups)), [literal(f"{group['group'].replace('_', ' ')} (n={group['n']})")
                                         for group in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlabel("minimal pairs in which the acceptable sentence scores higher (%), 95 % interval")
    tidy(axes)
    # Matplotlib puts error bars last; here the models come first.
    lines, marks = axes.get_legend_handles_labels(), len(pairs["published"]) + 1
    handles, names = (part[marks:] + part[:marks] for part in lines)
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    figure.suptitle(_title(diagnosis))
    return figure


def reliability_figure(diagnosis: Record) -> Figure:
    """Draws accuracy against confidence, a column for each classifier, with the number of sentences in each bin below."""
    classifiers = list(diagnosis.section("scores"))
    figure = new_figure(1 + 3.2 * len(classifiers), 4.8)
    grid = figure.subplots(2, len(classifiers), sharex=True, sharey="row", squeeze=False, height_ratios=[3, 1])
    for i, model in enumerate(classifiers):
        own, (upper, lower) = diagnosis.section("calibration").section(model), grid[:, i]
        upper.plot([0, 100], [0, 100], color=GREY, linestyle="--", linewidth=1, label=None if i else "perfectly calibrated")
        for (split, values), colour, marker in zip(own.section("splits").items(), (BLUE, VERMILLION, PURPLE), "osD",
                                                   strict=False):
            bins = values["bins"]
            x = [100 * b.number("confidence") for b in bins]
            upper.plot(x, [100 * b.number("accuracy") for b in bins], marker + "-", color=colour, ms=4,
                       label=None if i else literal(spoken(split)))
            lower.plot(x, [b.number("n") for b in bins], marker + "-", color=colour, ms=3)
            # A line of its own for each split, from the bottom.
            line = list(own.section("splits")).index(split)
            upper.annotate(f"ECE {100 * values.number('ece'):.1f} points", (0.97, 0.05 + 0.09 * line), ha="right",
                           xycoords="axes fraction", color=colour, fontsize="small")
        upper.set_title(name_of(diagnosis, model))
        lower.set_xlabel("confidence (%)")
        # The class that a model predicts has at least the probability 1 / K.
        upper.set_xlim(100 / len(diagnosis["classes"]) - 3, 103)
        upper.set_ylim(0, 103)
        tidy(upper)
        tidy(lower)
    grid[0, 0].set_ylabel("accuracy (%)")
    grid[1, 0].set_ylabel("sentences")
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    figure.suptitle(_title(diagnosis))
    return figure


def figures(diagnosis: Record) -> dict[str, Figure]:
    """Draws every plot of a diagnosis, by the name of its file."""
    found = {"reliability": reliability_figure(diagnosis),
             "length": groups_figure(diagnosis, diagnosis["by_length"], "words in the sentence")}
    if diagnosis["by_source"]:
        found["source"] = groups_figure(diagnosis, diagnosis["by_source"][:PLOTTED_SOURCES], "source")
    if pairs := diagnosis["pairs"]:
        found["phenomena"] = pairs_figure(diagnosis, pairs)
    return found


def write(path: Path, out: Path) -> list[Path]:
    """Writes every table as `.tex` and every plot as `.png` and `.pdf` into the folder `out`, and returns their paths."""
    diagnosis, written = read_json(path), []
    for name, table in tables(diagnosis).items():
        written.append(out / f"{name}.tex")
        with replacing(written[-1]) as temporary:
            temporary.write_text(latex(table), encoding="utf-8")

    def draw() -> list[Path]:
        saved = [save_figure(figure, out / name) for name, figure in figures(diagnosis).items()]
        return list(chain.from_iterable(saved))
    return written + draw_finished(draw)
