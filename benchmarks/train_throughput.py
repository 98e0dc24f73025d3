"""Measures LoRA training in real tokens a second, on CoLA's real lengths: this project against PEFT.

    python benchmarks/train_throughput.py            GPT-2 124M and SmolLM2-135M, batches of 16
    python benchmarks/train_throughput.py --model gpt2 --quick --json
    python benchmarks/train_throughput.py --model mpnet       an encoder, MPNet-base 110M

Pads are not counted as tokens. The sides have a process each, and one side computes at a time:

    ours          batches by length, TextClassifier, LoRALinear, train_utils.fit
    ours-bf16x3   the same with --precision bf16x3 (amx.py), on a CPU with tiles
    peft-docs     PEFT and the Trainer as their documentation shows them: random order, dynamic padding,
                  the model's own activation and dropout, 0.1 on the inputs of A
    peft-best     PEFT on the same batches as `ours`, fused activation, no dropout, a bare loop, fused AdamW
    peft-fp32     (with --precision bf16) peft-best in float32, the usual choice
    peft-trainer  (on a GPU) the same model as peft-best under the Trainer with group_by_length
    products      the frozen matmuls of the same batches and nothing else: the limit, in one precision

Every round takes the same sentences on all sides: one batch from each range of lengths. All sides adapt the same layers
with the same rank, and start from the same weights, B non-zero.
"""
from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

import train_utils
from adapters import peft_layout
from benchmarks import common  # first: it sets the environment that libraries read when imported
from benchmarks.common import Report, device, synchronize
from data_utils import Batch, padding_percent
from fast import amx, gemm, onepass
from fast.matmul import set_precision
from machine import hardware
from model import LoRALinear, LoRAOptions, inject_lora, load_classifier, lora_layers

BATCH_SIZE = 16
PARTS = {"mm": "products", "linear_pointwise": "products", "dot_product": "attention", "norm": "norms and activations",
         "silu": "norms and activations", "sigmoid": "norms and activations"}  # operators, by what is in their names
# With tiles: targets, against whom.
MODELS = {"gpt2": {"peft-docs": 3.0, "peft-best": 1.4}, "smollm2": {"peft-best": 1.8}, "mpnet": {"peft-best": 1.4}}


# ---------------------------------------------------------------- the sides, each in its process

class Side:
    """Trains in one of the ways, on CoLA's training split in this project's batches."""

    def __init__(self, args: argparse.Namespace, base: str, adapter: Path):
        self.args, self.base, self.adapter = args, base, adapter
        self.tokenizer = common.tokenizer_of(base)
        self.batches = common.batches_of(args.task.train, base, BATCH_SIZE)
        self.model = self.build().to(device())

    def build(self) -> torch.nn.Module:
        raise NotImplementedError

    def loss(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def run(self, numbers: list[int]) -> float:
        """Trains on these batches' sentences; returns the seconds."""
        raise NotImplementedError

    def check(self, number: int) -> tuple[float, float]:
        """Returns a batch's loss and the gradient norm of all As, without dropout, in float32."""
        # The gradient of A depends on every other part of the step.
        self.model.eval()
        loss = self.loss(self.batches[number].to(device()))
        loss.backward()
        norm = torch.nn.utils.get_total_norm([
            p.grad for name, p in train_utils.trainable(self.model).items() if "lora_A" in name])
        self.model.zero_grad()
        self.set_precision()
        return loss.item(), norm.item()

    def trained(self) -> list[torch.nn.Parameter]:
        return list(train_utils.trainable(self.model).values())

    def set_precision(self) -> None:
        """Casts the frozen weights, after the sides were compared in float32."""
        if self.args.precision == "bf16":
            for p in self.model.parameters():
                if not p.requires_grad:
                    p.data = p.data.bfloat16()

    def peak(self, numbers: list[int]) -> tuple[int, int]:
        """Returns the memory in bytes before training on these batches, and at its peak."""
        # Twice: the second pass finds the optimiser's state, as every step but a run's first does.
        before = reset_peak()
        for _ in range(2):
            self.run(numbers)
        return before, peak_bytes()


class Ours(Side):
    def build(self):
        # As every run of this project does; the other sides have processes of their own.
        hardware.keep_freed_memory()
        classifier, _ = load_classifier(self.base, common.LABELS)
        torch.manual_seed(0)
        inject_lora(classifier.net, LoRAOptions())
        return common.as_if_trained(classifier)

    def save(self) -> None:
        peft_layout.save_adapter(self.model, self.adapter, self.base)

    def loss(self, batch):
        return F.cross_entropy(self.model(*batch.inputs()), batch.labels)

    def set_precision(self):
        set_precision(self.model.net.base_model, self.args.precision)

    def run(self, numbers):
        return common.epoch_seconds(self.model, [self.batches[i] for i in numbers], train_utils.label_loss(),
                                    precision=self.args.precision)

    def profile(self, numbers: list[int]) -> dict[str, float]:
        """Returns the parts' shares of the operators' own time, in percent, on these batches.

        The profiler's cost is the same for every operator, so that many small ones seem slower than they are.
        """
        from torch.profiler import ProfilerActivity, profile, record_function

        def labelled(function, label):
            def call(*values, **more):
                with record_function(label):
                    return function(*values, **more)
            return call

        # This project's kernels are called through ctypes: without a label they would be nobody's time.
        plain = {}
        for module, names in ((amx, ["matmul"]), (gemm, ["matmul"]), (onepass, onepass.ARGUMENTS)):
            for name in names:
                plain[module, name] = getattr(module, name)
        for (module, name), function in plain.items():
            part = "products" if module in (amx, gemm) else "attention" if "attend" in name else "norms and activations"
            setattr(module, name, labelled(function, part))
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            self.run(numbers)
        for (module, name), function in plain.items():
            setattr(module, name, function)
        parts = dict.fromkeys(("products", "attention", "norms and activations", "the rest"), 0.0)
        for event in profiler.key_averages():
            # This project's kernels by their label, PyTorch's operators by their name.
            part = event.key if event.key in parts else next((part for word, part in PARTS.items() if word in event.key),
                                                             "the rest")
            parts[part] += event.self_cpu_time_total
        total = sum(parts.values())
        return {part: 100 * spent / total for part, spent in parts.items()}


class OursBf16x3(Ours):
    """Has its precision from the start, so that its loss is checked against the others'."""

    def build(self):
        classifier = super().build()
        set_precision(classifier.net.base_model, "bf16x3")
        return classifier


class Products(Ours):
    """Forward x W^T and backward grad W of each adapted layer, in the model's order, so that weights come cold.

    Of every token in every layer, as the library computes them; `ours` needs fewer (see fast/blocks.py).
    """

    def build(self):
        classifier = super().build().train()
        self.weights: list[tuple[Tensor, bool]] = []  # W (out, in), and whether the layer below wants a gradient
        hooks = [layer.register_forward_pre_hook(self._note) for layer in lora_layers(classifier.net).values()]
        batch = self.batches[0]
        classifier.has_fused_blocks = False  # the library's way, on which every layer is called for every token
        classifier(batch.input_ids, batch.attention_mask)
        for hook in hooks:
            hook.remove()
        return classifier

    def _note(self, layer: LoRALinear, inputs) -> None:
        weight = layer.base.weight if isinstance(layer.base, torch.nn.Linear) else layer.base.weight.t()
        dtype = torch.bfloat16 if self.args.precision == "bf16" else weight.dtype
        self.weights.append((weight.detach().to(device(), dtype), inputs[0].requires_grad))

    def flop_per_token(self) -> int:
        return sum(2 * weight.numel() * (1 + below) for weight, below in self.weights)

    @torch.no_grad()
    def run(self, numbers):
        seconds = 0.0
        for i in numbers:
            rows = self.batches[i].input_ids.numel()
            x = {width: torch.randn(rows, width, device=device(), dtype=self.weights[0][0].dtype)
                 for weight, _ in self.weights for width in weight.shape}
            synchronize()
            start = time.perf_counter()
            for weight, _ in self.weights:
                F.linear(x[weight.shape[1]], weight)
            for weight, below in reversed(self.weights):
                if below:
                    torch.mm(x[weight.shape[0]], weight)
            synchronize()
            seconds += time.perf_counter() - start
        return seconds


class PeftBest(Side):
    best = True

    def build(self):
        model = common.peft_classifier(self.base, self.adapter, self.tokenizer.pad_token_id, self.best)
        self.optimizer = None
        return model

    def loss(self, batch):
        mask = hardware.send(batch.attention_mask, batch.input_ids.device)  # which batches keep on the CPU
        return self.model(input_ids=batch.input_ids, attention_mask=mask, labels=batch.labels).loss

    def run(self, numbers):
        self.model.train()
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.trained(), lr=1e-4, fused=True)
        parameters = self.trained()
        synchronize()
        start = time.perf_counter()
        for i in numbers:
            with torch.autocast(device().type, torch.bfloat16, enabled=self.args.precision == "bf16"):
                loss = self.loss(self.batches[i].to(device()))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        synchronize()
        return time.perf_counter() - start


class PeftFloat32(PeftBest):
    """Trains `peft-best` in float32, the usual choice, next to a side of ours in bfloat16."""

    def __init__(self, args: argparse.Namespace, *setup):
        super().__init__(argparse.Namespace(**{**vars(args), "precision": "fp32"}), *setup)


class PeftTrainer(PeftBest):
    """Trains in the Trainer's own loop, timed from the beginning of its first step to the end of its last."""

    def set_precision(self):
        pass  # the Trainer's bf16 is autocast over float32 weights

    def run(self, numbers):
        from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

        times = []

        class Clock(TrainerCallback):
            def on_step_begin(self, *args, **kwargs):
                if not times:
                    self.on_train_end()

            def on_train_end(self, *args, **kwargs):
                synchronize()
                times.append(time.perf_counter())

        # Single rows without pads: the Trainer makes its own batches of them.
        rows = []
        for number in numbers:
            batch = self.batches[number]
            lengths, labels = batch.attention_mask.sum(1).tolist(), batch.labels.tolist()
            for ids, length, label in zip(batch.input_ids, lengths, labels, strict=True):
                rows.append({"input_ids": ids[:length].tolist(), "attention_mask": [1] * length, "label": label})
        trainer = Trainer(
            model=self.model, train_dataset=rows, data_collator=DataCollatorWithPadding(self.tokenizer),
            callbacks=[Clock()], args=TrainingArguments(
                output_dir=str(self.adapter), per_device_train_batch_size=BATCH_SIZE, num_train_epochs=1,
                learning_rate=1e-4, report_to="none", save_strategy="no", disable_tqdm=True, seed=numbers[0],
                train_sampling_strategy="group_by_length" if self.best else "random",
                bf16=self.args.precision == "bf16", use_cpu=device().type == "cpu"))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return times[-1] - times[0]


class PeftDocs(PeftTrainer):
    best = False


SIDES = {"ours": Ours, "ours-bf16x3": OursBf16x3, "peft-docs": PeftDocs, "peft-best": PeftBest, "peft-fp32": PeftFloat32,
         "peft-trainer": PeftTrainer, "products": Products}


def sides(args: argparse.Namespace) -> list[str]:
    """Returns the sides of this machine in this precision."""
    left_out = set() if torch.cuda.is_available() else {"peft-trainer"}
    if args.precision == "fp32":
        left_out.add("peft-fp32")
    if torch.cuda.is_available() or args.precision != "fp32" or not amx.available():
        left_out.add("ours-bf16x3")
    return [side for side in SIDES if side not in left_out]


def reset_peak() -> int:
    """Resets the process's peak memory; returns its current memory in bytes."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # 5 resets VmHWM (proc(5)): loading is no part of training.
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(name: str) -> int:
    """Returns a figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


# ---------------------------------------------------------------- processes

def serve(connection, side: str, args: argparse.Namespace, *setup) -> None:
    """Runs in a side's process: builds the side and answers calls of its methods."""
    # Output of libraries goes to stderr: stdout is for the result.
    os.dup2(2, 1)
    common.set_threads(args)
    worker = SIDES[side](args, *setup)
    connection.send("ready")
    while call := connection.recv():
        method, *values = call
        connection.send(getattr(worker, method)(*values))


class Worker:
    """Starts a side's process; a call returns when the side has answered."""

    def __init__(self, side: str, *setup):
        context = multiprocessing.get_context("spawn")
        self.side = side
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, side, *setup), daemon=True)
        self.process.start()
        theirs.close()
        self._answer()

    def __call__(self, method: str, *values):
        self.connection.send((method, *values))
        return self._answer()

    def _answer(self):
        try:
            return self.connection.recv()
        except EOFError:
            raise SystemExit(f"{self.side}: its process ended; what it said is above") from None

    def close(self) -> None:
        # It may have ended by itself.
        with suppress(OSError):
            self.connection.send(None)
        self.process.join()


# ---------------------------------------------------------------- the benchmark

def measure_padding(report: Report, model: str, batches: list[Batch]) -> None:
    """Measures the pads of an epoch: ours, random order, and the Trainer's group_by_length."""
    from transformers.trainer_pt_utils import LengthGroupedSampler

    lengths = []
    for batch in batches:
        lengths += batch.attention_mask.sum(1).tolist()
    random.Random(0).shuffle(lengths)
    grouped = list(LengthGroupedSampler(BATCH_SIZE, lengths=lengths, generator=torch.Generator().manual_seed(0)))
    for name, order in (("random order", range(len(lengths))), ("group_by_length", grouped)):
        report.measure(f"{model}: pads, {name}", [common.padding_percent(lengths, order, BATCH_SIZE)], "%")
    report.target(f"{model}: pads, ours", [padding_percent(batches)], 5, "%", at_most=True)


def measure_memory(report: Report, model: str, workers: dict[str, Worker], batches: list[Batch]) -> None:
    """Measures the peak memory on a sample of the epoch, model and libraries included."""
    # With the largest batch, which sets the peak.
    largest = max(range(len(batches)), key=lambda i: batches[i].input_ids.numel())
    sample = [*common.spread_sample(12, len(batches), 0), largest]
    peaks = {}
    for side, worker in workers.items():
        if side != "products":
            before, peaks[side] = worker("peak", sample)
            report.measure(f"{model}: peak memory, {side}", [peaks[side] / 2 ** 20], "MiB")
            report.measure(f"{model}: of it for the step, {side}", [(peaks[side] - before) / 2 ** 20], "MiB")
    for ours in (side for side in peaks if side.startswith("ours")):
        report.target(f"{model}: peak memory, {ours} / peft-best", [peaks[ours] / peaks["peft-best"]], 0.8, at_most=True)


def goals(model: str, precision: str) -> dict[str, float]:
    """Returns the targets against PEFT's sides on this machine, in this precision."""
    if torch.cuda.is_available():
        return {"peft-trainer": 3.0}
    if precision == "bf16":
        return {"peft-best": 1.6, "peft-fp32": 3.0 if amx.available() else 4.0}
    return MODELS[model] if amx.available() else {"peft-best": 2.4}


def measure_speed(report: Report, model: str, workers: dict[str, Worker], batches: list[Batch], quick: bool,
                  precision: str) -> None:
    count, rounds = (4, 2) if quick else (12, 5)
    if torch.cuda.is_available():
        count *= 8
    samples = [common.spread_sample(count, len(batches), seed) for seed in range(rounds)]
    # Unmeasured: the first calls pay for lengths, optimiser and compilation.
    for worker in workers.values():
        worker("run", common.spread_sample(2 if quick else 4, len(batches), rounds))
    seconds = common.alternate({side: lambda number, worker=worker: worker("run", samples[number])
                                for side, worker in workers.items()}, rounds)
    # Real tokens for the rates; the matmuls' own rate counts pads too, which they compute.
    tokens, flop, flop_per_token = [], [], workers["products"]("flop_per_token")
    for sample in samples:
        tokens.append(sum(batches[i].tokens for i in sample))
        flop.append(flop_per_token * sum(batches[i].input_ids.numel() for i in sample) / 1e9)
    for side in workers:
        report.measure(f"{model}: {side}", common.paired_ratios(tokens, seconds[side]), "tokens/s")
    report.measure(f"{model}: products", common.paired_ratios(flop, seconds["products"]), "GFLOP/s")
    # Each side of ours against each other side: a target, or without one a measurement.
    for ours in (side for side in workers if side.startswith("ours")):
        for side in workers:
            ratios = common.paired_ratios(seconds[side], seconds[ours])
            goal = goals(model, precision).get(side)
            if side == "products":
                report.target(f"{model}: {ours}, share of the products' limit", [100 * ratio for ratio in ratios], 90, "%")
            elif goal:
                report.target(f"{model}: {ours} / {side}", ratios, goal)
            elif not side.startswith("ours"):
                report.measure(f"{model}: {ours} / {side}", ratios, "x")
        if not torch.cuda.is_available():
            for part, share in workers[ours]("profile", samples[0]).items():
                report.measure(f"{model}: {ours}, {part}", [share], "% of the step")


def measure_model(report: Report, model: str, args: argparse.Namespace, work: Path) -> None:
    base, adapter = common.base_of(model, work), common.make_folder(work / f"{model}-adapter")
    batches = common.batches_of(args.task.train, base, BATCH_SIZE)
    workers: dict[str, Worker] = {}
    try:
        for side in sides(args):
            workers[side] = Worker(side, args, base, adapter)
            # PEFT's sides load the adapter of ours: all start from the same weights.
            if side == "ours":
                workers[side]("save")
        # A batch with pads: a side that reads them would have another loss.
        padded = next(i for i, batch in enumerate(batches[len(batches) // 2:], len(batches) // 2)
                      if batch.tokens < batch.input_ids.numel())
        found = {side: worker("check", padded) for side, worker in workers.items()}
        for side in [side for side in workers if side.startswith("peft")]:
            for ours in (side for side in workers if side.startswith("ours")):
                (loss, norm), (their_loss, their_norm) = found[ours], found[side]
                report.check(f"{model}: loss of a batch, {ours} and {side}", abs(loss - their_loss), common.TOLERANCE)
                report.check(f"{model}: gradient norm of A, relative, {ours} and {side}", abs(norm / their_norm - 1), 1e-3)
        measure_padding(report, model, batches)
        measure_memory(report, model, workers, batches)
        measure_speed(report, model, workers, batches, args.quick, args.precision)
    finally:
        for worker in workers.values():
            worker.close()


def benchmark(args: argparse.Namespace, work: Path) -> Report:
    report = Report()
    for model in ("gpt2", "smollm2") if args.model is None else (args.model,):
        measure_model(report, model, args, work)
    return report


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=tuple(MODELS), help="gpt2 and smollm2 if not given")
    default = "bf16" if torch.cuda.is_available() else "fp32"
    parser.add_argument("--precision", choices=("fp32", "bf16"), default=default,
                        help="of frozen weights, on every side (default: %(default)s)")


if __name__ == "__main__":
    sys.exit(common.main(__doc__, benchmark, options))
