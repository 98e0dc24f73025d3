"""The CPU that a run records, and the threads that it recorded."""
import platform

import pytest
import torch

from machine import hardware
from machine.errors import UserError
from model import FeatureHead


def test_the_cpus_name_is_the_systems(tmp_path):
    """One processor's lines of a virtual machine with two; and a system that names none."""
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel\t\t: 17\nmodel name\t: Some CPU: 2.0 GHz\n\n"
                                      "processor\t: 1\nmodel name\t: Another CPU\n")
    assert hardware.cpu_name(tmp_path / "cpuinfo") == "Some CPU: 2.0 GHz"
    (tmp_path / "cpuinfo").write_text("processor\t: 0\n")
    for path in (tmp_path / "cpuinfo", tmp_path / "none"):
        assert hardware.cpu_name(path) == (platform.processor() or platform.machine()) != ""


def test_threads_that_cannot_be_had_are_told_in_one_line(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    with pytest.warns(UserWarning, match="77 threads cannot be had here, . are used: sums are rounded in another order"):
        hardware.use_threads(77)
    for unusable in (None, True, 0, "2"):
        hardware.use_threads(unusable)  # no warning, which would be an error here


@pytest.fixture
def auto():
    """Puts the choice back after a test."""
    yield
    hardware.use_device("auto")


@pytest.mark.parametrize("cuda, mps, expected", [(True, True, "cuda"), (False, True, "cpu"), (False, False, "cpu")])
def test_auto_is_cudas_gpu_or_the_cpu(monkeypatch, auto, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    for name, kind in (("auto", expected), ("cpu", "cpu"), *((("cuda", "cuda"),) if cuda else ()),
                       *((("mps", "mps"),) if mps else ())):
        hardware.use_device(name)
        assert hardware.device() == torch.device(kind)


@pytest.mark.parametrize("name", ["cuda", "mps", "tpu"])
def test_a_device_that_is_not_there_is_told_and_changes_nothing(monkeypatch, auto, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"--device {name}: not there; this PyTorch .* finds cpu$"):
        hardware.use_device(name)
    assert hardware.device().type == "cpu"


def test_float64_is_refused_where_the_device_has_none(monkeypatch, auto):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    hardware.use_device("mps")
    with pytest.raises(UserError, match="--device mps: has no float64"):
        FeatureHead(torch.ones(2, 1, dtype=torch.float64), 2)


@pytest.mark.parametrize("kind, sources", [("cpu", ["rng"]), ("cuda", ["rng", "rng.cuda"]), ("mps", ["rng", "rng.mps"])])
def test_a_checkpoint_holds_the_random_numbers_of_the_device_that_computes(monkeypatch, kind, sources):
    monkeypatch.setattr(hardware, "_chosen", kind)
    assert list(hardware.random_sources()) == sources
    assert all(callable(source.get_rng_state) and callable(source.set_rng_state)
               for source in hardware.random_sources().values())
