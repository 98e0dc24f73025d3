"""The KD losses of other problems than one class of several: several labels at once, and numbers.

    OTHERS["regression"]["mse"](student_logits, teacher_logits, labels, temperature=1.0, alpha=0.9)

Parameters as those of `losses.kd_loss`.
"""
from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from metrics.problems import PROBLEMS

MULTI_LABEL, REGRESSION = PROBLEMS["multi-label"], PROBLEMS["regression"]


def bernoulli_kl(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, alpha: float,
                 label_smoothing: float = 0.0) -> Tensor:
    """Computes alpha T² mean(KL(sigmoid(teacher / T) ‖ sigmoid(student / T))) + (1 - alpha) BCE, of several labels at once.

    Each label is a coin: KL(p ‖ q) = p log(p / q) + (1 - p) log((1 - p) / (1 - q)), whose gradient is that of the binary
    cross-entropy with the teacher's probabilities as targets. Both means are over sentences and labels. T² as in
    `losses.kd_loss`.

    Args:
        student_logits: (B, labels).
        teacher_logits: (B, labels); no gradient flows into them.
        labels: (B, labels) of 0 and 1.
        temperature: T.
        alpha: weight of the soft part, 0 to 1.
    """
    teacher = teacher_logits.detach() / temperature
    p = teacher.sigmoid()
    # Cross-entropy minus entropy, both from logits: no logarithm of 0.
    soft = (F.binary_cross_entropy_with_logits(student_logits / temperature, p)
            - F.binary_cross_entropy_with_logits(teacher, p))
    hard = MULTI_LABEL.loss(student_logits, labels, label_smoothing)
    return alpha * temperature ** 2 * soft + (1 - alpha) * hard


def label_logit_mse(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, alpha: float,
                    label_smoothing: float = 0.0) -> Tensor:
    """Computes alpha mean((student - teacher)²) + (1 - alpha) BCE, of several labels at once; shapes as `bernoulli_kl`."""
    # Detached: the teacher is not trained.
    soft = F.mse_loss(student_logits, teacher_logits.detach())
    return alpha * soft + (1 - alpha) * MULTI_LABEL.loss(student_logits, labels, label_smoothing)


def number_mse(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, alpha: float,
               label_smoothing: float = 0.0) -> Tensor:
    """Computes alpha mean((student - teacher)²) + (1 - alpha) mean((student - label)²), of numbers.

    KL of two normal distributions with one variance is the squared difference of their means, up to a factor: for numbers
    `kl` and `mse` are this loss. A number has no temperature.

    Args:
        student_logits, teacher_logits: (B, 1); no gradient flows into the teacher's.
        labels: (B,).
    """
    soft = F.mse_loss(student_logits, teacher_logits.detach())
    return alpha * soft + (1 - alpha) * REGRESSION.loss(student_logits, labels, label_smoothing)


# Problem -> choice of --kd-loss -> loss.
OTHERS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "multi-label": {"kl": bernoulli_kl, "mse": label_logit_mse}, "regression": {"kl": number_mse, "mse": number_mse}}
