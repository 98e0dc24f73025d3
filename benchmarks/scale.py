"""Measures how time and memory grow with the rows of a table: reading, tokenising and batching, an epoch, evaluation.

    python benchmarks/scale.py --json

    first start   reads a CSV of three classes, tokenises it (15 tokens a row) and makes its batches, with an empty cache
    again         the same in a new process, with the cache of the first
    epoch         makes every batch once, in the order of an epoch, without a model; the median of three or more
    evaluation    logits and scores of every row, by a model of one embedding
    memory        the peak of a fresh process, above that of its start (libraries and tokenizer loaded)

Each size runs in processes of its own. Costs of a row and their growth are of processor time, summed over all processes,
because other programs on the machine change it little. The clock's seconds are printed too.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

TOKENS, CLASSES, BATCH_SIZE, MODEL = 15, ("negative", "neutral", "positive"), 32, "smollm2"
OWN_RATE_ROWS = 100_000  # of the measurement of the tokenizer alone
EPOCH_ROWS, MOST_EPOCHS = 3_000_000, 30  # rows that the epochs of one size read together, and a limit of epochs
GIB = 2 ** 30


# ---------------------------------------------------------------- one process

def peak_memory() -> int:
    """Returns the most memory in bytes that this process had so far: unlike `ru_maxrss` it is not the parent's."""
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def processor_seconds() -> float:
    """Returns the processor time of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def measure_rows(folder: Path) -> dict[str, float]:
    """Prepares the table in a folder, goes through an epoch and evaluates; returns seconds, and bytes above the start."""
    import torch

    import data_utils
    import train_utils
    from data.backbones import load_tokenizer
    from metrics.problems import SINGLE_LABEL

    class Model(torch.nn.Module):
        def __init__(self, vocabulary: int):
            super().__init__()
            self.logits = torch.nn.EmbeddingBag(vocabulary, len(CLASSES))

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:  # (B, T) -> (B, classes)
            return self.logits(input_ids)

    tokenizer = load_tokenizer(MODEL)
    found, last, start = {}, (time.perf_counter(), processor_seconds()), peak_memory()

    def lap(name: str) -> None:
        nonlocal last
        now = time.perf_counter(), processor_seconds()
        found[name], found[f"{name} processor"] = now[0] - last[0], now[1] - last[1]
        last = now

    task = data_utils.load_task("csv", folder)
    lap("read")
    if len(task.train) > data_utils.LARGE_SPLIT:
        data_utils.tokenise(tokenizer, task.train.sentences, 128)
        lap("tokenise")
    batches = data_utils.make_batches(task.train, tokenizer, 128, BATCH_SIZE, seed=1, shared_prefixes=True)
    lap("batch")
    prepared = peak_memory() - start
    # A small table takes more epochs, because a short measurement shows the machine's noise.
    epochs = []
    for epoch in range(1, min(MOST_EPOCHS, max(3, EPOCH_ROWS // len(task.train))) + 1):
        rows = sum(len(batches[number].rows) for number in data_utils.epoch_order(len(batches), 1, epoch))
        lap("epoch")
        epochs.append((found["epoch"], found["epoch processor"]))
    found["epoch"], found["epoch processor"] = map(statistics.median, zip(*epochs, strict=True))
    scores, _ = train_utils.validate(Model(len(tokenizer)), {"rows": batches}, SINGLE_LABEL)
    lap("evaluation")
    assert rows == scores["rows"]["n"] == len(task.train)
    return {**found, "prepared_bytes": prepared, "peak_bytes": peak_memory() - start, "start_bytes": start}


def measure_tokenizer(folder: Path) -> dict[str, float]:
    """Returns the rows a second of the tokenizer's own call, with its own threads on all cores."""
    import data_utils
    from data.arrow import AT_A_TIME
    from data.backbones import load_tokenizer

    tokenizer, texts = load_tokenizer(MODEL), list(data_utils.load_task("csv", folder).train.sentences[:OWN_RATE_ROWS])
    clock, start = time.perf_counter(), processor_seconds()
    for first in range(0, len(texts), AT_A_TIME):
        tokenizer(texts[first:first + AT_A_TIME])
    return {"rate": len(texts) / (time.perf_counter() - clock), "rate processor": len(texts) / (processor_seconds() - start)}


PARTS = {"rows": measure_rows, "tokenizer": measure_tokenizer}


def in_process(part: str, folder: Path, cache: Path) -> dict[str, float]:
    """Runs one of PARTS in a fresh process, with a cache of its own."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run([sys.executable, __file__, part, str(folder)], env=environment, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


# ---------------------------------------------------------------- all sizes

def write_table(folder: Path, rows: int, words: list[str]) -> None:
    """Writes a table of random words, one token each."""
    draw = random.Random(rows)
    folder.mkdir(parents=True)
    for name, count in (("train.csv", rows), ("validation.csv", 100)):
        with open(folder / name, "w", encoding="utf-8") as file:
            file.write("text,label\n")
            for row in range(count):
                file.write(f"{' '.join(draw.choices(words, k=TOKENS))},{CLASSES[row % len(CLASSES)]}\n")


def one_token_words(sentences, tokenizer) -> list[str]:
    """Returns words of sentences that are one token, at the beginning of a text and after a space."""
    words = sorted({word for text in sentences for word in re.findall("[a-z]+", text)})
    counts = [[len(ids) for ids in tokenizer([before + word for word in words])["input_ids"]] for before in ("", " ")]
    return [word for word, one, two in zip(words, *counts, strict=True) if one == two == 1]


def benchmark(args: argparse.Namespace, work: Path):
    """Measures all sizes."""
    from benchmarks.common import Report
    from data.backbones import load_tokenizer
    from data.cache import cache_folder

    report, words, found = Report(), one_token_words(args.task.train.sentences, load_tokenizer(MODEL)), {}
    sizes = [1_000, 10_000] if args.quick else sorted(map(int, args.rows.split(",")))
    for rows in sizes:
        folder, cache = work / f"{rows}", work / f"cache-{rows}"
        write_table(folder, rows, words)
        # The model's files come from the user's own cache; the rows' place is empty.
        (cache / "lora-distil").mkdir(parents=True)
        for path in cache_folder().iterdir():
            (cache / "lora-distil" / path.name).symlink_to(path)
        first, again = in_process("rows", folder, cache), in_process("rows", folder, cache)
        report_size(report, rows, first, again)
        found[rows] = first | {"again": again}
        print(f"{rows:,} rows: {json.dumps(found[rows])}", file=sys.stderr, flush=True)
    # The tokenizer alone, on rows of the largest table.
    own = in_process("tokenizer", folder, cache)
    report.measure("the tokenizer's own call", [own["rate"]], "rows/s")
    report.measure("the tokenizer's own call, per core", [own["rate processor"]], "rows/s of processor time")
    targets(report, found, own)
    return report


def prepared(found: dict[str, float], kind: str = "") -> float:
    """Returns the seconds of reading, tokenising and batching; kind: " processor", or empty for the clock."""
    return sum(found.get(name + kind, 0.0) for name in ("read", "tokenise", "batch"))


def report_size(report, rows: int, first: dict, again: dict) -> None:
    """Adds the measurements of one size."""
    name = f"{rows:,} rows"
    for what, found in (("first start", first), ("again", again)):
        report.measure(f"{name}: {what}", [prepared(found)], "s")
        report.measure(f"{name}: {what}, processor", [prepared(found, " processor")], "s")
    report.measure(f"{name}: first start, a row", [1e6 * prepared(first, " processor") / rows], "µs of processor time")
    for part in ("epoch", "evaluation"):
        report.measure(f"{name}: {part}, a row", [1e6 * first[f"{part} processor"] / rows], "µs of processor time")
    report.measure(f"{name}: memory, prepared", [first["prepared_bytes"] / 2 ** 20], "MiB")
    report.measure(f"{name}: memory, peak", [first["peak_bytes"] / 2 ** 20], "MiB")
    if "tokenise" in first:
        report.measure(f"{name}: tokenising", [rows / first["tokenise"]], "rows/s")
        report.measure(f"{name}: tokenising, per core", [rows / first["tokenise processor"]], "rows/s of processor time")


def targets(report, found: dict[int, dict], own: dict[str, float]) -> None:
    """Adds the targets of the largest size, and its cost per row against that of a tenth of the rows.

    Args:
        own: rows of the tokenizer's own call for each second, of the clock and of processor time.
    """
    rows = max(found)
    last, name = found[rows], f"{rows:,} rows"
    report.target(f"{name}: memory, peak", [last["peak_bytes"] / GIB], 1.2, "GiB", at_most=True)
    report.target(f"{name}: again", [prepared(last["again"])], 5, "s", at_most=True)
    report.target(f"{name}: again, processor", [prepared(last["again"], " processor")], 5, "s", at_most=True)
    if "tokenise" in last:
        # On all cores, because both sides use them all; a core that other programs hold is missing on both sides.
        by_clock = rows / last["tokenise"] / own["rate"]
        report.target(f"{name}: tokenising / the tokenizer's own call, by the clock", [by_clock], 0.9)
        report.measure(f"{name}: tokenising / the tokenizer's own call, per core",
                       [rows / last["tokenise processor"] / own["rate processor"]], "x")
    if (tenth := found.get(rows // 10)) and "tokenise" in tenth:
        for part, names in (("first start", ("read", "tokenise", "batch")), ("epoch", ("epoch",)),
                            ("evaluation", ("evaluation",))):
            costs = [sum(one[f"{key} processor"] for key in names) / count for one, count in (
                (last, rows), (tenth, rows // 10))]
            report.target(f"{part}, a row: {name} / {rows // 10:,}", [costs[0] / costs[1]], 1.15, at_most=True)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", default="1000,10000,100000,1000000", metavar="N,N", help="sizes (default: %(default)s)")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in PARTS:
        print(json.dumps(PARTS[sys.argv[1]](Path(sys.argv[2]))))
        sys.exit()
    from benchmarks import common

    sys.exit(common.main(__doc__, benchmark, options))
