"""Distillation from top to bottom: the algorithm of the report.

    students = distil(inputs, run, options, folder)
    students["student"].model, students["scratch"].model    # the student, and the baseline: the same without a teacher

The files in the order of their use: sentences.py (the transfer set and the teachers' targets), stages.py (stages
as data), heads.py (heads for training alone), losses.py (the losses).
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

import speed
from distillation.embeddings import embed_as, token_means
from distillation.sentences import Inputs, prepare_sentences
from distillation.soft_labels import check_labels, with_labels
from distillation.stages import Done, Plan, Stage, baseline_stages, gold_stage, run_stage, student_stages, without_teacher
from distillation.teachers import teacher_logits
from distillation.vocabulary import token_counts, vocabulary_rows
from machine.hardware import device
from metrics.problems import PROBLEMS
from model import DistilRNN
from options.schema import DistilOptions, RunOptions
from record.files import write_file
from record.folder import Recorder
from train_utils import Checkpointing, Hooks

STUDENT, BASELINE = "student", "scratch"  # names of files and keys in a run's folder


@dataclass
class Trained:
    """A student after all of its stages."""

    model: DistilRNN
    stages: list[Done]


def distil(inputs: Inputs, run: RunOptions, options: DistilOptions, folder: Path, say: Callable[[str], None] = print,
           stop: Callable[[], int | None] = lambda: None,
           log: Callable[[int, dict[str, float]], None] = lambda epoch, values: None) -> dict[str, Trained]:
    """Distils the teachers into a student, then trains the baseline: the same student without a teacher.

    Both begin with the same weights and take the same number of steps in each stage. In the last stage, on the training set,
    they get the same batches in the same order.

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
    train, stages, baseline, means = run.train, [], [], None

    # 1. The teachers label: new sentences and the training set once for all stages, or with --plain the training set alone.
    if options.pretrain or options.transfer:
        sentences = prepare_sentences(inputs, run, options, stop)
        plan = Plan(inputs, sentences, options, train)
        stages = student_stages(plan)
        baseline = baseline_stages(plan, stages)
        logits = sentences.logits[sentences.unlabelled:]
        ids = sentences.ids[:sentences.targeted]
        if options.student_embeddings == "contextual":
            means = token_means(ids, sentences.hidden, inputs.student.vocab_size)
    else:
        logits = teacher_logits([(one.model, one.data.batches) for one in inputs.teachers],
                                folder / "teacher_logits.safetensors")
        texts = inputs.task.train.sentences
        check_labels(inputs.labels, texts)
        logits = with_labels(logits, len(inputs.teachers), inputs.labels, texts, options.labels_alone)
        ids = [batch.input_ids[batch.attention_mask.bool()].tolist() for batch in inputs.texts.batches]
    counts = token_counts(ids, inputs.student.vocab_size)

    # 2. The last stage of both is the training set: with the teacher's logits, and without.
    gold = gold_stage(inputs, logits, options, train)
    plans = {STUDENT: [*stages, gold]}
    if options.control:
        plans[BASELINE] = [*baseline, without_teacher(gold)]

    trained, recorder = {}, Recorder(folder, say, log)
    for phase, its_stages in plans.items():
        say("student with KD" if phase == STUDENT else "baseline: the same student without a teacher")

        # 3. A student from the same initial weights and random numbers, with its vocabulary and the teacher's embeddings.
        torch.manual_seed(train.seed)
        model = untrained(inputs, options.student_embeddings, counts, means).to(device())
        speed.install(model)

        # 4. Stage after stage, each from the best weights of the one before.
        done = []
        for number, stage in enumerate(its_stages):
            # A stage that both students share is trained once.
            shared = phase == BASELINE and any(stage is one for one in stages)
            if shared:
                take_over(folder, stage)
            checkpointing = Checkpointing(folder, checkpoint_name(phase, stage), run.resume or shared)

            # Bound now, because the next stage changes both names.
            def on_epoch(history: list[dict], phase: str = phase, stage: Stage = stage) -> None:
                recorder(history, phase, stage.name if stages else None)

            done.append(run_stage(model, stage, number, checkpointing, Hooks(on_epoch, stop)))
        trained[phase] = Trained(model, done)

        # 5. Written now: a baseline that is stopped or diverges leaves the student as it will be.
        weights = {name: value.cpu() for name, value in model.state_dict().items()}
        write_file(folder / f"{phase}.safetensors", save(weights))
    return trained


def untrained(inputs: Inputs, embeddings: str, counts: Tensor, means: Tensor | None) -> DistilRNN:
    """Returns a student before its first stage. Seed first: its weights are sampled here.

    Args:
        embeddings: `random`, or the teacher's.
        counts: (vocab_size,) of each token id in the sentences that train.
        means: (vocab_size, d) the mean hidden states of the tokens; None: the teacher's token embeddings.
    """
    model = DistilRNN(inputs.student)
    PROBLEMS[inputs.task.problem].start(model.classifier, inputs.task.train.labels)
    # The rows first: the teacher's embeddings are reduced to them.
    if inputs.student.vocabulary:
        model.embedding.rows.copy_(vocabulary_rows(counts, inputs.student, inputs.tokenizer))
    if embeddings != "random":
        embed_as(inputs.teachers[0].model, model, counts, means)
    return model


def checkpoint_name(phase: str, stage: Stage) -> str:
    """Returns the beginning of the name of a stage's checkpoint."""
    # The gold stage has the checkpoint name of runs with --plain: it is their only stage.
    return f"{phase}." if stage.name == "gold" else f"{phase}.{stage.name}."


def take_over(folder: Path, stage: Stage) -> None:
    """Copies the student's finished checkpoint of a stage that the baseline shares."""
    theirs, own = (Checkpointing(folder, checkpoint_name(phase, stage)).path for phase in (STUDENT, BASELINE))
    # A resumed run may have gone on from it already.
    if not own.exists():
        write_file(own, theirs.read_bytes())
