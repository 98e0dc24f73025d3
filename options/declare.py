"""Declares an option in one line: a dataclass field with default, help, bounds and choices.

    rank: int = option(8, "rank of each LoRA update", often=True)

The command line, its checks and docs/options.md are made from such fields. Nothing heavy is imported, for --help.
"""
from __future__ import annotations

import ast
import re
from argparse import ArgumentTypeError
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin, get_type_hints

ROOT = Path(__file__).parents[1]
INFINITE = float("inf")
LARGEST = {int: 10 ** 9, float: 1e30}


@dataclass(frozen=True, eq=False)
class Option:
    """Holds one declared option: reads its words and checks them."""

    help: str  # one line that can be read alone
    default: object = None  # None where the program fills it in
    choices: tuple | str = ()  # words, or FILE.py:NAME of a dictionary or tuple that holds them
    least: float = -INFINITE  # bounds of a number
    above: float = -INFINITE
    most: float = INFINITE
    pattern: str = ""  # regular expression of a value that stays a word
    metavar: str = ""  # the value in --help
    like: str = ""  # the value in a message, if it is not the metavar
    word: str = ""  # in `--set`, `--search` and messages, if it is not the name: no_keep turns `keep` off
    repeat: bool = False  # may be given several times
    unique: bool = False  # no value twice
    positional: bool | str = False  # no flag: True, "?" or "*"
    required: bool = False  # must be given
    often: bool = False  # shown by --help, not only by --help all
    hidden: bool = False  # taken, and shown nowhere: an old spelling
    free: bool = False  # changes no result, so that a resumed run may have another
    preset: bool = False  # a file in options/presets/ may set it
    before: object = None  # the value in runs recorded before the option existed
    not_in: str = ""  # modes that do not have it, with spaces between them
    # Filled in from the field: its name, the dataclass, the type of one value, and whether there are several.
    name: str = ""
    group: type = object
    kind: type = str
    several: bool = False
    flag: str = ""  # --rank, --no-keep; the name of a positional
    start: object = None  # the value before presets are read: None where one may set it

    @property
    def expected(self) -> str:
        """Returns the values that are allowed, in words."""
        if self.pattern or self.kind is bool:
            return self.like or self.metavar or "true or false"
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        number = "a whole number" if self.kind is int else "a number"
        if -INFINITE < self.least and self.most < INFINITE:
            return f"{number} from {self.least} to {self.most}"
        number += f" of at least {self.least}" if self.least > -INFINITE else ""
        number += f" above {self.above}" if self.above > -INFINITE else ""
        return number + (f", up to {self.most}" if self.most < INFINITE else "")

    def read(self, text: str):
        """Returns the value of a word; a tuple has commas between its values.

        Raises:
            ArgumentTypeError: the word stands for no allowed value; says what was expected.
        """
        if not self.several or self.repeat or self.positional:
            return self._one(text)
        # A quoted list may have spaces after its commas.
        values = tuple(self._one(part.strip()) for part in text.split(","))
        if "" in values:
            raise ArgumentTypeError(f"{text!r}; expected names separated by commas")
        if self.unique and len(set(values)) < len(values):
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
        # Comparisons with nan are false, and infinity is beyond the largest number.
        if self.kind in LARGEST and not (
                self.above < value and self.least <= value <= self.most and abs(value) <= LARGEST[self.kind]):
            return False
        fits = not self.pattern or re.fullmatch(self.pattern, value, re.ASCII) is not None
        return fits and (not self.choices or value in self.choices)

    def words(self, value) -> list[str]:
        """Returns the option and its value as words of a command line."""
        # A default flag is left out.
        if self.kind is bool:
            return [] if value == self.default else [self.flag]
        values = value if self.repeat else [",".join(map(str, value)) if isinstance(value, list | tuple) else value]
        return [f"{self.flag}={one}" for one in values]


def option(default=MISSING, help: str = "", choices: tuple | str = (), **declared):
    """Returns a dataclass field that is an option of the command line; `declared` are fields of `Option`."""
    made = Option(help, None if default is MISSING else default, choices, **declared)
    return field(default=default, metadata={"option": made})


def options_of(cls: type, mode: str) -> Iterator[Option]:
    """Lists the options that a dataclass declares for a mode, those of nested dataclasses in their place."""
    # Annotations are texts until they are looked up.
    kinds = get_type_hints(cls)
    for one in fields(cls):
        kind, declared = kinds[one.name], one.metadata.get("option")
        if declared and mode in declared.not_in.split():
            continue
        if is_dataclass(kind):
            yield from options_of(kind, mode)
        elif declared:
            # The type of one value: int of `int | None`, str of `tuple[str, ...]`.
            kind = get_args(kind)[0] if isinstance(kind, UnionType) else kind
            several = get_origin(kind) is tuple
            kind = str if declared.pattern else get_args(kind)[0] if several else kind
            word = declared.word or ("no_" if kind is bool and declared.default else "") + one.name
            choices = names_in(declared.choices) if isinstance(declared.choices, str) else declared.choices
            yield replace(declared, name=one.name, group=cls, kind=kind, several=several, choices=choices, word=word,
                          flag=word if declared.positional else "--" + word.replace("_", "-"),
                          start=None if declared.preset else declared.default,
                          help=declared.help + ("; may be given several times" if declared.repeat else ""))


def names_in(place: str) -> tuple[str, ...]:
    """Returns the keys of a module's dictionary, or the words of its tuple, FILE.py:NAME, without importing it.

    So a new loss is a choice of --kd-loss as soon as it stands in the dictionary, and --help does not import PyTorch.
    """
    path, _, name = place.rpartition(":")
    # Parsed, not imported: a statement NAME = {...} or NAME: type = (...).
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if getattr(target, "id", None) == name:
            return tuple(one.value for one in (node.value.keys if isinstance(node.value, ast.Dict) else node.value.elts))
    raise LookupError(f"{path}: no {name}")
