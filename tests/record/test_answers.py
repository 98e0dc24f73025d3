"""A file of answers: whole or absent, the same bytes after a stop at any moment, and never in place of another's."""
import json

import pyarrow
import pyarrow.parquet
import pytest

from machine.errors import UserError
from record import answers as files

SCHEMA = pyarrow.schema({"text": pyarrow.string(), "p": pyarrow.float64()})
ROWS = [{"text": f"row {i} é", "p": i / 3} for i in range(10)]
ABOUT = {"file": "abc", "options": [1, None]}


class Stopped(BaseException):
    """Stands for a signal."""


def write(out, stop_before: int | None = None, about=ABOUT) -> None:
    """Writes ROWS in parts of four; stops before a part, or before the parts are joined (3)."""
    with files.opened(out, about, SCHEMA) as found:
        for part, start in enumerate(range(0, 10, 4)):
            if start < found.done or found.joined:
                continue
            if part == stop_before:
                raise Stopped
            rows = ROWS[start:start + 4]
            found.add(rows, map(json.dumps, rows))
        if stop_before == 3:
            raise Stopped
        if not found.joined:
            found.join()


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_a_stopped_file_goes_on_to_the_same_bytes(tmp_path, ending):
    whole = tmp_path / f"whole{ending}"
    write(whole)
    rows = (pyarrow.parquet.read_table(whole).to_pylist() if ending == ".parquet" else
            [json.loads(line) for line in whole.read_text().splitlines()])
    assert rows == ROWS
    for stop in range(4):
        out = tmp_path / f"{stop}{ending}"
        with pytest.raises(Stopped):
            write(out, stop)
        assert not out.exists() and files.partial_of(out).is_dir()
        write(out)
        assert out.read_bytes() == whole.read_bytes() and not files.partial_of(out).exists()


def test_a_stop_between_the_file_and_the_end_of_its_parts(tmp_path, monkeypatch):
    out = tmp_path / "a.jsonl"
    monkeypatch.setattr(files.Answers, "remove_parts", lambda _: (_ for _ in ()).throw(Stopped))
    with pytest.raises(Stopped):
        write(out)
    before = out.read_bytes()
    monkeypatch.undo()
    write(out)
    assert out.read_bytes() == before and not files.partial_of(out).exists()


def test_what_is_not_ours_is_refused_and_stays(tmp_path):
    out = tmp_path / "a.jsonl"
    out.write_text("mine\n")
    with pytest.raises(UserError, match="exists already"):
        write(out)
    assert out.read_text() == "mine\n" and not files.partial_of(out).exists()
    other = tmp_path / "b.jsonl"
    files.partial_of(other).mkdir()
    (files.partial_of(other) / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="no predict command wrote"):
        write(other)
    assert [path.name for path in files.partial_of(other).iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match=r"ends in \.parquet or \.jsonl"):
        write(tmp_path / "c.csv")


def test_parts_of_other_answers_and_damaged_ones_are_one_error(tmp_path):
    out = tmp_path / "a.jsonl"
    with pytest.raises(Stopped):
        write(out, 2)
    with pytest.raises(UserError, match=r"other answers \(another file\)"):
        write(out, about={**ABOUT, "file": "def"})
    part = next(files.partial_of(out).glob("part-000001*"))
    part.write_bytes(part.read_bytes().replace(b"row 5", b"row 6"))
    with pytest.raises(UserError, match="damaged"):
        write(out)
    assert not out.exists()
