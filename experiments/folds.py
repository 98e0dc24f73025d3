"""Cross-validation: `LoRA` once for each fold of the training rows, which is its development split; means and intervals.

    python run.py LoRA 12345 --folds 5

The folds have all classes in the same shares, and the seed decides them. Each fold is an ordinary run in a subfolder of
runs/LoRA-12345-folds/, made by `run.py` in a process of its own; finished ones stay. Development files are not read.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from experiments import compare, endings, finetune
from experiments.arguments import choose
from experiments.seeds import SeedRun, check_options, lora_run
from experiments.significance import over_seeds
from experiments.variants import Variant, settings
from machine.errors import UserError
from machine.progress import Bar
from metrics.problems import PROBLEMS, recorded_problem
from record.files import write_json
from record.folder import provenance
from record.ownership import check_out


def run_folds(args, runs: list[SeedRun], out: Path, say: Callable[[str], None] = print) -> dict:
    """Runs the missing folds and writes summary.json.

    Args:
        args: the parsed command line.
        runs: one for each fold.

    Returns:
        The content of summary.json.

    Raises:
        UserError: bad input, before anything is written; a folder with other options or data; a fold that failed or
            diverged.
        signals.Interrupted: asked to stop; the run at work has saved its state.
    """
    check_out(out, "folds")
    # Before the first run: the options of one fold are checked for all.
    task = finetune.check(runs[0].run)
    problem, record = PROBLEMS[task.problem], provenance(settings(args), task.files)
    with compare.study_folder(out, record, args.overwrite):
        if args.overwrite:
            (out / "summary.json").unlink(missing_ok=True)
        for run in runs:
            check_options(run)
        threads = compare.threads_each([run.folder for run in runs], torch.get_num_threads(), args.jobs)
        summaries = []
        found = compare.finished_runs([(run.words, run.folder) for run in runs], threads, args.jobs)
        with Bar(runs, unit="fold", desc="folds") as bar:
            for run in bar:
                bar.set_postfix_str(run.folder.name)
                # Without one fold the mean would be of other rows than all training rows.
                if (summary := next(found)) is None:
                    raise UserError(f"{run.folder}: diverged; lower --lr")
                summaries.append(summary)
        spreads, first = over_seeds(summaries), summaries[0]
        result = {"mode": "folds", "of": "LoRA", "sr": args.sr, **{key: first[key] for key in ("model", "task", "method")},
                  "classes": first["classes"], **recorded_problem(problem), **record, "folds": args.folds,
                  "parameters": first["parameters"], "validation": means(summaries, spreads["best"]),
                  "last_validation": means(summaries, spreads["last"]), "intervals": spreads,
                  "runs": [run.folder.name for run in runs]}
        write_json(out / "summary.json", result)
    say(folds_text(result))
    return result


def means(summaries: list[dict], spreads: dict) -> dict[str, dict[str, float]]:
    """Returns the mean of each score by split, in the form of a run's summary.json; n is the sum."""
    found = {}
    for split, scores in spreads.items():
        rows = sum(summary["validation"][split]["n"] for summary in summaries)
        found[split] = {"n": rows, **{name: one["mean"] for name, one in scores.items()}}
    return found


def folds_text(result: dict) -> str:
    """Formats mean, standard deviation and interval of each score over the folds."""
    problem = PROBLEMS[result.get("problem", "single-label")]
    lines = [f"{result['model']} on {result['task']}, {result['folds']} folds of {result['validation']['held_out']['n']:,} "
             "training rows"]
    for which in ("best", "last"):
        scores = result["intervals"][which]["held_out"]
        for key, heading in problem.shown.items():
            one = scores[key]
            low, high = one["interval"]
            lines.append(f"  {which} epoch, {heading:<10}{one['mean']:>8.3f} ± {one['sd']:.3f}  [{low:.3f}, {high:.3f}]")
    # Bengio and Grandvalet 2004, "No Unbiased Estimator of the Variance of K-Fold Cross-Validation".
    return "\n".join([*lines, "Mean ± sample standard deviation over the folds; 95 % interval of the mean by Student's t. "
                      "The folds", "train on rows in common, so that a true interval is somewhat wider."])


# ---------------------------------------------------------------- the command line

def main(args) -> int:
    """Runs the missing folds and prints their means; returns the exit status."""
    if args.seeds:
        raise UserError("--folds: not with --seeds; one seed decides the folds")
    choose(args)
    out, parser = args.out or Path("runs") / f"LoRA-{args.sr}-folds", Variant("LoRA")
    runs = []
    for number in range(1, args.folds + 1):
        fold = argparse.Namespace(**{**vars(args), "fold": f"{number}/{args.folds}:{args.sr}"})
        runs.append(lora_run(fold, parser, args.sr, out / f"fold{number}-{args.sr}"))
    try:
        run_folds(args, runs, out)
    except endings.signals.Interrupted as error:
        return endings.interrupted(error)
    print(f"folds: {out}")
    return 0
