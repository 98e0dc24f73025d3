"""Principal components: hidden states and embeddings of a teacher in the sizes of a student."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Reduction:
    """The first principal components of some rows; `reduce` projects rows on them and standardises the result."""

    mean: Tensor  # (C,)
    components: Tensor  # (C, d), orthonormal columns, the largest variance first
    std: Tensor  # (d,) of the rows from which the components were computed

    def reduce(self, rows: Tensor) -> Tensor:  # (N, C) -> (N, d)
        return (rows - self.mean) @ self.components / self.std


def principal_components(rows: Tensor, size: int) -> Reduction:
    """Computes the first `size` principal components of rows (N, C) (Pearson 1901), in float64."""
    # In float64 on the CPU, because the components decide a run's bytes on every machine.
    rows = rows.double().cpu()
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))  # in ascending order
    components = vectors.flip(-1)[:, :size]
    # An eigenvector's sign is arbitrary. Each component's largest entry is positive: the same rows, the same components.
    largest = components.gather(0, components.abs().argmax(0, keepdim=True))
    # A dimension without variance would be divided by zero.
    std = values.flip(-1)[:size].clamp(min=1e-12).sqrt()
    return Reduction(mean.float(), (components * largest.sign()).float(), std.float())
