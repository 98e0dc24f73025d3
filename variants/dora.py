"""DoRA: the update of a weight in a magnitude and a direction.

    y = m / ||W + s B A|| * (W x + s B A x) + b

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", equations 5 and 11. The norm is of each row of the sum
(out_features,), and the gradient takes it for a constant (section 4.3). m begins as the norm of W's rows: a fresh adapter
changes nothing.

Cost: out_features more trained numbers a layer, and B A, as large as W, in each forward pass. It is no sum of low-rank
terms: fused blocks call this `forward`, and an `AdapterBank` cannot hold it.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from model import LoRALinear, weight_of


class DoRALinear(LoRALinear):
    """A frozen linear layer with a trained low-rank update and a trained magnitude of each adapted output.

    Attributes:
        lora_magnitude: (adapted outputs,) m; outputs outside the slices keep the norm of their row.
        held: the update that `merge` added, for `unmerge`; None unless merged.
    """

    def __init__(self, base, rank, alpha, dropout=0.0, rslora=False, slices=None):
        super().__init__(base, rank, alpha, dropout, rslora, slices)
        # B is zero, so that the norm of the sum is that of W.
        self.lora_magnitude = nn.Parameter(self.norm_of_sum()[self.adapted()])
        self.held: Tensor | None = None

    def adapted(self) -> Tensor:
        """Returns the numbers of the adapted outputs."""
        device = self.base.weight.device
        return torch.cat([torch.arange(start, stop, device=device) for start, stop in self.slices])

    @torch.no_grad()
    def norm_of_sum(self) -> Tensor:
        """Returns the norm of each row of W + s B A, (out_features,)."""
        return torch.linalg.norm(weight_of(self.base).float() + super().delta(), dim=1)

    def factor(self) -> Tensor:
        """Returns m over the norm of the sum, (out_features,): 1 outside the slices."""
        norm = self.norm_of_sum()
        return (self.magnitude(norm) / norm)

    def magnitude(self, norm: Tensor) -> Tensor:
        """Returns m of all outputs (out_features,), with `norm` where an output is not adapted."""
        return norm.index_copy(0, self.adapted(), self.lora_magnitude.float())

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        if self.merged:
            return self.base(x)
        A, B = (factor.to(x.dtype) for factor in self.factors())
        y, bias = self.base(x), self.base.bias
        update = nn.functional.linear(nn.functional.linear(self.dropout(x), A), B)
        # The bias has no direction: it is added after the scaling.
        plain = y if bias is None else y - bias
        scaled = self.factor().to(x.dtype) * (plain + self.scaling * update)
        return scaled if bias is None else scaled + bias

    def delta(self) -> Tensor:
        """Returns the change of W, (out_features, in_features)."""
        if self.merged:
            return self.held
        W = weight_of(self.base).float()
        return self.factor()[:, None] * (W + super().delta()) - W

    def merge(self) -> None:
        # The change depends on W itself: it is kept, so that `unmerge` subtracts the same one.
        self.held = self.delta().detach()
        super().merge()

    def unmerge(self) -> None:
        super().unmerge()
        self.held = None
