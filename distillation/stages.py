"""A stage of a student as data, the stages of the transfer set and of the training set, and the training in a stage.

Each stage is one call of `train_utils.fit`, begins at the best weights of the one before, and can be resumed at any step.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import train_utils
from data_utils import Batch
from distillation.annealing import Temperature
from distillation.batching import equal_length_batches
from distillation.heads import Matched
from distillation.losses import POOLED, kd_objective, transfer_objective
from distillation.relations import Pooled, pooled_states, relational_objective
from distillation.sentences import Sentences
from distillation.soft_losses import weights_of
from distillation.teachers import Inputs
from machine.hardware import device
from model import DistilRNN
from options.schema import DistilOptions, TrainOptions
from train_utils import Checkpointing, Data, Hooks, Objective, Scorer
from training.checkpoints import Progress
from training.summary import training_summary

SEEDS = 1_000_000  # stage k seeds its random numbers with the run's seed plus k times this: seeds have five digits


@dataclass(frozen=True, eq=False)
class Stage:
    """One stage: its data, its loss, and the heads that the student has in it."""

    name: str  # pretrain, transfer or gold
    data: Data
    objective: Objective
    options: TrainOptions
    dropout: float  # of the student
    heads: Callable[[DistilRNN], nn.Module] = lambda student: student  # adds the heads that training needs
    score: Scorer | None = None  # of the development splits; None: by their classes
    before_step: Callable[[int, int], None] = lambda step, total: None  # sets the temperature of a step

    @property
    def steps(self) -> int:
        """Returns the number of optimiser steps."""
        # A number of steps that is given is a baseline's: the student's own number.
        return self.data.steps or self.options.epochs * -(-len(self.data.batches) // self.options.accumulate)


@dataclass(frozen=True)
class Done:
    """A stage that a student has been through."""

    stage: Stage
    progress: Progress
    cost: dict  # steps, seconds, tokens and peak memory, as in summary.json


@dataclass(frozen=True)
class Plan:
    """The sources of the stages."""

    inputs: Inputs
    sentences: Sentences
    options: DistilOptions
    train: TrainOptions

    def batches(self, rows: list[int]) -> list[Batch]:
        """Makes a stage's batches of some rows."""
        return equal_length_batches(self.sentences.ids, self.sentences.labels, rows, self.options.stage_tokens,
                                    self.inputs.tokenizer, self.train.seed)

    def train_options(self, epochs: int) -> TrainOptions:
        """Returns the training options of a stage before the last one."""
        # Without patience: the baseline takes as many steps as the student, and must not stop earlier.
        return replace(self.train, epochs=epochs, lr=self.options.stage_lr, batch_tokens=self.options.stage_tokens,
                       patience=None)

    def gold_loss(self) -> Objective:
        """Returns the loss of gold labels alone."""
        return train_utils.label_loss(self.train.label_smoothing, self.inputs.texts.problem)

    def kd_loss(self, logits: Tensor, temperature: Temperature, alpha: float) -> Objective:
        """Returns the loss under the teachers' logits (N, labels), with a weight of `alpha`, and gold labels."""
        # Relations of states teach no class: the rows of the transfer set, most of them without a gold label, have KL.
        loss = "kl" if self.options.kd_loss in POOLED else self.options.kd_loss
        return kd_objective(logits, temperature, alpha, self.train.label_smoothing, loss, self.inputs.texts.problem,
                            **weights_of(self.options))


def transfer_stage(plan: Plan, teacher: bool = True) -> Stage:
    """Returns the stage of the transfer set.

    Args:
        teacher: False: the same stage without a teacher, on gold labels and, with `edit_weight`, edited tokens.
    """
    sentences, options, edits = plan.sentences, plan.options, plan.sentences.edits
    temperature = Temperature(options.temperature, options.temperature_schedule)
    if teacher:
        # A new sentence has the teacher's label alone (alpha 1), a training sentence its gold label too.
        new, hidden, logits = range(sentences.unlabelled), sentences.hidden, sentences.logits.to(device())
        soft, gold = (plan.kd_loss(logits, temperature, alpha) for alpha in (1.0, options.kd_alpha))
    else:
        # Edited tokens need no teacher: the baseline is asked about them in sentences with nothing of a teacher's.
        new, hidden, soft, gold = sentences.free, None, None, plan.gold_loss()
    # Training sentences are repeated, or the few would be lost among many times as many new ones.
    train = list(sentences.rows_of_training_set())
    rows = [*new, *train * options.gold_repeats]
    objective = transfer_objective(soft, gold, sentences.unlabelled, hidden, edits, options.edit_weight)
    # New sentences without a label and without a question teach nothing.
    if not teacher and edits is None:
        rows, objective = train, gold
    stage = Stage("transfer", replace(plan.inputs.texts, batches=plan.batches(rows)), objective,
                  plan.train_options(options.transfer), options.stage_dropout, before_step=temperature.begin_step)
    size = 0 if hidden is None else hidden.values.shape[1]
    directions = 2 if options.match_directions == "both" else 1
    if size or edits is not None:
        return replace(stage, heads=lambda student: Matched(student, size, edits is not None, directions))
    return stage


def gold_stage(plan: Plan, teacher: bool = True) -> Stage:
    """Returns the last stage: the training set, with the teachers' logits or without."""
    sentences, options = plan.sentences, plan.options
    stage = Stage("gold", plan.inputs.texts, plan.gold_loss(), plan.train, plan.inputs.student.dropout)
    if not teacher:
        return stage
    # Moved once: each step picks its rows of logits on the device.
    logits = sentences.logits[sentences.unlabelled:].to(device())
    if options.kd_loss in POOLED:
        first = plan.inputs.teachers[0]
        states = pooled_states(first.model, first.data.batches).to(device())
        objective = relational_objective(logits, states, options.kd_alpha, plan.train.label_smoothing)
        return replace(stage, objective=objective, heads=Pooled)
    temperature = Temperature(options.temperature, options.temperature_schedule)
    return replace(stage, objective=plan.kd_loss(logits, temperature, options.kd_alpha), before_step=temperature.begin_step)


def run_stage(student: DistilRNN, stage: Stage, number: int, checkpointing: Checkpointing, hooks: Hooks) -> Done:
    """Trains the student in one stage (numbers begin at 0), and leaves it with the stage's best weights."""
    # Every stage has random numbers of its own, so that a resumed run has them, too. The first goes on from the initial
    # weights.
    if number:
        torch.manual_seed(stage.options.seed + SEEDS * number)
    # The heads are the stage's own: the next stage begins with the student alone.
    student.dropout.p = stage.dropout
    model = stage.heads(student).to(device())
    progress = train_utils.fit(model, stage.data, stage.objective, stage.options, checkpointing,
                               replace(hooks, score=stage.score, before_step=stage.before_step))
    return Done(stage, progress, training_summary(progress, stage.data.batches))
