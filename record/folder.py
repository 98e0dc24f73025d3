"""Opens a run's folder for one process, records the run in it, and reads it back.

    runs/<mode>-<SR>/   config.json, metrics.jsonl, summary.json, weights, SHA256SUMS, tensorboard/

summary.json is written last and marks the run as finished. SHA256SUMS holds the checksums of every file of the run but
TensorBoard's; they are checked whenever a run is read or resumed. `record.ownership` says which files are the run's.
"""
from __future__ import annotations

import hashlib
import json
import platform
import shlex
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

from machine import processes
from machine.hardware import cpu_name, device
from metrics.problems import PROBLEMS, SHOWN, SINGLE_LABEL, problem_of
from options.schema import FREE, RunOptions
from record.config_json import rebuild
from record.files import (
    SUMS,
    UserError,
    check_folder,
    check_sums,
    json_text,
    locked,
    make_folder,
    read_json,
    sha256,
    without_password,
    write_file,
    write_json,
    write_sums,
)
from record.ownership import check_out, checkpoints, described, remove_run, remove_temporaries

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "scikit-learn", "numpy",
            "lemminflect")
# Differ between any two runs, and so are no part of a result that two runs are compared by.
TIMES = ("seconds", "tokens_per_second", "sentences_per_second", "peak_memory_bytes")
COLUMNS = 100  # of a line on the terminal


def recorded_config(options: RunOptions) -> dict | None:
    """Returns config.json of the run that is resumed or repeated; None for a new run."""
    folder = options.repeats or (options.out if options.resume and not options.overwrite else None)
    return read_json(folder / "config.json") if folder is not None and (folder / "config.json").exists() else None


def recorded_kernels(config: dict) -> str:
    """Returns the kernels of a run; runs from before they were recorded had PyTorch's, but for those in bf16x3."""
    options = config.get("options")
    tiles = isinstance(options, dict) and options.get("precision") == "bf16x3"
    return config.get("kernels", "onepass" if tiles else "torch")


def git_commit() -> str | None:
    """Returns the hash of the checked-out commit; None outside a git checkout."""
    try:
        return subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def provenance(options: dict, data_files: dict[str, str]) -> dict:
    """Returns the content of config.json: the options, and enough next to them to repeat the run.

    Args:
        options: every option as resolved, as JSON values.
        data_files: SHA-256 of every data file by its name.
    """
    command = without_password(f"{processes.launcher()} run.py {shlex.join(sys.argv[1:])}")
    return {"command": command, "options": options,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "cpu": cpu_name(), "device": str(device()), "threads": torch.get_num_threads(),
            "processes": processes.count(), "git_commit": git_commit(), "data_files": data_files}


def without_times(value):
    """Returns a result (any JSON value) without TIMES."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


# ---------------------------------------------------------------- opening a folder

def check_run_folder(options: RunOptions, *sources: Path) -> None:
    """Refuses a run's folder before anything is loaded; changes nothing. Every process of a run calls it.

    Args:
        sources: folders of runs that this one reads (its teachers, or the run that it starts from).

    Raises:
        UserError: the folder is not ours, holds a finished run, holds an unfinished one and neither `--resume` nor
            `--overwrite` is given, is one of the sources, or could not be written to.
    """
    folder = Path(options.out)
    _check_free(options)
    check_folder(folder)
    for source in sources:
        # --overwrite would remove the teacher that the student learns from.
        if folder.exists() and Path(source).exists() and folder.samefile(source):
            raise UserError(f"--out {folder}: is a run that this one reads; choose another SR or --out")
    # No process writes before all have looked: half of a file's removal would look like somebody else's folder.
    processes.barrier()


def _check_free(options: RunOptions) -> None:
    """Refuses a folder that is not ours, and a run in it that the options do not speak of."""
    folder = Path(options.out)
    check_out(folder, "run")
    if options.overwrite:
        return
    if (folder / "summary.json").exists():
        raise UserError(f"{folder}: holds a finished run; choose another SR or --out, or pass --overwrite")
    if not options.resume and checkpoints(folder):
        raise UserError(f"{folder}: holds an unfinished run; --resume continues it, --overwrite starts anew")


@contextmanager
def run_folder(options: RunOptions, config: dict):
    """Opens the run's folder and holds it for this process alone; of several processes the first holds it for all.

    A finished run is never written to without `--overwrite`, an unfinished one is only continued
    (`--resume`) or overwritten, and a resumed run must have the options it began with.

    Raises:
        UserError: any of these, a folder that is not ours, another process at work in it, or one that cannot be written.
    """
    if not processes.is_main():
        processes.barrier()
        yield Path(options.out)
        return
    if options.repeats:
        _same_options(options.repeats, config, "repeat")
    folder = make_folder(options.out)
    with locked(folder, "run"):
        # Checked again under the lock: models were loaded since, and another process may have finished the run.
        _check_free(options)
        if options.overwrite:
            # config.json stays until the new one replaces it: a kill in between leaves a folder that is still ours.
            remove_run(folder, keep=("config.json",))
        resumed = bool(checkpoints(folder))
        if resumed:
            check_sums(folder, "config.json")
            _same_options(folder, config, "--resume")
            _warn_of_changes(folder, config)
        remove_temporaries(folder)
        # A resumed run keeps the config that it began with.
        if not resumed:
            write_json(folder / "config.json", config)
            write_sums(folder, {"config.json": sha256(folder / "config.json")})
        processes.barrier()
        yield folder


def _same_options(folder: Path, config: dict, action: str) -> None:
    """Refuses to resume or repeat (`action`) the run in a folder with other options, data, teacher or base model."""
    before = read_json(folder / "config.json")
    recorded = before.get("options", {})
    for name, value in config["options"].items():
        # A run recorded before an option existed has no value of it to differ from.
        if name in recorded and recorded[name] != value and name not in FREE:
            raise UserError(f"{folder}: {action} with another {name}: it began with {recorded[name]}, now {value}")
    for key, part in (("base_sha256", "weights are"), ("base_config_sha256", "configuration is"),
                      ("tokenizer_sha256", "tokenizer is")):
        if before.get(key) != config.get(key):
            raise UserError(f"{folder}: {action} with a changed base model: its {part} not what the run began with")
    for change, key in (("changed data", "data_files"), ("a changed teacher", "teacher_files"),
                        ("a changed --init", "init_files")):
        old, new = before.get(key, {}), config.get(key, {})
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                raise UserError(f"{folder}: {action} with {change}: {name} is not the file the run began with")


# ---------------------------------------------------------------- the environment of a result

def environment(config: dict) -> dict:
    """Returns everything but the options that may change a result."""
    return {**config.get("versions", {}), "matmul": config.get("matmul", "torch"),
            "kernels": recorded_kernels(config), "processes": config.get("processes", 1),
            **{key: config.get(key) for key in ("cpu", "device", "threads", "git_commit")}}


def changes(before: dict, now: dict) -> list[str]:
    """Describes how two configs' environments differ, a phrase for each difference."""
    one, other = environment(before), environment(now)
    return [f"{key} was {one.get(key)}, now {other.get(key)}" for key in dict.fromkeys([*one, *other])
            if one.get(key) != other.get(key)]


def _warn_of_changes(folder: Path, config: dict) -> None:
    if changed := changes(read_json(folder / "config.json"), config):
        warnings.warn(f"{folder}: resumed, but {', '.join(changed)}: the result may not be that of an uninterrupted run",
                      stacklevel=2)


def warn_of_changed_data(config: dict, data: Path) -> None:
    """Warns if the run read a file of the same path with other content."""
    for name, digest in config.get("data_files", {}).items():
        if Path(name).resolve() == Path(data).resolve() and sha256(data) != digest:
            warnings.warn(f"{data}: changed since the run read it (its SHA-256 is another)", stacklevel=2)


# ---------------------------------------------------------------- recording a run

class Recorder:
    """Writes metrics.jsonl after each epoch, and gives its scalars to a tracker.

    Args:
        log: takes an epoch and its scalars by name.
    """

    def __init__(self, folder: Path, say: Callable[[str], None], log: Callable[[int, dict[str, float]], None]):
        self.folder, self.say, self.log, self.lines = folder, say, log, []

    def __call__(self, history: list[dict], phase: str | None = None, stage: str | None = None) -> None:
        """Records the history so far of one phase and stage, an object for each epoch.

        The file is written anew each time, so that a resumed run repeats no line.
        """
        if not processes.is_main():
            return
        names = {key: name for key, name in (("phase", phase), ("stage", stage)) if name}
        self.lines = [line for line in self.lines if (line.get("phase"), line.get("stage")) != (phase, stage)]
        self.lines += [{**names, **line} for line in history]
        write_file(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))
        if not history:
            return
        line, tag = history[-1], "".join(f"{name}/" for name in names.values())
        scalars = {f"{tag}learning_rate": line["learning_rate"]}
        for split, values in {"train": line["train"], **line["validation"]}.items():
            scalars |= {f"{tag}{split}/{key}": values[key] for key in ("loss", *SHOWN) if key in values}
        self.log(line["epoch"], scalars)
        # A stage without classes (language modelling, hidden states) has a loss alone.
        scores = []
        for split, values in line["validation"].items():
            shown = [f"{heading} {values[key]:.3f}" for key, heading in SHOWN.items() if key in values]
            scores.append(f"{split} " + (" ".join(shown) or f"loss {values['loss']:.4f}"))
        said = [f"  {f'{stage}, ' if stage else ''}epoch {line['epoch']}: train loss {line['train']['loss']:.4f}", *scores]
        # Broken between two splits, where it is too long for a terminal.
        whole = ", ".join(said).replace(" ", "\xa0").replace(",\xa0", ", ")
        self.say(textwrap.fill(whole, COLUMNS, subsequent_indent="    ").replace("\xa0", " "))


def finish(folder: Path, summary: dict, *more: str) -> None:
    """Writes SHA256SUMS and summary.json, which marks the run as finished, and removes its checkpoints.

    Args:
        summary: the content of summary.json.
        more: names of files of the run next to weights and JSON (tokenizer, model card).
    """
    if not processes.is_main():
        return
    # The run's own files alone: a file that somebody put into the folder is none of the run's results.
    files = [*described(folder, summary["mode"]), *(folder / name for name in more)]
    digests = {path.name: sha256(path) for path in files}
    digests["summary.json"] = hashlib.sha256(json_text(summary).encode()).hexdigest()
    # Before the summary: a finished run always has its checksums.
    write_sums(folder, digests)
    write_json(folder / "summary.json", summary)
    for path in checkpoints(folder):
        path.unlink()


# ---------------------------------------------------------------- reading a finished run

def read_run(folder: Path, mode: str | None = None) -> tuple[dict, dict]:
    """Reads config.json and summary.json of a finished run, and checks all of its files.

    Args:
        mode: LoRA or distil if no other run will do.

    Raises:
        UserError: the folder is not a (finished) run, or one of another mode; names the command that makes one. Or a
            file is not the one that the run wrote.
    """
    folder = Path(folder)
    make = f"python run.py {mode or 'LoRA'} SR makes one"
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a run's folder; {make}")
    if not (folder / "summary.json").is_file():
        raise UserError(f"{folder}: the run is not finished; its command with --resume continues it")
    if not check_sums(folder):
        warnings.warn(f"{folder}: has no {SUMS}; whether its files are whole is not known", stacklevel=2)
    config, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    if faults := _faults(folder, config, summary):
        raise UserError(f"{folder / 'config.json'}: not written by a run ({', '.join(faults)})")
    if mode and summary["mode"] != mode:
        raise UserError(f"{folder}: a {summary['mode']} run; {make}")
    # Runs named the dictionary of their edits among the versions before they recorded the rules as options.
    if "lemminflect" in config.get("versions", {}):
        config["options"] = {"agreement": "dictionary", "transfer_version": 2, **config["options"]}
    return config, summary


def _faults(folder: Path, config: dict, summary: dict) -> list[str]:
    """Returns the reasons why a config and a summary cannot be a run's: everything that a reader relies on is checked."""
    faults = [] if summary.get("mode") in ("LoRA", "distil") else ["no mode"]
    options = config.get("options")
    if isinstance(options, dict):
        needed = ("model", "task", "method", "max_length", "batch_size", "precision")
        faults += [f"{key} missing" for key in needed if options.get(key) is None]
    else:
        faults.append("no options")
    classes = config.get("classes", ["0", "1"])
    if config.get("problem", SINGLE_LABEL.name) not in PROBLEMS:
        faults.append("problem is unknown")
    least = 2 if faults else problem_of(config).least_classes
    if not isinstance(classes, list) or len(classes) < least or not all(isinstance(name, str) for name in classes):
        faults.append("classes are not two names or more")
    if not isinstance(config.get("data_files", {}), dict):
        faults.append("data_files is not an object")
    if faults:
        return faults
    # Types are checked by rebuilding the options, as `repeat` does.
    try:
        rebuild(RunOptions, options, out=folder)
    except UserError as error:
        return [str(error)]
    return ["max_length or batch_size is below 1"] if min(options["max_length"], options["batch_size"]) < 1 else []
