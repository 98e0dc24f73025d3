"""Makes folders of the user's cache: whole or absent, and once however many processes need one."""
from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

Kept = TypeVar("Kept")
FORMAT = 1  # of the Arrow files in the cache; another number makes them anew


def cache_folder(cache: Path | None = None) -> Path:
    """Returns the project's folder below the user's cache folder: `$XDG_CACHE_HOME`, or else `~/.cache`."""
    return (cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")) / "lora-distil"


def made_once(folder: Path, make: Callable[[Path], None], is_whole: Callable[[Path], bool] = Path.is_dir) -> Path:
    """Returns a folder of the cache; makes it if it is absent or damaged.

    Two processes that need it at once make it once: the second waits for the first.

    Args:
        folder: its path.
        make: writes the files into the folder that it is given, which it may have to create.
        is_whole: returns whether a folder has every file as it was made.

    Raises:
        OSError: the cache folder cannot be written.
    """
    from filelock import FileLock, Timeout

    # Without the lock: a whole folder serves in a cache that is read-only, too.
    if is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        warnings.warn(f"{folder.name}: another process makes it now, for its first use; waiting for it", stacklevel=2)
        lock.acquire()
    try:
        # Another process may have made it while this one waited.
        if not is_whole(folder):
            _make_whole(folder, make)
    finally:
        lock.release()
    return folder


def _make_whole(folder: Path, make: Callable[[Path], None]) -> None:
    """Makes a folder under another name, and renames it when it is whole."""
    partial = folder.with_suffix(".partial")
    # A process that was killed leaves half a folder.
    shutil.rmtree(partial, ignore_errors=True)
    try:
        make(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fingerprint(*parts) -> str:
    """Returns a key of everything that a kept result depends on, versions of the libraries that made it among it."""
    versions = [version(name) for name in ("pyarrow", "transformers", "tokenizers")]
    return hashlib.sha256(repr((FORMAT, versions, parts)).encode()).hexdigest()[:16]


def kept(folder: Path, write: Callable[[Path], None], read: Callable[[Path], Kept]) -> Kept | None:
    """Returns the content of a folder of the cache, written first if it is absent or damaged.

    Args:
        write: makes the folder that it is given, with the content in it.
        read: returns the content.

    Returns:
        None where the cache cannot be written, after a warning of one line.
    """
    def is_whole(folder: Path) -> bool:
        try:
            return folder.is_dir() and read(folder) is not None
        # pyarrow's errors are ValueErrors and OSErrors.
        except (OSError, ValueError, KeyError):
            return False

    try:
        return read(made_once(folder, write, is_whole))
    except OSError as error:
        warnings.warn(f"{folder.parent}: the cache cannot be written ({error.strerror or error}); this run's rows stay in "
                      "memory, and the next run makes them again", stacklevel=2)
        return None
