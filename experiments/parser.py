"""The command line: a parser of each mode, made from the options that options/ declares.

Nothing heavy is imported here, so that --help and a mistyped option are answered at once.
"""
from __future__ import annotations

import argparse
import difflib
import json
import sys
from pathlib import Path

from machine.streams import complain
from options.declare import Option, options_of
from options.modes import MODES

SHORT = 20  # options that --help shows at most
VALUES = {int: "N", float: "X", Path: "DIR"}  # values in --help


def closest(word: str, known) -> str:
    """Returns the end of an error message: the closest known word, or all known words."""
    # Without regard to case, LORA is close to LoRA.
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.4)
    return f"; did you mean {by_lower[close[0]]}?" if close else f"; expected one of {', '.join(known)}"


def overview() -> str:
    """Returns the help of the command line as a whole: a line for each mode."""
    modes = "\n".join(f"  {name:<10}{mode.help}" for name, mode in MODES.items())
    return ("usage: run.py MODE ... [options]\n\nAdapt GPT-2 with LoRA, and distil it into a small RNN.\n\n"
            f"{modes}\n\n`run.py MODE --help` shows a mode's options and an example.")


def keywords(option: Option, shown: bool) -> dict:
    """Returns an option in the words of `add_argument`."""
    # argparse fills in what follows a single %.
    default, text = option.default, option.help.replace("%", "%%")
    # A flag's default is its absence.
    if default not in (None, (), "") and option.kind is not bool:
        values = default if option.several else (default,)
        words = ",".join(f"{one:g}" if isinstance(one, float) else str(one) for one in values)
        text += f" (default: {words}{', or that of the preset' if option.preset else ''})"
    found = {"help": text if shown else argparse.SUPPRESS}
    if option.kind is bool:
        return found | {"dest": option.name, "action": "store_false" if default else "store_true"}
    choices, name = "|".join(map(str, option.choices)), VALUES.get(option.kind, option.name.upper())
    several = option.several and not option.repeat
    found |= {"type": option.read, "metavar": option.metavar or ("A,B" if several else choices or name)}
    if option.positional:
        return found if option.positional is True else found | {"nargs": option.positional, "default": None}
    return found | {"dest": option.name, "action": "append" if option.repeat else "store"}


class Parser(argparse.ArgumentParser):
    """Parses the words of one mode; errors are one line on stderr, exit status 2.

    Args:
        everything: whether --help shows every option, not only those that people change most.
    """

    def __init__(self, mode: str, everything: bool = False):
        self.mode, self.source = mode, ""
        self.declared = [option for cls in MODES[mode].options for option in options_of(cls, mode)]
        # By the names that `--set` and `--search` give them.
        self.options = {option.word: option for option in self.declared if not option.positional}
        places = " ".join(option.metavar for option in self.declared if option.positional)
        super().__init__(usage=f"run.py {mode} {places} [options]", description=MODES[mode].help, add_help=False,
                         allow_abbrev=False, argument_default=argparse.SUPPRESS)
        # A mode of few options shows all of them; others show the most used ones, then a group for each dataclass.
        few, groups = len(self.declared) <= SHORT, {}
        for option in self.declared:
            often = few or option.often or bool(option.positional)
            group = "most used" if often else option.group.__name__.removesuffix("Options").lower()
            title = "options" if few else group
            groups[title] = groups.get(title) or self.add_argument_group(title)
            groups[title].add_argument(option.flag, **keywords(option, (often or everything) and not option.hidden))
        next(iter(groups.values())).add_argument("-h", "--help", action="help", help="show this help" + (
            "" if few else "; `--help all` shows every option"))

    def format_help(self) -> str:
        # A reader who knows nothing yet copies a command first.
        return f"python run.py {MODES[self.mode].example}\n\n{super().format_help()}"

    def error(self, message: str):
        complain(self.source + message)
        sys.exit(2)

    def parse(self, words: list[str]) -> argparse.Namespace:
        """Returns every option of the mode by its field's name; None where a preset decides, once the task is known."""
        # Intermixed: sentences stand before the options, after them, or both.
        known, unknown = self.parse_known_intermixed_args(words)
        if unknown:
            flag = unknown[0].partition("=")[0]
            others = ", ".join(mode for mode in MODES if flag in Parser(mode)._option_string_actions)
            told = f"; an option of {others}" if others else closest(flag, self._option_string_actions)
            self.error(f"unknown option {unknown[0]}{told}")
        # Precedence: default, --config, flag. Absent options are absent from `given` (argparse.SUPPRESS).
        given = vars(known)
        config = self._read_config(given["config"], given["sr"]) if "config" in given else {}
        values = {option.name: option.start for option in self.declared} | config | given
        if missing := [option.flag for option in self.declared if option.required and not values[option.name]]:
            self.error(f"the following arguments are required: {', '.join(missing)}")
        return argparse.Namespace(mode=self.mode, **{
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def _read_config(self, path: Path, sr: str) -> dict:
        """Returns the options of a JSON or TOML file, checked as flags are; a run's config.json is such a file."""
        # Late: its import takes as long as all of --help.
        import tomllib

        self.source = f"--config {path}: "
        try:
            text = path.read_bytes().decode()
            values = json.loads(text) if text.lstrip().startswith("{") else tomllib.loads(text)
        except OSError as error:
            self.error(f"cannot be read ({error.strerror})")
        except ValueError as error:
            self.error(f"neither JSON nor TOML ({error})")
        # A run's config.json has its options under this key, next to versions and digests.
        if recorded := isinstance(values.get("options"), dict):
            values, kind = dict(values["options"]), "distil" if self.mode == "distil" else "LoRA"
            if values.get("mode", kind) != kind:
                self.error(f"records a {values['mode']} run; expected one of {kind}")
            # Two flags have two fields each, and only the flags are read.
            if values.get("save_steps"):
                values["save_every"] = f"{values['save_steps']}steps"
            if values.get("teacher"):
                values["teacher"] = [values["teacher"], *values.get("more_teachers", [])]
        by_name, words = self.options | {option.name: option for option in self.options.values()}, []
        for name, value in values.items():
            option = by_name.get(name.replace("-", "_"))
            if option is None and not recorded:
                self.error(f"unknown option {name}{closest(name, by_name)}")
            # What a run records and this mode does not take, its seed and its command's mode, is left out.
            if option is None or value in (None, []):
                continue
            if isinstance(value, dict) or isinstance(value, bool) != (option.kind is bool):
                self.error(f"{name} is {json.dumps(value, default=str)}; expected {option.expected}")
            words += option.words(value)
        # As words of a command line, the file's values pass the same checks as flags.
        values, self.source = vars(self.parse_args([sr, *words])), ""
        return values
