"""The precision of frozen weights, as the reference computes it."""
from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


@torch.no_grad()
def round_frozen(backbone: nn.Module, precision: str) -> None:
    """Rounds the frozen linear layers and embeddings of a backbone to bfloat16 for `bf16`; all sums stay float32.

    `fp32` and `bf16x3` (a fast way of computing float32) change nothing. Trained parameters are never rounded.
    """
    if precision != "bf16":
        return
    # Rounded and stored as float32 again: the numbers of a bfloat16 model, without its faster matmuls.
    for module in backbone.modules():
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding):
            for p in module.parameters(recurse=False):
                if not p.requires_grad:
                    p.copy_(p.bfloat16().float())
