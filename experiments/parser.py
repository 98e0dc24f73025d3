"""The command line: a parser of each mode, made from the options that options/ declares.

    python run.py LoRA --help
    python run.py LoRA --help all

Nothing heavy is imported here, so that --help and a mistyped option are answered at once.
"""
from __future__ import annotations

import argparse
import difflib
import json
import sys
from pathlib import Path

from machine import processes
from options.declare import Option, options_of
from options.modes import MODES

SHORT = 20  # options that --help shows at most


def note(text: str) -> None:
    """Prints a line on stderr that is no result; one process of several does so."""
    if processes.claim_once(text):
        # Bars exist only where this module was imported. A printed line would stick to the end of one.
        progress = sys.modules.get("machine.progress")
        progress.write(text) if progress else print(text, file=sys.stderr, flush=True)


def complain(message) -> None:
    """Prints a message as one line on stderr; of several processes the first that fails does so."""
    # A message may quote a file's line breaks.
    if processes.claim_once("the end"):
        print("run.py:", str(message).replace("\n", " "), file=sys.stderr, flush=True)


def closest(word: str, known) -> str:
    """Returns the end of an error message: the closest known word, or all known words."""
    # Without regard to case, LORA is close to LoRA.
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.4)
    return f"; did you mean {by_lower[close[0]]}?" if close else f"; expected one of {', '.join(known)}"


def described(option: Option) -> str:
    """Returns the option's help with its default, as argparse takes it."""
    default, text = option.default, option.declared["help"]
    # An old spelling is taken, and not shown.
    if option.declared.get("hidden"):
        return argparse.SUPPRESS
    # A flag's default is its absence.
    if default not in (None, (), "") and option.kind is not bool:
        values = default if isinstance(default, tuple) else (default,)
        words = ",".join(f"{one:g}" if option.kind is float else str(one) for one in values)
        text += f" (default: {words}{', or that of the preset' if option.declared.get('preset') else ''})"
    # argparse fills in what follows a single %.
    return text.replace("%", "%%")


def placeholder(option: Option) -> str:
    """Returns the name of an option's value in help: its choices, or a word for its kind."""
    if option.choices and not option.several:
        return "|".join(map(str, option.choices))
    name = {int: "N", float: "X", Path: "DIR", tuple: "NAME=DIR"}.get(option.kind, option.name.upper())
    return option.declared.get("metavar") or ("A,B" if option.several and not option.declared.get("repeat") else name)


class Help(argparse.Action):
    """Shows the options that people change most; every one with `all`."""

    def __call__(self, parser, namespace, values, option_string=None):
        if values != "all":
            # Suppressed at the last moment: the parser still takes them.
            for action in parser.rarely:
                action.help = argparse.SUPPRESS
        parser.print_help()
        sys.exit(0)


class Parser(argparse.ArgumentParser):
    """Parses the words of one mode; errors are one line on stderr, exit status 2.

    Attributes:
        options: the mode's options by the names that `--set` and `--search` give them.
        rarely: the actions of those that only --help all shows.
    """

    def __init__(self, mode: str):
        declared = [option for cls in MODES[mode].options for option in options_of(cls, mode)]
        places = [option.declared["metavar"] for option in declared if option.declared.get("positional")]
        super().__init__(usage=f"run.py {mode} {' '.join(places)} [options]", add_help=False, allow_abbrev=False,
                         description=MODES[mode].help,
                         formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
        self.mode, self.source, self.declared, self.rarely = mode, "", declared, []
        self.options = {option.word: option for option in declared if not option.declared.get("positional")}
        # A mode of few options shows all of them; others show the most used ones, then a group for each dataclass.
        short, groups = len(declared) <= SHORT, {}
        for option in declared:
            often = short or option.declared.get("often") or option.declared.get("positional")
            title = "most used" if often and not short else option.group.__name__.removesuffix("Options").lower()
            title = "options" if short else title
            groups[title] = groups.get(title) or self.add_argument_group(title)
            name = option.name if option.declared.get("positional") else option.flag
            action = groups[title].add_argument(name, **self._keywords(option))
            if not often:
                self.rarely.append(action)
        more = "" if short else "; `--help all` shows every option"
        groups[next(iter(groups))].add_argument("-h", "--help", action=Help, nargs="?", metavar="all",
                                                help=f"show this help{more}")

    def format_help(self) -> str:
        # A reader who knows nothing yet copies a command first.
        return f"python run.py {MODES[self.mode].example}\n\n{super().format_help()}"

    @staticmethod
    def _keywords(option: Option) -> dict:
        """Returns an option in the words of `add_argument`."""
        if option.kind is bool:
            return {"dest": option.name, "help": described(option),
                    "action": "store_false" if option.default else "store_true"}
        words = {"type": option.read, "help": described(option), "metavar": placeholder(option)}
        if place := option.declared.get("positional"):
            return words if place is True else {**words, "nargs": place, "default": None}
        return {**words, "dest": option.name, "action": "append" if option.declared.get("repeat") else "store"}

    def error(self, message: str):
        complain(self.source + message)
        sys.exit(2)

    def parse(self, words: list[str]) -> argparse.Namespace:
        """Returns every option of the mode by its field's name; None where a preset decides, once the task is known."""
        known, unknown = self.parse_known_args(words)
        given = vars(known)
        # argparse takes the sentences before the options or after them, not both.
        if self.mode == "predict":
            given["texts"] = given.get("texts", []) + [word for word in unknown if not word.startswith("-")]
            unknown = [word for word in unknown if word.startswith("-")]
        if unknown:
            flags = ["-h", "--help", *(option.flag for option in self.options.values())]
            self.error(f"unknown option {unknown[0]}{closest(unknown[0].split('=')[0], flags)}")
        # Precedence: default, --config, flag. Absent options are absent from `given` (argparse.SUPPRESS).
        config = self._read_config(given["config"], given["sr"]) if "config" in given else {}
        values = {option.name: option.start for option in self.declared} | config | given
        missing = [option.flag for option in self.declared if option.declared.get("required") and not values[option.name]]
        if missing:
            self.error(f"the following arguments are required: {', '.join(missing)}")
        return argparse.Namespace(mode=self.mode, **{
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def _read_config(self, path: Path, sr: str) -> dict:
        """Returns the options of a JSON or TOML file, checked as flags are; a run's config.json is such a file."""
        self.source = f"--config {path}: "
        values = self._load(path)
        # A run's config.json has its options under this key, next to versions and digests.
        recorded = isinstance(values.get("options"), dict)
        if recorded:
            values = dict(values["options"])
            kind = "distil" if self.mode == "distil" else "LoRA"
            if values.get("mode", kind) != kind:
                self.error(f"records a {values['mode']} run; expected one of {kind}")
            # Two flags have two fields each, and only the flags are read.
            if values.get("save_steps"):
                values["save_every"] = f"{values['save_steps']}steps"
            if values.get("teacher"):
                values["teacher"] = [values["teacher"], *values.get("more_teachers", [])]
        by_name = self.options | {option.name: option for option in self.options.values()}
        words = []
        for name, value in values.items():
            option = by_name.get(name.replace("-", "_"))
            if option is None and not recorded:
                self.error(f"unknown option {name}{closest(name, by_name)}")
            # What a run records and this mode does not take, its seed and its command's mode, is left out.
            if option is None or value in (None, []):
                continue
            if isinstance(value, dict) or isinstance(value, bool) != (option.kind is bool):
                self.error(f"{name} is {json.dumps(value, default=str)}; expected "
                           + ("true or false" if option.kind is bool else option.expected))
            words += option.words(value)
        # As words of a command line, the file's values pass the same checks as flags.
        values = vars(self.parse_args([sr, *words]))
        self.source = ""
        return values

    def _load(self, path: Path) -> dict:
        try:
            text = path.read_bytes().decode()
            if text.lstrip().startswith("{"):
                values = json.loads(text)
            else:
                # Late: its import takes as long as all of --help.
                import tomllib

                values = tomllib.loads(text)
        except OSError as error:
            self.error(f"cannot be read ({error.strerror})")
        except ValueError as error:
            self.error(f"neither JSON nor TOML ({error})")
        return values


def overview() -> str:
    """Returns the help of the command line as a whole: a line for each mode."""
    modes = "\n".join(f"  {name:<10}{mode.help}" for name, mode in MODES.items())
    return ("usage: run.py MODE ... [options]\n\nAdapt GPT-2 with LoRA, and distil it into a small RNN.\n\n"
            f"{modes}\n\n`run.py MODE --help` shows a mode's options and an example.")
