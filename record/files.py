"""Writes files that are whole or absent, and reads them with checks.

A file is written under a temporary name, flushed to disk and renamed, so that a crash at any moment leaves either the old
file or the new one. SHA256SUMS in a run's folder proves that its files are still those that the run wrote;
`sha256sum -c SHA256SUMS` reads it too.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from machine import processes
from machine.errors import UserError

SUMS = "SHA256SUMS"


def write_file(path: Path | str, data: bytes | str | Iterator[str]) -> None:
    """Writes a file atomically and durably; of a run's several processes only the first writes.

    Args:
        data: bytes, or text that is written in UTF-8, in one piece or in several.

    Raises:
        UserError: it cannot be written (folder, rights, full disk); the old file stays.
    """
    if not processes.is_main():
        return
    path = Path(path)
    # In the same folder: a rename is atomic within one file system only.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            pieces = data if isinstance(data, Iterator) else [data]
            for piece in pieces:
                file.write(piece.encode() if isinstance(piece, str) else piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    # BaseException, because a signal may arrive in the middle of a large file.
    except BaseException as error:
        # Without a folder to write to, no temporary file was made.
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        raise


def write_json(path: Path | str, value) -> None:
    """Writes JSON atomically.

    Raises:
        ValueError: the value holds NaN or infinity, which JSON does not have.
        UserError: see `write_file`.
    """
    write_file(path, json_text(value))


def json_text(value) -> str:
    """Returns a value as JSON in the form of a run's files: indented, in UTF-8, without NaN."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path | str) -> dict:
    """Reads a JSON object.

    Raises:
        UserError: missing, unreadable, not UTF-8, not JSON, or not an object.
    """
    try:
        value = json.loads(Path(path).read_bytes().decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    # Deeply nested brackets end Python's reader with a RecursionError.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file ({str(error).splitlines()[0]})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON {type(value).__name__}; expected an object")
    return value


def make_folder(path: Path | str) -> Path:
    """Makes a folder and its parents.

    Raises:
        UserError: it cannot be made or written to.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: the output folder cannot be made ({error.strerror})") from None
    # Known now, and not after an hour of training.
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{path}: the output folder cannot be written to")
    return path


@contextmanager
def locked(folder: Path, work: str) -> Iterator[None]:
    """Locks a folder for this process; the system releases the lock of a process that died.

    Args:
        folder: existing folder; its `.lock` is the lock.
        work: the kind of work in it (run, comparison), for the error's text.

    Raises:
        UserError: another process holds it, or the folder cannot be written to.
    """
    # Without a timeout a second process is told at once, and does not queue behind hours of training.
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"{folder}: another process is working on this {work}") from None
    except OSError as error:
        raise UserError(f"{folder}: the output folder cannot be written to ({error.strerror})") from None
    try:
        yield
    finally:
        lock.release()


def check_folder(path: Path | str) -> None:
    """Checks that a folder could be made and written to; makes nothing.

    Raises:
        UserError: it could not.
    """
    path = Path(path).absolute()
    # Everything below the nearest folder that exists would be made.
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{path}: the output folder cannot be made ({nearest} is not a folder, or cannot be written to)")


def check_new_folder(path: Path | str) -> None:
    """Checks that `new_folder` could make a folder; makes nothing.

    Raises:
        UserError: it exists and is not empty, or could not be made.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--out {path}: exists already; expected a new or an empty folder")
    check_folder(path.absolute())


@contextmanager
def new_folder(path: Path | str) -> Iterator[Path]:
    """Makes a folder that appears whole if the body of the `with` statement succeeds, and not at all if it fails.

    Yields:
        The folder under a temporary name next to `path`.

    Raises:
        UserError: see `check_new_folder`.
    """
    path = Path(path).absolute()
    check_new_folder(path)
    temporary = make_folder(make_folder(path.parent) / f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        # An empty folder of that name is replaced.
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def without_password(text: str) -> str:
    """Hides the password of every URL in a text."""
    return re.sub(r"(://[^:/@\s]*):[^@\s]*@", r"\1:***@", text)


def sha256(path: Path | str) -> str:
    """Returns a file's SHA-256 in hexadecimal.

    Raises:
        UserError: missing or unreadable.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


@contextmanager
def unchanged(paths: Iterable[Path]) -> Iterator[dict[Path, str]]:
    """Yields the SHA-256 of files that the body of the `with` statement reads, and checks them again after it.

    Raises:
        UserError: a file is another one after the body than before it: either may have been read.
    """
    digests = {path: sha256(path) for path in paths}
    yield digests
    for path, digest in digests.items():
        if sha256(path) != digest:
            raise UserError(f"{path}: changed while it was read; start again")


# ---------------------------------------------------------------- checksums of a folder

def write_sums(folder: Path, digests: dict[str, str]) -> None:
    """Writes SHA256SUMS: a line for each file name, then a comment with the digest of these lines.

    Args:
        digests: SHA-256 in hexadecimal, by file name.
    """
    write_file(Path(folder) / SUMS, _sums_text(digests))


def _sums_text(digests: dict[str, str]) -> str:
    # The comment at the end protects the list itself: without it a cut list would pass as a shorter one.
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return f"{lines}# {hashlib.sha256(lines.encode()).hexdigest()}\n"


def read_sums(folder: Path) -> dict[str, str] | None:
    """Returns the digests of SHA256SUMS by file name; None if the folder has no such file.

    Raises:
        UserError: a byte of it is not as it was written.
    """
    path = Path(folder) / SUMS
    if not path.exists():
        return None
    try:
        text = path.read_bytes().decode("utf-8")
        # 64 hexadecimal digits and two spaces stand before each name.
        digests = {line[66:]: line[:64] for line in text.splitlines()[:-1]}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        digests = None
    if digests is None or text != _sums_text(digests):
        raise UserError(f"{path}: damaged (it is not as the run wrote it)")
    return digests


def check_sums(folder: Path, *names: str) -> bool:
    """Checks the files that SHA256SUMS lists, or only those of `names`; returns whether the folder has such a list.

    Raises:
        UserError: a file is missing or another one; names it.
    """
    digests = read_sums(folder)
    for name, digest in (digests or {}).items():
        path = Path(folder) / name
        if names and name not in names:
            continue
        if not path.exists():
            raise UserError(f"{path}: missing, though {SUMS} lists it")
        if sha256(path) != digest:
            raise UserError(f"{path}: damaged or changed: not the file that the run wrote (see {SUMS})")
    return digests is not None
