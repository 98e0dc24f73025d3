"""Threads: as many as the affinity mask and the control groups allow, and OpenMP's variables before PyTorch's import."""
import math
import os

import pytest

from machine import threads


def group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.mark.parametrize("own, files, expected", [
    ("0::/\n", {"": {"cpu__max": "max 100000\n"}}, math.inf),
    ("0::/\n", {"": {"cpu__max": "150000 100000\n"}}, 1.5),
    ("0::/\n", {}, math.inf),  # the root group has no such file
    ("0::/a/b\n", {"a": {"cpu__max": "200000 100000\n"}, "a/b": {"cpu__max": "max 100000\n"}}, 2),  # a group above
    ("0::/a/b\n", {"a": {"cpu__max": "400000 100000\n"}, "a/b": {"cpu__max": "50000 100000\n"}}, 0.5),
    ("0::/outside/of/this/container\n", {"": {"cpu__max": "300000 100000\n"}}, 3),
    ("9:memory:/x\n4:cpu,cpuacct:/x\n0::/\n", {"cpu/x": {"cpu__cfs_quota_us": "250000", "cpu__cfs_period_us": "100000"}},
     2.5),
    ("4:cpu:/\n", {"cpu": {"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"}}, math.inf),
    ("4:cpuset:/\n3:cpuacct:/\n", {"": {"cpu__cfs_quota_us": "100000", "cpu__cfs_period_us": "100000"}}, math.inf),
    ("0::/\n", {"": {"cpu__max": "broken"}}, math.inf)])
def test_the_quota_is_the_least_of_all_groups(tmp_path, own, files, expected):
    for folder, contents in files.items():
        group(tmp_path / "fs" / folder, **contents)
    (tmp_path / "own").write_text(own)
    assert threads.quota(tmp_path / "fs", tmp_path / "own") == expected


def test_a_system_without_control_groups_has_no_quota(tmp_path):
    assert threads.quota(tmp_path / "fs", tmp_path / "own") == math.inf


@pytest.mark.parametrize("quota, expected", [(math.inf, 3), (2, 2), (1.2, 2), (0.3, 1), (8, 3)])
def test_as_many_cpus_as_mask_and_quota_allow(monkeypatch, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5}, raising=False)
    monkeypatch.setattr(threads, "quota", lambda: quota)
    assert threads.available() == expected


def test_variables_are_set_for_a_quota_and_never_replaced(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "quota", lambda: math.inf)
    threads.prepare()
    assert "OMP_NUM_THREADS" not in os.environ and os.environ["GOMP_SPINCOUNT"] == str(threads.SPINS)
    monkeypatch.setattr(threads, "quota", lambda: 2)
    threads.prepare()
    assert os.environ["OMP_NUM_THREADS"] == "2"
    for name, value in (("OMP_NUM_THREADS", "7"), ("GOMP_SPINCOUNT", "5")):
        monkeypatch.setenv(name, value)
    threads.prepare()
    assert (os.environ["OMP_NUM_THREADS"], os.environ["GOMP_SPINCOUNT"]) == ("7", "5")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    threads.prepare()
    assert "GOMP_SPINCOUNT" not in os.environ
