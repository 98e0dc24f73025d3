"""Keeps what a paper's finished steps left, all but the weights: another machine goes on from there, or builds the PDF.

A step's record is one file, DIR/STEP.json: its state, and as text the JSON files that the report reads. A step that needs
another one's weights cannot do with its record.
"""
from __future__ import annotations

import json
from pathlib import Path

from experiments.steps import Step
from machine.errors import UserError
from record.files import make_folder, read_json, write_file, write_json
from report.paper import SENTENCES

REPORTED = ("config.json", "summary.json", "metrics.jsonl")  # of a run


def state_of(step: Step, out: Path) -> Path:
    """Returns the file that says what became of a step."""
    return out / "steps" / f"{step.name}.json"


def is_restored(step: Step, out: Path) -> bool:
    """Returns whether a step's files come from its record, without weights."""
    state = state_of(step, out)
    return state.exists() and read_json(state).get("restored", False)


def has_record(step: Step, records: Path) -> bool:
    """Returns whether there is a record of the same command.

    Raises:
        UserError: a file of the record's name is none.
    """
    return (records / f"{step.name}.json").exists() and _read(step, records)["state"]["words"] == step.words


def _read(step: Step, records: Path) -> dict:
    path = records / f"{step.name}.json"
    record = read_json(path)
    if not isinstance(record.get("files"), dict) or "words" not in record.get("state", ()):
        raise UserError(f"{path}: no record of a step; expected what run.py paper --records wrote")
    return record


def keep(step: Step, out: Path, records: Path) -> None:
    """Writes the record of a step that is done in the paper's folder `out`."""
    runs = sorted(out.glob(step.runs)) if step.reported else []
    files = [out / step.done, *(run / name for run in runs for name in REPORTED)]
    write_json(make_folder(records) / f"{step.name}.json", {
        "state": read_json(state_of(step, out)),
        "files": {str(path.relative_to(out)): _kept(path) for path in files if path.exists()}})


def _kept(path: Path) -> str:
    """Returns what a record holds of a file: of a diagnosis no more sentences than the report shows, for data stay out."""
    if path.name != "diagnose.json":
        return path.read_text()
    diagnosis = read_json(path)
    for holder, key in ((diagnosis, "disagreements"), (diagnosis["all_wrong"], "rows")):
        holder[key] = holder[key][:SENTENCES]
    return json.dumps(diagnosis)


def restore(step: Step, out: Path, records: Path) -> None:
    """Writes into the paper's folder what a record holds.

    Raises:
        UserError: the record names a file outside that folder.
    """
    record = _read(step, records)
    for name, text in record["files"].items():
        if not (out / name).resolve().is_relative_to(out.resolve()):
            raise UserError(f"{records / f'{step.name}.json'}: {name} lies outside the paper's folder")
        make_folder((out / name).parent)
        write_file(out / name, text)
    make_folder(out / "steps")
    write_json(state_of(step, out), record["state"] | {"restored": True})


def forget(step: Step, out: Path, records: Path) -> None:
    """Removes what `restore` wrote: without weights a run is not finished for a step that reads them."""
    for name in _read(step, records)["files"]:
        (out / name).unlink(missing_ok=True)
        if (out / name).parent.is_dir() and not any((out / name).parent.iterdir()):
            (out / name).parent.rmdir()
    state_of(step, out).unlink(missing_ok=True)
