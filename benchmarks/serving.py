"""Many adapters on one frozen base, and the service: memory, throughput, and every answer compared with its adapter's alone.

    python benchmarks/serving.py --threads 1 --json
    python benchmarks/serving.py --quick

GPT-2 124M with random weights serves; its adapters are of rank 8 on every projection, B and head as if trained.

    memory       resident memory of a process that holds the base with 32 and with 256 adapters, against the base alone
    mixing       batches of 32 sentences of CoLA's development set, each under its own adapter: against the same batches
                 under one adapter in `LoRALinear`, and against PEFT's `adapter_names` (as its documentation shows it, and at
                 its best: GPT-2's activation in its fused form); the base without an adapter, the most that mixing can
                 reach; and both sides on a base in bfloat16, PEFT's at its best
    clients      64 clients with a sentence a request over 8 adapters, against one client; `run.py serve` on one core, the
                 clients on the others
    coming and going    the same while adapters are added and removed, and SIGTERM in the middle
    student      32 sentences a request through the service, student against teacher
"""
from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the claim is about the CPU

import torch
from safetensors.torch import load_file, save_file

from adapters.peft_layout import WEIGHTS_FILE, load_adapter, read_adapter
from benchmarks import common, load  # common first: it sets the environment that libraries read when imported
from benchmarks.common import Report, paired_ratios
from data_utils import Batch, collate, make_batches
from experiments.evaluate import load_finetuned, load_student
from model import load_classifier
from record.files import read_sums, sha256, write_sums
from serving.bank import AdapterBank
from serving.texts import Reading
from speed import install

ADAPTERS, SERVED, CLIENTS, REQUESTS = 32, 8, 64, 10_000
TOLERANCE = 1e-5  # of a probability
RESIDENT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from adapters.peft_layout import read_adapter
from serving.bank import AdapterBank
from serving.texts import Reading
bank = AdapterBank.on(sys.argv[2])
for number in range(int(sys.argv[4])):
    bank.add(f"a{number}", read_adapter(bank.net, Path(sys.argv[3]) / f"a{number % 8}"), Reading(("0", "1"), 512))
mask = torch.ones(8, 12, dtype=torch.long)
bank.logits(7 * mask, mask, [None if number >= len(bank.entries) else f"a{number}" for number in range(8)])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS")))
"""


# ---------------------------------------------------------------- runs that are served

def command(*arguments, **more) -> None:
    done = subprocess.run([sys.executable, "run.py", *map(str, arguments)], cwd=common.ROOT, capture_output=True, text=True,
                          **more)
    if done.returncode:
        raise SystemExit(f"run.py {arguments[0]}: exit status {done.returncode}: {done.stderr[-2000:]}")


def make_runs(args: argparse.Namespace, base: str, work: Path) -> Path:
    """A folder with runs a0, a1, ... on one base, each with random B and head of its own, and the student of a0.

    One run is trained for a step; its speed and memory are any other's.
    """
    root = work / "runs"
    short = ("--limit", 32, "--epochs", 1, "--batch-size", 32, "--data", args.data.resolve(), "--plots", work / "plots")
    command("LoRA", "12345", "--model", base, *short, "--no-plots", "--out", root / "a0")
    trained = load_file(root / "a0" / WEIGHTS_FILE)
    for number in range(ADAPTERS):
        folder = root / f"a{number}"
        if number:
            shutil.copytree(root / "a0", folder)
        torch.manual_seed(number)
        save_file({name: tensor if ".lora_A." in name else torch.randn(tensor.shape) * 0.02
                   for name, tensor in trained.items()}, folder / WEIGHTS_FILE, {"format": "pt"})
        write_sums(folder, {name: sha256(folder / name) for name in read_sums(folder)})
    command("distil", "12345", "--plain", "--teacher", root / "a0", *short, "--out", work / "student")
    return root


# ---------------------------------------------------------------- the bank

def measure_memory(report: Report, base: str, root: Path) -> None:
    def resident(adapters: int) -> float:
        done = subprocess.run([sys.executable, "-c", RESIDENT, str(common.ROOT), base, str(root), str(adapters)], check=True,
                              capture_output=True, text=True)
        return int(done.stdout) / 1024

    sides = common.alternate({name: lambda _, count=count: resident(count) for name, count in (
        ("base alone", 0), ("32 adapters", 32), ("256 adapters", 256))}, 1)
    for name, values in sides.items():
        report.measure(f"memory: {name}", values, "MiB")
    for name, goal in (("32 adapters", 1.35), ("256 adapters", 3)):
        report.target(f"memory: {name} / base alone", paired_ratios(sides[name], sides["base alone"]), goal, at_most=True)


def peft_mixer(base: str, root: Path, pad_token_id: int, best: bool):
    """PEFT's side: all adapters loaded into one model, which a batch mixes by `adapter_names`."""
    model = common.peft_classifier(base, root / "a0", pad_token_id, best).eval()
    model.load_adapter(root / "a0", "a0")
    for number in range(1, ADAPTERS):
        model.load_adapter(root / f"a{number}", f"a{number}")
    return model.requires_grad_(False)


@torch.inference_mode()
def measure_mixing(report: Report, args: argparse.Namespace, base: str, root: Path, rounds: int) -> None:
    tokenizer = common.tokenizer_of(base)
    batches = [batch for batch in make_batches(args.task.dev["in_domain"], tokenizer, common.MAX_LENGTH, 32, 1)
               if len(batch.rows) == 32]
    names = [f"a{number}" for number in range(ADAPTERS)]
    banks = {precision: AdapterBank.on(base, precision) for precision in ("fp32", "bf16")}
    for bank in banks.values():
        for name in names:
            bank.add(name, read_adapter(bank.net, root / name), Reading(("0", "1"), common.MAX_LENGTH))
    alone = load_classifier(base, common.LABELS)[0]
    load_adapter(alone.net, root / "a0")
    install(alone)
    alone.requires_grad_(False).eval()
    bare = load_classifier(base, common.LABELS)[0].requires_grad_(False).eval()
    install(bare)
    peft = {kind: peft_mixer(base, root, tokenizer.pad_token_id, best=kind != "documented")
            for kind in ("documented", "best", "bf16")}
    peft["bf16"].bfloat16()

    def ours(batch: Batch, precision: str = "fp32") -> torch.Tensor:
        return torch.stack(banks[precision].logits(batch.input_ids, batch.attention_mask, names))

    def theirs(batch: Batch, kind: str = "best") -> torch.Tensor:
        return peft[kind](input_ids=batch.input_ids, attention_mask=batch.attention_mask, adapter_names=names).logits

    sample = batches[len(batches) // 2]
    report.check("mixing: logits, ours and PEFT's", float((ours(sample) - theirs(sample)).abs().max()), common.TOLERANCE)
    report.check("mixing: a row of the mix and LoRALinear alone", float(
        (ours(sample)[0] - alone(sample.input_ids, sample.attention_mask)[0]).abs().max()), TOLERANCE)

    def rate(call, number: int) -> float:
        chosen = [batches[i] for i in common.spread_sample(2, len(batches), number)]
        start = time.perf_counter()
        for batch in chosen:
            call(batch)
        return sum(len(batch.rows) for batch in chosen) / (time.perf_counter() - start)

    sides = common.alternate({
        "32 adapters mixed": lambda number: rate(ours, number),
        "one adapter alone": lambda number: rate(lambda batch: alone(batch.input_ids, batch.attention_mask), number),
        "base without an adapter": lambda number: rate(lambda batch: bare(batch.input_ids, batch.attention_mask), number),
        "PEFT's adapter_names": lambda number: rate(lambda batch: theirs(batch, "documented"), number),
        "PEFT's adapter_names at its best": lambda number: rate(theirs, number),
        "32 adapters mixed, bfloat16": lambda number: rate(lambda batch: ours(batch, "bf16"), number),
        "PEFT's adapter_names, bfloat16": lambda number: rate(lambda batch: theirs(batch, "bf16"), number)}, rounds)
    for name, values in sides.items():
        report.measure(f"mixing: {name}", values, "sentences/s")
    mixed = sides["32 adapters mixed"]
    report.target("mixing: 32 adapters / one alone", paired_ratios(mixed, sides["one adapter alone"]), 0.8)
    for name in ("PEFT's adapter_names", "PEFT's adapter_names at its best"):
        report.target(f"mixing: ours / {name}", paired_ratios(mixed, sides[name]), 4)
    narrow = sides["32 adapters mixed, bfloat16"]
    for name in ("PEFT's adapter_names", "PEFT's adapter_names, bfloat16"):
        report.target(f"mixing: ours in bfloat16 / {name}", paired_ratios(narrow, sides[name]), 4)


# ---------------------------------------------------------------- the service

@contextlib.contextmanager
def served(root: Path, *arguments) -> Iterator[tuple[subprocess.Popen, int]]:
    """`run.py serve` on the first core alone, and its port."""
    adapters = [word for number in range(SERVED) for word in ("--adapter", f"a{number}={root / f'a{number}'}")]
    process = subprocess.Popen(
        [sys.executable, "run.py", "serve", *adapters, "--port", "0", "--timeout", "100", *map(str, arguments)],
        cwd=common.ROOT, text=True, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}))
    try:
        line = process.stdout.readline()
        match = re.fullmatch(r"serving on http://127\.0\.0\.1:(\d+)\n", line)
        if not match:
            raise SystemExit(f"run.py serve did not come up: {line!r}")
        yield process, int(match[1])
    finally:
        process.kill()
        process.wait()


@torch.inference_mode()
def answers_alone(root: Path, folder: Path, texts: list[str], names: list[str]) -> dict[tuple[str, str], list[float]]:
    """Probabilities of each text under each adapter alone, and under the student: one sentence at a time."""
    found = {}
    for name in names:
        model, tokenizer, _ = load_student(folder) if name == "student" else load_finetuned(root / name)
        for text in texts:
            batch = collate([tokenizer(text)["input_ids"]], [0], [0], 0)
            found[name, text] = model(*batch.inputs()).softmax(-1)[0].tolist()
    return found


def wrong(question: dict, answer: load.Answer, alone: dict) -> bool:
    """Whether an answer is none, or not that of the adapter alone."""
    if answer.status != 200 or len(answer.body["results"]) != len(question["texts"]):
        return True
    return any(abs(a - b) > TOLERANCE for text, result in zip(question["texts"], answer.body["results"], strict=True)
               for a, b in zip(result["probabilities"].values(), alone[question["adapter"], text], strict=True))


def questions(count: int, texts: list[str], names: list[str], seed: int, size: int = 1) -> list[dict]:
    draw = random.Random(seed)
    return [{"adapter": draw.choice(names), "texts": draw.sample(texts, size)} for _ in range(count)]


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)]


def measure_clients(report: Report, args: argparse.Namespace, root: Path, texts: list[str], alone: dict, rounds: int
                    ) -> None:
    names = [f"a{number}" for number in range(SERVED)]
    count = (640 if args.quick else REQUESTS) // rounds
    mistakes, seconds = 0, {1: [], CLIENTS: []}

    def rate(port: int, clients: int, number: int) -> float:
        nonlocal mistakes
        asked = questions(count if clients > 1 else 50, texts, names, number)
        start = time.perf_counter()
        got = asyncio.run(load.ask(port, asked, clients))
        elapsed = time.perf_counter() - start
        mistakes += sum(wrong(question, answer, alone) for question, answer in zip(asked, got, strict=True))
        seconds[clients] += [answer.seconds for answer in got]
        return len(asked) / elapsed

    with served(root) as (_, port):
        asyncio.run(load.ask(port, questions(64, texts, names, 99), 8))
        sides = common.alternate({"64 clients": lambda number: rate(port, CLIENTS, number),
                                  "one at a time": lambda number: rate(port, 1, number)}, rounds)
    for name, clients in (("64 clients", CLIENTS), ("one at a time", 1)):
        report.measure(f"clients: {name}", sides[name], "requests/s")
        for share in (0.5, 0.99):
            report.measure(f"clients: {name}, p{100 * share:.0f}", [1000 * percentile(seconds[clients], share)], "ms")
    report.measure("clients: requests of 64 clients", [len(seconds[CLIENTS])], "")
    report.target("clients: wrong or lost answers", [mistakes], 0, "", at_most=True)
    report.target("clients: 64 / one at a time", paired_ratios(sides["64 clients"], sides["one at a time"]), 4)


def measure_coming_and_going(report: Report, args: argparse.Namespace, root: Path, texts: list[str], alone: dict) -> None:
    """Adapters 6 and 7 come and go; SIGTERM ends it in the middle."""
    names = [f"a{number}" for number in range(SERVED)]
    asked = questions(REQUESTS, texts, names, 5)
    duration, changes = 8 if args.quick else 40, []
    with served(root, "--adapters-root", root) as (process, port):
        async def until_it_stops() -> list[load.Answer]:
            answers = asyncio.create_task(load.ask(port, asked, CLIENTS))
            client, end = load.Client(port), time.monotonic() + duration
            while time.monotonic() < end:
                for name in names[6:]:
                    changes.append(await client.call("DELETE", f"/v1/adapters/{name}"))
                    changes.append(await client.call("POST", "/v1/adapters", {"name": name, "folder": name}))
            client.close()
            process.send_signal(signal.SIGTERM)
            return await answers
        answers = asyncio.run(until_it_stops())
        said = process.stdout.readline()
    pairs = [(question, answer) for question, answer in zip(asked, answers, strict=True) if answer.status is not None]
    unknown = sum(answer.status == 404 and question["adapter"] in names[6:] for question, answer in pairs)
    mistakes = sum(wrong(question, answer, alone) for question, answer in pairs) - unknown
    mistakes += sum(change.status not in (200, 201) for change in changes)
    answered, accepted = map(int, re.fullmatch(r"stopped: (\d+) of (\d+) accepted requests answered\n", said).groups())
    # An unknown adapter is told before a request is accepted, or after it where it was removed meanwhile.
    received = len(pairs) - unknown + len(changes)
    report.measure("coming and going: answered before SIGTERM took effect", [len(pairs)], "requests")
    report.measure("coming and going: adapters added or removed", [len(changes)], "")
    report.measure("coming and going: told that the adapter is unknown just now", [unknown], "requests")
    report.target("coming and going: wrong answers", [mistakes], 0, "", at_most=True)
    lost = max(accepted - answered, accepted - received - unknown, 0)
    report.target("coming and going: accepted and not answered", [lost], 0, "", at_most=True)


def measure_student(report: Report, args: argparse.Namespace, root: Path, student: Path, texts: list[str], alone: dict,
                    rounds: int) -> None:
    mistakes = 0

    def rate(port: int, name: str, count: int, number: int) -> float:
        nonlocal mistakes
        asked = questions(count, texts, [name], number, size=32)
        start = time.perf_counter()
        got = asyncio.run(load.ask(port, asked, 4))
        elapsed = time.perf_counter() - start
        mistakes += sum(wrong(question, answer, alone) for question, answer in zip(asked, got, strict=True))
        return 32 * len(asked) / elapsed

    with served(root, "--student", f"student={student}") as (_, port):
        rate(port, "student", 8, 99)
        sides = common.alternate({"teacher": lambda number: rate(port, "a0", 8, number),
                                  "student": lambda number: rate(port, "student", 50, number)}, rounds)
    for name, values in sides.items():
        report.measure(f"through the service: {name}", values, "sentences/s")
    report.target("through the service: wrong answers", [mistakes], 0, "", at_most=True)
    report.target("through the service: student / teacher", paired_ratios(sides["student"], sides["teacher"]), 20)


def benchmark(args: argparse.Namespace, work: Path) -> Report:
    report, base = Report(), common.base_of("gpt2", work)
    rounds = 2 if args.quick else 4
    root, student = make_runs(args, base, work), work / "student"
    sentences = [text for text in dict.fromkeys(args.task.dev["in_domain"].sentences)]
    texts = random.Random(0).sample(sentences, 40)
    alone = answers_alone(root, student, texts, [*(f"a{number}" for number in range(SERVED)), "student"])
    spread = statistics.pstdev(alone[f"a{number}", texts[0]][0] for number in range(SERVED))
    report.check("the adapters differ: 1e-3 / standard deviation of their probabilities", 1e-3 / spread, 1)
    measure_memory(report, base, root)
    measure_mixing(report, args, base, root, rounds + 2)
    measure_student(report, args, root, student, texts, alone, rounds)
    measure_clients(report, args, root, texts, alone, rounds)
    measure_coming_and_going(report, args, root, texts, alone)
    return report


if __name__ == "__main__":
    sys.exit(common.main(__doc__, benchmark))
