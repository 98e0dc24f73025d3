"""Many runs from one command line: a comparison's entries, the options that a sweep searches, a run's seeds."""
from __future__ import annotations

import argparse
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from experiments.arguments import choose, distil_options, finetune_options
from experiments.parser import Parser, closest
from machine.errors import UserError
from options.declare import Option
from options.schema import FREE, RunOptions, TableOptions, as_json, settings_of

# What every entry of a comparison, and every trial of a sweep, has in common: the data and where results go.
COMMON = ("sr", "task", "data", "label_column", "eval_split", "limit", "out", "plots", "no_plots", "no_keep", "keep_memory",
          "save_every", "resume", "overwrite")
COMMAND = ("config", "seeds", "jobs")  # options of one command that stands for many runs
# What each run has for itself.
OWN = ("lr", "out", "plots", "no_plots", "resume", "overwrite", *COMMAND)


@dataclass(frozen=True)
class Entry:
    """One row of the comparison."""

    name: str
    words: list[str]  # the options of its runs on the command line, but for --lr and --out
    options: RunOptions  # the same, parsed
    rates: list[float]  # learning rates to choose from; none for a method that trains nothing


@dataclass(frozen=True)
class SeedRun:
    """Holds one seed's run of `LoRA` or `distil` with `--seeds`."""

    seed: str
    folder: Path
    words: list[str]  # of its command line, but for its folder: mode, SR, options
    options: dict  # as its config.json records them; without those that only the run itself resolves
    run: RunOptions


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, whole ones where both are."""

    low: int | float
    high: int | float
    log: bool = False


class Variant(Parser):
    """Parses the options of one entry, trial or seed; an error names the option that held them."""

    def __init__(self, where: str, mode: str = "LoRA"):
        super().__init__(mode)
        self.where = where

    def error(self, message: str):
        raise UserError(f"{self.where}: {message}")

    def words(self, args, changes: dict[str, str]) -> list[str]:
        """Returns all in `args` that is no default, with `changes` (option -> value as written), as a command line."""
        words = []
        for word, option in self.options.items():
            value = getattr(args, option.name, option.start)
            if word not in (*changes, *OWN) and value != option.start:
                words += option.words(value)
        for word, value in changes.items():
            option = self.option(word)
            if word in ("targets", "layers"):  # the comma stands between options, or between choices
                value = "" if value == "all" else value.replace("+", ",")
            if option.kind is bool and value not in ("yes", "no"):
                self.error(f"{word}={value}: expected yes or no")
            if value not in ("", "no"):
                words.append(option.flag if option.kind is bool else f"{option.flag}={value}")
        return words

    def option(self, word: str) -> Option:
        """Returns the option of this name."""
        if word not in self.options or word in COMMAND:
            self.error(f"unknown option {word}{closest(word, self.options)}")
        return self.options[word]


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


def settings(args, *more: str) -> dict:
    """Returns every option of a comparison or sweep that may change its results."""
    skipped = ("mode", "out", "plots", "no_plots", "resume", "overwrite", "config", "device", "jobs", *FREE, *more)
    found = {name: value for name, value in vars(args).items() if name not in skipped}
    # As studies recorded them that began before these options had another form, or existed: those can go on, too.
    if "targets" in found:
        found["targets"] = ",".join(found["targets"])
    if found["fast"] == RunOptions.fast:
        del found["fast"]
    return as_json(found)


def search(args) -> dict[str, list | Range]:
    """Returns --search as option -> its choices, or a range."""
    found = {}
    for text in args.search:
        name, equals, rest = text.partition("=")
        parser, name = Variant(f"--search {text}"), name.replace("-", "_")
        if not equals or not rest:
            raise UserError(f"--search {text}: expected OPTION=VALUES, such as rank=1,2,4 or lr=1e-4..1e-3")
        if name in (*COMMON, "model", "deterministic"):
            parser.error(f"{name} is the same for every trial")
        if name in found:
            parser.error(f"{name} is searched twice")
        option = parser.option(name)
        if match := re.fullmatch(r"([^,]+?)\.\.([^,]+?)(?::(log|linear))?", rest):
            low, high = (_value(parser, args, name, end) for end in match.groups()[:2])
            log = (match[3] or ("log" if name in ("lr", "head_lr") else "linear")) == "log"
            if option.kind is bool or not isinstance(low, (int, float)) or not low < high or (log and low <= 0):
                parser.error("expected a range LOW..HIGH of numbers, LOW below HIGH" + (" and above 0" if log else ""))
            if args.sampler == "grid":
                parser.error("a grid needs choices, such as 1,2,4, not a range")
            found[name] = Range(low, high, log)
        else:
            found[name] = [_value(parser, args, name, part) for part in rest.split(",")]
            if len(set(found[name])) < len(found[name]):
                parser.error("a value is given twice")
    return found


def _value(parser: Variant, args, name: str, text: str):
    """Returns a searched value as a number where the option is one, else as written.

    Raises:
        UserError: the option itself would refuse it.
    """
    if not text:
        parser.error("a value is empty")
    parsed = getattr(parser.parse([args.sr, *parser.words(args, {name: text})]), parser.option(name).name)
    return parsed if isinstance(parsed, (int, float)) and not isinstance(parsed, bool) else text


def trial_options(args, values: dict, folder: Path) -> RunOptions:
    """Returns the options of a sweep's trial: the common ones, its own values (option -> value), and its folder."""
    parser = Variant("sweep")
    parsed = parser.parse([args.sr, *parser.words(args, {name: str(value) for name, value in values.items()})])
    parsed.lr = values.get("lr") or args.lr
    return replace(finetune_options(parsed), out=folder, overwrite=True)


# ---------------------------------------------------------------- seeds of one run

def seeds_of(sr: str, count: int) -> list[str]:
    """Returns SR, SR + 1, ...: five digits each; 00000 follows 99999."""
    return [f"{(int(sr) + i) % 100_000:05d}" for i in range(count)]


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
        one = argparse.Namespace(**{**vars(args), "sr": seed, "out": folder / f"{args.mode}-{seed}"})
        if args.mode == "LoRA":
            options = finetune_options(one)
            recorded, resolved = asdict(options.lora), ["max_length", "precision"]
        else:
            if args.teacher and not (args.teacher[0] / "config.json").exists():
                one.teacher = [folder / f"LoRA-{seed}" for folder in args.teacher]
            options, student = distil_options(one)
            one.teacher, recorded = [student.teacher, *student.more_teachers], asdict(student)
            resolved = ["model", "data", "limit", "max_length", "precision", "embedding_size", "hidden_size",
                        "directions", "augment", "label_precision", *(field.name for field in fields(TableOptions))]
        recorded = as_json({**recorded, **asdict(options.train), **settings_of(options)})
        words = [args.mode, seed, *parser.words(one, {}), *([] if args.lr is None else [f"--lr={args.lr!r}"])]
        unknown = [name for name in resolved if recorded[name] in (None, [], "auto", getattr(TableOptions, name, None))]
        known = {name: value for name, value in recorded.items() if name not in (*FREE, *unknown)}
        found.append(SeedRun(seed, one.out, words, known, options))
    return found
