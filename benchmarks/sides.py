"""The sides of train_throughput.py: this project and PEFT in several ways, each in a process of its own.

    worker = Worker("ours", args, base, adapter)      # builds the side in its process
    seconds = worker("run", [0, 1, 2])                # calls a method of it: trains on these batches

All sides adapt the same layers with the same rank, and start from the same weights, B non-zero.
"""
from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import train_utils
from adapters import peft_layout
from benchmarks import common  # first: it sets the environment that libraries read when imported
from benchmarks.common import device, synchronize
from data_utils import Batch
from fast import amx, gemm, onepass
from fast.matmul import set_precision
from machine import hardware
from model import LoRALinear, LoRAOptions, inject_lora, load_classifier, lora_layers

# Every run has imported it before it trains. It imports PyTorch's compiler, which keeps the frames of the import: within the
# first training those would hold a model and its optimiser.
importlib.import_module("transformers.modeling_utils")

BATCH_SIZE = 16
# A part of an operator's name -> the group that its time is counted in.
PARTS = {"mm": "products", "linear_pointwise": "products", "dot_product": "attention", "norm": "norms and activations",
         "silu": "norms and activations", "sigmoid": "norms and activations"}


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
