"""Parsed arguments -> typed options; options/presets/ has the defaults that depend on the task, the method or --plain.

    preset("LoRA-tiny", "full")    # {"lr": 5e-4, "epochs": 12}
"""
from __future__ import annotations

import tomllib
from dataclasses import fields
from pathlib import Path

from data_utils import with_columns
from experiments import inputs
from experiments.parser import closest
from machine.errors import UserError
from machine.streams import note
from options.declare import ROOT
from options.schema import LoRAOptions, RunOptions, TableOptions, TrainOptions

PRESETS = ROOT / "options" / "presets"


def named(words: tuple[str, ...], option: str) -> dict[str, Path]:
    """Returns the folders of NAME=DIR by name; raises `UserError` if a name is given twice."""
    found: dict[str, Path] = {}
    for name, _, folder in (word.partition("=") for word in words):
        if name in found:
            raise UserError(f"{option} {name}: the name is given twice")
        found[name] = Path(folder)
    return found


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
    # Checked by name, so that --preset ../FILE reads nothing outside the folder.
    names = sorted(path.stem for path in PRESETS.glob("*.toml"))
    if name not in names:
        raise UserError(f"--preset {name}: unknown{closest(name, names)}")
    values = tomllib.loads((PRESETS / f"{name}.toml").read_text(encoding="utf-8"))
    base = preset(values.pop("base"), method) if "base" in values else {}
    own = {key: value.get(method) if isinstance(value, dict) else value for key, value in values.items()}
    return base | {key: value for key, value in own.items() if value is not None}


def given(args) -> dict:
    """Returns the arguments that have a value: by a flag, by --config, or by default."""
    return {name: value for name, value in vars(args).items() if value is not None}


def fill(cls: type, values: dict, **more):
    """Returns a dataclass filled with the values of its fields' names."""
    names = [field.name for field in fields(cls)]
    return cls(**{name: value for name, value in {**values, **more}.items() if name in names})


def run_options(args, values: dict, **more) -> RunOptions:
    """Returns the options that every run has.

    Args:
        values: option -> value, from preset, --config and flags.

    Raises:
        UserError: --jobs without --seeds or --folds.
    """
    if args.jobs > 1 and not args.seeds and not getattr(args, "folds", None):
        raise UserError(f"--jobs {args.jobs}: only with --seeds or --folds, whose runs it counts")
    # One flag, --save-every, has two fields: minutes or steps between checkpoints.
    word = str(args.save_every).removesuffix("min")
    saves = {"save_every": float(word)} if not word.endswith("steps") else {
        "save_every": TrainOptions.save_every, "save_steps": int(word.removesuffix("steps"))}
    train = fill(TrainOptions, values, seed=int(args.sr), **saves)
    return fill(RunOptions, values, train=train, out=args.out or Path("runs") / f"{args.mode}-{args.sr}", **more)


def choose(args) -> None:
    """Fills in missing model, task, data and epochs (see `inputs.choose`)."""
    args.model, args.task, args.data = inputs.choose(args.model, args.task, args.data, note)
    # The runs of a study have the same epochs, whatever their method.
    preset_values = preset(args.preset or preset_name("LoRA", args.task))
    args.epochs = args.epochs or preset_values.get("epochs", TrainOptions.epochs)


def finetune_options(args) -> RunOptions:
    """Returns a fine-tuning's options, with the default model, task and data if none were named."""
    model, task, data = inputs.choose(args.model, args.task, args.data, note)
    name = args.preset or preset_name("LoRA", task)
    # Precedence: default, preset, --config, flag; `args` has the last two.
    values = {**preset(name, args.method), **given(args), "mode": "LoRA", "model": model, "task": task, "data": data}
    return run_options(args, values, preset=name, lora=fill(LoRAOptions, values),
                       table=with_columns(task, fill(TableOptions, values)))
