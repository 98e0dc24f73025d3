"""Draws one run: loss and scores over its training, the confusion matrix, the objective of pretraining.

    curves(run.metrics, run.summary, "mcc")
"""

import math

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from report.records import Record, ReportError, by_class, last_stage, main_split, model_name, spoken
from report.scores import LOSSES, SCORES, score_keys, without_input
from report.style import BLACK, BLUE, GREEN, GREY, PURPLE, STUDENT_LOOKS, VERMILLION, literal, new_figure, tidy


def quantities(problem: str) -> tuple[str, ...]:
    """Returns the quantities that are drawn over the epochs: the loss and the scores of the problem."""
    return ("loss", *score_keys(problem))


def curves(metrics: list[Record], summary: Record, quantity: str, problem: str = "single-label") -> Figure:
    """Draws one quantity over a whole training: training and validation curves, best epoch, majority class and teacher.

    Args:
        metrics: the rows of `metrics.jsonl`; those of a distillation have a "phase", and both students are drawn.
        summary: `summary.json`.
        quantity: "loss", or a score of the problem: "accuracy" (in percent), "mcc" ...
    """
    figure = new_figure(8, 3.6)
    axes = figure.add_subplot()
    _draw(axes, metrics, summary, quantity, problem, numbers=True)
    axes.set_title(literal(_title(summary)), pad=18 if _staged(metrics) else None)
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    return figure


def panels(metrics: list[Record], summary: Record, problem: str = "single-label") -> Figure:
    """Draws every quantity of a training, a panel below the other, with one axis and one legend; as wide as the report."""
    drawn = quantities(problem)
    figure = new_figure(6.5, 1.1 + 1.5 * len(drawn))
    rows = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    for axes, quantity in zip(rows, drawn, strict=True):
        _draw(axes, metrics, summary, quantity, problem, numbers=False, stages=axes is rows[0])
        axes.yaxis.label.set_fontsize(8)
        axes.tick_params(labelsize=8)
        axes.xaxis.label.set_fontsize(9)
        if axes is not rows[-1]:
            axes.set_xlabel("")
    figure.align_ylabels()
    # A line stands in the legend once, though some panels lack it.
    handles = {label: handle for axes in rows for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False,
                  columnspacing=1.2)
    return figure


def _title(summary: Record) -> str:
    how = "distilled" if summary["mode"] == "distil" else str(summary["method"]).replace("lora", "LoRA")
    return f"{summary['model']}, {how}, on {summary['task']} (SR {summary['sr']})"


def _staged(metrics: list[Record]) -> bool:
    return any(row.get("stage", "gold") != "gold" for row in metrics)


def _draw(axes, metrics: list[Record], summary: Record, quantity: str, problem: str, numbers: bool, stages: bool = True
          ) -> None:
    """Draws one quantity into `axes`.

    Args:
        numbers: whether the legend has the numbers of the horizontal lines and of the best epoch.
        stages: whether the names of the stages stand above.
    """
    last = last_stage(metrics)
    distil, staged, first = summary["mode"] == "distil", _staged(metrics), last[0].section("validation")
    main, styles, factor = main_split(first), line_styles(first), _factor(quantity)

    def level(name: str, values: dict[str, float], styles: dict, **look) -> None:
        for split, value in values.items():
            axes.axhline(value, linestyle=styles[split], **look,
                         label=_label(f"{name}, {literal(spoken(split))}", value, factor if numbers else None))

    # A run of LoRA has no phase; a distillation has one for each student, in the order of training.
    for phase in dict.fromkeys(row.get("phase", "") for row in metrics):
        _draw_model(axes, metrics, summary, quantity, phase, numbers)
    if distil:
        scores = summary.section("teacher").section("validation")
        level("teacher", {split: factor * scores.section(split).number(quantity) for split in styles if split in scores},
              styles, color=GREEN)
    ignorant = {} if quantity == "loss" else {
        split: factor * without_input(first.section(split), quantity) for split in styles}
    # Nothing is drawn where it is not known.
    if ignorant and not any(map(math.isnan, ignorant.values())):
        # One line where it does not depend on the split. Dashed and dotted: solid lines are of models.
        nothing = "majority class" if problem == "single-label" else "ignoring the text"
        if len(set(ignorant.values())) == 1 and quantity != "accuracy":
            axes.axhline(next(iter(ignorant.values())), color=GREY, linestyle="--", linewidth=1,
                         label=f"{nothing} (0)" if numbers else f"{nothing}, {literal(spoken(main))}")
        else:
            looks = dict(zip(styles, ["--", (0, (1, 2)), (0, (1, 4))], strict=False))
            level(nothing, ignorant, looks, color=GREY, linewidth=1)
    axis = LOSSES[problem] + (" loss (nats)" if problem == "single-label" else " loss") if quantity == "loss" else (
        SCORES[quantity].name + (" (%)" if factor == 100 else ""))
    # In a panel the caption says the rest.
    short = {"cross-entropy loss (nats)": "cross-entropy (nats)", "Matthews correlation": "MCC",
             "binary cross-entropy loss": "binary CE", "mean squared error loss": "loss (MSE)", "mean squared error": "MSE"}
    axes.set_ylabel((axis if numbers else short.get(axis, axis))
                    + ("\nwith the labels, no KD term" if distil and numbers and quantity == "loss" else ""))
    if staged:
        _mark_stages(axes, metrics, summary, stages)
    else:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlim(min(row["epoch"] for row in metrics) - 0.5, max(row["epoch"] for row in metrics) + 0.5)
    tidy(axes)


def _factor(quantity: str) -> float:
    return 1 if quantity == "loss" else SCORES[quantity].factor


def _label(name: str, value: float, factor: float | None) -> str:
    """Returns a line's name in the legend, with its number unless `factor` is None."""
    return name if factor is None else f"{name} ({value:.1f} %)" if factor == 100 else f"{name} ({value:.3f})"


def _draw_model(axes, metrics: list[Record], summary: Record, quantity: str, phase: str, numbers: bool) -> None:
    """Draws the curves of one model: training rows, each development split, and the best epoch as a star."""
    # Pretraining has an objective of its own, and a figure of its own.
    rows = [(row, at) for row, at in timeline(metrics, summary, phase) if row.get("stage") != "pretrain"]
    first, factor, x = rows[0][0], _factor(quantity), [at for _, at in rows]
    styles, main = line_styles(first.section("validation")), main_split(first.section("validation"))
    colour, marker = STUDENT_LOOKS.get(phase, (BLUE, "o"))
    # More markers than that would hide the dashes of a line.
    marker = marker if len(rows) <= 40 else ""
    before = f"{literal(model_name(phase))}: " if phase else ""
    # The objective of a student holds the KD term too, and could not be compared: the loss is the cross-entropy. A problem
    # without classes records none, and perhaps no score, of its training rows.
    keys = ("cross_entropy", "loss") if quantity == "loss" else (quantity,)
    key = next((key for key in keys if key in first.section("train")), None)
    if key is not None:
        axes.plot(x, [factor * row.section("train").number(key) for row, _ in rows], ":", color=colour if phase else BLACK,
                  marker=marker, ms=3, label=before + "train")
    for split, other in zip(styles, (BLUE, VERMILLION, PURPLE), strict=False):
        values = [factor * row.section("validation").section(split).number(quantity) for row, _ in rows]
        name = split if split == "validation" else f"{'validation, ' if numbers else ''}{literal(spoken(split))}"
        axes.plot(x, values, linestyle=styles[split], color=colour if phase else other, marker=marker, ms=4,
                  label=before + name)
        if split != main:
            continue
        best = (summary.section(phase) if phase else summary).number("best_epoch")
        found = [i for i, (row, _) in enumerate(rows) if row.get("stage", "gold") == "gold" and row.number("epoch") == best]
        if not found:
            raise ReportError(f"{summary.source}: 'best_epoch' is {best:g}, which metrics.jsonl does not have")
        value, at = values[found[0]], x[found[0]]
        axes.axvline(at, color=colour, linewidth=1, alpha=0.4)
        name = f"{before}best epoch" + (f" {best:g}" if numbers or not _staged(metrics) else "")
        axes.plot([at], [value], "*", color=colour, ms=13, markeredgecolor="white", zorder=5,
                  label=_label(name, value, factor if numbers else None))


def timeline(metrics: list[Record], summary: Record, phase: str) -> list[tuple[Record, float]]:
    """Returns the rows of one model with their place on the axis: the epoch, or of several stages the optimiser steps."""
    rows = [row for row in metrics if row.get("phase", "") == phase]
    if not _staged(metrics):
        return [(row, row.number("epoch")) for row in rows]
    found, start = [], 0.0
    for stage in summary.section(phase)["stages"]:
        own = [row for row in rows if row.get("stage") == stage["stage"]]
        # Epochs of both students differ in length: an epoch ends after its share of the stage's tokens.
        done, total = 0.0, sum(row.number("tokens") for row in own)
        for row in own:
            done += row.number("tokens")
            found.append((row, start + stage.number("steps") * done / (total or 1)))
        start += stage.number("steps")
    return found


def _mark_stages(axes, metrics: list[Record], summary: Record, named: bool) -> None:
    """Marks the ends of the stages on an axis of optimiser steps, and writes their names above."""
    phase, start = metrics[0]["phase"], 0.0
    for stage in summary.section(phase)["stages"]:
        end = start + stage.number("steps")
        if start:
            axes.axvline(start, color=BLACK, linewidth=0.8)
        if named and stage["stage"] != "pretrain":
            axes.annotate({"gold": "training set", "transfer": "transfer set"}.get(stage["stage"], stage["stage"]),
                          ((start + end) / 2, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
                          textcoords="offset points", ha="center", fontsize="small", color=GREY)
        start = end
    first = next((stage.number("steps") for stage in summary.section(phase)["stages"] if stage["stage"] == "pretrain"), 0)
    axes.set_xlim(first, start * 1.01)
    axes.set_xlabel("optimiser steps")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def line_styles(validation: Record) -> dict[str, str]:
    """Returns the line style of each development split, the split that chose the epoch first."""
    main = main_split(validation)
    # `all` is in- and out-of-domain together: a third line between the two would add nothing.
    splits = [main] + [split for split in validation if split not in (main, "all")]
    return dict(zip(splits, ["-", "--", "-."], strict=False))


def pretraining_figure(metrics: list[Record], summary: Record) -> Figure:
    """Draws the objective of pretraining, on training rows and on those held out, of the models that have this stage."""
    figure = new_figure(6.5, 2.6)
    axes = figure.add_subplot()
    for phase, (colour, marker) in STUDENT_LOOKS.items():
        rows = [(row, at) for row, at in timeline(metrics, summary, phase) if row.get("stage") == "pretrain"]
        for split, style in (("train", ":"), ("held_out", "-")):
            parts = [row.section("train") if split == "train" else row.section("validation").section(split)
                     for row, _ in rows]
            if parts:
                axes.plot([at for _, at in rows], [part.number("loss") for part in parts], style, color=colour,
                          marker=marker, ms=4, label=f"{model_name(phase)}: {spoken(split).replace('-', ' ')}")
    axes.set(xlabel="optimiser steps", ylabel="its own objective", title=literal(f"pretraining, {_title(summary)}"))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    tidy(axes)
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    return figure


def confusion(summary: Record, shown: dict[str, str] | None = None) -> Figure:
    """Draws the confusion matrix: counts, and shares of each true class.

    Args:
        shown: names of the classes for readers, by their recorded names.

    Raises ReportError if the recorded matrix does not fit the classes.
    """
    split, scores = by_class(summary)
    matrix, recorded = scores["confusion"], list(scores.section("per_class"))
    classes = [(shown or {}).get(name, name) for name in recorded]

    def counts(row: object) -> bool:
        return isinstance(row, list) and len(row) == len(classes) and all(isinstance(count, int) for count in row)

    if not (isinstance(matrix, list) and len(matrix) == len(classes) and all(map(counts, matrix))):
        raise ReportError(f"{scores.source}: 'confusion' must have a row and a column of counts for each class")
    percent = []
    for row in matrix:
        # A class without rows has shares of 0, not 0 / 0.
        total = sum(row) or 1
        percent.append([100 * count / total for count in row])
    size = min(9.0, 2.0 + 0.55 * len(classes))
    figure = new_figure(size + 0.8, size)
    axes = figure.add_subplot()
    image = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, label="share of the true class (%)", shrink=0.8)
    # Counts of more classes would overlap, and so would names of more than 40.
    if len(classes) <= 12:
        for i, row in enumerate(matrix):
            for j, count in enumerate(row):
                axes.text(j, i, f"{count:,}\n{percent[i][j]:.1f} %", ha="center", va="center", fontsize="small",
                          color="white" if percent[i][j] > 60 else BLACK)
    if len(classes) <= 40:
        names = [name if len(name) <= 20 else name[:19] + "…" for name in classes]
        # Long names stand slanted, or neighbours would overlap.
        slanted = max(map(len, names)) * len(names) >= 40
        names = list(map(literal, names))
        axes.set_xticks(range(len(names)), names, rotation=60 if slanted else 0, ha="right" if slanted else "center")
        axes.set_yticks(range(len(names)), names)
    whose = f"{model_name('student')}\n" if summary["mode"] == "distil" else ""
    axes.set(xlabel="predicted class", ylabel="true class",
             title=literal(f"{whose}{spoken(split)}, n = {sum(map(sum, matrix)):,}"))
    axes.title.set_fontsize("medium")
    return figure
