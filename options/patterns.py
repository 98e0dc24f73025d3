"""Values of single modules by patterns of their names, with PEFT's meaning: `--rank-pattern c_attn=4,h.1.mlp.c_proj=2`.

    value_of(("c_attn=4",), "transformer.h.0.attn.c_attn", 8)      # 4.0
"""
from __future__ import annotations

import re
from argparse import ArgumentTypeError

from machine.errors import UserError


def ranks_by_module(text: str) -> tuple[str, ...]:
    """Returns the parts of MODULE=RANK[,...], checked; raises `ArgumentTypeError`."""
    return _checked(text, int, "RANK, a whole number of at least 1")


def alphas_by_module(text: str) -> tuple[str, ...]:
    """Returns the parts of MODULE=ALPHA[,...], checked; raises `ArgumentTypeError`."""
    return _checked(text, float, "ALPHA, a number above 0")


def _checked(text: str, kind: type, expected: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(","))
    for part in parts:
        name, _, number = part.rpartition("=")
        try:
            re.compile(name)
            good = bool(name) and 0 < kind(number) < 1e9
        except (ValueError, re.error):
            good = False
        if not good:
            raise ArgumentTypeError(f"{part!r}: expected MODULE={expected}, such as c_attn=4")
    return parts


def fits(pattern: str, name: str) -> bool:
    """Returns whether a pattern is a module's name or its dotted ending, as PEFT compares them."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def value_of(patterns: tuple[str, ...], name: str, default: float) -> float:
    """Returns the number of the first pattern that fits a module, or the default."""
    for part in patterns:
        pattern, _, number = part.rpartition("=")
        if fits(pattern, name):
            return float(number)
    return default


def check(flag: str, patterns: tuple[str, ...], names: list[str]) -> None:
    """Raises `UserError` for a pattern that fits no name."""
    for part in patterns:
        pattern = part.rpartition("=")[0]
        if not any(fits(pattern, name) for name in names):
            raise UserError(f"{flag} {part}: fits none of the adapted modules, such as {names[0]}")
