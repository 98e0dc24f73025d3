"""Measures a student's training by one process, by two processes of one run, and by two runs next to each other.

    python benchmarks/student_processes.py --run runs/LoRA-12345

Each process has one thread. The work is the plain stage of `distil` (`--plain`), which torchrun may start several times. Its
steps are those of the other stages: the same LSTM, one all-reduce of all its gradients. Two processes of one run share each
batch; two runs, of two seeds, share nothing. Speedup: the work of two runs (or of one) over the time, as a multiple of one
process alone.
"""
from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common  # noqa: E402 (needs the path above)
from record.files import read_json  # noqa: E402

PYTHON, TORCHRUN = [sys.executable], [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
# Side: how its programs start, and how many there are.
SIDES = {"one process": (PYTHON, 1), "one run of two processes": (TORCHRUN, 1), "two runs of one process": (PYTHON, 2)}


def seconds_of(side: str, args: argparse.Namespace, work: Path) -> float:
    """Runs the programs of a side at a time; returns the seconds of training of the slower one."""
    starter, count = SIDES[side]
    folders = [work / f"run-{i}" for i in range(count)]
    programs = [subprocess.Popen(
        [*starter, str(common.ROOT / "run.py"), "distil", str(12345 + i), "--teacher", str(args.run.resolve()), "--plain",
         "--no-control", "--no-plots", "--overwrite", "--epochs", str(args.epochs), "--out", str(folder)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        for i, folder in enumerate(folders)]
    for program in programs:
        _, errors = program.communicate()
        if program.returncode:
            raise SystemExit(f"{side}: a run failed: {errors[-500:]}")
    return max(read_json(folder / "summary.json")["student"]["train"]["seconds"] for folder in folders)


def benchmark(args: argparse.Namespace, work: Path) -> common.Report:
    report = common.Report()
    args.epochs = 1 if args.quick else args.epochs
    seconds = common.alternate({side: lambda _, side=side: seconds_of(side, args, work) for side in SIDES},
                               1 if args.quick else args.rounds)
    for side, values in seconds.items():
        report.measure(f"{side}: training, {args.epochs} epoch(s)", values, "s")
    alone = seconds["one process"]
    for side in list(SIDES)[1:]:
        work_done = SIDES[side][1]
        report.measure(f"{side}: speedup", [work_done * ratio for ratio in common.paired_ratios(alone, seconds[side])], "x")
    return report


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, required=True, help="folder of a LoRA run, the teacher")
    parser.add_argument("--epochs", type=int, default=2, help="of each training (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of all sides in turn (default: %(default)s)")


if __name__ == "__main__":
    sys.exit(common.main(__doc__, benchmark, options))
