"""Measures the cost of --precision: a finished run's logits on its task's development sentences, in each precision.

    python benchmarks/precision.py --run runs/LoRA-12345 --data DIR

The trained weights are the same throughout; only the computation of the frozen linears differs. All are compared with
fp32. `bf16x3` is measured on a CPU with tiles (amx.py); `labels` is the copy of a teacher that labels a transfer set,
bfloat16 with its updates merged. `int8` is no precision of this project, and the figures show the reason: both factors of
each matmul with a frozen weight are rounded to int8, with a scale for each token and each output.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

import data_utils
from benchmarks import common  # first: it sets the environment that libraries read when imported
from benchmarks.common import Report
from distillation.labels import as_labeller
from experiments import evaluate
from fast import amx, frozen_linear
from fast.matmul import set_precision
from machine.errors import UserError
from record.folder import read_run


def to_int8(x: Tensor) -> Tensor:
    """Rounds each row (rows, n) to multiples of a 127th of its largest number."""
    step = x.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return (x / step).round_().mul_(step)


@contextmanager
def products_in_int8() -> Iterator[None]:
    """Rounds both factors of every matmul with a frozen weight to int8 in its body."""
    # Every frozen linear goes through this one function.
    plain = frozen_linear.wide_matmul
    frozen_linear.wide_matmul = lambda x, W, *more, **options: plain(to_int8(x), to_int8(W), *more, **options)
    try:
        yield
    finally:
        frozen_linear.wide_matmul = plain


@torch.no_grad()
def logits_of(run: Path, task: data_utils.Task, precision: str) -> Tensor:
    """Returns the logits (N, classes) of all development sentences."""
    # Loaded anew for each precision: casting is not undone.
    classifier, tokenizer, options = evaluate.load_finetuned(run)
    if precision == "labels":
        classifier = as_labeller(classifier, "bf16")
    else:
        set_precision(classifier.net.base_model, "fp32" if precision == "int8" else precision)
    logits = []
    for split in task.dev.values():
        for batch in data_utils.make_batches(split, tokenizer, options["max_length"], options["batch_size"], seed=1,
                                             shared_prefixes=True):
            logits.append(classifier(*batch.to(common.device()).inputs()).float().cpu())
    return torch.cat(logits)


def benchmark(args: argparse.Namespace, work: Path) -> Report:
    report = Report()
    config, summary = read_run(args.run)
    # A run in bf16 rounded its frozen weights in training: its float32 logits were never those of training.
    if summary["mode"] != "LoRA" or config["options"]["precision"] == "bf16":
        raise UserError(f"{args.run}: expected a LoRA run with --precision fp32 or bf16x3")
    # Float32 is the reference, and the size of its logits the scale of every difference.
    exact = logits_of(args.run, args.task, "fp32")
    report.measure("sentences", [len(exact)], "")
    report.measure("fp32: logits, root mean square", [float(exact.square().mean().sqrt())], "")
    tiles = amx.available() and common.device().type == "cpu"
    for precision in (*(["bf16x3"] if tiles else []), "bf16", "labels", "int8"):
        with products_in_int8() if precision == "int8" else nullcontext():
            logits = logits_of(args.run, args.task, precision)
        difference = logits - exact
        report.measure(f"{precision}: their difference, root mean square", [float(difference.square().mean().sqrt())], "")
        report.measure(f"{precision}: their difference, largest", [float(difference.abs().max())], "")
        report.measure(f"{precision}: predictions that differ", [int((logits.argmax(1) != exact.argmax(1)).sum())], "")
    return report


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder of a finished LoRA run on CoLA")


if __name__ == "__main__":
    sys.exit(common.main(__doc__, benchmark, options))
