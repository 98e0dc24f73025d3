"""A distillation in stages: equal budgets, ablations, and a stopped one that ends in the same bytes."""
import json
import shutil

import pytest
import torch
import toy
from conftest import toy_net
from safetensors.torch import load_file
from toy_stages import SIZES, SMALL, distil, new_sentences
from transformers import AutoTokenizer

from benchmarks import collect
from distillation import recipe
from experiments import evaluate, seeds
from experiments.distil_options import options_from
from experiments.parser import Parser
from record.files import read_json
from record.folder import without_times
from report import figures, records, tables
from report.runs import Run


def test_a_student_past_a_tenth_of_the_teacher_is_warned_of(work, tmp_path, capsys):
    small = ("distil", "12345", "--plain", "--teacher", work / "LoRA", "--epochs", 1, "--batch-size", 8, "--no-plots",
             "--no-control", "--embedding-size", 4)
    for hidden, warned in ((4, False), (64, True)):
        assert toy.main(*small, "--hidden-size", hidden, "--out", tmp_path / str(hidden)) == 0
        out, err = capsys.readouterr()
        summary = read_json(tmp_path / str(hidden) / "summary.json")
        assert (10 * summary["student"]["parameters"] > summary["teacher"]["parameters"]) == warned
        assert ("% of the teacher's parameters, more than 10 %" in err) == warned


def test_a_student_fills_the_parameters_that_it_is_given(work, tmp_path, capsys):
    small = ("distil", "12345", "--plain", "--teacher", work / "LoRA", "--epochs", 1, "--batch-size", 8, "--no-plots",
             "--no-control", "--vocabulary", 32, "--student-parameters")
    assert toy.main(*small, 4000, "--out", tmp_path / "run") == 0
    summary, sizes = (read_json(tmp_path / "run" / name) for name in ("summary.json", "student_config.json"))
    assert 3000 < summary["student"]["parameters"] <= 4000 and sizes["hidden_size"] >= sizes["embedding_size"] == 8
    capsys.readouterr()
    assert toy.main(*small, 400, "--out", tmp_path / "none") == 2
    assert "--student-parameters 400: a student with embeddings of 8 and a state of 8 has " in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_development_rows_that_stand_in_the_training_split_are_counted_said_and_recorded(work, tmp_path, capsys):
    shutil.copytree(work / "cola", tmp_path / "cola")
    train = (tmp_path / "cola" / "in_domain_train.tsv").read_text().splitlines()
    dev = tmp_path / "cola" / "in_domain_dev.tsv"
    # Seven rows of training, four of them with other case and punctuation; none of the second development file.
    rows = [line.split("\t") for line in train[:7]]
    repeated = [[*row[:3], row[3].upper() + "!" if number < 4 else row[3]] for number, row in enumerate(rows)]
    new = [["s", str(number % 2), "", f"Brand new sentence {number}"] for number in range(5)]
    dev.write_text("".join("\t".join(row) + "\n" for row in [*repeated, *new]))
    other = tmp_path / "cola" / "out_of_domain_dev.tsv"
    other.write_text("".join(f"s\t{number % 2}\t\tAnother new sentence {number}\n" for number in range(5)))
    line = ("LoRA", "12345", "--model", work / "model", "--data", tmp_path / "cola", "--epochs", 1, "--no-plots")
    assert toy.main(*line, "--out", tmp_path / "LoRA") == 0
    assert toy.main("distil", "12345", "--plain", "--teacher", tmp_path / "LoRA", "--out", tmp_path / "distil", *SIZES,
                    "--epochs", 1, "--no-control", "--no-plots") == 0
    said = "in_domain: 7 of 12 rows stand in the training split too"
    assert capsys.readouterr().out.count(said) == 2
    for run in ("LoRA", "distil"):
        assert read_json(tmp_path / run / "config.json")["rows_in_training"] == {"in_domain": 7, "out_of_domain": 0}


def test_every_stage_has_its_lines_and_both_students_the_same_steps(staged):
    summary, lines = read_json(staged / "run" / "summary.json"), toy.lines_of(staged / "run")
    student, scratch = summary["student"]["stages"], summary["scratch"]["stages"]
    assert [stage["stage"] for stage in student] == [stage["stage"] for stage in scratch] == ["pretrain", "transfer", "gold"]
    assert [stage["steps"] for stage in student] == [stage["steps"] for stage in scratch]
    for phase, its_stages in (("student", student), ("scratch", scratch)):
        for stage in its_stages:
            own = [line for line in lines if (line["phase"], line["stage"]) == (phase, stage["stage"])]
            assert [line["epoch"] for line in own] == list(range(1, stage["epochs"] + 1))
            assert ("mcc" in own[0]["train"]) == (stage["stage"] != "pretrain")


def test_what_is_kept_is_the_student_alone(staged):
    state = load_file(staged / "run" / "student.safetensors")
    assert {name.split(".")[0] for name in state} == {"embedding", "rnn", "attention", "classifier"}
    assert sum(value.numel() for value in state.values()) == (
        read_json(staged / "run" / "summary.json")["student"]["parameters"])


def test_a_stage_without_a_teacher_is_trained_once_for_student_and_control(work, staged, tmp_path, monkeypatch):
    words, backward = ("--augment", 0, "--match", "none"), torch.Tensor.backward
    taken, passes = recipe.take_over, {}
    for name, take_over in (("twice", lambda *_: None), ("once", taken)):
        monkeypatch.setattr(recipe, "take_over", take_over)
        monkeypatch.setattr(torch.Tensor, "backward", lambda self, name=name: passes.update(
            {name: passes.get(name, 0) + 1}) or backward(self))
        assert distil(work, tmp_path / name, *words) == 0
    one, other = toy.tree(tmp_path / "twice"), toy.tree(tmp_path / "once")
    for name in ("student.safetensors", "scratch.safetensors"):
        assert one[name] == other[name]
    assert without_times(toy.lines_of(tmp_path / "twice")) == without_times(toy.lines_of(tmp_path / "once"))
    pretraining = json.loads(other["summary.json"])["scratch"]["stages"][0]
    assert pretraining["stage"] == "pretrain" and passes["twice"] - passes["once"] == pretraining["steps"] > 0


# The writer takes one step; each later stage of the student two to twenty.
@pytest.mark.parametrize("stops", [2, 9, 25, 60])
def test_a_run_stopped_in_any_stage_and_resumed_ends_in_the_same_bytes(work, staged, tmp_path, monkeypatch, stops):
    calls = []
    monkeypatch.setattr("machine.signals.received", lambda: calls.append(1) or (15 if len(calls) == stops else None))
    assert distil(work, tmp_path / "run") == 143
    monkeypatch.undo()
    assert distil(work, tmp_path / "run", "--resume") == 0
    after, whole = toy.tree(tmp_path / "run"), toy.tree(staged / "run")
    for name in ("student.safetensors", "scratch.safetensors"):
        assert after[name] == whole[name]
    assert without_times(toy.lines_of(tmp_path / "run")) == without_times(toy.lines_of(staged / "run"))
    for name in ("student", "scratch"):
        one, other = (json.loads(tree["summary.json"])[name] for tree in (after, whole))
        assert without_times(one) == without_times(other)


def test_the_ablations_leave_their_stage_out(work, staged, tmp_path):
    for more, expected in ((("--pretrain", 0), ["transfer", "gold"]), (("--augment", 0), ["pretrain", "gold"]),
                           (("--match", "none", "--kd-loss", "hard", "--student-embeddings", "random"), None)):
        out = tmp_path / "-".join(map(str, more))
        assert distil(work, out, *more) == 0
        found = [stage["stage"] for stage in read_json(out / "summary.json")["student"]["stages"]]
        assert found == (expected or ["pretrain", "transfer", "gold"])


@pytest.fixture(scope="module")
def encoder(work, tmp_path_factory):
    """A LoRA run of a toy BERT that reads the toy model's tokens."""
    folder = tmp_path_factory.mktemp("encoder")
    toy_net("bert", vocab_size=len(AutoTokenizer.from_pretrained(work / "model")), pad_token_id=0,
            max_position_embeddings=64).save_pretrained(folder / "model")
    for file in (work / "model").glob("tokenizer*"):
        shutil.copy(file, folder / "model")
    assert toy.lora(work, folder / "LoRA", "--model", folder / "model", "--no-plots") == 0
    return folder / "LoRA"


@pytest.mark.parametrize(("kind", "words", "directions"), [
    ("decoder", (), 1), ("encoder", (), 2), ("decoder", ("--directions", 2), 2), ("encoder", ("--directions", 1), 1),
    ("decoder", ("--plain",), 2)])
def test_a_student_reads_as_its_teacher_does_unless_told_otherwise(work, staged, encoder, tmp_path, kind, words, directions):
    stages_of = () if "--plain" in words else ("--augment", 12, "--transfer", 1, "--text", work / "plain.txt")
    teacher = {"decoder": work / "LoRA", "encoder": encoder}[kind]
    assert toy.main("distil", "12345", "--teacher", teacher, "--out", tmp_path / "run", *SIZES, "--epochs", 1,
                    "--no-control", "--no-plots", *stages_of, *words) == 0
    names = load_file(tmp_path / "run" / "student.safetensors").keys()
    assert ("rnn.weight_hh_l0_reverse" in names) == (directions == 2)
    assert read_json(tmp_path / "run" / "student_config.json")["directions"] == directions
    assert evaluate.load_student(tmp_path / "run")[0].config.directions == directions


@pytest.mark.parametrize(("words", "epochs", "lr"), [((), 6, 5e-4), (("--augment", "0"), 15, 3e-3), (("--plain",), 15, 3e-3),
                                                     (("--transfer", "0", "--lr", "1e-3"), 15, 1e-3)])
def test_without_a_transfer_set_the_training_set_has_the_epochs_of_the_plain_recipe(work, words, epochs, lr):
    args = Parser("distil").parse(["12345", "--teacher", str(work / "LoRA"), "--task", "cola", *words])
    train = options_from(args)[0].train
    assert (train.epochs, train.lr) == (epochs, lr)


def test_both_students_are_asked_about_edited_tokens_and_the_baseline_by_no_teacher(work, staged, tmp_path, monkeypatch,
                                                                                    capsys):
    """The baseline has the steps of the student, on sentences that nothing of a teacher's has made."""
    plans, stages_of = [], recipe.baseline_stages
    monkeypatch.setattr(recipe, "baseline_stages", lambda *args: plans.append((*args, stages_of(*args))) or plans[-1][-1])
    run = tmp_path / "run"
    assert distil(work, run, "--edit-weight", 1, "--cache", staged, "--pretrain", 0) == 0
    (plan, (student, _), (baseline, _)), = plans
    found, used = plan.sentences, {int(row) for one in baseline.data.batches for row in one.rows}
    kinds = [kind for kind, _ in new_sentences(staged)]
    # Written sentences need a teacher, and so do edits of these.
    assert used == {*found.free, *found.rows_of_training_set()}
    assert {kinds[row] for row in found.free} <= {"edit of training", "plain", "edit of others"}
    assert {row for row, kind in enumerate(kinds) if kind in ("edit of training", "plain")} <= set(found.free)
    assert student.steps == baseline.steps
    marked = [bool(found.edits.of(torch.tensor([row])).any()) for row in range(found.targeted)]
    assert all(marked[row] == kind.startswith("edit") for row, kind in enumerate(kinds))
    assert not any(marked[row] for row in found.rows_of_training_set())
    # The heads are for training alone, and the loss made a difference to both students.
    plain = tmp_path / "plain"
    assert distil(work, plain, "--cache", staged, "--pretrain", 0) == 0
    for name in ("student.safetensors", "scratch.safetensors"):
        one, other = load_file(run / name), load_file(plain / name)
        assert one.keys() == other.keys() and not one["rnn.weight_hh_l0"].equal(other["rnn.weight_hh_l0"])
    capsys.readouterr()
    for more in (("--augment", 0), ("--plain",)):
        words = ("--teacher", work / "LoRA", "--out", tmp_path / "x", "--edit-weight", 1, *more)
        assert toy.main("distil", "12345", *words) == 2
        assert "--edit-weight: " in capsys.readouterr().err


def test_plots_show_the_stages(work, staged, tmp_path):
    assert {path.name for path in figures.plot_run(staged / "run", tmp_path)} >= {
        "distil-12345_pretrain.png", "distil-12345_loss.png"}
    run = figures.Run(staged / "run")
    figure = figures.pretraining_figure(run.metrics, run.summary)
    names = [f"{name}: {what}" for name in ("student with KD", "baseline") for what in ("train", "held out")]
    assert [line.get_label() for line in figure.axes[0].get_lines()] == names
    axes = figures.curves(run.metrics, run.summary, "mcc").axes[0]
    assert {text.get_text() for text in axes.texts} == {"transfer set", "training set"}


def test_bad_text_and_options_are_one_line(work, tmp_path, capsys):
    for more, said in ((("--text", tmp_path / "none.txt"), "none.txt: cannot be read"), (("--plain",), "not with --plain")):
        assert distil(work, tmp_path / "x", *more) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert said in error
    assert not (tmp_path / "x" / "summary.json").exists()


def test_without_a_control_the_student_is_the_same_and_all_that_follows_does_without(work, staged, tmp_path, monkeypatch,
                                                                                     capsys, quick):
    run = tmp_path / "run"
    assert toy.main("distil", "12345", "--teacher", work / "LoRA", "--text", work / "plain.txt", "--out", run, *SMALL[:-1],
                    "--no-plots", "--cache", staged, "--no-control") == 0
    assert "baseline" not in capsys.readouterr().out
    assert (run / "student.safetensors").read_bytes() == (staged / "run" / "student.safetensors").read_bytes()
    summary = records.read_json(run / "summary.json")
    assert "scratch" not in summary and not list(run.glob("scratch*"))
    assert {line["phase"] for line in toy.lines_of(run)} == {"student"}
    study = seeds.results("distil", {12345: summary})
    assert [row["entry"] for row in study["entries"]] == ["teacher", "student"]
    assert [(row["entry"], row["minus"]) for row in study["differences"]] == [("student", "teacher")]
    tables_of_run, numbers = tables.tables_of(Run(run))
    assert tables_of_run and "gain" not in numbers and "scratch" not in numbers
    monkeypatch.setattr(collect, "typed", lambda command: command)  # it has paths of this machine
    assert [row["name"] for row in collect.collect([run])["rows"]] == ["teacher", "student"]
    for mode, *more in (("predict", "A cat sat.", "--control"), ("export", "--control", "--out", tmp_path / "onnx")):
        assert toy.main(mode, run, *more) == 2
        error = capsys.readouterr().err
        assert error.endswith(f"run.py: {run}: has no baseline (it was run with --no-control)\n")
    assert toy.main("diagnose", run, "--limit", 2, "--out", tmp_path / "diagnosis") == 0
    assert list(read_json(tmp_path / "diagnosis" / "diagnose.json")["models"]) == ["teacher", "student", "language_model"]
