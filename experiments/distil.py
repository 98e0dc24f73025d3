"""Distils a fine-tuned teacher into a `DistilRNN`, and trains the baseline next to it: the same student without a teacher.

    python run.py distil 12345              in stages: pretraining, the transfer set, the training set
    python run.py distil 12345 --plain      on the training set alone

Options in, a run's folder out; the algorithm is in distillation/recipe.py.
"""
from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

import speed
import train_utils
from data.backbones import max_length_of
from data.digests import tokenizer_digest
from data.segments import separator_of
from data_utils import Batch, Task
from distillation.cache import Base
from distillation.losses import loss_of
from distillation.recipe import STUDENT, Trained, distil
from distillation.sentences import Inputs, read_text
from distillation.soft_labels import read_labels
from distillation.student_size import filled_config, student_config, student_parameters
from distillation.teachers import Teacher, mean_logits
from experiments import endings
from experiments.arguments import fill, given, preset, preset_name, run_options
from experiments.evaluate import load_finetuned
from experiments.inputs import about, load_task, make_all_batches, resolve_precision, seed_everything
from experiments.trained_on import rows_in_training
from machine import processes, signals
from machine.errors import UserError
from machine.hardware import bf16_is_fast, device
from metrics.problems import PROBLEMS, problem_of, recorded_problem
from model import TextClassifier, count_parameters
from options.schema import PLAIN_SIZES, STAGED_SIZES, DistilOptions, RunOptions, TableOptions
from record import tensors
from record.config_json import as_json, rebuild, settings_of
from record.files import read_json, unchanged, write_json
from record.folder import check_run_folder, finish, provenance, read_run, run_folder
from record.ownership import weights
from train_utils import Data, selection_split
from training import trackers
from training.summary import best_and_last


def run_distil(options: RunOptions, distil_options: DistilOptions, say: Callable[[str], None] = print,
               stop: Callable[[], int | None] = lambda: None) -> dict:
    """Distils a fine-tuned teacher, trains the baseline, and writes the run's folder.

    Args:
        stop: called after each step; a signal's number ends the run, which can be resumed.

    Returns:
        The summary, as in summary.json.

    Raises:
        UserError: bad input, a teacher that is not a finished LoRA run.
        train_utils.Diverged, signals.Interrupted: the last good checkpoint stays.
    """
    check_run_folder(options, distil_options.teacher, *map(Path, distil_options.more_teachers))
    trackers.check(options.track)
    speed.use_recorded_machine(options)
    options = resolve_precision(options)
    if processes.count() > 1 and not distil_options.plain:
        raise UserError(f"distil in stages is for one process, and here are {processes.count()}; --plain takes several")
    # Options, teachers and task are checked before the folder is made: bad input leaves nothing behind.
    seed_everything(int(options.sr), options.deterministic)
    options, loaded, teacher_files = load_teachers(options, distil_options)
    options, distil_options, inputs = prepare(options, distil_options, loaded)
    parameters, budget = student_parameters(inputs.student), count_parameters(inputs.teachers[0].model)["total"]
    # A run is not resumed or repeated under a teacher that has changed.
    config = {**config_of(inputs, options, distil_options, say), "teacher_files": teacher_files}
    with trackers.tracker(options, config["options"]) as follow, run_folder(options, config) as folder:
        follow.begin(folder)
        say(f"distilling {distil_options.teacher} ({budget:,} parameters) into a student "
            f"({inputs.student.cell.upper()}) of {parameters:,} ({100 * parameters / budget:.1f} %)")
        # Sizes that a user gave, or a vocabulary that alone is too large for a tenth.
        if 10 * parameters > budget:
            warnings.warn(f"the student has {100 * parameters / budget:.1f} % of the teacher's parameters, more than 10 %; "
                          "lower --embedding-size or --hidden-size", stacklevel=2)
        # First, because the weights of an unfinished run cannot be read without it.
        write_json(folder / "student_config.json", inputs.student.recorded())
        trained = distil(inputs, options, distil_options, folder, say, stop, follow.log)
        students = {phase: result_of(one, inputs) for phase, one in trained.items()}
        # Keys of summary.json stay as they were at first: `scratch` is the baseline.
        summary = {"mode": "distil", "sr": options.sr, "model": options.model, "task": inputs.task.name,
                   **recorded_problem(PROBLEMS[inputs.task.problem]),
                   "teacher": result_of_teachers(inputs, distil_options), **students,
                   "distillation": {"temperature": distil_options.temperature, "alpha": distil_options.kd_alpha,
                                    "loss": trained[STUDENT].stages[-1].best["train"]["loss"]},
                   "train": students[STUDENT]["train"]}
        finish(folder, summary)
    return summary


# ---------------------------------------------------------------- options in

def load_teachers(options: RunOptions, distil_options: DistilOptions
                  ) -> tuple[RunOptions, list[tuple[TextClassifier, object]], dict[str, str]]:
    """Loads the teachers.

    Returns:
        The options, completed by those of the first teacher's run; each teacher with its tokenizer; the SHA-256 of the
        files of their weights: the first one's by name, the others' by path.

    Raises:
        UserError: a teacher that is not a finished LoRA run, or teachers of several tasks.
    """
    folders = [distil_options.teacher, *map(Path, distil_options.more_teachers)]
    with unchanged([path for folder in folders for path in weights(folder)]) as digests:
        loaded = [load_finetuned(folder) for folder in folders]
    files = {path.name if number == 0 else str(path): digests[path]
             for number, folder in enumerate(folders) for path in weights(folder)}
    _, _, recorded = loaded[0]
    # Bases and tokenizers may differ, for teachers meet in their logits; texts and classes must not.
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
    problem = PROBLEMS[task.problem]
    # For its errors, before the folder exists.
    loss_of(distil_options.kd_loss, problem)
    problem.check("--label-smoothing", options.train.label_smoothing > 0)
    problem.check("--labels", bool(distil_options.labels))
    teachers = read_as_each(options, task, loaded)
    data = teachers[0].data
    texts = replace(data, batches=texts_only(data.batches),
                    dev={split: texts_only(rows) for split, rows in data.dev.items()})

    if distil_options.vocabulary and distil_options.vocabulary > len(tokenizer):
        raise UserError(f"--vocabulary {distil_options.vocabulary}: expected at most {len(tokenizer)}, the tokens of "
                        f"{options.model}'s tokenizer")
    staged = distil_options.pretrain or distil_options.transfer
    if distil_options.student_embeddings == "contextual" and not (staged and distil_options.match == "hidden"):
        raise UserError("--student-embeddings contextual: means of the hidden states that --match hidden has for the "
                        "stages; not with --match none, nor with --plain or without stages")
    # The student reads as the first teacher does. It fills its budget, or is the largest default within a tenth of that
    # teacher's.
    if distil_options.directions is None:
        distil_options = replace(distil_options, directions=1 if first.decoder else 2)
    sizes = {name: getattr(distil_options, name)
             for name in ("embedding_size", "hidden_size", "directions", "rnn_layers", "cell", "pooling", "dropout",
                          "vocabulary", "rare_tokens", "frozen_embeddings")}
    if budget := distil_options.student_parameters:
        student = filled_config(len(tokenizer), task.num_labels, budget, **sizes)
    else:
        largest_first = PLAIN_SIZES if distil_options.plain else STAGED_SIZES[distil_options.directions]
        budget = count_parameters(first)["total"] // 10
        student = student_config(len(tokenizer), task.num_labels, budget, largest_first, **sizes)

    # As many new sentences as the task's size deserves, up to a bound.
    if distil_options.augment is None:
        most = min(distil_options.augment_most, distil_options.augment_times * len(task.train))
        distil_options = replace(distil_options, augment=most)
    # Labels of the stages may be computed in bfloat16; those of --plain are the teacher's own.
    if distil_options.label_precision is None:
        distil_options = replace(distil_options, label_precision="bf16" if staged and bf16_is_fast() else "teacher")

    # Runs of early versions have not recorded the digest of their base.
    recorded = read_json(distil_options.teacher / "config.json").get("base_sha256")
    # The files are read once, so that the recorded digests are those of the sentences that are trained on.
    plain, text_files = read_text(distil_options.text)
    labels = [read_labels(path, task.classes) for path in distil_options.labels]
    label_files = {file.path: digest for file, digest in labels}
    task = replace(task, files={**task.files, **text_files, **label_files})
    base = Base(options.model, recorded or tensors.weights_digest(first.net.base_model), tokenizer_digest(tokenizer))
    return options, distil_options, Inputs(task, tokenizer, base, teachers, student, texts, plain,
                                           [file for file, _ in labels])


def read_as_each(options: RunOptions, task: Task, loaded: list[tuple[TextClassifier, object]]) -> list[Teacher]:
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


def texts_only(batches: list[Batch]) -> list[Batch]:
    """Returns the batches without numeric features: the student reads text alone."""
    return [replace(batch, features=None, micro=batch.micro and texts_only(batch.micro)) for batch in batches]


def config_of(inputs: Inputs, options: RunOptions, distil_options: DistilOptions, say: Callable[[str], None]) -> dict:
    """Returns the config.json of a distillation."""
    settings = {**asdict(options.train), **asdict(distil_options), **settings_of(options), **asdict(inputs.student)}
    return {**provenance(as_json(settings), inputs.task.files), **speed.in_use(), "architecture": inputs.student.recorded(),
            "classes": list(inputs.task.classes), **about(inputs.task, inputs.teachers[0].model),
            **recorded_problem(PROBLEMS[inputs.task.problem]), "rows_in_training": rows_in_training(inputs.task, say),
            "tokenizer_sha256": inputs.base.tokenizer_sha256}


# ---------------------------------------------------------------- the folder out

def sentences_per_second(model, dev: dict[str, list[Batch]], passes: int = 3) -> float:
    """Measures sentences classified in a second over the development splits, batched by length; the best of `passes`."""
    batches = [batch for split in dev.values() for batch in split]
    rows, best = sum(len(batch.rows) for batch in batches), float("inf")
    for _ in range(passes):
        start = time.perf_counter()
        with torch.inference_mode():
            for batch in batches:
                model(*batch.to(device()).inputs())
            # A GPU answers before it has computed.
            if device().type != "cpu":
                getattr(torch, device().type).synchronize()
        best = min(best, time.perf_counter() - start)
    return rows / best


def result_of_teachers(inputs: Inputs, options: DistilOptions) -> dict:
    """Returns the teachers' part of summary.json: their mean logits' scores, and those of each of several teachers."""
    members, logits = [], {split: [] for split in inputs.texts.dev}  # split -> each teacher's logits
    problem = PROBLEMS[inputs.task.problem]
    for run, teacher in zip((options.teacher, *options.more_teachers), inputs.teachers, strict=True):
        dev = teacher.data.dev
        own = {split: train_utils.compute_logits(teacher.model, rows) for split, rows in dev.items()}
        for split, values in own.items():
            logits[split].append(values)
        members.append({"run": str(run), "parameters": count_parameters(teacher.model)["total"],
                        "validation": train_utils.score_logits(own, dev, problem)[0],
                        "sentences_per_second": sentences_per_second(teacher.model, dev, passes=1)})
    if len(members) == 1:
        return members[0]
    # One after the other answers each sentence, so that their times add up.
    together = {split: mean_logits(parts) for split, parts in logits.items()}
    return {**members[0], "more_runs": list(options.more_teachers),
            "validation": train_utils.score_logits(together, inputs.teachers[0].data.dev, problem)[0],
            "sentences_per_second": 1 / sum(1 / one["sentences_per_second"] for one in members), "members": members}


def result_of(trained: Trained, inputs: Inputs) -> dict:
    """Returns a student's part of summary.json."""
    last = trained.stages[-1]
    result = {"parameters": student_parameters(inputs.student),
              **best_and_last(last.progress.best_epoch, last.progress.history, inputs.task.classes,
                              PROBLEMS[inputs.task.problem]),
              "sentences_per_second": sentences_per_second(trained.model.eval(), last.stage.data.dev),
              "train": last.cost}
    if len(trained.stages) > 1:
        result["stages"] = [{"stage": done.stage.name, "best_epoch": done.progress.best_epoch,
                             "validation": done.best["validation"], "loss": done.best["train"]["loss"], **done.cost}
                            for done in trained.stages]
    return result


def comparison_table(summary: dict) -> str:
    """Formats teacher, student and baseline side by side, for the terminal."""
    # Several teachers stand above their mean.
    rows = {f"teacher {number}": member for number, member in enumerate(summary["teacher"].get("members", []), 1)}
    rows["mean of teachers" if rows else "teacher"] = summary["teacher"]
    rows |= {name: summary[key] for key, name in (("student", "student with KD"), ("scratch", "baseline")) if key in summary}
    return endings.score_table(
        {name: row["validation"] for name, row in rows.items()}, problem_of(summary),
        {"parameters": {name: f"{row['parameters']:,}" for name, row in rows.items()},
         "sentences/s": {name: f"{row['sentences_per_second']:,.0f}" for name, row in rows.items()}})


# ---------------------------------------------------------------- the command line


def main(args) -> int:
    """Distils, prints teacher, student and baseline side by side, and returns the exit status."""
    options, student = options_from(args)
    return endings.train(args, options,
                         lambda: print(comparison_table(run_distil(options, student, stop=signals.received))))


def options_from(args) -> tuple[RunOptions, DistilOptions]:
    """Returns a distillation's options; task and model are the teacher's.

    Raises:
        UserError: there is no teacher.
    """
    teacher, *more = args.teacher or [Path("runs") / f"LoRA-{args.sr}"]
    for folder in (teacher, *more):
        if not folder.is_dir():
            raise UserError(f"teacher {folder}: no such run; python run.py LoRA {args.sr} makes it")
    recorded = read_run(teacher, "LoRA")[0]["options"]
    task = args.task or recorded["task"]
    name = args.preset or preset_name("distil", task, args.plain)
    defaults = preset(name)
    values = {**defaults, **given(args)}
    # A value that the preset has anyway contradicts nothing.
    for option in ("augment", "pretrain", "transfer", "text", "label_precision", "edit_weight"):
        if args.plain and getattr(args, option) and values[option] != defaults.get(option):
            raise UserError(f"--{option.replace('_', '-')}: not with --plain, whose one stage is the training set")
    if recorded.get("feature_columns") or recorded["method"] == "features":
        if args.augment:
            raise UserError("--augment: the teacher reads feature columns, which new sentences do not have; leave it out")
        values.update(augment=0, match="none")
    # Without new sentences there is no stage on them.
    if values.get("augment") == 0:
        values["transfer"] = 0
    if values.get("edit_weight") and not values.get("transfer", DistilOptions.transfer):
        raise UserError("--edit-weight: needs a transfer set, whose edited sentences it asks about; expected --augment and "
                        "--transfer above 0")
    if args.labels_alone and not args.labels:
        raise UserError("--labels-alone: needs --labels FILE")
    # Where the training set alone teaches classes, it takes as many epochs as with --plain.
    if not values.get("transfer", DistilOptions.transfer):
        gold = preset(preset_name("distil", task, plain=True))
        values.update({key: gold[key] for key in ("epochs", "lr") if getattr(args, key) is None})
    run = run_options(args, values, preset=name, model=None, task=task, data=args.data)
    return run, fill(DistilOptions, values, teacher=teacher, more_teachers=tuple(map(str, more)))
