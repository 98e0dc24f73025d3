"""Measures the times that a user sees: the student's answers, `--help`, and the start of a run.

    python benchmarks/inference.py
    python benchmarks/inference.py --quick --json

    sentences/s  DistilRNN at its default sizes against its teacher, both over CoLA's development sentences batched by
                 length, on the CPU in float32: the plain one against GPT-2 124M, the one in stages against SmolLM2-135M;
                 teachers without an adapter (a merged one costs the same)
    --help       `python run.py --help` in a fresh process, from spawning it to its end
    start        `python run.py LoRA` on CoLA to the loss of its first batch, including reading and tokenising the data
                 and the check of the generated text, against a fresh process that imports the libraries and loads the
                 same model and tokenizer with `from_pretrained`
"""
from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
# The claim is about the CPU, also on a machine with a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

from benchmarks import common  # first: it sets the environment that libraries read when imported
from benchmarks.common import Report, paired_ratios
from data.backbones import PACKAGED
from data_utils import Batch
from distillation.student_size import PLAIN_SIZES, STAGED_SIZES, student_config
from experiments import distil_record
from experiments.arguments import preset
from machine import hardware
from model import DistilRNN, count_parameters, load_classifier
from options.schema import DistilOptions
from speed import install

BATCH_SIZE = 32
FIRST_STEP = """
import os, sys
import run
function_of = run.function_of
def until_the_loss(args):  # changed this late, so that the command itself imports what it needs
    import train_utils
    train_utils.label_loss = lambda *_: lambda logits, batch: os._exit(0)
    return function_of(args)(args)
run.function_of = lambda args: until_the_loss
sys.exit(run.main(sys.argv[1:]) or 1)
"""
BARE = """
import os, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
located = {"gguf_file": sys.argv[2]} if len(sys.argv) > 2 else {}
AutoTokenizer.from_pretrained(sys.argv[1], **located)
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, **located)
os._exit(0)
"""


def process_seconds(*command: str) -> float:
    """Returns the seconds of a fresh Python process in the repository's root, from spawning it to its end."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=common.ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:1])}: exit status {done.returncode}: {done.stderr[-2000:]}")
    return seconds


@torch.inference_mode()
def check_batching(report: Report, what: str, model: torch.nn.Module, batch: Batch) -> None:
    """Checks that a batch's logits equal those of its sentences one by one."""
    batch = batch.to(common.device())
    alone = [model(ids[None, :length], mask[None, :length]) for ids, mask, length in zip(
        batch.input_ids, batch.attention_mask, batch.attention_mask.sum(1).tolist(), strict=True)]
    logits = model(*batch.inputs())
    difference = float((logits - torch.cat(alone)).abs().max() / logits.abs().max())  # all zeros fail
    report.check(f"{what}: logits of a batch against its sentences alone, relative", difference, common.TOLERANCE)


def measure_student(report: Report, args: argparse.Namespace, what: str, base: str, kind: str,
                    goal: float, rounds: int) -> None:
    """Measures the student's rate against its teacher's, after checking that batching changes no logits of either."""
    task = args.task.limit(64) if args.quick else args.task
    dev = {name: common.batches_of(split, base, BATCH_SIZE) for name, split in task.dev.items()}
    teacher = common.as_if_trained(load_classifier(base, common.LABELS)[0]).to(common.device()).eval()
    parameters = count_parameters(teacher)["total"]
    torch.manual_seed(0)
    recipe = preset("distil-plain" if kind == "plain" else "distil")
    directions = recipe.get("directions", 1)  # in stages as its teacher, a decoder
    sizes = PLAIN_SIZES if kind == "plain" else STAGED_SIZES[directions]
    student = DistilRNN(student_config(len(common.tokenizer_of(base)), common.LABELS, parameters // 10, sizes,
                                       pooling=recipe.get("pooling", DistilOptions.pooling), directions=directions))
    install(student)
    student = student.to(common.device()).eval()
    sides = {f"{what}: teacher": teacher, f"{what}: student": student}
    # The longest batch with a pad: batching is where a wrong mask would show.
    padded = next(b for b in dev["in_domain"][::-1] if b.tokens < b.input_ids.numel())
    for name, model in sides.items():
        check_batching(report, name, model, padded)
        report.measure(f"{name}: parameters", [count_parameters(model)["total"]], "")
    rates = common.alternate({name: lambda _, model=model: distil_record.sentences_per_second(model, dev, passes=1)
                              for name, model in sides.items()}, rounds)
    for name, values in rates.items():
        report.measure(name, values, "sentences/s")
    report.target(f"{what}: student / teacher", paired_ratios(*reversed(rates.values())), goal)


def measure_help(report: Report) -> None:
    """Measures `run.py --help` in a fresh process."""
    # The first one reads the files from disk; the smallest is that of a warm cache.
    seconds = [process_seconds("run.py", "--help") for _ in range(5)]
    report.target("run.py --help (min is the best of 5)", seconds, 0.5, "s", at_most=True)


def located(base: str) -> list[str]:
    """Returns the arguments of `from_pretrained`: the model's folder, and its GGUF file for a packaged model."""
    if base not in PACKAGED:
        return [base]
    package, file, _ = PACKAGED[base]
    return [str(Path(importlib.util.find_spec(package).origin).parent), file]


def measure_start(report: Report, args: argparse.Namespace, name: str, base: str, work: Path, rounds: int) -> None:
    """Measures the start of a run to its first loss, against loading the model with the library alone."""
    seconds = common.alternate({
        "first step": lambda number: process_seconds(
            "-c", FIRST_STEP, "LoRA", "12345", "--model", base, "--data", str(args.data.resolve()),
            "--out", str(work / f"{name}-{number}"), "--plots", str(work)),
        "from_pretrained": lambda _: process_seconds("-c", BARE, *located(base))}, rounds)
    for side, values in seconds.items():
        report.measure(f"start, {name}: {side}", values, "s")
    report.target(f"start, {name}: first step / from_pretrained",
                  paired_ratios(seconds["first step"], seconds["from_pretrained"]), 1.3, at_most=True)


def benchmark(args: argparse.Namespace, work: Path) -> Report:
    # As every run does; it serves teacher and student alike.
    hardware.keep_freed_memory()
    report, base = Report(), common.base_of("gpt2", work)
    for kind, name, teacher, goal in (("plain", "GPT-2", base, 50), ("stages", "SmolLM2", "smollm2", 80)):
        measure_student(report, args, f"{kind}, {name}", teacher, kind, goal, 2 if args.quick else 5)
    measure_help(report)
    # A GGUF file, and a folder of safetensors.
    for name, model in (("smollm2", "smollm2"), ("gpt2", base)):
        measure_start(report, args, name, model, work, 1 if args.quick else 3)
    return report


if __name__ == "__main__":
    sys.exit(common.main(__doc__, benchmark))
