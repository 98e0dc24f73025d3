"""Runs every GPU check and benchmark, one after the other (`make bench-gpu`).

    python benchmarks/gpu.py
    python benchmarks/gpu.py --quick       few batches and rounds: a look, nothing is written

Writes benchmarks/results/<program>_<gpu>.json for each program below; without a CUDA GPU it says so in one line and ends
with status 2. A failed program is named at the end, and the others' results stand.

    gpu.py --checks       logits of transformers' own classes and of PEFT, in float32 and in bf16; a run stopped and
                          resumed with --deterministic to the same bytes; the peak memory of that run
    train_throughput.py   LoRA in bf16 against PEFT and the Trainer at their best: tokens/s and peak memory
    frozen_reuse.py       cached features and logits: the same bits as fresh ones, and what they save
    inference.py          the student against its teacher
"""
from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from transformers import AutoModelForSequenceClassification

from adapters import peft_layout
from benchmarks import common  # first: it sets the environment that libraries read when imported
from benchmarks.common import ROOT, Report, device
from data_utils import Batch
from fast.matmul import set_precision
from machine import hardware
from model import LoRAOptions, inject_lora, load_classifier

PROGRAMS = ("gpu.py --checks", "train_throughput.py", "frozen_reuse.py", "inference.py")
RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1e-4  # of float32 logits, relative to the largest one if that is above 1
BATCH_SIZE = 16


# ---------------------------------------------------------------- the checks

def largest_difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Returns the largest difference of logits (B, labels), batch by batch, relative to the largest one if above 1."""
    size = max(1.0, *(float(one.abs().max()) for one in b))
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) / size


@torch.inference_mode()
def logits_of(model: Callable, batches: list[Batch], precision: str = "fp32") -> list[torch.Tensor]:
    """Returns each batch's logits (B, labels) in float32; `precision` bf16 is autocast, as in PEFT and the Trainer."""
    found = []
    for batch in batches:
        batch = batch.to(device())
        with torch.autocast(device().type, torch.bfloat16, enabled=precision == "bf16"):
            found.append(model(batch).float())
    return found


def check_logits(report: Report, name: str, work: Path, batches_of_base: Callable) -> None:
    """Holds the logits of a model to those of transformers' own class, and with an adapter to PEFT's."""
    base, adapter = common.base_of(name, work), common.make_folder(work / f"{name}-adapter")
    batches, pad = batches_of_base(base), common.tokenizer_of(base).pad_token_id

    def by_library(net):
        return lambda batch: net(input_ids=batch.input_ids,
                                 attention_mask=hardware.send(batch.attention_mask, batch.input_ids.device)).logits

    ours = load_classifier(base, common.LABELS)[0]
    common.as_if_trained(ours).to(device()).eval()
    library = AutoModelForSequenceClassification.from_pretrained(base, num_labels=common.LABELS, pad_token_id=pad,
                                                                 dtype=torch.float32)
    library.score.load_state_dict(ours.net.score.state_dict())
    library.to(device()).eval()
    report.check(f"{name}: float32 logits, ours and transformers'", largest_difference(
        logits_of(lambda batch: ours(*batch.inputs()), batches), logits_of(by_library(library), batches)), TOLERANCE)

    torch.manual_seed(0)
    inject_lora(ours.net, LoRAOptions())
    common.as_if_trained(ours).to(device()).eval()
    peft_layout.save_adapter(ours, adapter, base)
    peft = common.peft_classifier(base, adapter, pad, best=False).to(device()).eval()
    exact, expected = logits_of(lambda batch: ours(*batch.inputs()), batches), logits_of(by_library(peft), batches)
    report.check(f"{name}: float32 logits under an adapter, ours and PEFT's", largest_difference(exact, expected), TOLERANCE)
    # bf16 has no tolerance: the figures are each side's distance from its own float32.
    set_precision(ours.net.base_model, "bf16")
    sides = {"ours": (logits_of(lambda batch: ours(*batch.inputs()), batches), exact),
             "PEFT's, by autocast": (logits_of(by_library(peft), batches, "bf16"), expected)}
    for side, (rough, full) in sides.items():
        same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(rough, full, strict=True)])
        report.measure(f"{name}: bf16 logits from float32's, {side}", [largest_difference(rough, full)], "")
        report.measure(f"{name}: predictions that bf16 leaves as they are, {side}", [100 * float(same.float().mean())], "%")


def run(*words: str, until: Path | None = None) -> int:
    """`python run.py` in a process of its own, asked to stop once the file `until` is there; returns its exit status."""
    # Asked as a user asks, by a signal, once there is a checkpoint to resume from.
    process = subprocess.Popen([sys.executable, "run.py", *words], cwd=ROOT, stdout=subprocess.DEVNULL,
                               env={**os.environ, "HF_HUB_OFFLINE": "1"})
    while until is not None and process.poll() is None:
        if until.exists():
            process.send_signal(signal.SIGTERM)
            until = None
        time.sleep(0.05)
    return process.wait()


def check_resume(report: Report, args: argparse.Namespace, work: Path) -> None:
    """Stops a run in bf16 with dropout, resumes it, and compares the adapter's bytes with an uninterrupted run's."""
    def line(name: str) -> list[str]:
        return ["LoRA", "12345", "--model", common.base_of("gpt2", work), "--task", "cola",
                "--data", str(args.data.resolve()),
                "--limit", "512", "--epochs", "3", "--device", device().type, "--precision", "bf16", "--dropout", "0.1",
                "--deterministic", "--save-every", "10steps", "--no-plots", "--out", str(work / name)]

    # Two whole runs first: if they differ, the machine is not deterministic, and resuming is not to blame.
    begun = work / "stopped/checkpoint.safetensors"
    statuses = [run(*line("whole")), run(*line("again")), run(*line("stopped"), until=begun),
                run(*line("stopped"), "--resume")]
    if statuses != [0, 0, 128 + signal.SIGTERM, 0]:
        raise SystemExit(f"resume: the runs ended with {statuses}; expected 0, 0, {128 + signal.SIGTERM}, 0")
    adapters = [(work / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "again", "stopped")]
    for what, other in zip(("run again", "stopped and resumed"), adapters[1:], strict=True):
        report.check(f"--deterministic: bytes of the adapter that differ, {what}",
                     sum(a != b for a, b in zip(adapters[0], other, strict=True)), 0)
    train = json.loads((work / "whole/summary.json").read_text())["train"]
    report.measure("a run in bf16: peak memory", [train["peak_memory_bytes"] / 2 ** 20], "MiB")
    report.measure("a run in bf16: training", [train["tokens_per_second"]], "tokens/s")


def checks(args: argparse.Namespace, work: Path) -> Report:
    """Returns the report of all checks; the first that fails ends the program."""
    report, step = Report(), 8 if args.quick else 2

    def batches_of_base(base: str) -> list[Batch]:
        return common.batches_of(args.task.dev["in_domain"], base, BATCH_SIZE)[::step]

    for name in ("gpt2", "smollm2"):
        check_logits(report, name, work, batches_of_base)
    check_resume(report, args, work)
    return report


# ---------------------------------------------------------------- one program after the other

def result_file(program: str, gpu: str) -> Path:
    """Returns the file of a program's result, named after the program and the GPU."""
    stem = program.partition(".py")[0] + ("_checks" if "--checks" in program else "")
    return RESULTS / f"{stem}_{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def run_all(words: list[str], quick: bool) -> int:
    """Runs every program in a process of its own, so that each has the GPU's memory to itself."""
    gpu, failed = torch.cuda.get_device_name(), []
    for program in PROGRAMS:
        name, *more = program.split()
        print(f"{program} on {gpu}", file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, f"benchmarks/{name}", *more, *words, "--json"], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE)
        if done.returncode:
            failed.append(f"{program} (exit status {done.returncode})")
        elif quick:
            print(done.stdout)
        else:
            path = result_file(program, gpu)
            path.write_text(done.stdout)
            print(path)
    if failed:
        print(f"gpu.py: failed, with the reason above: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def main() -> int:
    if not torch.cuda.is_available():
        print(f"gpu.py: there is no GPU here that PyTorch {torch.__version__} can use (torch.cuda.is_available() is False)",
              file=sys.stderr)
        return 2
    words = sys.argv[1:]
    # The Makefile's question whether there is a GPU at all.
    if "--look" in words:
        return 0
    if {"--checks", "-h", "--help"} & set(words):
        return common.main(__doc__, checks, lambda parser: parser.add_argument(
            "--checks", action="store_true", help="the checks alone, not the other programs"))
    return run_all(words, "--quick" in words)


if __name__ == "__main__":
    sys.exit(main())
