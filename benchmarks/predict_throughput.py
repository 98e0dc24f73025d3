"""Measures `predict --file` in rows a second, against the model's own rate, and reckons the cost of a billion rows.

    python benchmarks/predict_throughput.py --run runs/distil-12345 --run runs/LoRA-12345 --threads 1 --json

    model        sentences/s of the model alone, tokenised and batched before, as `sentences_per_second` in summary.json
    predict      rows/s of reading a text file, tokenising, computing and writing JSON Lines, the first window left out
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
from experiments import distil, predict_file
from experiments.predict import RunPredictor

GOAL = 0.4  # of the model's own rate per core
BILLION, BATCH_SIZE, MAX_LENGTH = 1_000_000_000, 32, 128


def both_rates(work: Callable[[], int]) -> tuple[float, float]:
    """Returns the rows a second of a function that returns its rows: by the clock, and by processor time."""
    clock, processor = time.perf_counter(), time.process_time()
    rows = work()
    return rows / (time.perf_counter() - clock), rows / (time.process_time() - processor)


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

    def alone(_) -> tuple[float, float]:
        return both_rates(lambda: distil.sentences_per_second(predictor.model, batches, passes=1) and len(rows))

    def answered(_) -> tuple[float, float]:
        def write() -> int:
            with out.open("w", encoding="utf-8") as lines:
                for answer in predict_file.predict_file(predictor, file):
                    lines.write(predict_file.line_of(answer, True) + "\n")
            return len(rows)
        return both_rates(write)

    # Libraries prepare themselves at their first call.
    next(predict_file.predict_file(predictor, file))
    found = common.alternate({"model": alone, "predict": answered}, 2 if args.quick else 5)
    name = folder.name
    for side, rates in found.items():
        report.measure(f"{name}: {side}", [clock for clock, _ in rates], "rows/s")
        report.measure(f"{name}: {side}, per core", [processor for _, processor in rates], "rows/s of processor time")
    own, whole = ([processor for _, processor in found[side]] for side in ("model", "predict"))
    report.target(f"{name}: predict / model, per core", paired_ratios(whole, own), GOAL)
    report.measure(f"{name}: a billion rows", [BILLION / rate / 3600 for rate in whole], "core hours")


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
