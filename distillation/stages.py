"""The stages of a student as data: pretraining, the transfer set, the training set; and the same without a teacher.

Each stage is one call of `train_utils.fit`, begins at the best weights of the one before, and can be resumed at any step.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import train_utils
from data_utils import Batch
from distillation.batching import equal_length_batches
from distillation.heads import LanguageModel, Matched, Pooled, token_ranks
from distillation.losses import (
    POOLED,
    Temperature,
    kd_objective,
    pretraining_objective,
    relational_objective,
    transfer_objective,
    weights_of,
)
from distillation.sentences import Inputs, Sentences
from distillation.teachers import HiddenStates, pooled_states
from machine.hardware import device
from model import DistilRNN
from options.schema import DistilOptions, TrainOptions
from train_utils import Checkpointing, Data, Hooks, Objective, Scorer, score_by_loss
from training.checkpoints import Progress
from training.summary import training_summary

HELD_OUT_EVERY, HELD_OUT_MOST = 50, 500  # sentences held out of pretraining
SEEDS = 1_000_000  # stage k seeds its random numbers with the run's seed plus k times this: seeds have five digits


def bare(student: DistilRNN) -> nn.Module:
    """Returns the student without any head for training."""
    return student


@dataclass(frozen=True)
class Stage:
    """One stage: its data, its loss, and the heads that the student has in it."""

    # pretrain, transfer or gold: part of the checkpoint's name, so that each stage resumes from its own.
    name: str
    data: Data
    objective: Objective
    options: TrainOptions
    dropout: float  # of the student
    heads: Callable[[DistilRNN], nn.Module] = bare  # adds the heads that training needs
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

    @property
    def best(self) -> dict:
        """Returns the history's line of the best epoch."""
        return next(line for line in self.progress.history if line["epoch"] == self.progress.best_epoch)


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


def student_stages(plan: Plan) -> list[Stage]:
    """Returns the student's stages before the training set: pretraining and the transfer set, if they have epochs."""
    sentences, options, found = plan.sentences, plan.options, []
    if options.pretrain:
        # Without a language model only sentences with hidden states of the teacher teach something.
        language = options.lm_weight > 0 or sentences.hidden is None
        rows = range(len(sentences.ids) if language else sentences.targeted)
        found.append(pretraining_stage(plan, list(rows), sentences.hidden, language))
    if options.transfer:
        found.append(transfer_stage(plan))
    return found


def baseline_stages(plan: Plan, stages: list[Stage]) -> list[Stage]:
    """Returns the same stages without a teacher: plain text and the training set, for as many steps.

    Language modelling of plain text and training sentences takes the place of pretraining, gold labels that of the
    teacher's. If a stage of the student uses nothing of a teacher's, the baseline has the same object.
    """
    sentences, found = plan.sentences, []
    for stage in stages:
        # Pretraining on plain text alone has nothing of a teacher's.
        if stage.name == "pretrain" and sentences.hidden is None and not sentences.unlabelled:
            found.append(stage)
            continue
        # No transfer set either: the teacher has written or chosen its sentences.
        if stage.name == "pretrain":
            rows = list(range(sentences.unlabelled, len(sentences.ids)))
            baseline = pretraining_stage(plan, rows, None, language=True)
        # Edited tokens need no teacher: the baseline is asked about them too, in sentences that have nothing of a teacher's.
        elif sentences.edits is not None:
            batches = plan.batches(transfer_rows(plan, sentences.free))
            objective = transfer_objective(None, gold_loss(stage), sentences.unlabelled,
                                           edits=sentences.edits, edit_weight=plan.options.edit_weight)
            baseline = replace(stage, data=replace(stage.data, batches=batches), objective=objective,
                               heads=lambda student: Matched(student, edits=True))
        else:
            data = replace(stage.data, batches=plan.batches(list(sentences.rows_of_training_set())))
            baseline = without_teacher(replace(stage, data=data))
        # As many optimiser steps as the student has, however many batches an epoch of either holds.
        found.append(replace(baseline, data=replace(baseline.data, steps=stage.steps)))
    return found


def without_teacher(stage: Stage) -> Stage:
    """Returns the same stage on gold labels alone."""
    # The projection goes too: hidden states are a teacher's.
    return replace(stage, objective=gold_loss(stage), heads=bare)


def gold_loss(stage: Stage) -> Objective:
    """Returns the loss of a stage's gold labels alone."""
    return train_utils.label_loss(stage.options.label_smoothing, stage.data.problem)


def pretraining_stage(plan: Plan, rows: list[int], hidden: HiddenStates | None, language: bool) -> Stage:
    """Returns a stage of pretraining on some rows; a few are held out.

    Args:
        hidden: the teacher's hidden states, to be matched; None: they are not matched.
        language: whether the student is trained as a language model.
    """
    # A single token has no neighbour to predict.
    rows = [row for row in rows if len(plan.sentences.ids[row]) > 1]
    # Every 50th row is held out, or fewer: at most 500 rows in all.
    every = max(HELD_OUT_EVERY, len(rows) // HELD_OUT_MOST)
    held_out, rest = rows[::every], [row for at, row in enumerate(rows) if at % every] or rows
    batches, dev = plan.batches(rest), plan.batches(held_out)
    vocabulary, size = len(plan.inputs.tokenizer), _size(hidden)
    objective = pretraining_objective(hidden, plan.options.lm_weight or 1.0)
    # The rows have no classes: the best epoch is the one with the lowest loss on the rows held out.
    return Stage("pretrain", Data(batches, {"held_out": dev}, "held_out"), objective,
                 plan.train_options(plan.options.pretrain), plan.options.stage_dropout,
                 lambda student: LanguageModel(student, token_ranks(batches, vocabulary) if language else None, size),
                 score_by_loss(objective))


def transfer_stage(plan: Plan) -> Stage:
    """Returns the stage of the transfer set; each training sentence comes `gold_repeats` times an epoch."""
    sentences, options, size = plan.sentences, plan.options, _size(plan.sentences.hidden)
    rows, edits = transfer_rows(plan, range(sentences.unlabelled)), sentences.edits
    directions = 2 if options.match_directions == "both" else 1
    # A new sentence has the teacher's label alone (alpha 1), a training sentence its gold label too.
    logits, temperature = sentences.logits.to(device()), Temperature(options.temperature, options.temperature_schedule)
    # Relations of states teach no class, and most rows have no other label.
    loss = "kl" if options.kd_loss in POOLED else options.kd_loss
    soft, gold = (kd_objective(logits, temperature, alpha, plan.train.label_smoothing, loss, plan.inputs.texts.problem,
                               **weights_of(options)) for alpha in (1.0, options.kd_alpha))
    return Stage("transfer", replace(plan.inputs.texts, batches=plan.batches(rows)),
                 transfer_objective(soft, gold, sentences.unlabelled, sentences.hidden, edits, options.edit_weight),
                 plan.train_options(options.transfer), options.stage_dropout,
                 (lambda student: Matched(student, size, edits is not None, directions))
                 if size or edits is not None else bare, before_step=temperature.begin_step)


def transfer_rows(plan: Plan, new: Iterable[int]) -> list[int]:
    """Returns the rows of an epoch on the transfer set: new sentences, and the training set `gold_repeats` times."""
    # Repeated, or the few training sentences would be lost among many times as many new ones.
    return [*new, *list(plan.sentences.rows_of_training_set()) * plan.options.gold_repeats]


def gold_stage(inputs: Inputs, logits: Tensor, options: DistilOptions, train: TrainOptions) -> Stage:
    """Returns the last stage: the training set with gold labels and the teacher's logits (N, labels)."""
    # Moved once: each step picks its rows of logits on the device.
    logits, temperature = logits.to(device()), Temperature(options.temperature, options.temperature_schedule)
    if options.kd_loss in POOLED:
        first = inputs.teachers[0]
        states = pooled_states(first.model, first.data.batches).to(device())
        objective = relational_objective(logits, states, options.kd_alpha, train.label_smoothing)
        return Stage("gold", inputs.texts, objective, train, inputs.student.dropout, Pooled)
    objective = kd_objective(logits, temperature, options.kd_alpha, train.label_smoothing, options.kd_loss,
                             inputs.texts.problem, **weights_of(options))
    return Stage("gold", inputs.texts, objective, train, inputs.student.dropout, before_step=temperature.begin_step)


def _size(hidden: HiddenStates | None) -> int:
    """Returns the dimensions of the hidden states that are matched; 0: none are matched."""
    return 0 if hidden is None else hidden.values.shape[1]


def run_stage(student: DistilRNN, stage: Stage, number: int, checkpointing: Checkpointing, hooks: Hooks) -> Done:
    """Trains the student in one stage, and leaves it with the stage's best weights.

    Args:
        number: the stage's, from 0.
    """
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
