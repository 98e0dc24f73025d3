"""Losses of distillation through run.py: relations of pooled states, and an annealed temperature."""
import pytest
import toy

from record.files import read_json


@pytest.mark.parametrize("words", [("--kd-loss", "rkd"), ("--kd-loss", "dkd", "--temperature", 4, "--temperature-schedule",
                                                          "anneal", "--dkd-weight", 2)], ids=str)
def test_a_student_trains_under_a_loss_and_is_repeated(work, quick, tmp_path, words):
    out = tmp_path / "run"
    assert toy.main("distil", "12345", "--plain", "--teacher", work / "LoRA", "--out", out, "--embedding-size", 6,
                    "--hidden-size", 5, "--epochs", 1, "--batch-size", 8, "--no-plots", "--no-control", *words) == 0
    assert "student" in read_json(out / "summary.json")
    assert toy.main("repeat", out) == 0
