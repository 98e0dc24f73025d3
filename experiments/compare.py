"""Compares methods on one task: the same seeds, the same budget and the same learning rates to choose from.

    python run.py compare 12345 --methods none,head,lora,full --seeds 3 --lr-grid 1e-4,3e-4,1e-3

The first seed chooses each entry's learning rate: the highest MCC of the best epoch (of equals, the lowest loss) on the
selection split. The other seeds run at that rate alone. Every run is `run.py LoRA` in a process of its own, because the
peak memory of a process never falls again: one after the other, or `--jobs` at a time. It leaves an ordinary run folder in
`runs/compare-SR/`, and a comparison started again keeps the finished ones.
"""
from __future__ import annotations

import ctypes
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import filelock

import train_utils
from experiments import endings, finetune
from experiments.arguments import choose, finetune_options
from experiments.endings import DIVERGED
from experiments.significance import majority, over_seeds, paired_differences
from experiments.variants import COMMON, Variant, seeds_of, settings
from machine.errors import UserError
from machine.hardware import device
from machine.progress import Bar
from metrics.problems import problem_of
from options.schema import RunOptions
from record.files import locked, make_folder, read_json, write_file, write_json
from record.folder import provenance, read_run
from record.ownership import check_out, remove_child
from report import records, studies
from report import seeds as seeds_tables

RUN = Path(__file__).parents[1] / "run.py"


@dataclass(frozen=True)
class Entry:
    """Holds one row of the comparison."""

    name: str
    words: list[str]  # the options of its runs on the command line, but for --lr and --out
    options: RunOptions  # the same, parsed
    rates: list[float]  # learning rates to choose from; none for a method that trains nothing


@dataclass(frozen=True)
class CompareOptions:
    """Holds the entries of a comparison, their seeds, and the folder of its runs."""

    sr: str
    entries: list[Entry]
    seeds: int
    out: Path
    settings: dict  # every option as resolved: a comparison goes on only under the same ones
    overwrite: bool = False
    jobs: int = 1  # runs at a time, each with its part of the threads
    against: str | None = None  # entry to subtract from every other one, seed by seed


def run_comparison(options: CompareOptions, say: Callable[[str], None] = print) -> dict:
    """Runs the missing runs of the comparison and writes compare.json and compare.tex.

    Returns:
        The content of compare.json.

    Raises:
        UserError: bad input, before anything is written; other options than the folder's; a run that failed.
        signals.Interrupted: asked to stop; the run at work has saved its state.
    """
    check_out(options.out, "compare")
    names = [entry.name for entry in options.entries]
    if options.against not in (None, *names):
        raise UserError(f"--against {options.against}: no such entry; expected one of {', '.join(names)}")
    # Every entry is checked before the first run: hours later is too late for a mistyped target.
    task = [check(entry) for entry in options.entries][0]
    seeds = seeds_of(options.sr, options.seeds)
    total = sum(len(first_runs(entry, seeds)) + len(seeds) - 1 for entry in options.entries)
    record = provenance(options.settings, task.files)
    rows, runs = [], []
    with study_folder(options.out, record, options.overwrite) as folder, Bar(
            total=total, unit="run", desc="compare") as bar:
        # The number of threads is recorded when the comparison begins, and is the same for every run.
        total_threads = read_json(folder / "config.json").get("threads")
        threads = threads_each([path.parent for path in sorted(folder.glob("*/config.json"))], total_threads, options.jobs)
        for entry in options.entries:
            tried = run_entry(entry, first_runs(entry, seeds), folder, threads, options.jobs, bar)
            chosen = choose_learning_rate(tried)
            # An entry that diverged at every rate has no rate for the other seeds.
            later = [(seed, chosen["learning_rate"]) for seed in seeds[1:]] if chosen else []
            others = run_entry(entry, later, folder, threads, options.jobs, bar)
            bar.update(0 if chosen else len(seeds) - 1)
            runs += [*tried, *others]
            rows.append(aggregate(entry, tried, [run for run in [chosen, *others] if run and run["summary"]], folder))
        result = {"mode": "compare", "sr": options.sr, "model": options.entries[0].options.model, "task": task.name,
                  "seeds": seeds, "selection": selection(runs), **record, "entries": rows, "runs": runs,
                  "differences": differences(rows, options.against)}
        write_json(folder / "compare.json", result)
        # The tables are made from the file, as the report's are, so that both can only say the same.
        written = records.read_json(folder / "compare.json")
        write_file(folder / "compare.tex", studies.compare_latex(written))
        write_file(folder / "compare_intervals.tex", seeds_tables.intervals_latex(written))
    say(studies.compare_text(written))
    if len(seeds) > 1:
        say(seeds_tables.intervals_text(written))
    return result


def first_runs(entry: Entry, seeds: list[str]) -> list[tuple[str, float | None]]:
    """Returns the first seed with every learning rate of an entry; None is the rate of a method that trains nothing."""
    return [(seeds[0], rate) for rate in entry.rates or [None]]


def run_entry(entry: Entry, which: list[tuple[str, float | None]], folder: Path, threads: int | None, jobs: int, bar: Bar
              ) -> list[dict]:
    """Finishes the runs of an entry.

    Args:
        which: the seed and learning rate of each run.

    Returns:
        Each run as compare.json lists it: entry, learning_rate, seed, folder, status, and its summary or None.
    """
    names, runs, found = [], [], []
    for seed, rate in which:
        names.append("-".join([entry.name, *([] if rate is None else [f"lr{rate!r}"]), seed]))
        words = ["LoRA", seed, *entry.words, *([] if rate is None else [f"--lr={rate!r}"])]
        runs.append((words, folder / names[-1]))
    done = finished_runs(runs, threads, jobs)
    for (seed, rate), name in zip(which, names, strict=True):
        bar.set_postfix_str(name)
        summary = next(done)
        found.append({"entry": entry.name, "learning_rate": rate, "seed": seed, "folder": name,
                      "status": "finished" if summary else "diverged", "summary": summary})
        bar.update()
    return found


def check(entry: Entry):
    """Returns the entry's task; an error in one of its options names the entry."""
    try:
        return finetune.check(entry.options)
    except UserError as error:
        raise UserError(f"entry {entry.name}: {error}" if str(error).startswith("--") else str(error)) from None


# ---------------------------------------------------------------- the folder

@contextmanager
def study_folder(out: Path, config: dict, overwrite: bool):
    """Opens the comparison's folder for this process alone; its config.json states the options it began with.

    Raises:
        UserError: other options or data than it began with, another process at work there.
    """
    folder = make_folder(out)
    with locked(folder, "comparison"):
        if overwrite and (folder / "config.json").exists():
            # Its runs, which all have a log, and no other folder that somebody put next to them.
            for log in folder.glob("*-[0-9][0-9][0-9][0-9][0-9]/log.txt"):
                remove_child(log.parent)
            for name in ("compare.json", "compare.tex", "compare_intervals.tex", "config.json"):
                (folder / name).unlink(missing_ok=True)
        if (folder / "config.json").exists():
            same_settings(read_json(folder / "config.json"), config, folder)
        else:
            write_json(folder / "config.json", config)
        yield folder


def same_settings(before: dict, now: dict, what: Path | str) -> None:
    """Checks that a study goes on with the options and data that it began with.

    Args:
        before: its config.json.
        now: the same of this start.
        what: the study, for the error's text.

    Raises:
        UserError: an option or a file is another one; names it.
    """
    old, new = before.get("options", {}), now["options"]
    for name in [*new, *(name for name in old if name not in new)]:
        if old.get(name) != new.get(name):
            raise UserError(f"{what}: began with another --{name.replace('_', '-')}: {_in_words(old.get(name))}, now "
                            f"{_in_words(new.get(name))}; choose another SR or --out, or pass --overwrite")
    for path in now["data_files"].keys() | before.get("data_files", {}).keys():
        if now["data_files"].get(path) != before.get("data_files", {}).get(path):
            raise UserError(f"{what}: began with other data: {path} is not the file it began with; choose another SR or "
                            "--out, or pass --overwrite")


def _in_words(value) -> str:
    return "none" if value is None else ",".join(map(str, value)) if isinstance(value, list) else str(value)


# ---------------------------------------------------------------- one run

def threads_each(folders: Iterable[Path], threads: int | None, jobs: int) -> int | None:
    """Returns the threads of each run: those of the first that has begun, else its part of `threads`."""
    # Another number of threads sums in another order: seeds that begin now would be rounded otherwise than the others.
    begun = (read_json(folder / "config.json").get("threads") for folder in folders if (folder / "config.json").exists())
    return next(begun, None) or (threads and max(1, threads // jobs))


def finished_runs(runs: list[tuple[list[str], Path]], threads: int | None, jobs: int) -> Iterator[dict | None]:
    """Yields the result of `finished_run` for each run's words and folder, in order; `jobs` of them run at a time.

    Raises:
        UserError, KeyboardInterrupt: of one run, or a signal; after the other runs have been asked to stop and have saved
            their state.
    """
    if jobs == 1:
        # In the main thread, where Python delivers signals.
        yield from (finished_run(words, folder, threads) for words, folder in runs)
        return
    stopped = threading.Event()

    def tick() -> None:
        if stopped.is_set():
            raise KeyboardInterrupt

    def one(run: tuple[list[str], Path]) -> dict | None:
        tick()
        try:
            return finished_run(*run, threads, tick)
        except BaseException:
            # At once: this thread would begin another run before the main one hears of the error.
            stopped.set()
            raise

    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield from pool.map(one, runs)
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


def finished_run(words: list[str], folder: Path, threads: int | None, tick: Callable[[], None] | None = None
                 ) -> dict | None:
    """Returns the summary of a run, which is started or resumed if it is not finished; None if it diverged.

    Args:
        words: of its command line without its folder: mode, SR, options.
        tick: see `run_child`.

    Raises:
        UserError: the run failed; names its log.
    """
    # A note of the divergence: a comparison started again would otherwise try the same rate once more.
    diverged = folder / "diverged.txt"
    if not (folder / "summary.json").exists() and not diverged.exists():
        make_folder(folder)
        # The child of a killed comparison may still be at work in this folder: the lock is free when it has ended.
        with filelock.FileLock(folder / ".lock"):
            pass
    if not (folder / "summary.json").exists() and not diverged.exists():
        words = [*words, f"--out={folder}", "--resume", "--no-plots", f"--device={device().type}"]
        status = run_child(words, folder / "log.txt", threads, tick=tick)
        last = next((line for line in reversed((folder / "log.txt").read_text(errors="replace").splitlines())
                     if line.strip()), "no output")
        if status == DIVERGED:
            write_file(diverged, last + "\n")
        elif status:
            how = f"exit status {status}" if status > 0 else f"signal {-status}"
            raise UserError(f"{folder.name}: the run failed ({how}: {last}); see {folder / 'log.txt'}")
    if not (folder / "summary.json").exists():
        return None
    return {**read_run(folder, words[0])[1], "size_bytes": size_on_disk(folder)}


def run_child(words: list[str], log: Path, threads: int | None = None, program: Path | None = None,
              tick: Callable[[], None] | None = None) -> int:
    """Runs `python run.py WORDS` in a process of its own, its output in `log`.

    Args:
        threads: of the child; all cores if None.
        program: run.py if None.
        tick: called every second while the child runs; a KeyboardInterrupt from it stops the child.

    Returns:
        The exit status, negative for a signal.

    Raises:
        KeyboardInterrupt: a signal, after the child has been asked to stop and has saved its state.
    """
    # In a process group of its own: Ctrl-C would reach the child too, and a second signal ends it before it has saved.
    with open(log, "ab") as output:
        child = subprocess.Popen([sys.executable, str(program or RUN), *words], stdin=subprocess.DEVNULL, stdout=output,
                                 stderr=output, env=os.environ | _threads(threads), **_own_group())
        try:
            while tick:
                with suppress(subprocess.TimeoutExpired):
                    return child.wait(timeout=1)
                tick()
            return child.wait()
        except KeyboardInterrupt:
            child.send_signal(signal.SIGTERM)
            child.wait()
            raise


def _threads(threads: int | None) -> dict[str, str]:
    """Returns environment variables for a child with this number of threads, even above the cores (MKL_DYNAMIC)."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_DYNAMIC": "FALSE"} if threads else {}


def _own_group() -> dict:
    """Returns the arguments of Popen for a child in a process group of its own, which on Linux ends with this process."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    # Looked up before the fork: between fork and exec nothing may be imported or allocated at length.
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def end_with_parent() -> None:
        # 1 is PR_SET_PDEATHSIG of sys/prctl.h: SIGTERM when this process is killed, and the child saves its state.
        prctl(1, signal.SIGTERM)

    return {"process_group": 0, "preexec_fn": end_with_parent if prctl else None}


def size_on_disk(folder: Path) -> int:
    """Returns the bytes of a finished run's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


# ---------------------------------------------------------------- many runs

def score(summary: dict) -> tuple[float, float]:
    """Returns (MCC or the problem's score, -loss) on the selection split: the order of epochs and learning rates."""
    values = summary["validation"][train_utils.selection_split(summary["validation"])]
    return values[problem_of(summary).chosen], -values["loss"]


def choose_learning_rate(tried: list[dict]) -> dict | None:
    """Returns the run with the best score; None if every run diverged."""
    return max((run for run in tried if run["summary"]), key=lambda run: score(run["summary"]), default=None)


def selection(runs: list[dict]) -> dict | None:
    """Describes how learning rate and epoch were chosen."""
    done = next((run["summary"] for run in runs if run["summary"]), None)
    return done and {"split": train_utils.selection_split(done["validation"]), "splits": list(done["validation"]),
                     "score": problem_of(done).chosen, "learning_rate": "first seed", "epoch": "every seed"}


def aggregate(entry: Entry, tried: list[dict], chosen: list[dict], folder: Path) -> dict:
    """Computes one row of the table: means over the seeds at the chosen learning rate.

    Args:
        tried: the first seed's run at every learning rate.
        chosen: the runs at the chosen rate that did not diverge; empty if every learning rate diverged.
    """
    chosen_score = next((problem_of(run["summary"]).chosen for run in tried if run["summary"]), "mcc")
    row = {"entry": entry.name, "method": entry.options.method, "model": entry.options.model, "words": entry.words,
           "tried": [{"learning_rate": run["learning_rate"],
                      chosen_score: score(run["summary"])[0] if run["summary"] else None} for run in tried],
           "learning_rate": chosen[0]["learning_rate"] if chosen else None, "seeds": [run["seed"] for run in chosen]}
    if not chosen:
        return row
    summaries = [run["summary"] for run in chosen]
    counts = summaries[0]["parameters"]
    row["parameters"] = {**counts, "trainable_percent": 100 * counts["trainable"] / counts["total"]}
    row |= over_seeds(summaries)
    row |= majority(summaries[0]["validation"])
    trains = [summary["train"] for summary in summaries]
    row["seconds_per_epoch"] = statistics.fmean(train["seconds"] / max(1, train["epochs"]) for train in trains)
    row["peak_memory_bytes"] = max(train["peak_memory_bytes"] for train in trains)
    row["size_bytes"] = max(summary["size_bytes"] for summary in summaries)
    return row


def differences(rows: list[dict], against: str | None) -> list[dict]:
    """Computes every entry minus the entry `against`, paired by seed; an empty list without `against`."""
    other = next((row for row in rows if row["entry"] == against and row["seeds"]), None)
    return [{"entry": row["entry"], "minus": against, **paired_differences(row, other)}
            for row in rows if other and row is not other and row["seeds"]]


# ---------------------------------------------------------------- the command line

def _entry(args, name: str, changes: dict[str, str], where: str) -> Entry:
    """Parses an entry of a comparison: the common options with its own changes."""
    parser = Variant(where)
    for option in changes:
        if option in (*COMMON, "lr", "epochs", "batch_size", "batch_tokens", "accumulate", "patience"):
            parser.error(f"{option} is the same for every entry; give it as --{option.replace('_', '-')}")
        parser.option(option)
    words = parser.words(args, changes)
    parsed = parser.parse([args.sr, *words])
    parsed.lr = args.lr
    options = finetune_options(parsed)
    rates = [] if options.method == "none" else list(args.lr_grid or [options.train.lr])
    return Entry(name, words, options, rates)


def entries(args) -> list[Entry]:
    """Returns --methods and --set as entries."""
    found = [_entry(args, method, {"method": method}, f"--methods {method}") for method in args.methods]
    for text in args.set:
        name, colon, rest = text.partition(":")
        # A comma begins an option only where a name and = follow.
        pairs = [pair.partition("=") for pair in re.split(r",(?=[\w-]+=)", rest)]
        if not colon or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,39}", name) or not all(
                option and equals and value for option, equals, value in pairs):
            raise UserError(f"--set {text}: expected NAME:OPTION=VALUE[,OPTION=VALUE...] with a NAME of letters, digits "
                            "and _.+-, such as r2:method=lora,rank=2,targets=q+v")
        changes = {option.replace("-", "_"): value for option, _, value in pairs}
        if len(changes) < len(pairs):
            raise UserError(f"--set {text}: an option is given twice")
        found.append(_entry(args, name, changes, f"--set {name}"))
    names = [entry.name for entry in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"entry {twice}: --methods and --set name it twice; expected a name for each entry")
    return found


def main(args) -> int:
    """Runs the missing runs of a comparison, prints and draws it; returns the exit status."""
    choose(args)
    options = CompareOptions(args.sr, entries(args), args.seeds, args.out or Path(f"runs/compare-{args.sr}"),
                             settings(args, "against"), args.overwrite, args.jobs, args.against)
    return endings.study(args, options.out, lambda: run_comparison(options), "compare")
