"""Runs run.py under a full disk, a quota and a read-only folder, and prints a JSON object for test_limits.py.

It is a process of its own, like benchmarks/kill_test.py: it forks a child for each run, which is safe without threads alone.
"""
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "tests", "benchmarks")]

import toy  # noqa: E402 (needs the path above)
from kill_test import command, difference, fork, inputs, start, uninterrupted, wait  # noqa: E402 (needs the path above)

# stderr is a file too, and must stay below the limits.
os.environ["TQDM_DISABLE"] = "1"
STEPS = ["--save-every", "1steps"]


def limit_files(size: int) -> None:
    """Limits the size of every file to `size` bytes, as a quota does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def before(module: str, function: str, act: Callable[[], None]) -> Callable[[], None]:
    """Returns a function that makes `act()` run before every call of `module.function`."""
    def prepare():
        owner = sys.modules[module]
        for part in function.split(".")[:-1]:
            owner = getattr(owner, part)
        name = function.split(".")[-1]
        whole = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: (act(), whole(*args, **kwargs))[1])
    return prepare


def attempt(work: Path, arguments: list[str], prepare: Callable[[], None] = lambda: None) -> dict:
    """Returns the exit status of a run and its lines on stderr."""
    status = wait(start(arguments, work, prepare))
    return {"status": status, "stderr": (work / "stderr").read_text().splitlines()}


def quota(work: Path, expected: dict, name: str, prepare: Callable[[], None], *more: str) -> dict:
    """Runs into a limit, resumes without it, and returns the outcome of both."""
    out = work / name
    hit = attempt(work, [*command(work, out), *STEPS, *more], prepare)
    checkpoint = out / "checkpoint.safetensors"
    hit["checkpoint"] = checkpoint.exists()
    hit["temporaries"] = [path.name for path in out.glob(".*") if path.name != ".lock"]
    again = attempt(work, [*command(work, out), *STEPS, *more, "--resume"])
    hit["failures"] = [str(again)] if again["status"] else [] if more else difference(out, expected)
    return hit


def third(act: Callable[[], None]) -> Callable[[], None]:
    """Returns a function that acts at its third call alone."""
    calls = []
    return lambda: act() if calls.append(1) or len(calls) == 3 else None


def full_disk(work: Path, expected: dict) -> dict | None:
    """Runs on a file system that is full, then read-only, then larger; returns None if none may be mounted."""
    disk = work / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=220k", "tmpfs", str(disk)], capture_output=True).returncode:
        return None
    try:
        line = [*command(work, disk / "run"), *STEPS]
        result = {"full": attempt(work, line), "checkpoint": (disk / "run" / "checkpoint.safetensors").exists()}
        result["keeping"] = attempt(work, [*command(work, disk / "keep"), "--layers", "1", "--keep-memory", "0"])
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        result["read_only"] = attempt(work, [*line, "--resume"])
        subprocess.run(["mount", "-o", "remount,rw,size=4m", str(disk)], check=True)
        again = attempt(work, [*line, "--resume"])
        result["failures"] = [str(again)] if again["status"] else difference(disk / "run", expected)
        return result
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def main() -> None:
    toy.import_for_children()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if wait(fork(work, lambda: inputs(work))):
            raise RuntimeError((work / "stderr").read_text()[-2000:])
        expected, _ = uninterrupted(work)
        print(json.dumps({
            "first checkpoint": quota(work, expected, "first", lambda: limit_files(60_000)),
            "later checkpoint": quota(work, expected, "later", before("train_utils", "save_checkpoint",
                                                                     third(lambda: limit_files(60_000)))),
            "final weights": quota(work, expected, "final", before("experiments.finetune", "save_trained",
                                                                   lambda: limit_files(9000))),
            "summary": quota(work, expected, "summary", before("experiments.finetune", "finish", lambda: limit_files(400))),
            "tensorboard": quota(work, expected, "board", before("training.trackers", "TensorBoard.log",
                                                                   lambda: limit_files(400))),
            "keeping": quota(work, expected, "keep", before("fast.frozen", "FrozenPrefix.cache", lambda: limit_files(400)),
                             "--layers", "1", "--keep-memory", "0"),
            "disk": full_disk(work, expected)}))


if __name__ == "__main__":
    main()
