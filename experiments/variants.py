"""Many runs from one command line: a comparison's entries, the options that a sweep searches, a run's seeds."""
from __future__ import annotations

from experiments.parser import Parser, closest
from machine.errors import UserError
from options.declare import Option
from options.schema import FREE, RunOptions
from record.config_json import as_json

# What every entry of a comparison, and every trial of a sweep, has in common: the data and where results go.
COMMON = ("sr", "task", "data", "label_column", "eval_split", "limit", "out", "plots", "no_plots", "no_keep", "keep_memory",
          "save_every", "resume", "overwrite")
COMMAND = ("config", "seeds", "jobs")  # options of one command that stands for many runs
# What each run has for itself.
OWN = ("lr", "out", "plots", "no_plots", "resume", "overwrite", *COMMAND)


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


def seeds_of(sr: str, count: int) -> list[str]:
    """Returns SR, SR + 1, ...: five digits each; 00000 follows 99999."""
    return [f"{(int(sr) + i) % 100_000:05d}" for i in range(count)]
