"""Writes a diagnosis (diagnose.json) as text, LaTeX tables and plots.

    write(Path("runs/diagnose-LoRA-12345/diagnose.json"), Path("runs/diagnose-LoRA-12345"))
"""

from pathlib import Path
from typing import NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from report.figures import BLACK, BLUE, GREEN, GREY, PURPLE, VERMILLION, save_figure
from report.latex import escape, tabular
from report.records import Record, read_json, replacing, spoken
from report.studies import aligned

MODELS = {"teacher": "teacher", "student": "student with KD", "scratch": "no-KD baseline",
          "language_model": "bare language model"}
LOOKS = {"teacher": (GREEN, "D"), "student": (BLUE, "o"), "scratch": (VERMILLION, "s"), "language_model": (BLACK, "^")}
PUBLISHED = {"ngram": "5-gram", "lstm": "LSTM", "transformer_xl": "Transformer-XL", "gpt2": "GPT-2"}
PUBLISHED_LOOKS = ((GREY, "x"), (PURPLE, "+"), ("#E69F00", "1"), ("#56B4E9", "2"))
SHOWN = 10  # rows of a table on the terminal; the files have all
PLOTTED_SOURCES = 25


class Table(NamedTuple):
    """Holds a table as plain text cells, the first `left` columns aligned to the left."""

    title: str
    head: list[str]
    rows: list[list[str]]
    left: int = 1


def name_of(diagnosis: Record, model: str) -> str:
    """Returns a model's name in a table: of a LoRA run, which has no student, the teacher is the classifier."""
    return "classifier" if diagnosis["of"] == "LoRA" and model == "teacher" else MODELS.get(model, model)


def tables(diagnosis: Record) -> dict[str, Table]:
    """Returns every table of a diagnosis by its file's name; a part that was left out has none."""
    classifiers = list(diagnosis.section("scores"))
    names = [name_of(diagnosis, model) for model in classifiers]
    found = {"scores": _scores(diagnosis, classifiers), "calibration": _calibration(diagnosis, classifiers)}
    for key, title in (("source", "By source"), ("length", "By length in words")):
        if groups := diagnosis[f"by_{key}"]:
            found[key] = Table(f"{title}, all splits together: accuracy (%), MCC", [key, "n", "majority", *(
                text for name in names for text in (name, "MCC"))], [
                [group["group"], str(group["n"]), _percent(group.number("majority_accuracy"))] + [
                    text for model in classifiers for text in _accuracy_and_mcc(group.section("models").section(model))]
                for group in groups])
    if pairs := diagnosis["pairs"]:
        for key, title in (("phenomena", "By phenomenon"), ("paradigms", "By paradigm")):
            found[key] = _pairs(diagnosis, pairs, key, title)
        if all(group["group"] == group["phenomenon"] for group in pairs["paradigms"]):
            del found["paradigms"]  # the same again
    if rows := diagnosis["disagreements"]:
        found["disagreements"] = _sentences(diagnosis, rows, "Teacher and student disagree most: probability of the label")
    if rows := diagnosis.section("all_wrong")["rows"]:
        n = diagnosis.section("all_wrong")["n"]
        found["all_wrong"] = _sentences(diagnosis, rows, f"All wrong ({n} sentences): probability of the label")
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _accuracy_and_mcc(scores: Record) -> list[str]:
    return [_percent(scores.number("accuracy")), "n/a" if scores["mcc"] is None else f"{scores.number('mcc'):.3f}"]


def _scores(diagnosis: Record, classifiers: list[str]) -> Table:
    rows = []
    for split, n in diagnosis.section("splits").items():
        parts = [diagnosis.section("scores").section(model).section(split) for model in classifiers]
        rows.append(["majority class", spoken(split), str(n), _percent(parts[0].number("majority_accuracy")), "0"])
        rows += [[name_of(diagnosis, model), spoken(split), str(n), *_accuracy_and_mcc(part)]
                 for model, part in zip(classifiers, parts, strict=True)]
    return Table("Scores", ["model", "split", "n", "accuracy (%)", "MCC"], rows, 2)


def _calibration(diagnosis: Record, classifiers: list[str]) -> Table:
    rows = []
    for model in classifiers:
        own = diagnosis.section("calibration").section(model)
        for split, values in own.section("splits").items():
            rows.append([name_of(diagnosis, model), spoken(split), f"{own.number('temperature'):.3g}"
                         + (" (fitted here)" if split == own["fitted_on"] else ""),
                         *(_percent(values.number(key)) for key in ("ece", "ece_scaled")),
                         *(f"{values.number(key):.3f}" for key in ("nll", "nll_scaled"))])
    return Table("Calibration: expected calibration error (ECE, points of 100) and loss (nats), as it is and at the "
                 "temperature that mends it",
                 ["model", "split", "temperature", "ECE", "ECE at T", "loss", "loss at T"], rows, 2)


def _pairs(diagnosis: Record, pairs: Record, key: str, title: str) -> Table:
    models, published = list(pairs.section("overall").section("models")), pairs["published"]
    rows = [[group["group"].replace("_", " ") if key == "phenomena" else group["group"], str(group["n"])] + [
        _percent(group.section("models").section(model).number("accuracy")) for model in models] + [
        _percent(group.section("published").number(name)) if name in group["published"] else "" for name in published]
        for group in [*pairs[key], Record({**pairs.section("overall"), "group": "all"}, pairs.source)]]
    return Table(f"{title}: pairs (%) of which the right sentence scores higher; chance is 50"
                 + (", published figures to the right" if published else ""),
                 [key, "pairs", *(name_of(diagnosis, model) for model in models),
                  *(f"{PUBLISHED.get(name, name)}, published" for name in published)], rows)


def _sentences(diagnosis: Record, rows: list[Record], title: str) -> Table:
    models = list(rows[0].section("models"))
    return Table(title, ["sentence", "label", *(name_of(diagnosis, model) for model in models)], [
        [row["sentence"] if len(row["sentence"]) <= 80 else row["sentence"][:77] + "...", row["label"],
         *(f"{row.section('models').section(model).number('probability_of_label'):.2f}" for model in models)]
        for row in rows])


def diagnosis_text(diagnosis: Record) -> str:
    """Returns a diagnosis for the terminal: the first rows of every table, and what was left out."""
    lines = [f"{diagnosis['run']} ({diagnosis['of']}): {diagnosis['model']} on {diagnosis['task']}"]
    for name, table in tables(diagnosis).items():
        if name == "paradigms":
            continue
        short = name in ("source", "disagreements", "all_wrong") and len(table.rows) > SHOWN
        lines += ["", table.title, *aligned([table.head, *(table.rows[:SHOWN] if short else table.rows)])]
        if short:
            lines.append(f"... and {len(table.rows) - SHOWN} more rows in {name}.tex and diagnose.json")
    pairs = diagnosis["pairs"]
    if pairs and pairs["limit"] and pairs["published"]:
        lines.append(f"The first {pairs['limit']} pairs of each paradigm; the published figures are of 1,000.")
    return "\n".join(lines + ["", *(f"left out: {what}" for what in diagnosis["left_out"])]).rstrip("\n")


def latex(table: Table) -> str:
    """Returns a table for a paper."""
    rows = [[escape(cell) for cell in row] for row in table.rows]
    return tabular("l" * table.left + "r" * (len(table.head) - table.left), " & ".join(map(escape, table.head)), rows)


# ---------------------------------------------------------------- plots

def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes, grid: str = "both") -> None:
    axes.grid(alpha=0.25, axis=grid)
    axes.spines[["top", "right"]].set_visible(False)


def _title(diagnosis: Record) -> str:
    return f"{diagnosis['model']} on {diagnosis['task']}".replace("$", r"\$")


def groups_figure(diagnosis: Record, groups: list[Record], what: str) -> Figure:
    """Draws accuracy and MCC of every classifier in each group, the majority class's accuracy as a grey mark."""
    figure = _figure(9, 1.6 + 0.3 * len(groups))
    left, right = figure.subplots(1, 2, sharey=True)
    y = range(len(groups))
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
    left.set_yticks(y, [f"{group['group']} (n={group['n']})".replace("$", r"\$") for group in groups])
    left.invert_yaxis()
    left.set(xlabel="accuracy (%)", ylabel=what)
    right.set_xlabel("Matthews correlation (0: majority class)")
    for axes in (left, right):
        _tidy(axes)
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    figure.suptitle(_title(diagnosis))
    return figure


def pairs_figure(diagnosis: Record, pairs: Record) -> Figure:
    """Draws the share of minimal pairs that each model has right, by phenomenon, beside the published figures."""
    groups = pairs["phenomena"]
    figure = _figure(9, 2 + 0.42 * len(groups))
    axes = figure.add_subplot()
    models = list(pairs.section("overall").section("models"))
    for i, model in enumerate(models):
        colour, marker = LOOKS[model]
        at = [row + 0.16 * (i - (len(models) - 1) / 2) for row in range(len(groups))]
        shares = [group.section("models").section(model) for group in groups]
        values = [100 * share.number("accuracy") for share in shares]
        bars = [[100 * abs(share["interval"][end] - share.number("accuracy")) for share in shares] for end in (0, 1)]
        axes.errorbar(values, at, xerr=bars, fmt=marker, color=colour, ms=5, linewidth=1, label=name_of(diagnosis, model))
    for name, (colour, marker) in zip(pairs["published"], PUBLISHED_LOOKS, strict=False):
        axes.plot([100 * group.section("published").number(name) if name in group["published"] else float("nan")
                   for group in groups], range(len(groups)), marker, color=colour, ms=8,
                  label=f"{PUBLISHED.get(name, name)}, published")
    axes.axvline(50, color=GREY, linestyle="--", linewidth=1, label="chance")
    axes.set_yticks(range(len(groups)), [f"{group['group'].replace('_', ' ')} (n={group['n']})".replace("$", r"\$")
                                         for group in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlabel("minimal pairs of which the acceptable sentence scores higher (%), 95 % interval")
    _tidy(axes)
    lines, marks = axes.get_legend_handles_labels(), len(pairs["published"]) + 1
    handles, names = (part[marks:] + part[:marks] for part in lines)  # Matplotlib has error bars last
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    figure.suptitle(_title(diagnosis))
    return figure


def reliability_figure(diagnosis: Record) -> Figure:
    """Draws accuracy against confidence, a column for each classifier, with the number of rows of each bin below."""
    classifiers = list(diagnosis.section("scores"))
    figure = _figure(1 + 3.2 * len(classifiers), 4.8)
    grid = figure.subplots(2, len(classifiers), sharex=True, sharey="row", squeeze=False, height_ratios=[3, 1])
    for i, model in enumerate(classifiers):
        own, (upper, lower) = diagnosis.section("calibration").section(model), grid[:, i]
        upper.plot([0, 100], [0, 100], color=GREY, linestyle="--", linewidth=1, label=None if i else "perfectly calibrated")
        for (split, values), colour, marker in zip(own.section("splits").items(), (BLUE, VERMILLION, PURPLE), "osD",
                                                   strict=False):
            bins = values["bins"]
            x = [100 * b.number("confidence") for b in bins]
            upper.plot(x, [100 * b.number("accuracy") for b in bins], marker + "-", color=colour, ms=4,
                       label=None if i else spoken(split))
            lower.plot(x, [b.number("n") for b in bins], marker + "-", color=colour, ms=3)
            line = list(own.section("splits")).index(split)
            upper.annotate(f"ECE {100 * values.number('ece'):.1f} points", (0.97, 0.05 + 0.09 * line), ha="right",
                           xycoords="axes fraction", color=colour, fontsize="small")
        upper.set_title(name_of(diagnosis, model))
        lower.set_xlabel("confidence (%)")
        upper.set_xlim(100 / len(diagnosis["classes"]) - 3, 103)
        upper.set_ylim(0, 103)
        for axes in (upper, lower):
            _tidy(axes)
    grid[0, 0].set_ylabel("accuracy (%)")
    grid[1, 0].set_ylabel("sentences")
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    figure.suptitle(_title(diagnosis))
    return figure


def figures(diagnosis: Record) -> dict[str, Figure]:
    """Draws every plot of a diagnosis, by its file's name."""
    found = {"reliability": reliability_figure(diagnosis),
             "length": groups_figure(diagnosis, diagnosis["by_length"], "words in the sentence")}
    if diagnosis["by_source"]:
        found["source"] = groups_figure(diagnosis, diagnosis["by_source"][:PLOTTED_SOURCES], "source")
    if pairs := diagnosis["pairs"]:
        found["phenomena"] = pairs_figure(diagnosis, pairs)
    return found


def write(path: Path, out: Path) -> list[Path]:
    """Writes every table as `.tex` and every plot as `.png` and `.pdf` into a folder."""
    diagnosis, written = read_json(path), []
    for name, table in tables(diagnosis).items():
        written.append(out / f"{name}.tex")
        with replacing(written[-1]) as temporary:
            temporary.write_text(latex(table), encoding="utf-8")
    for name, figure in figures(diagnosis).items():
        written += save_figure(figure, out / name)
    return written
