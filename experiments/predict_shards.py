"""Answers a folder of shards: a folder of files of the same names, which appears when every shard is answered.

    python run.py predict runs/distil-12345 --file SHARDS --out ANSWERS
    python run.py predict runs/distil-12345 --file SHARDS --out ANSWERS --engine ray

A shard is answered as a single file is: its answers depend neither on the other shards nor on the process. Answered shards
wait in ANSWERS.partial, so that the same command goes on where it was stopped.
"""
from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data import stream
from experiments.predict_file import Counts, open_rows, write_answers
from machine.errors import UserError
from machine.progress import Bar
from record.answers import ABOUT, ENDINGS, claim, is_ours, partial_of
from record.files import check_folder, locked, make_folder, read_json, sha256, write_json

# In the folder of answered shards: those, and the digest of each shard that was begun.
SHARDS, DIGESTS = "shards", "digests"
HIDDEN = (".", "_")  # first letters of names that other programs leave next to shards, such as _SUCCESS


def check_out(folder: Path, out: Path) -> None:
    """Checks --out before a model is loaded; changes nothing.

    Raises:
        UserError: it exists, or a folder next to it holds other files than answered shards.
    """
    partial = partial_of(out)
    ours = is_ours(partial, (SHARDS, DIGESTS))
    if partial.exists() and not ours:
        raise UserError(f"--out {out}: {partial} holds files that no predict command wrote; expected a new or an empty "
                        "folder; nothing was changed")
    if os.path.lexists(out) and not _is_complete(out):
        raise UserError(f"--out {out}: exists already; expected a new folder; nothing was changed")
    if out.absolute().is_relative_to(folder.absolute()):
        raise UserError(f"--out {out}: is inside {folder}; expected a folder outside of the shards")
    check_folder(out.absolute().parent)


def _is_complete(out: Path) -> bool:
    """Returns whether a program was stopped after its folder appeared, and before it removed the rest."""
    partial = partial_of(out)
    return out.is_dir() and (partial / ABOUT).is_file() and not (partial / SHARDS).exists()


@dataclass(frozen=True)
class Shards:
    """A folder of shards and its folder of answers."""

    folder: Path
    out: Path
    names: tuple[str, ...]  # of the shards, in order
    about: dict  # the models and options that the answers depend on
    at_least: float | None
    kind: str | None  # one of `stream.FORMATS`; by the ending if None

    @classmethod
    def of(cls, folder: Path, out: Path, about: dict, at_least: float | None, kind: str | None) -> Shards:
        """Lists a folder.

        Raises:
            UserError: it holds no shards, or other files too.
        """
        names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(HIDDEN))
        endings = {Path(name).suffix.lower() for name in names}
        # Answers have the names of the shards, so that these must be names of answers.
        if len(endings) != 1 or not endings <= set(ENDINGS):
            other = next((name for name in names if not name.lower().endswith(ENDINGS)), None)
            found = "both" if names and not other else other or "no file"
            raise UserError(f"{folder}: expected shards that all end in {' or all in '.join(ENDINGS)}, found {found}")
        return cls(folder.absolute(), out.absolute(), tuple(names), about, at_least, kind)

    def check_columns(self, predictor) -> None:
        """Checks that every shard can be opened and has the columns of the first, and the predictor's among them.

        Raises:
            UserError: one has not.
        """
        first = None
        for name in self.names:
            rows = open_rows(predictor, self.folder / name, self.kind)
            with rows.file:
                names = rows.names
                # A JSON Lines file has no header: its first row stands for it.
                if names is None and rows.kind == "jsonl" and (row := next(rows.rows, None)) and row.columns:
                    names = [*row.columns, *predictor.columns.feature_columns]  # an absent number is a missing value
                    predictor.check(stream.Rows(rows.path, rows.kind, names, iter(()), rows.file, None))
                first = first or (name, names)
                # Keys may be absent from a row of JSON Lines, columns from no Parquet file.
                if rows.kind == "parquet" and set(names) != set(first[1]):
                    raise UserError(f"{rows.path}: its columns are {_few(names)}, those of {first[0]} are {_few(first[1])}; "
                                    "expected the same in every shard")

    def answer(self, predictor, name: str) -> Counts:
        """Answers a shard, in whichever process; one that is answered already is left alone.

        Returns:
            Counts of the rows that this call answered.

        Raises:
            UserError: it vanished or changed; see `write_answers`.
        """
        shard, partial = self.folder / name, partial_of(self.out)
        note, out, digest = partial / DIGESTS / f"{name}.json", partial / SHARDS / name, sha256(self.folder / name)
        if not note.exists():
            write_json(note, {"sha256": digest})
        elif read_json(note).get("sha256") != digest:
            raise UserError(f"{shard}: changed since it was first read; remove {partial} and start again")
        # With parts next to it, its last steps are still to be done.
        if out.exists() and not partial_of(out).exists():
            return Counts()
        return write_answers(predictor, shard, out, self.about, self.at_least, self.kind)

    def write(self, engine: Callable[[tuple[str, ...]], Iterator[Counts]]) -> Counts:
        """Answers all shards and makes the folder of answers.

        Args:
            engine: answers shards, given their names, each by `answer`; yields their counts.

        Raises:
            UserError: see `answer`; answered shards and finished parts stay for the next call.
        """
        check_out(self.folder, self.out)
        counts, partial = Counts(), make_folder(partial_of(self.out))
        with locked(partial, "folder of answers"):
            claim(partial, {**self.about, "shards": list(self.names)}, self.out)
            # A program may have been stopped just after its folder appeared.
            if not _is_complete(self.out):
                self._answer_all(engine, counts)
                os.replace(partial / SHARDS, self.out)
        # The proof that the folder is ours goes last.
        digests = partial / DIGESTS
        for path in [*digests.glob("*.json"), *digests.glob(".*.tmp"), *partial.glob(".*.tmp"), partial / ".lock"]:
            path.unlink(missing_ok=True)
        if digests.exists():
            digests.rmdir()
        (partial / ABOUT).unlink()
        partial.rmdir()
        return counts

    def _answer_all(self, engine: Callable[[tuple[str, ...]], Iterator[Counts]], counts: Counts) -> None:
        """Answers all shards into the folder of answered ones."""
        answered = make_folder(partial_of(self.out) / SHARDS)
        make_folder(partial_of(self.out) / DIGESTS)
        with Bar(total=len(self.names), unit="shard", delay=2) as bar, contextlib.closing(engine(self.names)) as found:
            for one in found:
                counts.merge(one)
                bar.update()
        # An engine that lost a shard must not go unnoticed.
        if wrong := {path.name for path in answered.iterdir()} ^ set(self.names):
            raise UserError(f"{answered}: {_few(sorted(wrong))} missing or too many; start the same command again")


def _few(names: list[str]) -> str:
    return ", ".join(itertools.islice(names, 5)) + ", ..." * (len(names) > 5)
