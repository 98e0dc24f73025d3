"""A distillation's files, its teacher, its two students; a stopped one ends in the same bytes."""
import json
import shutil

import pytest
import torch
import toy
from safetensors.torch import load_file

import data_utils
import train_utils
from experiments import distil_inputs, evaluate
from model import DistilRNN
from record.files import read_json
from record.folder import without_times
from report import figures

SMALL = ("--plain", "--embedding-size", 6, "--hidden-size", 5, "--epochs", 2, "--batch-size", 8)


@pytest.fixture(scope="module")
def distilled(work):
    """A distillation of the LoRA run, what was predicted by whom, and the students' first weights."""
    seen = {"teacher": [], "starts": []}
    compute_logits, fit = train_utils.compute_logits, train_utils.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "plot_run", lambda *_: [])
        patch.setattr(train_utils, "compute_logits", lambda model, batches: (
            None if isinstance(model, DistilRNN) else seen["teacher"].append(sum(len(b.rows) for b in batches)),
            compute_logits(model, batches))[1])

        def watched(model, data, *args, **kwargs):
            seen["starts"].append(({name: value.clone() for name, value in model.state_dict().items()},
                                   torch.get_rng_state(), [batch.input_ids for batch in data.batches]))
            return fit(model, data, *args, **kwargs)

        patch.setattr(train_utils, "fit", watched)
        assert toy.main("distil", "12345", "--teacher", work / "LoRA", "--out", work / "distil",
                        "--plots", work / "plots", *SMALL) == 0
    return work / "distil", seen


def test_a_distillation_run_leaves_the_files_and_keys_of_the_contract(distilled):
    folder, _ = distilled
    assert set(toy.tree(folder)) >= {"config.json", "metrics.jsonl", "summary.json", "student.safetensors",
                                     "student_config.json"}
    summary = read_json(folder / "summary.json")
    assert set(summary) >= {"mode", "sr", "model", "task", "teacher", "student", "scratch", "distillation", "train"}
    assert set(summary["teacher"]) >= {"run", "parameters", "validation"}
    assert set(summary["student"]) >= {"parameters", "validation"}
    assert "validation" in summary["scratch"]
    assert set(summary["distillation"]) == {"temperature", "alpha", "loss"}
    for name in ("teacher", "student", "scratch"):
        assert {split: values["n"] for split, values in summary[name]["validation"].items()} == toy.SPLITS
    assert [(line["phase"], line["epoch"]) for line in toy.lines_of(folder)] == [
        ("student", 1), ("student", 2), ("scratch", 1), ("scratch", 2)]
    assert set(read_json(folder / "student_config.json")) >= {"vocab_size", "embedding_size", "hidden_size", "cell"}
    assert sum(value.numel() for value in load_file(folder / "student.safetensors").values()) == (
        summary["student"]["parameters"])


def test_the_teacher_scores_as_its_own_run_says(work, distilled):
    assert read_json(distilled[0] / "summary.json")["teacher"]["validation"] == (
        read_json(work / "LoRA" / "summary.json")["validation"])


def test_the_teachers_logits_are_computed_once(distilled):
    """One pass over the 40 training sentences, whatever the epochs; the other two are its validation."""
    assert sorted(distilled[1]["teacher"]) == [12, 12, 40]


def test_kept_teacher_logits_equal_fresh_ones(work, distilled):
    """Invariant 11."""
    teacher, tokenizer, options = evaluate.load_finetuned(work / "LoRA")
    task = data_utils.load_task("cola", work / "cola")
    batches = data_utils.make_batches(task.train, tokenizer, options["max_length"], 8, 12345)
    kept = load_file(distilled[0] / "teacher_logits.safetensors")["logits"]
    assert torch.equal(kept, train_utils.compute_logits(teacher, batches))
    assert kept.std() > 0.1


def test_student_and_control_start_from_the_same_weights_random_state_and_batches(distilled):
    (first, first_rng, first_batches), (second, second_rng, second_batches) = distilled[1]["starts"]
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert torch.equal(first_rng, second_rng)
    assert all(torch.equal(a, b) for a, b in zip(first_batches, second_batches, strict=True))
    student, scratch = (load_file(distilled[0] / f"{name}.safetensors") for name in ("student", "scratch"))
    assert not torch.equal(student["classifier.weight"], scratch["classifier.weight"])  # the teacher made a difference


def test_student_and_control_had_the_same_budget(distilled):
    summary = read_json(distilled[0] / "summary.json")
    student, scratch = (summary[name]["train"] for name in ("student", "scratch"))
    assert all(student[key] == scratch[key] for key in ("epochs", "steps", "tokens", "padding_percent"))


def test_with_alpha_0_the_student_is_the_control(work, tmp_path, quick):
    """The two phases differ in the loss alone."""
    assert toy.main("distil", "12345", "--teacher", work / "LoRA", "--out", tmp_path / "d", "--plots", tmp_path,
                    "--kd-alpha", 0, *SMALL) == 0
    tree = toy.tree(tmp_path / "d")
    assert tree["student.safetensors"] == tree["scratch.safetensors"]


def test_only_a_decoder_trains_on_neighbours_and_every_evaluation_split_stands_so(work, tmp_path, monkeypatch, quick):
    seen, bucket = [], data_utils.bucket_by_length

    def look(*args):
        seen.append(args[4] is not None)
        return bucket(*args)
    monkeypatch.setattr(data_utils, "bucket_by_length", look)
    assert toy.lora(work, tmp_path / "decoder") == 0
    assert toy.main("eval", tmp_path / "decoder", "--data", work / "cola" / "in_domain_dev.tsv") == 0
    assert toy.main("distil", "12345", "--teacher", tmp_path / "decoder", "--out", tmp_path / "student", *SMALL) == 0
    assert seen == [True, True, True, True, False, True, True]


def test_eval_of_a_distillation_run_repeats_its_summary(work, distilled, capsys):
    assert toy.main("eval", distilled[0], "--data", work / "cola" / "in_domain_dev.tsv", "--json") == 0
    student = read_json(distilled[0] / "summary.json")["student"]
    expected = {**student["validation"]["in_domain"], "by_class": student["by_class"]["in_domain"]}
    result = json.loads(capsys.readouterr().out)
    assert result.pop("data") == str(work / "cola" / "in_domain_dev.tsv") and result.pop("trained_on") is not None
    assert result == expected


def stop_distil(work, out, teacher, monkeypatch, steps):
    calls = []
    monkeypatch.setattr("machine.signals.received", lambda: calls.append(1) or (15 if len(calls) == steps else None))
    assert toy.main("distil", "12345", "--teacher", teacher, "--out", out, "--plots", work / "plots", *SMALL) == 143
    monkeypatch.undo()


@pytest.mark.parametrize("steps", [3, 13])  # in the student's training; in the control's
def test_a_distillation_stopped_in_either_phase_and_resumed_ends_in_the_same_bytes(work, distilled, tmp_path, monkeypatch,
                                                                                  steps):
    stop_distil(work, tmp_path / "d", work / "LoRA", monkeypatch, steps)
    monkeypatch.setattr(figures, "plot_run", lambda *_: [])
    assert toy.main("distil", "12345", "--teacher", work / "LoRA", "--out", tmp_path / "d", "--plots", tmp_path,
                    "--resume", *SMALL) == 0
    after, whole = toy.tree(tmp_path / "d"), toy.tree(distilled[0])
    for name in ("student.safetensors", "scratch.safetensors", "teacher_logits.safetensors"):
        assert after[name] == whole[name]
    assert without_times(toy.lines_of(tmp_path / "d")) == without_times(toy.lines_of(distilled[0]))
    assert without_times(json.loads(after["summary.json"])) == without_times(json.loads(whole["summary.json"]))


def test_a_student_is_written_before_the_baseline_begins_and_the_run_is_not_finished(work, distilled, tmp_path, monkeypatch,
                                                                                    capsys):
    stop_distil(work, tmp_path / "d", work / "LoRA", monkeypatch, 13)
    left, whole = toy.tree(tmp_path / "d"), toy.tree(distilled[0])
    for name in ("student.safetensors", "student_config.json"):
        assert left[name] == whole[name]
    # Nothing says more than is true: no scores, no baseline, no checksums of files that a resumed run writes again.
    assert "summary.json" not in left and "scratch.safetensors" not in left
    assert [line.split()[-1] for line in left["SHA256SUMS"].decode().splitlines()[:-1]] == ["config.json"]
    capsys.readouterr()
    assert toy.main("predict", tmp_path / "d", "the cat") == 2
    assert "the run is not finished" in capsys.readouterr().err


def test_a_teacher_that_is_replaced_while_it_is_read_is_refused(work, tmp_path, monkeypatch, capsys):
    """The digest in config.json would be that of another file than the one loaded."""
    shutil.copytree(work / "LoRA", tmp_path / "teacher")

    def swapped(folder):
        loaded = evaluate.load_finetuned(folder)
        with open(folder / "adapter_model.safetensors", "ab") as file:
            file.write(b" ")
        return loaded
    monkeypatch.setattr(distil_inputs, "load_finetuned", swapped)
    capsys.readouterr()
    assert toy.main("distil", "12345", "--teacher", tmp_path / "teacher", "--out", tmp_path / "d", *SMALL) == 2
    assert "adapter_model.safetensors: changed while it was read" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_a_distillation_is_not_resumed_under_another_teacher(work, tmp_path, monkeypatch, capsys, quick):
    assert toy.lora(work, tmp_path / "teacher") == 0
    stop_distil(work, tmp_path / "d", tmp_path / "teacher", monkeypatch, 3)
    monkeypatch.setattr(figures, "plot_run", lambda *_: [])
    assert toy.lora(work, tmp_path / "teacher", "--overwrite", "--rank", 2) == 0
    capsys.readouterr()
    assert toy.main("distil", "12345", "--teacher", tmp_path / "teacher", "--out", tmp_path / "d", "--plots", tmp_path,
                    "--resume", *SMALL) == 2
    assert "changed teacher: adapter_model.safetensors is not the file" in capsys.readouterr().err
