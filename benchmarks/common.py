"""Shared parts of the benchmarks: options, samples of CoLA, both sides' models, alternation, and one form of report.

A benchmark is a function (args, work folder) -> Report; `main` runs it. Every printed figure was measured in the same run.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

# Before the libraries are imported, which read these. Every model is on the disk, and one line a round on stderr replaces
# the progress bars, which would print while the clock runs.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
ROOT = Path(__file__).resolve().parent.parent

import torch  # noqa: E402 (reads the environment)
from torch import Tensor  # noqa: E402
from transformers import AutoConfig, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel  # noqa: E402

import data_utils  # noqa: E402
import speed  # noqa: E402
import train_utils  # noqa: E402
from benchmarks import command  # noqa: E402
from data.backbones import load_causal_lm, load_tokenizer  # noqa: E402
from data.mpnet import mpnet_folder  # noqa: E402
from data_utils import Batch, Split  # noqa: E402
from machine.errors import UserError  # noqa: E402
from machine.hardware import cpu_description, cpu_name, device  # noqa: E402, F401 (device: for the benchmarks)
from model import TextClassifier, lora_layers  # noqa: E402
from record.files import make_folder  # noqa: E402
from record.folder import git_commit  # noqa: E402

LABELS, MAX_LENGTH = 2, 512
TOLERANCE = 1e-4  # between the two sides' losses on one batch


# ---------------------------------------------------------------- figures

def summary(values: Sequence[float]) -> dict[str, float]:
    """Returns the median, the smallest and the largest value."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def paired_ratios(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Returns a / b round by round: a slow round of the machine slows both sides of its ratio."""
    return [x / y for x, y in zip(a, b, strict=True)]


def alternate(sides: dict[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Calls every side once a round with the round's number.

    Returns:
        The value of each side (seconds, or a rate), round by round.
    """
    # Odd rounds go backwards: the side that runs after a hot one is not always the same.
    results = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[::-1 if number % 2 else 1]:
            results[name].append(sides[name](number))
        last = ", ".join(f"{name} {values[-1]:.3g}" for name, values in results.items())
        print(f"round {number + 1}/{rounds}: {last}", file=sys.stderr, flush=True)
    return results


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a text table: the first column aligned to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for line in (header, ["-" * width for width in widths], *rows):
        figures = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        lines.append("  ".join([line[0].ljust(widths[0]), *figures]).rstrip())
    return "\n".join(lines)


def figure(value: float) -> str:
    """Formats a number for a table: three significant digits, or the whole part of a number from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


@dataclass
class Report:
    """Collects the checks and measurements of a benchmark, and its targets next to the measured values."""

    checks: list[dict] = field(default_factory=list)
    measurements: list[dict] = field(default_factory=list)
    targets: list[dict] = field(default_factory=list)

    def check(self, what: str, difference: float, tolerance: float) -> None:
        """Stops the benchmark unless both sides compute the same."""
        # Not `difference > tolerance`: NaN has to fail too.
        if not difference <= tolerance:
            raise SystemExit(f"{what}: the sides differ by {difference:g}; at most {tolerance:g} is allowed")
        self.checks.append({"what": what, "difference": difference, "tolerance": tolerance})

    def check_bits(self, what: str, a: Tensor, b: Tensor) -> None:
        """Stops the benchmark unless both are equal bit for bit and not all zeros."""
        difference = 0.0 if torch.equal(a, b) else max(float((a - b).abs().max()), 1e-45)
        self.check(what, difference if a.any() else float("nan"), 0.0)

    def measure(self, what: str, values: Sequence[float], unit: str) -> None:
        self.measurements.append({"what": what, "unit": unit, **summary(values)})

    def target(self, what: str, values: Sequence[float], goal: float, unit: str = "x", at_most: bool = False) -> None:
        """Notes a target next to the measured median."""
        measured = summary(values)
        met = measured["median"] <= goal if at_most else measured["median"] >= goal
        self.targets.append({"what": what, "unit": unit, **measured,
                             "target": f"{'<=' if at_most else '>='} {goal:g}", "met": met})

    def text(self) -> str:
        def cells(row: dict) -> list[str]:
            return [row["what"], row["unit"], *(figure(row[key]) for key in ("median", "min", "max"))]

        columns = ["unit", "median", "min", "max"]
        return "\n\n".join((
            table(["checked before timing", "difference", "allowed"],
                  [[row["what"], f"{row['difference']:.1e}", f"{row['tolerance']:.0e}"] for row in self.checks]),
            table(["measured", *columns], [cells(row) for row in self.measurements]),
            table(["target", *columns, "target", ""],
                  [[*cells(row), row["target"], "met" if row["met"] else "NOT met"] for row in self.targets])))


def cpu_generation() -> str:
    """Returns family and model of the CPU where the system tells them, and the widest vectors of PyTorch's kernels."""
    found = [re.search(rf"^{name}\s*: (\d+)$", cpu_description(), re.MULTILINE) for name in ("cpu family", "model")]
    numbers = [f"{name} {match[1]}" for name, match in zip(("family", "model"), found, strict=True) if match]
    return ", ".join([" ".join(numbers)] * bool(numbers) + [torch.backends.cpu.get_cpu_capability()])


def machine() -> dict:
    """Describes the machine; the load average at the start shows whether it was quiet."""
    return {"cpu": cpu_name(), "cpu_generation": cpu_generation(), "cores": len(os.sched_getaffinity(0)),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "threads": torch.get_num_threads(), "load_average": os.getloadavg()[0], "system": platform.platform(),
            "python": platform.python_version(), "git_commit": git_commit(),
            **{name: version(name) for name in ("torch", "transformers", "peft")}}


def result(measured: dict) -> str:
    """Returns one JSON object: the measurements, their program, command and machine."""
    return json.dumps({"benchmark": Path(sys.argv[0]).stem, "command": command(), "machine": machine(), **measured})


# ---------------------------------------------------------------- the program around a benchmark

def main(doc: str, benchmark: Callable[[argparse.Namespace, Path], Report],
         options: Callable[[argparse.ArgumentParser], None] = lambda parser: None) -> int:
    """Parses, runs the benchmark in a temporary folder, prints a table or one JSON object; returns the exit status."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/cola", metavar="DIR",
                        help="folder with CoLA's three TSV files (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few batches and rounds: a look, not a result")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--threads", type=int, help="of PyTorch's matrix products; its own choice if not given")
    options(parser)
    args = parser.parse_args()
    set_threads(args)
    # Before the benchmark, or its own load would count as the machine's.
    described = machine()
    try:
        args.task = data_utils.load_task("cola", args.data)
        with tempfile.TemporaryDirectory() as work:
            report = benchmark(args, Path(work))
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(result({"quick": args.quick, "machine": described, **vars(report)}))
    else:
        print("\n".join(f"{name}: {value}" for name, value in described.items()) + "\n\n" + report.text())
    return 0


def set_threads(args: argparse.Namespace) -> None:
    """Sets the threads of this process and of those it starts."""
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
        torch.set_num_threads(args.threads)


def synchronize() -> None:
    """Waits for the GPU to finish, so that a clock read afterwards counts its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---------------------------------------------------------------- data

def tokenizer_of(base: str):
    """Loads the model's tokenizer with a pad token, so that every side pads with the same id."""
    tokenizer = load_tokenizer(base)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def batches_of(split: Split, base: str, batch_size: int) -> list[Batch]:
    """Returns a split in this project's batches, shortest first; the same in every process."""
    return data_utils.split_large(data_utils.make_batches(split, tokenizer_of(base), MAX_LENGTH, batch_size, seed=1,
                                                          shared_prefixes=True))


def thinned(split: Split, rows: int) -> Split:
    """Takes about `rows` sentences, evenly spread over the file."""
    step = max(1, len(split) // rows)
    return Split(split.sentences[::step], split.labels[::step], split.sources[::step])


def spread_sample(count: int, total: int, seed: int) -> list[int]:
    """Samples `count` of the numbers below `total`, one from each of `count` equal ranges.

    From batches in order of length it takes short and long ones in the proportion of the whole epoch.
    """
    draw = random.Random(seed).random()
    return [int((i + draw) * total / count) for i in range(count)] if count < total else list(range(total))


def padding_percent(lengths: Sequence[int], order: Sequence[int], batch_size: int) -> float:
    """Returns the share of pads, in percent, of rows batched in this order and padded to the longest row of each batch."""
    real = computed = 0
    for start in range(0, len(order), batch_size):
        group = [lengths[row] for row in order[start:start + batch_size]]
        real, computed = real + sum(group), computed + max(group) * len(group)
    return 100.0 * (1 - real / computed)


# ---------------------------------------------------------------- models

def base_of(model: str, work: Path) -> str:
    """Makes a folder with the base model as safetensors, for every side: `gpt2` (124M, random weights), `smollm2`, `mpnet`.

    GPT-2's weights do not change its speed. Its tokenizer is SmolLM2's: a trained one, with ids below GPT-2's 50,257.
    """
    # Safetensors already.
    if model == "mpnet":
        return str(mpnet_folder())
    folder = work / model
    if not folder.exists():
        torch.manual_seed(0)
        lm = GPT2LMHeadModel(GPT2Config()) if model == "gpt2" else load_causal_lm("smollm2")
        tokenizer_of("smollm2").save_pretrained(make_folder(folder))
        # Loading has dequantised the weights; the library refuses to save a model still marked as quantised.
        lm.hf_quantizer = None
        lm.save_pretrained(folder)
    return str(folder)


def peft_classifier(base: str, adapter: Path, pad_token_id: int, best: bool):
    """Builds PEFT's side: `transformers`' own classifier of the same base under the adapter and head in a folder.

    Args:
        best: the fused form of GPT-2's activation and no dropout; else as the documentation shows it: the
            model's own activation and dropout, and 0.1 on the inputs of A.
    """
    from peft import LoraConfig, PeftModel

    fast = {"gpt2": {"activation_function": "gelu_pytorch_tanh", "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
            "mpnet": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}
    net = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=LABELS, pad_token_id=pad_token_id, dtype=torch.float32,
        **(fast.get(AutoConfig.from_pretrained(base).model_type, {}) if best else {}))
    config = LoraConfig.from_pretrained(adapter)
    config.lora_dropout = 0.0 if best else 0.1
    return PeftModel.from_pretrained(net, adapter, config=config, is_trainable=True)


def as_if_trained(classifier: TextClassifier) -> TextClassifier:
    """Gives B and the head, which start at zero, random values, and installs the fast path.

    Zeros would hide a difference between the sides.
    """
    torch.manual_seed(0)
    parameters = [layer.lora_B for layer in lora_layers(classifier.net).values()]
    for name in classifier.head_names():
        parameters += classifier.net.get_submodule(name).parameters()
    with torch.no_grad():
        for p in parameters:
            p.normal_(std=0.02)
    speed.install(classifier)
    return classifier


def epoch_seconds(model, batches: list[Batch], objective: train_utils.Objective, **more) -> float:
    """Returns the training seconds of one epoch through `train_utils.fit`, the loop of every run."""
    options = train_utils.TrainOptions(seed=1, epochs=1, lr=1e-4, warmup=0.0, schedule="constant", **more)
    # `fit` validates after the epoch, off the clock: one batch is enough.
    first = replace(batches[0], rows=torch.arange(len(batches[0].rows)))
    data = train_utils.Data(batches, {"in_domain": [first]})
    return train_utils.fit(model, data, objective, options).history[-1]["seconds"]
