"""Measures the time of an epoch that caching the output of frozen parts saves.

    python benchmarks/frozen_reuse.py
    python benchmarks/frozen_reuse.py --quick --json

GPT-2 124M on a sample of CoLA's training split in batches of 32; every epoch goes through `train_utils.fit`. Cached
results must equal fresh ones bit for bit; then these are timed against each other:

    --method head    the first epoch, which computes and caches the features, against a later one
    --layers 6-11    a later epoch, from the cached output of block 5 on, against all layers, and against the same layers
                     without a cache. By FLOP count the limits are 2.0 and 1.5: forward and backward through 12 blocks, or
                     forward through 12 and backward through 6, against forward and backward through 6
    distil           a student's epoch with the teacher's cached logits, against computing them anew
"""
from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import train_utils
from benchmarks import common  # first: it sets the environment that libraries read when imported
from benchmarks.common import Report, device, epoch_seconds, paired_ratios, synchronize
from data_utils import Batch
from distillation.labels import teacher_logits
from distillation.losses import kd_objective
from distillation.student_size import student_config
from fast.frozen import FrozenPrefix
from machine import hardware
from model import DistilRNN, LoRAOptions, TextClassifier, count_parameters, load_classifier

BATCH_SIZE = 32
CROSS_ENTROPY = train_utils.label_loss()


def classifier(base: str, method: str = "lora", layers: str | None = None) -> TextClassifier:
    """Builds GPT-2 with a head, as `run.py LoRA --method METHOD --layers LAYERS` trains it."""
    made, _ = load_classifier(base, common.LABELS)
    torch.manual_seed(0)
    made.configure(method, LoRAOptions(layers=layers))
    return common.as_if_trained(made).to(device())


def copies(batches: list[Batch]) -> list[Batch]:
    """Returns the same batches without cached results."""
    return [Batch(batch.input_ids, batch.attention_mask, batch.labels, batch.rows, batch.tokens,
                  micro=batch.micro and copies(batch.micro)) for batch in batches]


def check_kept(report: Report, what: str, model: TextClassifier, cached: list[Batch]) -> None:
    """Checks that cached results give the same logits and gradients as fresh ones, on the shortest and longest batch."""
    for name, batch in (("shortest", cached[0]), ("longest", cached[-1])):
        # Gradients too: a cached result must cut the graph at the right place.
        results = []
        for one in (batch, replace(batch, cached=None)):
            one = one.to(device())
            model.zero_grad()
            logits = model.train()(*one.inputs())
            CROSS_ENTROPY(logits, one).backward()
            gradients = [p.grad.flatten() for p in train_utils.trainable(model).values()]
            results.append((logits.detach(), torch.cat(gradients)))
        for part, value, fresh in zip(("logits", "gradients"), *results, strict=True):
            report.check_bits(f"{what}: cached {part} of the {name} batch", value, fresh)
    model.zero_grad()


def timed(work) -> float:
    """Returns the seconds that a call takes."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def measure_head(report: Report, base: str, batches: list[Batch], rounds: int) -> None:
    """Measures the first epoch of the head alone, which computes the features, against a later one."""
    model = classifier(base, "head")
    prefix, cached = FrozenPrefix(model), copies(batches)
    model.prefix = prefix
    prefix.cache(cached)
    check_kept(report, "head", model, cached)
    # The first epoch includes computing the cache.
    seconds = common.alternate({
        "first": lambda _: timed(lambda: prefix.cache(cached)) + epoch_seconds(model, cached, CROSS_ENTROPY),
        "later": lambda _: epoch_seconds(model, cached, CROSS_ENTROPY)}, rounds)
    for name, values in seconds.items():
        report.measure(f"head: {name} epoch", values, "s")
    report.target("head: first / later epoch", paired_ratios(seconds["first"], seconds["later"]), 50)


def measure_layers(report: Report, base: str, batches: list[Batch], rounds: int) -> None:
    """Measures epochs of the upper six blocks, with and without a cache, against all twelve."""
    everything, upper = classifier(base), classifier(base, layers="6-11")
    prefix, cached = FrozenPrefix(upper), copies(batches)
    upper.prefix = prefix
    prefix.cache(cached)
    check_kept(report, "layers 6-11", upper, cached)
    seconds = common.alternate({
        "all layers": lambda _: epoch_seconds(everything, batches, CROSS_ENTROPY),
        "6-11, not cached": lambda _: epoch_seconds(upper, batches, CROSS_ENTROPY),
        "6-11, cached": lambda _: epoch_seconds(upper, cached, CROSS_ENTROPY)}, rounds)
    for name, values in seconds.items():
        report.measure(f"layers: epoch, {name}", values, "s")
    report.target("layers: all / 6-11 cached (limit 2.0)",
                  paired_ratios(seconds["all layers"], seconds["6-11, cached"]), 1.8)
    report.measure("layers: 6-11 not cached / cached (limit 1.5)",
                   paired_ratios(seconds["6-11, not cached"], seconds["6-11, cached"]), "x")


def measure_distillation(report: Report, base: str, batches: list[Batch], rounds: int, work: Path) -> None:
    """Measures a student's epoch with cached logits of the teacher against one that computes them."""
    teacher = classifier(base).eval()
    fresh = train_utils.compute_logits(teacher, batches)
    # The first call computes and writes them, the second one reads the file.
    for name in ("computed", "read from the run's file"):
        cached = teacher_logits([(teacher, batches)], work / "teacher_logits.safetensors")
        report.check_bits(f"distil: cached logits, {name}", cached, fresh)
    # A tenth of the teacher, as a distillation's default.
    budget = count_parameters(teacher)["total"] // 10
    config = student_config(len(common.tokenizer_of(base)), common.LABELS, budget)
    torch.manual_seed(0)
    student = DistilRNN(config).to(device())

    def epoch(logits: torch.Tensor) -> float:
        objective = kd_objective(logits.to(device()), temperature=4.0, alpha=0.9)
        return epoch_seconds(student, batches, objective)

    seconds = common.alternate({
        "teacher asked": lambda _: timed(lambda: train_utils.compute_logits(teacher, batches)) + epoch(fresh),
        "logits cached": lambda _: epoch(cached)}, rounds)
    for name, values in seconds.items():
        report.measure(f"distil: epoch, {name}", values, "s")
    report.target("distil: teacher asked / logits cached",
                  paired_ratios(seconds["teacher asked"], seconds["logits cached"]), 10)


def benchmark(args: argparse.Namespace, work: Path) -> Report:
    # As every run does; all sides share this process.
    hardware.keep_freed_memory()
    report, base = Report(), common.base_of("gpt2", work)
    # A GPU would finish the small sample too soon to be timed.
    rows, rounds = (96, 2) if args.quick else (640, 5)
    if torch.cuda.is_available():
        rows *= 8
    batches = common.batches_of(common.thinned(args.task.train, rows), base, BATCH_SIZE)
    measure_head(report, base, batches, rounds)
    measure_layers(report, base, batches, rounds)
    measure_distillation(report, base, batches, rounds, work)
    return report


if __name__ == "__main__":
    sys.exit(common.main(__doc__, benchmark))
