"""The losses of training and distillation, one formula in one function each.

An objective maps (what the model returned, the batch) to the batch's mean loss; `train_utils.fit` minimises it.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from data_utils import Batch

if TYPE_CHECKING:
    from distillation.teachers import HiddenStates

Objective = Callable[[Tensor, Batch], Tensor]


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, alpha: float,
            label_smoothing: float = 0.0) -> Tensor:
    """Computes alpha T² KL(softmax(teacher / T) ‖ softmax(student / T)) + (1 - alpha) CE.

    Hinton et al. 2015, section 2: gradients of the soft part shrink with 1 / T², hence the T². KL is
    averaged over the batch.

    Args:
        student_logits: (B, labels).
        teacher_logits: (B, labels); no gradient flows there.
        labels: (B,).
        temperature: T.
        alpha: weight of the soft part, 0 to 1.
    """
    soft = F.kl_div(F.log_softmax(student_logits / temperature, -1),
                    F.log_softmax(teacher_logits.detach() / temperature, -1), reduction="batchmean", log_target=True)
    hard = F.cross_entropy(student_logits, labels, label_smoothing=label_smoothing)
    return alpha * temperature ** 2 * soft + (1 - alpha) * hard


def logit_mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Computes the mean squared difference of logits (B, labels), over sentences and classes.

    Ba and Caruana 2014, "Do Deep Nets Really Need to be Deep?", equation 1 (there without the mean over classes).
    """
    return F.mse_loss(student_logits, teacher_logits.detach())


def hidden_mse(student_states: Tensor, teacher_states: Tensor, weights: Tensor) -> Tensor:
    """Computes the weighted squared difference of hidden states (tokens, d): sum over dimensions, mean over real tokens.

    Romero et al. 2015, "FitNets", equation 3 (there without weights): the student's states come through a projection.

    Args:
        weights: (d,) of the dimensions.
    """
    return ((student_states - teacher_states.detach()).square() @ weights).mean()


# ---------------------------------------------------------------- objectives

def cross_entropy(label_smoothing: float = 0.0) -> Objective:
    """Returns the loss of training without a teacher."""
    return lambda logits, batch: F.cross_entropy(logits, batch.labels, label_smoothing=label_smoothing)


def distillation(teacher_logits: Tensor, temperature: float, alpha: float, label_smoothing: float = 0.0,
                 kind: str = "kl") -> Objective:
    """Returns the objective of training under a teacher, whose logits (N, labels) by row were computed once.

    Args:
        kind: of the teacher's part: `kl` (`kd_loss`), `mse` (`logit_mse`), or `hard`: the cross-entropy with the class
            that the teacher chooses, which is all that a teacher without logits could give.
    """
    def objective(logits: Tensor, batch: Batch) -> Tensor:
        teacher = teacher_logits[batch.rows]
        if kind == "kl":
            return kd_loss(logits, teacher, batch.labels, temperature, alpha, label_smoothing)
        soft = logit_mse(logits, teacher) if kind == "mse" else F.cross_entropy(logits, teacher.argmax(-1))
        return alpha * soft + (1 - alpha) * F.cross_entropy(logits, batch.labels, label_smoothing=label_smoothing)
    return objective


def transfer(soft: Objective, gold: Objective, unlabelled: int, hidden: HiddenStates | None = None) -> Objective:
    """Returns the objective of the transfer set: the mean of each row's own loss, and `hidden_mse` beside it.

    Args:
        soft: of the rows without a gold label.
        gold: of the rows with one.
        unlabelled: how many rows have none; they come first.
        hidden: the teacher's hidden states of every row; None: not matched, and the model returns bare logits.
    """
    def objective(outputs, batch: Batch) -> Tensor:
        logits = outputs if hidden is None else outputs.logits
        loss, known = logits.new_zeros(()), batch.rows >= unlabelled
        for one, chosen in ((soft, ~known), (gold, known)):
            if bool(chosen.any()):
                part = replace(batch, labels=batch.labels[chosen], rows=batch.rows[chosen])
                loss = loss + one(logits[chosen], part) * chosen.float().mean()
        return loss if hidden is None else loss + matched(outputs.matched, batch, hidden)
    return objective


def pretraining(hidden: HiddenStates | None, lm_weight: float) -> Objective:
    """Returns lm_weight x the language model's loss + `hidden_mse`, where the model returns these."""
    def objective(outputs, batch: Batch) -> Tensor:
        loss = 0.0 if outputs.language is None else lm_weight * outputs.language
        return loss if hidden is None else loss + matched(outputs.matched, batch, hidden)
    return objective


def matched(projected: Tensor, batch: Batch, hidden: HiddenStates) -> Tensor:
    """Computes `hidden_mse` over the sentences of a batch whose hidden states are known: the first rows of the set.

    Args:
        projected: (real tokens, d) of the whole batch, row by row.
    """
    there = (batch.rows < len(hidden)).cpu()
    if not bool(there.any()):
        return 0.0 * projected.sum()
    tokens = there.repeat_interleave(batch.attention_mask.sum(1))
    targets, weights = hidden.of(batch.rows.cpu()[there]), hidden.weights
    return hidden_mse(projected[tokens.to(projected.device)], *(t.to(projected.device) for t in (targets, weights)))
