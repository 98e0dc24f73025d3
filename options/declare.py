"""Declares an option in one line: a dataclass field with default, help, bounds and choices.

    rank: int = option(8, "rank of each LoRA update", often=True)

The command line, its checks and docs/options.md are made from such fields. Nothing heavy is imported, for --help.
"""
from __future__ import annotations

import ast
import re
from argparse import ArgumentTypeError
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin, get_type_hints

ROOT = Path(__file__).parents[1]
DECLARED = {"least", "above", "most", "choices", "metavar", "flag", "reads", "repeat", "unique", "positional", "required",
            "often", "free", "preset", "before", "not_in", "hidden"}


def option(default=MISSING, help: str = "", **declared):
    """Returns a dataclass field that is an option of the command line.

    Args:
        default: without one, the program fills the field in where the option is not given.
        help: one line that can be read alone.
        declared: least, above, most: bounds of a number. choices: words, or a function that returns them. metavar, flag:
            other names than the field's. reads: a function from a word to the value. repeat: may be given several times.
            unique: no value twice. positional: True, "?" or "*": no flag. required: must be given. often: shown by --help,
            not only by --help all. free: changes no result, so that a resumed run may have another. preset: a file in
            options/presets/ may set it. before: the value in runs recorded before the option existed. not_in: modes that
            do not have it, with spaces between them. hidden: taken, and shown nowhere: an old spelling.
    """
    # A mistyped word would be a check that is never made.
    if unknown := declared.keys() - DECLARED:
        raise TypeError(f"option() has no {', '.join(sorted(unknown))}")
    return field(default=default, metadata={"help": help, **declared})


@dataclass(frozen=True)
class Option:
    """Holds one declared option: reads its words and checks them."""

    name: str  # of the field, of the parsed argument and in config.json
    group: type  # the dataclass that declares it
    kind: type  # of one value
    several: bool  # whether the value is a tuple
    default: object  # None where the program fills it in
    declared: Mapping

    @property
    def flag(self) -> str:
        """Returns the option on the command line: --rank, or --no-keep where the flag turns a default off."""
        off = "no-" if self.kind is bool and self.default else ""
        return self.declared.get("flag", "--" + off + self.name.replace("_", "-"))

    @property
    def word(self) -> str:
        """Returns the option in `--set`, `--search` and messages: rank, no_keep."""
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def start(self):
        """Returns the value before presets are read: None where one may set it."""
        return None if self.declared.get("preset") else self.default

    @property
    def choices(self) -> tuple:
        choices = self.declared.get("choices", ())
        return choices() if callable(choices) else choices

    @property
    def expected(self) -> str:
        """Returns the values that are allowed, in words."""
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        least, above, most = (self.declared.get(key) for key in ("least", "above", "most"))
        number = "a whole number" if self.kind is int else "a number"
        if above is not None:
            return f"{number} above {above}" + ("" if most is None else f", up to {most}")
        if least is None:
            return number
        return f"{number} of at least {least}" if most is None else f"{number} from {least} to {most}"

    def read(self, text: str):
        """Returns the value of a word; a tuple has commas between its values.

        Raises:
            ArgumentTypeError: the word stands for no allowed value; says what was expected.
        """
        if reads := self.declared.get("reads"):
            return reads(text)
        if not self.several or self.declared.get("repeat"):
            return self._one(text)
        # A quoted list may have spaces after its commas.
        values = tuple(self._one(part.strip()) for part in text.split(","))
        if "" in values:
            raise ArgumentTypeError(f"{text!r}; expected names separated by commas")
        if self.declared.get("unique") and len(set(values)) < len(values):
            raise ArgumentTypeError(f"{text!r}: a value is given twice")
        return values

    def _one(self, text: str):
        # The kind itself reads a word: int, float, str, Path.
        try:
            value = self.kind(text)
        except ValueError:
            value = None
        if value is None or not self._allows(value):
            raise ArgumentTypeError(f"{text!r}: expected {self.expected}")
        return value

    def _allows(self, value) -> bool:
        if self.choices:
            return value in self.choices
        if self.kind not in (int, float):
            return True
        # Comparisons with nan are false, and infinity is beyond the largest number.
        most = self.declared.get("most", 10 ** 9 if self.kind is int else 1e30)
        return self.declared.get("least", -most) <= value <= most and value > self.declared.get("above", -2 * most)

    def words(self, value) -> list[str]:
        """Returns the option and its value as words of a command line."""
        # A default flag is left out.
        if self.kind is bool:
            return [] if value == self.default else [self.flag]
        if self.declared.get("repeat"):
            return [f"{self.flag}={one}" for one in value]
        return [f"{self.flag}={','.join(map(str, value)) if isinstance(value, list | tuple) else value}"]


def options_of(cls: type, mode: str) -> Iterator[Option]:
    """Lists the options that a dataclass declares for a mode, those of nested dataclasses in their place."""
    # Annotations are texts until they are looked up.
    kinds = get_type_hints(cls)
    for one in fields(cls):
        kind = kinds[one.name]
        if mode in one.metadata.get("not_in", "").split():
            continue
        if is_dataclass(kind):
            yield from options_of(kind, mode)
        elif one.metadata:
            # The type of one value: int of `int | None`, str of `tuple[str, ...]`.
            if isinstance(kind, UnionType):
                kind = get_args(kind)[0]
            several = get_origin(kind) is tuple
            default = None if one.default is MISSING else one.default
            yield Option(one.name, cls, get_args(kind)[0] if several else kind, several, default, one.metadata)


# ---------------------------------------------------------------- words that are no plain numbers or names

def names_in(path: str, name: str):
    """Returns a function that lists the keys of a module's dictionary, or the words of its tuple, without importing it.

    So a new loss is a choice of --kd-loss as soon as it stands in the dictionary, and --help does not import PyTorch.
    """
    def names() -> tuple[str, ...]:
        # Parsed, not imported: a statement NAME = {...} or NAME: type = (...).
        for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if getattr(target, "id", None) == name:
                return tuple(one.value for one in (node.value.keys if isinstance(node.value, ast.Dict) else node.value.elts))
        raise LookupError(f"{path}: no {name}")
    return names


def five_digits(text: str) -> str:
    """Returns SR, which seeds a run and names its folder."""
    if not re.fullmatch("[0-9]{5}", text):
        raise ArgumentTypeError(f"{text!r}: expected exactly five digits, such as 12345")
    return text


def saving(text: str) -> dict:
    """Returns --save-every as fields of TrainOptions: minutes (10, 10min) or optimiser steps (50steps)."""
    steps = text.endswith("steps")
    try:
        value = int(text.removesuffix("steps")) if steps else float(text.removesuffix("min"))
    except ValueError:
        value = 0
    if not 0 < value < 1e30:
        raise ArgumentTypeError(f"{text!r}: expected minutes, such as 10 or 10min, or steps, such as 50steps")
    return {"save_steps": value} if steps else {"save_every": value, "save_steps": None}


def minutes_or_steps(text: str) -> str:
    """Returns the word of --save-every, checked."""
    saving(text)
    return text


def class_weights(text: str) -> str:
    """Returns the word of --class-weights, checked."""
    if text not in ("balanced", "none"):
        try:
            values = [float(value) for value in text.split(",")]
        except ValueError:
            values = [-1.0]
        if not all(0 <= value < 1e30 for value in values) or not any(values) or len(values) < 2:
            raise ArgumentTypeError(f"{text!r}: expected balanced, none, or a number of at least 0 for each class, such as "
                                    "2.5,1")
    return text


def fold(text: str) -> str:
    """Returns the word of --fold, checked."""
    found = re.fullmatch("([0-9]{1,4})/([0-9]{1,4}):([0-9]{5})", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]) >= 2:
        raise ArgumentTypeError(f"{text!r}: expected the number of a fold, that of all folds and a seed, such as 2/5:12345")
    return text


def pair(text: str) -> tuple[str, Path]:
    """Returns the two parts of NAME=DIR."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise ArgumentTypeError(f"{text!r}: expected NAME=DIR")
    return name, Path(folder)
