"""The CPU that a run records, and the threads that it recorded."""
import platform

import pytest
import torch

from record import machine


def test_the_cpus_name_is_the_systems(tmp_path):
    """One processor's lines of a virtual machine with two; and a system that names none."""
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel\t\t: 17\nmodel name\t: Some CPU: 2.0 GHz\n\n"
                                      "processor\t: 1\nmodel name\t: Another CPU\n")
    assert machine.cpu_name(tmp_path / "cpuinfo") == "Some CPU: 2.0 GHz"
    (tmp_path / "cpuinfo").write_text("processor\t: 0\n")
    for path in (tmp_path / "cpuinfo", tmp_path / "none"):
        assert machine.cpu_name(path) == (platform.processor() or platform.machine()) != ""


def test_threads_that_cannot_be_had_are_told_in_one_line(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    with pytest.warns(UserWarning, match="77 threads cannot be had here, . are used: sums are rounded in another order"):
        machine.use_threads(77)
    for unusable in (None, True, 0, "2"):
        machine.use_threads(unusable)  # no warning, which would be an error here
