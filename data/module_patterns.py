"""Sizes of single modules by patterns of their names, with PEFT's meaning: `--rank-pattern c_attn=4,h.1.mlp.c_proj=2`.

    size_of(LoRAOptions(rank_pattern=("c_attn=4",)), "transformer.h.0.attn.c_attn")      # (4, 16.0)
"""
from __future__ import annotations

import re

from machine.errors import UserError
from options.schema import LoRAOptions


def fits(pattern: str, name: str) -> bool:
    """Returns whether a pattern is a module's name or its dotted ending, as PEFT compares them.

    Raises:
        UserError: the pattern is no regular expression.
    """
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error as error:
        raise UserError(f"pattern {pattern!r} of a module's name: no regular expression ({error}); expected one such as "
                        "c_attn") from None


def size_of(options: LoRAOptions, name: str) -> tuple[int, float]:
    """Returns rank and alpha of a module's update, by the module's full name."""
    return int(_value_of(options.rank_pattern, name, options.rank)), _value_of(options.alpha_pattern, name, options.alpha)


def _value_of(patterns: tuple[str, ...], name: str, default: float) -> float:
    # The number of the first pattern that fits the module.
    for part in patterns:
        pattern, _, number = part.rpartition("=")
        if fits(pattern, name):
            return float(number)
    return default


def checked_names(options: LoRAOptions, names: list[str]) -> list[str]:
    """Returns the names of the adapted modules; raises `UserError` for a pattern that fits none of them."""
    for flag, patterns in (("--rank-pattern", options.rank_pattern), ("--alpha-pattern", options.alpha_pattern)):
        for part in patterns:
            if not any(fits(part.rpartition("=")[0], name) for name in names):
                raise UserError(f"{flag} {part}: fits none of the adapted modules, such as {names[0]}")
    return names
