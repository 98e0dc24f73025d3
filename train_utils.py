"""The one training loop, and evaluation.

    fit(model, Data(batches, {"in_domain": dev}), label_loss(), TrainOptions(seed=1))

The LoRA classifier and the student, in all of its stages, are trained by the same code, so that comparisons are fair. The
objectives of distillation are in distillation/losses.py.
"""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from data_utils import Batch, changed, epoch_order
from machine import processes
from machine.progress import Bar
from machine.signals import Interrupted, deferred
from metrics.problems import SINGLE_LABEL, Problem
from options.schema import TrainOptions
from training import anomaly
from training.average import Average
from training.checkpoints import Checkpointing, Progress, load_checkpoint, save_checkpoint, trainable
from training.optimizer import lr_factor, make_optimizer

# (output of the model, batch) -> mean loss of the batch over its rows. Where a step has several batches, a mean over tokens
# is scaled to its share of the step's tokens (`batch.step`).
Objective = Callable[[Tensor, Batch], Tensor]
Scores = tuple[dict[str, dict], dict[str, list]]  # of each development split: scores, and confusion matrix
Scorer = Callable[[nn.Module, dict[str, Sequence[Batch]]], Scores]  # (model, development splits by name) -> their scores


class Diverged(RuntimeError):
    """A loss, gradient or weight is not finite."""


# ---------------------------------------------------------------- evaluation

@torch.inference_mode()
def compute_logits(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Computes logits (N, outputs) of every row, in the split's own order, on the CPU in float32.

    Several processes share the batches, and each process gets all logits.
    """
    was_training = model.training
    model.eval()
    device, rows, parts = next(model.parameters()).device, [], []
    # In one pass: the batches of a large split are made when they are asked for.
    for batch in processes.shard(batches):
        parts.append(model(*batch.to(device).inputs()).float().cpu())
        rows.append(batch.rows)
    model.train(was_training)
    # A process without a batch learns the numbers of rows and classes from the others.
    count, labels = processes.all_reduce_max(*((1 + int(torch.cat(rows).max()), parts[0].shape[1]) if parts else (0, 0)))
    # Rows of other processes are zeros here, so that the sum over the processes holds every row once.
    logits = torch.zeros(count, labels)
    for own, part in zip(rows, parts, strict=True):
        logits[own] = part
    return processes.all_reduce_sum(logits)


def labels_of(batches: Sequence[Batch]) -> Tensor:
    """Returns labels (N, ...) of every row, in the split's own order; their form is the problem's."""
    found = [(batch.rows, batch.labels) for batch in batches]
    rows, labels = map(torch.cat, zip(*found, strict=True))
    return torch.empty_like(labels).index_copy_(0, rows, labels)


def validate(model: nn.Module, dev: dict[str, Sequence[Batch]], problem: Problem = SINGLE_LABEL) -> Scores:
    """Computes scores and confusion matrix of every development split and, of several splits, of `all` together."""
    return score_logits({name: compute_logits(model, batches) for name, batches in dev.items()}, dev, problem)


def score_logits(logits_of: dict[str, Tensor], dev: dict[str, Sequence[Batch]], problem: Problem = SINGLE_LABEL) -> Scores:
    """Computes the scores and matrices of `validate` from the logits of every development split."""
    answers = {name: (logits, labels_of(dev[name])) for name, logits in logits_of.items()}
    if len(answers) > 1:
        logits, labels = zip(*answers.values(), strict=True)
        answers["all"] = torch.cat(logits), torch.cat(labels)
    return ({name: problem.scores(*answer) for name, answer in answers.items()},
            {name: problem.matrix(*answer) for name, answer in answers.items()})


def score_by_loss(objective: Objective) -> Scorer:
    """Returns a scorer for development splits without classes: the objective's mean over each split's rows, as `loss`."""
    @torch.inference_mode()
    def score(model: nn.Module, dev: dict[str, Sequence[Batch]]) -> Scores:
        was_training, device, found = model.training, next(model.parameters()).device, {}
        model.eval()
        for name, batches in dev.items():
            total = torch.zeros((), dtype=torch.float64)
            for batch in processes.shard(batches):
                batch = batch.to(device)
                total += objective(model(*batch.inputs()), batch).double().cpu() * len(batch.rows)
            rows = sum(len(batch.rows) for batch in batches)
            found[name] = {"n": rows, "loss": float(processes.all_reduce_sum(total)) / rows}
        model.train(was_training)
        return found, {}
    return score


def selection_split(splits) -> str:
    """Returns the name of the split that chooses the best epoch: in-domain where there is one."""
    return "in_domain" if "in_domain" in splits else next(iter(splits))


# ---------------------------------------------------------------- the parts of a training

@dataclass(frozen=True)
class Data:
    """The batches of a training and of its validation."""

    batches: Sequence[Batch]  # the training split's; their composition is fixed for the run
    dev: dict[str, Sequence[Batch]]  # the development splits' by name, scored after each epoch
    select: str = "in_domain"  # the split that chooses the best epoch
    steps: int | None = None  # optimiser steps in place of the options' epochs; the last epoch ends with them
    problem: Problem = SINGLE_LABEL  # of the labels: its scores, and the one that chooses the best epoch


@dataclass(frozen=True)
class Hooks:
    """Functions of the caller that `fit` calls."""

    on_epoch: Callable[[list[dict]], None] = lambda history: None  # with the history, after each epoch and after a resume
    stop: Callable[[], int | None] = lambda: None  # after each step; a signal's number makes `fit` save and end
    score: Scorer | None = None  # scores the development splits; None: `validate`
    before_step: Callable[[int, int], None] = lambda step, total: None  # with the number of the step, from 0, of a total
    after_update: Callable[[int, int], None] = lambda step, total: None  # after each update, while the gradients are there


def label_loss(label_smoothing: float = 0.0, problem: Problem = SINGLE_LABEL) -> Objective:
    """Returns the objective of training on labels alone: the problem's loss, of a classifier the cross-entropy."""
    return lambda logits, batch: problem.loss(logits, batch.labels, label_smoothing)


# ---------------------------------------------------------------- the loop

def fit(model: nn.Module, data: Data, objective: Objective, options: TrainOptions,
        checkpointing: Checkpointing | None = None, hooks: Hooks | None = None) -> Progress:
    """Trains all parameters that require a gradient and leaves the model with its best epoch's weights.

    The best epoch has the highest MCC (or the problem's score) on the split `data.select`; of equals, or without labels, the
    lowest loss. With `options.ema` the averaged weights are scored and kept.

    Args:
        model: maps (input_ids, attention_mask) to logits, or to an object with the attribute `logits` (None: no classes).
        objective: (output of the model, batch) -> mean loss of the batch.
        checkpointing: the place of the checkpoint; None: no checkpoint is written.

    Raises:
        Diverged: a loss, gradient or weight that is not finite; the last good checkpoint stays.
        UserError: a checkpoint that is damaged or of another model.
        Interrupted: `hooks.stop` returned a signal; a checkpoint was written.
    """
    trainer = Trainer(model, data, objective, options, checkpointing, hooks or Hooks())
    if checkpointing and checkpointing.resume and checkpointing.path.exists():
        trainer.load()
    return trainer.run()


class Trainer:
    """One training: the model, its data, its optimiser and its progress.

    On a GPU no step synchronises with the device: losses, correct predictions and gradient norms are summed there. The sums
    are read every `read_every` steps and before every checkpoint, so that no checkpoint holds a value that is not finite.
    On a CPU, where reading costs nothing, they are read in every step.

    Each of several processes computes a part of each batch's rows (`data_utils.split_large`), and their gradients are added
    up: a step is the same step, whatever the number of processes. Process r seeds its dropout with the seed plus SEEDS
    times r.
    """

    # Runs have seeds of five digits, so that no other run has this seed.
    SEEDS = 100_000
    # Summed on the device. A loss or a norm that is not finite stays so in the sum.
    SUMS = ("loss", "cross_entropy", "correct", "norm")

    def __init__(self, model: nn.Module, data: Data, objective: Objective, options: TrainOptions,
                 checkpointing: Checkpointing | None, hooks: Hooks):
        self.model, self.data, self.objective, self.options, self.hooks = model, data, objective, options, hooks
        self.path, self.name = (checkpointing.path, checkpointing.name) if checkpointing else (None, "")
        self.device = next(model.parameters()).device
        self.read_every = 1 if self.device.type == "cpu" else 16
        self.optimizer = make_optimizer(model, options)
        self.parameters = trainable(model)
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}  # the best epoch's weights by name, on the CPU
        self.average = Average(self.parameters, self.optimizer, options.ema)
        # MPS has no float64; its sums of an epoch are right to about six digits.
        kind = torch.float32 if self.device.type == "mps" else torch.float64
        self.sums = torch.zeros(len(self.SUMS), dtype=kind, device=self.device)  # of this process
        self.graded: list[nn.Parameter] | None = None  # the parameters that get a gradient, in any of the processes
        self.confusion: Tensor | None = None  # the problem's counts of the running epoch: [label][prediction]
        steps_per_epoch = math.ceil(len(data.batches) / options.accumulate)
        self.score = hooks.score or (lambda model, dev: validate(model, dev, data.problem))
        self.total_steps = data.steps or options.epochs * steps_per_epoch
        self.epochs = math.ceil(self.total_steps / steps_per_epoch)
        self.saved_at = time.perf_counter()
        # From pinned memory a batch is copied to the GPU while the GPU computes.
        if self.device.type == "cuda":
            self.data = replace(data, batches=changed(data.batches, Batch.pinned))
        # Each process drops other units; the first one draws the same random numbers as a process alone.
        if not processes.is_main():
            torch.manual_seed(options.seed + self.SEEDS * processes.rank())

    def load(self) -> None:
        """Puts the checkpoint's state into model, optimiser and progress.

        Raises:
            UserError: the checkpoint is damaged or of another model.
        """
        self.progress, self.best = load_checkpoint(self.path, self.model, self.optimizer)
        progress = self.progress
        # In the middle of an epoch its sums go on. With another number of processes the first one takes them all.
        if progress.sums:
            own = [progress.sums[key] if processes.is_main() else 0.0 for key in self.SUMS]
            if len(progress.parts) == processes.count():
                own = progress.parts[processes.rank()]
            self.sums += torch.tensor(own, dtype=self.sums.dtype).to(self.device)
            if processes.is_main() and progress.confusion:
                self.confusion = torch.tensor(progress.confusion, device=self.device)
        self.hooks.on_epoch(self.progress.history)

    def run(self) -> Progress:
        """Trains all epochs that are left; see `fit`."""
        while not self.progress.finished and self.progress.epoch <= self.epochs:
            try:
                with anomaly.watching(self.model) if self.options.anomaly else nullcontext():
                    self.train_epoch()
                    validation, matrices = self.validate()
            except anomaly.NotFinite as found:
                raise self.diverged(str(found)) from None
            except Interrupted:
                # The signal came between two steps or in the validation. A second one raises nothing: what follows is whole.
                self.average.restore()
                if processes.count() == 1:
                    self.save()
                raise
            # History, best weights and checkpoint change together, or not at all.
            with deferred():
                self.finish_epoch(validation, matrices)
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.best[name])
        return self.progress

    def train_epoch(self) -> None:
        """Runs one epoch, or the rest of the epoch after a resume."""
        options, progress, batches = self.options, self.progress, self.data.batches
        self.model.train()
        # The order depends on seed and epoch alone: a resume takes the same batches in the same order.
        order = epoch_order(len(batches), options.seed, progress.epoch)
        groups = [order[i:i + options.accumulate] for i in range(0, len(order), options.accumulate)]
        groups = groups[:progress.step_in_epoch + self.total_steps - progress.step]
        if not progress.sums:
            progress.sums = dict.fromkeys((*self.SUMS, "rows", "tokens", "seconds"), 0.0)
        self.saved_at = start = time.perf_counter()
        before = progress.sums["seconds"]
        label = f"{self.name + ' ' if self.name else ''}epoch {progress.epoch}/{self.epochs}"
        with Bar(total=len(batches), initial=min(progress.step_in_epoch * options.accumulate, len(batches)), unit="batch",
                  desc=label) as bar, deferred():
            for group in groups[progress.step_in_epoch:]:
                self.step([batches[i] for i in group])
                progress.sums["seconds"] = before + time.perf_counter() - start
                bar.update(len(group))
                if progress.step % self.read_every == 0:
                    bar.set_postfix_str(self.postfix(), refresh=False)
                # All processes save or stop after the same step.
                signal, due = processes.all_reduce_max(self.hooks.stop() or 0, self.save_is_due())
                if due or signal and processes.count() > 1:
                    self.save()
                if signal:
                    raise Interrupted(signal)
        self.read_sums()
        self.read_confusion()
        # Measured again, because reading the sums waits for the GPU.
        progress.sums["seconds"] = before + time.perf_counter() - start

    def step(self, group: list[Batch]) -> None:
        """Takes one optimiser step over the batches of a group.

        Raises:
            Diverged: the loss or the gradient is not finite.
        """
        options, progress = self.options, self.progress

        self.hooks.before_step(progress.step, self.total_steps)

        # The learning rate of this step: warm-up, then decay.
        factor = self.lr_factor(progress.step)
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = param_group["peak"] * factor

        # The epoch's counts. `rows` is the whole group's: each batch has its share of the loss.
        rows = sum(len(batch.rows) for batch in group)
        progress.sums["rows"] += rows
        progress.sums["tokens"] += sum(batch.tokens for batch in group)

        # Forward and backward pass, one micro-batch at a time: gradients add up, activations do not.
        for batch in (micro.to(self.device) for whole in group for micro in whole.micro_batches()):
            # Means over tokens are weighed by the tokens of the whole step.
            batch.step = group
            # Autocast is for a backbone that trains in float32: a frozen one has its precision in its layers.
            with torch.autocast(self.device.type, torch.bfloat16,
                                enabled=options.precision == "bf16" and getattr(self.model, "trains_backbone", False)):
                outputs = self.model(*batch.inputs())
            outputs = outputs.float() if isinstance(outputs, Tensor) else outputs
            loss = self.objective(outputs, batch)
            self.count(loss.detach(), getattr(outputs, "logits", outputs), batch)
            # A loss that is not finite ends the training before its gradient reaches a weight.
            if self.read_every == 1 and processes.count() == 1:
                self.read_sums("loss")
            # Weighted by rows, so that accumulation equals one large batch.
            (loss * (len(batch.rows) / rows)).backward()

        # All-reduce: every process has a part of the rows, and each takes the same step.
        if processes.count() > 1:
            self.add_gradients()

        # Clipping. The norm is checked before the update, or on a GPU every `read_every` steps.
        norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), options.clip or math.inf)
        self.sums[self.SUMS.index("norm")] += norm
        if (progress.step + 1) % self.read_every == 0:
            self.read_sums()

        # The update. Without gradients of zeros no memory is held between steps.
        self.optimizer.step()
        self.hooks.after_update(progress.step + 1, self.total_steps)
        self.optimizer.zero_grad(set_to_none=True)
        progress.step_in_epoch += 1
        progress.step += 1

        # The average that is scored and kept follows the new weights (--ema).
        self.average.update(progress.step)

    def postfix(self) -> str:
        """Returns the progress bar's figures: means of the epoch so far, and speed."""
        sums = self.progress.sums
        accuracy = ""
        if self.confusion is not None:
            accuracy = f"{self.data.problem.right_name} {sums['correct'] / sums['rows']:.3f}, "
        return f"loss {sums['loss'] / sums['rows']:.4f}, {accuracy}{sums['tokens'] / sums['seconds']:.0f} tokens/s"

    def add_gradients(self) -> None:
        """Adds up the gradients of all processes; each is already weighted by its process's share of the rows."""
        parameters = list(self.parameters.values())
        # Found out once: a process without a row in this step has no gradient, and yet takes part in the sum.
        if self.graded is None:
            there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int64)
            there = processes.all_reduce_sum(there).tolist()
            self.graded = [p for p, found in zip(parameters, there, strict=True) if found]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.graded]
        # One all-reduce of one tensor: many small ones would each wait for the network.
        flat = processes.all_reduce_sum(torch.cat([grad.flatten() for grad in grads]))
        for p, grad in zip(self.graded, flat.split([p.numel() for p in self.graded]), strict=True):
            p.grad = grad.view_as(p)

    def lr_factor(self, step: int) -> float:
        """Returns the share of the peak learning rate at optimiser step `step` (from 0)."""
        return lr_factor(step, self.total_steps, self.options.warmup, self.options.schedule)

    def count(self, loss: Tensor, logits: Tensor | None, batch: Batch) -> None:
        """Adds a batch to the running epoch's sums, on the device; without logits its loss alone."""
        rows = len(batch.rows)
        if logits is None:
            self.sums[0] += loss.to(self.sums.dtype) * rows
            return
        logits, problem, kind = logits.detach(), self.data.problem, self.sums.dtype
        if (counts := problem.count(logits, batch.labels)) is not None:
            self.confusion = counts if self.confusion is None else self.confusion + counts
        self.sums[:3] += torch.stack([loss.to(kind) * rows, problem.total_loss(logits, batch.labels).to(kind),
                                      problem.right(logits, batch.labels).to(kind)])

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
        own = self.data.problem.no_counts(classes) if self.confusion is None else self.confusion.cpu().clone()
        self.progress.confusion = processes.all_reduce_sum(own).tolist()

    def validate(self) -> Scores:
        """Scores the development splits; several processes stop together after it, if one of them was asked to.

        Raises:
            Diverged: a loss that is not finite; it reaches neither the history nor a checkpoint.
        """
        if processes.count() == 1:
            with self.average.in_model():
                found = self.score(self.model, self.data.dev)
        else:
            with deferred():
                # Saved first, because a launcher that stops its processes does not wait long.
                self.save()
                with self.average.in_model():
                    found = self.score(self.model, self.data.dev)
                (signal,) = processes.all_reduce_max(self.hooks.stop() or 0)
            if signal:
                raise Interrupted(signal)
        for split, values in found[0].items():
            if not math.isfinite(values["loss"]):
                raise self.diverged(f"validation loss {values['loss']} on {split}", after=True)
        return found

    def finish_epoch(self, validation: dict[str, dict], matrices: dict[str, list]) -> None:
        """Adds the epoch's line to the history, copies its weights if they are the best so far, and saves."""
        progress, options, problem = self.progress, self.options, self.data.problem
        peak = self.optimizer.param_groups[0]["peak"]
        progress.history.append({
            "epoch": progress.epoch, "train": self.train_scores(), "validation": validation, problem.counts: matrices,
            # By the formula: a run that is resumed after the epoch's last step has not set the optimiser's rate.
            "learning_rate": peak * self.lr_factor(progress.step - 1), "seconds": progress.sums["seconds"],
            "tokens": int(progress.sums["tokens"])})
        # The best epoch by its score; of equals the one with the lower loss, and then the earlier one.
        chosen = validation[self.data.select]
        score = (chosen.get(problem.chosen, 0.0), -chosen["loss"])
        if score > tuple(progress.best_score):
            progress.best_score, progress.best_epoch = score, progress.epoch
            # Copied to the CPU: a GPU has no room to spare, and training goes on with the originals.
            self.best.update(self.average.best_weights())
        progress.finished = options.patience is not None and progress.epoch - progress.best_epoch >= options.patience
        # The next epoch begins with sums of its own.
        progress.epoch, progress.step_in_epoch, progress.sums = progress.epoch + 1, 0, {}
        progress.parts, progress.confusion = [], []
        self.sums.zero_()
        self.confusion = None
        # Saved before the epoch is reported: a line of metrics.jsonl is never ahead of the checkpoint.
        self.save()
        self.hooks.on_epoch(progress.history)

    def train_scores(self) -> dict[str, float]:
        """Returns the scores of the epoch's training rows; of rows without labels the loss alone."""
        sums, problem = self.progress.sums, self.data.problem
        if not self.progress.confusion and not sums["cross_entropy"]:
            return {"loss": sums["loss"] / sums["rows"]}
        return problem.train_scores(sums, self.progress.confusion)

    def save_is_due(self) -> bool:
        """Returns whether a checkpoint inside the epoch is due, by steps or by minutes."""
        if self.options.save_steps:
            return self.progress.step % self.options.save_steps == 0
        return time.perf_counter() - self.saved_at > 60 * self.options.save_every

    def save(self) -> None:
        """Writes the checkpoint, if there is a folder for it.

        Raises:
            Diverged: a sum or a weight is not finite; the previous checkpoint stays.
        """
        # An update can leave a weight that is not finite though its loss and its gradient were.
        if bad := next((name for name, p in self.parameters.items() if not anomaly.finite(p)), None):
            raise self.diverged(f"{bad} is not finite", after=True)
        if self.path is None:
            return
        if self.progress.sums:
            self.read_sums()
            self.read_confusion()
        save_checkpoint(self.path, self.model, self.optimizer, self.progress, self.best)
        self.saved_at = time.perf_counter()

    def diverged(self, found: str, after: bool = False) -> Diverged:
        """Returns the error that says where the training diverged, and what to do.

        Args:
            found: the value that is not finite.
            after: whether the last step is done; else the error is in the step that follows it.
        """
        where = f"after step {self.progress.step}" if after else f"at step {self.progress.step + 1}"
        return Diverged(f"{found} {where} (epoch {self.progress.epoch}), learning rate "
                        f"{self.optimizer.param_groups[0]['lr']:.3g}; lower --lr" +
                        ("" if self.options.anomaly else ", or find the operation with --anomaly"))
