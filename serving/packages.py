"""Packages of requirements-serve.txt: the service and the export alone import them."""
from __future__ import annotations

import importlib

from machine.errors import UserError


def require(name: str, mode: str | None = None):
    """Imports a module of a package that requirements.txt does not list.

    Args:
        name: of the module, dotted or not.
        mode: of the command line, at the front of the error.

    Raises:
        UserError: the package is not installed. The message has the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{f'{mode}: ' if mode else ''}the package {name.split('.')[0]} is not installed; "
                        "pip install -r requirements-serve.txt") from None
