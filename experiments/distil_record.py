"""The record of a distillation: config.json, summary.json, and the table on the terminal."""
from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import asdict

import torch

import speed
import train_utils
from data_utils import Batch
from distillation.recipe import STUDENT, Trained
from distillation.stages import Done
from distillation.student_size import student_parameters
from distillation.teachers import Inputs, mean_logits
from experiments import endings
from experiments.inputs import about
from experiments.trained_on import rows_in_training
from machine.hardware import device
from metrics.problems import PROBLEMS, problem_of, recorded_problem
from model import count_parameters
from options.schema import DistilOptions, RunOptions
from record.config_json import as_json, settings_of
from record.folder import provenance
from training.summary import best_and_last


def config_of(inputs: Inputs, options: RunOptions, distil_options: DistilOptions, say: Callable[[str], None]) -> dict:
    """Returns the config.json of a distillation."""
    settings = {**asdict(options.train), **asdict(distil_options), **settings_of(options), **asdict(inputs.student)}
    return {**provenance(as_json(settings), inputs.task.files), **speed.in_use(), "architecture": inputs.student.recorded(),
            "classes": list(inputs.task.classes), **about(inputs.task, inputs.teachers[0].model),
            **recorded_problem(PROBLEMS[inputs.task.problem]), "rows_in_training": rows_in_training(inputs.task, say),
            "tokenizer_sha256": inputs.base.tokenizer_sha256}


def announce(inputs: Inputs, options: DistilOptions, say: Callable[[str], None]) -> None:
    """Says the sizes of teacher and student, and warns of a student of more than a tenth."""
    parameters, budget = student_parameters(inputs.student), count_parameters(inputs.teachers[0].model)["total"]
    say(f"distilling {options.teacher} ({budget:,} parameters) into a student "
        f"({inputs.student.cell.upper()}) of {parameters:,} ({100 * parameters / budget:.1f} %)")
    # Sizes that a user gave, or a vocabulary that alone is too large for a tenth.
    if 10 * parameters > budget:
        warnings.warn(f"the student has {100 * parameters / budget:.1f} % of the teacher's parameters, more than 10 %; "
                      "lower --embedding-size or --hidden-size", stacklevel=2)


def summary_of(trained: dict[str, Trained], inputs: Inputs, options: RunOptions, distil_options: DistilOptions) -> dict:
    """Returns summary.json of a finished distillation."""
    students = {phase: result_of(one, inputs) for phase, one in trained.items()}
    # Keys of summary.json stay as they were at first: `scratch` is the baseline.
    return {"mode": "distil", "sr": options.sr, "model": options.model, "task": inputs.task.name,
            **recorded_problem(PROBLEMS[inputs.task.problem]),
            "teacher": result_of_teachers(inputs, distil_options), **students,
            "distillation": {"temperature": distil_options.temperature, "alpha": distil_options.kd_alpha,
                             "loss": best_line(trained[STUDENT].stages[-1])["train"]["loss"]},
            "train": students[STUDENT]["train"]}


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
                             "validation": best_line(done)["validation"], "loss": best_line(done)["train"]["loss"],
                             **done.cost}
                            for done in trained.stages]
    return result


def best_line(done: Done) -> dict:
    """Returns the history's line of a stage's best epoch."""
    return next(line for line in done.progress.history if line["epoch"] == done.progress.best_epoch)


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
