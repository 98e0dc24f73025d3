"""Turns one command line into those of many runs: entries of a comparison, trials of a sweep, seeds.

    Variant("--set r2").words(args, {"rank": "2"})    # the common options of `args`, and --rank=2
"""
from __future__ import annotations

from experiments.parser import Parser, closest
from machine.errors import UserError
from options.declare import Option
from options.schema import FREE, RunOptions
from record.config_json import as_json

# Options that all entries of a comparison, or trials of a sweep, have in common: the data, and the folder of results.
COMMON = ("sr", "task", "data", "label_column", "eval_split", "limit", "out", "plots", "no_plots", "no_keep", "keep_memory",
          "save_every", "resume", "overwrite")
# Options of the command that starts the runs.
COMMAND = ("config", "seeds", "folds", "jobs")
# Options that each run has for itself.
OWN = ("lr", "out", "plots", "no_plots", "resume", "overwrite", *COMMAND)


class Variant(Parser):
    """Parses the options of one entry, trial or seed; an error names their place on the command line."""

    def __init__(self, where: str, mode: str = "LoRA"):
        super().__init__(mode)
        self.where = where

    def error(self, message: str):
        raise UserError(f"{self.where}: {message}")

    def words(self, args, changes: dict[str, str]) -> list[str]:
        """Returns a command line of the values in `args` that are no defaults, and of `changes`.

        Args:
            changes: option -> value as written, in the place of that of `args`.
        """
        words = []
        # Defaults are left out: presets may still set them in the run.
        for word, option in self.options.items():
            value = getattr(args, option.name, option.start)
            if word not in (*changes, *OWN) and value != option.start:
                words += option.words(value)
        for word, value in changes.items():
            option = self.option(word)
            # In --set and --search, the comma separates options or choices.
            if word in ("targets", "layers", "rank_pattern", "alpha_pattern", "class_weights"):
                value = "" if value == "all" else value.replace("+", ",")
            if option.kind is bool and value not in ("yes", "no"):
                self.error(f"{word}={value}: expected yes or no")
            # A flag that is off, and all targets or layers, are the option's absence.
            if value not in ("", "no"):
                words.append(option.flag if option.kind is bool else f"{option.flag}={value}")
        return words

    def option(self, word: str) -> Option:
        """Returns an option by its word."""
        if word not in self.options or word in COMMAND:
            self.error(f"unknown option {word}{closest(word, self.options)}")
        return self.options[word]


def settings(args, *more: str) -> dict:
    """Returns every option of a comparison or sweep that may change its results."""
    skipped = ("mode", "out", "plots", "no_plots", "resume", "overwrite", "config", "device", "jobs", *FREE, *more)
    found = {name: value for name, value in vars(args).items() if name not in skipped}
    # In the form of early studies, which can go on: targets were a text, and there was no --kernels.
    if "targets" in found:
        found["targets"] = ",".join(found["targets"])
    if found["fast"] == RunOptions.fast:
        del found["fast"]
    # Nor was there --join, which has no meaning without two text columns.
    if len(found.get("text_column", ())) != 2 or found.get("template") is not None:
        found.pop("join", None)
    return as_json(found)


def seeds_of(sr: str, count: int) -> list[str]:
    """Returns SR, SR + 1, ...: five digits each; 00000 follows 99999."""
    return [f"{(int(sr) + i) % 100_000:05d}" for i in range(count)]
