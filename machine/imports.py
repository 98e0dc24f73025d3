"""Imports of large libraries, without the garbage collector.

    with quick_imports():
        import torch
"""
from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Turns the garbage collector off while a block imports transformers and others for the first time."""
    if "transformers" in sys.modules:
        yield
        return
    # They make half a million objects, none of them garbage, and the collector would go through them again and again: a
    # fifth of the way to the first training step. Frozen, they are not looked at afterwards either.
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
