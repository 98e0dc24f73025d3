"""config.json alone is enough to repeat a run; what changed since is named."""
import json
import shutil

import pytest
import torch
import toy

import train_utils
from experiments import distil, finetune, repeat
from experiments.arguments import preset
from fast import amx
from machine.errors import UserError
from model import LoRAOptions
from options.schema import DistilOptions, TrainOptions
from record import folder
from record.config_json import rebuild
from record.files import read_json
from report import figures

# Every option away from its default, so that one which is lost on the way back shows.
ODD = ("--epochs", 2, "--batch-size", 7, "--lr", 0.02, "--head-lr", 0.01, "--weight-decay", 0.1, "--warmup", 0.2,
       "--schedule", "cosine", "--clip", 0.5, "--accumulate", 2, "--label-smoothing", 0.1, "--ema", 0.9, "--patience", 5,
       "--max-length", 9, "--limit", 30, "--save-every", 3, "--rank", 3, "--alpha", 5, "--dropout", 0.2, "--rslora",
       "--targets", "q,mlp", "--layers", "1", "--keep-memory", 1)
STUDENT = ("--embedding-size", 6, "--hidden-size", 5, "--epochs", 2, "--batch-size", 8, "--temperature", 3, "--kd-alpha",
           0.5, "--cell", "gru", "--pooling", "mean", "--dropout", 0.1)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repeat")
    toy.write_model(folder / "model")
    toy.write_cola(folder / "cola")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "plot_run", lambda *_: [])
        assert lora(folder, folder / "lora", *ODD) == 0
        assert toy.main("distil", "12345", "--plain", "--teacher", folder / "lora", "--out", folder / "distil", "--plots",
                        folder, *STUDENT) == 0
    return folder


# The options of a student with --plain; its epochs and learning rate are options of the training.
RECIPE = {name: value for name, value in preset("distil-plain").items() if name not in ("epochs", "lr")}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(figures, "plot_run", lambda *_: [])


def lora(work, out, *more) -> int:
    return toy.main("LoRA", "12345", "--model", work / "model", "--data", work / "cola", "--out", out, "--plots", work,
                    *more)


def test_options_come_back_from_config_as_they_were(work, monkeypatch):
    """Of every field: `repeat` hands over what the command line did, but for the folders."""
    handed = {}
    monkeypatch.setattr(finetune, "run_finetune", lambda options, *_: handed.setdefault("lora", options))
    monkeypatch.setattr(distil, "run_distil", lambda options, more, *_: handed.setdefault("distil", (options, more)))
    monkeypatch.setattr(repeat, "differences", lambda *_: [])
    repeat.run_again(work / "lora", work / "lora")
    repeat.run_again(work / "distil", work / "distil")
    options = handed["lora"]
    precision = "bf16x3" if amx.available() else "fp32"  # what `auto` was resolved to
    assert options.train == TrainOptions(12345, 2, 7, None, 0.02, 0.01, 0.1, 0.2, "cosine", 0.5, 2, 0.1, ema=0.9,
                                         patience=5, precision=precision, save_every=3.0)
    assert options.lora == LoRAOptions(
        rank=3, alpha=5.0, dropout=0.2, rslora=True, targets=("q", "mlp"), layers="1")
    assert (options.sr, options.task, options.max_length, options.limit, options.keep_memory, options.repeats) == (
        "12345", "cola", 9, 30, 1.0, work / "lora")
    options, student = handed["distil"]
    assert (options.train.epochs, options.train.batch_size, options.limit) == (2, 8, 30)
    assert student == DistilOptions(work / "lora", plain=True, **{
        **RECIPE, "temperature": 3.0, "kd_alpha": 0.5, "embedding_size": 6, "hidden_size": 5,
        "rnn_layers": 1, "cell": "gru", "pooling": "mean", "dropout": 0.1})


@pytest.mark.parametrize("name", ["lora", "distil"])
def test_a_repeated_run_is_identical_and_leaves_nothing(work, capsys, name):
    before = toy.tree(work)
    assert toy.main("repeat", work / name) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"identical: {work / name} and its repetition"
    assert toy.tree(work) == before


@pytest.mark.parametrize("method", ["full", "head", "none"])
def test_every_method_can_be_repeated_and_kept(work, tmp_path, method):
    assert lora(work, tmp_path / "run", "--method", method, "--epochs", 1, "--limit", 20) == 0
    assert toy.main("repeat", tmp_path / "run", "--out", tmp_path / "again") == 0
    assert (tmp_path / "again" / "trained.safetensors").read_bytes() == (
        tmp_path / "run" / "trained.safetensors").read_bytes()
    assert toy.main("repeat", tmp_path / "run", "--out", tmp_path / "again") == 2  # a finished run is not written to


def test_a_repetition_has_as_many_threads_as_the_run(work):
    threads = read_json(work / "lora" / "config.json")["threads"]
    torch.set_num_threads(threads + 1)
    assert toy.main("repeat", work / "lora") == 0
    assert torch.get_num_threads() == threads


def test_a_different_result_says_what_differs_and_what_the_environment_was(work, tmp_path, monkeypatch, capsys):
    fit = train_utils.fit

    def other(model, *args, **kwargs):
        progress = fit(model, *args, **kwargs)
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).add_(1e-3)
        progress.history[-1]["validation"]["in_domain"]["loss"] = 9.0
        return progress

    monkeypatch.setattr(train_utils, "fit", other)
    monkeypatch.setattr(folder, "version", lambda name: "0.0.1")
    assert toy.main("repeat", work / "lora") == 1
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("different: adapter_model.safetensors differs; ")
    assert "validation.in_domain.loss was " in line and ", now 9.0" in line
    assert f"torch was {read_json(work / 'lora' / 'config.json')['versions']['torch']}, now 0.0.1" in line


@pytest.mark.parametrize("change, named", [
    (lambda folder: (folder / "cola" / "in_domain_dev.tsv").write_text(toy.tsv(toy.toy_rows(12, 9))),
     "in_domain_dev.tsv is not the file the run began with"),
    (lambda folder: (folder / "cola" / "in_domain_dev.tsv").unlink(), "in_domain_dev.tsv: cannot be read"),
    (lambda folder: toy.other_weights(folder / "model"), "repeat with a changed base model: its weights are"),
    (lambda folder: toy.other_config(folder / "model"), "repeat with a changed base model: its configuration is"),
    (lambda folder: toy.other_tokenizer(folder / "model"), "repeat with a changed base model: its tokenizer is")])
def test_what_is_no_longer_as_it_was_is_refused_by_name(tmp_path, capsys, change, named):
    toy.write_model(tmp_path / "model")
    toy.write_cola(tmp_path / "cola")
    assert lora(tmp_path, tmp_path / "run", "--epochs", 1) == 0
    change(tmp_path)
    capsys.readouterr()
    assert toy.main("repeat", tmp_path / "run", "--out", tmp_path / "again") == 2
    line = [line for line in capsys.readouterr().err.splitlines() if line.startswith("run.py: ")]
    assert len(line) == 1 and named in line[0]
    assert not (tmp_path / "again").exists()


def test_a_changed_teacher_is_refused(work, tmp_path, capsys):
    for name in ("lora", "distil"):
        shutil.copytree(work / name, tmp_path / name)
    config = read_json(tmp_path / "distil" / "config.json")
    config["teacher_files"]["adapter_model.safetensors"] = "0" * 64
    (tmp_path / "distil" / "config.json").write_text(json.dumps(config))
    toy.reseal(tmp_path / "distil")
    assert toy.main("repeat", tmp_path / "distil") == 2
    assert "repeat with a changed teacher: adapter_model.safetensors is not the file" in capsys.readouterr().err


def test_a_run_of_before_an_option_is_repeated_as_it_was_then(work, tmp_path, capsys):
    for name in ("lora", "distil"):
        shutil.copytree(work / name, tmp_path / name)
    config = read_json(tmp_path / "distil" / "config.json")
    assert config["options"].pop("label_precision") == "teacher"
    config["options"]["teacher"] = str(tmp_path / "lora")
    (tmp_path / "distil" / "config.json").write_text(json.dumps(config))
    toy.reseal(tmp_path / "distil")
    toy.main("repeat", tmp_path / "distil", "--out", tmp_path / "again")
    assert read_json(tmp_path / "again" / "config.json")["options"]["label_precision"] == "teacher"
    for name in ("student", "scratch"):
        one, other = ((tmp_path / run / f"{name}.safetensors").read_bytes() for run in ("distil", "again"))
        assert one == other


@pytest.mark.parametrize("dictionary, version", [(True, 2), (False, 1)])
def test_a_run_without_rules_of_edits_has_those_of_its_time(work, tmp_path, dictionary, version):
    shutil.copytree(work / "distil", tmp_path / "distil")
    config = read_json(tmp_path / "distil" / "config.json")
    del config["options"]["transfer_version"]
    if not dictionary:
        del config["versions"]["lemminflect"]
    (tmp_path / "distil" / "config.json").write_text(json.dumps(config))
    toy.reseal(tmp_path / "distil")
    options = folder.read_run(tmp_path / "distil")[0]["options"]
    assert rebuild(DistilOptions, options).transfer_version == version


def test_only_a_finished_run_can_be_repeated(tmp_path, capsys):
    assert toy.main("repeat", tmp_path / "none") == 2
    assert "none: not a run's folder" in capsys.readouterr().err


def test_a_config_without_a_needed_option_is_refused():
    with pytest.raises(UserError, match="does not record every option .*'seed'"):
        rebuild(TrainOptions, {"epochs": 3})
