"""A comparison: the learning rate of each entry, its means, what is kept, what is refused; a killed one goes on."""
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
import warm
from scipy import stats

from experiments import compare
from machine import signals
from record.files import read_json
from record.folder import without_times
from report import records, studies

GRID = (1e-4, 1e-3, 1e-2)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A toy model and toy data."""
    folder = tmp_path_factory.mktemp("compare")
    toy.write_model(folder / "model")
    toy.write_cola(folder / "cola", train=80)
    return folder


def call(work, out, *more) -> int:
    plots = () if "--plots" in more else ("--no-plots",)
    return toy.main("compare", "99999", "--model", work / "model", "--data", work / "cola", "--out", out, "--batch-size", 8,
                    *plots, *more)


def option(words: list[str], name: str) -> str | None:
    return next((word.partition("=")[2] for word in words if word.startswith(f"--{name}=")), None)


@pytest.fixture
def made_up(monkeypatch):
    """Children that train nothing: their scores follow from method, rate and seed. Holds the words of each child.

    The head is best at the highest rate, LoRA at the middle one; full fine-tuning diverges at the highest two, and with
    the last seed.
    """
    calls = []

    def child(words, log, threads=None, tick=None):
        calls.append(words)
        log.write_text("made up\n")
        method, rate, seed = option(words, "method") or "lora", option(words, "lr"), words[1]
        if method == "full" and (float(rate) > 1e-4 or seed == "00001"):
            log.write_text("run.py: loss nan at step 1\n")
            return 3
        off = {"head": 1e-2, "lora": 1e-3, "full": 1e-4, "none": 1}[method]
        mcc = 0.5 - 0.1 * abs(np.log10(float(rate or 1) / off)) + {"99999": 0.0, "00000": 0.03, "00001": -0.02}[seed]
        scores = {"n": 12, "loss": 0.5, "accuracy": 0.7 + mcc / 10, "mcc": mcc, "majority_accuracy": 0.6}
        folder = Path(option(words, "out"))
        (folder / "weights.safetensors").write_bytes(bytes(100 + int(seed == "00000")))
        (folder / "config.json").write_text(json.dumps({"options": {
            "mode": "LoRA", "sr": seed, "seed": int(seed), "model": "m", "task": "cola", "data": None, "method": method,
            "max_length": 8, "batch_size": 8, "precision": "fp32"}}))
        (folder / "summary.json").write_text(json.dumps({
            "mode": "LoRA", "best_epoch": 2, "last_epoch": 3, "parameters": {"total": 200, "trainable": 50},
            "validation": {"in_domain": scores, "out_of_domain": scores | {"accuracy": 0.61}},
            "last_validation": {"in_domain": scores | {"mcc": mcc - 0.1}, "out_of_domain": scores},
            "train": {"epochs": 3, "seconds": 6.0 + int(seed), "peak_memory_bytes": 2 ** 20 * (7 + int(seed == "00001"))}}))
        return 0
    monkeypatch.setattr(compare, "run_child", child)
    return calls


@pytest.fixture
def same_process(monkeypatch):
    """Children that train, in this process: importing PyTorch takes longest of all."""
    def child(words, log, threads=None, tick=None):
        log.touch()
        return toy.main(*words)
    monkeypatch.setattr(compare, "run_child", child)


def rows(out) -> dict[str, dict]:
    return {row["entry"]: row for row in read_json(out / "compare.json")["entries"]}


# ---------------------------------------------------------------- the protocol

def test_each_entry_chooses_its_learning_rate_on_the_first_seed_and_the_others_run_at_it(work, tmp_path, made_up):
    assert call(work, tmp_path / "c", "--methods", "none,head,lora", "--lr-grid", "1e-4,1e-3,1e-2") == 0
    chosen = {name: row["learning_rate"] for name, row in rows(tmp_path / "c").items()}
    assert chosen == {"none": None, "head": 1e-2, "lora": 1e-3}
    ran = [(option(words, "method") or "lora", words[1], option(words, "lr")) for words in made_up]
    assert ran == [("none", "99999", None), ("none", "00000", None), ("none", "00001", None),
                   *(("head", "99999", repr(rate)) for rate in GRID), ("head", "00000", "0.01"), ("head", "00001", "0.01"),
                   *(("lora", "99999", repr(rate)) for rate in GRID), ("lora", "00000", "0.001"),
                   ("lora", "00001", "0.001")]
    tried = rows(tmp_path / "c")["head"]["tried"]
    assert [(t["learning_rate"], round(t["mcc"], 6)) for t in tried] == [(1e-4, 0.3), (1e-3, 0.4), (1e-2, 0.5)]


def test_means_and_sample_deviations_are_numpys(work, tmp_path, made_up):
    assert call(work, tmp_path / "c", "--methods", "lora", "--lr-grid", "1e-4,1e-3") == 0
    row = rows(tmp_path / "c")["lora"]
    summaries = [read_json(tmp_path / "c" / f"lora-lr0.001-{seed}" / "summary.json") for seed in row["seeds"]]
    assert row["seeds"] == ["99999", "00000", "00001"]
    for which, key in (("best", "validation"), ("last", "last_validation")):
        for split in ("in_domain", "out_of_domain"):
            for name in ("accuracy", "mcc"):
                values = [summary[key][split][name] for summary in summaries]
                assert row[which][split][name]["values"] == values
                assert row[which][split][name]["mean"] == pytest.approx(np.mean(values), abs=1e-12)
                assert row[which][split][name]["sd"] == pytest.approx(np.std(values, ddof=1), abs=1e-12)
    assert row["best"]["in_domain"]["mcc"]["sd"] > 0.02 and row["best"] != row["last"]
    assert row["seconds_per_epoch"] == pytest.approx(np.mean([100005, 6, 7]) / 3)
    assert (row["peak_memory_bytes"], row["size_bytes"]) == (8 * 2 ** 20, 101)
    assert row["parameters"]["trainable_percent"] == 25


def test_entries_have_intervals_and_are_subtracted_seed_by_seed(work, tmp_path, made_up, capsys):
    assert call(work, tmp_path / "c", "--methods", "head,lora", "--lr-grid", "1e-4,1e-3") == 0
    assert read_json(tmp_path / "c" / "compare.json")["differences"] == []
    made_up.clear()
    assert call(work, tmp_path / "c", "--methods", "head,lora", "--lr-grid", "1e-4,1e-3", "--against", "head") == 0
    assert made_up == []  # only another table of the same comparison
    found = rows(tmp_path / "c")
    spread = found["lora"]["best"]["in_domain"]["mcc"]
    assert spread["interval"] == pytest.approx(stats.t.interval(0.95, 2, spread["mean"], stats.sem(spread["values"])))
    difference, = read_json(tmp_path / "c" / "compare.json")["differences"]
    assert (difference["entry"], difference["minus"], difference["seeds"]) == ("lora", "head", ["99999", "00000", "00001"])
    assert difference["last"]["in_domain"]["mcc"]["values"] == pytest.approx(
        np.subtract(*(found[name]["last"]["in_domain"]["mcc"]["values"] for name in ("lora", "head"))))
    assert "lora minus head" in capsys.readouterr().out
    assert "lora minus head" in (tmp_path / "c" / "compare_intervals.tex").read_text()


def test_a_rate_that_diverges_is_out_and_a_seed_that_diverges_is_told(work, tmp_path, made_up, capsys):
    assert call(work, tmp_path / "c", "--methods", "full", "--lr-grid", "1e-4,1e-3,1e-2") == 0
    row = rows(tmp_path / "c")["full"]
    assert [tried["mcc"] is None for tried in row["tried"]] == [False, True, True]
    assert (row["learning_rate"], row["seeds"]) == (1e-4, ["99999", "00000"])
    assert "full (2 of 3 seeds)" in capsys.readouterr().out
    assert "loss nan" in (tmp_path / "c" / "full-lr0.01-99999" / "diverged.txt").read_text()
    made_up.clear()
    assert call(work, tmp_path / "c", "--methods", "full", "--lr-grid", "1e-4,1e-3,1e-2") == 0
    assert made_up == []  # what diverged would diverge again


def test_an_entry_that_diverges_at_every_rate_ends_nothing(work, tmp_path, made_up, capsys):
    assert call(work, tmp_path / "c", "--methods", "full,lora", "--lr-grid", "1e-3,1e-2", "--seeds", "2") == 0
    table = capsys.readouterr().out
    assert "diverged" in next(line for line in table.splitlines() if line.startswith("full"))
    assert rows(tmp_path / "c")["full"]["learning_rate"] is None and rows(tmp_path / "c")["lora"]["seeds"]


def test_without_a_grid_each_method_has_its_default_rate_and_lr_is_everybodys(work, tmp_path, made_up):
    assert call(work, tmp_path / "d", "--methods", "head,lora,full", "--seeds", "1", "--set", "r2:rank=2,targets=q,v") == 0
    assert {name: row["learning_rate"] for name, row in rows(tmp_path / "d").items()} == {
        "head": 1e-3, "lora": 4e-4, "full": 5e-5, "r2": 4e-4}
    assert call(work, tmp_path / "e", "--methods", "head,lora", "--seeds", "1", "--lr", "0.005") == 0
    assert {row["learning_rate"] for row in rows(tmp_path / "e").values()} == {0.005}


def test_common_options_and_an_entrys_own_reach_its_runs(work, tmp_path, made_up):
    assert call(work, tmp_path / "c", "--methods", "none", "--seeds", "1", "--epochs", "7", "--rank", "4", "--rslora",
                "--set", "a:targets=q+v,layers=0+1,rank=2", "--set", "b:targets=q,mlp,rslora=no", "--set", "c:alpha=3") == 0
    words = {option(call, "out").rpartition("/")[2].partition("-")[0]: call for call in made_up}
    assert {(option(call, "epochs"), option(call, "batch-size")) for call in made_up} == {("7", "8")}
    assert [option(words["a"], name) for name in ("targets", "layers", "rank")] == ["q,v", "0,1", "2"]
    assert [option(words["b"], name) for name in ("targets", "rank")] == ["q,mlp", "4"]
    assert ["--rslora" in words[name] for name in "abc"] == [True, False, True]
    assert option(words["c"], "alpha") == "3"


def test_a_table_says_which_split_chose(work, tmp_path, made_up, capsys):
    assert call(work, tmp_path / "c", "--methods", "lora", "--seeds", "2", "--lr-grid", "1e-4,1e-3,1e-2") == 0
    said = capsys.readouterr().out
    assert "in-domain split chose the epoch, and the learning rate (of 3, on the first seed)" in said
    assert "out-of-domain took part in no choice" in said
    lone = records.Record(json.loads((tmp_path / "c" / "compare.json").read_text(), object_hook=lambda fields:
                                          records.Record(fields, "x")), "x")
    lone["selection"]["splits"] = ["in_domain"]
    assert "is the one reported: its figures flatter a little" in " ".join(studies.compare_notes(lone))


def test_real_runs_become_a_table_a_plot_and_run_folders_that_eval_scores(work, tmp_path, same_process, capsys):
    assert call(work, tmp_path / "c", "--methods", "none,lora", "--seeds", "2", "--epochs", "2", "--lr-grid", "1e-5,1e-2",
                "--plots", tmp_path / "plots") == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    row = rows(tmp_path / "c")["lora"]
    # A table for each split, then one of sizes and costs.
    sizes = table[table.index(["size", "and", "cost"]):]
    line, size = (next(words for words in part if words[:1] == ["lora"]) for part in (table, sizes))
    assert size[1] == f"{row['parameters']['trainable']:,}" and line[1] == f"{row['learning_rate']:g}"
    mean, sd = (100 * row["best"]["in_domain"]["accuracy"][key] for key in ("mean", "sd"))
    assert line[4:7] == [f"{mean:.1f}", "±", f"{sd:.1f}"]
    run = tmp_path / "c" / f"lora-lr{row['learning_rate']!r}-00000"
    assert row["size_bytes"] == (run / "adapter_model.safetensors").stat().st_size
    summary = read_json(run / "summary.json")
    assert summary["sr"] == "00000" and summary["validation"]["in_domain"]["mcc"] == (
        row["best"]["in_domain"]["mcc"]["values"][1])
    assert toy.main("eval", run, "--data", work / "cola" / "in_domain_dev.tsv", "--json") == 0
    assert json.loads(capsys.readouterr().out).items() >= summary["validation"]["in_domain"].items()
    result = read_json(tmp_path / "c" / "compare.json")
    assert result["command"].startswith("python run.py compare 99999") and result["versions"]["torch"]
    assert (tmp_path / "c" / "compare.tex").read_text().count("lora") == 1
    for kind in ("png", "pdf"):
        assert (tmp_path / "plots" / f"compare-99999.{kind}").stat().st_size > 5000
    assert len(list((tmp_path / "plots").iterdir())) == 2  # the runs drew none


def test_options_of_a_table_are_common_or_an_entrys_own(work, tmp_path, same_process, capsys):
    rows_of = toy.toy_rows(60, seed=3)
    for name, part in (("train.csv", rows_of[:40]), ("dev.csv", rows_of[40:])):
        (tmp_path / name).write_text("said,more,size,kind\n" + "".join(
            f"{text},again,{len(text)},{'yes' if label else 'no'}\n" for text, label in part))
    assert toy.main("compare", "12345", "--model", work / "model", "--data", tmp_path / "train.csv", "--eval-split",
                    tmp_path / "dev.csv", "--text-column", "said,more", "--label-column", "kind", "--methods", "lora",
                    "--set", "numbers:method=features,feature-columns=size", "--set",
                    "both:feature-columns=size,text-column=said", "--seeds", "1", "--epochs", "1", "--lr", "1e-3", "--out",
                    tmp_path / "c", "--no-plots") == 0
    options = {row["entry"]: read_json(tmp_path / "c" / f"{row['entry']}-lr0.001-12345" / "config.json")["options"]
               for row in read_json(tmp_path / "c" / "compare.json")["entries"]}
    assert {name: (o["method"], o["text_column"], o["feature_columns"]) for name, o in options.items()} == {
        "lora": ("lora", ["said", "more"], []), "numbers": ("features", ["said", "more"], ["size"]),
        "both": ("lora", ["said"], ["size"])}
    found = rows(tmp_path / "c")
    assert found["numbers"]["parameters"]["trainable"] < found["lora"]["parameters"]["trainable"] < (
        found["both"]["parameters"]["trainable"])
    said = capsys.readouterr().out
    assert "macro-F1" in said and "is the one reported: its figures flatter a little" in said


# ---------------------------------------------------------------- going on

# The comparison's own children are forked too.
IN_CHILDREN = """
import pathlib, sys
import run
from experiments import compare
compare.RUN = pathlib.Path(sys.argv[1])
run.main(sys.argv[2:])
"""


@pytest.mark.slow
def test_a_killed_comparison_keeps_what_is_finished_and_resumes_what_is_not(work, tmp_path, same_process):
    """Real processes: the comparison is killed while its second run trains, and its child goes with it."""
    toy.write_cola(tmp_path / "cola", train=240)
    common = ["--model", str(work / "model"), "--data", str(tmp_path / "cola"), "--epochs", "8", "--batch-size", "8",
              "--no-plots", "--dropout", "0.1"]
    words = ["compare", "12345", "--methods", "lora", "--seeds", "2", *common]
    first, second = (tmp_path / "killed" / f"lora-lr0.0004-{seed}" for seed in ("12345", "12346"))
    assert toy.main("LoRA", "12345", *common, "--out", first) == 0
    with open(tmp_path / "stderr", "w") as errors:
        process = subprocess.Popen([*warm.command(), "-c", IN_CHILDREN, warm.program(tmp_path), *words, "--out",
                                    tmp_path / "killed"], stderr=errors, stdout=errors)
    toy.until(lambda: (second / "checkpoint.safetensors").exists() or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, (tmp_path / "stderr").read_text()
    assert (first / "summary.json").exists() and not (tmp_path / "killed" / "compare.json").exists()
    toy.until(lambda: "stopped; continue with" in (second / "log.txt").read_text())  # the child saved its state
    assert not (second / "summary.json").exists()
    kept = (first / "summary.json").stat().st_mtime_ns
    assert toy.main(*words, "--out", tmp_path / "killed") == 0
    assert (first / "summary.json").stat().st_mtime_ns == kept
    torch.set_num_threads(read_json(second / "config.json")["threads"])
    assert toy.main("LoRA", "12346", *common, "--out", tmp_path / "whole") == 0
    assert without_times(read_json(second / "summary.json")) == without_times(read_json(tmp_path / "whole" / "summary.json"))
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (second, tmp_path / "whole")]
    assert weights[0] == weights[1]
    assert rows(tmp_path / "killed")["lora"]["seeds"] == ["12345", "12346"]


def test_children_have_as_many_threads_as_the_comparison_began_with(work, tmp_path, monkeypatch, made_up):
    began, asked, child = torch.get_num_threads(), [], compare.run_child
    monkeypatch.setattr(compare, "run_child", lambda words, log, threads, tick: asked.append(threads) or child(words, log))
    assert call(work, tmp_path / "c", "--methods", "lora") == 0
    torch.set_num_threads(began + 1)
    shutil.rmtree(tmp_path / "c" / "lora-lr0.0004-00001")
    assert call(work, tmp_path / "c", "--methods", "lora") == 0
    assert asked == [began] * 4


def test_a_child_uses_the_threads_that_it_is_given(tmp_path, monkeypatch):
    (tmp_path / "child.py").write_text("import torch\nprint(torch.get_num_threads())\n")
    monkeypatch.setattr(compare, "RUN", tmp_path / "child.py")
    assert compare.run_child([], tmp_path / "log.txt", 3) == 0
    assert (tmp_path / "log.txt").read_text() == "3\n"


def test_a_stopped_comparison_names_the_command_that_goes_on(work, tmp_path, monkeypatch, made_up, capsys):
    child = compare.run_child

    def stopped(words, log, threads=None, tick=None):
        if len(made_up) == 2:
            raise signals.Interrupted(15)
        return child(words, log)
    monkeypatch.setattr(compare, "run_child", stopped)
    assert call(work, tmp_path / "c", "--methods", "lora", "--overwrite") == 143
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("run.py: stopped; continue with: python run.py compare 99999") and "--overwrite" not in last
    assert len(made_up) == 2 and not (tmp_path / "c" / "compare.json").exists()
    monkeypatch.setattr(compare, "run_child", child)
    assert call(work, tmp_path / "c", "--methods", "lora") == 0
    assert [words[1] for words in made_up] == ["99999", "00000", "00001"]


def test_a_child_that_fails_is_one_line_that_names_its_log(work, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "run_child",
                        lambda words, log, threads, tick: log.write_text("bar\nrun.py: no such thing\n") and 2)
    assert call(work, tmp_path / "c", "--methods", "lora") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "lora-lr0.0004-99999: the run failed (exit status 2: run.py: no such thing); see" in last and "log.txt" in last


def test_a_real_child_that_fails_leaves_its_words_in_the_log(tmp_path):
    assert compare.run_child(["LoRA", "1234"], tmp_path / "log.txt") == 2
    assert "expected exactly five digits" in (tmp_path / "log.txt").read_text()


def test_a_child_is_asked_to_stop_and_waited_for(tmp_path, monkeypatch):
    (tmp_path / "child.py").write_text(
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(143)))\n"
        "print('began', flush=True)\ntime.sleep(60)\n")
    monkeypatch.setattr(compare, "RUN", tmp_path / "child.py")
    log, handlers = tmp_path / "log.txt", {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def interrupt():
        toy.until(lambda: log.exists() and "began" in log.read_text())
        os.kill(os.getpid(), signal.SIGINT)
    signals.install()
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(signals.Interrupted):
            compare.run_child([], log)
    finally:
        signals._received.clear()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert log.read_text() == "began\nsaved\n"


@pytest.mark.parametrize("more, named", [
    (("--seeds", "2"), "--seeds: 3, now 2"), (("--lr-grid", "1e-3"), "--lr-grid: none, now 0.001"),
    (("--set", "a:rank=2"), "--set: , now a:rank=2"), (("--epochs", "5"), "--epochs: 3, now 5"),
    (("--methods", "lora,head"), "--methods: lora, now lora,head"), (("--rank", "2"), "--rank: 8, now 2")])
def test_other_options_than_it_began_with_are_refused_by_name(work, tmp_path, made_up, capsys, more, named):
    start = ("--methods", "lora")
    assert call(work, tmp_path / "c", *start) == 0
    before = toy.tree(tmp_path / "c")
    capsys.readouterr()
    assert call(work, tmp_path / "c", *start, *more) == 2
    assert f"began with another {named}" in capsys.readouterr().err.splitlines()[-1]
    assert toy.tree(tmp_path / "c") == before
    (tmp_path / "c" / "notes.txt").write_text("mine")
    assert call(work, tmp_path / "c", *start, *more, "--overwrite") == 0
    assert (tmp_path / "c" / "notes.txt").exists()


def test_changed_data_is_refused_by_its_file(work, tmp_path, made_up, capsys):
    toy.write_cola(tmp_path / "cola")
    words = ("compare", "99999", "--model", work / "model", "--data", tmp_path / "cola", "--methods", "lora", "--no-plots",
             "--out", tmp_path / "c")
    assert toy.main(*words) == 0
    with open(tmp_path / "cola" / "in_domain_dev.tsv", "a") as file:
        file.write("s\t1\t\tOne more.\n")
    assert toy.main(*words) == 2
    assert "in_domain_dev.tsv is not the file it began with" in capsys.readouterr().err


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("more, said", [
    (("--set", "r2"), "--set r2: expected NAME:OPTION=VALUE"), (("--set", "r2:rank"), "--set r2:rank: expected NAME:"),
    (("--set", "a/b:rank=1"), "--set a/b:rank=1: expected NAME:"), (("--set", "a:rank="), "--set a:rank=: expected NAME:"),
    (("--set", "a:rnk=2"), "--set a: unknown option rnk; did you mean rank?"),
    (("--set", "a:rank=two"), "--set a: argument --rank: 'two': expected a whole number"),
    (("--set", "a:dropout=2"), "--set a: argument --dropout: '2': expected a number from 0 to 0.99"),
    (("--set", "a:rslora=1"), "--set a: rslora=1: expected yes or no"),
    (("--set", "a:rank=2,rank=3"), "--set a:rank=2,rank=3: an option is given twice"),
    (("--set", "a:lr=1"), "--set a: lr is the same for every entry"),
    (("--set", "a:batch-size=1"), "--set a: batch_size is the same for every entry; give it as --batch-size"),
    (("--set", "a:seeds=1"), "--set a: unknown option seeds"),
    (("--set", "a:rank=99"), "entry a: --rank 99: expected 1 to 32"),
    (("--set", "a:targets=q+z"), "entry a: --targets z: matches no linear layer"),
    (("--set", "a:layers=7"), "entry a: --layers 7: expected block numbers 0 to 1"),
    (("--set", "lora:rank=2"), "entry lora: --methods and --set name it twice"),
    (("--lr-grid", "1e-3,x"), "argument --lr-grid: 'x': expected a number above 0"),
    (("--lr-grid", "1e-3,1e-3"), "argument --lr-grid: '1e-3,1e-3': a value is given twice"),
    (("--lr-grid", ""), "argument --lr-grid: '': expected a number above 0"),
    (("--seeds", "0"), "argument --seeds: '0': expected a whole number from 1 to 1000"),
    (("--methods", "lora,lore"), "argument --methods: 'lore': expected one of lora, full, head, features, none"),
    (("--methods", "lora", "--method", "full"), "unknown option --method"),
    (("--methods", "features"), "--method features: needs --feature-columns"),
    (("--methods", "lora,head", "--against", "full"), "--against full: no such entry; expected one of lora, head"),
    (("--data", "nowhere"), "--data nowhere")])
def test_bad_input_is_one_line_and_nothing_is_written(work, tmp_path, monkeypatch, capsys, more, said):
    monkeypatch.chdir(tmp_path)
    assert toy.main("compare", "12345", "--model", work / "model", "--data", work / "cola", *more) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("platform, keys", [("win32", {"creationflags"}), ("darwin", {"process_group", "preexec_fn"}),
                                            ("linux", {"process_group", "preexec_fn"})])
def test_a_child_has_a_group_of_its_own_on_every_platform(monkeypatch, platform, keys):
    """Windows knows neither process groups nor functions before exec, and only Linux has prctl."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 512, raising=False)
    if platform == "win32":
        monkeypatch.setattr(compare.ctypes, "CDLL", lambda name: 1 / 0)
    found = compare._own_group()
    assert set(found) == keys
    assert callable(found.get("preexec_fn")) == (platform == "linux")
