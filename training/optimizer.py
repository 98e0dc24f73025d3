"""The optimiser and the schedule of its learning rate.

    optimizer = make_optimizer(model, TrainOptions(seed=1, lr=4e-4))
    lr_factor(0, total=100, warmup=0.06, schedule="linear")
"""
from __future__ import annotations

import math

import torch
from torch import nn

from options.schema import TrainOptions
from training.checkpoints import trainable


def lr_factor(step: int, total: int, warmup: float, schedule: str) -> float:
    """Returns the share of the peak learning rate at optimiser step `step` of `total`: linear warm-up, then decay to 0.

    Args:
        step: from 0.
        total: optimiser steps of the whole training.
        warmup: share of the steps in which the rate rises.
        schedule: linear, cosine or constant.
    """
    rising = math.ceil(warmup * total)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, total - rising)
    return {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[schedule]


def make_optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    """Makes AdamW (Loshchilov and Hutter 2019), without decay on vectors (biases, norms).

    The task head has a rate of its own, if one is given.
    """
    head = (*(f"net.{name}." for name in model.head_names()), "feature_head.") if hasattr(model, "head_names") else ()
    # One group for each rate and decay: AdamW updates a group in one fused step.
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in trainable(model).items():
        lr = options.head_lr if options.head_lr is not None and name.startswith(head or " ") else options.lr
        # LoRA+ gives each B a multiple of the rate.
        lr *= getattr(p, "lr_ratio", 1.0)
        groups.setdefault((lr, options.weight_decay if p.ndim > 1 else 0.0), []).append(p)
    return torch.optim.AdamW([{"params": params, "lr": lr, "peak": lr, "weight_decay": decay}
                              for (lr, decay), params in groups.items()], fused=True)
