"""Checkpoints: the whole state of a training in one file, from which the training resumes to the same bytes."""
from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from machine import hardware, processes
from machine.errors import UserError
from record.ownership import CHECKPOINT
from record.tensors import load_checked, save_checked


@dataclass(frozen=True)
class Checkpointing:
    """The place of a training's checkpoint, and whether the training resumes from it."""

    folder: Path
    name: str = ""  # beginning of the file's name, and label of the progress bar
    resume: bool = False  # resume from the checkpoint, if there is one

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}{CHECKPOINT}"


@dataclass
class Progress:
    """The position and the sums of a training; a checkpoint holds all of it."""

    epoch: int = 1  # the running epoch, from 1
    step_in_epoch: int = 0  # optimiser steps done in the running epoch
    step: int = 0  # optimiser steps done in all
    best_epoch: int = 0
    best_score: tuple[float, float] = (-math.inf, -math.inf)  # the problem's (MCC), then -loss
    sums: dict[str, float] = field(default_factory=dict)  # of the running epoch
    parts: list[list[float]] = field(default_factory=list)  # the same sums by process, if there are several processes
    confusion: list[list[int]] = field(default_factory=list)  # of the running epoch: [label][prediction]
    history: list[dict] = field(default_factory=list)  # one object an epoch: the lines of metrics.jsonl
    finished: bool = False

    def as_json(self) -> str:
        """Returns the text that a checkpoint holds."""
        values = dict(vars(self))
        # Checkpoints of earlier versions have this key, too.
        values["group"] = values.pop("step_in_epoch")
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> Progress:
        """Reads the text of `as_json`."""
        values = json.loads(text)
        return cls(step_in_epoch=values.pop("group"), **values)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def resumed_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Returns buffers that training changes and no run saves, by name: those that a module lists in `resumed`."""
    found = {}
    for name, module in model.named_modules():
        found.update({f"{name}.{key}": getattr(module, key) for key in getattr(module, "resumed", ())})
    return found


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress,
                    best: dict[str, Tensor]) -> None:
    """Writes the whole state of a training into one file, atomically: until then the previous file stays.

    All processes call this function, with the same state but for their random numbers; the first one writes.
    """
    # A collective operation: every process takes part before all but the first return.
    tensors = {name: processes.gather(source.get_rng_state()) for name, source in hardware.random_sources().items()}
    if not processes.is_main():
        return
    for name, p in trainable(model).items():
        tensors[f"model.{name}"] = p.detach()
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    tensors.update({f"best.{name}": value for name, value in best.items()})
    tensors.update({f"buffer.{name}": value for name, value in resumed_buffers(model).items()})
    save_checked(path, tensors, progress.as_json())


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
                    ) -> tuple[Progress, dict[str, Tensor]]:
    """Puts a checkpoint's state into model, optimiser and random number generators.

    Returns:
        progress, and the best epoch's weights by name.

    Raises:
        UserError: damaged (its checksum is wrong), or of another model.
    """
    tensors, text = load_checked(path)
    parameters = trainable(model)
    # Compared before the first weight is written: a checkpoint of another model changes nothing.
    saved = {name: value.shape for name, value in tensors.items() if name.startswith("model.")}
    if saved != {f"model.{name}": p.shape for name, p in parameters.items()}:
        raise UserError(f"{path}: the checkpoint is of another model")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[f"model.{name}"])
            # Names are optimizer.<key>.<parameter>, so that any optimiser's keys are restored.
            optimizer.state[p] = {key.split(".")[1]: value.to(p.device) for key, value in tensors.items()
                                  if key.startswith("optimizer.") and key.split(".", 2)[2] == name}
        for name, buffer in resumed_buffers(model).items():
            buffer.copy_(tensors[f"buffer.{name}"])
    for name, source in hardware.random_sources().items():
        states = torch.atleast_2d(tensors[name]) if name in tensors else []  # by process
        if processes.rank() < len(states):
            # Cloned, because `set_rng_state` reads from the start of the storage.
            source.set_rng_state(states[processes.rank()].clone())
    best = {name.removeprefix("best."): value for name, value in tensors.items() if name.startswith("best.")}
    return Progress.from_json(text), best
