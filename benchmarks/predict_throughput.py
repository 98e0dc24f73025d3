"""Measures `predict --file` in rows a second, against the model's own rate, and reckons the cost of a billion rows.

    python benchmarks/predict_throughput.py --run runs/distil-12345 --run runs/LoRA-12345 --threads 1 --json

    model        sentences/s of the model alone, tokenised and batched before, as `sentences_per_second` in summary.json
    predict      rows/s of reading a text file, tokenising, computing and writing JSON Lines
    per core     rows for each second of processor time, of either: another program on the machine changes it little
    billion      hours of one core for 1,000,000,000 such rows

The rows are short sentences: those of the built-in grammar for its own pair, CoLA's for other models.
"""
from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import common  # first: it sets the environment that libraries read when imported
from benchmarks.common import Report, paired_ratios
from data import grammar
from data_utils import Split, make_batches
from experiments import distil_record, predict_file
from experiments.predict import RunPredictor

GOAL = 0.4  # of the model's own rate per core
BILLION, BATCH_SIZE, MAX_LENGTH = 1_000_000_000, 32, 128


class Side:
    """Rows a second of a function that answers some number of rows: by processor time, and by the clock in `clock`."""

    def __init__(self, work: Callable[[], None], rows: int):
        self.work, self.rows, self.clock = work, rows, []

    def __call__(self, _: int) -> float:
        clock, processor = time.perf_counter(), time.process_time()
        self.work()
        # All threads of the process together.
        processor = time.process_time() - processor
        self.clock.append(self.rows / (time.perf_counter() - clock))
        return self.rows / processor


def measure(report: Report, folder: Path, args: argparse.Namespace, work: Path) -> None:
    """Measures one run."""
    predictor = RunPredictor(folder)
    sentences = args.task.train.sentences
    if predictor.reading.tiny:
        task = grammar.draw_task(random.Random(grammar.SEED), set())
        sentences = [sentence for _, _, sentence in task["in_domain_train.tsv"]]
    rows = list(itertools.islice(itertools.cycle(sentences), args.rows))
    file, out = work / "rows.txt", work / "answers.jsonl"
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    batches = {"rows": make_batches(Split(rows, [0] * len(rows)), predictor.tokenizer, MAX_LENGTH, BATCH_SIZE, 1)}

    def alone() -> None:
        distil_record.sentences_per_second(predictor.model, batches, passes=1)

    def answered() -> None:
        with out.open("w", encoding="utf-8") as lines:
            for answer in predict_file.predict_file(predictor, file):
                lines.write(predict_file.line_of(answer, True) + "\n")

    # Libraries prepare themselves at their first call.
    next(predict_file.predict_file(predictor, file))
    sides = {"model": Side(alone, len(rows)), "predict": Side(answered, len(rows))}
    found, name = common.alternate(sides, 2 if args.quick else 5), folder.name
    for side, rates in found.items():
        report.measure(f"{name}: {side}", sides[side].clock, "rows/s")
        report.measure(f"{name}: {side}, per core", rates, "rows/s of processor time")
    report.target(f"{name}: predict / model, per core", paired_ratios(found["predict"], found["model"]), GOAL)
    report.measure(f"{name}: a billion rows", [BILLION / rate / 3600 for rate in found["predict"]], "core hours")


def benchmark(args: argparse.Namespace, work: Path) -> Report:
    report = Report()
    for folder in args.run:
        measure(report, folder, args, work)
    return report


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, action="append", required=True, metavar="RUN_DIR", help="finished run")
    parser.add_argument("--rows", type=int, default=50_000, help="rows of the file (default: %(default)s)")


if __name__ == "__main__":
    sys.exit(common.main(__doc__, benchmark, options))
