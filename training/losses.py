"""Losses for skewed classes: weights of the classes, and the focal loss.

    classification_loss(TrainOptions(seed=1, class_weights="balanced"), labels, ("0", "1"))(logits, batch)

Every loss is a sum over the rows of a batch divided by their number, so that several batches of a step equal one large one.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from data.splits import Label
from data_utils import Batch, label_array
from machine.errors import UserError
from metrics.problems import SINGLE_LABEL, Problem
from options.schema import TrainOptions


def class_weights(text: str, labels: list[int], classes: int) -> Tensor | None:
    """Returns the weights (classes,) that --class-weights asks for; None for `none`.

    Balanced: rows / (classes * rows of the class), as scikit-learn's `compute_class_weight`. Their mean over the rows is 1.

    Args:
        labels: of the training rows.

    Raises:
        UserError: not a number for each class, or balanced weights of a class without rows.
    """
    if text == "none":
        return None
    if text == "balanced":
        counts = torch.bincount(torch.from_numpy(label_array(labels)), minlength=classes)
        if not bool(counts.all()):
            raise UserError(f"--class-weights balanced: class number {int(counts.argmin())} has no training row")
        return len(labels) / (classes * counts.float())
    values = text.split(",")
    if len(values) != classes:
        raise UserError(f"--class-weights {text}: {len(values)} weights for {classes} classes")
    return torch.tensor([float(value) for value in values])


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None, label_smoothing: float = 0.0) -> Tensor:
    """Computes mean(w_label * CE) over the rows, (B, classes), (B,) -> (); w as `class_weights` returns it."""
    rows = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    return (rows if weights is None else rows * weights.to(rows)[labels]).mean()


def focal(logits: Tensor, labels: Tensor, weights: Tensor | None, gamma: float) -> Tensor:
    """Computes mean(-w_label (1 - p)^gamma log p), p the probability of the label: rows that are easy count less.

    Lin et al. 2017, "Focal Loss for Dense Object Detection", equations 4 and 5. Gamma 0 is the cross-entropy.
    """
    log_p = F.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]
    rows = -(1 - log_p.exp()) ** gamma * log_p
    return (rows if weights is None else rows * weights.to(rows)[labels]).mean()


def classification_loss(options: TrainOptions, labels: list[Label], classes: int, problem: Problem = SINGLE_LABEL
                        ) -> Callable[[Tensor, Batch], Tensor] | None:
    """Returns the loss of --loss and --class-weights; None for the problem's plain loss.

    Raises:
        UserError: see `class_weights`, a smoothed focal loss, or an option of classes for another problem.
    """
    problem.check("--loss focal", options.loss == "focal")
    problem.check("--class-weights", options.class_weights != "none")
    problem.check("--label-smoothing", options.label_smoothing > 0)
    weights = class_weights(options.class_weights, labels, classes)
    if options.loss == "focal":
        if options.label_smoothing:
            raise UserError("--label-smoothing: not with --loss focal, which needs one label a row")
        return lambda logits, batch: focal(logits, batch.labels, weights, options.focal_gamma)
    if weights is None:
        return None
    return lambda logits, batch: weighted_cross_entropy(logits, batch.labels, weights, options.label_smoothing)
