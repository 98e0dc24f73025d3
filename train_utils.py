"""The one training loop and evaluation; objectives are in distillation/losses.py.

`fit` trains any model that maps (input_ids, attention_mask) to what its objective reads, logits above all: the LoRA
classifier and the student, in all of its stages, are trained by the same code, so that comparisons are fair.
"""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from data_utils import Batch, epoch_order, padding_percent
from distillation.losses import Objective, cross_entropy, distillation, kd_loss
from machine import processes
from machine.hardware import peak_memory_bytes
from machine.signals import Interrupted, deferred
from metrics.classification import confusion, per_class, scores, scores_of_sums
from options.schema import TrainOptions
from record.folder import CHECKPOINT
from training import anomaly
from training.checkpoints import Progress, load_checkpoint, save_checkpoint, trainable

# The objectives, which are called by these names too.
__all__ = ["Objective", "cross_entropy", "distillation", "kd_loss"]

Scores = tuple[dict[str, dict], dict[str, list]]  # of each development split: scores, and confusion matrix


class Diverged(RuntimeError):
    """Says that the loss or a gradient is no longer finite."""


# ---------------------------------------------------------------- evaluation

@torch.inference_mode()
def compute_logits(model: nn.Module, batches: list[Batch]) -> Tensor:
    """Computes logits (N, labels) of every row, in the split's own order, on the CPU in float32.

    Several processes share the batches, and each process gets all logits.
    """
    was_training = model.training
    model.eval()
    device, own = next(model.parameters()).device, processes.shard(batches)
    parts = [model(*batch.to(device).inputs()).float().cpu() for batch in own]
    model.train(was_training)
    (labels,) = processes.all_reduce_max(parts[0].shape[1] if parts else 0)
    logits = torch.zeros(sum(len(batch.rows) for batch in batches), labels)
    for batch, part in zip(own, parts, strict=True):
        logits[batch.rows] = part
    return processes.all_reduce_sum(logits)


def labels_of(batches: list[Batch]) -> Tensor:
    """Returns labels (N,) of every row, in the split's own order."""
    labels = torch.empty(sum(len(batch.rows) for batch in batches), dtype=torch.int64)
    for batch in batches:
        labels[batch.rows] = batch.labels
    return labels


def validate(model: nn.Module, dev: dict[str, list[Batch]]) -> Scores:
    """Computes scores and confusion matrix of every development split and, if there are several, of `all` together."""
    answers = {name: (compute_logits(model, batches), labels_of(batches)) for name, batches in dev.items()}
    if len(dev) > 1:
        answers["all"] = tuple(torch.cat(parts) for parts in zip(*answers.values(), strict=True))
    return ({name: scores(*answer) for name, answer in answers.items()},
            {name: confusion(*answer) for name, answer in answers.items()})


def selection_split(splits) -> str:
    """Returns the name of the split whose MCC chooses the best epoch: in-domain where there is one."""
    return "in_domain" if "in_domain" in splits else next(iter(splits))


def training_summary(progress: Progress, batches: list[Batch]) -> dict:
    """Returns the entry `train` of summary.json: sums over the epochs, padding and peak memory."""
    seconds, tokens = (sum(line[key] for line in progress.history) for key in ("seconds", "tokens"))
    return {"epochs": len(progress.history), "steps": progress.step, "seconds": seconds, "tokens": tokens,
            "tokens_per_second": tokens / seconds if seconds else 0.0,
            "padding_percent": padding_percent(batches), "peak_memory_bytes": peak_memory_bytes()}


def best_and_last(best_epoch: int, history: list[dict], classes: tuple[str, ...]) -> dict:
    """Returns the scores of the best and the last epoch, and of the best one also by class."""
    best, last = next(line for line in history if line["epoch"] == best_epoch), history[-1]
    by_class = {split: {"confusion": matrix, "per_class": per_class(matrix, classes)}
                for split, matrix in best["confusion"].items()}
    return {"best_epoch": best_epoch, "validation": best["validation"], "by_class": by_class,
            "last_epoch": last["epoch"], "last_validation": last["validation"]}


# ---------------------------------------------------------------- the loop

def learning_rate_factor(step: int, total: int, warmup: float, schedule: str) -> float:
    """Returns the share of the peak rate at optimiser step `step` (from 0) of `total`: linear warm-up, then decay to 0."""
    rising = math.ceil(warmup * total)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, total - rising)
    return {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[schedule]


def make_optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    """Makes AdamW, without decay on vectors (biases, norms), and with a rate of its own for the head if given."""
    head = (*(f"net.{name}." for name in model.head_names()), "feature_head.") if hasattr(model, "head_names") else ()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in trainable(model).items():
        lr = options.head_lr if options.head_lr is not None and name.startswith(head or " ") else options.lr
        groups.setdefault((lr, options.weight_decay if p.ndim > 1 else 0.0), []).append(p)
    return torch.optim.AdamW([{"params": params, "lr": lr, "peak": lr, "weight_decay": decay}
                              for (lr, decay), params in groups.items()], fused=True)


def fit(model: nn.Module, batches: list[Batch], dev: dict[str, list[Batch]], objective: Objective,
        options: TrainOptions, *, folder: Path | None = None, resume: bool = False, name: str = "",
        select: str = "in_domain", on_epoch: Callable[[list[dict]], None] = lambda history: None,
        stop: Callable[[], int | None] = lambda: None, steps: int | None = None,
        score: Callable[[nn.Module, dict[str, list[Batch]]], Scores] | None = None) -> Progress:
    """Trains what requires a gradient and leaves the model with its best epoch's weights.

    The best epoch is the one with the highest MCC on the split `select` (of equals, or where there is none, the lowest
    loss). With `options.ema` the averaged weights are scored and kept.

    Args:
        model: maps (input_ids, attention_mask) to logits, or to anything with an attribute `logits` (None: no classes).
        batches: the training split, composition fixed for the run.
        dev: development splits, scored after each epoch.
        objective: (what the model returns, batch) -> mean loss of the batch.
        folder: where the checkpoint goes (`<name>checkpoint.safetensors`); none if None.
        resume: go on from the checkpoint, if there is one.
        name: prefix of the checkpoint and label of the bar.
        on_epoch: called with the history after each epoch (and after a resume).
        stop: asked after each step; a signal number makes `fit` save and raise `Interrupted`.
        steps: if given, optimiser steps instead of `options.epochs`; the last epoch ends with them.
        score: scores the development splits; `validate` if None.

    Raises:
        Diverged: a loss or gradient that is not finite; the last good checkpoint stands.
        UserError: a checkpoint that is damaged or of another model.
    """
    path = folder / f"{name}{CHECKPOINT}" if folder else None
    trainer = Trainer(model, batches, dev, objective, options, path, name, select, on_epoch, stop, steps, score)
    if path and resume and path.exists():
        trainer.load()
    return trainer.run()


class Trainer:
    """One training: the model, its data, its optimiser and its progress.

    On a GPU a step waits for nothing: losses, correct predictions and gradient norms are summed on the device. The sums are
    read (which waits for the device) every `read_every` steps and before every checkpoint, so that no checkpoint holds
    a value that is not finite. On a CPU, where reading costs nothing, they are read in every step.

    Each of several processes computes a part of each batch's rows (`data_utils.split_large`), and their gradients are added
    up: a step is the same step, whatever the number of processes. Process r draws its dropout from the seed plus SEEDS
    times r.
    """

    SEEDS = 100_000  # runs have seeds of five digits

    SUMS = ("loss", "cross_entropy", "correct", "norm")  # summed on the device; a loss or norm that is not finite stays so

    def __init__(self, model: nn.Module, batches: list[Batch], dev: dict[str, list[Batch]], objective: Objective,
                 options: TrainOptions, path: Path | None, name: str, select: str,
                 on_epoch: Callable[[list[dict]], None], stop: Callable[[], int | None], steps: int | None = None,
                 score: Callable[[nn.Module, dict[str, list[Batch]]], Scores] | None = None):
        self.model, self.batches, self.dev, self.objective, self.options = model, batches, dev, objective, options
        self.path, self.name, self.select, self.on_epoch, self.stop = path, name, select, on_epoch, stop
        self.device = next(model.parameters()).device
        self.read_every = 1 if self.device.type == "cpu" else 16
        self.optimizer = make_optimizer(model, options)
        self.parameters = trainable(model)
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}  # the best epoch's weights by name, on the CPU
        # MPS has no float64; its sums of an epoch are right to about six digits.
        kind = torch.float32 if self.device.type == "mps" else torch.float64
        self.sums = torch.zeros(len(self.SUMS), dtype=kind, device=self.device)  # of this process
        self.graded: list[nn.Parameter] | None = None  # the parameters that get a gradient, in any of the processes
        self.confusion: Tensor | None = None  # (classes, classes) of the running epoch: [label][prediction]
        an_epoch = math.ceil(len(batches) / options.accumulate)
        self.score, self.total_steps = score or validate, steps or options.epochs * an_epoch
        self.epochs = math.ceil(self.total_steps / an_epoch)
        self.saved_at = time.perf_counter()
        if self.device.type == "cuda":
            for batch in (part for whole in batches for part in whole.micro_batches()):
                batch.pin()
        if not processes.is_main():
            torch.manual_seed(options.seed + self.SEEDS * processes.rank())

    def load(self) -> None:
        """Goes on where the checkpoint left off.

        Raises:
            UserError: the checkpoint is damaged or of another model.
        """
        self.progress, self.best = load_checkpoint(self.path, self.model, self.optimizer)
        progress = self.progress
        if progress.sums:
            own = [progress.sums[key] if processes.is_main() else 0.0 for key in self.SUMS]
            if len(progress.parts) == processes.count():
                own = progress.parts[processes.rank()]
            self.sums += torch.tensor(own, dtype=self.sums.dtype).to(self.device)
            if processes.is_main() and progress.confusion:
                self.confusion = torch.tensor(progress.confusion, device=self.device)
        self.on_epoch(self.progress.history)

    def run(self) -> Progress:
        """Trains all epochs that are left; see `fit`."""
        while not self.progress.finished and self.progress.epoch <= self.epochs:
            try:
                with anomaly.watching(self.model) if self.options.anomaly else nullcontext():
                    self.train_epoch()
                    validation, matrices = self.validate()
            except anomaly.NotFinite as found:
                raise self.diverged(str(found)) from None
            except Interrupted:  # between two steps, or in the validation, which changes no state
                if processes.count() == 1:
                    self.save()
                raise
            with deferred():
                self.finish_epoch(validation, matrices)
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.best[name])
        return self.progress

    def train_epoch(self) -> None:
        """Runs one epoch, or the rest of the epoch after a resume."""
        options, progress = self.options, self.progress
        self.model.train()
        order = epoch_order(len(self.batches), options.seed, progress.epoch)
        groups = [order[i:i + options.accumulate] for i in range(0, len(order), options.accumulate)]
        groups = groups[:progress.group + self.total_steps - progress.step]
        if not progress.sums:
            progress.sums = dict.fromkeys((*self.SUMS, "rows", "tokens", "seconds"), 0.0)
        self.saved_at = start = time.perf_counter()
        before = progress.sums["seconds"]
        label = f"{self.name + ' ' if self.name else ''}epoch {progress.epoch}/{self.epochs}"
        with tqdm(total=len(self.batches), initial=min(progress.group * options.accumulate, len(self.batches)), unit="batch",
                  dynamic_ncols=True, desc=label) as bar, deferred():
            for group in groups[progress.group:]:
                self.step([self.batches[i] for i in group])
                sums = progress.sums
                sums["seconds"] = before + time.perf_counter() - start
                bar.update(len(group))
                if progress.step % self.read_every == 0:
                    accuracy = f"accuracy {sums['correct'] / sums['rows']:.3f}, " if self.confusion is not None else ""
                    bar.set_postfix_str(f"loss {sums['loss'] / sums['rows']:.4f}, {accuracy}"
                                        f"{sums['tokens'] / sums['seconds']:.0f} tokens/s", refresh=False)
                signal, due = processes.all_reduce_max(self.stop() or 0, self.save_is_due())
                if due or signal and processes.count() > 1:
                    self.save()
                if signal:
                    raise Interrupted(signal)
        self.read_sums()
        self.read_confusion()
        progress.sums["seconds"] = before + time.perf_counter() - start  # again, after the GPU has finished

    def step(self, group: list[Batch]) -> None:
        """Takes one optimiser step over the batches of a group.

        Raises:
            Diverged: the loss or the gradient is not finite.
        """
        options, progress = self.options, self.progress
        rate = self.learning_rate(progress.step)
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = param_group["peak"] * rate
        rows = sum(len(batch.rows) for batch in group)
        progress.sums["rows"] += rows
        progress.sums["tokens"] += sum(batch.tokens for batch in group)
        for batch in (micro.to(self.device) for whole in group for micro in whole.micro_batches()):
            with torch.autocast(self.device.type, torch.bfloat16,
                                enabled=options.precision == "bf16" and getattr(self.model, "full", False)):
                outputs = self.model(*batch.inputs())
            outputs = outputs.float() if isinstance(outputs, Tensor) else outputs
            loss = self.objective(outputs, batch)
            self.count(loss.detach(), getattr(outputs, "logits", outputs), batch)
            if self.read_every == 1 and processes.count() == 1:
                self.read_sums("loss")
            # Weighted by rows, so that accumulation equals one large batch.
            (loss * (len(batch.rows) / rows)).backward()
        if processes.count() > 1:
            self.add_gradients()
        norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), options.clip or math.inf)
        self.sums[self.SUMS.index("norm")] += norm
        if (progress.step + 1) % self.read_every == 0:
            self.read_sums()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        progress.group += 1
        progress.step += 1
        if options.ema:
            self.update_average()

    def update_average(self) -> None:
        """Moves the average of the weights towards them (Polyak and Juditsky 1992), exponentially.

        After k steps the decay is at most (1 + k) / (10 + k): the average forgets where the training began. It stands in the
        optimiser's state, so that checkpoints hold it.
        """
        decay = min(self.options.ema, (1 + self.progress.step) / (10 + self.progress.step))
        trained = [p for p in self.parameters.values() if self.optimizer.state[p]]  # others have had no gradient
        averages = [self.optimizer.state[p].setdefault("average", p.detach().clone()) for p in trained]
        get_ema_multi_avg_fn(decay)(averages, [p.detach() for p in trained], None)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Exchanges the weights for their average, where there is one, and back again."""
        def swap() -> None:
            with torch.no_grad():
                for p in self.parameters.values():
                    if (average := self.optimizer.state[p].get("average")) is not None:
                        weight = p.clone()
                        p.copy_(average)
                        average.copy_(weight)
        swap()
        try:
            yield
        finally:
            swap()

    def add_gradients(self) -> None:
        """Adds up the gradients of all processes; each gradient is weighted already by its process's share of the rows."""
        parameters = list(self.parameters.values())
        if self.graded is None:  # a process without a row in this step has no gradient to tell by
            there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int64)
            there = processes.all_reduce_sum(there).tolist()
            self.graded = [p for p, found in zip(parameters, there, strict=True) if found]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.graded]
        flat = processes.all_reduce_sum(torch.cat([grad.flatten() for grad in grads]))
        for p, grad in zip(self.graded, flat.split([p.numel() for p in self.graded]), strict=True):
            p.grad = grad.view_as(p)

    def learning_rate(self, step: int) -> float:
        """Returns the share of the peak rate at optimiser step `step` (from 0)."""
        return learning_rate_factor(step, self.total_steps, self.options.warmup, self.options.schedule)

    def count(self, loss: Tensor, logits: Tensor | None, batch: Batch) -> None:
        """Adds a batch to the running epoch's sums, on the device; without logits its loss alone."""
        rows = len(batch.rows)
        if logits is None:
            self.sums[0] += loss.to(self.sums.dtype) * rows
            return
        logits = logits.detach()
        predictions, classes = logits.argmax(-1), logits.shape[1]
        if self.confusion is None:
            self.confusion = torch.zeros(classes, classes, dtype=torch.int64, device=self.device)
        self.confusion.view(-1).index_add_(0, batch.labels * classes + predictions, torch.ones_like(predictions))
        kind = self.sums.dtype
        self.sums[:3] += torch.stack([loss.to(kind) * rows, F.cross_entropy(logits, batch.labels, reduction="sum").to(kind),
                                      (predictions == batch.labels).sum().to(kind)])

    def read_sums(self, upto: str = "norm") -> None:
        """Reads the sums of all processes from the device into `progress`.

        Raises:
            Diverged: a loss or a gradient norm was not finite (`upto` loss: the norm of this step is not there yet).
        """
        parts = processes.gather(self.sums.cpu())
        values = dict(zip(self.SUMS, parts.sum(0).tolist(), strict=True))
        if not math.isfinite(values["loss"]):
            raise self.diverged(f"loss {values['loss']}")
        if upto == "norm" and not math.isfinite(values["norm"]):
            bad = next((name for name, p in self.parameters.items() if p.grad is not None and not anomaly.finite(p.grad)),
                       "an earlier step")
            raise self.diverged(f"gradient norm {values['norm']}, {bad}'s first")
        self.progress.sums.update(values)
        self.progress.parts = parts.tolist() if processes.count() > 1 else []

    def read_confusion(self) -> None:
        """Reads the confusion matrix of all processes from the device into `progress`."""
        (classes,) = processes.all_reduce_max(0 if self.confusion is None else len(self.confusion))
        own = torch.zeros(classes, classes, dtype=torch.int64) if self.confusion is None else self.confusion.cpu().clone()
        self.progress.confusion = processes.all_reduce_sum(own).tolist()

    def validate(self) -> Scores:
        """Scores the development splits; several processes stop together after it, if one was asked to."""
        if processes.count() == 1:
            with self.averaged():
                return self.score(self.model, self.dev)
        with deferred():
            self.save()  # first, because a launcher that stops its processes does not wait long
            with self.averaged():
                result = self.score(self.model, self.dev)
            (signal,) = processes.all_reduce_max(self.stop() or 0)
        if signal:
            raise Interrupted(signal)
        return result

    def finish_epoch(self, validation: dict[str, dict], matrices: dict[str, list]) -> None:
        """Adds the epoch's line to the history, copies its weights if they are the best so far, and saves."""
        progress, options = self.progress, self.options
        peak = self.optimizer.param_groups[0]["peak"]
        progress.history.append({
            "epoch": progress.epoch, "train": scores_of_sums(progress.sums, progress.confusion), "validation": validation,
            "confusion": matrices,
            # By the formula: a run that is resumed after the epoch's last step has not set the optimiser's rate.
            "learning_rate": peak * self.learning_rate(progress.step - 1), "seconds": progress.sums["seconds"],
            "tokens": int(progress.sums["tokens"])})
        chosen = validation[self.select]
        score = (chosen.get("mcc", 0.0), -chosen["loss"])
        if score > tuple(progress.best_score):
            progress.best_score, progress.best_epoch = score, progress.epoch
            self.best.update({name: self.optimizer.state[p].get("average", p.detach()).cpu().clone()
                              for name, p in self.parameters.items()})
        progress.finished = options.patience is not None and progress.epoch - progress.best_epoch >= options.patience
        progress.epoch, progress.group, progress.sums = progress.epoch + 1, 0, {}
        progress.parts, progress.confusion = [], []
        self.sums.zero_()
        self.confusion = None
        self.save()
        self.on_epoch(progress.history)

    def save_is_due(self) -> bool:
        """Returns whether a checkpoint inside the epoch is due, by steps or by minutes."""
        if self.options.save_steps:
            return self.progress.step % self.options.save_steps == 0
        return time.perf_counter() - self.saved_at > 60 * self.options.save_every

    def save(self) -> None:
        """Writes the checkpoint, if there is a folder for it; never one with values that are not finite."""
        if self.path is None:
            return
        if self.progress.sums:
            self.read_sums()
            self.read_confusion()
        save_checkpoint(self.path, self.model, self.optimizer, self.progress, self.best)
        self.saved_at = time.perf_counter()

    def diverged(self, what: str) -> Diverged:
        """Returns the error that says where the training diverged, and what to do."""
        return Diverged(f"{what} at step {self.progress.step + 1} (epoch {self.progress.epoch}), learning rate "
                        f"{self.optimizer.param_groups[0]['lr']:.3g}; lower --lr" +
                        ("" if self.options.anomaly else ", or find the operation with --anomaly"))
