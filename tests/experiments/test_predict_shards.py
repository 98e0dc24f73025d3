"""predict over a folder of shards: by one process or by Ray, the rows and bytes of the shards answered one by one."""
import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import toy

from experiments import predict as predict_module
from experiments import predict_file, predict_ray, predict_shards
from experiments.predict import load_worker
from experiments.predict_file import Counts
from machine.errors import UserError
from record.answers import Answers, partial_of
from report import figures

ROOT = Path(__file__).parents[2]
ROWS = [text for text, _ in toy.toy_rows(60, 3)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run without an adapter, shards of both formats, and the answers of each shard alone."""
    folder = tmp_path_factory.mktemp("shards")
    toy.write_model(folder / "model")
    toy.write_cola(folder / "cola")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "plot_run", lambda *_: [])
        assert toy.lora(folder, folder / "run", "--method", "head", "--epochs", 1) == 0
    for kind in ("jsonl", "parquet"):
        (folder / kind).mkdir()
        # Of different lengths, and one of them empty of words.
        for number, rows in enumerate((ROWS[:7], [*ROWS[7:30], " "], ROWS[30:])):
            write(folder / kind / f"{number}.{kind}", rows)
            assert predict(folder, f"{kind}/{number}.{kind}", folder / f"alone-{kind}" / f"{number}.{kind}") == 0
    (folder / "jsonl" / "_SUCCESS").touch()
    return folder


def write(path: Path, rows: list[str], column: str = "sentence") -> None:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({column: rows, "n": list(range(len(rows)))}), path)
    else:
        path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows))


def predict(run, file, out, *more) -> int:
    return toy.main("predict", run / "run", "--file", run / file, "--out", out, *more)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_folder_has_the_answers_of_each_shard_alone(run, tmp_path, capsys, kind):
    capsys.readouterr()
    assert predict(run, kind, tmp_path / "out") == 0
    out, err = capsys.readouterr()
    assert out == "" and "1 of 61 rows have an error" in err
    assert toy.tree(tmp_path / "out") == toy.tree(run / f"alone-{kind}") and os.listdir(tmp_path) == ["out"]
    assert predict(run, kind, tmp_path / "out") == 2 and "exists already" in capsys.readouterr().err


def test_a_stopped_command_goes_on_and_a_changed_shard_is_noticed(run, tmp_path, capsys, monkeypatch):
    shards = tmp_path / "in"
    shards.mkdir()
    for number in range(3):
        (shards / f"{number}.jsonl").write_bytes((run / "jsonl" / f"{number}.jsonl").read_bytes())
    write_answers, out, seen = predict_shards.write_answers, tmp_path / "out", []

    def stopped(predictor, shard, *more):
        seen.append(shard.name)
        if shard.name == "1.jsonl":
            raise KeyboardInterrupt
        return write_answers(predictor, shard, *more)

    monkeypatch.setattr(predict_shards, "write_answers", stopped)
    assert predict(run, shards, out) == 130
    assert not out.exists() and seen == ["0.jsonl", "1.jsonl"]
    # Another option gives other answers.
    assert predict(run, shards, out, "--at-least", 0.5) == 2
    # A shard that was answered already, with another sentence.
    first = shards / "0.jsonl"
    whole = first.read_text()
    first.write_text(whole.replace("the", "a", 1))
    assert predict(run, shards, out) == 2
    # A shard that vanished is another set of shards.
    (shards / "2.jsonl").rename(tmp_path / "2.jsonl")
    assert predict(run, shards, out) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "run.py: " in line]
    assert ["another at_least" in errors[-3], "changed since" in errors[-2], "another shards" in errors[-1]] == [True] * 3
    first.write_text(whole)
    (tmp_path / "2.jsonl").rename(shards / "2.jsonl")
    monkeypatch.setattr(predict_shards, "write_answers", lambda predictor, shard, *more: (
        seen.append(shard.name), write_answers(predictor, shard, *more))[1])
    assert predict(run, shards, out) == 0
    # What was answered is not answered again.
    assert seen == ["0.jsonl", "1.jsonl", "1.jsonl", "2.jsonl"]
    assert toy.tree(out) == toy.tree(run / "alone-jsonl") and not partial_of(out).exists()


def other_columns(shards: Path) -> None:
    write(shards / "1.parquet", ROWS[:3], "text")


def column_more(shards: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"sentence": ROWS[:3]}), shards / "1.parquet")


def other_keys(shards: Path) -> None:
    for path in shards.iterdir():
        path.unlink()
    write(shards / "0.jsonl", ROWS[:3])
    write(shards / "1.jsonl", ROWS[:3], "words")


@pytest.mark.parametrize("damage, more, says", [
    (other_columns, (), "1.parquet"), (other_keys, (), "1.jsonl"),
    (column_more, (), "1.parquet: its columns are sentence, those of 0.parquet are sentence, n; expected the same"),
    (lambda shards: (shards / "notes.txt").touch(), (), "expected shards that all end in .parquet or all in .jsonl"),
    (lambda shards: [path.unlink() for path in shards.iterdir()], (), "found no file"),
    (lambda shards: None, ("--out", "in/out"), "is inside"), (lambda shards: None, ("--workers", 2), "are for --engine ray"),
    (lambda shards: None, ("--engine", "ray", "--file", "in/0.parquet"), "expected --file FOLDER --out FOLDER"),
    (lambda shards: None, ("--engine", "ray", "--address", "here"), "--address here: expected HOST:PORT"),
    (lambda shards: None, ("--engine", "ray", "--address", "127.0.0.1:9"), "127.0.0.1:9: cannot be reached")])
def test_bad_input_is_one_line_and_writes_nothing(run, tmp_path, capsys, monkeypatch, damage, more, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for number in range(2):
        (tmp_path / "in" / f"{number}.parquet").write_bytes((run / "parquet" / f"{number}.parquet").read_bytes())
    damage(tmp_path / "in")
    before = toy.tree(tmp_path)
    capsys.readouterr()
    assert predict(run, tmp_path / "in", tmp_path / "out", *more) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and len(err.splitlines()) == 1
    assert toy.tree(tmp_path) == before


def test_without_ray_or_its_answer_one_line_says_so(run, tmp_path, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(predict_ray, "PATIENCE", 0.5)
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert predict(run, "jsonl", tmp_path / "out", "--engine", "ray", "--address", address) == 2
    assert f"--address {address}: no answer within 0.5 seconds; expected a Ray cluster" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    assert predict(run, "jsonl", tmp_path / "out", "--engine", "ray") == 2
    assert "the package ray is not installed; pip install -r requirements-scale.txt" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- Ray, started once

def killed_once(mark: Path, args, shards):
    """Loads the model in a worker, which ends at its second part of the second shard if it is the first to get there."""
    add, predict_file.WINDOW, predict_file.PART_WINDOWS = Answers.add, 4, 2

    def add_and_die(answers, *part):
        add(answers, *part)
        if answers.out.name == "1.parquet" and len(answers.parts) == 2 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    Answers.add = add_and_die
    return load_worker(args, shards)


@pytest.mark.slow
def test_two_workers_one_of_them_killed_give_the_bytes_of_one_process(run, tmp_path, monkeypatch):
    monkeypatch.setattr(predict_file, "WINDOW", 4)
    monkeypatch.setattr(predict_file, "PART_WINDOWS", 2)
    assert predict(run, "parquet", tmp_path / "one") == 0
    # The workers do not import tests. Ray is slow to import, which other tests need not wait for.
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(predict_module, "load_worker", partial(killed_once, tmp_path / "killed"))
    assert predict(run, "parquet", tmp_path / "two", "--engine", "ray", "--workers", 2) == 0
    assert (tmp_path / "killed").exists()
    assert toy.tree(tmp_path / "two") == toy.tree(tmp_path / "one") != {}
    assert sorted(os.listdir(tmp_path)) == ["killed", "one", "two"]


@pytest.mark.slow
def test_a_running_cluster_that_asks_for_a_token_gives_the_same_bytes(run, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    # A home of its own: `ray start` makes the user's token there.
    environment = {**os.environ, "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address", "127.0.0.1",
             "--port", port, "--num-cpus", "1", "--include-dashboard", "false", "--object-store-memory", "100000000"]
    token = subprocess.run([*start[:3], "get-auth-token", "--generate"], env=environment, capture_output=True, text=True)
    assert token.returncode == 0, token.stderr
    head = subprocess.Popen(start, env={**environment, "RAY_AUTH_MODE": "token"}, stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        words = ("predict", run / "run", "--file", run / "jsonl", "--out", tmp_path / "out", "--engine", "ray",
                 "--address", f"127.0.0.1:{port}")
        for _ in range(60):
            done = subprocess.run([sys.executable, ROOT / "run.py", *words], env=environment, capture_output=True, text=True)
            if "cannot be reached" not in done.stderr:
                break
            time.sleep(1)
        assert done.returncode == 0, done.stderr
    finally:
        head.terminate()
        head.wait(60)
    assert toy.tree(tmp_path / "out") == toy.tree(run / "alone-jsonl") != {}


def test_an_error_in_a_worker_is_an_answer(tmp_path, monkeypatch):
    """Ray would try an exception again, without end."""
    monkeypatch.chdir(tmp_path)

    def answer(name: str) -> Counts:
        if name == "gone":
            (tmp_path / name).read_text()
        if name == "bad":
            raise UserError("bad: damaged")
        return Counts(3, 1, 1, {"word": None})

    worker = predict_ray.Worker(lambda: answer, tmp_path)
    found = [json.loads(worker({"shard": [name]})["counts"][0]) for name in ("good", "bad", "gone")]
    assert Counts(**found[0]) == answer("good") and found[1] == {"error": "bad: damaged"}
    assert found[2]["error"].endswith("gone: No such file or directory")
