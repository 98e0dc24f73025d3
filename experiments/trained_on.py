"""Tells whether rows that are to be scored were trained on: whole files by their SHA-256, single rows by their text.

    python run.py eval runs/LoRA-12345 --data train.tsv      # refused, unless --allow-training-data is given

A score on training data says how well a model remembers, not how well it judges other sentences.
"""
from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from data.overlap import count_repeated
from data_utils import Split, Task
from experiments.inputs import load_task
from machine.errors import UserError
from options.schema import RunOptions
from record.config_json import rebuild
from record.files import read_json


def rows_in_training(task: Task, say: Callable[[str], None]) -> dict[str, int]:
    """Counts the rows of each development split that stand in the training split too, and says so where there are any."""
    found = {name: count_repeated(split.sentences, task.train.sentences) for name, split in task.dev.items()}
    for name, count in found.items():
        if count:
            say(f"  {name}: {count:,} of {len(task.dev[name]):,} rows stand in the training split too (case and punctuation "
                "aside); its scores flatter by these")
    return found


def training_files(config: dict) -> dict[str, str]:
    """Returns the names of a run's own training files by their SHA-256.

    Args:
        config: its config.json. A task records its training file first and its development files after it; a single
            file, of which a share was held out, is a training file too.
    """
    files, options = config.get("data_files", {}), config["options"]
    # Of a source's config.json nothing has been checked.
    names = [name for name, digest in files.items() if isinstance(digest, str)] if isinstance(files, dict) else []
    # Plain sentences, real against edited, have no development files; a transfer set's are trained on as well.
    own = names if options["task"] == "edits" else names[:1]
    text = options["text"] if isinstance(options.get("text"), list) else []
    return {files[name]: name for name in names if name in own or name in text}


def find_source(folder: Path, recorded: str) -> Path | None:
    """Returns the folder of a run that another one started from: as recorded, or next to it where both were moved.

    Args:
        folder: of the run that started from it.
    """
    places = (Path(recorded), folder.parent / Path(recorded).name)
    return next((path for path in places if (path / "config.json").exists()), None)


def sources(folder: Path, config: dict) -> dict[Path, dict]:
    """Returns config.json of a run and of all runs that it learned from, by folder: teachers, first adapters, and theirs."""
    found, left = {folder: config}, [folder]
    while left:
        at = left.pop()
        options = found[at]["options"]
        more = options.get("more_teachers")
        for name in [options.get("init"), options.get("teacher"), *(more if isinstance(more, list) else [])]:
            path = find_source(at, name) if isinstance(name, str) else None
            # A source that was removed or damaged since is no reason not to score the run itself.
            with suppress(UserError):
                if path is not None and path not in found:
                    before = read_json(path / "config.json")
                    if isinstance(before.get("options"), dict) and "task" in before["options"]:
                        found[path] = before
                        left.append(path)
    return found


def check_not_trained_on(folder: Path, config: dict, files: dict[str, str], allowed: bool) -> None:
    """Checks that no file to be scored was trained on by a run, or by one that it learned from.

    Args:
        files: SHA-256 of each file to be scored, by name.
        allowed: whether to warn only.

    Raises:
        UserError: one was trained on; names both.
    """
    for source, its_config in sources(folder, config).items():
        for digest, trained in training_files(its_config).items():
            for name in (name for name, own in files.items() if own == digest):
                learner = f"{folder} was trained" if source == folder else f"{folder} learned from {source}, trained"
                same = "" if Path(name).resolve() == Path(trained).resolve() else f" (as {trained}: the same SHA-256)"
                message = f"{name}: {learner} on this file{same}; its scores would tell nothing of other text"
                if not allowed:
                    # A run on a single file held rows of it out: they are the better choice.
                    alone = all(own == digest for own in its_config["data_files"].values())
                    held_out = "eval without --data scores the rows held out of it; " if alone else ""
                    raise UserError(f"{message}; {held_out}--allow-training-data scores it all the same")
                warnings.warn(f"TRAINING DATA: {message}", stacklevel=2)


def recorded_task(folder: Path, config: dict, tokenizer, unchanged: Collection[str] | None = None) -> Task:
    """Loads the task of a run again, from the same data.

    Args:
        unchanged: names of the files that must be unchanged; all if None.

    Raises:
        UserError: its data are missing, or changed since the run read them.
    """
    # By the recorded options, --limit among them: only rows that the run really read count.
    task = load_task(rebuild(RunOptions, config["options"], out=folder), tokenizer)
    for name, digest in task.files.items():
        if (unchanged is None or name in unchanged) and config.get("data_files", {}).get(name) != digest:
            raise UserError(f"{name}: changed since the run read it (its SHA-256 is another)")
    return task


def count_trained_on(folder: Path, config: dict, tokenizer, splits: dict[str, Split]
                     ) -> tuple[dict[str, int | None], list[str]]:
    """Counts the rows of each split that stand among a run's training rows, case and punctuation aside.

    Returns:
        The counts, None if the training data are missing or changed; and warnings for the user, a sentence each.
    """
    # A run outlives its data: scoring goes on without them, and says so.
    try:
        training = recorded_task(folder, config, tokenizer, training_files(config).values()).train.sentences
    except UserError as error:
        return dict.fromkeys(splits), [f"{folder}: its training data cannot be read ({error}); rows of them are not counted"]
    found = {name: count_repeated(split.sentences, training) for name, split in splits.items()}
    return found, [f"{name}: {count:,} of {len(splits[name]):,} rows stand in the training data of {folder} too (case and "
                   "punctuation aside); the scores flatter by these" for name, count in found.items() if count]
