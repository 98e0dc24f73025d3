"""inputs: what `--precision auto` comes to."""
from dataclasses import replace

import pytest

from experiments.inputs import resolve_precision
from fast import amx
from machine import hardware
from options.schema import RunOptions, TrainOptions
from record.files import write_json


@pytest.mark.parametrize("tiles", [False, True])
def test_precision_auto_is_the_fastest_that_changes_no_prediction(monkeypatch, tmp_path, tiles):
    monkeypatch.setattr(amx, "available", lambda: tiles)
    options = RunOptions("LoRA", "12345", "tiny", "tiny", None, tmp_path / "run", TrainOptions(12345))

    def resolved(**changes) -> str:
        return resolve_precision(replace(options, **changes)).train.precision

    fastest = "bf16x3" if tiles and hardware.device().type == "cpu" else "fp32"
    assert options.train.precision == "auto" and resolved() == resolved(method="head") == fastest
    assert resolved(method="full") == resolved(mode="distil") == "fp32"
    assert resolved(train=TrainOptions(12345, precision="bf16")) == "bf16"
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "config.json", {"options": {"precision": "bf16"}})
    assert resolved(resume=True) == "bf16" and resolved() == fastest and resolved(resume=True, overwrite=True) == fastest
    assert resolved(repeats=tmp_path / "run", out=tmp_path / "again") == "bf16"
