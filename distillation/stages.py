"""The stages of a student: pretraining, the transfer set, the training set; and the same without a teacher.

Each stage is one call of `train_utils.fit`, begins at the best weights of the one before, and can be resumed at any step.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import data_utils
import train_utils
from data_utils import Batch, Task
from distillation import losses
from distillation.heads import LanguageModel, Matched, mean_loss, token_ranks
from distillation.teachers import HiddenStates, as_labeller
from distillation.transfer_set import Source, batches_of, normalised
from model import DistilRNN
from options.schema import DistilOptions, TrainOptions
from record.files import write_file
from record.folder import CHECKPOINT
from train_utils import Objective, training_summary
from training.checkpoints import Progress

HELD_OUT_EVERY, HELD_OUT_MOST = 50, 500  # sentences held out of pretraining
SEEDS = 1_000_000  # stage k draws from the seed plus k times this: seeds have five digits


def bare(student: DistilRNN) -> nn.Module:
    """Returns the student as it is."""
    return student


@dataclass
class Stage:
    """Holds one stage's data and loss."""

    name: str  # pretrain, transfer or gold
    batches: list[Batch]
    dev: dict[str, list[Batch]]
    objective: Objective
    options: TrainOptions
    dropout: float  # of the student
    wear: Callable[[DistilRNN], nn.Module] = bare  # adds the heads that training needs
    steps: int | None = None  # optimiser steps, where they are another stage's

    @property
    def classes(self) -> bool:
        """Returns whether it trains on classes, and is scored by them."""
        return self.name != "pretrain"


@dataclass
class Sentences:
    """Holds everything that the stages before the last one read, as token ids; rows of the transfer set come first."""

    ids: list[list[int]]
    labels: list[int]  # the teacher's choice in the transfer set, gold ones in the training set; 0 for plain text
    transfer: int  # rows of the transfer set, from 0 on
    train: int  # rows of the training set, after these; plain text comes last
    logits: Tensor  # (transfer + train, labels) of the teachers
    hidden: HiddenStates | None  # the first teacher's, of the same rows

    @property
    def labelled(self) -> int:
        return self.transfer + self.train


def read(source: Source, task: Task, teachers: list, teacher_keys: list[str], options: DistilOptions, max_length: int,
         truncate: str) -> Sentences:
    """Makes the transfer set, or takes it from the cache, with what the teachers say of it and of the training set."""
    transfer = source.sentences(options.augment) if options.augment else []
    text = source.text if options.pretrain else []
    seen = {*source.known(), *map(normalised, transfer)}
    text = [sentence for sentence in dict.fromkeys(text) if normalised(sentence) not in seen]
    ids = data_utils.encode(source.tokenizer, [*transfer, *task.train.sentences, *text], max_length, truncate)
    labelled = len(transfer) + len(task.train)
    logits, hidden = [], None
    for teacher, key in zip(teachers, teacher_keys, strict=True):
        match = options.match == "hidden" and hidden is None
        if options.label_precision == "bf16":
            key += " bf16"
        one, states = source.outputs(as_labeller(teacher, options.label_precision), key, ids[:labelled], options.match_size,
                                     match, options.match_weight, options.score_weight)
        logits.append(one)
        hidden = hidden or states
    logits = torch.stack(logits).mean(0)
    labels = [*logits[:len(transfer)].argmax(-1).tolist(), *task.train.labels, *[0] * len(text)]
    return Sentences(ids, labels, len(transfer), len(task.train), logits, hidden)


def first_stages(sentences: Sentences, tokenizer, options: DistilOptions, train: TrainOptions,
                 dev: dict[str, list[Batch]], device: torch.device) -> list[Stage]:
    """Returns the student's stages before the last one: pretraining and the transfer set, where they have epochs."""
    found, hidden = [], sentences.hidden
    size = hidden.values.shape[1] if hidden is not None else 0
    if options.pretrain:
        language = options.lm_weight > 0 or hidden is None
        rows = range(len(sentences.ids) if language else sentences.labelled)
        found.append(_pretrain(sentences, tokenizer, list(rows), hidden, options, train, language))
    if options.transfer:
        rows = [*range(sentences.transfer),
                *list(range(sentences.transfer, sentences.labelled)) * options.gold_repeats]
        logits = sentences.logits.to(device)
        soft, gold = (losses.distillation(logits, options.temperature, alpha, train.label_smoothing, options.kd_loss)
                      for alpha in (1.0, options.kd_alpha))
        found.append(Stage(
            "transfer", _batches(sentences, tokenizer, rows, options, train), dev,
            losses.transfer(soft, gold, sentences.transfer, hidden),
            _stage_options(options, train, options.transfer), options.stage_dropout,
            (lambda student: Matched(student, size)) if size else bare))
    return found


def control_stages(stages: list[Stage], sentences: Sentences, tokenizer, options: DistilOptions, train: TrainOptions
                   ) -> list[Stage]:
    """Returns the same stages without a teacher: plain text and the training set, for as many steps.

    Language modelling of plain text and training sentences stands for pretraining, gold labels for the teacher's. A stage in
    which the student itself has nothing of a teacher's is the control's as well, the same object.
    """
    found = []
    for stage in stages:
        if stage.name == "pretrain" and sentences.hidden is None and not sentences.transfer:
            found.append(stage)
            continue
        if stage.name == "pretrain":
            rows = list(range(sentences.transfer, len(sentences.ids)))
            control = _pretrain(sentences, tokenizer, rows, None, options, train, True)
        else:
            rows = list(range(sentences.transfer, sentences.labelled))
            control = replace(stage, batches=_batches(sentences, tokenizer, rows, options, train), wear=bare,
                              objective=losses.cross_entropy(train.label_smoothing))
        found.append(replace(control, steps=stage.options.epochs * -(-len(stage.batches) // stage.options.accumulate)))
    return found


def _pretrain(sentences: Sentences, tokenizer, rows: list[int], hidden: HiddenStates | None, options: DistilOptions,
              train: TrainOptions, language: bool) -> Stage:
    """Returns a stage of pretraining on some rows, of which a few are held out."""
    rows = [row for row in rows if len(sentences.ids[row]) > 1]  # a token alone has no neighbour to predict
    every = max(HELD_OUT_EVERY, len(rows) // HELD_OUT_MOST)
    held_out, rest = rows[::every], [row for at, row in enumerate(rows) if at % every] or rows
    batches, dev = (_batches(sentences, tokenizer, some, options, train) for some in (rest, held_out))
    objective = losses.pretraining(hidden, options.lm_weight or 1.0)
    vocabulary = len(tokenizer)
    return Stage("pretrain", batches, {"held_out": dev}, objective, _stage_options(options, train, options.pretrain),
                 options.stage_dropout, lambda student: LanguageModel(
                     student, token_ranks(batches, vocabulary) if language else None,
                     hidden.values.shape[1] if hidden is not None else 0))


def _batches(sentences: Sentences, tokenizer, rows: list[int], options: DistilOptions, train: TrainOptions) -> list[Batch]:
    return batches_of(sentences.ids, sentences.labels, rows, options.stage_tokens, tokenizer, train.seed)


def _stage_options(options: DistilOptions, train: TrainOptions, epochs: int) -> TrainOptions:
    return replace(train, epochs=epochs, lr=options.stage_lr, batch_tokens=options.stage_tokens, patience=None)


def prefix(phase: str, stage: Stage) -> str:
    """Returns what the name of a stage's checkpoint begins with."""
    return f"{phase}." if stage.name == "gold" else f"{phase}.{stage.name}."


def take_over(folder: Path, stage: Stage) -> None:
    """Gives the control the student's finished training in a stage that is the same for both."""
    theirs, own = (folder / (prefix(phase, stage) + CHECKPOINT) for phase in ("student", "scratch"))
    if not own.exists():
        write_file(own, theirs.read_bytes())


def run_stage(student: DistilRNN, stage: Stage, number: int, device: torch.device, folder: Path, resume: bool, phase: str,
              select: str, on_epoch: Callable[[list[dict]], None], stop: Callable[[], int | None]) -> tuple[Progress, dict]:
    """Trains the student in one stage.

    Args:
        number: of the stage, from 0; each draws its own random numbers, whenever the run was resumed.
        phase: student or scratch.

    Returns:
        progress, and the stage's part of the summary.
    """
    if number:
        torch.manual_seed(stage.options.seed + SEEDS * number)
    student.dropout.p = stage.dropout
    model = stage.wear(student).to(device)
    progress = train_utils.fit(
        model, stage.batches, stage.dev, stage.objective, stage.options, folder=folder, resume=resume,
        name=prefix(phase, stage), select=select if stage.classes else "held_out", stop=stop, on_epoch=on_epoch,
        steps=stage.steps, score=None if stage.classes else mean_loss(stage.objective))
    best = next(line for line in progress.history if line["epoch"] == progress.best_epoch)
    return progress, {"stage": stage.name, "best_epoch": progress.best_epoch, "validation": best["validation"],
                      "loss": best["train"]["loss"], **training_summary(progress, stage.batches)}
