"""The types of the command line's values: a word becomes a value, or a message that says what was expected."""
from __future__ import annotations

import argparse
import re
from pathlib import Path

from options.schema import TrainOptions


def number(kind, low, high, what: str):
    """Returns an argparse type: a number within bounds."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {what}")
        return value
    return parse


COUNT = number(int, 1, 10 ** 9, "a whole number of at least 1")
WHOLE = number(int, 0, 10 ** 9, "a whole number of at least 0")
SHARE = number(float, 0, 1, "a number from 0 to 1")
POSITIVE = number(float, 1e-30, 1e30, "a number above 0")
NOT_NEGATIVE = number(float, 0, 1e30, "a number of at least 0")


def save_every_type(text: str) -> str:
    """An argparse type: minutes (a bare number, or 10min) or steps (50steps)."""
    saving(text)
    return text


def saving(text: str) -> dict:
    """Returns `--save-every` as the fields of TrainOptions."""
    what = "minutes, such as 10 or 10min, or steps, such as 50steps"
    if text.endswith("steps"):
        return {"save_every": TrainOptions.save_every,
                "save_steps": number(int, 1, 10 ** 9, what)(text.removesuffix("steps"))}
    return {"save_every": number(float, 1e-30, 1e30, what)(text.removesuffix("min")), "save_steps": None}


def one_of(words):
    """Returns an argparse type: one of these words."""
    def parse(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(words)}")
        return text
    return parse


def list_of(kind):
    """Returns an argparse type: values with commas between them, each once."""
    def parse(text: str) -> list:
        values = [kind(part.strip()) for part in text.split(",")]
        if len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"{text!r}: a value is given twice")
        return values
    return parse


def sr_type(text: str) -> str:
    if not re.fullmatch("[0-9]{5}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected exactly five digits, such as 12345")
    return text


def names_type(text: str) -> tuple[str, ...]:
    """An argparse type: names separated by commas."""
    names = tuple(part.strip() for part in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r}; expected names separated by commas")
    return names


def named_folder(text: str) -> tuple[str, Path]:
    """An argparse type: NAME=DIR."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=DIR")
    return name, Path(folder)
