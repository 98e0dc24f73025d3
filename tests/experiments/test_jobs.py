"""Runs at a time (--jobs): as many as asked for, in their order, and one that ends badly ends the others."""
import threading
import time

import pytest
import torch
import toy
import warm

from experiments import compare
from machine.errors import UserError
from record.files import read_json
from record.folder import without_times
from report import figures


def runs(tmp_path, count: int) -> list[tuple[list[str], object]]:
    return [(["LoRA", f"{number:05d}"], tmp_path / str(number)) for number in range(count)]


@pytest.fixture
def meeting(monkeypatch):
    """A child that waits until as many are at work as may be; returns the most that were."""
    at_work, most = [], []

    def child(words, log, threads=None, tick=None):
        at_work.append(words[1])
        time.sleep(0.2 if len(most) % 2 else 0.1)  # they end in another order than they began
        most.append(len(at_work))
        at_work.remove(words[1])
        log.with_name("summary.json").write_text(f'{{"sr": "{words[1]}"}}')
        return 0
    monkeypatch.setattr(compare, "run_child", child)
    monkeypatch.setattr(compare, "read_run", lambda folder, mode: (None, read_json(folder / "summary.json")))
    return most


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_as_many_run_at_a_time_and_their_order_is_kept(tmp_path, meeting, jobs):
    for _, folder in runs(tmp_path, 7):
        folder.mkdir()
        (folder / "log.txt").touch()
    found = list(compare.finished_runs(runs(tmp_path, 7), 1, jobs))
    assert [summary["sr"] for summary in found] == [f"{number:05d}" for number in range(7)]
    assert max(meeting) == jobs


@pytest.mark.parametrize("how", [UserError("it failed"), KeyboardInterrupt()])
def test_an_error_or_a_signal_stops_the_others_before_it_is_told(tmp_path, monkeypatch, how):
    began, stopped = threading.Event(), []

    def child(words, log, threads=None, tick=None):
        log.touch()
        if words[1] == "00000":
            began.wait(5)
            raise how
        began.set()
        try:
            while True:  # as long as it takes, were it not asked to stop
                time.sleep(0.01)
                tick()
        except KeyboardInterrupt:
            stopped.append(words[1])
            raise
    monkeypatch.setattr(compare, "run_child", child)
    with pytest.raises(type(how)):
        list(compare.finished_runs(runs(tmp_path, 5), 1, 2))
    assert stopped == ["00001"]  # the other three were not begun


def test_two_seeds_at_a_time_train_what_they_train_alone(work, tmp_path, monkeypatch):
    """In processes of their own, as a user's are."""
    monkeypatch.setattr(figures, "plot_run", lambda *_: [])
    monkeypatch.setattr(compare, "RUN", warm.program(tmp_path))
    common = ("--model", work / "model", "--data", work / "cola", "--epochs", 1, "--batch-size", 8, "--lr", 0.01)
    assert toy.main("LoRA", "12345", *common, "--seeds", 2, "--jobs", 2, "--out", tmp_path / "both", "--plots",
                    tmp_path) == 0
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        assert toy.main("LoRA", "12346", *common, "--out", tmp_path / "alone", "--plots", tmp_path) == 0
    finally:
        torch.set_num_threads(threads)
    together = read_json(tmp_path / "both" / "LoRA-12346" / "summary.json")
    assert without_times(together) == without_times(read_json(tmp_path / "alone" / "summary.json"))
    assert read_json(tmp_path / "both" / "LoRA-12346" / "config.json")["threads"] == max(1, threads // 2)


def test_jobs_without_seeds_are_one_line(work, tmp_path, capsys):
    assert toy.main("LoRA", "12345", "--model", work / "model", "--data", work / "cola", "--jobs", 2, "--out",
                    tmp_path / "run") == 2
    assert capsys.readouterr().err == "run.py: --jobs 2: only with --seeds or --folds, whose runs it counts\n"
    assert not (tmp_path / "run").exists()
