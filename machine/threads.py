"""Counts the CPUs that this process may use, and makes threads wait without spinning; before PyTorch is imported.

    python -c "from machine import threads; print(threads.available())"
"""
from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")

# Rounds of an OpenMP thread that waits for the others before it sleeps. libgomp's own number keeps a core busy for
# milliseconds, although the thread that all wait for may need that core.
SPINS = 2000


def available() -> int:
    """Returns the CPUs that this process may use: those of its affinity mask, at most the quota of its control group."""
    try:
        count = len(os.sched_getaffinity(0))
    # Only Linux has affinity masks in Python.
    except AttributeError:
        count = os.cpu_count() or 1
    return max(1, math.ceil(min(count, quota())))


def quota(root: Path = CGROUP, own: Path = Path("/proc/self/cgroup")) -> float:
    """Returns the CPUs that the control groups of this process allow, as containers set them; infinity without a limit.

    Source: cgroups(7) of Linux, "CPU Interface Files" of version 2 and "CFS Bandwidth Control" of version 1.
    """
    found = [math.inf]
    for line in _read(own).splitlines():
        _, controllers, path = line.split(":", 2)
        # Version 2 has one line without controllers; in version 1 the controller cpu has a hierarchy of its own.
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "cpu" if controllers else root
        # The quota of each parent group holds too. In a container the path may name groups that it cannot see.
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base):
                break
            if controllers:
                words = [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
            else:
                words = _read(folder / "cpu.max").split()
            found.append(_ratio(words))
    return min(found)


def _ratio(words: list[str]) -> float:
    """Returns quota / period of a group; infinity for "max", -1 and files that are not there."""
    try:
        allowed, period = map(int, words)
    except ValueError:
        return math.inf
    return allowed / period if allowed > 0 and period > 0 else math.inf


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def prepare() -> None:
    """Sets variables that libraries read once, at their import; a variable that is set already stays."""
    count = available()
    # OpenMP knows the affinity mask, not the quota.
    if quota() < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(count))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
    # Tokenizers warn where a process with threads forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
