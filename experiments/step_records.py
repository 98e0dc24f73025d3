"""Records the results of a paper's finished steps without their weights, for another machine to go on or build the PDF.

    python run.py paper 12345 --records benchmarks/results/paper

A step's record is one file, DIR/STEP.json: its state, and as text the JSON files that the report reads. A record does not
serve a step that needs another one's weights.
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
    """Returns the file of a step's state: its command, status and seconds."""
    return out / "steps" / f"{step.name}.json"


def is_restored(step: Step, out: Path) -> bool:
    """Returns whether a step's files come from its record, without weights."""
    state = state_of(step, out)
    return state.exists() and read_json(state).get("restored", False)


def has_record(step: Step, records: Path) -> bool:
    """Returns whether a record of the same command exists.

    Raises:
        UserError: a file of that name is no record.
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
    # The report reads single runs of few steps; of the others the table is enough.
    runs = sorted(out.glob(step.runs)) if step.reported else []
    files = [out / step.done, *(run / name for run in runs for name in REPORTED)]
    write_json(make_folder(records) / f"{step.name}.json", {
        "state": read_json(state_of(step, out)),
        "files": {str(path.relative_to(out)): _recorded_text(path) for path in files if path.exists()}})


def _recorded_text(path: Path) -> str:
    """Returns a file's text as a record holds it: a diagnosis with at most the sentences that the report shows."""
    # Records are published with the code; data sets are not ours to publish.
    if path.name != "diagnose.json":
        return path.read_text()
    diagnosis = read_json(path)
    for holder, key in ((diagnosis, "disagreements"), (diagnosis["all_wrong"], "rows")):
        holder[key] = holder[key][:SENTENCES]
    return json.dumps(diagnosis)


def restore(step: Step, out: Path, records: Path) -> None:
    """Writes the files of a record into the paper's folder.

    Raises:
        UserError: the record names a file outside that folder.
    """
    # All names are checked before the first file is written.
    files = _files_inside(step, out, records)
    for path, text in files.items():
        make_folder(path.parent)
        write_file(path, text)
    make_folder(out / "steps")
    write_json(state_of(step, out), _read(step, records)["state"] | {"restored": True})


def forget(step: Step, out: Path, records: Path) -> None:
    """Removes the files of `restore`, so that a run without weights does not count as finished.

    Raises:
        UserError: the record names a file outside the paper's folder.
    """
    for path in _files_inside(step, out, records):
        path.unlink(missing_ok=True)
        if path.parent.is_dir() and not any(path.parent.iterdir()):
            # An empty folder would pass for a run that was begun.
            path.parent.rmdir()
    state_of(step, out).unlink(missing_ok=True)


def _files_inside(step: Step, out: Path, records: Path) -> dict[Path, str]:
    """Returns the texts of a record by path in the paper's folder."""
    files = {}
    for name, text in _read(step, records)["files"].items():
        # Whoever made the record chose the names: none may lead out of the folder, to be written or removed there.
        if not (out / name).resolve().is_relative_to(out.resolve()):
            raise UserError(f"{records / f'{step.name}.json'}: {name} lies outside the paper's folder")
        files[out / name] = text
    return files
