"""Parsed arguments -> the typed options of a distillation; its task and model are those of the teacher's run."""
from __future__ import annotations

from pathlib import Path

from experiments.arguments import fill, given, preset, preset_name, run_options
from machine.errors import UserError
from options.schema import DistilOptions, RunOptions
from record.folder import read_run


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
