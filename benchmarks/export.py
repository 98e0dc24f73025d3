"""Measures the exported student: its size, the time of one sentence on one core, sentences a second, the cost of int8.

    python benchmarks/export.py --threads 1
    python benchmarks/export.py --quick --json

    size         student.onnx at the default size, with GPT-2's 50,257 rows of embeddings, in float32 and int8
    one sentence from the text to its logits, tokenisation included, the mean over CoLA's development sentences
    sentences/s  the same sentences sorted by length in batches of 32, tokenised before, against the student in PyTorch
    int8         accuracy and MCC on these sentences before and after, of a student trained on CoLA's labels

The tokenizer is SmolLM2's, with ids below GPT-2's 50,257.
"""
from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from benchmarks import common  # first: it sets the environment that libraries read when imported
from benchmarks.common import Report, paired_ratios
from data_utils import Batch, Split, encode, make_batches
from layers import RNNConfig
from metrics.classification import scores
from model import DistilRNN
from options.schema import TrainOptions
from serving import export, export_student
from serving.texts import Reading
from train_utils import Data, fit, label_loss

GPT2_TOKENS, BATCH_SIZE, MAX_LENGTH = 50_257, 32, 128


def trained_student(train: list[Batch], dev: list[Batch], epochs: int) -> DistilRNN:
    """Returns a student of the default sizes, trained on the labels alone."""
    torch.manual_seed(0)
    student = DistilRNN(RNNConfig(GPT2_TOKENS, common.LABELS))
    options = TrainOptions(seed=0, epochs=epochs, batch_size=BATCH_SIZE, lr=3e-3)
    fit(student, Data(train, {"dev": dev}, "dev"), label_loss(0.0), options)
    return student.eval()


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def benchmark(args: argparse.Namespace, work: Path) -> Report:
    report, task, threads = Report(), args.task.limit(200) if args.quick else args.task, args.threads or 1
    torch.set_num_threads(threads)
    tokenizer = common.tokenizer_of("smollm2")
    rows = Split([], [])
    for split in task.dev.values():
        rows.sentences.extend(split.sentences)
        rows.labels.extend(split.labels)
    train, dev = (make_batches(split, tokenizer, MAX_LENGTH, BATCH_SIZE, seed=0) for split in (task.train, rows))
    # Trained on labels: int8's effect on the accuracy of random weights would say nothing.
    student = trained_student(train, dev, 1 if args.quick else 4)
    folders = {}
    for name in ("float32", "int8"):
        folders[name] = work / name
        export_student.write_student(student, tokenizer, Reading(("0", "1"), MAX_LENGTH), rows, folders[name],
                             int8=name == "int8", say=lambda text: print(text, file=sys.stderr))
    # As many threads as PyTorch has: a session's own choice is all cores.
    sessions = {name: export.session(folder / "student.onnx", threads) for name, folder in folders.items()}
    portable = export.portable_tokenizer(tokenizer, MAX_LENGTH, "tail")
    # Tokenised before the clock starts, for both sides, and sorted: few pads in a batch.
    ids = sorted(encode(tokenizer, rows.sentences, MAX_LENGTH), key=len)
    inputs = export.padded(ids, BATCH_SIZE)
    in_torch = []
    for batch in inputs:
        in_torch.append({name: torch.from_numpy(value) for name, value in batch.items()})
    with torch.inference_mode():
        expected = np.concatenate([student(**batch).numpy() for batch in in_torch])
    difference = np.abs(export.onnx_logits(sessions["float32"], ids, BATCH_SIZE) - expected).max()
    report.check("logits: onnxruntime, float32, against PyTorch", float(difference), export_student.TOLERANCE)

    def one_by_one(session) -> float:
        """Returns milliseconds a sentence, tokenisation included."""
        # A row at a time, as a service without batching answers.
        def call():
            for text in rows.sentences:
                row = portable.encode(text)
                session.run(["logits"], {"input_ids": np.array([row.ids]), "attention_mask": np.array([row.attention_mask])})
        return 1000 * seconds(call) / len(rows)

    def in_batches(session) -> float:
        return len(rows) / seconds(lambda: [session.run(["logits"], batch) for batch in inputs])

    @torch.inference_mode()
    def by_pytorch(_) -> float:
        return len(rows) / seconds(lambda: [student(**batch) for batch in in_torch])

    rounds = 2 if args.quick else 7
    single = common.alternate({name: lambda _, session=session: one_by_one(session) for name, session in sessions.items()},
                              rounds)
    batched = {name: lambda _, session=session: in_batches(session) for name, session in sessions.items()}
    rates = common.alternate({"PyTorch": by_pytorch, **batched}, rounds)
    sizes = {name: (folder / "student.onnx").stat().st_size / 1e6 for name, folder in folders.items()}
    report.target("int8: size of student.onnx", [sizes["int8"]], 8, "MB", at_most=True)
    report.target("int8: one sentence", single["int8"], 1, "ms", at_most=True)
    report.measure("float32: size of student.onnx", [sizes["float32"]], "MB")
    report.measure("float32: one sentence", single["float32"], "ms")
    for name, values in rates.items():
        report.measure(f"{name}: batches of {BATCH_SIZE}", values, "sentences/s")
    report.measure("batches: int8 / PyTorch", paired_ratios(rates["int8"], rates["PyTorch"]), "x")
    # Rounding weights to int8 changes predictions: the size is worth nothing without this figure.
    labels = torch.tensor(rows.labels)
    for name, session in sessions.items():
        logits = export.onnx_logits(session, encode(tokenizer, rows.sentences, MAX_LENGTH))
        measured = scores(torch.from_numpy(logits), labels)
        report.measure(f"{name}: accuracy", [measured["accuracy"]], "")
        report.measure(f"{name}: MCC", [measured["mcc"]], "")
    return report


if __name__ == "__main__":
    sys.exit(common.main(__doc__, benchmark))
