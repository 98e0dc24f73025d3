"""Names the first module with an output or a gradient that is not finite (`--anomaly`).

    with anomaly.watching(model):
        loss = objective(model(...))    # raises NotFinite with the module's name
        loss.backward()                 # likewise, with the operation where autograd knows it

The checks are PyTorch's own hooks: one on each module's output, one on each output's gradient.
"""
from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


class NotFinite(RuntimeError):
    """Reports NaN or infinity; the message names the module."""


def tensors_in(value) -> Iterator[Tensor]:
    """Yields the floating-point tensors in a module's inputs or outputs, however nested."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def finite(value) -> bool:
    """Returns whether every number in a tensor, or in a nesting of tensors, is finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors_in(value))


@contextmanager
def watching(model: nn.Module):
    """Checks every module's output and its gradient; several times slower. A fused block (fast/blocks.py) is one module.

    Raises:
        NotFinite: within the context, from a forward or backward pass.
    """
    # The gradient flows from the loss down. The last module with a finite gradient names the place where it broke.
    flowing = {"into": "the loss"}

    def check_output(name: str, module: nn.Module, inputs, output) -> None:
        if not finite(output):
            bad = [key for key, p in module.named_parameters() if not finite(p)]
            why = f"; its parameter {bad[0]} is not" if bad else "; its input is not either" if not finite(inputs) else ""
            raise NotFinite(f"the output of {name} ({type(module).__name__}) is not finite{why}")
        for tensor in tensors_in(output):
            # Once for each tensor: an outer module often returns what an inner one did.
            if tensor.requires_grad and not hasattr(tensor, "watched"):
                tensor.watched = True
                tensor.register_hook(partial(check_gradient, name))

    def check_gradient(name: str, gradient: Tensor) -> None:
        if not finite(gradient):
            raise NotFinite(f"the gradient of {name}'s output is not finite, above which that of {flowing['into']} was")
        flowing["into"] = name

    hooks = [module.register_forward_hook(partial(check_output, name)) for name, module in model.named_modules() if name]
    try:
        with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(True):
            # Hides the traceback of the forward pass: the error's one line has the module.
            warnings.filterwarnings("ignore", message="(?s).*Error detected in ")
            yield
    except RuntimeError as error:
        # Autograd finds NaN, not infinity, and names the operation but not the module.
        found = re.search(r"Function '(\w+)' returned nan", str(error))
        if found is None:
            raise
        raise NotFinite(f"the gradient is nan: {found[1]} made it from the finite one of {flowing['into']}'s output"
                        ) from None
    finally:
        for hook in hooks:
            hook.remove()
