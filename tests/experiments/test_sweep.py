"""A sweep: every trial once, hopeless ones pruned, a killed one goes on, a study shared by two processes."""
import contextlib
import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys

import numpy as np
import optuna
import pytest
import torch
import toy
import warm

from experiments import finetune, sweep
from machine import signals
from record.files import read_json
from record.folder import provenance
from train_utils import Diverged

SEARCH = ("--search", "rank=1,2", "--search", "targets=q+v,all")
COMBINATIONS = set(itertools.product((1, 2), ("q+v", "all")))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A toy model and toy data."""
    folder = tmp_path_factory.mktemp("sweep")
    toy.write_model(folder / "model")
    toy.write_cola(folder / "cola")
    return folder


def words(work, out, *more) -> list[str]:
    plots = () if "--plots" in more or "--no-plots" in more else ("--no-plots",)
    return list(map(str, ("sweep", "12345", "--model", work / "model", "--data", work / "cola", "--out", out,
                          "--batch-size", 8, *plots, *more)))


def call(work, out, *more) -> int:
    return toy.main(*words(work, out, *more))


@pytest.fixture
def made_up(monkeypatch):
    """Fine-tunings that train nothing: MCC rises over the epochs to one that follows from the rate. Holds their options."""
    ran = []

    def run_finetune(options, say=print, stop=lambda: None, on_epoch=None):
        ran.append(options)
        if len(ran) == 2 and ran[0] == "stop at the second":
            raise signals.Interrupted(15)
        if options.train.lr > 1:
            raise Diverged("loss nan")
        counts = {"total": 1000, "trainable": 10 * options.lora.rank}
        history, top = [], 1 - abs(np.log10(options.train.lr) + 3) / 4
        for epoch in range(1, options.train.epochs + 1):
            scores = {"mcc": top * epoch / options.train.epochs, "accuracy": 0.7, "majority_accuracy": 0.6}
            history.append({"epoch": epoch, "validation": {"in_domain": scores}})
            on_epoch(history, counts)
        (options.out / "adapter_model.safetensors").write_bytes(b"weights")
        return {"parameters": counts, "best_epoch": epoch, "validation": history[-1]["validation"], "train": {"seconds": 1}}
    monkeypatch.setattr(finetune, "run_finetune", run_finetune)
    return ran


def trials(out) -> list[dict]:
    return read_json(out / "sweep.json")["trials"]


# ---------------------------------------------------------------- the trials

def test_a_grid_runs_every_combination_once_and_keeps_the_best_weights_alone(work, tmp_path, capsys):
    """Real trainings."""
    out = tmp_path / "s"
    assert call(work, out, *SEARCH, "--sampler", "grid", "--epochs", 2, "--no-prune", "--lr", "0.01", "--plots",
                tmp_path / "plots") == 0
    result = read_json(out / "sweep.json")
    assert sorted((t["params"]["rank"], t["params"]["targets"]) for t in result["trials"]) == sorted(COMBINATIONS)
    assert {t["state"] for t in result["trials"]} == {"complete"}
    for trial in result["trials"]:
        summary = read_json(out / f"trial-{trial['number']:05d}" / "summary.json")
        assert trial["score"] == summary["validation"]["in_domain"]["mcc"]
        assert trial["parameters"] == summary["parameters"]
    best = max(result["trials"], key=lambda t: (t["score"], -t["parameters"]["trainable"]))
    assert result["best"] == best["number"] and len({t["score"] for t in result["trials"]}) > 1
    weights = sorted(out.glob("trial-*/*.safetensors"))
    assert weights == [out / f"trial-{best['number']:05d}" / "adapter_model.safetensors"]
    for row in result["means"]["targets"]:
        scores = [t["score"] for t in result["trials"] if t["params"]["targets"] == row["value"]]
        assert (row["n"], row["mean"]) == (2, pytest.approx(np.mean(scores)))
        assert row["sd"] == pytest.approx(np.std(scores, ddof=1))
    assert set(result["importance"]) == {"rank", "targets"} and sum(result["importance"].values()) == pytest.approx(1)
    table = capsys.readouterr().out.splitlines()
    assert table[1].split() == ["trial", "MCC", "acc.", "%", "trained", "%", "epoch", "rank", "targets"]
    assert table[2].split()[0] == str(best["number"]) and table[2].split()[3] == f"{best['parameters']['trainable']:,}"
    assert "all" in (out / "sweep.tex").read_text()
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"sweep-12345.png", "sweep-12345.pdf"}
    assert result["command"].startswith("python run.py sweep 12345") and result["versions"]["optuna"] == optuna.__version__


def test_values_reach_the_trials_as_their_options(work, tmp_path, made_up):
    assert call(work, tmp_path / "s", "--sampler", "grid", "--search", "layers=0,all", "--search", "targets=q+v,all",
                "--search", "rslora=yes,no", "--search", "batch-size=4,16", "--rank", 3, "--no-prune") == 0
    seen = {(run.lora.layers, run.lora.targets, run.lora.rslora, run.train.batch_size) for run in made_up}
    assert seen == set(itertools.product(("0", None), (("q", "v"), ("q", "k", "v", "o", "mlp")), (True, False), (4, 16)))
    assert len(made_up) == 16 and {run.lora.rank for run in made_up} == {3} and {run.sr for run in made_up} == {"12345"}


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_ranges_are_drawn_within_their_bounds_and_the_same_seed_draws_the_same(work, tmp_path, made_up, sampler):
    drawn = []
    for name in ("a", "b"):
        assert call(work, tmp_path / name, "--sampler", sampler, "--trials", 8, "--search", "lr=1e-4..1e-2", "--search",
                    "rank=1..4", "--search", "dropout=0..0.5", "--search", "alpha=1..64:log", "--no-plots") == 0
        drawn.append([t["params"] for t in trials(tmp_path / name)])
    assert drawn[0] == drawn[1] and len(drawn[0]) == 8
    assert all(1e-4 <= p["lr"] <= 1e-2 and p["rank"] in (1, 2, 3, 4) and 0 <= p["dropout"] <= 0.5 for p in drawn[0])
    assert len({p["lr"] for p in drawn[0]}) == 8 and len({p["rank"] for p in drawn[0]}) > 2
    assert sum(p["lr"] < 1e-3 for p in drawn[0]) >= 2  # logarithmic: half of them, not a tenth
    assert {run.train.lr for run in made_up} == {p["lr"] for p in drawn[0]}


def test_hopeless_trials_are_pruned_and_without_pruning_none_is(work, tmp_path, made_up):
    """The best five come first; each one after them is below the median from its first epoch on."""
    rates = "1e-3,1.1e-3,1.2e-3,1.3e-3,1.4e-3,1e-1,1e-6"
    assert call(work, tmp_path / "s", "--sampler", "grid", "--epochs", 4, "--search", f"lr={rates}") == 0
    found = trials(tmp_path / "s")
    assert [t["state"] for t in found] == ["complete"] * 5 + ["pruned"] * 2
    assert [t["epochs"] for t in found] == [4] * 5 + [1] * 2
    assert not list((tmp_path / "s" / "trial-00006").glob("*.safetensors")) and found[6]["parameters"]["trainable"] > 0
    assert call(work, tmp_path / "t", "--sampler", "grid", "--epochs", 4, "--search", f"lr={rates}", "--no-prune") == 0
    assert {(t["state"], t["epochs"]) for t in trials(tmp_path / "t")} == {("complete", 4)}


def test_a_trial_that_diverges_ends_nothing(work, tmp_path, made_up):
    assert call(work, tmp_path / "s", "--sampler", "grid", "--search", "lr=1e-3,10") == 0
    assert [t["state"] for t in trials(tmp_path / "s")] == ["complete", "diverged"]


def test_the_same_options_are_not_trained_twice(work, tmp_path, made_up):
    assert call(work, tmp_path / "s", "--trials", 9, "--search", "rank=1,2", "--no-prune") == 0
    found = trials(tmp_path / "s")
    assert len(found) == 9 and len(made_up) == 2
    assert {t["params"]["rank"]: t["parameters"]["trainable"] for t in found if t["same_as"] is not None} == {
        t["params"]["rank"]: t["parameters"]["trainable"] for t in found if t["same_as"] is None}


# ---------------------------------------------------------------- going on

def test_started_again_it_does_nothing_and_with_more_trials_the_rest(work, tmp_path, made_up, capsys):
    more = ("--search", "lr=1e-4..1e-2", "--no-prune")
    assert call(work, tmp_path / "s", *more, "--trials", 3) == 0
    assert call(work, tmp_path / "s", *more, "--trials", 3) == 0 and len(made_up) == 3
    assert call(work, tmp_path / "s", *more, "--trials", 5) == 0 and len(made_up) == 5
    assert [t["number"] for t in trials(tmp_path / "s")] == list(range(5))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert call(work, tmp_path / "s", *more, "--trials", 6) == 0 and torch.get_num_threads() == threads
    assert read_json(tmp_path / "s" / "sweep.json")["threads"] == threads
    capsys.readouterr()
    assert call(work, tmp_path / "s", *more, "--trials", 4) == 2
    assert "--trials 4: the study has 6 already" in capsys.readouterr().err
    assert call(work, tmp_path / "s", *more, "--trials", 2, "--overwrite") == 0 and len(trials(tmp_path / "s")) == 2


@pytest.mark.slow
def test_a_killed_sweep_goes_on_with_the_trial_it_was_killed_in(work, tmp_path):
    """A real process, killed while its second trial trains."""
    toy.write_cola(tmp_path / "cola", train=400)
    line = words(work, tmp_path / "s", *SEARCH, "--sampler", "grid", "--no-plots", "--no-prune")
    line[line.index("--data") + 1] = str(tmp_path / "cola")
    with open(tmp_path / "stderr", "w") as errors:
        process = subprocess.Popen([*warm.command(), *line], stderr=errors, stdout=errors)
    second = tmp_path / "s" / "trial-00001"
    toy.until(lambda: (second / "checkpoint.safetensors").exists() or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, (tmp_path / "stderr").read_text()
    first = (tmp_path / "s" / "trial-00000" / "summary.json").read_bytes()
    assert toy.main(*line) == 0
    found = trials(tmp_path / "s")
    assert [t["state"] for t in found] == ["complete", "interrupted", "complete", "complete", "complete"]
    assert found[4]["params"] == found[1]["params"]
    assert {(t["params"]["rank"], t["params"]["targets"]) for t in found if t["state"] == "complete"} == COMBINATIONS
    assert (tmp_path / "s" / "trial-00000" / "summary.json").read_bytes() == first and not second.exists()


def test_a_stopped_sweep_names_the_command_that_goes_on_with_the_same_values(work, tmp_path, made_up, capsys):
    more = ("--search", "lr=1e-4..1e-2", "--trials", 3, "--no-prune")
    made_up.append("stop at the second")
    assert call(work, tmp_path / "s", *more) == 143
    assert "stopped; continue with: python run.py sweep 12345" in capsys.readouterr().err.splitlines()[-1]
    stopped = made_up[-1].train.lr
    assert call(work, tmp_path / "s", *more) == 0
    found = trials(tmp_path / "s")
    assert [t["state"] for t in found] == ["interrupted", "complete", "complete", "complete"]
    assert [t["params"]["lr"] for t in found].count(stopped) == 2 and found[3]["params"]["lr"] == stopped


@pytest.mark.slow
def test_two_processes_share_a_study_by_its_url_and_do_each_trial_once(work, tmp_path):
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    processes = []
    for name in "ab":
        line = words(work, tmp_path / name, "--search", "rank=1,2,3,4,5,6", "--sampler", "grid", "--storage", url,
                     "--no-plots", "--no-prune", "--epochs", 6)
        processes.append(subprocess.Popen([*warm.command(), *line], stderr=subprocess.PIPE, text=True,
                                          stdout=subprocess.DEVNULL))
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    study = optuna.load_study(study_name="sweep-12345", storage=url)
    done = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    assert sorted(t.params["rank"] for t in done) == list(range(1, 7))
    mine, theirs = (len(list((tmp_path / name).glob("trial-*/summary.json"))) for name in "ab")
    assert mine + theirs == 6 and mine and theirs
    assert max(len(trials(tmp_path / name)) for name in "ab") == 6


def test_a_trial_that_another_machine_runs_is_left_to_it_and_a_surplus_one_is_not_run(work, tmp_path, made_up):
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    more = ("--search", "rank=1,2,3", "--sampler", "grid", "--storage", url, "--no-plots")
    assert call(work, tmp_path / "a", *more, "--trials", 1) == 0
    study = optuna.load_study(study_name="sweep-12345", storage=url)
    study.enqueue_trial({"rank": 2}, user_attrs={"slot": 1})
    elsewhere = study.ask()
    assert call(work, tmp_path / "a", *more) == 0
    assert [(t["number"], t["state"]) for t in trials(tmp_path / "a")] == [(0, "complete"), (1, "running"), (2, "complete")]
    assert elsewhere.number == 1 and [run.lora.rank for run in made_up] == [1, 3]
    with pytest.raises(sweep._Surplus):
        sweep.Trial(None, study, "in_domain", "mcc")(study.ask())


@pytest.mark.parametrize("more, named", [(("--search", "rank=1,2"), "--search: lr=1e-3,1e-2, now lr=1e-3,1e-2,rank=1,2"),
                                         (("--epochs", "5"), "--epochs: 3, now 5"),
                                         (("--sampler", "random"), "--sampler: grid, now random"),
                                         (("--no-prune",), "--no-prune: False, now True")])
def test_other_options_than_it_began_with_are_refused_by_name(work, tmp_path, made_up, capsys, more, named):
    start = ("--search", "lr=1e-3,1e-2", "--sampler", "grid")
    assert call(work, tmp_path / "s", *start) == 0
    before = {name: content for name, content in toy.tree(tmp_path / "s").items() if name != "study.db"}
    capsys.readouterr()
    assert call(work, tmp_path / "s", *start, *more) == 2
    assert f"study sweep-12345: began with another {named}" in capsys.readouterr().err.splitlines()[-1]
    assert {name: content for name, content in toy.tree(tmp_path / "s").items() if name != "study.db"} == before


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("more, said", [
    ((), "the following arguments are required: --search"), (("--search", "rank"), "--search rank: expected OPTION=VALUES"),
    (("--search", "rnk=1,2"), "--search rnk=1,2: unknown option rnk; did you mean rank?"),
    (("--search", "rank=1,x"), "--search rank=1,x: argument --rank: 'x': expected a whole number"),
    (("--search", "rank=1,1"), "--search rank=1,1: a value is given twice"),
    (("--search", "rank=1,,2"), "--search rank=1,,2: a value is empty"),
    (("--search", "rank=1,2", "--search", "rank=4"), "--search rank=4: rank is searched twice"),
    (("--search", "lr=1e-3..1e-4"), "--search lr=1e-3..1e-4: expected a range LOW..HIGH of numbers, LOW below HIGH"),
    (("--search", "dropout=0..0.5:log"), "LOW below HIGH and above 0"),
    (("--search", "dropout=0..2"), "argument --dropout: '2': expected a number from 0 to 0.99"),
    (("--search", "lr=1e-4..1e-3", "--sampler", "grid"), "a grid needs choices, such as 1,2,4, not a range"),
    (("--search", "targets=q..v"), "expected a range LOW..HIGH of numbers"),
    (("--search", "limit=10,20"), "limit is the same for every trial"),
    (("--search", "rank=1,99"), "--rank 99: expected 1 to 32"), (("--search", "targets=q,z"), "--targets z: matches no"),
    (("--search", "rank=1..64"), "--rank 64: expected 1 to 32"), (("--search", "layers=0,7"), "--layers 7: expected"),
    (("--search", "rslora=yes,maybe"), "rslora=maybe: expected yes or no"),
    (("--search", "rank=1,2", "--trials", "0"), "argument --trials: '0'"),
    (("--search", "rank=1,2", "--storage", "nosql://u:secret@h/x"), "--storage nosql://u:***@h/x: the database cannot"),
    (("--search", "rank=1,2", "--data", "nowhere"), "--data nowhere: not a folder")])
def test_bad_input_is_one_line_and_nothing_is_written(work, tmp_path, monkeypatch, capsys, more, said):
    monkeypatch.chdir(tmp_path)
    assert toy.main("sweep", "12345", "--model", work / "model", "--data", work / "cola", *more) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0] and "secret" not in lines[0]
    assert os.listdir(tmp_path) == []


def test_a_password_is_not_written_down(work, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", "sweep", "12345", "--storage", "postgresql://me:secret@host/db"])
    command = json.dumps(provenance({}, {})["command"])
    assert "postgresql://me:***@host/db" in command and "secret" not in command


def foreign_database(path) -> None:
    """A table of another program, one name of which Optuna uses too."""
    with contextlib.closing(sqlite3.connect(path)) as file:
        file.executescript("create table studies (id integer); create table patients (name text);")


def old_database(path) -> None:
    """A study's database whose tables are of a version that Optuna does not know."""
    optuna.storages.RDBStorage(f"sqlite:///{path}").remove_session()
    with contextlib.closing(sqlite3.connect(path)) as file:
        file.executescript("update alembic_version set version_num = 'v0.1.0.a'")


@pytest.mark.parametrize("make, said", [
    (foreign_database, "another program's database, with the table patients; expected a sweep's"),
    (old_database, "made by another version of Optuna"),
    (lambda path: path.write_text("no database " * 100), "the database cannot be used (")])
@pytest.mark.parametrize("given", [True, False])
def test_a_database_that_is_no_study_is_one_line_and_stays_as_it_is(work, tmp_path, made_up, capsys, make, said, given):
    (tmp_path / "s").mkdir()
    path = tmp_path / "foreign.db" if given else tmp_path / "s" / "study.db"
    make(path)
    before = path.read_bytes()
    assert call(work, tmp_path / "s", *SEARCH, *(("--storage", f"sqlite:///{path}") if given else ())) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and (said in lines[0] or not given and "s: " in lines[0])
    assert path.read_bytes() == before
