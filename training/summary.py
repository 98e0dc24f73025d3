"""The parts of summary.json that a training gives: its cost, and the scores of its best and last epoch."""
from __future__ import annotations

from collections.abc import Sequence

from data_utils import Batch, padding_percent
from machine.hardware import peak_memory_bytes
from metrics.problems import SINGLE_LABEL, Problem
from training.checkpoints import Progress


def training_summary(progress: Progress, batches: Sequence[Batch]) -> dict:
    """Returns the entry `train` of summary.json: sums over the epochs, padding and peak memory."""
    # Sums of the history, not of a clock: a resumed run counts the time before its stop, too.
    seconds = sum(line["seconds"] for line in progress.history)
    tokens = sum(line["tokens"] for line in progress.history)
    return {"epochs": len(progress.history), "steps": progress.step, "seconds": seconds, "tokens": tokens,
            "tokens_per_second": tokens / seconds if seconds else 0.0,
            "padding_percent": padding_percent(batches), "peak_memory_bytes": peak_memory_bytes()}


def best_and_last(best_epoch: int, history: list[dict], classes: tuple[str, ...], problem: Problem = SINGLE_LABEL) -> dict:
    """Returns the scores of the best and the last epoch, and those of the best epoch by class."""
    # Both are reported: the best epoch was chosen on the same rows, and its scores flatter a little.
    best, last = next(line for line in history if line["epoch"] == best_epoch), history[-1]
    by_class = {split: {problem.counts: matrix, "per_class": problem.per_class(matrix, classes)}
                for split, matrix in best[problem.counts].items() if matrix}
    return {"best_epoch": best_epoch, "validation": best["validation"], "by_class": by_class,
            "last_epoch": last["epoch"], "last_validation": last["validation"]}
