"""Measures an exported classifier next to PyTorch: size, sentences a second, the cost of int8.

    python benchmarks/export_teacher.py --threads 1 --run runs/LoRA-12345

    size         classifier.onnx in float32 and int8; PyTorch's is that of the merged weights in safetensors
    sentences/s  in batches of 32 of about equal length, tokenised before: onnxruntime, the merged classifier in PyTorch by
                 transformers' own blocks, and by this project's fast path, in turn
    int8         accuracy and MCC before and after; verdicts that stay

The sentences are development rows of the run, evenly spread.
"""
from __future__ import annotations

import argparse
import copy
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks import common  # first: it sets the environment that libraries read when imported
from benchmarks.common import Report, paired_ratios
from data_utils import encode
from experiments import ship
from record.folder import read_run
from serving import export, export_teacher, merge
from serving.answers import cost_of_int8
from serving.texts import Reading


def benchmark(args: argparse.Namespace, work: Path) -> Report:
    report, threads = Report(), args.threads or 1
    torch.set_num_threads(threads)
    config, _ = read_run(args.run, "LoRA")
    reading = Reading.of(config)
    classifier, tokenizer = ship.load_text_classifier(args.run, config, "an ONNX file")
    rows = ship.development_rows(args.run, config["options"], reading.classes, tokenizer,
                                 lambda text: print(text, file=sys.stderr))
    rows = common.thinned(rows, 64 if args.quick else args.rows)
    ids = encode(tokenizer, rows.sentences, reading.max_length, reading.truncate)
    merged = export_teacher.merged_classifier(classifier)
    files = {"float32": work / "float32.onnx", "int8": work / "int8.onnx"}
    export_teacher.write_graph(merged, files["float32"])
    export_teacher.write_int8(*files.values())
    sessions = {name: export.session(path, threads) for name, path in files.items()}
    fast = copy.deepcopy(merged)
    common.speed.install(fast)
    # Each side answers every sentence before the clock starts.
    answers = {name: export.onnx_logits(session, ids) for name, session in sessions.items()}
    for name, model in (("transformers' blocks", merged), ("the fast path", fast)):
        expected = export.by_batches(partial(export_teacher.torch_logits, model), ids)
        report.check(f"logits: onnxruntime, float32, against PyTorch by {name}",
                     export.largest_difference(answers["float32"], expected), export_teacher.TOLERANCE)

    order = sorted(ids, key=len)
    batches = export.padded(order)
    # A few batches, short and long ones, so that a slow moment of the machine meets all sides alike.
    batches = [batches[i] for i in common.spread_sample(args.batches, len(batches), seed=0)]
    sentences = sum(len(batch["input_ids"]) for batch in batches)

    def rate(compute) -> float:
        start = time.perf_counter()
        for batch in batches:
            compute(batch)
        return sentences / (time.perf_counter() - start)

    sides = {"PyTorch": partial(export_teacher.torch_logits, merged),
             "PyTorch, fast path": partial(export_teacher.torch_logits, fast),
             **{name: lambda batch, session=session: session.run(["logits"], batch) for name, session in sessions.items()}}
    rates = common.alternate({name: lambda _, compute=compute: rate(compute) for name, compute in sides.items()},
                             2 if args.quick else args.rounds)
    weights = sum(value.nbytes for value in merge.plain_state(merged).values()) / 1e6
    report.measure("PyTorch: size of the merged weights", [weights], "MB")
    for name, path in files.items():
        report.measure(f"{name}: size of classifier.onnx", [export.megabytes(path)], "MB")
    for name, values in rates.items():
        report.measure(f"{name}: batches of {export.BATCH}", values, "sentences/s")
    for name in sessions:
        report.measure(f"batches: {name} / PyTorch", paired_ratios(rates[name], rates["PyTorch"]), "x")
        report.measure(f"batches: {name} / PyTorch, fast path", paired_ratios(rates[name], rates["PyTorch, fast path"]), "x")
    # Rounding weights to int8 changes predictions: the size is worth nothing without this figure.
    cost = cost_of_int8(reading.problem, answers["float32"], answers["int8"], rows.labels)
    report.measure("sentences", [cost["sentences"]], "")
    for name in sessions if rows.labels else ():
        report.measure(f"{name}: accuracy", [cost[name]["accuracy"]], "")
        report.measure(f"{name}: MCC", [cost[name]["mcc"]], "")
    report.measure("int8: verdicts of float32", [cost["same_verdicts"] / cost["sentences"]], "")
    return report


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished LoRA run", metavar="RUN_DIR")
    parser.add_argument("--rows", type=int, default=10 ** 9, help="development rows; all if not given")
    parser.add_argument("--batches", type=int, default=8, help="batches that are timed (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="of all sides in turn (default: %(default)s)")


if __name__ == "__main__":
    sys.exit(common.main(__doc__, benchmark, options))
