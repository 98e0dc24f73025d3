"""The temperature of KD over a training: constant, or annealed to 1."""
from __future__ import annotations


class Temperature:
    """T of a training: constant, or annealed from its start to 1 along a straight line.

    Jafari et al. 2021, "Annealing Knowledge Distillation", anneal T so (there in whole numbers, with another loss).
    """

    def __init__(self, start: float, schedule: str = "constant"):
        self.start, self.schedule, self.now = start, schedule, start

    def begin_step(self, step: int, total: int) -> None:
        """Sets T for an optimiser step (from 0) of `total`."""
        # The last step has T = 1: the student ends on the teacher's own probabilities.
        if self.schedule == "anneal":
            self.now = self.start + (1 - self.start) * step / max(1, total - 1)

    def __float__(self) -> float:
        return float(self.now)
