"""Methods compared on one task: the same seeds, the same budget and the same learning rates to choose from.

    python run.py compare 12345 --methods none,head,lora,full --seeds 3 --lr-grid 1e-4,3e-4,1e-3

Each entry's learning rate is the one whose best epoch has the highest MCC (of equals, the lowest loss) on the
selection split, with the first seed; the other seeds run at that rate alone. Every run is `run.py LoRA` in a
process of its own, for the peak memory of a process never falls again: one after the other, or `--jobs` at a time.
It leaves an ordinary run folder in `runs/compare-SR/`, so that a comparison started again keeps what is finished.
"""
from __future__ import annotations

import ctypes
import os
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
from tqdm import tqdm

import train_utils
from experiments import finetune
from experiments.significance import over_seeds, paired_differences
from experiments.variants import Entry, seeds_of
from machine.errors import UserError
from machine.hardware import device
from record.files import locked, make_folder, read_json, write_file, write_json
from record.folder import provenance, read_run
from record.ownership import check_out, remove_child
from report import records, studies
from report import seeds as seeds_tables

RUN = Path(__file__).parents[1] / "run.py"
PRCTL = getattr(ctypes.CDLL(None), "prctl", None)  # looked up here: between fork and exec there is no time for it
DIVERGED = 3  # run.py's exit status where a loss is not finite


@dataclass(frozen=True)
class CompareOptions:
    """What is compared, and where it goes."""

    sr: str
    entries: list[Entry]
    seeds: int
    out: Path
    settings: dict  # every option as resolved: a comparison goes on only under the same ones
    overwrite: bool = False
    jobs: int = 1  # runs at a time; each has its part of the threads
    against: str | None = None  # the entry that is subtracted from every other one, seed by seed


def run_comparison(options: CompareOptions, say: Callable[[str], None] = print) -> dict:
    """Runs what is missing of the comparison and writes compare.json and compare.tex.

    Returns:
        What is in compare.json.

    Raises:
        UserError: bad input, before anything is written; other options than the folder's; a run that failed.
        signals.Interrupted: asked to stop; the run at work has saved its state.
    """
    check_out(options.out, "compare")
    names = [entry.name for entry in options.entries]
    if options.against not in (None, *names):
        raise UserError(f"--against {options.against}: no such entry; expected one of {', '.join(names)}")
    task = [check(entry) for entry in options.entries][0]
    seeds = seeds_of(options.sr, options.seeds)
    plan = {entry.name: [(seeds[0], rate) for rate in entry.rates or [None]] for entry in options.entries}
    total = sum(len(runs) + len(seeds) - 1 for runs in plan.values())
    record = provenance(options.settings, task.files)
    rows, runs = [], []
    with study_folder(options.out, record, options.overwrite) as folder, tqdm(
            total=total, unit="run", desc="compare", dynamic_ncols=True) as bar:

        def run(entry: Entry, which: list[tuple[str, float | None]]) -> list[dict]:
            names = ["-".join([entry.name, *([] if rate is None else [f"lr{rate!r}"]), seed]) for seed, rate in which]
            words = [["LoRA", seed, *entry.words, *([] if rate is None else [f"--lr={rate!r}"])] for seed, rate in which]
            folders, found = [folder / name for name in names], []
            done = finished_runs(list(zip(words, folders, strict=True)), threads, options.jobs)
            for (seed, rate), name in zip(which, names, strict=True):
                bar.set_postfix_str(name)
                summary = next(done)
                found.append({"entry": entry.name, "learning_rate": rate, "seed": seed, "folder": name,
                              "status": "finished" if summary else "diverged", "summary": summary})
                bar.update()
            runs.extend(found)
            return found

        total_threads = read_json(folder / "config.json").get("threads")  # recorded when the comparison began
        threads = threads_each([path.parent for path in sorted(folder.glob("*/config.json"))], total_threads, options.jobs)
        for entry in options.entries:
            tried = run(entry, plan[entry.name])
            chosen = choose_rate(tried)
            others = run(entry, [(seed, chosen["learning_rate"]) for seed in seeds[1:]]) if chosen else []
            bar.update(0 if chosen else len(seeds) - 1)
            rows.append(aggregate(entry, tried, [r for r in [chosen, *others] if r and r["summary"]], folder))
        result = {"mode": "compare", "sr": options.sr, "model": options.entries[0].options.model, "task": task.name,
                  "seeds": seeds, "selection": selection(runs), **record, "entries": rows, "runs": runs,
                  "differences": differences(rows, options.against)}
        write_json(folder / "compare.json", result)
        written = records.read_json(folder / "compare.json")
        write_file(folder / "compare.tex", studies.compare_latex(written))
        write_file(folder / "compare_intervals.tex", seeds_tables.intervals_latex(written))
    say(studies.compare_text(written))
    if len(seeds) > 1:
        say(seeds_tables.intervals_text(written))
    return result


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
            for log in folder.glob("*-[0-9][0-9][0-9][0-9][0-9]/log.txt"):  # its runs, and nothing else that may lie here
                remove_child(log.parent)
            for name in ("compare.json", "compare.tex", "compare_intervals.tex", "config.json"):
                (folder / name).unlink(missing_ok=True)
        if (folder / "config.json").exists():
            same_settings(read_json(folder / "config.json"), config, folder)
        else:
            write_json(folder / "config.json", config)
        yield folder


def same_settings(before: dict, now: dict, what: Path | str) -> None:
    """Refuses to go on under other options, or with other data, than something began with."""
    old, new = before.get("options", {}), now["options"]
    for name in [*new, *(name for name in old if name not in new)]:
        if old.get(name) != new.get(name):
            raise UserError(f"{what}: began with another --{name.replace('_', '-')}: {_said(old.get(name))}, now "
                            f"{_said(new.get(name))}; choose another SR or --out, or pass --overwrite")
    for path in now["data_files"].keys() | before.get("data_files", {}).keys():
        if now["data_files"].get(path) != before.get("data_files", {}).get(path):
            raise UserError(f"{what}: began with other data: {path} is not the file it began with; choose another SR or "
                            "--out, or pass --overwrite")


def _said(value) -> str:
    return "none" if value is None else ",".join(map(str, value)) if isinstance(value, list) else str(value)


# ---------------------------------------------------------------- one run

def threads_each(folders: Iterable[Path], threads: int | None, jobs: int) -> int | None:
    """Returns the threads of each of several runs: those of the first that has begun, else its part of `threads`.

    Another number would add up in another order, and give the seeds begun now another rounding than the others.
    """
    begun = (read_json(folder / "config.json").get("threads") for folder in folders if (folder / "config.json").exists())
    return next(begun, None) or (threads and max(1, threads // jobs))


def finished_runs(runs: list[tuple[list[str], Path]], threads: int | None, jobs: int) -> Iterator[dict | None]:
    """Yields what `finished_run` returns of each run's words and folder, in their order; `jobs` of them run at a time.

    An error of one, or a signal, asks the others to stop; it is raised when they have saved their state.
    """
    if jobs == 1:  # in this thread, which signals reach by themselves
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
            stopped.set()  # at once, or this thread would begin another run
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
        words: of its command line, but for its folder: mode, SR, options.
        tick: see `run_child`.

    Raises:
        UserError: the run failed; names its log.
    """
    diverged = folder / "diverged.txt"  # or a comparison started again would try the same once more
    if not (folder / "summary.json").exists() and not diverged.exists():
        make_folder(folder)
        with filelock.FileLock(folder / ".lock"):
            pass  # the child of a killed comparison may still be at work here: now it has ended
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
    """Runs `python run.py WORDS` in a process of its own, with so many threads (all cores if None) and its output in `log`.

    Args:
        program: run.py if None.
        tick: called every second while the child runs; a KeyboardInterrupt of it stops the child.

    Returns the exit status, negative for a signal.

    Interrupted, it asks the child to stop and waits until that has saved its state. The child is in a process group of
    its own: Ctrl-C would reach it too, and SIGINT after a signal ends it at once.
    """
    with open(log, "ab") as output:
        child = subprocess.Popen([sys.executable, str(program or RUN), *words], stdin=subprocess.DEVNULL, stdout=output,
                                 stderr=output, preexec_fn=_end_with_parent, process_group=0,
                                 env=os.environ | _threads(threads))
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
    """Returns environment variables that give a child so many threads, even more than cores (MKL_DYNAMIC)."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_DYNAMIC": "FALSE"} if threads else {}


def _end_with_parent() -> None:
    """Lets the kernel (of Linux) send SIGTERM to the child, which then saves its state, when this process is killed."""
    if PRCTL:
        PRCTL(1, signal.SIGTERM)  # PR_SET_PDEATHSIG of sys/prctl.h


def size_on_disk(folder: Path) -> int:
    """Returns the bytes of the weights that a finished run saved."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


# ---------------------------------------------------------------- many runs

def score(summary: dict) -> tuple[float, float]:
    """Returns (MCC, -loss) on the selection split, by which a learning rate is chosen, as an epoch is."""
    values = summary["validation"][train_utils.selection_split(summary["validation"])]
    return values["mcc"], -values["loss"]


def choose_rate(tried: list[dict]) -> dict | None:
    """Returns the run with the best score; None if every run diverged."""
    return max((run for run in tried if run["summary"]), key=lambda run: score(run["summary"]), default=None)


def selection(runs: list[dict]) -> dict | None:
    """Describes how learning rate and epoch were chosen."""
    done = next((run["summary"] for run in runs if run["summary"]), None)
    return done and {"split": train_utils.selection_split(done["validation"]), "splits": list(done["validation"]),
                     "score": "mcc", "learning_rate": "first seed", "epoch": "every seed"}


def aggregate(entry: Entry, tried: list[dict], chosen: list[dict], folder: Path) -> dict:
    """Computes one row of the table: means over the seeds at the chosen learning rate.

    Args:
        tried: the first seed's run at every learning rate.
        chosen: the runs at the chosen one that did not diverge; none if every learning rate diverged.
    """
    row = {"entry": entry.name, "method": entry.options.method, "model": entry.options.model, "words": entry.words,
           "tried": [{"learning_rate": run["learning_rate"],
                      "mcc": score(run["summary"])[0] if run["summary"] else None} for run in tried],
           "learning_rate": chosen[0]["learning_rate"] if chosen else None, "seeds": [run["seed"] for run in chosen]}
    if not chosen:
        return row
    summaries = [run["summary"] for run in chosen]
    counts = summaries[0]["parameters"]
    row["parameters"] = {**counts, "trainable_percent": 100 * counts["trainable"] / counts["total"]}
    row |= over_seeds(summaries)
    row["majority_accuracy"] = {split: values["majority_accuracy"] for split, values in summaries[0]["validation"].items()}
    trains = [summary["train"] for summary in summaries]
    row["seconds_per_epoch"] = statistics.fmean(train["seconds"] / max(1, train["epochs"]) for train in trains)
    row["peak_memory_bytes"] = max(train["peak_memory_bytes"] for train in trains)
    row["size_bytes"] = max(summary["size_bytes"] for summary in summaries)
    return row


def differences(rows: list[dict], against: str | None) -> list[dict]:
    """Computes every entry minus the entry `against`, paired by seed; nothing if `against` is not given."""
    other = next((row for row in rows if row["entry"] == against and row["seeds"]), None)
    return [{"entry": row["entry"], "minus": against, **paired_differences(row, other)}
            for row in rows if other and row is not other and row["seeds"]]
