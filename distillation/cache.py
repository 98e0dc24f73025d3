"""The folder of a transfer set: everything that is computed once for all runs on one base and task.

`runs/transfer-KEY/` next to the runs holds written sentences and the teachers' targets in chunks, the components of hidden
states, and the transfer sets that were made. KEY depends on the base model and on the task's sentences, the names of the
targets' chunks on their content.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_utils import Task
from distillation.transfer_set import New
from machine.signals import Interrupted
from record.files import make_folder, write_file, write_json


def digest(text: str) -> str:
    """Returns the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Base:
    """The base model of a teacher, as its run recorded it."""

    model: str  # as --model names it
    # Digests, not paths: a base that was moved has the same cache, another one under the same name has not.
    base_sha256: str
    tokenizer_sha256: str


@dataclass(frozen=True)
class Cache:
    """The folder of a transfer set, and the caller's function that tells of a signal."""

    folder: Path
    stop: Callable[[], int | None]

    @classmethod
    def open(cls, parent: Path, base: Base, task: Task, stop: Callable[[], int | None]) -> Cache:
        """Opens the cache of a base and a task in the folder `parent`, and makes it where there is none."""
        # The sentences depend on the base that writes, on its tokens, and on the task's sentences.
        made_of = {"base_sha256": base.base_sha256, "tokenizer_sha256": base.tokenizer_sha256, "task": task.name}
        for name, split in {"train": task.train, **task.dev}.items():
            made_of[f"{name}_sha256"] = digest("\n".join(split.sentences))
        folder = make_folder(parent / f"transfer-{digest(json.dumps(made_of, sort_keys=True))[:12]}")
        # For people: the folder's name alone does not tell its base and task.
        if not (folder / "config.json").exists():
            write_json(folder / "config.json", {**made_of, "model": base.model})
        return cls(folder, stop)

    def check_stop(self) -> None:
        """Raises `Interrupted` if the process was asked to stop."""
        # An exception, because the caller may be deep in a forward pass or a lock.
        if signal := self.stop():
            raise Interrupted(signal)

    def write_sentences(self, key: str, sentences: list[New]) -> None:
        """Writes a transfer set as a table that people can read: kind, sentence, and the one that was edited."""
        rows = "".join(f"{one.kind}\t{one.text}\t{one.original or ''}\n" for one in sentences)
        # Named by its origin, so that other runs find it, and by its content, so that damage is seen.
        write_file(self.folder / f"sentences-{key[:12]}-{digest(rows)[:12]}.tsv", rows)

    def read_sentences(self, key: str) -> list[New] | None:
        """Reads a transfer set that a run wrote; None where there is none, or it was changed since."""
        for path in self.folder.glob(f"sentences-{key[:12]}-*.tsv"):
            # Bytes: a line end of another kind would be a change, too.
            rows = path.read_bytes().decode(errors="replace")
            if path.stem.endswith(digest(rows)[:12]):
                cells = (line.split("\t") for line in rows.removesuffix("\n").split("\n") if line)
                return [New(kind, text, original or None) for kind, text, original in cells]
        return None
