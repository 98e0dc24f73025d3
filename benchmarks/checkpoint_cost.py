"""Measures the checkpoints' share of a training's time at the defaults: one after each epoch and every ten minutes.

    python benchmarks/checkpoint_cost.py

A few optimiser steps give the time of a step, a few checkpoints of the trained state (with its best epoch so far) the
time of a save, flushed to disk. The share is that of a default run on CoLA, extrapolated: its steps in an epoch times
the step's time, one save an epoch and one every ten minutes. An epoch of the toy takes a second: its share is the worst
case. Prints the target, at most 2 %, next to it.
"""
from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "tests")]

import toy  # noqa: E402

import data_utils  # noqa: E402 (needs the path above)
import train_utils  # noqa: E402
from benchmarks import common  # noqa: E402
from data import tiny  # noqa: E402
from data.backbones import load_tokenizer, max_length_of  # noqa: E402
from experiments import inputs  # noqa: E402
from model import LoRAOptions, load_classifier  # noqa: E402
from speed import install  # noqa: E402
from training import checkpoints  # noqa: E402

OPTIONS = train_utils.TrainOptions(seed=1)


def costs(model: str, task: data_utils.Task, work: Path, steps: int, saves: int
          ) -> tuple[list[float], list[float], int, int]:
    """Measures seconds of each step and of each save, bytes of a checkpoint, and the optimiser steps of an epoch."""
    inputs.seed_everything(1)
    classifier, _ = load_classifier(model, task.num_labels)
    classifier.configure("lora", LoRAOptions())
    install(classifier)
    classifier.to(common.device())
    max_length = min(common.MAX_LENGTH, max_length_of(classifier.net))
    batches = data_utils.make_batches(task.train, load_tokenizer(model), max_length, OPTIONS.batch_size, 1)
    chosen = [batches[i] for i in common.spread_sample(steps + 1, len(batches), 1)]
    optimizer, objective = train_utils.make_optimizer(classifier, OPTIONS), train_utils.label_loss()
    # Steps as `fit` takes them, without its bookkeeping: a shorter step makes the share larger, not smaller.
    seconds = []
    classifier.train()
    for batch in chosen:
        start = time.perf_counter()
        batch = batch.to(common.device())
        objective(classifier(*batch.inputs()).float(), batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        common.synchronize()
        seconds.append(time.perf_counter() - start)
    # Each checkpoint holds the best epoch's weights too.
    best = {name: p.detach().cpu().clone() for name, p in checkpoints.trainable(classifier).items()}
    path, taken = work / f"{Path(model).name}.safetensors", []
    for _ in range(saves + 1):
        start = time.perf_counter()
        checkpoints.save_checkpoint(path, classifier, optimizer, checkpoints.Progress(), best)
        taken.append(time.perf_counter() - start)
    # The first of each warms up.
    return seconds[1:], taken[1:], path.stat().st_size, len(batches)


def benchmark(args: argparse.Namespace, work: Path) -> common.Report:
    report = common.Report()
    toy.write_model(work / "toy")
    # A tiny model that learned little: its weights do not change the figures.
    tiny.STEPS = 30
    made = str(tiny.tiny_model_folder(work))
    cases = {"toy (32 channels), CoLA": (str(work / "toy"), args.task),
             "tiny, --task tiny": (made, data_utils.load_task("tiny")),
             "SmolLM2-135M, CoLA": ("smollm2", args.task)}
    for name, (model, task) in cases.items():
        steps, saves, size, epoch = costs(model, task, work, 4 if args.quick else 20, 3 if args.quick else 10)
        report.measure(f"{name}: a step", [1000 * value for value in steps], "ms")
        report.measure(f"{name}: a checkpoint ({size / 2 ** 20:.1f} MiB)", [1000 * value for value in saves], "ms")
        seconds = epoch * sum(steps) / len(steps)
        report.measure(f"{name}: an epoch of {epoch} steps, extrapolated", [seconds], "s")
        number = 1 + math.floor(seconds / (60 * OPTIONS.save_every))
        report.target(f"{name}: share of {number} checkpoint(s) an epoch",
                      [100 * number * value / (seconds + number * value) for value in saves], 2.0, "%", at_most=True)
        print(name, file=sys.stderr, flush=True)
    return report


if __name__ == "__main__":
    sys.exit(common.main(__doc__, benchmark))
