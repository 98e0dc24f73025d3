"""The sentences of a distillation, as token ids, and the teachers' targets for them."""
from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from data import edits
from data.lines import read_sentences
from data.segments import reads_pairs
from data.splits import Label
from data_utils import Task, encode
from distillation import transfer_set as sources
from distillation.cache import Base, Cache, digest
from distillation.edited import Marks, mark_edits
from distillation.labels import Labeller
from distillation.soft_labels import SoftLabels, check_labels, with_labels
from distillation.teachers import HiddenStates, Teacher, as_labeller, mean_logits
from distillation.transfer_set import New, letters_and_digits, longest_length, plain_sentences, transfer_set
from distillation.writer import Writer
from machine.errors import UserError
from machine.progress import Bar
from metrics.problems import PROBLEMS
from options.schema import DistilOptions, RNNConfig, RunOptions
from record import tensors
from train_utils import Data


@dataclass
class Inputs:
    """Everything that a distillation starts from."""

    task: Task
    tokenizer: object  # the first teacher's, and the student's
    base: Base  # of the first teacher
    teachers: list[Teacher]
    student: RNNConfig
    texts: Data  # the first teacher's batches without numeric features, as the student reads them
    plain: list[str]  # plain sentences (--text)
    labels: list[SoftLabels]  # of files (--labels)


@dataclass
class Sentences:
    """The sentences of all stages before the last one; the transfer set comes first, then the training set, then text."""

    ids: list[list[int]]  # token ids
    labels: list[Label]  # the teacher's choice in the transfer set, gold ones in the training set; 0 for plain text
    unlabelled: int  # rows of the transfer set
    train: int  # rows of the training set
    logits: Tensor  # (unlabelled + train, labels) of the teachers
    hidden: HiddenStates | None  # the first teacher's, of the same rows
    edits: Marks | None  # the tokens of the same rows that an edit touched, if the student is asked about them
    free: list[int]  # rows of the transfer set without a sentence of a teacher's language model, or an edit of one

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
    # New sentences, without gold labels.
    task, cache = inputs.task, Cache.open(options.cache or Path(run.out).parent, inputs.base, inputs.task, stop)
    new = make_transfer_set(inputs, cache, inputs.plain, options.augment) if options.augment else []
    transfer = [one.text for one in new]

    # Pretraining reads plain text of any length, but no sentence twice and none of the task.
    text, seen = [], {*known_sentences(task), *map(letters_and_digits, transfer)}
    if options.pretrain:
        text = [sentence for sentence in dict.fromkeys(inputs.plain) if letters_and_digits(sentence) not in seen]
    targeted = [*transfer, *task.train.sentences]
    check_labels(inputs.labels, targeted)
    ids = encode(inputs.tokenizer, [*targeted, *text], run.max_length, run.table.truncate)

    # Each teacher labels the transfer set and the training set once: logits are averaged, hidden states the first one's.
    logits, hidden = [], None
    for teacher in inputs.teachers:
        # Labels in bfloat16 are other labels, and have other files.
        key = tensors.weights_digest(teacher.model) + (" bf16" if options.label_precision == "bf16" else "")
        labeller = Labeller(cache, as_labeller(teacher.model, options.label_precision), key, teacher.tokenizer,
                            task.train.sentences, options)
        # A teacher with another tokenizer reads the same sentences as other tokens; only its logits fit the student.
        own = ids[:len(targeted)]
        if teacher.tokenizer is not inputs.tokenizer:
            own = encode(teacher.tokenizer, teacher.texts(targeted), run.max_length, run.table.truncate)
        one, states = labeller.targets(own, match=options.match == "hidden" and teacher is inputs.teachers[0])
        logits.append(one)
        hidden = hidden or states
    logits = with_labels(mean_logits(logits), len(logits), inputs.labels, targeted, options.labels_alone)
    # A class for every row: the scores of training need one, the losses of unlabelled rows do not read it.
    problem = PROBLEMS[task.problem]
    labels = [*problem.choose(logits[:len(transfer)]).tolist(), *task.train.labels]
    labels += [problem.nothing(task.num_labels)] * len(text)
    # A task that needs no teacher: were this token and its place in the sentence that was edited?
    marks = None
    if options.edit_weight:
        edited = {row: one.original for row, one in enumerate(new) if one.original is not None}
        originals = encode(inputs.tokenizer, list(edited.values()), run.max_length, run.table.truncate) if edited else []
        marks = mark_edits(ids[:len(targeted)], dict(zip(edited, originals, strict=True)))
    written = {one.text for one in new if one.kind == "written"}
    free = [row for row, one in enumerate(new) if one.kind != "written" and one.original not in written]
    return Sentences(ids, labels, len(transfer), len(task.train), logits, hidden, marks, free)


def make_transfer_set(inputs: Inputs, cache: Cache, text: list[str], count: int) -> list[New]:
    """Returns the first `count` sentences of the transfer set, or all of them with a warning if there are fewer.

    They are made once for all runs with the same sources and the same code of edits.
    """
    decoder = inputs.teachers[0].model.decoder
    # The folder of the cache stands for base and task; left-out development sentences are known, and not in its name.
    code = [Path(module.__file__).read_text(encoding="utf-8") for module in (edits, sources)]
    pairs = ["pairs"] if reads_pairs(inputs.tokenizer) else []
    key = digest(json.dumps([count, decoder, digest("\n".join(text)), inputs.task.left_out, code, *pairs]))
    found = cache.read_sentences(key)
    if found is None:
        found = new_sentences(inputs, cache, text, count)
        cache.write_sentences(key, found)
    if len(found) < count:
        warnings.warn(f"--augment {count}: only {len(found):,} different sentences can be had", stacklevel=2)
    return found


def new_sentences(inputs: Inputs, cache: Cache, text: list[str], count: int) -> list[New]:
    """Makes the first `count` sentences of the transfer set, or all of them if there are fewer."""
    train, known = inputs.task.train.sentences, known_sentences(inputs.task)
    # Plain sentences as long as training sentences, and none of the task.
    plain, written = plain_sentences(text, known, longest_length(train)), None
    # A decoder's base writes sentences: one of four kinds, or of two turns out of four. It ends at the mark between two
    # texts, and so it writes no pairs.
    if inputs.teachers[0].model.decoder and not reads_pairs(inputs.tokenizer):
        written = Writer(cache, inputs.base.model, inputs.tokenizer, train).written(least=count // (4 if plain else 2))
    # The first of an order that does not depend on the number: a smaller set is the beginning of a larger one.
    sentences = transfer_set(train, known, plain, written)
    # A task of pairs has new pairs: plain sentences and edits without a separator are none.
    if reads_pairs(inputs.tokenizer):
        separator = inputs.tokenizer.pair_separator
        sentences = (one for one in sentences if one.text.count(separator) == 1 and all(one.text.split(separator)))
    sentences = itertools.islice(sentences, count)
    return list(Bar(sentences, total=count, unit="sentence", desc="transfer set", delay=2))


def known_sentences(task: Task) -> set[str]:
    """Returns the keys of a task's sentences, left-out development sentences among them: the transfer set holds none."""
    known = set(map(letters_and_digits, task.left_out))
    for split in (task.train, *task.dev.values()):
        known.update(map(letters_and_digits, split.sentences))
    return known


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
