"""VeRA: all layers share one random A and one random B, and train a vector at each side of them.

    y = W x + b + Lambda_b B Lambda_d A x

Kopiczko et al. 2024, "VeRA: Vector-based Random Matrix Adaptation", equation 2. A (rank, most inputs) and B (most outputs,
rank) are as large as the largest adapted layer; a smaller one takes their first columns or rows. d begins as 0.1, b as 0.

Cost: rank + out_features trained numbers a layer, so that the rank may be large (the paper's: 256 to 1024); alpha has no
effect. A sum of low-rank terms: fused, and served by an `AdapterBank`.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from model import LoRALinear, inject_lora, lora_layers
from options.schema import LoRAOptions

START_D = 0.1
KEY = 0  # seeds A and B, in every run; PEFT's projection_prng_key


class VeRALinear(LoRALinear):
    """A frozen linear layer plus an update of shared matrices, scaled by two trained vectors.

    Attributes:
        vera_lambda_d: (rank,) between A and B.
        vera_lambda_b: (adapted outputs,) after B.
        shared_A: (rank, in_features), frozen; shared_B: (adapted outputs, rank).
    """

    def __init__(self, base, rank, alpha, dropout=0.0, rslora=False, slices=None):
        super().__init__(base, rank, alpha, dropout, rslora, slices)
        del self.lora_A, self.lora_B
        self.scaling = 1.0
        weight, outputs = base.weight, sum(stop - start for start, stop in self.slices)
        self.vera_lambda_d = nn.Parameter(torch.full((rank,), START_D, device=weight.device))
        self.vera_lambda_b = nn.Parameter(torch.zeros(outputs, device=weight.device))
        self.rows = torch.cat([torch.arange(start, stop) for start, stop in self.slices]).tolist()

    def share(self, A: Tensor, B: Tensor) -> None:
        """Takes this layer's part of the shared matrices (rank, most inputs) and (most outputs, rank)."""
        device = self.base.weight.device
        self.register_buffer("shared_A", A[:, :self.in_features].to(device), persistent=False)
        self.register_buffer("shared_B", B[:self.out_features].to(device), persistent=False)

    def lambda_b(self) -> Tensor:
        """Returns b of all outputs, (out_features,): zero outside the slices."""
        b = self.vera_lambda_b.new_zeros(self.out_features)
        b[self.rows] = self.vera_lambda_b
        return b

    def factors(self) -> tuple[Tensor, Tensor]:  # (rank, in), (out, rank)
        return self.vera_lambda_d[:, None] * self.shared_A, self.lambda_b()[:, None] * self.shared_B


def shared_matrices(rank: int, inputs: int, outputs: int, key: int = KEY) -> tuple[Tensor, Tensor]:
    """Returns A (rank, inputs) and B (outputs, rank): uniform as Kaiming's, from a seed of their own."""
    generator = torch.Generator().manual_seed(key)
    bounds = [math.sqrt(2) / math.sqrt(width) * math.sqrt(3) for width in (inputs, rank)]
    return tuple(torch.empty(shape).uniform_(-bound, bound, generator=generator)
                 for shape, bound in zip(((rank, inputs), (outputs, rank)), bounds, strict=True))


def inject(net: PreTrainedModel, options: LoRAOptions) -> None:
    """Adapts a model by VeRA; raises `UserError` as `inject_lora` does."""
    inject_lora(net, options, VeRALinear)
    layers = list(lora_layers(net).values())
    A, B = shared_matrices(options.rank, max(layer.in_features for layer in layers),
                           max(layer.out_features for layer in layers))
    for layer in layers:
        layer.share(A, B)
