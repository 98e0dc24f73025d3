"""The head that reads numeric features next to the text."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from machine.errors import UserError
from machine.hardware import device

FARTHEST = 1e30  # standard deviations: the products and sums of such values stay inside float32's range


class FeatureHead(nn.Module):
    """A network with one hidden layer from numeric features, standardised and with missing values marked, to logits.

    Mean and standard deviation are those of the training rows and are saved with the weights. A missing
    value becomes the mean, and a second input marks it as missing. The last layer starts at zero, so that a
    fresh head changes nothing.

    Args:
        features: (N, F) float64, the training rows, NaN where a value is missing.
        num_labels: classes.
        hidden_size: of the hidden layer.

    Raises:
        UserError: the device that computes has no float64.
    """

    def __init__(self, features: Tensor, num_labels: int, hidden_size: int = 32):
        super().__init__()
        if device().type == "mps":
            raise UserError("--device mps: has no float64, which numeric features need; use --device cpu")
        # Mean and variance of the values that are present: a missing one must not pull them towards 0.
        present = ~features.isnan()
        count = present.sum(0).clamp(min=1)
        mean = features.nan_to_num().sum(0) / count
        variance = (features - mean).nan_to_num().square().sum(0) / count
        # Rounding leaves a constant feature a variance slightly above 0; the bound is that of scikit-learn's StandardScaler.
        eps = torch.finfo(features.dtype).eps
        constant = variance <= count * eps * variance + (count * mean * eps).square()
        self.register_buffer("mean", mean)
        # A constant feature carries no information; dividing by 1 leaves it at zero.
        self.register_buffer("std", torch.where(constant, 1.0, variance.sqrt()))
        # Each feature has two inputs: its value, and whether it is missing.
        self.hidden = nn.Linear(2 * features.shape[1], hidden_size)
        self.out = nn.Linear(hidden_size, num_labels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def standardise(self, features: Tensor) -> Tensor:  # (B, F) -> (B, F) float32
        # In float64 until here: the difference of two large numbers (years, prices) is small.
        numbers = (features - self.mean) / self.std
        # A value far outside the training rows would become infinite in float32, and the logits NaN.
        return numbers.clamp(-FARTHEST, FARTHEST).nan_to_num(nan=0.0).float()

    def forward(self, features: Tensor) -> Tensor:  # (B, F) -> (B, labels)
        numbers = torch.cat([self.standardise(features), features.isnan().float()], -1)
        return self.out(F.gelu(self.hidden(numbers)))
