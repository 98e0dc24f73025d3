"""Files that are whole or absent: atomic writes, checked reads, and the one error class of the house.

A file is written under a temporary name, flushed to disk and renamed, so that a crash at any moment
leaves either the old file or the new one.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path


class UserError(ValueError):
    """Something the user can mend: one line that names what is wrong and what was expected."""


def write_file(path: Path | str, data: bytes | str) -> None:
    """Writes a file atomically and durably.

    Raises:
        UserError: it cannot be written (folder, rights, full disk); what stood there before still stands.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):  # nothing to remove where the folder itself was the trouble
            temporary.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def remove_temporaries(folder: Path | str) -> None:
    """Removes what killed processes left of unfinished writes; nobody else may be writing there."""
    for path in Path(folder).glob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_json(path: Path | str, value) -> None:
    """Writes JSON atomically; NaN and infinity are refused, for they are no JSON."""
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path | str) -> dict:
    """Reads a JSON object.

    Raises:
        UserError: missing, unreadable, not UTF-8, not JSON, or not an object.
    """
    try:
        value = json.loads(Path(path).read_bytes().decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
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
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{path}: the output folder cannot be written to")
    return path


def check_folder(path: Path | str) -> None:
    """Checks that a folder could be made and written to, and makes nothing.

    Raises:
        UserError: it could not.
    """
    path = Path(path)
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{path}: the output folder cannot be made ({nearest} is not a folder that can be written to)")


def without_password(text: str) -> str:
    """`text` with the password of every URL in it hidden."""
    return re.sub(r"(://[^:/@\s]*):[^@\s]*@", r"\1:***@", text)


def sha256(path: Path | str) -> str:
    """The file's SHA-256, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
