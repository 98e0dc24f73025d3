"""Draws runs, comparisons, sweeps and seeds as PNG and PDF.

    plot_run(Path("runs/LoRA-12345"), Path("plots"))

Every number is from a recorded file: `metrics.jsonl`, `summary.json`, `compare.json`, `sweep.json`, `seeds.json`.
"""

import math
import warnings
from collections.abc import Callable
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

from report.records import (
    STUDENTS,
    Record,
    ReportError,
    by_class,
    last_stage,
    main_split,
    model_name,
    read_json,
    read_metrics,
    replacing,
    shown_splits,
    spoken,
)

# quantity -> (name of its axis, key in "train", key in "validation", factor). The training loss in figures is the
# cross-entropy: the objective of a student holds the KD term too, and could not be compared.
QUANTITIES = {"loss": ("cross-entropy loss (nats)", "cross_entropy", "loss", 1),
              "accuracy": ("accuracy (%)", "accuracy", "accuracy", 100),
              "mcc": ("Matthews correlation", "mcc", "mcc", 1)}
# Okabe and Ito's palette: colour-blind readers can tell these apart.
BLACK, BLUE, VERMILLION, GREEN, PURPLE, GREY = "#222222", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"
SET_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, "#E69F00", "#56B4E9", BLACK)
STUDENT_LOOKS = dict(zip(STUDENTS, ((BLUE, "o"), (VERMILLION, "s")), strict=True))


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure of `width` x `height` inches."""
    # Figure and canvas of its own: pyplot would keep every figure and may open a window.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes, grid: str = "both") -> None:
    """Draws a light grid, and no frame at the top and on the right."""
    axes.grid(alpha=0.25, axis=grid)
    axes.spines[["top", "right"]].set_visible(False)


def literal(text: object) -> str:
    """Returns a text that Matplotlib prints as it is. A pair of $ would make mathematics of the text between them."""
    return str(text).replace("$", r"\$")


# ---------------------------------------------------------------- runs

def curves(metrics: list[Record], summary: Record, quantity: str) -> Figure:
    """Draws one quantity over the epochs: training and validation curves, best epoch, majority class and teacher.

    Args:
        metrics: the rows of `metrics.jsonl`; those of a distillation have a "phase", and both students are drawn.
        summary: `summary.json`.
        quantity: "loss" (nats), "accuracy" (in percent) or "mcc".
    """
    axis_name, train_key, key, factor = QUANTITIES[quantity]
    metrics = last_stage(metrics)
    distil, first = summary["mode"] == "distil", metrics[0].section("validation")
    main, styles = main_split(first), line_styles(first)
    figure = new_figure(8, 3.6)
    axes = figure.add_subplot()

    def label(name: str, value: float) -> str:
        return f"{name} ({value:.1f} %)" if quantity == "accuracy" else f"{name} ({value:.3f})"

    def level(name: str, validation: Record, source: str, **look) -> None:
        for split in [split for split in styles if split in validation]:
            value = factor * validation.section(split).number(source)
            axes.axhline(value, linestyle=styles[split], label=label(f"{name}, {literal(spoken(split))}", value), **look)

    # A run of LoRA has no phase; a distillation has one for each student, in the order of training.
    for phase in dict.fromkeys(row.get("phase", "") for row in metrics):
        rows = [row for row in metrics if row.get("phase", "") == phase]
        epochs = [row.number("epoch") for row in rows]
        colour, marker = STUDENT_LOOKS.get(phase, (BLUE, "o"))
        before = f"{literal(model_name(phase))}: " if phase else ""
        train = [factor * row.section("train").number(train_key) for row in rows]
        axes.plot(epochs, train, ":", color=colour if phase else BLACK, marker=marker, ms=3, label=before + "train")
        for split, other in zip(styles, (BLUE, VERMILLION, PURPLE), strict=False):
            values = [factor * row.section("validation").section(split).number(key) for row in rows]
            axes.plot(epochs, values, linestyle=styles[split], color=colour if phase else other, marker=marker, ms=4,
                      label=before + (split if split == "validation" else f"validation, {literal(spoken(split))}"))
            if split == main:
                best = (summary.section(phase) if phase else summary).number("best_epoch")
                if best not in epochs:
                    raise ReportError(f"{summary.source}: 'best_epoch' is {best:g}, which metrics.jsonl does not have")
                value = values[epochs.index(best)]
                axes.axvline(best, color=colour, linewidth=1, alpha=0.4)
                axes.plot([best], [value], "*", color=colour, ms=13, markeredgecolor="white", zorder=5,
                          label=label(f"{before}best epoch {best:g}", value))
    if distil:
        level("teacher", summary.section("teacher").section("validation"), key, color=GREEN)
    if quantity == "accuracy":
        # Dashed and dotted: solid lines are of models.
        styles = dict(zip(styles, ["--", (0, (1, 2))], strict=False))
        level("majority class", first, "majority_accuracy", color=GREY, linewidth=1)
    if quantity == "mcc":
        axes.axhline(0, color=GREY, linestyle="--", linewidth=1, label="majority class (0)")
    how = "distilled" if distil else str(summary["method"]).replace("lora", "LoRA")
    axes.set_title(literal(f"{summary['model']}, {how}, on {summary['task']} (SR {summary['sr']})"))
    axes.set_xlabel("epoch")
    axes.set_ylabel(axis_name + ("\nwith the labels, no KD term" if distil and quantity == "loss" else ""))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(min(row["epoch"] for row in metrics) - 0.5, max(row["epoch"] for row in metrics) + 0.5)
    tidy(axes)
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    return figure


def line_styles(validation: Record) -> dict[str, str]:
    """Returns the line style of each development split, the split that chose the epoch first."""
    main = main_split(validation)
    # `all` is in- and out-of-domain together: a third line between the two would add nothing.
    splits = [main] + [split for split in validation if split not in (main, "all")]
    return dict(zip(splits, ["-", "--", "-."], strict=False))


def stages_figure(metrics: list[Record], summary: Record) -> Figure:
    """Draws the stages before the training set: the objective of pretraining, MCC on the transfer set, of both students."""
    recorded = {row.get("stage") for row in metrics}
    stages = [stage for stage in ("pretrain", "transfer") if stage in recorded]
    figure = new_figure(4 * len(stages) + 2, 4.2)
    for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        key, axis_name = ("mcc", "Matthews correlation") if stage == "transfer" else ("loss", "its own objective")
        for phase, (colour, marker) in STUDENT_LOOKS.items():
            rows = [row for row in metrics if (row.get("phase"), row.get("stage")) == (phase, stage)]
            # Runs with --no-control have no baseline, and the baseline has no pretraining.
            if not rows:
                continue
            # Both students take the same number of steps, in epochs of different length: the axis is the share of the stage.
            done = [row.number("epoch") / len(rows) for row in rows]
            # More markers than that would hide the dashes of a line.
            marker = marker if len(rows) <= 40 else ""
            axes.plot(done, [row.section("train").number(key) for row in rows], ":", color=colour, marker=marker, ms=3,
                      label=f"{model_name(phase)}: train")
            for split, style in line_styles(rows[0].section("validation")).items():
                values = [row.section("validation").section(split).number(key) for row in rows]
                name = "held out" if stage == "pretrain" else literal(spoken(split))
                axes.plot(done, values, style, color=colour, marker=marker, ms=4, label=f"{model_name(phase)}: {name}")
        axes.set(xlabel="share of the stage's steps", ylabel=axis_name, title=f"stage: {stage}")
        tidy(axes)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize="small", frameon=False)
    figure.suptitle(literal(f"{summary['model']} on {summary['task']} (SR {summary['sr']})"))
    return figure


def confusion(summary: Record) -> Figure:
    """Draws the confusion matrix: counts, and shares of each true class.

    Raises ReportError if the recorded matrix does not fit the classes.
    """
    split, scores = by_class(summary)
    matrix, classes = scores["confusion"], list(scores.section("per_class"))

    def counts(row: object) -> bool:
        return isinstance(row, list) and len(row) == len(classes) and all(isinstance(count, int) for count in row)

    if not (isinstance(matrix, list) and len(matrix) == len(classes) and all(map(counts, matrix))):
        raise ReportError(f"{scores.source}: 'confusion' must have a row and a column of counts for each class")
    percent = []
    for row in matrix:
        # A class without rows has shares of 0, not 0 / 0.
        total = sum(row) or 1
        percent.append([100 * count / total for count in row])
    size = min(9.0, 3.2 + 0.55 * len(classes))
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
    whose = f"{model_name('student')}: " if summary["mode"] == "distil" else ""
    axes.set(xlabel="predicted class", ylabel="true class",
             title=literal(f"{whose}{spoken(split)}, n = {sum(map(sum, matrix)):,}"))
    return figure


# ---------------------------------------------------------------- comparisons and sweeps

def compare_figure(compare: Record) -> Figure:
    """Draws accuracy of the best epoch against trained parameters, with the majority class as a dashed line."""
    done = sorted((entry for entry in compare["entries"] if "best" in entry),
                  key=lambda entry: entry.section("parameters").number("trainable"))
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    x = [entry.section("parameters").number("trainable") for entry in done]
    main = compare.section("selection")["split"]
    splits = sorted(shown_splits(compare.section("selection")["splits"]), key=lambda split: split != main)
    for split, colour, marker in zip(splits, (BLUE, VERMILLION, PURPLE), "osD", strict=False):
        spreads = [entry.section("best").section(split).section("accuracy") for entry in done]
        y = [100 * spread.number("mean") for spread in spreads]
        sd = [0 if math.isnan(spread.number("sd")) else 100 * spread.number("sd") for spread in spreads]
        axes.errorbar(x, y, yerr=sd, fmt=marker, color=colour, ms=6, capsize=4, label=literal(spoken(split)),
                      zorder=3 if split == main else 2, markerfacecolor=colour if split == main else "white")
        level = 100 * done[0].section("majority_accuracy").number(split)
        axes.axhline(level, color=colour, linestyle="--", linewidth=1, alpha=0.7,
                     label=f"majority class, {literal(spoken(split))} ({level:.1f} %)")
    _label_points(axes, x, [100 * entry.section("best").section(main).section("accuracy").number("mean")
                            for entry in done], [str(entry["entry"]) for entry in done])
    _parameter_axis(axes, x)
    seeds = len(compare["seeds"])
    axes.set_ylabel("accuracy (%), best epoch" + (f"\nmean and sd of {seeds} seeds" if seeds > 1 else ""))
    axes.set_title(literal(f"{compare['model']} on {compare['task']} (SR {compare['sr']})"))
    axes.margins(y=0.12)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    return figure


def _label_points(axes, x: list[float], y: list[float], names: list[str]) -> None:
    """Writes a name above each point, or below if the neighbour to the left is close."""
    for i, (at, value, name) in enumerate(zip(x, y, names, strict=True)):
        below = i % 2 == 1 and (at < 4 * max(x[i - 1], 1))
        axes.annotate(literal(name), (at, value), xytext=(7, -13 if below else 7), textcoords="offset points",
                      fontsize="small", color=BLACK, bbox={"fc": "white", "ec": "none", "pad": 0.5, "alpha": 0.7})


def sweep_figure(sweep: Record) -> Figure:
    """Draws the score of each trial against its parameters, the importance of options, and means by roles and layers.

    Raises ReportError if no trial has a score.
    """
    trials = [trial for trial in sweep["trials"] if trial["parameters"] and trial["score"] is not None]
    if not trials:
        raise ReportError(f"{sweep.source}: no trial has a score")
    search, importance = sweep.section("search"), sweep["importance"] or {}
    sets = [name for name in ("targets", "layers") if name in sweep.section("means")]
    panels = ([importance] if importance else []) + sets
    figure = new_figure(10 if panels else 7, 4.5)
    grid = figure.add_gridspec(max(1, len(panels)), 2 if panels else 1, width_ratios=[1.7, 1] if panels else None)
    axes = figure.add_subplot(grid[:, 0])
    # The colour of a point tells its set of roles, or of layers if the search has no roles.
    colour_of = sets[0] if sets else None
    choices = search[colour_of] if colour_of else [None]
    for i, choice in enumerate(choices):
        own = [trial for trial in trials if colour_of is None or trial.section("params")[colour_of] == choice]
        colour, label = SET_COLOURS[i % len(SET_COLOURS)], "trial" if choice is None else literal(f"{colour_of} {choice}")
        for states, look in ((("complete",), {"color": colour, "label": label}),
                             (("pruned", "diverged"), {"facecolors": "none", "edgecolors": colour})):
            points = [(trial.section("parameters").number("trainable"), trial.number("score")) for trial in own
                      if trial["state"] in states]
            axes.scatter(*zip(*points, strict=True) if points else ([], []), s=30, **look)
    if any(trial["state"] in ("pruned", "diverged") for trial in trials):
        axes.scatter([], [], facecolors="none", edgecolors=GREY, label="pruned: best until then")
    for trial in trials:
        if trial["number"] == sweep["best"]:
            axes.plot([trial.section("parameters").number("trainable")], [trial.number("score")], "*", color=BLACK, ms=15,
                      markerfacecolor="none", label=f"best: trial {trial['number']} ({trial.number('score'):.3f})")
    axes.axhline(0, color=GREY, linestyle="--", linewidth=1, label="majority class (0)")
    _parameter_axis(axes, [trial.section("parameters").number("trainable") for trial in trials])
    axes.set_ylabel(literal(f"MCC, best epoch, {spoken(sweep.section('selection')['split'])}"))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=4, fontsize="small", frameon=False)
    for i, panel in enumerate(panels):
        side = figure.add_subplot(grid[i, 1])
        if panel is importance:
            _bars(side, list(importance), list(importance.values()))
            side.set_xlabel("importance (share of variance, fANOVA)")
        else:
            _bars(side, [f"{row['value']} (n={row['n']})" for row in sweep.section("means")[panel]],
                  [row.number("mean") for row in sweep.section("means")[panel]],
                  [row.number("sd") for row in sweep.section("means")[panel]])
            side.set_xlabel(f"mean MCC by {panel}, sd (n complete trials)")
    figure.suptitle(literal(f"{sweep['model']} on {sweep['task']} (SR {sweep['sr']})"))
    return figure


def _bars(axes, names: list[str], values: list[float], sd: list[float] | None = None) -> None:
    """Draws horizontal bars, the first on top."""
    axes.barh(range(len(names)), [0 if math.isnan(value) else value for value in values], color=BLUE, height=0.6,
              xerr=sd, capsize=3)
    axes.set_yticks(range(len(names)), list(map(literal, names)), fontsize="small")
    axes.invert_yaxis()
    tidy(axes, "x")


def _parameter_axis(axes, x: list[float]) -> None:
    """Makes x a logarithmic axis of trained parameters, with room at 0 for a model that trains nothing."""
    low, high = min((value for value in x if value > 0), default=1), max(*x, 1)
    # Less than two decades have ticks at 1, 2 and 5, more at powers of ten alone.
    steps = (1, 2, 5) if high < 100 * low else (1,)
    ticks = [step * 10 ** power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
             for step in steps]
    if min(x) > 0:
        axes.set_xscale("log")
        # Room on the right for the name of the last point.
        axes.set_xlim(low / 1.5, high * max(1.5, (high / low) ** 0.12))
    else:
        axes.set_xscale("symlog", linthresh=ticks[0], linscale=0.5)
        axes.axvline(0, color=GREY, linewidth=0.5)
        axes.set_xlim(-ticks[0] / 2, high * max(2, (high / ticks[0]) ** 0.12))
        ticks = [0, *ticks]
    axes.set_xticks([tick for tick in ticks if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]])
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("trained parameters")
    tidy(axes)


def seeds_figure(study: Record) -> Figure:
    """Draws the MCC of every seed with mean and 95 % interval, of best and last epoch: a panel for each split."""
    splits = shown_splits(study.section("selection")["splits"])
    lines = [(f"{literal(model_name(entry['entry']))}, {which} epoch", entry, which) for entry in study["entries"]
             for which in ("best", "last") if which in entry]
    figure = new_figure(8, 1.6 + 0.35 * len(lines))
    for axes, split in zip(figure.subplots(1, len(splits), sharey=True, squeeze=False)[0], splits, strict=True):
        for i, (_, entry, which) in enumerate(lines):
            spread = entry.section(which).section(split).section("mcc")
            axes.plot(spread["values"], [i] * len(spread["values"]), "o", ms=4, color=BLUE, alpha=0.5,
                      label=None if i else "one seed")
            # A single seed has no interval.
            half = (spread["interval"][1] - spread["interval"][0]) / 2 if spread.get("interval") else 0
            axes.errorbar([spread.number("mean")], [i + 0.22], xerr=[half], fmt="D", ms=4, capsize=4, color=VERMILLION,
                          label=None if i else "mean, 95 % interval")
        axes.set_yticks(range(len(lines)), [name for name, _, _ in lines])
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.set(xlabel="Matthews correlation (0: majority class)", title=literal(spoken(split)))
        tidy(axes, "x")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    figure.suptitle(literal(f"{study['model']} on {study['task']}, {study['of']}, {len(study['seeds'])} seeds"))
    return figure


# ---------------------------------------------------------------- files

def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Writes a figure as `.png` (200 dpi) and `.pdf`, in this order; the same figure gives the same bytes."""
    written = []
    # By default, version of Matplotlib and time of creation would stand in the files.
    for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        written.append(stem.with_name(f"{stem.name}.{kind}"))
        with replacing(written[-1]) as temporary:
            figure.savefig(temporary, format=kind, dpi=200, metadata=metadata)
    return written


def plot_run(run_dir: Path, plots_dir: Path) -> list[Path]:
    """Draws a run's loss, accuracy, MCC, confusion matrix and earlier stages as `<mode>-<SR>_<quantity>.png` and `.pdf`.

    Raises ReportError where a file of the run is missing or malformed.
    """
    summary, path = read_json(run_dir / "summary.json"), run_dir / "metrics.jsonl"
    # The method "none" trains nothing and has no epochs.
    metrics = read_metrics(path) if path.exists() or summary.get("method") != "none" else []
    figures = {quantity: curves(metrics, summary, quantity) for quantity in QUANTITIES if metrics}
    if len(last_stage(metrics)) < len(metrics):
        figures["stages"] = stages_figure(metrics, summary)
    if "by_class" in summary or "by_class" in summary.get("student", {}):
        figures["confusion"] = confusion(summary)
    written = []
    for quantity, figure in figures.items():
        written += save_figure(figure, plots_dir / f"{summary['mode']}-{summary['sr']}_{quantity}")
    return written


def plot_study(path: Path, plots_dir: Path) -> list[Path]:
    """Draws compare.json, sweep.json or seeds.json as `.png` and `.pdf`.

    The files are `<mode>-<SR>`; those of seeds are `<mode>-<SR>_seeds`, with the mode of the runs.

    Raises ReportError where the file is missing or malformed.
    """
    study = read_json(path)
    figure = {"compare": compare_figure, "sweep": sweep_figure, "seeds": seeds_figure}[study["mode"]](study)
    stem = f"{study['of']}-{study['sr']}_seeds" if study["mode"] == "seeds" else f"{study['mode']}-{study['sr']}"
    return save_figure(figure, plots_dir / stem)


def draw_finished(draw: Callable[[], list[Path]]) -> list[Path]:
    """Returns the files of `draw()`, or warns in one line that it failed and returns none.

    A plot after hours of training must not end the run: neither a full disk nor a name that Matplotlib cannot print.

    Raises ReportError where a recorded file is malformed: more than the plots depends on it.
    """
    try:
        return draw()
    except ReportError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        warnings.warn(f"no plots: {reason[0]}; the results are complete", stacklevel=2)
        return []
