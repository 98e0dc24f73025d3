"""Threads that a run recorded."""
import pytest
import torch

from record import machine


def test_threads_that_cannot_be_had_are_told_in_one_line(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    with pytest.warns(UserWarning, match="77 threads cannot be had here, . are used: sums are rounded in another order"):
        machine.use_threads(77)
    for unusable in (None, True, 0, "2"):
        machine.use_threads(unusable)  # no warning, which would be an error here
