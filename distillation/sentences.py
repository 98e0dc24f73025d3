"""The sentences of a distillation, as token ids, and the teachers' targets for them."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from data.splits import Label
from data_utils import encode
from distillation.batching import ids_by_row
from distillation.cache import Cache
from distillation.edited import Marks, mark_edits, originals
from distillation.labels import Labeller, teacher_logits
from distillation.soft_labels import check_labels, with_labels
from distillation.sources import free_of_teacher, make_transfer_set, pretraining_text
from distillation.teachers import HiddenStates, Inputs, mean_logits
from metrics.problems import PROBLEMS
from options.schema import DistilOptions, RunOptions


@dataclass
class Sentences:
    """The sentences of all stages: the transfer set comes first, then the training set, then plain text."""

    ids: list[list[int]]  # token ids
    labels: list[Label]  # the teacher's choice in the transfer set, gold ones in the training set; 0 for plain text
    unlabelled: int  # rows of the transfer set
    train: int  # rows of the training set
    logits: Tensor  # (unlabelled + train, labels) of the teachers
    hidden: HiddenStates | None = None  # the first teacher's, of the same rows
    edits: Marks | None = None  # the tokens of the same rows that an edit touched, if the student is asked about them
    free: list[int] = field(default_factory=list)  # rows of the transfer set with nothing of a teacher's

    @property
    def targeted(self) -> int:
        """Returns the number of rows with a teacher's targets."""
        return self.unlabelled + self.train

    def rows_of_training_set(self) -> range:
        """Returns the rows of the training set."""
        return range(self.unlabelled, self.targeted)


def prepare_sentences(inputs: Inputs, run: RunOptions, options: DistilOptions, stop: Callable[[], int | None]) -> Sentences:
    """Makes the transfer set and the teachers' targets, or takes both from the cache.

    Raises:
        UserError: a damaged cache.
        Interrupted: `stop` returned a signal.
    """
    def ids_of(texts: list[str], tokenizer=inputs.tokenizer) -> list[list[int]]:
        return encode(tokenizer, texts, run.max_length, run.table.truncate)

    # 1. New sentences without gold labels, then the training set, then plain text for pretraining.
    cache = Cache.open(options.cache or Path(run.out).parent, inputs.base, inputs.task, stop)
    new = make_transfer_set(inputs, cache, options.augment, options.transfer_version)
    train = inputs.task.train
    targeted = [*(one.text for one in new), *train.sentences]
    check_labels(inputs.labels, targeted)
    ids = ids_of([*targeted, *(pretraining_text(inputs, new) if options.pretrain else [])])

    # 2. Each teacher labels the transfer set and the training set once: logits are averaged, hidden states the first one's.
    logits, hidden = [], None
    for teacher in inputs.teachers:
        # A teacher with another tokenizer reads the same sentences as other tokens; only its logits fit the student.
        shared = teacher.tokenizer is inputs.tokenizer
        own = ids[:len(targeted)] if shared else ids_of(teacher.texts(targeted), teacher.tokenizer)
        labeller = Labeller.of(teacher, cache, train.sentences, options)
        one, states = labeller.targets(own, match=options.match == "hidden" and teacher is inputs.teachers[0])
        logits.append(one)
        hidden = hidden or states
    logits = with_labels(mean_logits(logits), len(logits), inputs.labels, targeted, options.labels_alone)

    # 3. A class for every row: the scores of training need one, the losses of unlabelled rows do not read it.
    problem = PROBLEMS[inputs.task.problem]
    labels = [*problem.choose(logits[:len(new)]).tolist(), *train.labels]
    labels += [problem.nothing(inputs.task.num_labels)] * (len(ids) - len(targeted))

    # 4. A task that needs no teacher: were this token and its place in the sentence that was edited?
    edits = mark_edits(ids[:len(targeted)], originals(new, ids_of)) if options.edit_weight else None
    return Sentences(ids, labels, len(new), len(train), logits, hidden, edits, free_of_teacher(new))


def training_set_alone(inputs: Inputs, options: DistilOptions, folder: Path) -> Sentences:
    """Returns the training set with the teachers' logits, which are cached in the run's folder.

    Raises:
        UserError: a damaged cache.
    """
    train = inputs.task.train
    check_labels(inputs.labels, train.sentences)
    teachers = [(one.model, one.data.batches) for one in inputs.teachers]
    logits = teacher_logits(teachers, folder / "teacher_logits.safetensors")
    logits = with_labels(logits, len(teachers), inputs.labels, train.sentences, options.labels_alone)
    return Sentences(ids_by_row(inputs.texts.batches), train.labels, 0, len(train), logits)
