"""What a LoRA run leaves behind, twice the same; what a resumed or crowded one is refused."""
import fcntl
import json
import shutil

import pytest
import torch
import toy
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import data_utils
import train_utils
from experiments import evaluate, finetune
from fast import amx, choice, gemm, onepass
from machine.signals import Interrupted
from model import TextClassifier
from options.schema import RunOptions
from record.config_json import rebuild
from record.files import read_json, sha256, write_json
from record.folder import recorded_kernels, without_times
from report import figures

TRAIN = {"epochs", "steps", "seconds", "tokens", "tokens_per_second", "padding_percent", "peak_memory_bytes"}


def test_a_lora_run_leaves_exactly_the_files_of_the_contract(work):
    names = set(toy.tree(work / "LoRA"))
    events = {name for name in names if name.startswith("tensorboard/")}
    assert names - events == {"config.json", "metrics.jsonl", "summary.json", "adapter_config.json",
                              "adapter_model.safetensors", "SHA256SUMS", "README.md", "tokenizer.json",
                              "tokenizer_config.json"}
    assert len(events) == 1
    assert set(toy.tree(work / "plots")) >= {f"LoRA-12345_{what}.{kind}" for what in ("loss", "accuracy", "mcc")
                                             for kind in ("png", "pdf")}


def test_its_summary_has_every_key_of_the_contract(work):
    summary = read_json(work / "LoRA" / "summary.json")
    assert set(summary) >= {"mode", "sr", "model", "task", "method", "parameters", "best_epoch", "validation", "train"}
    assert (summary["mode"], summary["sr"], summary["task"], summary["method"]) == ("LoRA", "12345", "cola", "lora")
    assert set(summary["parameters"]) == {"total", "trainable", "reduction_percent"}
    for validation in (summary["validation"], summary["last_validation"]):
        assert {split: values["n"] for split, values in validation.items()} == toy.SPLITS
        assert all(set(values) == toy.SCORES for values in validation.values())
    assert set(summary["train"]) == TRAIN
    assert (summary["train"]["epochs"], summary["train"]["steps"]) == (3, 15)
    assert summary["sanity"]["equal_to_base"] is True


def test_a_fresh_adapter_that_changes_the_text_stops_the_run(work, tmp_path, monkeypatch):
    configure = TextClassifier.configure

    def configure_and_break(classifier, *args):
        configure(classifier, *args)
        with torch.no_grad():
            for p in classifier.net.base_model.parameters():
                p.copy_(torch.randn_like(p))
    monkeypatch.setattr(TextClassifier, "configure", configure_and_break)
    with pytest.raises(RuntimeError, match="a fresh adapter changed the generated text: 'The"):
        toy.lora(work, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_text_in_doubt_is_generated_again(work, tmp_path, monkeypatch, quick):
    generated, greedy = [], finetune.greedy
    monkeypatch.setattr(finetune, "greedy", lambda *args: (generated.append(1), greedy(*args))[1])
    assert toy.lora(work, tmp_path / "sure", "--epochs", 1) == 0 and len(generated) == 1
    monkeypatch.setattr(finetune, "is_greedy", lambda *_: False)
    assert toy.lora(work, tmp_path / "doubt", "--epochs", 1) == 0 and len(generated) == 3
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


def test_a_model_with_several_end_tokens_is_generated_from(work):
    """As many instruct models have; generation_config.eos_token_id is a list then."""
    lm, tokenizer = finetune.load_classifier(str(work / "model"), 2)[1], finetune.load_tokenizer(str(work / "model"))
    one = finetune.greedy(lm, tokenizer, "The", 8)
    lm.generation_config.eos_token_id = [lm.config.vocab_size - 1, int(one[0, -3])]
    ids = finetune.greedy(lm, tokenizer, "The", 8)
    first = one[0].tolist().index(int(one[0, -3]))
    assert torch.equal(ids[0], one[0, :first + 1]) and finetune.is_greedy(lm, ids, len(tokenizer("The").input_ids))


def test_its_trainable_parameters_are_the_files(work):
    """The adapter file holds what was trained and nothing of the frozen model."""
    tensors = load_file(work / "LoRA" / "adapter_model.safetensors")
    assert sum(value.numel() for value in tensors.values()) == read_json(
        work / "LoRA" / "summary.json")["parameters"]["trainable"]


def test_its_config_records_command_options_versions_and_data(work):
    config = read_json(work / "LoRA" / "config.json")
    assert set(config) >= {"command", "options", "versions", "cpu", "device", "threads", "git_commit", "data_files"}
    assert config["command"].startswith("python run.py LoRA 12345 --model ")
    options = config["options"]
    assert (options["seed"], options["rank"], options["dropout"], options["lr"], options["warmup"]) == (
        12345, 8, 0.2, 0.01, 0.06)  # given ones and defaults alike
    assert config["data_files"] == data_utils.load_task("cola", work / "cola").files
    assert config["versions"]["torch"] == torch.__version__.split("+")[0] or config["versions"]["torch"] == torch.__version__


def test_its_metrics_have_a_line_an_epoch_and_tensorboard_the_same_scalars(work):
    lines = toy.lines_of(work / "LoRA")
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert set(line) == {"epoch", "train", "validation", "confusion", "learning_rate", "seconds", "tokens"}
        assert set(line["train"]) >= {"loss", "accuracy", "mcc"}
        assert set(line["validation"]) == set(toy.SPLITS)
    events = EventAccumulator(str(work / "LoRA" / "tensorboard")).Reload()
    for tag, value in (("train/loss", lambda line: line["train"]["loss"]), ("learning_rate", lambda x: x["learning_rate"]),
                       ("all/mcc", lambda line: line["validation"]["all"]["mcc"])):
        assert [event.value for event in events.Scalars(tag)] == pytest.approx([value(line) for line in lines])


def test_its_summary_is_its_best_epochs_line(work):
    summary, lines = read_json(work / "LoRA" / "summary.json"), toy.lines_of(work / "LoRA")
    best = max(lines, key=lambda line: (line["validation"]["in_domain"]["mcc"], -line["validation"]["in_domain"]["loss"]))
    assert summary["best_epoch"] == best["epoch"] and summary["validation"] == best["validation"]
    assert summary["last_epoch"] == 3 and summary["last_validation"] == lines[-1]["validation"]
    assert summary["train"]["tokens"] == sum(line["tokens"] for line in lines)


def test_the_same_command_twice_gives_the_same_bytes(work, tmp_path, quick):
    """Invariant 13."""
    assert toy.lora(work, tmp_path / "again") == 0
    first, second = toy.tree(work / "LoRA"), toy.tree(tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert first[name] == second[name]
    assert without_times(toy.lines_of(work / "LoRA")) == without_times(toy.lines_of(tmp_path / "again"))
    assert without_times(json.loads(first["summary.json"])) == without_times(json.loads(second["summary.json"]))


def test_another_seed_gives_other_weights(work, tmp_path, quick):
    assert toy.main("LoRA", "54321", "--model", work / "model", "--data", work / "cola", "--out", tmp_path / "run",
                    "--epochs", 1, "--plots", tmp_path) == 0
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() != (
        work / "LoRA" / "adapter_model.safetensors").read_bytes()


# ---------------------------------------------------------------- finished, unfinished and crowded folders

def interrupt(work, out, monkeypatch, *more, steps=7):
    """A LoRA run that is asked to stop after some steps."""
    calls = []
    monkeypatch.setattr("machine.signals.received", lambda: calls.append(1) or (15 if len(calls) == steps else None))
    assert toy.lora(work, out, *more) == 143
    monkeypatch.undo()


def test_a_finished_run_is_refused_and_left_as_it_was(work, capsys):
    before = toy.tree(work / "LoRA")
    for more in ((), ("--resume",)):
        assert toy.lora(work, work / "LoRA", *more) == 2
        assert "holds a finished run; choose another SR or --out, or pass --overwrite" in capsys.readouterr().err
    assert toy.tree(work / "LoRA") == before


def test_overwrite_replaces_a_run_and_nothing_of_the_users(work, tmp_path, quick):
    assert toy.lora(work, tmp_path / "run", "--method", "head") == 0
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert toy.lora(work, tmp_path / "run", "--overwrite") == 0
    names = set(toy.tree(tmp_path / "run"))
    assert "notes.txt" in names and "adapter_model.safetensors" in names and "trained.safetensors" not in names
    assert len([name for name in names if name.startswith("tensorboard")]) == 1


def test_an_unfinished_run_needs_resume_and_then_ends_in_the_same_bytes(work, tmp_path, monkeypatch, capsys):
    interrupt(work, tmp_path / "run", monkeypatch)
    before = toy.tree(tmp_path / "run")
    assert "checkpoint.safetensors" in before and "summary.json" not in before
    capsys.readouterr()
    assert toy.lora(work, tmp_path / "run") == 2
    assert "holds an unfinished run; --resume continues it, --overwrite starts anew" in capsys.readouterr().err
    assert toy.tree(tmp_path / "run") == before
    monkeypatch.setattr(figures, "plot_run", lambda *_: [])
    assert toy.lora(work, tmp_path / "run", "--resume") == 0
    after, whole = toy.tree(tmp_path / "run"), toy.tree(work / "LoRA")
    assert after["adapter_model.safetensors"] == whole["adapter_model.safetensors"]
    assert without_times(toy.lines_of(tmp_path / "run")) == without_times(toy.lines_of(work / "LoRA"))
    assert without_times(json.loads(after["summary.json"])) == without_times(json.loads(whole["summary.json"]))
    assert {name for name in after if "tensorboard" not in name} == {name for name in whole if "tensorboard" not in name}


def test_a_resumed_run_has_as_many_threads_as_it_began_with(work, tmp_path, monkeypatch, quick, capsys):
    threads = read_json(work / "LoRA" / "config.json")["threads"]
    interrupt(work, tmp_path / "run", monkeypatch)
    monkeypatch.setattr(figures, "plot_run", lambda *_: [])
    torch.set_num_threads(threads + 1)
    capsys.readouterr()
    assert toy.lora(work, tmp_path / "run", "--resume") == 0
    assert torch.get_num_threads() == threads == read_json(tmp_path / "run" / "config.json")["threads"]
    assert "threads" not in capsys.readouterr().err
    weights = [(run / "adapter_model.safetensors").read_bytes() for run in (tmp_path / "run", work / "LoRA")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("recorded, rule", [("torch", "onednn"), ("onednn", "torch"), (None, "onednn"), ("gemm", "onednn"),
                                            ("onednn", "gemm")])
def test_a_resumed_run_has_the_library_for_products_that_it_began_with(work, tmp_path, monkeypatch, quick, recorded, rule):
    """Whatever the rule says by now; a run from before there was a choice began with PyTorch's own."""
    if not choice.has_onednn() or "gemm" in (recorded, rule) and not gemm.available():
        pytest.skip("this PyTorch was built without oneDNN, or there is no CPU or no compiler for fast/gemm.c")
    monkeypatch.setattr(figures, "plot_run", lambda *_: [])
    monkeypatch.setattr(choice, "fastest_matmul", lambda: recorded or "torch")
    assert toy.lora(work, tmp_path / "whole") == 0
    with pytest.MonkeyPatch.context() as patch:
        interrupt(work, tmp_path / "run", patch)
    for run in ("whole", "run"):
        assert read_json(tmp_path / run / "config.json")["matmul"] == (recorded or "torch")
    if recorded is None:
        config = read_json(tmp_path / "run" / "config.json")
        del config["matmul"]
        write_json(tmp_path / "run" / "config.json", config)
        toy.reseal(tmp_path / "run")
    monkeypatch.setattr(choice, "fastest_matmul", lambda: rule)
    choice.use_matmul()
    assert toy.lora(work, tmp_path / "run", "--resume") == 0
    assert choice.matmul() == (recorded or "torch")
    weights = [(tmp_path / run / "adapter_model.safetensors").read_bytes() for run in ("run", "whole")]
    assert weights[0] == weights[1]
    assert toy.lora(work, tmp_path / "new") == 0  # a run of its own goes by the rule again
    assert read_json(tmp_path / "new" / "config.json")["matmul"] == rule == choice.matmul()


@pytest.mark.parametrize("recorded", ["torch", "onepass", None])
def test_a_resumed_run_has_the_kernels_that_it_began_with(work, tmp_path, monkeypatch, quick, recorded):
    """Whatever the machine can by now; a run from before there was a choice began with PyTorch's own."""
    if not onepass.available():
        pytest.skip("no CPU with AVX-512, or no C compiler")
    monkeypatch.setattr(figures, "plot_run", lambda *_: [])
    monkeypatch.setattr(onepass, "available", lambda: recorded == "onepass")
    words = ("--precision", "fp32")
    assert toy.lora(work, tmp_path / "whole", *words) == 0
    with pytest.MonkeyPatch.context() as patch:
        interrupt(work, tmp_path / "run", patch, *words)
    config = read_json(tmp_path / "run" / "config.json")
    assert config["kernels"] == (recorded or "torch")
    if recorded is None:
        del config["kernels"]
        write_json(tmp_path / "run" / "config.json", config)
        toy.reseal(tmp_path / "run")
    monkeypatch.setattr(onepass, "available", lambda: True)
    choice.use_kernels()
    assert toy.lora(work, tmp_path / "run", "--resume", *words) == 0
    assert choice.kernels() == (recorded or "torch")
    weights = [(tmp_path / run / "adapter_model.safetensors").read_bytes() for run in ("run", "whole")]
    assert weights[0] == weights[1]


def test_before_kernels_were_recorded_runs_in_bf16x3_alone_had_those_of_onepass():
    assert [recorded_kernels({"options": {"precision": name}}) for name in ("bf16x3", "fp32")] == ["onepass", "torch"]
    assert recorded_kernels({"options": {"precision": "bf16x3"}, "kernels": "torch"}) == "torch"
    assert recorded_kernels({"options": None}) == "torch"


def test_a_run_says_and_records_how_products_are_computed(work, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "plot_run", lambda *_: [])
    assert toy.lora(work, tmp_path / "run", "--epochs", 1) == 0
    config = read_json(tmp_path / "run" / "config.json")
    assert config["options"]["precision"] == ("bf16x3" if amx.available() else "fp32")
    assert (f"precision {config['options']['precision']}, matmuls by {config['matmul']}, norms and attention by "
            f"{config['kernels']}") in capsys.readouterr().out


def test_a_run_stopped_while_plotting_leaves_no_half_plot_and_resume_draws_them(work, tmp_path, monkeypatch, capsys):
    def half(self, path, **_):
        path.write_bytes(b"half a plot")
        raise Interrupted(15)

    monkeypatch.setattr(figures.Figure, "savefig", half)
    more = ("--plots", tmp_path / "plots")
    assert toy.lora(work, tmp_path / "run", *more) == 143
    assert "run.py: stopped; continue with: python run.py LoRA 12345" in capsys.readouterr().err.splitlines()[-1]
    assert toy.tree(tmp_path / "plots") == {}
    monkeypatch.undo()
    before = toy.tree(tmp_path / "run")
    assert "summary.json" in before
    assert toy.lora(work, tmp_path / "run", "--resume", *more) == 0
    assert toy.tree(tmp_path / "run") == before and len(toy.tree(tmp_path / "plots")) == 8
    assert toy.lora(work, tmp_path / "run", "--resume", *more) == 2  # nothing is left to do


@pytest.mark.parametrize("option, value", [("--lr", 0.02), ("--epochs", 4), ("--rank", 4), ("--targets", "q"),
                                           ("--batch-size", 4), ("--weight-decay", 0.5), ("--limit", 30)])
def test_a_resume_with_another_option_is_refused_by_its_name(work, tmp_path_factory, capsys, option, value):
    out = tmp_path_factory.getbasetemp() / "interrupted"
    if not out.exists():
        with pytest.MonkeyPatch.context() as patch:
            interrupt(work, out, patch)
    before = toy.tree(out)
    capsys.readouterr()
    assert toy.lora(work, out, "--resume", option, value) == 2
    assert f"--resume with another {option.strip('-').replace('-', '_')}: it began with" in capsys.readouterr().err
    assert toy.tree(out) == before


def test_a_resume_with_changed_data_is_refused_by_the_files_name(work, tmp_path, monkeypatch, capsys):
    toy.write_cola(tmp_path / "cola")
    interrupt(work, tmp_path / "run", monkeypatch, "--data", tmp_path / "cola")
    before = toy.tree(tmp_path / "run")
    with open(tmp_path / "cola" / "out_of_domain_dev.tsv", "a") as file:
        file.write("s\t1\t\tOne more.\n")
    assert toy.lora(work, tmp_path / "run", "--data", tmp_path / "cola", "--resume") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "changed data" in message and "out_of_domain_dev.tsv" in message
    assert toy.tree(tmp_path / "run") == before


def test_a_folder_in_which_another_process_works_is_refused_at_once(work, tmp_path, capsys):
    """The lock as another process holds it; a lock file that nobody holds stops nobody."""
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert toy.lora(work, tmp_path / "run") == 2
        assert "another process is working on this run" in capsys.readouterr().err
        assert toy.tree(tmp_path / "run") == {}


def test_a_stale_lock_file_does_not_block(work, tmp_path, quick):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("4242")
    assert toy.lora(work, tmp_path / "run") == 0


def test_a_run_that_diverges_ends_with_status_3_and_its_last_checkpoint(work, tmp_path, monkeypatch, capsys):
    objective = train_utils.label_loss
    calls = []
    monkeypatch.setattr(train_utils, "label_loss", lambda *options: lambda logits, batch: objective(*options)(
        logits, batch) * (float("nan") if calls.append(1) or len(calls) == 8 else 1))
    assert toy.lora(work, tmp_path / "run") == 3
    assert "run.py: loss nan at step 8 (epoch 2), learning rate" in capsys.readouterr().err.splitlines()[-1]
    assert [line["epoch"] for line in toy.lines_of(tmp_path / "run")] == [1]
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("every, steps", [("2steps", [2, 4, 5, 6, 8, 10, 10]), ("1000min", [5, 10]), ("1000", [5, 10])])
def test_checkpoints_are_saved_each_epoch_and_every_so_many_steps_or_minutes(work, tmp_path, monkeypatch, quick, every,
                                                                            steps):
    saved, save = [], train_utils.save_checkpoint
    monkeypatch.setattr(train_utils, "save_checkpoint", lambda *args: (saved.append(args[3].step), save(*args)))
    assert toy.lora(work, tmp_path / "run", "--epochs", 2, "--save-every", every) == 0
    assert saved == steps  # five steps an epoch


# ---------------------------------------------------------------- --init: from another run's adapter

@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A file of plain sentences."""
    path = tmp_path_factory.mktemp("plain") / "plain.txt"
    path.write_text("".join(f"{sentence}.\n" for sentence, _ in toy.toy_rows(200, 9)))
    return path


def test_a_run_starts_from_another_one_s_adapter_and_head(work, plain, tmp_path, quick, capsys):
    """An intermediate task, then the task itself: at a rate of almost nothing the scores are those of the first run."""
    before, after = tmp_path / "edits", tmp_path / "after"
    assert toy.lora(work, before, "--task", "edits", "--data", plain, "--epochs", 2) == 0
    assert read_json(before / "summary.json")["task"] == "edits"
    assert toy.lora(work, after, "--init", before, "--lr", 1e-12, "--epochs", 1) == 0
    assert f"starts from the adapter of {before}, trained on edits; its head too" in capsys.readouterr().out
    split = work / "cola" / "in_domain_dev.tsv"
    rows = data_utils.read_cola_tsv(split)
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"{s},{y}\n" for s, y in zip(
        rows.sentences, rows.labels, strict=True)))
    theirs, ours = evaluate.evaluate_run(before, tmp_path / "rows.csv"), evaluate.evaluate_run(after, split)
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5) and ours["by_class"] == theirs["by_class"]
    config = read_json(after / "config.json")
    assert config["options"]["init"] == str(before)
    assert "Training began with the adapter of another run, `edits`." in (after / "README.md").read_text()
    assert "adapter of another run" not in (before / "README.md").read_text()
    assert config["init_files"] == {name: sha256(before / name) for name in ("adapter_config.json",
                                                                             "adapter_model.safetensors")}


def test_a_head_of_other_classes_is_new(work, plain, tmp_path, quick, capsys):
    table = tmp_path / "table.csv"
    table.write_text("text,label\n" + "".join(f"{s},{'yes' if y else 'no'}\n" for s, y in toy.toy_rows(40, 3)))
    assert toy.lora(work, tmp_path / "run", "--data", table, "--init", work / "LoRA", "--epochs", 1, "--lr", 1e-12) == 0
    assert "the head is new: the classes are others" in capsys.readouterr().out
    head = load_file(tmp_path / "run" / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert head.abs().max() < 1e-6  # a fresh one is zero


def test_an_init_that_cannot_be_is_one_line_and_leaves_nothing(work, distilled_run, tmp_path, quick, capsys):
    toy.write_model(tmp_path / "other", seed=1)
    assert toy.lora(work, tmp_path / "none", "--method", "none") == 0
    for more, said in (
            (("--init", tmp_path / "nowhere"), "not a run's folder"),
            (("--init", distilled_run), "a distil run"),
            (("--init", tmp_path / "none"), "a run with --method none; expected one with an adapter"),
            (("--init", work / "LoRA", "--method", "full"), "--init: starts from an adapter, which --method full does not"),
            (("--init", work / "LoRA", "--rank", 4, "--alpha", 8), "expected --rank and --targets of that run"),
            (("--init", work / "LoRA", "--model", tmp_path / "other"), "with other weights than the model here")):
        capsys.readouterr()
        assert toy.lora(work, tmp_path / "run", *more) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert said in error and "Traceback" not in error, error
        assert not (tmp_path / "run").exists()


def test_an_adapter_that_is_replaced_while_it_is_read_is_refused(work, tmp_path, quick, monkeypatch, capsys):
    shutil.copytree(work / "LoRA", tmp_path / "init")

    def swapped(classifier, folder, head, load=finetune.peft_layout.start_from):
        load(classifier, folder, head)
        (folder / "adapter_config.json").write_text((folder / "adapter_config.json").read_text() + " ")
    monkeypatch.setattr(finetune.peft_layout, "start_from", swapped)
    capsys.readouterr()
    assert toy.lora(work, tmp_path / "run", "--init", tmp_path / "init") == 2
    assert "adapter_config.json: changed while it was read" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_run_that_began_from_an_adapter_goes_on_and_repeats_to_the_same_bytes(work, tmp_path, quick, capsys):
    start, whole, cut = tmp_path / "start", tmp_path / "whole", tmp_path / "cut"
    shutil.copytree(work / "LoRA", start)
    assert toy.lora(work, whole, "--init", start) == 0
    steps = iter(range(1, 100))
    with pytest.raises(Interrupted):
        finetune.run_finetune(rebuild(RunOptions, read_json(whole / "config.json")["options"], out=cut), lambda _: None,
                              stop=lambda: 15 if next(steps) == 7 else None)
    assert toy.lora(work, cut, "--init", start, "--resume") == 0
    assert (cut / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    assert toy.main("repeat", whole) == 0
    # Another adapter in the same place is not what the run began with.
    tensors = load_file(start / "adapter_model.safetensors")
    save_file({name: 2 * value for name, value in tensors.items()}, start / "adapter_model.safetensors")
    toy.reseal(start)
    capsys.readouterr()
    assert toy.main("repeat", whole) == 2
    assert "repeat with a changed --init: adapter_model.safetensors is not the file" in capsys.readouterr().err
