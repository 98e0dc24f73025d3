"""Compiles the C files of this folder when they are first needed, keeps them in the user's cache folder, and loads them.

    load(Path("fast/amx.c"), {"avx512f": "-mavx512f"})

A compiled file's name holds a digest of all that decides its content (source, headers, compiler, flags, C library), and a
digest of its own bytes: loading a library that was cut or damaged would kill the process with SIGBUS, in this command and in
every later one.
"""
from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

from machine.errors import UserError

FLAGS = ("-O3", "-fopenmp", "-shared", "-fPIC")
NAME = "lora-distil"


class NotHere(UserError):
    """A machine without the kernels and without a fault: another CPU, or no compiler."""


def flags_of_cpu() -> set[str]:
    """Returns the CPU features that Linux lists; an empty set on other systems."""
    try:
        return set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return set()


def load(source: Path, features: dict[str, str]) -> ctypes.CDLL:
    """Loads a C file; the first process that needs it compiles it.

    A damaged file of the cache, or one that the system does not load, is compiled again, once.

    Args:
        source: the C file; headers are found next to it.
        features: the CPU features it needs, in Linux's words, with the compiler's flag for each.

    Raises:
        NotHere: the CPU lacks one of these features, or there is no compiler.
        UserError: CC is no command, the compiler fails, no folder can be written to, or the system loads no library.
    """
    if missing := sorted(features.keys() - flags_of_cpu()):
        raise NotHere(f"this CPU has no {', '.join(missing)}")
    # The compiler is needed even for a file in the cache: its version is a part of the file's name.
    compiler = _compiler()
    flags = [*FLAGS, *features.values()]
    try:
        folder = cache_folder()
        key = f"{source.stem}-{_key(compiler, flags, source)}"
        for library in sorted(folder.glob(f"{key}-*.so")):
            if lib := _load_whole(library):
                return lib
            library.unlink(missing_ok=True)
        return ctypes.CDLL(str(_compile([*compiler, *flags], source, folder, key)))
    except OSError as error:
        raise UserError(" ".join(str(error).split())) from None


def load_if_possible(source: Path, features: dict[str, str], arguments: dict[str, list]) -> ctypes.CDLL | None:
    """Loads a C file as `load` does, and sets the types of its functions' arguments.

    Args:
        arguments: types of the arguments, by the function's name.

    Returns:
        The library, or None without one. The reason is a warning of one line, except for another CPU or no compiler.
    """
    try:
        lib = load(source, features)
    except NotHere:
        return None
    except UserError as error:
        warnings.warn(f"{source.parent.name}/{source.name} is not used, and PyTorch computes instead: {error}", stacklevel=2)
        return None
    for name, types in arguments.items():
        getattr(lib, name).argtypes = types
    return lib


# ---------------------------------------------------------------- the compiler

def _compiler() -> list[str]:
    """Returns the words of the compiler's command: CC, else the first installed one.

    Raises:
        NotHere: none is installed.
        UserError: CC has an open quotation mark, or ends in a backslash.
    """
    text = os.environ.get("CC", "")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"CC={text!r}: not a command ({error}); expected a compiler, such as gcc") from None
    if words:
        return words
    installed = [name for name in ("cc", "gcc", "clang") if shutil.which(name)]
    if not installed:
        raise NotHere("needs a C compiler (gcc or clang, or its name in CC)")
    return installed[:1]


def _key(compiler: list[str], flags: list[str], source: Path) -> str:
    """Returns a digest of everything that decides the compiled file."""
    # The machine too: a home folder may be shared between machines of several kinds.
    tools = (compiler, _version(tuple(compiler)), flags, _libc(), sys.platform, platform.machine())
    digest = hashlib.sha256(repr(tools).encode())
    # A digest of each file, so that a line that moves from the end of one to the start of the next gives another key.
    for path in (source, *sorted(source.parent.glob("*.h"))):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


@functools.cache
def _version(compiler: tuple[str, ...]) -> bytes:
    """Returns the output of `--version`: an update of the system changes it, and not the compiler's name."""
    done = subprocess.run([*compiler, "--version"], stdin=subprocess.DEVNULL, capture_output=True)
    return done.stdout + done.stderr


def _libc() -> str:
    """Returns the C library and its version: a library linked to a newer one does not load with an older one."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, OSError, ValueError):
        return " ".join(platform.libc_ver())


def _compile(command: list[str], source: Path, folder: Path, key: str) -> Path:
    """Compiles a C file into the cache's folder and returns the library's path."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as temporary:
        built = Path(temporary) / "built.so"
        done = subprocess.run([*command, "-o", built, source], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              errors="replace")
        if done.returncode or not built.exists():
            message = next((line for line in done.stderr.splitlines() if "error:" in line), "no message")
            raise UserError(f"{command[0]} does not compile {source.name}: {message}")
        # On disk before it has its name: a crash must leave the whole file or none.
        with open(built, "rb+") as file:
            os.fsync(file.fileno())
        library = folder / f"{key}-{_digest(built)}.so"
        os.replace(built, library)
    return library


# ---------------------------------------------------------------- the cache

def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:32]


def _load_whole(library: Path) -> ctypes.CDLL | None:
    """Loads a compiled file; returns None if its bytes do not match the digest in its name, or if it does not load."""
    if library.stem.rpartition("-")[2] != _digest(library):
        return None
    # A whole library does not load after an update of the system removed one that it is linked to.
    try:
        return ctypes.CDLL(str(library))
    except OSError:
        return None


def cache_folder() -> Path:
    """Returns the folder of compiled files: in the user's cache folder, or else a temporary one.

    Raises:
        OSError: neither can be written to.
    """
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    # Without HOME and without an entry in passwd, as in many containers, `Path.home` raises a RuntimeError.
    try:
        # The XDG specification has relative paths ignored.
        folder = (Path(chosen) if os.path.isabs(chosen) else Path.home() / ".cache") / NAME
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    return _temporary_folder()


def _temporary_folder() -> Path:
    """Returns a folder below the system's temporary one that no other user can write to."""
    # Loading a library runs its code, so that nobody else may put one there. Windows gives every user a folder of their own.
    user = os.getuid() if hasattr(os, "getuid") else None
    folder = Path(tempfile.gettempdir()) / (NAME if user is None else f"{NAME}-{user}")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    private = status.st_uid == user and not status.st_mode & 0o022
    if stat.S_ISDIR(status.st_mode) and (private or user is None):
        return folder
    # The name is taken by somebody else. This process compiles for itself.
    own = tempfile.mkdtemp(prefix=f"{NAME}-")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return Path(own)
