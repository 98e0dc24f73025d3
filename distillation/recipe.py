"""Distillation from top to bottom: the algorithm of the report.

    students = distil(inputs, run, options, folder)
    students["student"].model, students["scratch"].model    # the student, and the baseline: the same without a teacher

To understand all of `python run.py distil`, read eight files in this order: experiments/distil.py (options in, folder out),
recipe.py, sentences.py (the sentences of the stages, with the teachers' targets), transfer_set.py (new sentences),
teachers.py (a teacher's targets for a batch), stages.py (a stage: its data, its loss), heads.py (the student's heads in
training), losses.py. The other files hold caches, choices that are off by default, and machinery.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save

import speed
from distillation.embeddings import FirstEmbeddings
from distillation.pretraining import pretraining_stage
from distillation.resuming import checkpoint_of, take_over
from distillation.sentences import prepare_sentences, training_set_alone
from distillation.stages import Done, Plan, Stage, gold_stage, run_stage, transfer_stage
from distillation.teachers import Inputs
from machine.hardware import device
from metrics.problems import PROBLEMS
from model import DistilRNN
from options.schema import DistilOptions, RunOptions
from record.files import write_file
from record.folder import Recorder
from train_utils import Hooks

STUDENT, BASELINE = "student", "scratch"  # names of files and keys in a run's folder
STAGES = {"pretrain": pretraining_stage, "transfer": transfer_stage, "gold": gold_stage}


@dataclass
class Trained:
    """A student after all of its stages."""

    model: DistilRNN
    stages: list[Done]


def distil(inputs: Inputs, run: RunOptions, options: DistilOptions, folder: Path, say: Callable[[str], None] = print,
           stop: Callable[[], int | None] = lambda: None,
           log: Callable[[int, dict[str, float]], None] = lambda epoch, values: None) -> dict[str, Trained]:
    """Distils the teachers into a student, then trains the baseline: the same student without a teacher.

    Args:
        folder: the run's, for checkpoints, metrics and the weights of each student.
        stop: called after each step; a signal's number ends the run, which can be resumed.
        log: takes an epoch and its scalars by name.

    Returns:
        The student and, with `options.control`, the baseline.

    Raises:
        UserError: a damaged cache or checkpoint.
        train_utils.Diverged, signals.Interrupted: the last good checkpoint stays.
    """
    # 1. The teachers label new sentences and the training set, once for all stages; with --plain the training set alone.
    if options.pretrain or options.transfer:
        sentences = prepare_sentences(inputs, run, options, stop)
    else:
        sentences = training_set_alone(inputs, options, folder)

    # 2. Stages as data: pretraining, the transfer set, the training set. The baseline has the same ones without a teacher.
    plan = Plan(inputs, sentences, options, run.train)
    plans = {STUDENT: student_stages(plan)}
    if options.control:
        plans[BASELINE] = baseline_stages(plan, plans[STUDENT])

    embeddings, recorder, trained = FirstEmbeddings(plan), Recorder(folder, say, log), {}
    for phase, stages in plans.items():
        say("student with KD" if phase == STUDENT else "baseline: the same student without a teacher")

        # 3. Both begin with the same weights and random numbers, with the teacher's embeddings.
        torch.manual_seed(run.train.seed)
        model = DistilRNN(inputs.student)
        PROBLEMS[inputs.task.problem].start(model.classifier, inputs.task.train.labels)
        embeddings.fill(model)
        speed.install(model.to(device()))

        # 4. Stage after stage, each from the best weights of the one before.
        done = []
        for number, stage in enumerate(stages):
            checkpoint = checkpoint_of(folder, phase, stage.name, run.resume)
            # A stage without anything of a teacher's is trained once for both.
            if phase == BASELINE and stage in plans[STUDENT]:
                checkpoint = replace(checkpoint, resume=True)
                take_over(checkpoint_of(folder, STUDENT, stage.name), checkpoint)
            on_epoch = partial(recorder, phase=phase, stage=stage.name if len(stages) > 1 else None)
            done.append(run_stage(model, stage, number, checkpoint, Hooks(on_epoch, stop)))
        trained[phase] = Trained(model, done)

        # 5. Written now: a baseline that is stopped or diverges leaves the student as it will be.
        weights = {name: value.cpu() for name, value in model.state_dict().items()}
        write_file(folder / f"{phase}.safetensors", save(weights))
    return trained


def student_stages(plan: Plan) -> list[Stage]:
    """Returns the student's stages: those with epochs, the training set last."""
    epochs = {"pretrain": plan.options.pretrain, "transfer": plan.options.transfer, "gold": plan.train.epochs}
    return [make(plan) for name, make in STAGES.items() if epochs[name]]


def baseline_stages(plan: Plan, stages: list[Stage]) -> list[Stage]:
    """Returns the same stages without a teacher, for as many optimiser steps.

    Language modelling of plain text and training sentences takes the place of pretraining, gold labels that of the
    teacher's. If a stage of the student uses nothing of a teacher's, the baseline has the same object.
    """
    sentences, found = plan.sentences, []
    for stage in stages:
        # Pretraining on plain text alone has nothing of a teacher's.
        if stage.name == "pretrain" and sentences.hidden is None and not sentences.unlabelled:
            found.append(stage)
            continue
        baseline = STAGES[stage.name](plan, teacher=False)
        # As many steps as the student has, however many batches an epoch of either holds.
        found.append(replace(baseline, data=replace(baseline.data, steps=stage.steps)))
    return found
