"""Repeats a finished run from its config.json and compares the results.

    python run.py repeat runs/LoRA-12345
"""
from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from adapters import peft_layout
from experiments import distil, finetune
from experiments.endings import DIVERGED
from machine import signals
from machine.streams import complain
from options.schema import DistilOptions, RunOptions
from record.config_json import rebuild
from record.files import read_json
from record.folder import changes, read_run, without_times
from record.ownership import DESCRIPTIONS, TOKENIZER_FILES, weights
from train_utils import Diverged


def run_again(folder: Path, out: Path, say: Callable[[str], None] = print, stop: Callable[[], int | None] = lambda: None
           ) -> list[str]:
    """Runs the recorded run of `folder` again, into `out`.

    Returns:
        The differences of results and environments in words; an empty list for identical results.

    Raises:
        UserError: not a finished run, or its data, base model or teacher changed since.
    """
    config, summary = read_run(folder)
    values = config["options"]
    # A repetition is compared, and shown to nobody.
    options = rebuild(RunOptions, values, out=out, repeats=folder, track="tensorboard")
    if summary["mode"] == "LoRA":
        finetune.run_finetune(options, say, stop)
    else:
        distil.run_distil(options, rebuild(DistilOptions, values), say, stop)
    found = list(differences(folder, out))
    # Another machine or version matters only as the cause of a difference.
    return found + changes(config, read_run(out)[0]) if found else []


def differences(folder: Path, again: Path) -> Iterator[str]:
    """Lists the differences of two runs' folders: weights and their description byte for byte, results without times."""
    # Both lists: a file of the second run alone is a difference too.
    written = {path.name for one in (folder, again) for path in weights(one)}
    for names in DESCRIPTIONS.values():
        written |= {name for name in names if (folder / name).exists() or (again / name).exists()}
    for name in sorted({*written, *TOKENIZER_FILES}):
        one, other = folder / name, again / name
        if not (one.exists() and other.exists()):
            # An older run saved no tokenizer.
            if name not in TOKENIZER_FILES:
                yield f"{name} is there only once"
        elif _content(one) != _content(other):
            yield f"{name} differs"
    for name in ("metrics.jsonl", "summary.json"):
        one, other = (_results(path / name) for path in (folder, again))
        if one != other:
            yield f"{name} differs ({_first_difference(one, other)})"


def _content(path: Path) -> bytes | dict:
    """Returns the part of a file that two runs share: all bytes, except the base's path in an adapter's configuration."""
    # The base may have moved since; its weights' digest was compared before the run began.
    if path.name != peft_layout.CONFIG_FILE:
        return path.read_bytes()
    return {key: value for key, value in read_json(path).items() if key != "base_model_name_or_path"}


def _results(path: Path) -> list:
    """Returns the objects of a .json or .jsonl file, without times."""
    # A run that trains nothing has no metrics.
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [without_times(json.loads(part)) for part in (text.splitlines() if path.suffix == ".jsonl" else [text])]


def _first_difference(one, other, where: str = "") -> str:
    """Describes the first difference of two JSON values: "validation.loss was 0.5, now 0.6"."""
    # Into objects and lists of both, down to the value: whole ones would be unreadable.
    if type(one) is type(other) and isinstance(one, dict | list):
        keys = list(dict.fromkeys([*one, *other])) if isinstance(one, dict) else range(max(len(one), len(other)))
        for key in keys:
            there = [key in part if isinstance(part, dict) else key < len(part) for part in (one, other)]
            if not all(there):
                return f"{where}{key} is there only once"
            if one[key] != other[key]:
                return _first_difference(one[key], other[key], f"{where}{key}." if isinstance(one, dict) else where)
    return f"{where.rstrip('.') or 'it'} was {str(one)[:60]}, now {str(other)[:60]}"


# ---------------------------------------------------------------- the command line


def main(args) -> int:
    """Repeats the run, prints the differences, and returns the exit status: 1 with differences."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = run_again(args.run, args.out or Path(folder) / "run", stop=signals.received)
        except Diverged as error:
            complain(error)
            return DIVERGED
    print(f"different: {'; '.join(found)}" if found else f"identical: {args.run} and its repetition")
    return 1 if found else 0
