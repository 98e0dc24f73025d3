"""Measures programs that share cores: one alone and two next to each other, each with as many threads as there are cores.

    python benchmarks/threads.py

The work is the first steps of the built-in model's training, in processes of their own. Threads that wait spin as long as
libgomp has them by default, or as `machine/threads.py` has them for every mode of run.py. Both must give the same weights.
"""
from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common  # noqa: E402 (needs the path above)
from machine import threads  # noqa: E402

WORK = """
import hashlib, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from data import tiny
tiny.STEPS, folder = int(sys.argv[3]), Path(sys.argv[2])
torch.set_num_threads(int(sys.argv[4]))
print("ready", flush=True)
sys.stdin.readline()
begin = time.perf_counter()
tiny.train_model(folder)
seconds = time.perf_counter() - begin
print(seconds, hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())
"""
SIDES = {"libgomp's own": {}, "ours": {"GOMP_SPINCOUNT": str(threads.SPINS)}}


def together(count: int, side: str, args: argparse.Namespace, work: Path) -> tuple[list[float], set[str]]:
    """Runs `count` programs at a time; returns the seconds of each, and the digests of their weights."""
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    programs = [subprocess.Popen(
        [sys.executable, "-c", WORK, str(common.ROOT), str(work / f"model-{i}"), str(args.steps), str(args.cores)],
        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**clean, **SIDES[side], "OMP_NUM_THREADS": str(args.cores)}) for i in range(count)]
    # All have imported their libraries before the first begins.
    for program in programs:
        assert program.stdout.readline() == "ready\n"
    for program in programs:
        program.stdin.write("go\n")
        program.stdin.flush()
    seconds, digests = [], set()
    for program in programs:
        out, errors = program.communicate()
        if program.returncode:
            raise SystemExit(f"{side}: a program failed: {errors[-500:]}")
        seconds.append(float(out.split()[0]))
        digests.add(out.split()[1])
    return seconds, digests


def benchmark(args: argparse.Namespace, work: Path) -> common.Report:
    report, digests = common.Report(), set()
    args.cores, args.steps = args.threads or threads.available(), 10 if args.quick else args.steps
    seconds: dict[tuple[str, int], list[float]] = {}
    # In alternation, so that a slow moment of the machine meets all alike.
    for _ in range(1 if args.quick else args.rounds):
        for side in SIDES:
            for count in (1, 2):
                taken, found = together(count, side, args, work)
                seconds.setdefault((side, count), []).append(max(taken))
                digests |= found
    report.check("weights of all programs (kinds, less one)", len(digests) - 1, 0)
    for (side, count), values in seconds.items():
        report.measure(f"{side}: {('one program', 'two at a time')[count - 1]}, {args.cores} threads each", values, "s")
    for side in SIDES:
        ratios = [two / one for one, two in zip(seconds[side, 1], seconds[side, 2], strict=True)]
        if side == "ours":
            report.target("ours: two at a time / one program", ratios, 2.5, at_most=True)
        else:
            report.measure(f"{side}: two at a time / one program", ratios, "x")
    ratios = [one / other for one, other in zip(seconds["ours", 1], seconds["libgomp's own", 1], strict=True)]
    report.target("one program: ours / libgomp's own", ratios, 1.02, at_most=True)
    return report


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=60, help="of the training (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of all sides in turn (default: %(default)s)")


if __name__ == "__main__":
    sys.exit(common.main(__doc__, benchmark, options))
