"""Runs `LoRA` or `distil` with several seeds, and computes means and intervals.

    python run.py LoRA 12345 --seeds 5
    python run.py distil 12345 --seeds 5

Each seed is an ordinary run in an ordinary folder (runs/LoRA-12345, runs/LoRA-12346, ...), made by `run.py` in a process
of its own; finished runs stay. Means and intervals go to runs/LoRA-12345-seeds/.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from experiments import compare, distil, endings, finetune
from experiments.arguments import choose, finetune_options
from experiments.significance import majority, over_seeds, paired_differences, spread
from experiments.variants import Variant, seeds_of, settings
from machine.errors import UserError
from machine.progress import Bar
from options.schema import FREE, RunOptions, TableOptions
from record.config_json import as_json, settings_of
from record.files import locked, make_folder, read_json, write_file, write_json
from record.folder import provenance
from record.ownership import check_out, remove_run
from report import figures, records
from report import seeds as tables
from train_utils import selection_split

# The models of a run's summary, if it has them (scratch is the baseline's recorded name), and the pairs that are compared.
MODELS = {"LoRA": (None,), "distil": ("teacher", "student", "scratch")}
DIFFERENCES = {"LoRA": (), "distil": (("student", "scratch"), ("student", "teacher"))}
SPEED = "sentences_per_second"  # of a distillation's models


@dataclass(frozen=True)
class SeedRun:
    """Holds one seed's run of `LoRA` or `distil` with `--seeds`."""

    seed: str
    folder: Path
    words: list[str]  # of its command line, but for its folder: mode, SR, options
    options: dict  # as its config.json records them; without those that only the run itself resolves
    run: RunOptions


@dataclass(frozen=True)
class SeedsOptions:
    """Holds the runs of all seeds, and the folder of the results."""

    mode: str  # LoRA or distil
    sr: str
    runs: list[SeedRun]
    out: Path  # folder of seeds.json
    settings: dict  # every option as given
    overwrite: bool = False
    jobs: int = 1  # runs at a time, each with its part of the threads


def run_seeds(options: SeedsOptions, say: Callable[[str], None] = print) -> dict:
    """Runs the missing seeds and writes seeds.json and seeds.tex.

    Returns:
        The content of seeds.json.

    Raises:
        UserError: bad input, before anything is written; a folder that holds a run with other options or data; a run
            that failed, or all of them diverged.
        signals.Interrupted: asked to stop; the run at work has saved its state.
    """
    check_out(options.out, "seeds")
    for run in options.runs:
        check_out(run.folder, "run")
    # Before the first run: one seed's options are checked for all, and old runs against them.
    if options.mode == "LoRA":
        finetune.check(options.runs[0].run)
    if not options.overwrite:
        for run in options.runs:
            check_options(run)
    with locked(make_folder(options.out), "study of seeds"):
        if options.overwrite:
            # Each folder is locked meanwhile: a run of it may be at work in another terminal.
            for run in options.runs:
                with locked(make_folder(run.folder), "run"):
                    remove_run(run.folder)
                    (run.folder / "diverged.txt").unlink(missing_ok=True)
        # Runs at a time share the CPU's threads; summaries come in the order of the seeds, as the bar names them.
        threads = compare.threads_each([run.folder for run in options.runs], torch.get_num_threads(), options.jobs)
        done = {}
        summaries = compare.finished_runs([(run.words, run.folder) for run in options.runs], threads, options.jobs)
        with Bar(options.runs, unit="run", desc=f"{options.mode} seeds") as bar:
            for run in bar:
                bar.set_postfix_str(run.folder.name)
                # A run that diverged has no summary; the other seeds still count.
                if summary := next(summaries):
                    done[run.seed] = summary
        if not done:
            raise UserError(f"{options.runs[0].folder} and the other seeds' runs diverged; lower --lr")
        finished = [run for run in options.runs if run.seed in done]
        write_json(options.out / "seeds.json", result := {
            "mode": "seeds", "of": options.mode, "sr": options.sr, **provenance(options.settings, same_data(finished)),
            **results(options.mode, done), "seeds": [run.seed for run in options.runs],
            "runs": [{"seed": run.seed, "folder": str(run.folder), "status": "finished" if run.seed in done else "diverged"}
                     for run in options.runs]})
        written = records.read_json(options.out / "seeds.json")
        write_file(options.out / "seeds.tex", tables.intervals_latex(written))
    say(tables.seeds_text(written))
    return result


def check_options(run: SeedRun) -> None:
    """Checks that a run in the folder, finished or not, has the options of this study.

    Raises:
        UserError: it has others; names the first.
    """
    path = run.folder / "config.json"
    before = read_json(path).get("options", {}) if path.exists() else {}
    for name, value in run.options.items():
        if name in before and before[name] != value:
            raise UserError(f"{run.folder}: holds a run with another {name}: {before[name]}, now {value}; choose another "
                            "SR or --out, or pass --overwrite")


def same_data(runs: list[SeedRun]) -> dict[str, str]:
    """Returns the digests of the data files that all runs read.

    Raises:
        UserError: a run read another file than the first one, or started from another adapter.
    """
    # Runs made weeks apart may have read a file that changed in between.
    (folder, first), *others = [(run.folder, read_json(run.folder / "config.json")) for run in runs]
    for other, config in others:
        for key, said in (("data_files", "read another"), ("init_files", "started from another")):
            files, known = config.get(key, {}), first.get(key, {})
            for name in files.keys() | known.keys():
                if files.get(name) != known.get(name):
                    raise UserError(f"{other}: {said} {name} than {folder}; pass --overwrite to run every seed again")
    return first.get("data_files", {})


def results(mode: str, done: dict[str, dict]) -> dict:
    """Returns spreads and paired differences of every model, from the finished runs' summaries by seed."""
    first, seeds = next(iter(done.values())), list(done)
    # Of a LoRA run the summary itself is the model's; of a distillation each model has a part of it.
    parts, rows = {}, {}
    for name in MODELS[mode]:
        if name is None or name in first:
            parts[name or mode] = [summary[name] if name else summary for summary in done.values()]
    for name, models in parts.items():
        rows[name] = {"entry": name, "seeds": seeds, "parameters": models[0]["parameters"], **over_seeds(models)}
        if SPEED in models[0]:
            rows[name][SPEED] = spread([model[SPEED] for model in models])
    validation = next(iter(parts.values()))[0]["validation"]
    own = {"method": first["method"]} if mode == "LoRA" else {
        "distillation": {key: first["distillation"][key] for key in ("temperature", "alpha")},
        "teachers": list(dict.fromkeys(summary["teacher"]["run"] for summary in done.values()))}
    return {"model": first["model"], "task": first["task"], **own,
            "selection": {"split": selection_split(validation), "splits": list(validation)},
            **majority(validation),
            "entries": list(rows.values()),
            "differences": [{"entry": one, "minus": other, **paired_differences(rows[one], rows[other])}
                            for one, other in DIFFERENCES[mode] if {one, other} <= rows.keys()]}


# ---------------------------------------------------------------- the command line

def lora_run(args, parser: Variant, seed: str, folder: Path) -> SeedRun:
    """Returns a run of `LoRA` with the options of a command line, its seed and its folder."""
    one = argparse.Namespace(**{**vars(args), "sr": seed, "out": folder})
    options = finetune_options(one)
    return seed_run(one, parser, options, asdict(options.lora), ["max_length", "precision", "problem", "text_column"])


def seed_run(one, parser: Variant, options: RunOptions, recorded: dict, resolved: list[str]) -> SeedRun:
    """Returns a run with the words of its command line, and its options as far as they are known before it begins.

    Args:
        one: the parsed command line of the run.
        recorded: the mode's own options.
        resolved: options that the run may fill in.
    """
    recorded = as_json({**recorded, **asdict(options.train), **settings_of(options)})
    words = [one.mode, one.sr, *parser.words(one, {}), *([] if one.lr is None else [f"--lr={one.lr!r}"])]
    unknown = [name for name in resolved if recorded.get(name) in (None, [], "auto", getattr(TableOptions, name, None))]
    known = {name: value for name, value in recorded.items() if name not in (*FREE, *unknown)}
    return SeedRun(one.sr, one.out, words, known, options)


def seed_runs(args) -> list[SeedRun]:
    """Returns the runs that `LoRA` or `distil` with --seeds stands for: LoRA-12345, LoRA-12346, ... in runs/ or --out.

    A student of each seed has the teacher of the same seed, or the one that --teacher names.

    Raises:
        UserError: bad options, a seed without a teacher.
    """
    if args.mode == "LoRA":
        choose(args)  # once: every seed trains the same
    folder, found = args.out or Path("runs"), []
    parser = Variant(args.mode, args.mode)
    for seed in seeds_of(args.sr, args.seeds):
        place = folder / f"{args.mode}-{seed}"
        if args.mode == "LoRA":
            found.append(lora_run(args, parser, seed, place))
            continue
        one = argparse.Namespace(**{**vars(args), "sr": seed, "out": place})
        if args.teacher and not (args.teacher[0] / "config.json").exists():
            one.teacher = [folder / f"LoRA-{seed}" for folder in args.teacher]
        options, student = distil.options_from(one)
        one.teacher = [student.teacher, *student.more_teachers]
        found.append(seed_run(one, parser, options, asdict(student), [
            "model", "data", "limit", "max_length", "precision", "embedding_size", "hidden_size", "directions", "augment",
            "label_precision", *(field.name for field in fields(TableOptions))]))
    return found


def main(args) -> int:
    """Runs the missing seeds, prints and draws their means; returns the exit status."""
    options = SeedsOptions(args.mode, args.sr, seed_runs(args),
                           (args.out or Path("runs")) / f"{args.mode}-{args.sr}-seeds", settings(args), args.overwrite,
                           args.jobs)

    def start() -> None:
        for run in run_seeds(options)["runs"]:
            if run["status"] == "finished" and not args.no_plots:
                figures.draw_finished(lambda folder=Path(run["folder"]): figures.plot_run(folder, args.plots))

    return endings.study(args, options.out, start, "seeds")
