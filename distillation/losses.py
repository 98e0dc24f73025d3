"""The losses of distillation, one formula in one function each.

    LOSSES["kl"](student_logits, teacher_logits, labels, temperature=4.0, alpha=0.9)

A new KD loss is a function with the parameters of `kd_loss` and an entry in LOSSES: its name is a choice of `--kd-loss`.
Below the losses stand the objectives: `train_utils.fit` minimises an objective, a function
(output of the model, batch) -> mean loss of the batch.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from data_utils import Batch
from distillation.annealing import Temperature
from distillation.batching import share_of_step
from distillation.edited import Marks
from distillation.problem_losses import OTHERS
from distillation.relations import relational
from distillation.soft_losses import decoupled, dist, hard_labels, jensen_shannon, logit_mse, reverse_kl
from distillation.teachers import HiddenStates
from machine.errors import UserError
from metrics.problems import SINGLE_LABEL, Problem
from train_utils import Objective


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, alpha: float,
            label_smoothing: float = 0.0) -> Tensor:
    """Computes alpha T² KL(softmax(teacher / T) ‖ softmax(student / T)) + (1 - alpha) CE.

    Hinton et al. 2015, section 2: the gradient of the soft part shrinks with 1 / T², hence the T². KL is averaged over the
    batch.

    Args:
        student_logits: (B, labels).
        teacher_logits: (B, labels); no gradient flows into them.
        labels: (B,).
        temperature: T.
        alpha: weight of the soft part, 0 to 1.
        label_smoothing: of CE.
    """
    # "batchmean", not "mean": the sum over classes belongs to KL, and only the batch is averaged.
    soft = F.kl_div(F.log_softmax(student_logits / temperature, -1),
                    F.log_softmax(teacher_logits.detach() / temperature, -1), reduction="batchmean", log_target=True)
    hard = F.cross_entropy(student_logits, labels, label_smoothing=label_smoothing)
    return alpha * temperature ** 2 * soft + (1 - alpha) * hard


# The choices of --kd-loss. `rkd` compares pooled states instead of logits (POOLED). Other problems than one class of several
# have theirs in problem_losses.py.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "kl": kd_loss, "mse": logit_mse, "hard": hard_labels, "reverse-kl": reverse_kl, "js": jensen_shannon, "dkd": decoupled,
    "dist": dist, "rkd": relational}
POOLED = ("rkd",)


def loss_of(name: str, problem: Problem = SINGLE_LABEL) -> Callable[..., Tensor]:
    """Returns the loss that a choice of --kd-loss is for a problem.

    Raises:
        UserError: the problem has no such loss.
    """
    losses = OTHERS.get(problem.name, LOSSES)
    if name not in losses:
        raise UserError(f"--kd-loss {name}: not for a {problem.name} problem; expected one of {', '.join(losses)}")
    return losses[name]


def hidden_mse(student_states: Tensor, teacher_states: Tensor, weights: Tensor) -> Tensor:
    """Computes the weighted squared difference of hidden states (tokens, d): sum over dimensions, mean over real tokens.

    Romero et al. 2015, "FitNets", equation 3 (there without weights): the student's states come through a projection.

    Args:
        weights: (d,) of the dimensions.
    """
    return ((student_states - teacher_states.detach()).square() @ weights).mean()


def edit_bce(logits: Tensor, touched: Tensor) -> Tensor:
    """Computes the binary cross-entropy of "an edit touched this token" (tokens,), averaged over real tokens.

    Clark et al. 2020, "ELECTRA", section 2: the discriminator's loss (there the sum over tokens, and replaced tokens).

    Args:
        touched: (tokens,) 1 for a touched token, 0 for another one.
    """
    # In the type of the logits: PyTorch would compute in that of the targets.
    return F.binary_cross_entropy_with_logits(logits, touched.to(logits.dtype))


# ---------------------------------------------------------------- objectives

def kd_objective(teacher_logits: Tensor, temperature: float | Temperature, alpha: float, label_smoothing: float = 0.0,
                 loss: str = "kl", problem: Problem = SINGLE_LABEL, **weights: float) -> Objective:
    """Returns the objective of training under a teacher.

    Args:
        teacher_logits: (N, labels) of the training rows, computed once.
        loss: a name in LOSSES.
        weights: see `soft_losses.weights_of`.
    """
    # Looked up here: an unknown name fails before the first step.
    compute = loss_of(loss, problem)
    return lambda logits, batch: compute(logits, teacher_logits[batch.rows], batch.labels, float(temperature), alpha,
                                         label_smoothing, **weights)


def transfer_objective(soft: Objective | None, gold: Objective, unlabelled: int, hidden: HiddenStates | None = None,
                       edits: Marks | None = None, edit_weight: float = 1.0) -> Objective:
    """Returns the objective of the transfer set: the mean of each row's own loss, plus `hidden_mse`, plus `edit_bce`.

    Args:
        soft: objective of the rows without a gold label; None: their classes teach nothing.
        gold: objective of the rows with one.
        unlabelled: number of rows without a gold label; they come first.
        hidden: the teacher's hidden states of every row; None: not matched.
        edits: the marks of every row; None: no token is asked about. With neither the model returns bare logits.
        edit_weight: weight of `edit_bce`.
    """
    def objective(outputs, batch: Batch) -> Tensor:
        logits = outputs if hidden is None and edits is None else outputs.logits
        # Without soft labels a batch may teach no class. The classifier still gets a gradient, of zeros.
        loss = logits.new_zeros(()) if soft is not None else 0.0 * logits.sum()
        has_gold = batch.rows >= unlabelled
        for one, chosen in ((soft, ~has_gold), (gold, has_gold)):
            if one is not None and bool(chosen.any()):
                part = replace(batch, labels=batch.labels[chosen], rows=batch.rows[chosen])
                # Weighted by the share of the rows, so that every row of the batch counts alike.
                loss = loss + one(logits[chosen], part) * chosen.float().mean()
        if edits is not None:
            # Each token of the step counts alike, in a batch of long sentences as in one of short ones.
            asked = edit_bce(outputs.edited, edits.of(batch.rows).to(logits.device))
            loss = loss + edit_weight * (asked * share_of_step(batch, lambda one: one.tokens))
        return loss if hidden is None else loss + match_hidden(outputs.matched, batch, hidden)
    return objective


def match_hidden(projected: Tensor, batch: Batch, hidden: HiddenStates) -> Tensor:
    """Computes a batch's part of `hidden_mse` over the sentences with a teacher's hidden states: the first rows of the set.

    Args:
        projected: (real tokens, d) of the whole batch, row by row.
    """
    def known_rows(one: Batch) -> Tensor:
        # On the CPU, like the mask: the choice of tokens must not be delayed by the GPU.
        return (one.rows < len(hidden)).cpu()

    known = known_rows(batch)
    # Plain text has no hidden states. The projection still gets a gradient, of zeros, as in every other step.
    if not bool(known.any()):
        return 0.0 * projected.sum()
    # From sentences to their real tokens, which the model returns row by row.
    tokens = known.repeat_interleave(batch.attention_mask.sum(1))
    targets = hidden.of(batch.rows.cpu()[known])
    loss = hidden_mse(projected[tokens.to(projected.device)], targets.to(projected.device),
                      hidden.weights.to(projected.device))
    # Each token of the step counts alike, in a batch of long sentences as in one of short ones.
    return loss * share_of_step(batch, lambda one: int(one.attention_mask[known_rows(one)].sum()))
