"""Distils a fine-tuned teacher into a `DistilRNN`, and trains the baseline next to it: the same student without a teacher.

    python run.py distil 12345              in stages: pretraining, the transfer set, the training set
    python run.py distil 12345 --plain      on the training set alone

Options in, a run's folder out; the algorithm is in distillation/recipe.py.
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import speed
from distillation.recipe import distil
from experiments import endings
from experiments.distil_inputs import load_teachers, prepare
from experiments.distil_options import options_from
from experiments.distil_record import announce, comparison_table, config_of, summary_of
from experiments.inputs import resolve_precision, seed_everything
from machine import signals
from options.schema import DistilOptions, RunOptions
from record.files import write_json
from record.folder import check_run_folder, finish, run_folder
from training import trackers


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
    # Options, teachers and task are checked before the folder is made: bad input leaves nothing behind.
    check_run_folder(options, distil_options.teacher, *map(Path, distil_options.more_teachers))
    trackers.check(options.track)
    speed.use_recorded_machine(options)
    options = resolve_precision(options)
    seed_everything(int(options.sr), options.deterministic)
    options, loaded, teacher_files = load_teachers(options, distil_options)
    options, distil_options, inputs = prepare(options, distil_options, loaded)
    # A run is not resumed or repeated under a teacher that has changed.
    config = {**config_of(inputs, options, distil_options, say), "teacher_files": teacher_files}
    with trackers.tracker(options, config["options"]) as follow, run_folder(options, config) as folder:
        follow.begin(folder)
        announce(inputs, distil_options, say)
        # First, because the weights of an unfinished run cannot be read without it.
        write_json(folder / "student_config.json", inputs.student.recorded())
        trained = distil(inputs, options, distil_options, folder, say, stop, follow.log)
        summary = summary_of(trained, inputs, options, distil_options)
        finish(folder, summary)
    return summary


def main(args) -> int:
    """Distils, prints teacher, student and baseline side by side, and returns the exit status."""
    options, student = options_from(args)
    return endings.train(args, options,
                         lambda: print(comparison_table(run_distil(options, student, stop=signals.received))))
