"""Real runs of two seeds become mean and sample standard deviation; runs that differ in more than the seed are refused."""
import json
import shutil

import numpy as np
import pytest
import toy

from benchmarks import collect as module
from benchmarks.collect import collect, typed
from machine.errors import UserError
from record.files import read_json
from report import figures

SMALL = ("--plain", "--embedding-size", 6, "--hidden-size", 5, "--epochs", 2, "--batch-size", 8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of one LoRA command and of the distillation after each; started with relative paths."""
    folder = tmp_path_factory.mktemp("project") / "clone"
    toy.write_model(folder / "model")
    toy.write_cola(folder / "cola")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(module, "ROOT", folder)
        patch.setattr(figures, "plot_run", lambda *_: [])
        for seed in ("12345", "12346"):
            assert toy.main("LoRA", seed, "--model", "model", "--data", "cola", "--epochs", 2, "--lr", 0.01,
                            "--batch-size", 8, "--plots", "plots") == 0
            assert toy.main("distil", seed, "--teacher", f"runs/LoRA-{seed}", "--plots", "plots", *SMALL) == 0
        yield folder / "runs"


def folders(runs, mode):
    return [runs / f"{mode}-{seed}" for seed in ("12345", "12346")]


def test_seeds_become_mean_and_sample_deviation(runs):
    result = collect(folders(runs, "LoRA"))
    summaries = [read_json(folder / "summary.json") for folder in folders(runs, "LoRA")]
    row, = result["rows"]
    assert row["name"] == "lora" and row["trainable"] == summaries[0]["parameters"]["trainable"]
    for which, key in (("best", "validation"), ("last", "last_validation")):
        for split in ("in_domain", "out_of_domain", "all"):
            for score in ("accuracy", "mcc"):
                values = [summary[key][split][score] for summary in summaries]
                spread = row[which][split][score]
                assert spread["values"] == values
                assert spread["mean"] == pytest.approx(np.mean(values))
                assert spread["std"] == pytest.approx(np.std(values, ddof=1))
    assert row["best_epoch"] == [summary["best_epoch"] for summary in summaries] and row["last_epoch"] == [2, 2]
    assert result["majority_accuracy"] == {split: values["majority_accuracy"]
                                           for split, values in summaries[0]["validation"].items()}
    assert result["command"] == "python run.py LoRA SR --model model --data cola --epochs 2 --lr 0.01 --batch-size 8"
    config = read_json(runs / "LoRA-12345" / "config.json")
    assert result["git_commits"] == [config["git_commit"]] and result["cpu"] == config["cpu"]
    assert result["versions"] == config["versions"] and result["threads"] == config["threads"]


def test_a_distillation_has_teacher_student_and_baseline(runs):
    result = collect(folders(runs, "distil"))
    assert [row["name"] for row in result["rows"]] == ["teacher", "student", "scratch"]
    assert "--teacher runs/LoRA-SR" in result["command"]
    for row in result["rows"]:
        values = [read_json(folder / "summary.json")[row["name"]]["validation"]["all"]["mcc"]
                  for folder in folders(runs, "distil")]
        assert row["best"]["all"]["mcc"]["values"] == values


def test_one_run_has_no_deviation(runs):
    row, = collect([runs / "LoRA-12345"])["rows"]
    assert row["best"]["all"]["mcc"]["std"] is None


@pytest.mark.parametrize("change, says", [
    (lambda config: config.update(command=config["command"] + " --rank 4"), "another command than"),
    (lambda config: config.update(cpu="Another CPU"), "cpu is not that of"),
    (lambda config: config.update(threads=99), "threads is not that of"),
    (lambda config: config["versions"].update(torch="1.0"), "versions is not that of"),
    (lambda config: config["data_files"].update({"cola/in_domain_dev.tsv": "0"}), "data_files is not that of")])
def test_runs_that_differ_in_more_than_the_seed_are_refused(runs, tmp_path, change, says):
    shutil.copytree(runs / "LoRA-12346", tmp_path / "run")
    config = read_json(tmp_path / "run" / "config.json")
    change(config)
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    toy.reseal(tmp_path / "run")
    with pytest.raises(UserError, match=says):
        collect([runs / "LoRA-12345", tmp_path / "run"])


def test_the_same_seed_twice_and_damaged_runs_are_refused(runs, tmp_path):
    with pytest.raises(UserError, match="two runs have the same seed"):
        collect([runs / "LoRA-12345", runs / "LoRA-12345"])
    shutil.copytree(runs / "LoRA-12346", tmp_path / "run")
    with open(tmp_path / "run" / "summary.json", "a") as file:
        file.write(" ")
    with pytest.raises(UserError, match="summary.json: damaged or changed"):
        collect([runs / "LoRA-12345", tmp_path / "run"])


def test_the_seed_stays_in_words_that_all_runs_have_in_common():
    commands = [f"python run.py distil {seed} --teacher runs/LoRA-12345 --cache c{seed}" for seed in ("12345", "12346")]
    assert module.of_any_seed(commands, ["12345", "12346"]) == [
        "python run.py distil SR --teacher runs/LoRA-12345 --cache cSR"] * 2
    assert module.of_any_seed(commands[:1], ["12345"]) == ["python run.py distil SR --teacher runs/LoRA-SR --cache cSR"]
    longer = f"{commands[1]} --rank 4"
    assert len(set(module.of_any_seed([commands[0], longer], ["12345", "12346"]))) == 2


def test_a_command_is_shown_without_the_runs_place(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "ROOT", tmp_path / "clone")
    data = tmp_path / "shared/data/cola"
    assert typed(f"python run.py LoRA 12345 --data {data} --out /x/y --resume --plots=/p --rank 8") == (
        "python run.py LoRA 12345 --data ../shared/data/cola --rank 8")
    assert typed(f"python run.py LoRA 12345 --data={data} --no-plots") == (
        "python run.py LoRA 12345 --data=../shared/data/cola")
    with pytest.raises(UserError, match="a path of this machine"):
        typed("python run.py LoRA 12345 --data /elsewhere/cola")


def test_the_program_writes_a_result_and_tells_what_is_wrong(runs, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["collect.py", "--name", "x", *map(str, folders(runs, "LoRA"))])
    assert module.main() == 0
    assert read_json(module.ROOT / "benchmarks" / "results" / "x.json") == json.loads(
        json.dumps(collect(folders(runs, "LoRA"))))
    monkeypatch.setattr("sys.argv", ["collect.py", "--name", "x", str(runs / "none")])
    assert module.main() == 2
    assert capsys.readouterr().err.splitlines() == [f"collect.py: {runs / 'none'}: not a run's folder; "
                                                    "python run.py LoRA SR makes one"]
