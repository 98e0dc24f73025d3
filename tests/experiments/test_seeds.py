"""LoRA and distil over several seeds: ordinary runs that are kept, what they say together, what is refused."""
import json
from types import SimpleNamespace

import pytest
import toy
from scipy import stats

from experiments import compare, seeds
from machine.errors import UserError
from record.files import read_json
from report import figures

SEEDS = ("99999", "00000")


@pytest.fixture(scope="module")
def studies(work, tmp_path_factory):
    """Two seeds of a LoRA run and of a distillation of each, trained in this process; and the children's words."""
    folder, words = tmp_path_factory.mktemp("seeds"), []

    def child(arguments, log, threads=None, tick=None):
        words.append(arguments)
        log.touch()
        return toy.main(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "run_child", child)
        patch.setattr(figures, "plot_run", lambda *_: [])
        assert lora(work, folder, "--seeds", 2) == 0
        assert distil(folder, "--seeds", 2) == 0
    return folder, words


def lora(work, folder, *more) -> int:
    return toy.main("LoRA", "99999", "--model", work / "model", "--data", work / "cola", "--epochs", 2, "--batch-size", 8,
                    "--lr", 0.01, "--out", folder / "runs", "--plots", folder / "plots", *more)


def distil(folder, *more) -> int:
    return toy.main("distil", "99999", "--plain", "--teacher", folder / "runs", "--epochs", 2, "--batch-size", 8, "--lr",
                    0.02,
                    "--embedding-size", 6, "--hidden-size", 5, "--out", folder / "runs", "--plots", folder / "plots", *more)


def summaries(folder, mode) -> list[dict]:
    return [read_json(folder / "runs" / f"{mode}-{seed}" / "summary.json") for seed in SEEDS]


@pytest.fixture
def no_children(monkeypatch):
    """Fails where a run is started."""
    monkeypatch.setattr(compare, "run_child", lambda *_, **__: pytest.fail("a run was started"))
    monkeypatch.setattr(figures, "plot_run", lambda *_: [])


def test_every_seed_is_an_ordinary_run_and_00000_follows_99999(studies):
    folder, words = studies
    assert [call[:2] for call in words] == [["LoRA", "99999"], ["LoRA", "00000"], ["distil", "99999"], ["distil", "00000"]]
    for mode in ("LoRA", "distil"):
        assert [summary["sr"] for summary in summaries(folder, mode)] == list(SEEDS)
    assert [summary["teacher"]["run"] for summary in summaries(folder, "distil")] == [
        str(folder / "runs" / f"LoRA-{seed}") for seed in SEEDS]
    assert (folder / "plots" / "LoRA-99999_seeds.png").stat().st_size > 5000


def test_means_and_intervals_are_scipys_of_the_runs_own_scores(studies):
    folder, _ = studies
    found = read_json(folder / "runs" / "LoRA-99999-seeds" / "seeds.json")
    row = found["entries"][0]
    for which, key in (("best", "validation"), ("last", "last_validation")):
        for split in ("in_domain", "out_of_domain", "all"):
            for name in ("accuracy", "mcc"):
                values = [summary[key][split][name] for summary in summaries(folder, "LoRA")]
                spread = row[which][split][name]
                assert spread["values"] == values
                if len(set(values)) > 1:
                    assert spread["interval"] == pytest.approx(stats.t.interval(0.95, 1, spread["mean"], stats.sem(values)))
    assert (found["seeds"], found["of"], found["differences"]) == (list(SEEDS), "LoRA", [])
    assert found["options"]["lr"] == 0.01 and len(found["data_files"]) == 3


def test_students_are_compared_with_their_own_seeds_baseline(studies):
    folder, _ = studies
    found = read_json(folder / "runs" / "distil-99999-seeds" / "seeds.json")
    for entry in found["entries"]:
        assert entry["sentences_per_second"]["values"] == [
            summary[entry["entry"]]["sentences_per_second"] for summary in summaries(folder, "distil")]
    assert [row["entry"] for row in found["entries"]] == ["teacher", "student", "scratch"]
    difference = next(row for row in found["differences"] if row["minus"] == "scratch")
    for which, key in (("best", "validation"), ("last", "last_validation")):
        wanted = [s["student"][key]["in_domain"]["mcc"] - s["scratch"][key]["in_domain"]["mcc"]
                  for s in summaries(folder, "distil")]
        assert difference[which]["in_domain"]["mcc"]["values"] == pytest.approx(wanted)
    assert "student minus baseline" in (folder / "runs" / "distil-99999-seeds" / "seeds.tex").read_text()


def test_finished_seeds_are_kept_and_one_alone_has_no_interval(work, studies, no_children, capsys):
    folder, _ = studies
    assert lora(work, folder, "--seeds", 1, "--no-plots") == 0
    said = capsys.readouterr().out
    assert "One seed (99999): no standard deviation and no interval" in said and "\u00b1" not in said
    spread = read_json(folder / "runs" / "LoRA-99999-seeds" / "seeds.json")["entries"][0]["best"]["in_domain"]["mcc"]
    assert spread["interval"] is None and spread["sd"] is None
    assert lora(work, folder, "--seeds", 2, "--no-plots") == 0
    assert f"over 2 seeds ({SEEDS[0]} to {SEEDS[1]})" in capsys.readouterr().out


def test_a_run_with_other_options_is_refused_by_name(work, studies, no_children, capsys):
    folder, _ = studies
    before = toy.tree(folder / "runs")
    assert lora(work, folder, "--seeds", 3, "--rank", 4) == 2
    assert "LoRA-99999: holds a run with another rank: 8, now 4" in capsys.readouterr().err
    assert distil(folder, "--seeds", 2, "--kd-alpha", 0.5) == 2
    assert "distil-99999: holds a run with another kd_alpha: 0.9, now 0.5" in capsys.readouterr().err
    assert toy.tree(folder / "runs") == before


def test_overwrite_runs_every_seed_again_and_a_diverged_one_is_told(work, monkeypatch, tmp_path, capsys):
    begun = []

    def child(arguments, log, threads=None, tick=None):
        begun.append(arguments[1])
        log.write_text("run.py: loss nan\n")
        if arguments[1] == "00000":
            return 3
        return toy.main(*arguments)
    monkeypatch.setattr(compare, "run_child", child)
    assert lora(work, tmp_path, "--seeds", 2, "--no-plots") == 0
    assert "Diverged, and left out: 00000." in capsys.readouterr().out
    assert lora(work, tmp_path, "--seeds", 2, "--no-plots") == 0
    assert begun == ["99999", "00000"]  # what diverged would diverge again
    assert lora(work, tmp_path, "--seeds", 2, "--no-plots", "--overwrite") == 0
    assert begun == ["99999", "00000"] * 2
    found = read_json(tmp_path / "runs" / "LoRA-99999-seeds" / "seeds.json")
    assert [run["status"] for run in found["runs"]] == ["finished", "diverged"] and found["entries"][0]["seeds"] == ["99999"]


def test_a_seed_without_a_teacher_is_one_line_and_nothing_is_written(studies, no_children, tmp_path, capsys):
    folder, _ = studies
    before = toy.tree(folder / "runs")
    assert distil(folder, "--seeds", 3) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"run.py: teacher {folder / 'runs' / 'LoRA-00001'}: no such run") and error.count("\n") == 1
    assert toy.tree(folder / "runs") == before


@pytest.mark.parametrize(("key", "said"), [("data_files", "read another train.tsv than"),
                                           ("init_files", "started from another train.tsv than")])
def test_seeds_that_read_other_files_are_no_study(tmp_path, key, said):
    runs = [SimpleNamespace(folder=tmp_path / seed) for seed in SEEDS]
    same = {"data_files": {"dev.tsv": "1"}, "init_files": {}}
    for run, digest in zip(runs, ("aa", "bb"), strict=True):
        run.folder.mkdir()
        (run.folder / "config.json").write_text(json.dumps({**same, key: {"train.tsv": digest}}))
    with pytest.raises(UserError, match=f"{runs[1].folder}: {said} {runs[0].folder}; pass --overwrite"):
        seeds.same_data(runs)
    (runs[1].folder / "config.json").write_text((runs[0].folder / "config.json").read_text())
    assert seeds.same_data(runs) == {**same, key: {"train.tsv": "aa"}}["data_files"]
