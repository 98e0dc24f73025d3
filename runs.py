"""A run's folder: who may write to it, what stands in it, and reading it back.

    runs/<mode>-<SR>/   config.json, metrics.jsonl, summary.json, weights, tensorboard/

summary.json is written last and marks the run as finished.
"""
from __future__ import annotations

import json
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import filelock
import torch
from torch.utils.tensorboard import SummaryWriter

from data_utils import Task
from files import UserError, make_folder, read_json, remove_temporaries, without_password, write_file, write_json
from model import LoRAOptions
from train_utils import CHECKPOINT, TrainOptions

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "scikit-learn", "numpy")

@dataclass(frozen=True)
class RunOptions:
    """What every run has."""

    mode: str  # LoRA or distil
    sr: str  # five digits: the seed, and the run's name
    model: str
    task: str
    data: str | None  # folder of the task's files; the Hub's if None
    out: Path  # the run's folder
    train: TrainOptions
    method: str = "lora"  # lora, full, head or none
    lora: LoRAOptions = LoRAOptions()
    keep: bool = True  # keep what the frozen blocks below the lowest trained one compute
    keep_memory: float = 2.0  # GiB of it in memory; the rest is memory-mapped
    max_length: int | None = None  # tokens; the model's context if None
    limit: int | None = None  # first rows of each split only
    resume: bool = False
    overwrite: bool = False
    deterministic: bool = False


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def provenance(options: dict, task: Task) -> dict:
    """What config.json records beside the options: enough to repeat the run."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True,
                                check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    command = without_password("python run.py " + shlex.join(sys.argv[1:]))
    return {"command": command, "options": options,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "device": str(device()), "threads": torch.get_num_threads(), "git_commit": commit, "data_files": task.files}


def as_json(value):
    """Options as plain JSON values."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


@contextmanager
def run_folder(options: RunOptions, config: dict):
    """The run's folder, held by this process alone.

    A finished run is never written to without `--overwrite`, an unfinished one is only continued
    (`--resume`) or overwritten, and a resumed run must have the options it began with.

    Raises:
        UserError: any of these, another process at work there, or a folder that cannot be written.
    """
    folder = make_folder(options.out)
    try:
        lock = filelock.FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"{folder}: another process is working on this run") from None
    except OSError as error:
        raise UserError(f"{folder}: the output folder cannot be written to ({error.strerror})") from None
    try:
        if options.overwrite:
            _empty(folder)
        elif (folder / "summary.json").exists():
            raise UserError(f"{folder}: holds a finished run; choose another SR or --out, or pass --overwrite")
        elif any(folder.glob(f"*{CHECKPOINT}")):
            if not options.resume:
                raise UserError(f"{folder}: holds an unfinished run; --resume continues it, --overwrite starts anew")
            _same_options(folder, config)
        remove_temporaries(folder)
        write_json(folder / "config.json", config)
        yield folder
    finally:
        lock.release()


def _empty(folder: Path) -> None:
    """Removes what a run leaves behind; anything else in the folder is left alone."""
    for name in ("config.json", "metrics.jsonl", "summary.json", "student_config.json", "adapter_config.json"):
        (folder / name).unlink(missing_ok=True)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)


def _same_options(folder: Path, config: dict) -> None:
    before = read_json(folder / "config.json")
    for name, value in config["options"].items():
        old = before.get("options", {}).get(name)
        if old != value:
            raise UserError(f"{folder}: --resume with another {name}: it began with {old}, now {value}")
    for path, digest in config["data_files"].items():
        if before.get("data_files", {}).get(path) != digest:
            raise UserError(f"{folder}: --resume with changed data: {path} is not the file the run began with")
    for name, digest in config.get("teacher_files", {}).items():
        if before.get("teacher_files", {}).get(name) != digest:
            raise UserError(f"{folder}: --resume with a changed teacher: {name} is not the file the run began with")


class Recorder:
    """Writes metrics.jsonl and TensorBoard scalars as epochs end."""

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self.folder, self.say, self.lines = folder, say, []
        self.writer = None

    def __call__(self, history: list[dict], phase: str | None = None) -> None:
        """Takes the history of one phase so far; rewrites the file, so that a resumed run repeats no line."""
        self.lines = [line for line in self.lines if line.get("phase") != phase]
        self.lines += [{**({"phase": phase} if phase else {}), **line} for line in history]
        write_file(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))
        if not history:
            return
        if self.writer is None:
            self.writer = SummaryWriter(str(self.folder / "tensorboard"))
        line = history[-1]
        for split, values in {"train": line["train"], **line["validation"]}.items():
            for key in ("loss", "accuracy", "mcc"):
                self.writer.add_scalar(f"{phase + '/' if phase else ''}{split}/{key}", values[key], line["epoch"])
        self.writer.add_scalar(f"{phase + '/' if phase else ''}learning_rate", line["learning_rate"], line["epoch"])
        self.writer.flush()
        self.say(f"  epoch {line['epoch']}: train loss {line['train']['loss']:.4f}, " + ", ".join(
            f"{split} accuracy {v['accuracy']:.3f} MCC {v['mcc']:.3f}" for split, v in line["validation"].items()))


def settings_of(options: RunOptions) -> dict:
    return {name: getattr(options, name) for name in ("mode", "sr", "model", "task", "data", "method", "limit",
                                                      "deterministic")}


def finish(folder: Path, summary: dict) -> None:
    """The summary marks a run as finished; its checkpoints are no longer needed then."""
    write_json(folder / "summary.json", summary)
    for path in folder.glob(f"*{CHECKPOINT}"):
        path.unlink()


def read_run(folder: Path, mode: str | None = None) -> tuple[dict, dict]:
    """config.json and summary.json of a finished run.

    Raises:
        UserError: the folder is not a (finished) run, or one of another mode; names the command that makes it.
    """
    folder = Path(folder)
    make = f"python run.py {mode or 'LoRA'} SR makes one"
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a run's folder; {make}")
    if not (folder / "summary.json").is_file():
        raise UserError(f"{folder}: the run is not finished; its command with --resume continues it")
    config, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    missing = [key for key in ("model", "task", "method", "max_length", "precision")
               if key not in config.get("options", {})] if summary.get("mode") == "LoRA" else []
    if summary.get("mode") not in ("LoRA", "distil") or missing:
        raise UserError(f"{folder / 'config.json'}: not written by a run ({', '.join(missing) or 'no mode'} missing)")
    if mode and summary["mode"] != mode:
        raise UserError(f"{folder}: a {summary['mode']} run; {make}")
    return config, summary
