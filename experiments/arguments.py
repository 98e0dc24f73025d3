"""Parsed arguments -> typed options, with the defaults that depend on model, task or method."""
from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

from experiments.argument_types import saving
from experiments.defaults import EPOCHS, LEARNING_RATE, STAGES, default
from machine import processes
from machine.errors import UserError
from options.schema import DistilOptions, LoRAOptions, RunOptions, TableOptions, TrainOptions


def note(text: str) -> None:
    """Tells the person at the terminal something that is no result."""
    if processes.claim_once(text):
        print(text, file=sys.stderr, flush=True)


def named(pairs: list[tuple[str, Path]], option: str) -> dict[str, Path]:
    """Returns folders by name.

    Raises:
        UserError: a name is given twice.
    """
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{option} {name}: the name is given twice")
    return dict(pairs)


def _of(cls: type, args, **given):
    """Returns a `cls` whose fields are the arguments of the same names; `given` ones take precedence."""
    named = {field.name: getattr(args, field.name) for field in fields(cls) if hasattr(args, field.name)}
    return cls(**{**named, **given})


def _run_options(args, mode: str, model: str | None, task: str | None, data: str | None, plain: bool = False, **more
                 ) -> RunOptions:
    train = _of(TrainOptions, args, seed=int(args.sr), epochs=args.epochs or default(EPOCHS[mode], task, plain),
                lr=args.lr or default(LEARNING_RATE[getattr(args, "method", mode)], task, plain), **saving(args.save_every))
    return _of(RunOptions, args, mode=mode, model=model, task=task, data=data, train=train,
               out=args.out or Path("runs") / f"{mode}-{args.sr}", **more)


def choose(args) -> None:
    """Fills in model, task, data and epochs where they were not given (see `inputs.choose`)."""
    from experiments import inputs

    args.model, args.task, args.data = inputs.choose(args.model, args.task, args.data, note)
    args.epochs = args.epochs or default(EPOCHS["LoRA"], args.task)


def finetune_options(args) -> RunOptions:
    """Returns a fine-tuning's options, with the model, task and data that are used where none were named."""
    from experiments import inputs

    model, task, data = inputs.choose(args.model, args.task, args.data, note)
    targets = tuple(part.strip() for part in args.targets.split(",") if part.strip())
    return _run_options(args, "LoRA", model, task, data, keep=not args.no_keep, lora=_of(LoRAOptions, args, targets=targets),
                        table=_of(TableOptions, args))


def distil_options(args) -> tuple[RunOptions, DistilOptions]:
    """Returns a distillation's options; task and model are the teacher's.

    Raises:
        UserError: there is no teacher.
    """
    from record.folder import read_run

    teacher, *more = args.teacher or [Path("runs") / f"LoRA-{args.sr}"]
    for folder in (teacher, *more):
        if not folder.is_dir():
            raise UserError(f"teacher {folder}: no such run; python run.py LoRA {args.sr} makes it")
    recorded = read_run(teacher, "LoRA")[0]["options"]
    task = args.task or recorded["task"]
    stages = {name: default(table, task, args.plain) if getattr(args, name) is None else getattr(args, name)
              for name, table in STAGES.items()}
    given = [name for name in ("augment", "pretrain", "transfer", "text", "label_precision")
             if args.plain and getattr(args, name)]
    if given:
        raise UserError(f"--{given[0].replace('_', '-')}: not with --plain, whose one stage is the training set")
    if recorded.get("feature_columns") or recorded["method"] == "features":
        if args.augment:
            raise UserError("--augment: the teacher reads feature columns, which new sentences do not have; leave it out")
        stages.update(augment=0, match="none")
    if stages.setdefault("augment", 0 if args.plain else args.augment) == 0:
        stages["transfer"] = 0
    # Where the training set alone teaches classes, it takes as many epochs as with --plain.
    return _run_options(args, "distil", None, task, args.data, plain=not stages["transfer"]), _of(
        DistilOptions, args, teacher=teacher, more_teachers=tuple(map(str, more)), text=tuple(args.text), **stages)
