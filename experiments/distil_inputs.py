"""Loads everything that a distillation starts from: teachers, task, text, labels; nothing is written.

    options, loaded, files = load_teachers(options, distil_options)
    options, distil_options, inputs = prepare(options, distil_options, loaded)
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data.backbones import max_length_of
from data.digests import tokenizer_digest
from data.lines import read_sentences
from data.segments import reads_pairs, separator_of
from data_utils import Batch, Task, changed
from distillation.cache import Base
from distillation.losses import loss_of
from distillation.soft_labels import read_labels
from distillation.student_size import sized_student
from distillation.teachers import Inputs, Teacher
from experiments.evaluate import load_finetuned
from experiments.inputs import load_task, make_all_batches
from machine import processes
from machine.errors import UserError
from machine.hardware import bf16_is_fast
from metrics.problems import PROBLEMS
from model import TextClassifier, count_parameters
from options.schema import DistilOptions, RunOptions, TableOptions
from record import tensors
from record.config_json import rebuild
from record.files import read_json, unchanged
from record.ownership import weights
from train_utils import Data, selection_split


def load_teachers(options: RunOptions, distil_options: DistilOptions
                  ) -> tuple[RunOptions, list[tuple[TextClassifier, object]], dict[str, str]]:
    """Loads the teachers.

    Returns:
        The options, completed by those of the first teacher's run; each teacher with its tokenizer; the SHA-256 of the
        files of their weights: the first one's by name, the others' by path.

    Raises:
        UserError: a teacher that is not a finished LoRA run, teachers of several tasks, or stages in several processes.
    """
    if processes.count() > 1 and not distil_options.plain:
        raise UserError(f"distil in stages is for one process, and here are {processes.count()}; --plain takes several")
    folders = [distil_options.teacher, *map(Path, distil_options.more_teachers)]
    with unchanged([path for folder in folders for path in weights(folder)]) as digests:
        loaded = [load_finetuned(folder) for folder in folders]
    files = {path.name if number == 0 else str(path): digests[path]
             for number, folder in enumerate(folders) for path in weights(folder)}
    _, _, recorded = loaded[0]
    # Bases and tokenizers may differ, because teachers meet in their logits; texts and classes must not.
    for folder, (_, _, other) in zip(folders, loaded, strict=True):
        for name in ("task", "data", "limit", "text_column", "template", "label_column", "feature_columns", "problem",
                     "join", "fold"):
            if other.get(name) != recorded.get(name):
                raise UserError(f"--teacher {folder}: its {name} is {other.get(name)}, the first one's "
                                f"{recorded.get(name)}; expected teachers of one task")
    # The teacher reads no more tokens than it has positions.
    max_length = min(options.max_length or recorded["max_length"], *(max_length_of(teacher.net) for teacher, _, _ in loaded))
    options = replace(options, model=recorded["model"], task=options.task or recorded["task"],
                      data=options.data or recorded["data"], limit=options.limit or recorded["limit"],
                      max_length=max_length, table=rebuild(TableOptions, recorded), fold=recorded.get("fold"))
    return options, [(teacher, tokenizer) for teacher, tokenizer, _ in loaded], files


def prepare(options: RunOptions, distil_options: DistilOptions, loaded: list[tuple[TextClassifier, object]]
            ) -> tuple[RunOptions, DistilOptions, Inputs]:
    """Loads the task, makes the batches and sizes the student; writes nothing.

    Args:
        loaded: the teachers, each with its tokenizer.

    Returns:
        The options, the defaults that depend on teacher, task and machine filled in, and the inputs of the recipe.

    Raises:
        UserError: bad input.
    """
    first, tokenizer = loaded[0]
    task = load_task(options, tokenizer)
    check(options, distil_options, task, tokenizer)
    teachers = teachers_with_batches(options, task, loaded)
    data = teachers[0].data
    texts = replace(data, batches=texts_only(data.batches),
                    dev={split: texts_only(rows) for split, rows in data.dev.items()})
    distil_options = with_defaults(distil_options, len(task.train), first.decoder)
    student = sized_student(distil_options, len(tokenizer), task.num_labels, count_parameters(first)["total"])

    # Runs of early versions have not recorded the digest of their base.
    recorded = read_json(distil_options.teacher / "config.json").get("base_sha256")
    # The files are read once, so that the recorded digests are those of the sentences that are trained on.
    plain, text_files = read_text(distil_options.text)
    separator = tokenizer.pair_separator if reads_pairs(tokenizer) else None
    labels = [read_labels(path, task.classes, PROBLEMS[task.problem], separator) for path in distil_options.labels]
    label_files = {file.path: digest for file, digest in labels}
    task = replace(task, files={**task.files, **text_files, **label_files})
    base = Base(options.model, recorded or tensors.weights_digest(first.net.base_model), tokenizer_digest(tokenizer))
    return options, distil_options, Inputs(task, tokenizer, base, teachers, student, texts, plain,
                                           [file for file, _ in labels])


def check(options: RunOptions, distil_options: DistilOptions, task: Task, tokenizer) -> None:
    """Checks the options that depend on the task, its problem and the tokenizer.

    Raises:
        UserError: one of them does not fit.
    """
    problem = PROBLEMS[task.problem]
    # For its error.
    loss_of(distil_options.kd_loss, problem)
    problem.check("--label-smoothing", options.train.label_smoothing > 0)
    if distil_options.vocabulary and distil_options.vocabulary > len(tokenizer):
        raise UserError(f"--vocabulary {distil_options.vocabulary}: expected at most {len(tokenizer)}, the tokens of "
                        f"{options.model}'s tokenizer")
    staged = distil_options.pretrain or distil_options.transfer
    if distil_options.student_embeddings == "contextual" and not (staged and distil_options.match == "hidden"):
        raise UserError("--student-embeddings contextual: means of the hidden states that --match hidden has for the "
                        "stages; not with --match none, nor with --plain or without stages")


def with_defaults(options: DistilOptions, train: int, decoder: bool) -> DistilOptions:
    """Fills in the defaults that depend on task, teacher and machine.

    Args:
        train: number of training sentences.
        decoder: whether the first teacher is a decoder: the student reads as it does.
    """
    # As many new sentences as the task's size deserves, up to a bound.
    augment = min(options.augment_most, options.augment_times * train)
    # Labels of the stages may be computed in bfloat16; those of --plain are the teacher's own.
    bf16 = (options.pretrain or options.transfer) and bf16_is_fast()
    defaults = {"directions": 1 if decoder else 2, "augment": augment, "label_precision": "bf16" if bf16 else "teacher"}
    return replace(options, **{name: value for name, value in defaults.items() if getattr(options, name) is None})


def teachers_with_batches(options: RunOptions, task: Task, loaded: list[tuple[TextClassifier, object]]) -> list[Teacher]:
    """Returns the teachers with the task's batches as each reads them."""
    teachers: dict[str, Teacher] = {}  # the first teacher of each tokenizer
    found, (_, first) = [], loaded[0]
    for model, tokenizer in loaded:
        # Teachers with one tokenizer share its batches.
        if (key := tokenizer_digest(tokenizer)) not in teachers:
            separators = (separator_of(first), separator_of(tokenizer))
            joined = len(options.table.text_column) > 1 and len(set(separators)) > 1
            teacher = Teacher(model, tokenizer, Data([], {}), separators if joined else None)
            own = replace(task, train=replace(task.train, sentences=teacher.texts(task.train.sentences)), dev={
                name: replace(split, sentences=teacher.texts(split.sentences)) for name, split in task.dev.items()})
            batches, dev = make_all_batches(own, tokenizer, options.max_length, options.train, options.table.truncate)
            teachers[key] = replace(teacher, data=Data(batches, dev, selection_split(task.dev),
                                                       problem=PROBLEMS[task.problem]))
        found.append(replace(teachers[key], model=model))
    return found


def texts_only(batches: Sequence[Batch]) -> Sequence[Batch]:
    """Returns the batches without numeric features: the student reads text alone."""
    return changed(batches, lambda batch: replace(batch, features=None, micro=batch.micro and texts_only(batch.micro)))


def read_text(files: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """Returns the sentences of text files, one a line, and the SHA-256 of each file by name.

    Raises:
        UserError: a file is missing, not UTF-8, or has no sentence.
    """
    sentences, digests = [], {}
    try:
        for file in files:
            found, digests[file] = read_sentences(file)
            sentences += found
    except UserError as error:
        raise UserError(f"--text {error}") from None
    return sentences, digests
