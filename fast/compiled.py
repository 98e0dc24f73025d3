"""Compiles the C files of this folder where they are first needed, into the user's cache folder, and loads them.

    load(Path("fast/amx.c"), {"avx512f": "-mavx512f"})
"""
from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from machine.errors import UserError

FLAGS = ("-O3", "-fopenmp", "-shared", "-fPIC")


def flags_of_cpu() -> set[str]:
    """Returns the CPU features that Linux lists; an empty set on other systems."""
    try:
        return set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return set()


def load(source: Path, features: dict[str, str]) -> ctypes.CDLL:
    """Loads a C file, which the first process that needs it compiles.

    Args:
        features: of the CPU, in Linux's words, with the compiler's flag for each.

    Raises:
        UserError: the CPU has not all of these features, or no compiler works.
    """
    if missing := sorted(features.keys() - flags_of_cpu()):
        raise UserError(f"this CPU has no {', '.join(missing)}")
    compiler = shlex.split(os.environ.get("CC", "")) or list(filter(shutil.which, ("cc", "gcc", "clang")))[:1]
    if not compiler:
        raise UserError("needs a C compiler (gcc or clang, or its name in CC)")
    command = [*compiler, *FLAGS, *features.values()]
    content = b"".join(path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h"))))
    key = hashlib.sha256(repr(command).encode() + content).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-distil"
    library = folder / f"{source.stem}-{key}.so"
    try:
        if not library.exists():
            _compile(command, source, library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise UserError(str(error)) from None


def load_if_possible(source: Path, features: dict[str, str], arguments: dict[str, list]) -> ctypes.CDLL | None:
    """Loads a C file as `load` does, with the types of its functions' arguments; None where that cannot be had."""
    try:
        lib = load(source, features)
    except UserError:
        return None
    for name, types in arguments.items():
        getattr(lib, name).argtypes = types
    return lib


def _compile(command: list[str], source: Path, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # it appears whole or not at all
        built = Path(folder) / library.name
        result = subprocess.run([*command, "-o", built, source], capture_output=True, text=True)
        if result.returncode:
            said = next((line for line in result.stderr.splitlines() if "error" in line), "no message")
            raise UserError(f"{command[0]} does not compile {source.name}: {said}")
        os.replace(built, library)
