"""Opens a run's folder for one process, writes what a run records, and reads it back.

    runs/<mode>-<SR>/   config.json, metrics.jsonl, summary.json, weights, SHA256SUMS, tensorboard/

summary.json is written last and marks the run as finished. SHA256SUMS holds the checksums of all files but
TensorBoard's; they are checked whenever a run is read or resumed.
"""
from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

from machine import processes
from machine.hardware import cpu_name, device
from options.schema import FREE, RunOptions, rebuild
from record.files import (
    SUMS,
    UserError,
    check_sums,
    json_text,
    locked,
    make_folder,
    read_json,
    remove_temporaries,
    sha256,
    without_password,
    write_file,
    write_json,
    write_sums,
)

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "scikit-learn", "numpy")
TIMES = ("seconds", "tokens_per_second", "sentences_per_second", "peak_memory_bytes")  # differ between any two runs
CHECKPOINT = "checkpoint.safetensors"
# What makes a LoRA run's folder a repository of the Hub, beside the adapter; the tag in a card's metadata tells it from
# a README.md of somebody's own.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
CARD, CARD_TAG = "README.md", "lora-distil"


def recorded_config(options: RunOptions) -> dict | None:
    """Returns config.json of the run that is resumed or repeated; None for a run of its own."""
    folder = options.repeats or (options.out if options.resume and not options.overwrite else None)
    return read_json(folder / "config.json") if folder is not None and (folder / "config.json").exists() else None


def recorded_kernels(config: dict) -> str:
    """Returns the kernels of a run; before they were recorded, all but runs in bf16x3 had PyTorch's."""
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
    """Returns what config.json records: the options, and enough beside them to repeat the run.

    Args:
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


@contextmanager
def run_folder(options: RunOptions, config: dict):
    """Opens the run's folder and holds it for this process alone; of several processes the first holds it for all.

    A finished run is never written to without `--overwrite`, an unfinished one is only continued
    (`--resume`) or overwritten, and a resumed run must have the options it began with.

    Raises:
        UserError: any of these, another process at work there, or a folder that cannot be written.
    """
    if not processes.is_main():
        processes.barrier()
        yield Path(options.out)
        return
    if options.repeats:
        _same_options(options.repeats, config, "repeat")
    folder = make_folder(options.out)
    with locked(folder, "run"):
        if options.overwrite:
            empty_folder(folder)
        elif (folder / "summary.json").exists():
            raise UserError(f"{folder}: holds a finished run; choose another SR or --out, or pass --overwrite")
        elif any(folder.glob(f"*{CHECKPOINT}")):
            if not options.resume:
                raise UserError(f"{folder}: holds an unfinished run; --resume continues it, --overwrite starts anew")
            check_sums(folder, "config.json")
            _same_options(folder, config, "--resume")
            _warn_of_changes(folder, config)
        remove_temporaries(folder)
        if not any(folder.glob(f"*{CHECKPOINT}")):  # a resumed run keeps the config that it began with
            write_json(folder / "config.json", config)
            write_sums(folder, {"config.json": sha256(folder / "config.json")})
        processes.barrier()
        yield folder


def empty_folder(folder: Path) -> None:
    """Removes what a run leaves behind, and nothing else in the folder."""
    for name in ("config.json", "metrics.jsonl", "summary.json", "student_config.json", "adapter_config.json",
                 *TOKENIZER_FILES, SUMS):
        (folder / name).unlink(missing_ok=True)
    if is_card(folder / CARD):
        (folder / CARD).unlink()
    for file in folder.glob("*.safetensors"):
        file.unlink()
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)


def is_card(path: Path) -> bool:
    """Whether a README.md is a run's model card: its metadata bears the tag."""
    if not path.is_file():
        return False
    metadata = path.read_text(encoding="utf-8", errors="replace").removeprefix("---\n").partition("\n---\n")[0]
    return f"- {CARD_TAG}" in metadata.splitlines()


def _same_options(folder: Path, config: dict, what: str) -> None:
    """Refuses to resume or repeat (`what`) the run in a folder with other options, data, teacher or base model."""
    before = read_json(folder / "config.json")
    recorded = before.get("options", {})
    for name, value in config["options"].items():
        if name in recorded and recorded[name] != value and name not in FREE:  # an older run knows no newer option
            raise UserError(f"{folder}: {what} with another {name}: it began with {recorded[name]}, now {value}")
    for key, part in (("base_sha256", "weights are"), ("base_config_sha256", "configuration is"),
                      ("tokenizer_sha256", "tokenizer is")):
        if before.get(key) != config.get(key):
            raise UserError(f"{folder}: {what} with a changed base model: its {part} not what the run began with")
    for kind, key in (("data", "data_files"), ("teacher", "teacher_files"), ("--init", "init_files")):
        for name in sorted({*before.get(key, {}), *config.get(key, {})}):
            if before.get(key, {}).get(name) != config.get(key, {}).get(name):
                raise UserError(f"{folder}: {what} with {'' if kind == 'data' else 'a '}changed {kind}: {name} is not the "
                                "file the run began with")


def environment(config: dict) -> dict:
    """Returns what may change a result beside the options."""
    return {**config.get("versions", {}), "matmul": config.get("matmul", "torch"),
            "kernels": recorded_kernels(config), "processes": config.get("processes", 1),
            **{key: config.get(key) for key in ("cpu", "device", "threads", "git_commit")}}


def changes(before: dict, now: dict) -> list[str]:
    """Says in words how two configs' environments differ."""
    one, other = environment(before), environment(now)
    return [f"{key} was {one.get(key)}, now {other.get(key)}" for key in dict.fromkeys([*one, *other])
            if one.get(key) != other.get(key)]


def _warn_of_changes(folder: Path, config: dict) -> None:
    if changed := changes(read_json(folder / "config.json"), config):
        warnings.warn(f"{folder}: resumed, but {', '.join(changed)}: the result may not be that of an uninterrupted run",
                      stacklevel=2)


def warn_of_changed_data(config: dict, data: Path) -> None:
    """Warns if the run read a file under the same path whose content was another."""
    for name, digest in config.get("data_files", {}).items():
        if Path(name).resolve() == Path(data).resolve() and sha256(data) != digest:
            warnings.warn(f"{data}: changed since the run read it (its SHA-256 is another)", stacklevel=2)


class Recorder:
    """Writes metrics.jsonl and TensorBoard scalars as epochs end."""

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self.folder, self.say, self.lines = folder, say, []
        self.events = folder / "tensorboard" / f"events.out.tfevents.{int(time.time())}.{os.getpid()}"

    def __call__(self, history: list[dict], phase: str | None = None, stage: str | None = None) -> None:
        """Takes the history of a phase or stage so far; rewrites the file, so that a resumed run repeats no line."""
        if not processes.is_main():
            return
        names = {key: name for key, name in (("phase", phase), ("stage", stage)) if name}
        self.lines = [line for line in self.lines if (line.get("phase"), line.get("stage")) != (phase, stage)]
        self.lines += [{**names, **line} for line in history]
        write_file(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))
        if not history:
            return
        line, prefix = history[-1], "".join(f"{name}/" for name in names.values())
        self._scalars(line["epoch"], {f"{prefix}learning_rate": line["learning_rate"], **{
            f"{prefix}{split}/{key}": values[key] for split, values in {"train": line["train"], **line["validation"]}.items()
            for key in ("loss", "accuracy", "mcc") if key in values}})
        where = f"{stage}, " if stage else ""
        self.say(f"  {where}epoch {line['epoch']}: train loss {line['train']['loss']:.4f}, " + ", ".join(
            f"{split} accuracy {v['accuracy']:.3f} MCC {v['mcc']:.3f}" if "mcc" in v else f"{split} loss {v['loss']:.4f}"
            for split, v in line["validation"].items()))

    def _scalars(self, epoch: int, values: dict[str, float]) -> None:
        """Appends an epoch to TensorBoard's file: its own writer is a thread, which fails unseen on a full disk."""
        from tensorboard.compat.proto.event_pb2 import Event  # late: the first step does not wait for it
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        new, records = not self.events.exists(), io.BytesIO()
        events = [Event(file_version="brain.Event:2", wall_time=time.time())] if new else []
        events += [Event(wall_time=time.time(), step=epoch, summary=Summary(
            value=[Summary.Value(tag=tag, simple_value=value)])) for tag, value in values.items()]
        for event in events:
            RecordWriter(records).write(event.SerializeToString())
        try:
            self.events.parent.mkdir(exist_ok=True)
            with open(self.events, "ab") as file:
                file.write(records.getvalue())
        except OSError as error:
            raise UserError(f"{self.events}: cannot be written ({error.strerror})") from None


def finish(folder: Path, summary: dict, *more: str) -> None:
    """Writes SHA256SUMS and summary.json, which marks the run as finished, and removes its checkpoints.

    Args:
        more: files that SHA256SUMS lists beside weights and JSON.
    """
    if not processes.is_main():
        return
    files = [path for pattern in ("*.json", "*.jsonl", "*.safetensors") for path in folder.glob(pattern)
             if not path.name.endswith(CHECKPOINT)]
    digests = {path.name: sha256(path) for path in (*files, *(folder / name for name in more))}
    digests["summary.json"] = hashlib.sha256(json_text(summary).encode()).hexdigest()
    write_sums(folder, digests)  # before the summary: a finished run always has its checksums
    write_json(folder / "summary.json", summary)
    for path in folder.glob(f"*{CHECKPOINT}"):
        path.unlink()


def read_run(folder: Path, mode: str | None = None) -> tuple[dict, dict]:
    """Reads config.json and summary.json of a finished run.

    Raises:
        UserError: the folder is not a (finished) run, or one of another mode; names the command that makes it. Or a
            file of it is not the one that the run wrote.
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
    wrong = [] if summary.get("mode") in ("LoRA", "distil") else ["no mode"]
    options = config.get("options")
    if not isinstance(options, dict):
        wrong.append("no options")
    else:
        needed = ("model", "task", "method", "max_length", "batch_size", "precision")
        wrong += [f"{key} missing" for key in needed if options.get(key) is None]
    classes, files = config.get("classes", ["0", "1"]), config.get("data_files", {})
    if not isinstance(classes, list) or len(classes) < 2 or not all(isinstance(name, str) for name in classes):
        wrong.append("classes are not two names or more")
    if not isinstance(files, dict):
        wrong.append("data_files is not an object")
    if not wrong:
        try:
            rebuild(RunOptions, options, out=folder)
        except UserError as error:
            wrong.append(str(error))
        if not wrong and min(options["max_length"], options["batch_size"]) < 1:
            wrong.append("max_length or batch_size is below 1")
    if wrong:
        raise UserError(f"{folder / 'config.json'}: not written by a run ({', '.join(wrong)})")
    if mode and summary["mode"] != mode:
        raise UserError(f"{folder}: a {summary['mode']} run; {make}")
    return config, summary
