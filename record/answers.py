"""A file of answers that is whole or absent, and goes on where the program that writes it was stopped.

    with opened(Path("answers.parquet"), about, schema) as answers:
        answers.add(rows after the first answers.done)
        answers.join()

Finished parts wait in a folder next to the file, `answers.parquet.partial`; about.json in it tells the answers that they are
parts of. In the end they are joined, and the folder goes. A part's name has the number of its rows and its SHA-256.
"""
from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from machine.errors import UserError
from record.files import check_folder, locked, make_folder, read_json, sha256, write_file, write_json

if TYPE_CHECKING:
    import pyarrow

ENDINGS = (".parquet", ".jsonl")
ABOUT, JOINED, MARK = "about.json", "joined", "answers of lora-distil"
_PART = re.compile(r"part-(?P<number>\d{6})-(?P<rows>\d+)-(?P<digest>[0-9a-f]{64})\.(parquet|jsonl)")
# `write_file` names its temporary files so.
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
_SHOWN = 3


def partial_of(out: Path) -> Path:
    """Returns the folder of a file's finished parts."""
    return out.with_name(f"{out.name}.partial")


def check_file(out: Path) -> None:
    """Refuses a file that stands already, another ending, and a folder of parts that is not ours; changes nothing.

    Raises:
        UserError: one of these.
    """
    if out.suffix.lower() not in ENDINGS:
        raise UserError(f"--out {out}: expected a name that ends in {' or '.join(ENDINGS)}")
    folder = partial_of(out)
    ours = is_ours(folder)
    if folder.exists() and not ours:
        raise UserError(f"--out {out}: {folder} holds files that no predict command wrote; expected a new or an empty "
                        "folder; nothing was changed")
    # A finished file next to its parts: the program was stopped just before it removed them.
    if os.path.lexists(out) and not (ours and out.is_file() and _about(folder).get(JOINED) == sha256(out)):
        raise UserError(f"--out {out}: exists already; expected a new file; nothing was changed")
    check_folder(out.absolute().parent)


def _about(folder: Path) -> dict:
    return read_json(folder / ABOUT) if (folder / ABOUT).is_file() else {}


def claim(folder: Path, about: dict, out: Path) -> None:
    """Notes in a folder of parts the answers that they belong to, unless an earlier program did.

    Raises:
        UserError: they belong to other answers.
    """
    before = _about(folder).get("about")
    if before is None:
        write_json(folder / ABOUT, {"made_by": MARK, "about": about})
    elif before != about:
        other = [name for name in about if before.get(name) != about[name]]
        raise UserError(f"--out {out}: {folder} holds a part of other answers (another {', '.join(other)[:80]}); remove "
                        "it, or give another --out")


def is_ours(folder: Path, also: Container[str] = ()) -> bool:
    """Returns whether a folder is empty, or holds finished parts, files of the names in `also`, and nothing else."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    names = [path.name for path in folder.iterdir() if path.name != ".lock" and not _TEMPORARY.fullmatch(path.name)]
    known = all(name in (ABOUT, JOINED) or name in also or _PART.fullmatch(name) for name in names)
    return not names or known and ABOUT in names and _about(folder).get("made_by") == MARK


@dataclass
class Answers:
    """The parts of a file of answers."""

    out: Path
    schema: pyarrow.Schema  # of a Parquet file
    parts: list[Path] = field(default_factory=list)
    joined: bool = False

    @property
    def folder(self) -> Path:
        """Returns the folder of the parts."""
        return partial_of(self.out)

    @property
    def done(self) -> int:
        """Returns the number of rows in finished parts."""
        return sum(int(_PART.fullmatch(part.name)["rows"]) for part in self.parts)

    def add(self, answers: list[dict], lines: Iterable[str]) -> None:
        """Writes the next part.

        Args:
            answers: its rows.
            lines: the same as JSON, read for JSON Lines alone.

        Raises:
            UserError: it cannot be written; the finished parts stay.
        """
        ending = self.out.suffix.lower()
        if ending == ".parquet":
            data = self._parquet(answers)
        else:
            # As standard output writes half of a surrogate pair, which a cell in an error may hold.
            data = "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace")
        path = self.folder / f"part-{len(self.parts):06d}-{len(answers)}-{hashlib.sha256(data).hexdigest()}{ending}"
        write_file(path, data)
        self.parts.append(path)

    def _parquet(self, answers: list[dict]) -> bytes:
        import pyarrow
        import pyarrow.parquet

        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(answers, self.schema), sink)
        return sink.getvalue().to_pybytes()

    def join(self) -> None:
        """Makes the file from its parts, and removes them.

        Raises:
            UserError: a part is not as it was written, or the file cannot be written.
        """
        for part in self.parts:
            if sha256(part) != _PART.fullmatch(part.name)["digest"]:
                raise UserError(f"{part}: damaged; remove {self.folder} and start again")
        temporary = self.folder / JOINED
        try:
            with open(temporary, "wb") as file:
                (self._join_parquet if self.out.suffix.lower() == ".parquet" else self._join_lines)(file)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.out}: cannot be written ({error.strerror or error})") from None
        # Whenever the next steps are interrupted, the folder tells that the file is the one it had the parts of.
        write_json(self.folder / ABOUT, {**_about(self.folder), JOINED: sha256(temporary)})
        os.replace(temporary, self.out)
        self.joined = True

    def _join_lines(self, file) -> None:
        for part in self.parts:
            file.write(part.read_bytes())

    def _join_parquet(self, file) -> None:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetWriter(file, self.schema) as writer:
            for part in self.parts:
                writer.write_table(pyarrow.parquet.read_table(part, schema=self.schema))

    def remove_parts(self) -> None:
        """Removes our own files, the proof that the folder is ours last, and the folder if nothing else is in it."""
        for path in [*self.folder.glob(".*.tmp"), *self.parts, self.folder / ".lock", self.folder / ABOUT]:
            path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


@contextmanager
def opened(out: Path, about: dict, schema: pyarrow.Schema) -> Iterator[Answers]:
    """Opens a file of answers, with the parts that an earlier program finished.

    Args:
        about: what the answers depend on: digests of input and model, options.
        schema: of the rows of a Parquet file.

    Raises:
        UserError: see `check_file`; or the parts are of other answers.
    """
    out = out.absolute()
    check_file(out)
    folder = make_folder(partial_of(out))
    with locked(folder, "file of answers"):
        claim(folder, about, out)
        answers = Answers(out, schema, sorted(path for path in folder.iterdir() if _PART.fullmatch(path.name)), out.exists())
        yield answers
    if answers.joined:
        answers.remove_parts()
