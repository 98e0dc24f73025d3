"""The average of the weights over the steps of a training (`--ema`): scored and kept in place of the weights themselves.

    average = Average(trainable(model), optimizer, decay=0.99)
    average.update(step)       # after each step
    with average.in_model():   # the model computes with the average
        ...
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """An exponential moving average of the weights (Polyak and Juditsky 1992), which training itself does not feel.

    It is a part of the optimiser's state, so that checkpoints hold it.

    Args:
        parameters: the trained parameters by name.
        decay: share of the old average in the new one; 0: no average.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, decay: float):
        self.parameters, self.optimizer, self.decay = parameters, optimizer, decay
        self.weights: dict[str, Tensor] = {}  # the weights by name while the model holds their average, else empty

    def update(self, step: int) -> None:
        """Moves the average towards the weights after optimiser step `step` (from 1).

        After k steps the decay is at most (1 + k) / (10 + k): the average forgets where the training began.
        """
        if not self.decay:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        # A parameter without a state has had no gradient, and is where it began.
        trained = [p for p in self.parameters.values() if self.optimizer.state[p]]
        averages = [self.optimizer.state[p].setdefault("average", p.detach().clone()) for p in trained]
        get_ema_multi_avg_fn(decay)(averages, [p.detach() for p in trained], None)

    def best_weights(self) -> dict[str, Tensor]:
        """Returns copies on the CPU of the weights that are kept: the average where there is one, else the weights."""
        return {name: self.optimizer.state[p].get("average", p.detach()).cpu().clone()
                for name, p in self.parameters.items()}

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Gives the model the average, if there is one, for the body of the `with` statement.

        A signal may interrupt it between any two statements. Therefore `weights` is set whole before the first parameter
        changes, and `restore` may be called again: the caller that catches the signal does so before it saves.
        """
        # Before the first update there is no average, and the model keeps its weights.
        averages = {}
        for name, p in self.parameters.items():
            if "average" in self.optimizer.state[p]:
                averages[name] = self.optimizer.state[p]["average"]
        self.weights = {name: self.parameters[name].detach().clone() for name in averages}
        try:
            with torch.no_grad():
                for name, average in averages.items():
                    self.parameters[name].copy_(average)
            yield
        finally:
            self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Gives the model its weights back if it holds their average; otherwise it changes nothing."""
        # Emptied last: a call that was interrupted is repeated as a whole.
        for name, weight in self.weights.items():
            self.parameters[name].copy_(weight)
        self.weights = {}
