"""Loads a finished run's model again and scores it on labelled rows.

    python run.py eval runs/LoRA-12345 --data FILE
    python run.py eval runs/LoRA-12345              # the share of its file that the run held out
"""
from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import data_utils
import speed
import train_utils
from adapters import peft_layout
from data.backbones import load_tokenizer
from data.digests import tokenizer_digest
from data.segments import separator_of
from data_utils import Split, Task
from experiments.inputs import check_base, columns_of, read_as
from experiments.trained_on import check_not_trained_on, count_trained_on, recorded_task, training_files
from layers import RNNConfig
from machine.errors import UserError
from machine.hardware import device
from metrics.problems import PROBLEMS, Problem, problem_of
from model import DistilRNN, TextClassifier, load_classifier
from options.schema import TableOptions
from record import tensors
from record.config_json import rebuild
from record.files import read_json, sha256, write_file
from record.folder import read_run, warn_of_changed_data
from train_utils import selection_split

HELD_OUT = "held_out"  # the development split that was set aside from the training rows


def load_finetuned(folder: Path) -> tuple[TextClassifier, object, dict]:
    """Loads the classifier of a LoRA run, its tokenizer and its options.

    Raises:
        UserError: not a finished LoRA run, or damaged.
    """
    config, _ = read_run(folder, "LoRA")
    options = config["options"]
    tokenizer = load_tokenizer(options["model"])
    classifier, _ = load_classifier(options["model"], len(config.get("classes", data_utils.COLA_CLASSES)))
    read_as(rebuild(TableOptions, options), problem_of(config), tokenizer, classifier)
    check_base(folder, config, options["model"], classifier.net, tokenizer)
    columns = len(options.get("feature_columns") or ())
    # The saved statistics of the training rows replace this row of zeros.
    classifier.configure(options["method"], features=torch.zeros(1, columns, dtype=torch.float64) if columns else None)
    if options["method"] in peft_layout.METHODS:
        peft_layout.load_adapter(classifier.net, folder)
    elif classifier.reads_text:
        state = tensors.load_tensors(Path(folder) / "trained.safetensors")
        own = classifier.state_dict()
        if any(name not in own or own[name].shape != value.shape for name, value in state.items()):
            raise UserError(f"{Path(folder) / 'trained.safetensors'}: made for another model")
        classifier.load_state_dict(state, strict=False)
    if classifier.feature_head is not None:
        path = Path(folder) / "features.safetensors"
        try:
            classifier.feature_head.load_state_dict(tensors.load_tensors(path))
        except RuntimeError:
            raise UserError(f"{path}: made for other features") from None
    # bf16x3 computes float32 matmuls on tiles: without tiles, plain float32 gives the same up to rounding.
    plain = options["precision"] == "bf16x3" and (device().type != "cpu" or not speed.has_tiles())
    speed.install(classifier)
    speed.set_precision(classifier.net.base_model, "fp32" if plain else options["precision"])
    return classifier.requires_grad_(False).to(device()).eval(), tokenizer, options


def load_student(folder: Path, name: str = "student") -> tuple[DistilRNN, object, dict]:
    """Loads the student of a distillation run, its tokenizer and the run's options.

    Args:
        name: of the weights' file: `student`, or `scratch` for the baseline, the same student without a teacher.

    Raises:
        UserError: not a finished distillation run, or damaged.
    """
    config, summary = read_run(folder, "distil")
    if name not in summary:
        raise UserError(f"{folder}: has no baseline (it was run with --no-control)")
    sizes = read_json(Path(folder) / "student_config.json")
    try:
        student = DistilRNN(RNNConfig(**sizes))
        student.load_state_dict(tensors.load_tensors(Path(folder) / f"{name}.safetensors"))
    except (TypeError, KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder}: damaged student ({str(error).splitlines()[0]})") from None
    # Token ids index the student's embeddings: another tokenizer would look up other words.
    name, tokenizer = config["options"]["model"], load_tokenizer(config["options"]["model"])
    if config.get("tokenizer_sha256") not in (None, tokenizer_digest(tokenizer)):
        raise UserError(f"{folder}: the tokenizer of {name} is not the one that the student was trained with")
    read_as(rebuild(TableOptions, config["options"]), problem_of(config), tokenizer)
    speed.install(student)
    return student.to(device()).eval(), tokenizer, config["options"]


@dataclass(frozen=True)
class ScoredRows:
    """Holds a saved run's answers to labelled rows."""

    name: str  # of the file or split
    logits: Tensor  # (N, outputs)
    split: Split  # the rows
    classes: list[str]  # names of the classes
    problem: Problem
    trained_on: int | None  # rows that stand in the training data too; None where these cannot be read
    notes: list[str]  # the same in words, as warnings; empty without such rows


def score_rows(folder: Path, data: Path | None, allow_training_data: bool = False, delimiter: str | None = None,
               encoding: str | None = None, selection: bool = False) -> ScoredRows:
    """Answers a labelled file with a saved run.

    Args:
        folder: of a finished LoRA or distillation run (the student of the latter answers).
        data: in the format of the run's task, with the run's columns. None: the run's own development split, which is
            the share of its file that was held out, or its one development file.
        allow_training_data: score a file that was trained on, with a warning.
        delimiter, encoding: of the file; the recorded ones if None.
        selection: of several development splits, take the one that chose the run's best epoch.

    Raises:
        UserError: no such run, a file that cannot be read or was trained on, several development files.
    """
    config, summary = read_run(folder)
    for name, value in (("delimiter", delimiter), ("encoding", encoding)):
        if value is not None and (data is None or config["options"]["task"] in ("cola", "tiny")):
            where = "without --data" if data is None else "for CoLA's files, which are UTF-8 with tabs"
            raise UserError(f"--{name} {value}: not {where}")
    if data is not None:
        warn_of_changed_data(config, data)
        # The reader names a missing file, together with the format that it expects.
        files = {str(data): sha256(data)} if data.is_file() else {}
        check_not_trained_on(folder, config, files, allow_training_data)
    model, tokenizer, options = (load_finetuned if summary["mode"] == "LoRA" else load_student)(folder)
    # Runs made before there were other tasks recorded no classes: theirs are CoLA's.
    classes = config.get("classes", data_utils.COLA_CLASSES)
    if data is None:
        name, split = own_split(folder, config, tokenizer, allow_training_data, selection)
    else:
        name, split = str(data), data_utils.read_rows(
            data, options["task"], columns_of(options, delimiter, encoding), separator_of(tokenizer), classes)
        # The check above was of the bytes of an earlier read.
        if split.sha256 not in ("", *files.values()):
            raise UserError(f"{data}: changed while it was read; score it again")
    counts, notes = count_trained_on(folder, config, tokenizer, {name: split})
    return ScoredRows(name, logits_of(model, split, tokenizer, options), split, classes, problem_of(config), counts[name],
                      notes)


def own_split(folder: Path, config: dict, tokenizer, allow_training_data: bool, selection: bool) -> tuple[str, Split]:
    """Returns name and rows of a run's only development split, or of its selection split; the same rows as in training.

    Raises:
        UserError: it has several, or its data changed or were trained on.
    """
    task = recorded_task(folder, config, tokenizer)
    if selection:
        task = replace(task, dev={name: rows for name, rows in task.dev.items() if name == selection_split(task.dev)})
    if len(task.dev) > 1:
        raise UserError(f"--data: missing; {folder} has several development splits, {', '.join(task.dev)}: "
                        f"{_choices(task, training_files(config).values())}")
    (name, split), = task.dev.items()
    # Held-out rows come from the training file itself; a development file must not be a copy of it.
    others = {} if name == HELD_OUT else dict(list(task.files.items())[1:])
    check_not_trained_on(folder, config, others, allow_training_data)
    return name, split


def _choices(task: Task, training: Collection[str]) -> str:
    """Says in words what `eval` can score of a task with several development splits."""
    # The built-in pair's and the Hub's splits have names in config.json, but no files.
    files = [name for name in task.files if name not in training and Path(name).is_file()]
    if files:
        return f"give one of {', '.join(files)}, or another file"
    own = "the built-in sentences" if task.name == "tiny" else "the Hub's rows"
    return f"these are {own}, without a file of their own, and their scores stand in summary.json; give a labelled file"


def logits_of(model: TextClassifier | DistilRNN, split: Split, tokenizer, options: dict) -> Tensor:
    """Returns logits (N, labels) of a split's rows, batched as the run with these options batched development rows."""
    # The student reads text alone.
    if isinstance(model, DistilRNN):
        split = replace(split, features=[])
    return train_utils.compute_logits(model, data_utils.make_batches(
        split, tokenizer, options["max_length"], options["batch_size"], options["seed"], options.get("batch_tokens"),
        options.get("truncate", "tail"), shared_prefixes=True))


def evaluate_run(folder: Path, data: Path | None = None, predictions: Path | None = None,
                 allow_training_data: bool = False, delimiter: str | None = None, encoding: str | None = None) -> dict:
    """Scores a saved run on a labelled file of its task's format, or on the rows that it held out.

    Args:
        folder, data, allow_training_data, delimiter, encoding: see `score_rows`.
        predictions: if given, a TSV of sentence, label, prediction and probability (of the prediction).

    Returns:
        n, loss, accuracy, mcc, macro_f1, majority_accuracy (or the problem's scores), data (file or split), trained_on
        (rows that stand in the training data too), by_class {confusion, per_class}.
    """
    scored = score_rows(folder, data, allow_training_data, delimiter, encoding)
    if predictions is not None:
        write_predictions(scored, predictions)
    # Warned of last: a command that fails says one line, its error.
    for note in scored.notes:
        warnings.warn(note, stacklevel=2)
    # The same functions as during training, so that the scores equal the summary's.
    answer, problem = (scored.logits, torch.from_numpy(data_utils.label_array(scored.split.labels))), scored.problem
    matrix = problem.matrix(*answer)
    by_class = {problem.counts: matrix, "per_class": problem.per_class(matrix, scored.classes)} if matrix else {}
    return {**problem.scores(*answer), "data": scored.name, "trained_on": scored.trained_on, "by_class": by_class}


def write_predictions(scored: ScoredRows, path: Path) -> None:
    """Writes a TSV of sentence, label, prediction and the prediction's probability; spaces in a sentence become one.

    A number has no probability.
    """
    write_file(path, _lines(scored))


def _lines(scored: ScoredRows) -> Iterator[str]:
    """Yields the lines of `write_predictions`."""
    problem = scored.problem
    for number, (sentence, label, row) in enumerate(zip(scored.split.sentences, scored.split.labels, scored.logits,
                                                        strict=True)):
        answer = problem.answer(row, scored.classes)
        # The columns of the problem: with a probability where its answers have one.
        more = ["probability"] if "probability" in answer else []
        if number == 0:
            yield "\t".join(("sentence", "label", "prediction", *more)) + "\n"
        cells = [" ".join(sentence.split()), problem.in_words(label, scored.classes), answer["label"]]
        yield "\t".join(cells + [f"{answer[name]:.6f}" for name in more]) + "\n"


# ---------------------------------------------------------------- the command line


def main(args) -> None:
    """Prints the scores of a saved run on a file, or on the rows that it held out."""
    result = evaluate_run(args.run, args.data, args.predictions, args.allow_training_data, args.delimiter, args.encoding)
    print(json.dumps(result) if args.json else
          f"{result['data']}: n {result['n']}, loss {result['loss']:.4f}, {scores_text(result)}")


def scores_text(result: dict) -> str:
    """Formats the scores of `evaluate_run`."""
    if "accuracy" in result:
        return (f"accuracy {result['accuracy']:.4f} (majority {result['majority_accuracy']:.4f}), MCC {result['mcc']:.4f}, "
                f"macro-F1 {result['macro_f1']:.4f}")
    problem = next(one for one in PROBLEMS.values() if one.chosen in result)
    same = problem.baseline({"": result})[""]
    return ", ".join(f"{heading} {result[key]:.4f} ({problem.baseline_name} {same[key]:.4f})"
                     for key, heading in problem.shown.items())
