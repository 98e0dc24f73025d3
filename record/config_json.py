"""Writes a run's options to config.json, and reads them back with checks; old runs lack options of today.

    rebuild(RunOptions, read_json(folder / "config.json")["options"], out=folder)
"""
from __future__ import annotations

import json
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import get_args, get_origin, get_type_hints

from machine.errors import UserError
from options.schema import RunOptions


def as_json(value):
    """Returns options as plain JSON values."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def settings_of(options: RunOptions) -> dict:
    """Returns the options as config.json records them.

    Nested options stand beside the others under their own names (`train`, `lora`), if the mode uses them.
    """
    # Runs with one text and one of several classes record what they always have.
    unused = {"problem": options.table.problem in (None, "single-label"), "join": not options.table.pairs}
    return {**{field.name: getattr(options, field.name) for field in fields(options)
               if field.name not in ("out", "resume", "overwrite", "repeats", "train", "lora", "table")
               # Added later, and recorded only where it is in use.
               and not (field.name == "fold" and options.fold is None)},
            **{name: value for name, value in asdict(options.table).items() if not unused.get(name)}}


def rebuild(cls: type, values: dict, **given):
    """Builds an options object from the values of config.json: the inverse of `settings_of` and `as_json`.

    Args:
        cls: RunOptions, or another dataclass of options.schema; nested ones are read from the same values.
        given: fields that config.json does not record, such as `out`.

    Raises:
        UserError: an option without a default was not recorded, or one is of another type than it has.
    """
    kinds, made = get_type_hints(cls), dict(given)
    for field in fields(cls):
        kind = kinds[field.name]
        if field.name in given:
            continue
        # Nested options stand beside the others.
        if is_dataclass(kind):
            made[field.name] = rebuild(kind, values)
        elif field.name in values:
            # Somebody may have edited the file, or another program written it.
            value = values[field.name]
            if not _is(kind, value):
                raise UserError(f"config.json: {field.name} is {json.dumps(value)[:60]}; expected {field.type}")
            value = tuple(value) if isinstance(value, list) else value
            made[field.name] = Path(value) if isinstance(value, str) and "Path" in str(kind) else value
        # A run that is older than the option.
        elif "option" in field.metadata and field.metadata["option"].before is not None:
            made[field.name] = field.metadata["option"].before
    try:
        return cls(**made)
    except TypeError as error:
        raise UserError(f"config.json does not record every option ({error})") from None


def _is(kind, value) -> bool:
    """Returns whether a JSON value can stand for an option of this type."""
    if isinstance(kind, UnionType):
        return any(_is(one, value) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(_is(get_args(kind)[0], item) for item in value)
    # In JSON, a whole number may stand for a float; true and false are no numbers, which Python takes them for.
    if kind in (int, float, bool):
        return isinstance(value, bool) if kind is bool else isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(value, {Path: str | Path, str: str, NoneType: NoneType}.get(kind, object))
