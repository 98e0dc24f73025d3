"""AdaLoRA: updates in the form of a singular value decomposition, and ranks that training chooses (rank_budget.py).

    y = W x + s B E A x + b,   E diagonal,   s = alpha / first rank

Zhang et al. 2023, "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", equation 3; there P Lambda Q. E begins
as zero. The loss gains gamma times the distance of A A^T and B^T B from the identity (equation 4), a mean over all
matrices, so that the values in E stand for themselves and can be dropped one by one.

Cost: the first rank is 1.5 times --rank, the mean rank in the end; two averages of each trained number's importance are
kept. A sum of low-rank terms: fused, and served by an `AdapterBank`. It is saved as plain LoRA of ranks that differ.
"""
from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from model import LoRALinear, inject_lora, lora_layers
from options.schema import LoRAOptions

FIRST_RANK = 1.5  # over the mean rank in the end
GAMMA = 0.1  # weight of the orthogonality in the loss
START_STD = 0.02  # of A and B


class AdaLoRALinear(LoRALinear):
    """A frozen linear layer plus B E A x.

    Attributes:
        lora_E: (ranks, 1) the diagonal; of several slices one after the other, as the rows of A.
        lora_E_sensitivity, lora_E_uncertainty, ...: averages for E, A and B, of their shapes; a checkpoint holds them.
    """

    PARTS = ("lora_E", "lora_A", "lora_B")
    resumed = tuple(f"{part}_{kind}" for part in PARTS for kind in ("sensitivity", "uncertainty"))

    def __init__(self, base, rank, alpha, dropout=0.0, rslora=False, slices=None):
        super().__init__(base, rank, alpha, dropout, rslora, slices)
        self.lora_E = nn.Parameter(self.lora_A.new_zeros(len(self.lora_A), 1))
        nn.init.normal_(self.lora_A, std=START_STD)
        nn.init.normal_(self.lora_B, std=START_STD)
        for name in self.resumed:
            like = getattr(self, name.rpartition("_")[0])
            self.register_buffer(name, torch.zeros_like(like, requires_grad=False), persistent=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A * self.lora_E, self.block_B()


def inject(net: PreTrainedModel, options: LoRAOptions) -> None:
    """Adapts a model by AdaLoRA, with 1.5 times the rank; raises `UserError` as `inject_lora` does."""
    inject_lora(net, replace(options, rank=math.ceil(FIRST_RANK * options.rank)), AdaLoRALinear)


def orthogonality(net: PreTrainedModel) -> Tensor:
    """Returns the mean distance (Frobenius) of A A^T and B^T B from the identity, over all layers and slices."""
    distances = []
    for layer in lora_layers(net).values():
        rows = [stop - start for start, stop in layer.slices]
        for A, B in zip(layer.lora_A.split(layer.rank), layer.lora_B.split(rows), strict=True):
            one = torch.eye(layer.rank, device=A.device)
            distances += [(A @ A.t() - one).norm(), (B.t() @ B - one).norm()]
    return torch.stack(distances).mean()
