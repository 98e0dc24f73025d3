"""What a run leaves behind, twice the same; what a resumed, repeated or crowded one is refused."""
import fcntl
import json
import shutil

import pytest
import torch
import toy
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import data_utils
import train_utils
from experiments import evaluate, finetune
from model import DistilRNN
from record import folder, machine
from record.files import UserError, read_json
from record.folder import without_times
from record.signals import Interrupted
from report import figures

SCORES = {"n", "loss", "accuracy", "mcc", "macro_f1", "majority_accuracy"}
TRAIN = {"epochs", "steps", "seconds", "tokens", "tokens_per_second", "padding_percent", "peak_memory_bytes"}
SPLITS = {"in_domain": 12, "out_of_domain": 12, "all": 24}
SMALL = ("--embedding-size", 6, "--hidden-size", 5, "--epochs", 2, "--batch-size", 8)


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A toy model, toy data, and one finished LoRA run with its plots."""
    folder = tmp_path_factory.mktemp("runs")
    toy.write_model(folder / "model")
    toy.write_cola(folder / "cola")
    assert lora(folder, folder / "LoRA", "--plots", folder / "plots") == 0
    return folder


def lora(work, out, *more) -> int:
    return toy.main("LoRA", "12345", "--model", work / "model", "--data", work / "cola", "--out", out, "--epochs", 3,
                    "--batch-size", 8, "--lr", 0.01, "--dropout", 0.2, *(() if "--plots" in more else
                                                                        ("--plots", work / "plots")), *more)


@pytest.fixture
def quick(monkeypatch):
    """Without drawing plots."""
    monkeypatch.setattr(figures, "plot_run", lambda *_: [])


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

        def watched(model, batches, *args, **kwargs):
            seen["starts"].append(({name: value.clone() for name, value in model.state_dict().items()},
                                   torch.get_rng_state(), [batch.input_ids for batch in batches]))
            return fit(model, batches, *args, **kwargs)

        patch.setattr(train_utils, "fit", watched)
        assert toy.main("distil", "12345", "--teacher", work / "LoRA", "--out", work / "distil",
                        "--plots", work / "plots", *SMALL) == 0
    return work / "distil", seen


# ---------------------------------------------------------------- a LoRA run

def test_a_lora_run_leaves_exactly_the_files_of_the_contract(work):
    names = set(toy.tree(work / "LoRA"))
    events = {name for name in names if name.startswith("tensorboard/")}
    assert names - events == {"config.json", "metrics.jsonl", "summary.json", "adapter_config.json",
                              "adapter_model.safetensors", "SHA256SUMS"}
    assert len(events) == 1
    assert set(toy.tree(work / "plots")) >= {f"LoRA-12345_{what}.{kind}" for what in ("loss", "accuracy", "mcc")
                                             for kind in ("png", "pdf")}


def test_its_summary_has_every_key_of_the_contract(work):
    summary = read_json(work / "LoRA" / "summary.json")
    assert set(summary) >= {"mode", "sr", "model", "task", "method", "parameters", "best_epoch", "validation", "train"}
    assert (summary["mode"], summary["sr"], summary["task"], summary["method"]) == ("LoRA", "12345", "cola", "lora")
    assert set(summary["parameters"]) == {"total", "trainable", "reduction_percent"}
    for validation in (summary["validation"], summary["last_validation"]):
        assert {split: values["n"] for split, values in validation.items()} == SPLITS
        assert all(set(values) == SCORES for values in validation.values())
    assert set(summary["train"]) == TRAIN
    assert (summary["train"]["epochs"], summary["train"]["steps"]) == (3, 15)
    assert summary["sanity"]["equal_to_base"] is True


def test_a_fresh_adapter_that_changes_the_text_stops_the_run(work, tmp_path, monkeypatch):
    adapt = finetune.adapt

    def adapt_and_break(classifier, *args):
        adapt(classifier, *args)
        with torch.no_grad():
            for p in classifier.net.base_model.parameters():
                p.copy_(torch.randn_like(p))
    monkeypatch.setattr(finetune, "adapt", adapt_and_break)
    with pytest.raises(RuntimeError, match="a fresh adapter changed the generated text: 'The"):
        lora(work, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_text_in_doubt_is_generated_again(work, tmp_path, monkeypatch, quick):
    generated, greedy = [], finetune.greedy
    monkeypatch.setattr(finetune, "greedy", lambda *args: (generated.append(1), greedy(*args))[1])
    assert lora(work, tmp_path / "sure", "--epochs", 1) == 0 and len(generated) == 1
    monkeypatch.setattr(finetune, "is_greedy", lambda *_: False)
    assert lora(work, tmp_path / "doubt", "--epochs", 1) == 0 and len(generated) == 3
    sure, doubt = (read_json(tmp_path / name / "summary.json")["sanity"] for name in ("sure", "doubt"))
    assert sure == doubt == read_json(work / "LoRA" / "summary.json")["sanity"]


def test_a_greedy_text_is_told_from_any_other(work):
    lm, tokenizer = finetune.load_classifier(str(work / "model"), 2)[1], finetune.load_tokenizer(str(work / "model"))
    prompt = len(tokenizer("The").input_ids)
    ids = finetune.greedy(lm, tokenizer, "The", 8)
    assert ids.shape[1] == prompt + 8 and finetune.is_greedy(lm, ids, prompt)
    for at in range(prompt, prompt + 8):
        other = ids.clone()
        other[0, at] += 1 if other[0, at] == 0 else -1
        assert not finetune.is_greedy(lm, other, prompt), at


def test_its_trainable_parameters_are_the_files(work):
    """The adapter file holds what was trained and nothing of the frozen model."""
    tensors = load_file(work / "LoRA" / "adapter_model.safetensors")
    assert sum(value.numel() for value in tensors.values()) == read_json(
        work / "LoRA" / "summary.json")["parameters"]["trainable"]


def test_its_config_records_command_options_versions_and_data(work):
    config = read_json(work / "LoRA" / "config.json")
    assert set(config) >= {"command", "options", "versions", "git_commit", "data_files"}
    assert config["command"].startswith("python run.py LoRA 12345 --model ")
    options = config["options"]
    assert (options["seed"], options["rank"], options["dropout"], options["lr"], options["warmup"]) == (
        12345, 8, 0.2, 0.01, 0.06)  # given ones and defaults alike
    assert config["data_files"] == data_utils.load_task("cola", work / "cola").files
    assert config["versions"]["torch"] == torch.__version__.split("+")[0] or config["versions"]["torch"] == torch.__version__


def test_its_metrics_have_a_line_an_epoch_and_tensorboard_the_same_scalars(work):
    lines = lines_of(work / "LoRA")
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert set(line) == {"epoch", "train", "validation", "confusion", "learning_rate", "seconds", "tokens"}
        assert set(line["train"]) >= {"loss", "accuracy", "mcc"}
        assert set(line["validation"]) == set(SPLITS)
    events = EventAccumulator(str(work / "LoRA" / "tensorboard")).Reload()
    for tag, value in (("train/loss", lambda line: line["train"]["loss"]), ("learning_rate", lambda x: x["learning_rate"]),
                       ("all/mcc", lambda line: line["validation"]["all"]["mcc"])):
        assert [event.value for event in events.Scalars(tag)] == pytest.approx([value(line) for line in lines])


def test_its_summary_is_its_best_epochs_line(work):
    summary, lines = read_json(work / "LoRA" / "summary.json"), lines_of(work / "LoRA")
    best = max(lines, key=lambda line: (line["validation"]["in_domain"]["mcc"], -line["validation"]["in_domain"]["loss"]))
    assert summary["best_epoch"] == best["epoch"] and summary["validation"] == best["validation"]
    assert summary["last_epoch"] == 3 and summary["last_validation"] == lines[-1]["validation"]
    assert summary["train"]["tokens"] == sum(line["tokens"] for line in lines)


def test_the_same_command_twice_gives_the_same_bytes(work, tmp_path, quick):
    """Invariant 13."""
    assert lora(work, tmp_path / "again") == 0
    first, second = toy.tree(work / "LoRA"), toy.tree(tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert first[name] == second[name]
    assert without_times(lines_of(work / "LoRA")) == without_times(lines_of(tmp_path / "again"))
    assert without_times(json.loads(first["summary.json"])) == without_times(json.loads(second["summary.json"]))


def test_another_seed_gives_other_weights(work, tmp_path, quick):
    assert toy.main("LoRA", "54321", "--model", work / "model", "--data", work / "cola", "--out", tmp_path / "run",
                    "--epochs", 1, "--plots", tmp_path) == 0
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() != (
        work / "LoRA" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("method, files", [
    ("full", {"trained.safetensors", "metrics.jsonl"}), ("head", {"trained.safetensors", "metrics.jsonl"}),
    ("none", {"trained.safetensors"})])
def test_every_method_leaves_a_run_that_eval_scores_alike(work, tmp_path, capsys, method, files):
    assert lora(work, tmp_path / "run", "--method", method, "--plots", tmp_path / "plots") == 0
    assert set(toy.tree(tmp_path / "run")) >= files | {"config.json", "summary.json"}
    summary = read_json(tmp_path / "run" / "summary.json")
    kept = load_file(tmp_path / "run" / "trained.safetensors")
    total, head = summary["parameters"]["total"], 2 * 32
    assert summary["parameters"]["trainable"] == {"full": total, "head": head, "none": 0}[method]
    assert sum(value.numel() for value in kept.values()) == (total if method == "full" else head)
    capsys.readouterr()
    assert toy.main("eval", tmp_path / "run", "--data", work / "cola" / "in_domain_dev.tsv", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result.pop("by_class") == summary["by_class"]["in_domain"]
    assert result == summary["validation"]["in_domain"]


# ---------------------------------------------------------------- eval

@pytest.mark.parametrize("split", ["in_domain", "out_of_domain"])
def test_eval_of_a_lora_run_repeats_its_summary(work, capsys, split):
    assert toy.main("eval", work / "LoRA", "--data", work / "cola" / f"{split}_dev.tsv", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    summary = read_json(work / "LoRA" / "summary.json")
    assert result.pop("by_class") == summary["by_class"][split]
    assert set(result) == SCORES
    assert result == summary["validation"][split]


def test_only_a_decoder_trains_on_neighbours_and_every_evaluation_split_stands_so(work, tmp_path, monkeypatch, quick):
    seen, bucket = [], data_utils.bucket_by_length

    def look(*args):
        seen.append(args[4] is not None)
        return bucket(*args)
    monkeypatch.setattr(data_utils, "bucket_by_length", look)
    assert lora(work, tmp_path / "decoder") == 0
    assert toy.main("eval", tmp_path / "decoder", "--data", work / "cola" / "in_domain_dev.tsv") == 0
    assert toy.main("distil", "12345", "--teacher", tmp_path / "decoder", "--out", tmp_path / "student", *SMALL) == 0
    assert seen == [True, True, True, True, False, True, True]


def test_eval_writes_each_prediction_beside_its_sentence(work, tmp_path, capsys):
    data = work / "cola" / "in_domain_dev.tsv"
    assert toy.main("eval", work / "LoRA", "--data", data, "--json", "--predictions", tmp_path / "out.tsv") == 0
    result = json.loads(capsys.readouterr().out)
    header, *rows = [line.split("\t") for line in (tmp_path / "out.tsv").read_text().splitlines()]
    assert header == ["sentence", "label", "prediction", "probability"]
    split = data_utils.read_cola_tsv(data)
    assert [(row[0], int(row[1])) for row in rows] == list(zip(split.sentences, split.labels, strict=True))
    assert sum(row[1] == row[2] for row in rows) / len(rows) == result["accuracy"]
    assert all(0.5 <= float(row[3]) <= 1 for row in rows)


@pytest.mark.parametrize("command", ["eval", "gen"])
def test_a_base_whose_weights_changed_since_the_run_is_refused(work, tmp_path, capsys, command):
    """The same name and shapes, other weights: the adapter would answer with noise."""
    shutil.copytree(work / "LoRA", tmp_path / "LoRA")
    toy.write_model(tmp_path / "model", seed=1)
    for name in ("config.json", "adapter_config.json"):
        path = tmp_path / "LoRA" / name
        path.write_text(path.read_text().replace(str(work / "model"), str(tmp_path / "model")))
    toy.reseal(tmp_path / "LoRA")
    arguments = {"eval": ("eval", tmp_path / "LoRA", "--data", work / "cola" / "in_domain_dev.tsv"),
                 "gen": ("gen", "12345", "--adapter", tmp_path / "LoRA", "--max-new-tokens", 2)}[command]
    assert toy.main(*arguments) == 2
    assert "adapter for another base" in capsys.readouterr().err


def test_eval_of_a_distillation_run_repeats_its_summary(work, distilled, capsys):
    assert toy.main("eval", distilled[0], "--data", work / "cola" / "in_domain_dev.tsv", "--json") == 0
    student = read_json(distilled[0] / "summary.json")["student"]
    expected = {**student["validation"]["in_domain"], "by_class": student["by_class"]["in_domain"]}
    assert json.loads(capsys.readouterr().out) == expected


# ---------------------------------------------------------------- distillation

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
        assert {split: values["n"] for split, values in summary[name]["validation"].items()} == SPLITS
    assert [(line["phase"], line["epoch"]) for line in lines_of(folder)] == [
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


# ---------------------------------------------------------------- finished, unfinished and crowded folders

def interrupt(work, out, monkeypatch, *more, steps=7):
    """A LoRA run that is asked to stop after some steps."""
    calls = []
    monkeypatch.setattr("record.signals.received", lambda: calls.append(1) or (15 if len(calls) == steps else None))
    assert lora(work, out, *more) == 143
    monkeypatch.undo()


def test_a_finished_run_is_refused_and_left_as_it_was(work, capsys):
    before = toy.tree(work / "LoRA")
    for more in ((), ("--resume",)):
        assert lora(work, work / "LoRA", *more) == 2
        assert "holds a finished run; choose another SR or --out, or pass --overwrite" in capsys.readouterr().err
    assert toy.tree(work / "LoRA") == before


def test_overwrite_replaces_a_run_and_nothing_of_the_users(work, tmp_path, quick):
    assert lora(work, tmp_path / "run", "--method", "head") == 0
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert lora(work, tmp_path / "run", "--overwrite") == 0
    names = set(toy.tree(tmp_path / "run"))
    assert "notes.txt" in names and "adapter_model.safetensors" in names and "trained.safetensors" not in names
    assert len([name for name in names if name.startswith("tensorboard")]) == 1


def test_an_unfinished_run_needs_resume_and_then_ends_in_the_same_bytes(work, tmp_path, monkeypatch, capsys):
    interrupt(work, tmp_path / "run", monkeypatch)
    before = toy.tree(tmp_path / "run")
    assert "checkpoint.safetensors" in before and "summary.json" not in before
    capsys.readouterr()
    assert lora(work, tmp_path / "run") == 2
    assert "holds an unfinished run; --resume continues it, --overwrite starts anew" in capsys.readouterr().err
    assert toy.tree(tmp_path / "run") == before
    monkeypatch.setattr(figures, "plot_run", lambda *_: [])
    assert lora(work, tmp_path / "run", "--resume") == 0
    after, whole = toy.tree(tmp_path / "run"), toy.tree(work / "LoRA")
    assert after["adapter_model.safetensors"] == whole["adapter_model.safetensors"]
    assert without_times(lines_of(tmp_path / "run")) == without_times(lines_of(work / "LoRA"))
    assert without_times(json.loads(after["summary.json"])) == without_times(json.loads(whole["summary.json"]))
    assert {name for name in after if "tensorboard" not in name} == {name for name in whole if "tensorboard" not in name}


def test_a_resumed_run_has_as_many_threads_as_it_began_with(work, tmp_path, monkeypatch, quick, capsys):
    threads = read_json(work / "LoRA" / "config.json")["threads"]
    interrupt(work, tmp_path / "run", monkeypatch)
    monkeypatch.setattr(figures, "plot_run", lambda *_: [])
    torch.set_num_threads(threads + 1)
    capsys.readouterr()
    assert lora(work, tmp_path / "run", "--resume") == 0
    assert torch.get_num_threads() == threads == read_json(tmp_path / "run" / "config.json")["threads"]
    assert "threads" not in capsys.readouterr().err
    weights = [(run / "adapter_model.safetensors").read_bytes() for run in (tmp_path / "run", work / "LoRA")]
    assert weights[0] == weights[1]


def test_threads_that_cannot_be_had_are_told_in_one_line(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    with pytest.warns(UserWarning, match="77 threads cannot be had here, . are used: sums are rounded in another order"):
        machine.use_threads(77)
    for unusable in (None, True, 0, "2"):
        machine.use_threads(unusable)  # no warning, which would be an error here


def test_a_run_stopped_while_plotting_leaves_no_half_plot_and_resume_draws_them(work, tmp_path, monkeypatch, capsys):
    def half(self, path, **_):
        path.write_bytes(b"half a plot")
        raise Interrupted(15)

    monkeypatch.setattr(figures.Figure, "savefig", half)
    more = ("--plots", tmp_path / "plots")
    assert lora(work, tmp_path / "run", *more) == 143
    assert "run.py: stopped; continue with: python run.py LoRA 12345" in capsys.readouterr().err.splitlines()[-1]
    assert toy.tree(tmp_path / "plots") == {}
    monkeypatch.undo()
    before = toy.tree(tmp_path / "run")
    assert "summary.json" in before
    assert lora(work, tmp_path / "run", "--resume", *more) == 0
    assert toy.tree(tmp_path / "run") == before and len(toy.tree(tmp_path / "plots")) == 8
    assert lora(work, tmp_path / "run", "--resume", *more) == 2  # nothing is left to do


@pytest.mark.parametrize("option, value", [("--lr", 0.02), ("--epochs", 4), ("--rank", 4), ("--targets", "q"),
                                           ("--batch-size", 4), ("--weight-decay", 0.5), ("--limit", 30)])
def test_a_resume_with_another_option_is_refused_by_its_name(work, tmp_path_factory, capsys, option, value):
    out = tmp_path_factory.getbasetemp() / "interrupted"
    if not out.exists():
        with pytest.MonkeyPatch.context() as patch:
            interrupt(work, out, patch)
    before = toy.tree(out)
    capsys.readouterr()
    assert lora(work, out, "--resume", option, value) == 2
    assert f"--resume with another {option.strip('-').replace('-', '_')}: it began with" in capsys.readouterr().err
    assert toy.tree(out) == before


def test_a_resume_with_changed_data_is_refused_by_the_files_name(work, tmp_path, monkeypatch, capsys):
    toy.write_cola(tmp_path / "cola")
    interrupt(work, tmp_path / "run", monkeypatch, "--data", tmp_path / "cola")
    before = toy.tree(tmp_path / "run")
    with open(tmp_path / "cola" / "out_of_domain_dev.tsv", "a") as file:
        file.write("s\t1\t\tOne more.\n")
    assert lora(work, tmp_path / "run", "--data", tmp_path / "cola", "--resume") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "changed data" in message and "out_of_domain_dev.tsv" in message
    assert toy.tree(tmp_path / "run") == before


def stop_distil(work, out, teacher, monkeypatch, steps):
    calls = []
    monkeypatch.setattr("record.signals.received", lambda: calls.append(1) or (15 if len(calls) == steps else None))
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
    assert without_times(lines_of(tmp_path / "d")) == without_times(lines_of(distilled[0]))
    assert without_times(json.loads(after["summary.json"])) == without_times(json.loads(whole["summary.json"]))


def test_a_distillation_is_not_resumed_under_another_teacher(work, tmp_path, monkeypatch, capsys, quick):
    assert lora(work, tmp_path / "teacher") == 0
    stop_distil(work, tmp_path / "d", tmp_path / "teacher", monkeypatch, 3)
    monkeypatch.setattr(figures, "plot_run", lambda *_: [])
    assert lora(work, tmp_path / "teacher", "--overwrite", "--rank", 2) == 0
    capsys.readouterr()
    assert toy.main("distil", "12345", "--teacher", tmp_path / "teacher", "--out", tmp_path / "d", "--plots", tmp_path,
                    "--resume", *SMALL) == 2
    assert "changed teacher: adapter_model.safetensors is not the file" in capsys.readouterr().err


def test_a_folder_in_which_another_process_works_is_refused_at_once(work, tmp_path, capsys):
    """The lock as another process holds it; a lock file that nobody holds stops nobody."""
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert lora(work, tmp_path / "run") == 2
        assert "another process is working on this run" in capsys.readouterr().err
        assert toy.tree(tmp_path / "run") == {}


def test_a_stale_lock_file_does_not_block(work, tmp_path, quick):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("4242")
    assert lora(work, tmp_path / "run") == 0


def test_a_run_that_diverges_ends_with_status_3_and_its_last_checkpoint(work, tmp_path, monkeypatch, capsys):
    objective = train_utils.cross_entropy
    calls = []
    monkeypatch.setattr(train_utils, "cross_entropy", lambda smoothing: lambda logits, batch: objective(smoothing)(
        logits, batch) * (float("nan") if calls.append(1) or len(calls) == 8 else 1))
    assert lora(work, tmp_path / "run") == 3
    assert "run.py: loss nan at step 8 (epoch 2), learning rate" in capsys.readouterr().err.splitlines()[-1]
    assert [line["epoch"] for line in lines_of(tmp_path / "run")] == [1]
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_reading_a_folder_that_is_no_finished_run_says_what_makes_one(tmp_path):
    with pytest.raises(UserError, match="not a run's folder; python run.py LoRA SR makes one"):
        folder.read_run(tmp_path, "LoRA")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="the run is not finished; its command with --resume continues it"):
        folder.read_run(tmp_path, "LoRA")
    (tmp_path / "summary.json").write_text("{}")
    with pytest.warns(match="has no SHA256SUMS"), pytest.raises(UserError, match="config.json: not written by a run"):
        folder.read_run(tmp_path, "LoRA")


@pytest.mark.parametrize("every, steps", [("2steps", [2, 4, 5, 6, 8, 10, 10]), ("1000min", [5, 10]), ("1000", [5, 10])])
def test_checkpoints_are_saved_each_epoch_and_every_so_many_steps_or_minutes(work, tmp_path, monkeypatch, quick, every,
                                                                            steps):
    saved, save = [], train_utils.save_checkpoint
    monkeypatch.setattr(train_utils, "save_checkpoint", lambda *args: (saved.append(args[3].step), save(*args)))
    assert lora(work, tmp_path / "run", "--epochs", 2, "--save-every", every) == 0
    assert saved == steps  # five steps an epoch
