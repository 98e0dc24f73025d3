"""Tells the folders that this project may write to, and its own files in them, from everybody else's.

    check_out(Path("runs/LoRA-12345"), "run")    # UserError if it holds anything but a run

A folder is not ours because a user named it. We write into a new or an empty folder, or into one with a file of ours; we
remove and checksum the files of a run's own list, and never a file that somebody put next to them.
"""
from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from machine.errors import UserError
from record.files import SUMS, read_json, read_sums

CHECKPOINT = "checkpoint.safetensors"
# Both make a LoRA run's folder a repository of the Hub, together with the adapter. The tag in a model card's metadata tells
# the card from a README.md that somebody wrote.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
CARD, CARD_TAG = "README.md", "lora-distil"

# The files of a run, by the mode in its config.json; SHA256SUMS, checkpoints and TensorBoard's events come on top.
WEIGHTS = {"LoRA": ("adapter_model.safetensors", "trained.safetensors", "features.safetensors"),
           "distil": ("student.safetensors", "scratch.safetensors", "teacher_logits.safetensors")}
CALIBRATION = "calibration.json"
TRACKER = "tracker.json"  # name of the run in MLflow, trackio or Weights & Biases (--track)
RECORDS = ("config.json", "metrics.jsonl", "summary.json", CALIBRATION, TRACKER)
DESCRIPTIONS = {"LoRA": ("adapter_config.json",), "distil": ("student_config.json",)}

_CHECKPOINT = re.compile(r"((student|scratch)\.([a-z_]+\.)?)?checkpoint\.safetensors")
_EVENTS = re.compile(r"events\.out\.tfevents\.\d+\.\d+")
# `write_file` names its temporary files after the target and the process; `.cached-` files hold features of frozen blocks.
_TEMPORARY = re.compile(r"\.(?P<target>.+)\.\d+\.tmp|\.cached-\w+")
# Files that may lie in a folder before a run begins: locks, the output of a study's children, and macOS's notes.
_HARMLESS = (".lock", ".trial.lock", "log.txt", "diverged.txt", ".DS_Store")
_OPTUNA_TABLES = ("alembic_version", "studies", "study_", "trial", "version_info")
_SHOWN = 3


# ---------------------------------------------------------------- whose folder

def check_out(folder: Path | str, maker: str) -> None:
    """Refuses a folder that is neither new nor empty nor made by the same kind of command; changes nothing.

    Args:
        folder: the folder to write to.
        maker: a key of MAKERS: run (LoRA or distil), compare, sweep, seeds, folds, diagnose or paper.

    Raises:
        UserError: the folder holds anything else, or is no folder; names a few of the files.
    """
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--out {folder}: is a file; expected a folder")
    try:
        names = sorted(path.name for path in folder.iterdir() if not _is_harmless(path))
    except OSError as error:
        raise UserError(f"--out {folder}: the folder cannot be read ({error.strerror})") from None
    if names and not MAKERS[maker](folder):
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        kind = "run" if maker == "run" else f"{maker} command"
        raise UserError(f"--out {folder}: holds files that no {kind} of this project wrote ({shown}); expected a new or an "
                        "empty folder; nothing was changed")


def _is_harmless(path: Path) -> bool:
    return path.name in _HARMLESS or _TEMPORARY.fullmatch(path.name) is not None


def mode_of(folder: Path | str) -> str | None:
    """Returns the mode (LoRA or distil) of the run in a folder, finished or not; None if the folder holds no run."""
    mode = _options(Path(folder)).get("mode")
    return mode if mode in WEIGHTS else None


def _options(folder: Path) -> dict:
    """Returns the options in a folder's config.json; an empty dictionary if no command of this project wrote it."""
    config = _object(folder / "config.json")
    options = config.get("options")
    # Every command records its versions next to its options; a config.json of transformers has neither.
    return options if isinstance(options, dict) and isinstance(config.get("versions"), dict) else {}


def _object(path: Path) -> dict:
    """Returns a JSON file's object; an empty one if the file is missing or damaged."""
    try:
        return read_json(path)
    except UserError:
        return {}


def _is_run(folder: Path) -> bool:
    if mode_of(folder):
        return True
    # A damaged config.json is still ours if the checksums name it: its reader says that it is damaged, --overwrite mends it.
    with suppress(UserError):
        return "config.json" in (read_sums(folder) or {})
    return False


def _is_result(name: str) -> Callable[[Path], bool]:
    return lambda folder: _object(folder / f"{name}.json").get("mode") == name


def _is_comparison(folder: Path) -> bool:
    """Returns whether a folder holds a comparison's options or result, or runs and nothing else."""
    if _is_result("compare")(folder):
        return True
    if options := _options(folder):
        return options.keys().isdisjoint({"mode", "profile"})
    # Runs made beforehand in a comparison's folder are taken over by it.
    return all(_is_harmless(path) or path.is_dir() and mode_of(path) for path in folder.iterdir())


def _is_sweep(folder: Path) -> bool:
    """Returns whether a folder holds a sweep's result, one of its trials, or its database."""
    if _is_result("sweep")(folder) or any(folder.glob("trial-[0-9][0-9][0-9][0-9][0-9]/.trial.lock")):
        return True
    database = folder / "study.db"
    if not database.is_file():
        return False
    try:
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not all(name.startswith(_OPTUNA_TABLES) for name in tables):
                return False
            # Another process of the same sweep may be creating the tables at this moment.
            if "studies" not in tables:
                return True
            studies = [name for (name,) in connection.execute("SELECT study_name FROM studies")]
    except sqlite3.Error:
        return False
    return all(re.fullmatch(r"sweep-\d{5}", name) for name in studies)


# A function for each kind of command that has a folder: whether it made this one.
MAKERS: dict[str, Callable[[Path], bool]] = {
    "run": _is_run,
    "compare": _is_comparison,
    "sweep": _is_sweep,
    "seeds": _is_result("seeds"),
    "folds": lambda folder: "folds" in _options(folder),
    "diagnose": _is_result("diagnose"),
    "paper": lambda folder: _is_result("paper")(folder) or "profile" in _options(folder),
}


def is_card(path: Path) -> bool:
    """Returns whether a README.md is a run's model card: its metadata bears the tag."""
    if not path.is_file():
        return False
    metadata = path.read_text(encoding="utf-8", errors="replace").removeprefix("---\n").partition("\n---\n")[0]
    return f"- {CARD_TAG}" in metadata.splitlines()


# ---------------------------------------------------------------- a run's own files

def checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints in a run's folder, one for each model and stage at most."""
    return sorted(path for path in Path(folder).glob(f"*{CHECKPOINT}") if _CHECKPOINT.fullmatch(path.name))


def weights(folder: Path | str) -> list[Path]:
    """Returns the files of weights that a run wrote, checkpoints not among them."""
    return sorted(_existing(folder, WEIGHTS.get(mode_of(folder), sum(WEIGHTS.values(), ()))))


def described(folder: Path, mode: str) -> list[Path]:
    """Returns the files that a run's checksums cover, but for the model card and the tokenizer."""
    return _existing(folder, (*RECORDS, *DESCRIPTIONS[mode], *WEIGHTS[mode]))


def _existing(folder: Path | str, names: tuple[str, ...]) -> list[Path]:
    paths = [Path(folder) / name for name in names]
    return [path for path in paths if path.is_file()]


def run_files(folder: Path) -> list[Path]:
    """Returns every file of a run: those that SHA256SUMS names, those that a run of its mode writes, and checkpoints.

    summary.json is the first: a run whose removal was interrupted is not taken for a finished one. config.json is the last:
    as long as anything of a run is left, so is the proof that the folder is ours.
    """
    folder, mode = Path(folder), mode_of(folder)
    # Damaged checksums name nothing that can be relied on; the known names remain.
    listed = {}
    with suppress(UserError):
        listed = read_sums(folder) or {}
    # A list that points out of the folder is not one that a run wrote. The card is listed too, but its owner may have put a
    # text of their own in its place.
    files = [folder / name for name in listed if Path(name).name == name and name != CARD]
    for kind in [mode] if mode else WEIGHTS:
        files += described(folder, kind)
    if mode == "LoRA":
        files += [folder / name for name in TOKENIZER_FILES]
    if is_card(folder / CARD):
        files.append(folder / CARD)
    files += checkpoints(folder)
    # A link leads to a folder that other programs may write to.
    if not (folder / "tensorboard").is_symlink():
        files += [path for path in sorted((folder / "tensorboard").glob("*")) if _EVENTS.fullmatch(path.name)]
    first, last = folder / "summary.json", [folder / SUMS, folder / "config.json"]
    between = [path for path in dict.fromkeys(files) if path not in (first, *last)]
    return [path for path in (first, *between, *last) if path.is_file() or path.is_symlink()]


def remove_run(folder: Path, keep: tuple[str, ...] = ()) -> None:
    """Removes a run's own files and no other; a folder of somebody else's is left as it is.

    Args:
        keep: names that stay.

    Raises:
        UserError: a file cannot be removed.
    """
    folder = Path(folder)
    if not _is_run(folder):
        return
    try:
        for path in run_files(folder):
            if path.name not in keep:
                path.unlink(missing_ok=True)
        _remove_if_empty(folder / "tensorboard")
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be removed ({error.strerror})") from None


def remove_child(folder: Path) -> None:
    """Removes a study's run with its log and lock, and then the folder if nothing else is in it.

    Raises:
        UserError: a file cannot be removed.
    """
    folder = Path(folder)
    if not _is_run(folder) and not all(_is_harmless(path) for path in folder.iterdir()):
        return
    remove_run(folder)
    remove_temporaries(folder)
    for name in _HARMLESS:
        (folder / name).unlink(missing_ok=True)
    _remove_if_empty(folder)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def remove_temporaries(folder: Path | str) -> None:
    """Removes the temporary files of killed processes; no other process may be writing to the folder."""
    known = {*RECORDS, *sum(DESCRIPTIONS.values(), ()), *sum(WEIGHTS.values(), ()), *TOKENIZER_FILES, CARD, SUMS}
    for path in Path(folder).glob(".*"):
        match = _TEMPORARY.fullmatch(path.name)
        own = match and (match["target"] is None or match["target"] in known or _CHECKPOINT.fullmatch(match["target"]))
        if own and path.is_file():
            path.unlink(missing_ok=True)
