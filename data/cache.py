"""Makes folders of the user's cache: whole or absent, and once however many processes need one."""
from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path


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
