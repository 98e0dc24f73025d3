"""AdaLoRA's ranks: the least important values of E become zero, until the mean rank is the one asked for.

    budget = RankBudget(net, rank=8)
    budget.after_step(step, total)      # after each optimiser step, while the gradients are there

Zhang et al. 2023, sections 3.2 and 3.3. The importance of a number is the product of two running averages: its sensitivity
|w dL/dw| (equation 8), and the deviation of the sensitivity from its average, the uncertainty (equations 9 and 10). That of
a component is E's own, plus the means over its row of A and over its column of B (equation 7). All components of all layers
compete for the budget, which falls from the first rank to the last by a cubic (equation 12).
"""
from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from model import lora_layers
from variants.adalora import AdaLoRALinear

BETA = 0.85  # decay of both averages
WARM_UP, FINAL = 0.1, 0.3  # shares of the steps before the budget falls, and after it has fallen
EVERY = 10  # steps between two choices of components while it falls


class RankBudget:
    """Chooses the components of a model's updates while it trains.

    Args:
        rank: the mean rank in the end.
    """

    def __init__(self, net: PreTrainedModel, rank: int):
        self.layers: list[AdaLoRALinear] = list(lora_layers(net).values())
        self.first = sum(len(layer.lora_E) for layer in self.layers)
        self.last = rank * sum(len(layer.slices) for layer in self.layers)

    def of_step(self, step: int, total: int, warm_up: int, final: int, every: int) -> int | None:
        """Returns the number of components after a step (from 1) of `total`; None where none are chosen."""
        if step <= warm_up:
            return None
        if step >= total - final:
            return self.last
        share = 1 - (step - warm_up) / (total - final - warm_up)
        return int((self.first - self.last) * share ** 3 + self.last) if step % every == 0 else None

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        """Updates the averages from the gradients, and drops components where the budget has fallen."""
        warm_up, final = round(WARM_UP * total), round(FINAL * total)
        # In the last part the choice stands, and the values that are left train on.
        if step < total - final:
            for layer in self.layers:
                for part in layer.PARTS:
                    self.follow(layer, part)
        if (budget := self.of_step(step, total, warm_up, final, EVERY)) is not None and budget < self.first:
            self.drop(budget)

    def follow(self, layer: AdaLoRALinear, part: str) -> None:
        """Takes a step's sensitivity into the averages of one parameter."""
        p, sensitivity, uncertainty = (getattr(layer, f"{part}{kind}") for kind in ("", "_sensitivity", "_uncertainty"))
        now = (p * p.grad).abs()
        sensitivity.lerp_(now, 1 - BETA)
        uncertainty.lerp_((now - sensitivity).abs(), 1 - BETA)

    def drop(self, budget: int) -> None:
        """Sets all but the `budget` most important values of E to zero."""
        scores = [importance(layer) for layer in self.layers]
        limit = torch.cat(scores).kthvalue(self.first - budget).values
        for layer, score in zip(self.layers, scores, strict=True):
            layer.lora_E.masked_fill_((score <= limit)[:, None], 0.0)


def importance(layer: AdaLoRALinear) -> Tensor:
    """Returns the importance of each component of a layer, (ranks,)."""
    E, A, B = (getattr(layer, f"{part}_sensitivity") * getattr(layer, f"{part}_uncertainty") for part in layer.PARTS)
    rows = [stop - start for start, stop in layer.slices]
    return E[:, 0] + A.mean(1) + torch.cat([part.mean(0) for part in B.split(rows)])
