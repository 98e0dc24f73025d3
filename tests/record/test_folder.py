"""Reading a run's folder."""
import pytest

from machine.errors import UserError
from record import folder


def test_reading_a_folder_that_is_no_finished_run_says_what_makes_one(tmp_path):
    with pytest.raises(UserError, match="not a run's folder; python run.py LoRA SR makes one"):
        folder.read_run(tmp_path, "LoRA")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="the run is not finished; its command with --resume continues it"):
        folder.read_run(tmp_path, "LoRA")
    (tmp_path / "summary.json").write_text("{}")
    with pytest.warns(match="has no SHA256SUMS"), pytest.raises(UserError, match="config.json: not written by a run"):
        folder.read_run(tmp_path, "LoRA")


def test_an_epoch_is_told_in_lines_of_a_terminal(tmp_path):
    said = []
    scores = {split: {"loss": 0.5, "accuracy": 0.5, "mcc": 0.25} for split in ("in_domain", "out_of_domain", "all")}
    folder.Recorder(tmp_path, said.append, lambda *_: None)([{"epoch": 12, "train": {"loss": 0.5}, "validation": scores,
                                             "learning_rate": 0.1}])
    assert said == ["  epoch 12: train loss 0.5000, in_domain accuracy 0.500 MCC 0.250,\n"
                    "    out_of_domain accuracy 0.500 MCC 0.250, all accuracy 0.500 MCC 0.250"]
