"""Parsed arguments -> typed options; options/presets/ has the defaults that depend on the task, the method or --plain.

    preset("LoRA-tiny", "full")    # {"lr": 5e-4, "epochs": 12}
"""
from __future__ import annotations

import tomllib
from dataclasses import fields
from pathlib import Path

from experiments import inputs
from experiments.parser import closest, note
from machine.errors import UserError
from options.declare import ROOT, saving
from options.schema import DistilOptions, LoRAOptions, RunOptions, TableOptions, TrainOptions
from record.folder import read_run

PRESETS = ROOT / "options" / "presets"


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


# ---------------------------------------------------------------- presets

def preset_name(mode: str, task: str, plain: bool = False) -> str:
    """Returns the preset of a run: of its task, if there is one."""
    general = f"{mode}-plain" if plain else mode
    return f"{general}-{task}" if (PRESETS / f"{general}-{task}.toml").exists() else general


def preset(name: str, method: str = "") -> dict:
    """Returns the options that a preset sets, with those of the preset that it builds on.

    Args:
        method: chooses from the values that stand in a table by method; others are left out.

    Raises:
        UserError: there is no preset of that name.
    """
    names = sorted(path.stem for path in PRESETS.glob("*.toml"))
    if name not in names:
        raise UserError(f"--preset {name}: unknown{closest(name, names)}")
    values = tomllib.loads((PRESETS / f"{name}.toml").read_text(encoding="utf-8"))
    found = preset(values.pop("base"), method) if "base" in values else {}
    for key, value in values.items():
        if not isinstance(value, dict):
            found[key] = value
        elif method in value:
            found[key] = value[method]
    return found


def given(args) -> dict:
    """Returns the arguments that have a value: by a flag, by --config, or by default."""
    return {name: value for name, value in vars(args).items() if value is not None}


def _of(cls: type, values: dict, **more):
    """Returns a `cls` whose fields are the values of the same names."""
    names = [field.name for field in fields(cls)]
    return cls(**{name: value for name, value in {**values, **more}.items() if name in names})


# ---------------------------------------------------------------- options of a run

def _run_options(args, values: dict, **more) -> RunOptions:
    if args.jobs > 1 and not args.seeds:
        raise UserError(f"--jobs {args.jobs}: only with --seeds, whose runs it counts")
    saves = {"save_every": TrainOptions.save_every, **saving(str(args.save_every))}
    train = _of(TrainOptions, values, seed=int(args.sr), **saves)
    return _of(RunOptions, values, train=train, out=args.out or Path("runs") / f"{args.mode}-{args.sr}", **more)


def choose(args) -> None:
    """Fills in model, task, data and epochs where they were not given (see `inputs.choose`)."""
    args.model, args.task, args.data = inputs.choose(args.model, args.task, args.data, note)
    preset_values = preset(args.preset or preset_name("LoRA", args.task))
    args.epochs = args.epochs or preset_values.get("epochs", TrainOptions.epochs)


def finetune_options(args) -> RunOptions:
    """Returns a fine-tuning's options, with the model, task and data that are used where none were named."""
    model, task, data = inputs.choose(args.model, args.task, args.data, note)
    name = args.preset or preset_name("LoRA", task)
    # Precedence: default, preset, --config, flag; `args` has the last two.
    values = {**preset(name, args.method), **given(args), "mode": "LoRA", "model": model, "task": task, "data": data}
    return _run_options(args, values, preset=name, lora=_of(LoRAOptions, values), table=_of(TableOptions, values))


def distil_options(args) -> tuple[RunOptions, DistilOptions]:
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
    for option in ("augment", "pretrain", "transfer", "text", "label_precision"):
        if args.plain and getattr(args, option) and values[option] != defaults.get(option):
            raise UserError(f"--{option.replace('_', '-')}: not with --plain, whose one stage is the training set")
    if recorded.get("feature_columns") or recorded["method"] == "features":
        if args.augment:
            raise UserError("--augment: the teacher reads feature columns, which new sentences do not have; leave it out")
        values.update(augment=0, match="none")
    if values.get("augment") == 0:
        values["transfer"] = 0
    # Where the training set alone teaches classes, it takes as many epochs as with --plain.
    if not values.get("transfer", DistilOptions.transfer):
        gold = preset(preset_name("distil", task, plain=True))
        values.update({key: gold[key] for key in ("epochs", "lr") if getattr(args, key) is None})
    run = _run_options(args, values, preset=name, model=None, task=task, data=args.data)
    return run, _of(DistilOptions, values, teacher=teacher, more_teachers=tuple(map(str, more)))
