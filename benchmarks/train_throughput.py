"""Measures LoRA training in real tokens a second, on CoLA's real lengths: this project against PEFT.

    python benchmarks/train_throughput.py            GPT-2 124M and SmolLM2-135M, batches of 16
    python benchmarks/train_throughput.py --model gpt2 --quick --json
    python benchmarks/train_throughput.py --model mpnet       an encoder, MPNet-base 110M
    python benchmarks/train_throughput.py --family all     twelve blocks of each family with fused blocks, random weights

Pads are not counted as tokens. The sides have a process each, and one side computes at a time:

    ours          batches by length, TextClassifier, LoRALinear, train_utils.fit
    ours-bf16x3   the same with --precision bf16x3 (amx.py), on a CPU with tiles
    peft-docs     PEFT and the Trainer as their documentation shows them: random order, dynamic padding,
                  the model's own activation and dropout, 0.1 on the inputs of A
    peft-best     PEFT on the same batches as `ours`, fused activation, no dropout, a bare loop, fused AdamW
    peft-fp32     (with --precision bf16) peft-best in float32, the usual choice
    peft-trainer  (on a GPU) the same model as peft-best under the Trainer with group_by_length
    products      the frozen matmuls of the same batches and nothing else: the limit, in one precision

Every round takes the same sentences on all sides: one batch from each range of lengths. All sides adapt the same layers
with the same rank, and start from the same weights, B non-zero.
"""
from __future__ import annotations

import argparse
import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks import common  # first: it sets the environment that libraries read when imported
from benchmarks.common import Report
from benchmarks.families import FAMILIES, base_of_family
from benchmarks.sides import BATCH_SIZE, Worker, sides
from data_utils import Batch, padding_percent
from fast import amx

# With tiles: targets, against whom.
MODELS = {"gpt2": {"peft-docs": 3.0, "peft-best": 1.4}, "smollm2": {"peft-best": 1.8}, "mpnet": {"peft-best": 1.4}}


# ---------------------------------------------------------------- the benchmark

def measure_padding(report: Report, model: str, batches: list[Batch]) -> None:
    """Measures the pads of an epoch: ours, random order, and the Trainer's group_by_length."""
    from transformers.trainer_pt_utils import LengthGroupedSampler

    lengths = []
    for batch in batches:
        lengths += batch.attention_mask.sum(1).tolist()
    random.Random(0).shuffle(lengths)
    grouped = list(LengthGroupedSampler(BATCH_SIZE, lengths=lengths, generator=torch.Generator().manual_seed(0)))
    for name, order in (("random order", range(len(lengths))), ("group_by_length", grouped)):
        report.measure(f"{model}: pads, {name}", [common.padding_percent(lengths, order, BATCH_SIZE)], "%")
    report.target(f"{model}: pads, ours", [padding_percent(batches)], 5, "%", at_most=True)


def measure_memory(report: Report, model: str, workers: dict[str, Worker], batches: list[Batch]) -> None:
    """Measures the peak memory on a sample of the epoch, model and libraries included."""
    # With the largest batch, which sets the peak.
    largest = max(range(len(batches)), key=lambda i: batches[i].input_ids.numel())
    sample = [*common.spread_sample(12, len(batches), 0), largest]
    peaks = {}
    for side, worker in workers.items():
        if side != "products":
            before, peaks[side] = worker("peak", sample)
            report.measure(f"{model}: peak memory, {side}", [peaks[side] / 2 ** 20], "MiB")
            report.measure(f"{model}: of it for the step, {side}", [(peaks[side] - before) / 2 ** 20], "MiB")
    for ours in (side for side in peaks if side.startswith("ours")):
        report.target(f"{model}: peak memory, {ours} / peft-best", [peaks[ours] / peaks["peft-best"]], 0.8, at_most=True)


def goals(model: str, precision: str) -> dict[str, float]:
    """Returns the targets against PEFT's sides on this machine, in this precision."""
    if torch.cuda.is_available():
        return {"peft-trainer": 3.0}
    if precision == "bf16":
        return {"peft-best": 1.6, "peft-fp32": 3.0 if amx.available() else 4.0}
    return MODELS[model] if amx.available() else {"peft-best": 2.4}


def measure_speed(report: Report, model: str, workers: dict[str, Worker], batches: list[Batch], quick: bool,
                  precision: str) -> None:
    count, rounds = (4, 2) if quick else (12, 5)
    if torch.cuda.is_available():
        count *= 8
    samples = [common.spread_sample(count, len(batches), seed) for seed in range(rounds)]
    # Unmeasured: the first calls pay for lengths, optimiser and compilation.
    for worker in workers.values():
        worker("run", common.spread_sample(2 if quick else 4, len(batches), rounds))
    seconds = common.alternate({side: lambda number, worker=worker: worker("run", samples[number])
                                for side, worker in workers.items()}, rounds)
    # Real tokens for the rates; the matmuls' own rate counts pads too, which they compute.
    tokens, flop, flop_per_token = [], [], workers["products"]("flop_per_token")
    for sample in samples:
        tokens.append(sum(batches[i].tokens for i in sample))
        flop.append(flop_per_token * sum(batches[i].input_ids.numel() for i in sample) / 1e9)
    for side in workers:
        report.measure(f"{model}: {side}", common.paired_ratios(tokens, seconds[side]), "tokens/s")
    report.measure(f"{model}: products", common.paired_ratios(flop, seconds["products"]), "GFLOP/s")
    # Each side of ours against each other side: a target, or without one a measurement.
    for ours in (side for side in workers if side.startswith("ours")):
        for side in workers:
            ratios = common.paired_ratios(seconds[side], seconds[ours])
            goal = goals(model, precision).get(side)
            if side == "products":
                report.target(f"{model}: {ours}, share of the products' limit", [100 * ratio for ratio in ratios], 90, "%")
            elif goal:
                report.target(f"{model}: {ours} / {side}", ratios, goal)
            elif not side.startswith("ours"):
                report.measure(f"{model}: {ours} / {side}", ratios, "x")
        if not torch.cuda.is_available():
            for part, share in workers[ours]("profile", samples[0]).items():
                report.measure(f"{model}: {ours}, {part}", [share], "% of the step")


def measure_model(report: Report, model: str, args: argparse.Namespace, work: Path) -> None:
    base, adapter = common.base_of(model, work), common.make_folder(work / f"{model}-adapter")
    batches = common.batches_of(args.task.train, base, BATCH_SIZE)
    workers: dict[str, Worker] = {}
    try:
        for side in sides(args):
            workers[side] = Worker(side, args, base, adapter)
            # PEFT's sides load the adapter of ours: all start from the same weights.
            if side == "ours":
                workers[side]("save")
        # A batch with pads: a side that reads them would have another loss.
        padded = next(i for i, batch in enumerate(batches[len(batches) // 2:], len(batches) // 2)
                      if batch.tokens < batch.input_ids.numel())
        found = {side: worker("check", padded) for side, worker in workers.items()}
        for side in [side for side in workers if side.startswith("peft")]:
            for ours in (side for side in workers if side.startswith("ours")):
                (loss, norm), (their_loss, their_norm) = found[ours], found[side]
                report.check(f"{model}: loss of a batch, {ours} and {side}", abs(loss - their_loss), common.TOLERANCE)
                report.check(f"{model}: gradient norm of A, relative, {ours} and {side}", abs(norm / their_norm - 1), 1e-3)
        measure_padding(report, model, batches)
        measure_memory(report, model, workers, batches)
        measure_speed(report, model, workers, batches, args.quick, args.precision)
    finally:
        for worker in workers.values():
            worker.close()


def measure_family(report: Report, family: str, args: argparse.Namespace, work: Path) -> list[float]:
    """Measures this project and PEFT at its best on one family; returns the ratios of their rates, round by round."""
    base, adapter = base_of_family(family, work, 2 if args.quick else 12), common.make_folder(work / f"{family}-adapter")
    batches = common.batches_of(args.task.train, base, BATCH_SIZE)
    workers: dict[str, Worker] = {}
    try:
        for side in ("ours", "peft-best"):
            workers[side] = Worker(side, args, base, adapter)
            if side == "ours":
                workers[side]("save")
        padded = next(i for i, batch in enumerate(batches) if batch.tokens < batch.input_ids.numel())
        (loss, norm), (their_loss, their_norm) = (worker("check", padded) for worker in workers.values())
        report.check(f"{family}: loss of a batch", abs(loss - their_loss), common.TOLERANCE)
        report.check(f"{family}: gradient norm of A, relative", abs(norm / their_norm - 1), 1e-3)
        count, rounds = (2, 2) if args.quick else (4, 5)
        samples = [common.spread_sample(count, len(batches), seed) for seed in range(rounds + 1)]
        # The largest batch sets the peak.
        largest = max(range(len(batches)), key=lambda i: batches[i].input_ids.numel())
        peaks = {side: worker("peak", [*samples[rounds], largest])[1] for side, worker in workers.items()}
        seconds = common.alternate({side: lambda number, worker=worker: worker("run", samples[number])
                                    for side, worker in workers.items()}, rounds)
    finally:
        for worker in workers.values():
            worker.close()
    tokens = [sum(batches[i].tokens for i in sample) for sample in samples[:rounds]]
    for side in workers:
        report.measure(f"{family}: {side}", common.paired_ratios(tokens, seconds[side]), "tokens/s")
        report.measure(f"{family}: peak memory, {side}", [peaks[side] / 2 ** 20], "MiB")
    ratios = common.paired_ratios(seconds["peft-best"], seconds["ours"])
    report.measure(f"{family}: ours / peft-best", ratios, "x")
    report.target(f"{family}: peak memory, ours / peft-best", [peaks["ours"] / peaks["peft-best"]], 0.8, at_most=True)
    return ratios


def measure_families(report: Report, chosen: str, args: argparse.Namespace, work: Path) -> None:
    """Measures GPT-2 and the chosen families, each against GPT-2's ratio of the same run."""
    expected = statistics.median(measure_family(report, "gpt2", args, work))
    for family in (name for name in FAMILIES if name != "gpt2" and chosen in ("all", name)):
        ratios = measure_family(report, family, args, work)
        report.target(f"{family}: ours / peft-best, as a share of gpt2's", [100 * one / expected for one in ratios], 85, "%")


def benchmark(args: argparse.Namespace, work: Path) -> Report:
    report = Report()
    if args.family is not None:
        measure_families(report, args.family, args, work)
        return report
    for model in ("gpt2", "smollm2") if args.model is None else (args.model,):
        measure_model(report, model, args, work)
    return report


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=tuple(MODELS), help="gpt2 and smollm2 if not given")
    parser.add_argument("--family", choices=("all", *FAMILIES), help="measure this family, or all of them, next to GPT-2")
    default = "bf16" if torch.cuda.is_available() else "fp32"
    parser.add_argument("--precision", choices=("fp32", "bf16"), default=default,
                        help="of frozen weights, on every side (default: %(default)s)")


if __name__ == "__main__":
    sys.exit(common.main(__doc__, benchmark, options))
