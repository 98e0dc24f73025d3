"""Makes every run that the paper cites, step by step, and then report/main.pdf.

    python run.py paper 12345 --profile quick
    python run.py paper 12345 --profile full --data-root ../shared/data --seeds 3

The steps are declared in experiments/steps.py. Each is a command line in a process of its own, with its output in a log,
and leaves ordinary runs and studies. Several run at a time, each with its part of the CPU's threads. A step that is done
is kept, an interrupted one goes on where it stopped, and a failed one is named while the others go on. paper.json holds
the outcome of each step; the report is made from it.
"""
from __future__ import annotations

import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments import compare, endings, step_records
from experiments.significance import paired_differences
from experiments.steps import CHOSEN, Step, steps
from experiments.variants import seeds_of
from machine.errors import UserError
from machine.hardware import device
from machine.progress import Bar
from machine.signals import Interrupted
from machine.streams import complain
from record.files import SUMS, check_sums, locked, make_folder, read_json, write_json
from record.folder import provenance
from report import build

ROOT = compare.RUN.parent
AT_A_TIME = 3  # steps on a CPU with as many cores: each takes the memory of a training


@dataclass(frozen=True)
class PaperOptions:
    """Holds the paper's profile, its data, the steps to run, and the folder of its runs."""

    sr: str
    profile: str  # quick or full
    seeds: int
    data_root: Path | None  # folder of the data sets; the Hub's GPT-2 and CoLA if None
    out: Path
    only: tuple[str, ...] = ()  # names of the steps to run; all if empty
    overwrite: bool = False  # remove those steps first, and run them whatever their records
    jobs: int | None = None  # steps at a time; see `jobs_here` if None
    records: Path | None = None  # folder of the finished steps' results without weights
    no_run: bool = False  # run and remove nothing: build the paper from the results at hand
    author: str = ""  # name on the cover

    @property
    def settings(self) -> dict:
        """Returns the options that decide the results; a paper goes on only under the same ones."""
        return {"profile": self.profile, "seeds": self.seeds,
                "data_root": None if self.data_root is None else str(self.data_root)}

    @property
    def steps(self) -> list[Step]:
        """Returns the steps of the paper.

        Raises:
            UserError: `only` names an unknown step.
        """
        found = steps(self.profile, self.sr, self.seeds, self.data_root, self.out)
        names = list(dict.fromkeys(name for step in found for name in (step.name, step.part_of) if name))
        if unknown := next((name for name in self.only if name not in names), None):
            raise UserError(f"--only {unknown}: no such step; expected some of {','.join(names)}")
        return found

    @property
    def wanted(self) -> list[Step]:
        """Returns the steps to run: those that `only` names, themselves or by their study; else all but the studies'."""
        return [step for step in self.steps if (
            not {step.name, step.part_of}.isdisjoint(self.only) if self.only else not step.part_of)]


def plan(options: PaperOptions) -> str:
    """Returns every step of the paper for the terminal: its state or estimated minutes, and its command."""
    lines = []
    for step in options.steps:
        state = f"about {step.minutes:g} min on one core"
        if is_done(step, options):
            state = "done"
        elif options.records and step_records.has_record(step, options.records):
            state = "recorded"
        lines.append(f"{step.name} ({state}): {command(step)}")
    return "\n".join(lines)


def command(step: Step, rate: str = CHOSEN) -> str:
    """Returns a step's command line, with the grid's learning rate in the place of CHOSEN."""
    return "python " + shlex.join(rate if word == CHOSEN else word for word in step.words)


def make_paper(options: PaperOptions) -> tuple[Path, list[str]]:
    """Runs the missing steps of the paper, writes paper.json and builds report/main.pdf.

    Returns:
        The PDF, and the failures, a line each.

    Raises:
        UserError: bad input; another paper's folder, or one that no paper made; no Hub for a paper without data.
        signals.Interrupted: asked to stop; the step at work has saved its state.
    """
    wanted = options.wanted
    if options.no_run:
        wanted = []
    else:
        check(options)
    check_own_folder(options.out)
    build.check_latex()
    with locked(make_folder(options.out), "paper"):
        record = provenance(options.settings, {})
        config = options.out / "config.json"
        # Only a paper whose every step is removed may go on under other options.
        left = [step for step in options.steps if step not in wanted and (options.out / step.done).exists()]
        begins_anew = options.overwrite and not left and (wanted == options.steps or bool(wanted) and not options.only)
        if config.exists() and not begins_anew:
            compare.same_settings(read_json(config), record, options.out)
        if options.overwrite:
            for step in wanted:
                remove_step(step, options)
        # Written after the steps are gone and over the old file: a paper's folder is known as one at every moment.
        if begins_anew or not config.exists():
            write_json(config, record)
        if options.records:
            exchange(wanted, options)
        failures = run_steps(wanted, options) if wanted else []
        write_json(options.out / "paper.json", result(options, record))
        pdf = build.build_paper(options.out, ROOT / "report", options.author)
    return pdf, failures


def check_own_folder(out: Path) -> None:
    """Checks that a folder is new, empty, or one that a paper made: nothing of others is overwritten or removed.

    Raises:
        UserError: it holds something else.
    """
    if not out.is_dir() or not [path for path in out.iterdir() if path.name != ".lock"]:
        return
    config = out / "config.json"
    options = read_json(config).get("options") if config.is_file() else None
    if not isinstance(options, dict) or not {"profile", "seeds", "data_root"} <= options.keys():
        raise UserError(f"--out {out}: neither empty nor a paper's folder; expected a new folder")


def remove_step(step: Step, options: PaperOptions) -> None:
    """Removes the results of one step: its folder, or in a folder that steps share its own runs; its log and state.

    Links to another step's runs are removed, and the runs stay.
    """
    top = Path(step.done).parts[0]
    shared = any(Path(other.done).parts[0] == top for other in options.steps if other.name != step.name)
    own = [*options.out.glob(step.runs or f"{step.name}/*"), options.out / step.done]
    for path in own if shared else [options.out / top]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for ending in ("json", "log"):
        (options.out / "steps" / f"{step.name}.{ending}").unlink(missing_ok=True)


def exchange(wanted: list[Step], options: PaperOptions) -> None:
    """Records the steps that are done, and restores the others from their records, unless they have to be run.

    A step has to be run, whatever its record, if it is to be overwritten, or if a wanted step that is neither done nor
    recorded needs its weights.
    """
    done = {step.name for step in options.steps if is_done(step, options)}
    recorded = {step.name for step in options.steps if step_records.has_record(step, options.records)}
    if options.overwrite:
        recorded -= {step.name for step in wanted}
    restored = {step.name for step in options.steps if step_records.is_restored(step, options.out)}
    by_name = {step.name: step for step in options.steps}
    # Down the chain of needs, to the first steps whose weights are at hand.
    needed, left = set(), [step for step in wanted if step.name not in done | recorded]
    while left:
        needs = {name for name in left.pop().needs if name not in needed}
        needed |= needs
        left += [by_name[name] for name in needs if name not in done - restored]
    for step in options.steps:
        if step.name in done - restored:
            step_records.keep(step, options.out, options.records)
        elif step.name in restored & needed:
            step_records.forget(step, options.out, options.records)
        # A step that was restored before is restored again: its record may be newer.
        elif step.name in recorded - needed:
            step_records.restore(step, options.out, options.records)


def check(options: PaperOptions) -> None:
    """Checks that models and data are at hand, before hours of work.

    Raises:
        UserError: a folder of data is missing, or the Hub cannot be reached.
    """
    # The built-in task and model need neither.
    if options.profile == "quick":
        return
    if options.data_root is not None:
        missing = [name for name in ("cola", "rotten_tomatoes", "movie_reviews", "buzzer", "blimp", "plain_text")
                   if not (options.data_root / name).is_dir()]
        if missing:
            raise UserError(f"--data-root {options.data_root}: has no folder {', '.join(missing)}; expected cola, "
                            "rotten_tomatoes, movie_reviews, buzzer, blimp and plain_text, or no --data-root: GPT-2 and "
                            "CoLA of the Hub")
    # Imported late, and only configurations are read: a missing model shows itself in a second.
    from data import backbones

    for model in ("smollm2", "minilm") if options.data_root else ("gpt2",):
        backbones.load_config(model)


# ---------------------------------------------------------------- the steps

def run_steps(wanted: list[Step], options: PaperOptions) -> list[str]:
    """Runs the steps that are not done, several at a time; returns the failures, a line each.

    A step begins as soon as a place is free and every step that it needs or comes after has ended.
    """
    # Each step has its part of the threads: together they never use more than the CPU has.
    jobs = options.jobs or jobs_here()
    threads = max(1, torch.get_num_threads() // jobs)
    failures, clock, stopped = [], Clock(wanted, jobs), threading.Event()
    waiting, at_work = list(wanted), {}
    make_folder(options.out / "steps")

    def tick() -> None:
        if stopped.is_set():
            raise KeyboardInterrupt

    with ThreadPoolExecutor(jobs) as pool, Bar(
            total=len(wanted), unit="step", desc="paper",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}{postfix}]") as bar:
        try:
            while waiting or at_work:
                # In the order of declaration; a failed step counts as ended, and its followers say so themselves.
                for step in list(waiting):
                    unfinished = {other.name for other in (*waiting, *at_work.values())}
                    if len(at_work) < jobs and not unfinished.intersection((*step.needs, *step.after)):
                        waiting.remove(step)
                        clock.begin(step)
                        at_work[pool.submit(finished_step, step, options, threads, tick)] = step
                bar.set_postfix_str(f"{clock}, {', '.join(step.name for step in at_work.values())}")
                # A timeout, so that the estimate moves and a signal is noticed while nothing ends.
                for future in wait(at_work, timeout=1, return_when=FIRST_COMPLETED).done:
                    step = at_work.pop(future)
                    try:
                        clock.done(step, future.result())
                    except UserError as error:
                        failures.append(f"step {step.name} failed: {error}")
                        write_json(step_records.state_of(step, options.out), {
                            "name": step.name, "command": command(step), "status": "failed", "error": str(error)})
                        Bar.write(f"run.py: {failures[-1]}; the other steps go on", file=sys.stderr)
                        clock.done(step, None)
                    bar.update()
        except BaseException:
            # A signal: every step is asked to stop, and leaving the pool joins them once they have saved their state.
            stopped.set()
            raise
    return failures


class Clock:
    """Estimates the time left from the declared minutes, scaled by the finished steps' real time over their declared one."""

    def __init__(self, wanted: list[Step], jobs: int = 1):
        self.left, self.declared, self.took = {step.name: step.minutes for step in wanted}, 0.0, 0.0
        self.began, self.jobs = {}, jobs

    def begin(self, step: Step) -> None:
        self.began[step.name] = time.monotonic()

    def done(self, step: Step, seconds: float | None) -> None:
        """Counts a step that has ended.

        Args:
            seconds: None for a failed step.
        """
        self.left.pop(step.name)
        # A failed step ended at an arbitrary moment: its time says nothing of the others'.
        if seconds is not None:
            self.declared += step.minutes
            self.took += seconds / 60

    def minutes(self) -> float:
        """Returns the minutes left: those of all steps shared among the places, at least those of the longest step."""
        scale, now = self.took / self.declared if self.took else 1.0, time.monotonic()
        left = [max(0.0, scale * minutes - (now - self.began.get(name, now)) / 60) for name, minutes in self.left.items()]
        return max([sum(left) / self.jobs, *left])

    def __str__(self) -> str:
        left = self.minutes()
        return f"about {left / 60:.1f} h left" if left >= 90 else f"about {left:.0f} min left"


def finished_step(step: Step, options: PaperOptions, threads: int, tick: Callable[[], None]) -> float:
    """Runs a step if it is not done, and records it; returns its seconds, now or before."""
    if is_done(step, options):
        return read_json(step_records.state_of(step, options.out))["seconds"]
    seconds = run_step(step, options, threads, tick)
    if options.records:
        step_records.keep(step, options.out, options.records)
    return seconds


def is_done(step: Step, options: PaperOptions) -> bool:
    """Returns whether a step was done with the same command and its result is still there.

    Raises:
        UserError: a file of one of its runs was damaged or changed since.
    """
    state = step_records.state_of(step, options.out)
    if not state.exists() or not (options.out / step.done).exists():
        return False
    before = read_json(state)
    if before["status"] != "done" or before["words"] != step.words:
        return False
    for sums in sorted(options.out.glob(f"{step.runs or f'{step.name}/*'}/{SUMS}")):
        check_sums(sums.parent)
    return True


def run_step(step: Step, options: PaperOptions, threads: int, tick: Callable[[], None]) -> float:
    """Runs one step and notes that it is done; returns its seconds, those of interrupted starts included.

    Args:
        tick: called every second; a KeyboardInterrupt from it stops the step.

    Raises:
        UserError: it failed, or needs a step that is not done; names the log.
        signals.Interrupted: asked to stop; the step has saved its state.
    """
    # A restored step has no weights: enough for the report, not for a step that reads them.
    for name in step.needs:
        state = options.out / "steps" / f"{name}.json"
        if not state.exists() or read_json(state)["status"] != "done":
            raise UserError(f"it needs the step {name}, which is not done")
        if read_json(state).get("restored"):
            raise UserError(f"it needs the weights of the step {name}, of which only the record is here; give --records too")
    rate = link_runs(options) if CHOSEN in step.words else CHOSEN
    state, log = step_records.state_of(step, options.out), options.out / "steps" / f"{step.name}.log"
    # An interrupted start of the same command goes on, and so does its clock.
    before = read_json(state) if state.exists() else {}
    spent = before.get("seconds", 0.0) if before.get("words") == step.words and before.get("status") == "begun" else 0.0
    note = {"name": step.name, "words": step.words, "command": command(step, rate)}
    began = time.monotonic()
    program, *words = [rate if word == CHOSEN else word for word in step.words]
    try:
        status = compare.run_child(words, log, threads=threads, program=ROOT / program, tick=tick)
    except BaseException:
        write_json(state, {**note, "status": "begun", "seconds": spent + time.monotonic() - began})
        raise
    seconds = spent + time.monotonic() - began
    # A program may end well and leave nothing: the file decides.
    if status or not (options.out / step.done).exists():
        last = next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "no output")
        how = f"exit status {status}" if status >= 0 else f"signal {-status}"
        raise UserError(f"{how}: {last}; see {log}")
    write_json(state, {**note, "status": "done", "seconds": seconds})
    return seconds


def jobs_here() -> int:
    """Returns the number of steps at a time: small models gain more from a core each than from several cores together."""
    return min(AT_A_TIME, torch.get_num_threads()) if device().type == "cpu" else 1


def link_runs(options: PaperOptions) -> str:
    """Links the grid's runs at the chosen learning rate into cola/ as LoRA-<seed>, so that they are not trained again.

    Returns:
        The learning rate as a word of a command line.

    Raises:
        UserError: every learning rate diverged.
    """
    entry = read_json(options.out / "grid" / "compare.json")["entries"][0]
    if entry["learning_rate"] is None:
        raise UserError("LoRA diverged at every learning rate of the grid")
    rate, cola = repr(entry["learning_rate"]), make_folder(options.out / "cola")
    for seed in entry["seeds"]:
        link = cola / f"LoRA-{seed}"
        if not link.exists():
            # A dangling link points into a grid that was removed.
            link.unlink(missing_ok=True)
            link.symlink_to(Path("..", "grid", f"lora-lr{rate}-{seed}"), target_is_directory=True)
    return rate


# ---------------------------------------------------------------- outcomes

def result(options: PaperOptions, record: dict) -> dict:
    """Returns the content of paper.json: the outcome of every step, and the differences between steps, paired by seed."""
    found = []
    for step in options.steps:
        state = step_records.state_of(step, options.out)
        known = read_json(state) if state.exists() else {}
        done = known.get("status") == "done" and known["words"] == step.words and (options.out / step.done).exists()
        found.append({"name": step.name, "command": known["command"] if done else command(step), "file": step.done,
                      "status": "done" if done else known.get("status", "not run"),
                      "seconds": known.get("seconds") if done else None})
    return {"mode": "paper", "sr": options.sr, **record, "seeds": seeds_of(options.sr, options.seeds), "steps": found,
            "differences": differences(options, {step["name"]: options.out / step["file"] for step in found
                                                 if step["status"] == "done"})}


def differences(options: PaperOptions, files: dict[str, Path]) -> list[dict]:
    """Returns the differences between steps, paired by seed: LoRA minus PEFT, and each ablation minus the student.

    Args:
        files: the study of each finished step.
    """
    def row(step: str, entry: str) -> dict | None:
        return files.get(step) and next((row for row in read_json(files[step])["entries"] if row["entry"] == entry), None)

    # Each comparison: a step and its entry, minus another step's entry.
    pairs = [("lora", "LoRA", "peft", "peft")] + [(name, "student", "distil", "student") for name in files
                                                  if name.startswith("distil-")]
    # Each loss minus KL, for the student in stages and for the plain one.
    pairs += [(name, "student", "distil-plain" if name.startswith("losses-plain-") else "distil", "student")
              for name in files if name.startswith("losses-")]
    return [{"step": step, "entry": entry, "minus": minus, **paired_differences(one, other)}
            for step, entry, other_step, minus in pairs
            if (one := row(step, entry)) and (other := row(other_step, minus)) and one["seeds"] and other["seeds"]]


# ---------------------------------------------------------------- the command line


def main(args) -> int:
    """Runs the missing steps and builds the paper; returns the exit status, 1 if a step failed."""
    quick = args.profile == "quick"
    options = PaperOptions(args.sr, args.profile, args.seeds, None if quick else args.data_root,
                           args.out or Path(f"runs/paper-{'quick-' if quick else ''}{args.sr}"), tuple(args.only),
                           args.overwrite, args.jobs, args.records, args.no_run, args.author)
    if args.dry_run:
        print(plan(options))
        return 0
    try:
        pdf, failures = make_paper(options)
    except Interrupted as error:
        return endings.interrupted(error)
    for failure in failures:
        complain(failure)
    print(f"paper: {pdf}")
    return 1 if failures else 0
