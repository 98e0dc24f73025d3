"""Draws runs, comparisons, sweeps and seeds as PNG and PDF.

    plot_run(Path("runs/LoRA-12345"), Path("plots"))

Every number is from a recorded file: `metrics.jsonl`, `summary.json`, `compare.json`, `sweep.json`, `seeds.json`.
"""

import math
import warnings
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

from report.curves import confusion, curves, pretraining_figure, quantities
from report.records import Record, ReportError, model_name, read_json, shown_splits, spoken
from report.runs import Run
from report.style import BLACK, BLUE, GREY, PURPLE, SET_COLOURS, VERMILLION, literal, new_figure, save_figure, tidy

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

def plot_run(run_dir: Path, plots_dir: Path) -> list[Path]:
    """Draws a run's loss, its scores, its confusion matrix and its pretraining as `<mode>-<SR>_<quantity>.png` and `.pdf`.

    Raises ReportError where a file of the run is missing or malformed.
    """
    run = Run(run_dir)
    figures = {quantity: curves(run.metrics, run.summary, quantity, run.problem) for quantity in plotted(run)
               if quantity in quantities(run.problem)}
    if "pretrain" in plotted(run):
        figures["pretrain"] = pretraining_figure(run.metrics, run.summary)
    if "confusion" in plotted(run):
        figures["confusion"] = confusion(run.summary, run.class_names)
    written = []
    for quantity, figure in figures.items():
        written += save_figure(figure, plots_dir / f"{run.summary['mode']}-{run.summary['sr']}_{quantity}")
    return written


def plotted(run: Run) -> list[str]:
    """Returns the quantities that `plot_run` draws."""
    # The method "none" trains nothing and has no epochs.
    found = list(quantities(run.problem)) if run.metrics else []
    found += ["pretrain"] if any(row.get("stage") == "pretrain" for row in run.metrics) else []
    return found + (["confusion"] if run.has_confusion() else [])


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
