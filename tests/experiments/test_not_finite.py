"""A value that is not finite, in the last update or in validation: exit status 3, one line, and nothing with a NaN left."""
import json
import math

import pytest
import torch
import toy

import train_utils
from record.files import read_json
from record.tensors import load_tensors

STAGES = ("--embedding-size", 6, "--hidden-size", 5, "--augment", 8, "--pretrain", 1, "--transfer", 1, "--match-size", 4,
          "--batch-size", 8, "--epochs", 2, "--no-plots")
MODES = {"LoRA": lambda work: ("LoRA", "12345", "--model", work / "model", "--data", work / "cola", "--batch-size", 8,
                               "--epochs", 2, "--no-plots"),
         "plain": lambda work: ("distil", "12345", "--plain", "--teacher", work / "LoRA", "--embedding-size", 6,
                                "--hidden-size", 5, "--batch-size", 8, "--epochs", 2, "--no-plots"),
         "staged": lambda work: ("distil", "12345", "--teacher", work / "LoRA", *STAGES)}


def in_validation(monkeypatch, epoch):
    """Makes the loss of validation NaN, from the given epoch on; a stage that is scored by its loss, too."""
    validate, score_by_loss, calls = train_utils.validate, train_utils.score_by_loss, []

    def spoiled(found):
        calls.append(1)
        for values in found[0].values():
            values["loss"] = math.nan if len(calls) >= epoch else values["loss"]
        return found

    monkeypatch.setattr(train_utils, "validate", lambda *args: spoiled(validate(*args)))
    monkeypatch.setattr("distillation.pretraining.score_by_loss",
                        lambda objective: lambda *args: spoiled(score_by_loss(objective)(*args)))


def in_the_last_update(monkeypatch, epoch):
    """Writes a NaN into a weight in the last step of an epoch, after its loss and its gradient."""
    step = train_utils.Trainer.step

    def spoiled(trainer, group):
        step(trainer, group)
        per_epoch = math.ceil(len(trainer.data.batches) / trainer.options.accumulate)
        if trainer.progress.epoch == epoch and trainer.progress.step_in_epoch == per_epoch:
            with torch.no_grad():
                next(iter(trainer.parameters.values())).view(-1)[0] = math.nan

    monkeypatch.setattr(train_utils.Trainer, "step", spoiled)


def numbers(value):
    """Yields the numbers in JSON's values."""
    if isinstance(value, (dict, list)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from numbers(one)
    elif isinstance(value, float):
        yield value


@pytest.mark.parametrize("where", [in_validation, in_the_last_update])
@pytest.mark.parametrize("mode, epoch", [("LoRA", 1), ("LoRA", 2), ("plain", 2), ("staged", 1)])
def test_a_run_ends_with_status_3_and_leaves_no_nan(work, tmp_path, capsys, mode, epoch, where):
    words = (*MODES[mode](work), "--out", tmp_path / "run", "--plots", tmp_path / "plots")
    with pytest.MonkeyPatch.context() as patch:
        where(patch, epoch)
        status = toy.main(*words)
    said = capsys.readouterr().err
    assert status == 3 and "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("run.py: ") and " after step " in last and "lower --lr" in last
    # Whatever was written can be gone on from.
    for path in (tmp_path / "run").rglob("*"):
        if path.suffix == ".safetensors":
            assert all(bool(torch.isfinite(value).all()) for value in load_tensors(path).values()), path
        elif path.suffix == ".json":
            assert all(map(math.isfinite, numbers(read_json(path)))), path
    lines = tmp_path / "run" / "metrics.jsonl"
    for line in lines.read_text().splitlines() if lines.exists() else []:
        assert all(map(math.isfinite, numbers(json.loads(line))))
    assert not (tmp_path / "run" / "summary.json").exists()
    # The fault gone, the run ends as it would have.
    assert toy.main(*words, "--resume") == 0
    assert read_json(tmp_path / "run" / "summary.json")["mode"] == words[0]
