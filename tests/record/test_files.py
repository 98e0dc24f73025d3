"""Files are whole or absent, whatever fails; what is read is a JSON object or one line that says why not."""
import errno
import json
import math
import os

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from machine.errors import UserError
from record import files
from record.files import make_folder, read_json, sha256, write_file, write_json

FAST = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
                    | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10)


def fail(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("data, expected", [(b"\x00\xff\n", b"\x00\xff\n"), ("é\n", "é\n".encode())])
def test_a_written_file_holds_exactly_what_was_given(tmp_path, data, expected):
    write_file(tmp_path / "a", data)
    assert (tmp_path / "a").read_bytes() == expected
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, function):
    write_file(tmp_path / "a", "old")
    monkeypatch.setattr(files.os, function, fail)
    with pytest.raises(UserError, match="cannot be written .No space left") as caught:
        write_file(tmp_path / "a", "new")
    assert str(tmp_path / "a") in str(caught.value)
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_the_old_file_stands_until_the_new_one_is_on_disk(tmp_path, monkeypatch):
    """What a kill would leave: at the moment of the flush the name still has the old bytes."""
    write_file(tmp_path / "a", "old")
    seen = []
    monkeypatch.setattr(files.os, "fsync", lambda _: seen.append((tmp_path / "a").read_text()))
    write_file(tmp_path / "a", "new")
    assert seen == ["old"]
    assert (tmp_path / "a").read_text() == "new"


def test_a_write_into_no_folder_is_the_users_error(tmp_path):
    (tmp_path / "file").write_text("here")
    for path in (tmp_path / "missing" / "a", tmp_path / "file" / "a"):
        with pytest.raises(UserError, match="cannot be written"):
            write_file(path, "x")
    assert os.listdir(tmp_path) == ["file"]


@settings(FAST, max_examples=60)
@given(value=st.dictionaries(st.text(), JSON))
def test_json_comes_back_as_it_went(tmp_path, value):
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_refuses_what_is_no_json_and_keeps_the_old_file(tmp_path, value):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"a": value})
    assert read_json(tmp_path / "a.json") == {"a": 1}


@settings(FAST, max_examples=400)
@given(data=st.binary() | st.text().map(str.encode) | JSON.map(lambda value: json.dumps(value).encode())
       | st.tuples(JSON, st.binary(max_size=3), st.integers(0, 50)).map(
           lambda t: (text := json.dumps({"a": t[0]}).encode())[:t[2]] + t[1] + text[t[2]:]))
@example(data=b"")
@example(data=b"\xef\xbb\xbf{}")
@example(data=b'{"a":' * 100_000)
@example(data=b"9" * 5000)
@example(data=b'{"a": \xff}')
@example(data=b"[1]")
def test_any_bytes_are_an_object_or_one_line_naming_the_file(tmp_path, data):
    path = tmp_path / "any.json"
    path.write_bytes(data)
    try:
        assert isinstance(read_json(path), dict)
    except UserError as error:
        assert str(error).startswith(f"{path}: ")
        assert len(str(error).splitlines()) == 1


def test_json_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(UserError, match="cannot be read") as caught:
            read_json(path)
        assert str(path) in str(caught.value)


def test_a_folder_is_made_with_its_parents_or_refused(tmp_path):
    assert make_folder(tmp_path / "a" / "b").is_dir()
    assert make_folder(tmp_path / "a" / "b").is_dir()  # again: nothing to do
    (tmp_path / "file").write_text("here")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="the output folder cannot be made"):
            make_folder(path)


def test_sha256_is_the_standards(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-4, example 1
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
