"""Measures `predict --file` in rows a second, against the model's own rate, and reckons the cost of a billion rows.

    python benchmarks/predict_throughput.py --run runs/distil-12345 --run runs/LoRA-12345 --threads 1 --json
    python benchmarks/predict_throughput.py --run runs/distil-12345 --run runs/LoRA-12345 --threads 1 --workers 2 --json

    model        sentences/s of the model alone, tokenised and batched before, as `sentences_per_second` in summary.json
    predict      rows/s of reading a text file, tokenising, computing and writing JSON Lines
    per core     rows for each second of processor time, of either; other programs on the machine change it little
    billion      hours of one core, or of CORES, for 1,000,000,000 such rows

With --workers instead: SHARDS shards answered by --engine ray, by one worker and by that many; from the first row to the
last answer, without the seconds in which Ray starts and workers load the model.

The rows are short sentences: those of the built-in grammar for its own pair, CoLA's for other models.
"""
from __future__ import annotations

import argparse
import gc
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pyarrow.parquet

from benchmarks import common  # first: it sets the environment that libraries read when imported
from benchmarks.common import Report, paired_ratios
from data import grammar
from data_utils import Split, make_batches
from experiments import distil_record, predict_file, predict_ray
from experiments.predict import RunPredictor
from experiments.predict_file import Counts
from experiments.predict_shards import Shards
from record.files import read_json, write_json

GOAL = 0.4  # of the model's own rate per core
BILLION, BATCH_SIZE, MAX_LENGTH = 1_000_000_000, 32, 128
SHARDS, CORES = 8, 100


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


def rows_for(predictor: RunPredictor, args: argparse.Namespace) -> list[str]:
    """Returns sentences that the run's model knows, as many as --rows says."""
    sentences = args.task.train.sentences
    if predictor.reading.tiny:
        task = grammar.draw_task(random.Random(grammar.SEED), set())
        sentences = [sentence for _, _, sentence in task["in_domain_train.tsv"]]
    return list(itertools.islice(itertools.cycle(sentences), args.rows))


def measure(report: Report, folder: Path, args: argparse.Namespace, work: Path) -> None:
    """Measures one run in one process."""
    predictor = RunPredictor(folder)
    rows = rows_for(predictor, args)
    file, out = work / "rows.txt", work / "answers.jsonl"
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    batches = {"rows": make_batches(Split(rows, [0] * len(rows)), predictor.tokenizer, MAX_LENGTH, BATCH_SIZE, 1)}

    def alone() -> None:
        distil_record.sentences_per_second(predictor.model, batches, passes=1)

    def answered() -> None:
        with out.open("w", encoding="utf-8") as lines:
            for answer in predict_file.predict_file(predictor, file):
                lines.write(predict_file.line_of(answer, True) + "\n")

    # run.py hides its libraries from the garbage collector, which would search them again and again; so does this program.
    gc.freeze()
    # Libraries prepare themselves at their first call.
    next(predict_file.predict_file(predictor, file))
    sides = {"model": Side(alone, len(rows)), "predict": Side(answered, len(rows))}
    found, name = common.alternate(sides, 2 if args.quick else 5), folder.name
    for side, rates in found.items():
        report.measure(f"{name}: {side}", sides[side].clock, "rows/s")
        report.measure(f"{name}: {side}, per core", rates, "rows/s of processor time")
    report.target(f"{name}: predict / model, per core", paired_ratios(found["predict"], found["model"]), GOAL)
    cost(report, f"{name}: a billion rows", found["predict"])


def cost(report: Report, label: str, rates: list[float]) -> None:
    """Reckons the cost of a billion rows from rows a second of one core."""
    hours = [BILLION / rate / 3600 for rate in rates]
    report.measure(label, hours, "core hours")
    report.measure(f"{label} on {CORES} cores", [one / CORES for one in hours], "hours")


def measure_ray(report: Report, folder: Path, work: Path, rows: list[str], workers: int) -> None:
    """Measures one run over a folder of shards with some workers of Ray, which is connected."""
    label = f"{folder.name}: Ray, {workers} worker{'s' * (workers > 1)}"
    with tempfile.TemporaryDirectory(dir=work) as place:
        source, out, times = (Path(place) / name for name in ("shards", "answers", "times"))
        source.mkdir()
        times.mkdir()
        for number in range(SHARDS):
            pyarrow.parquet.write_table(pyarrow.table({"sentence": rows[number::SHARDS]}), source / f"{number}.parquet")
        shards = Shards.of(source, out, {}, None, None)
        load = partial(load_timed, folder.absolute(), shards, times)
        shards.write(lambda names: predict_ray.answers(load, names, workers))
        found = [read_json(path) for path in times.iterdir()]
    seconds = max(one["end"] for one in found) - min(one["begin"] for one in found)
    rates = [one["rows"] / one["processor"] for one in found]
    report.measure(label, [sum(one["rows"] for one in found) / seconds], "rows/s")
    report.measure(f"{label}, per core", rates, "rows/s of processor time")
    cost(report, f"{label}, a billion rows", rates)


def load_timed(run: Path, shards: Shards, times: Path) -> Callable[[str], Counts]:
    """Loads a run in a worker; returns a function that answers a shard and writes down its seconds."""
    predictor = RunPredictor(run)

    def answer(name: str) -> Counts:
        begin, processor = time.time(), time.process_time()
        counts = shards.answer(predictor, name)
        write_json(times / f"{name}.json", {"rows": counts.rows, "begin": begin, "end": time.time(),
                                            "processor": time.process_time() - processor})
        return counts

    # Libraries prepare themselves at their first call.
    predictor.classify([("the cat", [])])
    return answer


def benchmark(args: argparse.Namespace, work: Path) -> Report:
    report = Report()
    if args.workers is None:
        for folder in args.run:
            measure(report, folder, args, work)
        return report
    with predict_ray.connected(None, args.workers):
        for folder in args.run:
            rows = rows_for(RunPredictor(folder), args)
            for workers in sorted({1, args.workers}):
                measure_ray(report, folder, work, rows, workers)
    return report


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, action="append", required=True, metavar="RUN_DIR", help="finished run")
    parser.add_argument("--rows", type=int, default=50_000, help="rows of the file (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="workers of Ray that answer a folder; one process if not given")


if __name__ == "__main__":
    sys.exit(common.main(__doc__, benchmark, options))
