"""serving/packages.py: a package that is not installed."""
import sys

import pytest

from machine.errors import UserError
from serving.packages import require


def test_a_missing_package_is_said_with_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="^the package onnxruntime is not installed; pip install -r requirements-serve.txt$"):
        require("onnxruntime")
    with pytest.raises(UserError, match="^serve: the package no_such_package is not installed"):
        require("no_such_package.part", "serve")
