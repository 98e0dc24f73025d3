"""Ends a mode: plots, the folder of the results, and an exit status for a run that diverged or was stopped.

    return endings.train(args, options, start)
"""
from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from machine import processes, signals
from machine.streams import complain
from metrics.problems import SINGLE_LABEL, Problem
from options.schema import RunOptions
from record.files import check_folder, make_folder
from train_utils import Diverged

DIVERGED = 3  # exit status after a loss that is not finite


def train(args, options: RunOptions, start: Callable[[], None]) -> int:
    """Runs a training, draws it and returns the exit status.

    Args:
        start: runs the training and prints its result.

    Raises:
        UserError: bad input; nothing is written.
    """
    # The folder of plots is made after the training: bad input leaves nothing behind.
    check_folder(args.plots)
    again = again_with(*([] if args.resume else ["--resume"]))
    try:
        if args.no_plots or not processes.broadcast(args.resume and _lacks_only_plots(options, args.plots)):
            start()
        plots = []
        if not args.no_plots and processes.is_main():
            # Late: Matplotlib would delay the first step.
            from report import figures

            plots = figures.draw_finished(lambda: figures.plot_run(options.out, make_folder(args.plots)))
    except Diverged as error:
        complain(error)
        return DIVERGED
    except processes.Lost as error:
        complain(f"{error}; continue with: {again}")
        return 1
    except signals.Interrupted as error:
        # Without a checkpoint there is nothing to resume.
        begun = any(options.out.glob("*checkpoint.safetensors")) or (options.out / "summary.json").exists()
        complain(f"stopped; continue with: {again}" if begun else
                 "stopped before anything was trained; the same command begins again")
        return 128 + error.signal
    _print_places("run", options.out, plots)
    return 0


def score_table(rows: dict[str, dict], problem: Problem = SINGLE_LABEL, more: dict[str, dict[str, str]] | None = None
                ) -> str:
    """Formats accuracy and MCC, or the problem's scores, on each split: a line for each row; 95 columns for three splits.

    Args:
        rows: name -> split -> scores.
        more: heading -> row's name -> cell, of the columns before the scores.
    """
    more = more or {}
    # Each score has the width of its heading. A split with a long name is wider: its first score fills the rest.
    first, *others = problem.shown.items()
    own = {key: max(7, len(heading) + 2) for key, heading in others}
    rest = sum(own.values())
    widths = {split: max(10 + rest, len(split) + 2) for split in next(iter(rows.values()))}
    before = "".join(f"{heading:>13}" for heading in more)
    headings = "".join(f"{heading:>{own[key]}}" for key, heading in others)
    lines = [f"  {'':<16}{'':<{len(before)}}" + "".join(f"{split:>{width}}" for split, width in widths.items()),
             f"  {'':<16}{before}" + "".join(f"{first[1]:>{width - rest}}{headings}" for width in widths.values())]
    for name, row in rows.items():
        cells = "".join(f"{column[name]:>13}" for column in more.values())
        for split, width in widths.items():
            cells += f"{row[split][first[0]]:>{width - rest}.3f}"
            cells += "".join(f"{row[split][key]:>{own[key]}.3f}" for key, _ in others)
        lines.append(f"  {name:<16}{cells}")
    return "\n".join(lines)


def study(args, out: Path, start: Callable[[], object], name: str) -> int:
    """Runs a comparison, a sweep or seeds, draws it and returns the exit status.

    Args:
        start: runs the study.
        name: of the study's file in `out`, without .json.
    """
    from report import figures

    check_folder(args.plots)
    try:
        start()
        plots = [] if args.no_plots else figures.draw_finished(
            lambda: figures.plot_study(out / f"{name}.json", make_folder(args.plots)))
    except signals.Interrupted as error:
        return interrupted(error)
    _print_places(name, out, plots)
    return 0


def interrupted(error: signals.Interrupted) -> int:
    """Prints the command that continues, for a mode that finds its finished runs itself; returns the exit status."""
    complain(f"stopped; continue with: {again_with()}")
    return 128 + error.signal


def again_with(*more: str) -> str:
    """Returns this command line with more words, to continue with."""
    # With --overwrite, the command would begin anew.
    return f"{processes.launcher()} run.py " + shlex.join([*(word for word in sys.argv[1:] if word != "--overwrite"), *more])


def _print_places(name: str, out: Path, plots: list[Path]) -> None:
    """Prints the folder of the results, and the plots."""
    print(f"{name}: {out}")
    if plots:
        print(f"plots: {', '.join(str(path) for path in plots if path.suffix == '.png')}")


def _lacks_only_plots(options: RunOptions, plots: Path) -> bool:
    """Returns whether the run is finished but was stopped before its plots were drawn."""
    from report import figures

    if not all((options.out / name).exists() for name in ("summary.json", "metrics.jsonl")):
        return False
    names = [f"{options.mode}-{options.sr}_{quantity}" for quantity in figures.plotted(figures.Run(options.out))]
    return not all((plots / f"{name}.{kind}").exists() for name in names for kind in ("png", "pdf"))


def less_memory(args) -> str:
    """Returns advice after memory ran out: the same optimiser step in smaller batches."""
    size, tokens = getattr(args, "batch_size", None), getattr(args, "batch_tokens", None)
    if tokens:
        less = f" with --batch-tokens {tokens}; try --batch-tokens {max(1, tokens // 2)}"
    elif size and size > 1:
        less = f" with --batch-size {size}; try --batch-size {size // 2}"
    else:
        return f"{' with --batch-size 1' if size else ''}; try a smaller --max-length, or a smaller model"
    return less + f" --accumulate {2 * args.accumulate}, which is the same step, and --overwrite; checkpoints are kept"
