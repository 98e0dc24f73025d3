"""compiled: a C file compiles where the CPU has its features and there is a compiler; no file of the cache can do harm."""
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from fast import compiled, gemm, onepass
from machine.errors import UserError

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")
PROGRAM = """if True:
    import sys
    from pathlib import Path
    from fast import compiled
    print(compiled.load(Path(sys.argv[1]), {}).answer())
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A C file of one function, a header next to it, and an empty cache."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "answer.h").write_text("#define ANSWER 42\n")
    (folder / "answer.c").write_text('#include "answer.h"\nint answer(void) { return ANSWER; }\n')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    version = compiled._version
    version.cache_clear()
    yield folder / "answer.c"
    version.cache_clear()


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.so"))


def in_a_process(source: Path, **environment) -> subprocess.CompletedProcess:
    """Loads the file in a process of its own, which a bad library may kill; None removes a variable."""
    variables = {key: value for key, value in {**os.environ, **environment}.items() if value is not None}
    return subprocess.run([sys.executable, "-c", PROGRAM, str(source)], cwd=ROOT, env=variables, capture_output=True,
                          text=True)


@pytest.mark.parametrize("module", [gemm, onepass])
def test_a_c_file_compiles_where_it_can_run(module):
    if module.FEATURES.keys() <= compiled.flags_of_cpu() and any(map(shutil.which, ("cc", "gcc", "clang"))):
        assert module.available()
    else:
        assert not module.available()


# ---------------------------------------------------------------- damaged files of the cache

@needs_compiler
def test_a_file_is_compiled_once_and_on_disk_before_it_has_its_name(source, tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(compiled.os, "fsync", lambda _: synced.append(libraries(tmp_path / "cache" / "lora-distil")))
    assert compiled.load(source, {}).answer() == 42
    (library,) = libraries(tmp_path / "cache")
    assert len(synced) == 1 and library not in synced[0]
    monkeypatch.setattr(compiled, "_compile", lambda *_: pytest.fail("compiled twice"))
    assert compiled.load(source, {}).answer() == 42
    assert list((tmp_path / "cache" / "lora-distil").iterdir()) == [library]


@needs_compiler
def test_a_library_cut_at_any_length_is_built_again(source, tmp_path):
    """A library cut behind its headers loads and kills the process with SIGBUS; one cut before does not load at all."""
    assert in_a_process(source).stdout == "42\n"
    (library,) = libraries(tmp_path / "cache")
    whole = library.read_bytes()
    lengths = {0, 1, 4, 63, 64, 65, 512, 4095, 4096, 4097, *range(8192, len(whole), 2048), len(whole) - 1}
    for length in sorted(length for length in lengths if length < len(whole)):
        for path in libraries(tmp_path / "cache"):
            path.unlink()
        library.write_bytes(whole[:length])
        done = in_a_process(source)
        assert (done.returncode, done.stdout, done.stderr) == (0, "42\n", ""), f"cut at {length} of {len(whole)}"
        (rebuilt,) = libraries(tmp_path / "cache")
        assert rebuilt.read_bytes()[:4] == b"\x7fELF" and len(rebuilt.read_bytes()) > length


@needs_compiler
def test_a_cut_library_does_kill_a_process_that_loads_it(source, tmp_path):
    """Or the test above would show nothing."""
    compiled.load(source, {})
    (library,) = libraries(tmp_path / "cache")
    cut = tmp_path / "cut.so"
    cut.write_bytes(library.read_bytes()[:4096])
    done = subprocess.run([sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(cut)!r})"], capture_output=True)
    assert done.returncode in (-signal.SIGBUS, -signal.SIGSEGV, 1)
    assert done.returncode != 0


@needs_compiler
@pytest.mark.parametrize("place", [0, 17, 1000, -1])
def test_a_flipped_bit_is_noticed(source, tmp_path, place):
    compiled.load(source, {})
    (library,) = libraries(tmp_path / "cache")
    data = bytearray(library.read_bytes())
    data[place] ^= 1
    library.unlink()  # not overwritten: this process has the old file mapped
    library.write_bytes(data)
    assert in_a_process(source).stdout == "42\n"
    assert bytes(data) not in [path.read_bytes() for path in libraries(tmp_path / "cache")]


@needs_compiler
def test_a_whole_library_that_does_not_load_is_built_again_once(source, tmp_path, monkeypatch):
    """As after an update of the system; the second failure is told."""
    compiled.load(source, {})
    (library,) = libraries(tmp_path / "cache")
    rubbish = tmp_path / "rubbish"
    rubbish.write_bytes(b"no library")
    bad = library.with_name(f"{library.stem.rpartition('-')[0]}-{compiled._digest(rubbish)}.so")
    library.unlink()
    rubbish.rename(bad)
    assert compiled.load(source, {}).answer() == 42 and not bad.exists()

    attempts = []

    def refuse(path):
        attempts.append(path)
        raise OSError("GLIBC_9.99 not found\nand more")
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with pytest.raises(UserError, match="^GLIBC_9.99 not found and more$"):
        compiled.load(source, {})
    assert len(attempts) == 2


# ---------------------------------------------------------------- the key

@needs_compiler
def test_whatever_decides_the_file_gives_it_another_name(source, tmp_path, monkeypatch):
    names = set()

    def built() -> int:
        compiled.load(source, {})
        names.update(path.name.rpartition("-")[0] for path in libraries(tmp_path / "cache"))
        return len(names)

    assert built() == 1 and built() == 1
    (source.parent / "answer.h").write_text("#define ANSWER 43\n")
    assert built() == 2 and compiled.load(source, {}).answer() == 43
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, "-g0"))
    assert built() == 3
    monkeypatch.setattr(compiled, "_libc", lambda: "glibc 9.99")
    assert built() == 4
    monkeypatch.setattr(compiled, "_version", lambda compiler: b"cc 99.9")
    assert built() == 5
    monkeypatch.setenv("CC", f"{shutil.which('cc') or shutil.which('gcc') or shutil.which('clang')} -DOTHER")
    assert built() == 6
    monkeypatch.setattr(compiled.platform, "machine", lambda: "other")
    assert built() == 7


@needs_compiler
def test_the_key_knows_an_updated_compiler_of_the_same_name(source, tmp_path, monkeypatch):
    real, compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"), tmp_path / "mycc"
    monkeypatch.setenv("CC", str(compiler))
    for version in (1, 2):
        compiler.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo mycc {version}; else exec {real} "$@"; fi\n')
        compiler.chmod(0o755)
        assert in_a_process(source).stdout == "42\n"
        assert len(libraries(tmp_path / "cache")) == version


# ---------------------------------------------------------------- folders and compilers that are not there

@needs_compiler
def test_a_user_without_home_and_entry_in_passwd_has_a_temporary_folder(source, tmp_path):
    """Without HOME Python asks passwd, which is made to know nobody here."""
    program = ("import pwd\ndef nobody(*_): raise KeyError\npwd.getpwuid = pwd.getpwnam = nobody\n"
               + PROGRAM)
    variables = {key: value for key, value in os.environ.items() if key not in ("HOME", "XDG_CACHE_HOME")}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", program, str(source)], cwd=ROOT, capture_output=True, text=True,
                              env={**variables, "TMPDIR": str(tmp_path)})
        assert (done.returncode, done.stdout, done.stderr) == (0, "42\n", "")
        (library,) = libraries(tmp_path)
    assert library.parent == tmp_path / f"lora-distil-{os.getuid()}" and library.parent.stat().st_mode & 0o777 == 0o700


@needs_compiler
@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
def test_a_cache_folder_that_cannot_be_made_gives_way_to_a_temporary_one(source, tmp_path, variable):
    (tmp_path / "file").write_text("")
    done = in_a_process(source, **{"XDG_CACHE_HOME": None, variable: str(tmp_path / "file"), "TMPDIR": str(tmp_path)})
    assert done.stdout == "42\n" and len(libraries(tmp_path / f"lora-distil-{os.getuid()}")) == 1


@needs_compiler
@pytest.mark.parametrize("taken", ["open to others", "a link", "a file"])
def test_a_temporary_folder_that_others_can_write_to_is_not_used(source, tmp_path, taken):
    folder = tmp_path / f"lora-distil-{os.getuid()}"
    if taken == "a file":
        folder.write_text("")
    elif taken == "a link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    done = in_a_process(source, XDG_CACHE_HOME=str(source), TMPDIR=str(tmp_path))
    assert done.stdout == "42\n" and libraries(tmp_path) == []  # a folder of its own, which went with the process


@pytest.mark.parametrize("value", ['gcc "', "gcc '", "gcc \\", '"\n'])
def test_a_cc_that_is_no_command_is_one_line(source, monkeypatch, value):
    monkeypatch.setenv("CC", value)
    with pytest.raises(UserError, match="^CC=.*: not a command .*; expected a compiler, such as gcc$") as caught:
        compiled.load(source, {})
    assert len(str(caught.value).splitlines()) == 1
    with pytest.warns(UserWarning, match="^source/answer.c is not used, and PyTorch computes instead: CC=") as warned:
        assert compiled.load_if_possible(source, {}, {}) is None
    assert len(warned) == 1


@pytest.mark.parametrize("value, message", [("/nowhere/cc", "No such file or directory: '/nowhere/cc'"),
                                            ("false", "false does not compile answer.c: no message"),
                                            ("true", "true does not compile answer.c: no message")])
def test_a_compiler_that_fails_is_told_and_leaves_nothing(source, tmp_path, monkeypatch, value, message):
    monkeypatch.setenv("CC", value)
    with pytest.raises(UserError, match=message):
        compiled.load(source, {})
    with pytest.warns(UserWarning, match=message):
        assert compiled.load_if_possible(source, {}, {}) is None
    assert list((tmp_path / "cache" / "lora-distil").iterdir()) == []


@needs_compiler
def test_an_error_of_the_compiler_is_told_in_its_words(source, tmp_path):
    source.write_text("int answer(void) { return nothing; }\n")
    with pytest.raises(UserError, match="does not compile answer.c: .*error.*nothing"):
        compiled.load(source, {})


def test_a_machine_that_cannot_have_a_kernel_goes_on_without_a_word(source, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled.load_if_possible(source, {"no such feature": "-mnothing"}, {}) is None
        monkeypatch.setattr(compiled.shutil, "which", lambda _: None)
        assert compiled.load_if_possible(source, {}, {}) is None


@needs_compiler
def test_types_of_arguments_are_set(source):
    lib = compiled.load_if_possible(source, {}, {"answer": [ctypes.c_int]})
    with pytest.raises(ctypes.ArgumentError):
        lib.answer("text")
