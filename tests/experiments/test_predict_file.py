"""predict --out: the same answers as on standard output, in a file that survives a kill."""
import json

import pyarrow.parquet
import pytest
import toy

from experiments import predict_file
from record.answers import Answers, partial_of
from report import figures


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run without an adapter: its head alone is trained, for one epoch."""
    folder = tmp_path_factory.mktemp("file")
    toy.write_model(folder / "model")
    toy.write_cola(folder / "cola")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "plot_run", lambda *_: [])
        assert toy.lora(folder, folder / "run", "--method", "head", "--epochs", 1) == 0
    rows = [f'"{text}",{number}' for number, (text, _) in enumerate(toy.toy_rows(50, 3))]
    rows[7], rows[20] = '"",7', '"the cat",1,2'
    (folder / "rows.csv").write_text("\n".join(["text,n", *rows]) + "\n")
    return folder


def predict(run, capsys, *more) -> tuple[str, str]:
    capsys.readouterr()
    assert toy.main("predict", run / "run", "--file", run / "rows.csv", *more) == 0
    return capsys.readouterr()


def test_a_file_holds_the_answers_of_standard_output(run, tmp_path, capsys):
    lines, _ = predict(run, capsys, "--json")
    answers = list(map(json.loads, lines.splitlines()))
    assert len(answers) == 50 and [answer.get("line") for answer in answers if "error" in answer] == [9, 22]
    assert predict(run, capsys, "--out", tmp_path / "a.jsonl")[0] == "" and (tmp_path / "a.jsonl").read_text() == lines
    predict(run, capsys, "--out", tmp_path / "new" / "a.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "new" / "a.parquet")
    # Parquet has every column in every row.
    found = [{key: value for key, value in row.items() if value is not None} for row in table.to_pylist()]
    assert found == answers
    assert toy.main("predict", run / "run", "--file", run / "rows.csv", "--out", tmp_path / "a.jsonl") == 2
    assert "exists already" in capsys.readouterr().err
    predict(run, capsys, "--out", tmp_path / "sure.jsonl", "--at-least", 1)
    assert {json.loads(line).get("label") for line in (tmp_path / "sure.jsonl").read_text().splitlines()} == {None}


def test_a_killed_command_goes_on_without_a_row_lost_or_twice(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predict_file, "WINDOW", 4)
    monkeypatch.setattr(predict_file, "PART_WINDOWS", 2)
    predict(run, capsys, "--out", tmp_path / "whole.jsonl")
    add, out = Answers.add, tmp_path / "a.jsonl"

    def killed(answers, *part):
        if len(answers.parts) == 3:
            raise KeyboardInterrupt
        add(answers, *part)

    monkeypatch.setattr(Answers, "add", killed)
    assert toy.main("predict", run / "run", "--file", run / "rows.csv", "--out", out) == 130
    assert not out.exists() and len(list(partial_of(out).glob("part-*"))) == 3
    monkeypatch.setattr(Answers, "add", add)
    # Another option gives other answers.
    assert toy.main("predict", run / "run", "--file", run / "rows.csv", "--out", out, "--at-least", 0.5) == 2
    assert "other answers (another at_least)" in capsys.readouterr().err
    predict(run, capsys, "--out", out)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not partial_of(out).exists()


@pytest.mark.parametrize("more, says", [
    (("the cat", "--out", "a.jsonl"), "--out is for --file"), (("--file", "-", "--out", "a.jsonl"), "--out is for --file"),
    (("--file", "rows.csv", "--out", "a.txt"), "ends in .parquet or .jsonl"),
    (("--file", "none.csv", "--out", "none.jsonl"), "none.csv: cannot be read")])
def test_bad_arguments_are_one_line_and_write_nothing(run, capsys, monkeypatch, more, says):
    monkeypatch.chdir(run)
    before = sorted(path.name for path in run.iterdir())
    capsys.readouterr()
    assert toy.main("predict", run / "run", *more) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and len(err.splitlines()) == 1
    assert sorted(path.name for path in run.iterdir()) == before
