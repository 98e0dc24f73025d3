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
from distillation.teachers import HiddenStates
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


def logit_mse(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, alpha: float,
              label_smoothing: float = 0.0) -> Tensor:
    """Computes alpha mean((student - teacher)²) + (1 - alpha) CE; the mean is over sentences and classes.

    Ba and Caruana 2014, "Do Deep Nets Really Need to be Deep?", equation 1 (there without the mean over classes). Shapes as
    in `kd_loss`; logits have no temperature.
    """
    # Detached, here and below: the teacher is not trained.
    soft = F.mse_loss(student_logits, teacher_logits.detach())
    return alpha * soft + (1 - alpha) * F.cross_entropy(student_logits, labels, label_smoothing=label_smoothing)


def hard_labels(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, alpha: float,
                label_smoothing: float = 0.0) -> Tensor:
    """Computes alpha CE(student, argmax(teacher)) + (1 - alpha) CE: all that a teacher without logits can give.

    Shapes as in `kd_loss`; a class alone has no temperature.
    """
    soft = F.cross_entropy(student_logits, teacher_logits.argmax(-1))
    return alpha * soft + (1 - alpha) * F.cross_entropy(student_logits, labels, label_smoothing=label_smoothing)


# The choices of --kd-loss.
LOSSES: dict[str, Callable[..., Tensor]] = {"kl": kd_loss, "mse": logit_mse, "hard": hard_labels}


def hidden_mse(student_states: Tensor, teacher_states: Tensor, weights: Tensor) -> Tensor:
    """Computes the weighted squared difference of hidden states (tokens, d): sum over dimensions, mean over real tokens.

    Romero et al. 2015, "FitNets", equation 3 (there without weights): the student's states come through a projection.

    Args:
        weights: (d,) of the dimensions.
    """
    return ((student_states - teacher_states.detach()).square() @ weights).mean()


# ---------------------------------------------------------------- objectives

def share_of_step(batch: Batch, count: Callable[[Batch], int]) -> float:
    """Returns the factor that turns a batch's weight by rows in an optimiser step into its weight by tokens.

    `train_utils.fit` weighs each batch of a step by its rows. A mean over tokens has to be weighed by tokens, or several
    batches would train something else than one large batch. The factor is 1 for a batch that is a whole step.

    Args:
        count: returns the number of tokens of a batch in the mean.
    """
    step = batch.step or [batch]
    tokens, rows = sum(map(count, step)), sum(len(one.rows) for one in step)
    # No token in the whole step: the mean is 0, whatever its weight.
    return (count(batch) / tokens if tokens else 0.0) / (len(batch.rows) / rows)


def neighbours(batch: Batch) -> int:
    """Returns the number of pairs of neighbouring tokens: the predictions of a language model in one direction."""
    return int(batch.attention_mask[:, 1:].sum())


def kd_objective(teacher_logits: Tensor, temperature: float, alpha: float, label_smoothing: float = 0.0,
                 loss: str = "kl") -> Objective:
    """Returns the objective of training under a teacher.

    Args:
        teacher_logits: (N, labels) of the training rows, computed once.
        loss: a name in LOSSES.
    """
    # Looked up here: an unknown name fails before the first step.
    compute = LOSSES[loss]
    return lambda logits, batch: compute(logits, teacher_logits[batch.rows], batch.labels, temperature, alpha,
                                         label_smoothing)


def transfer_objective(soft: Objective, gold: Objective, unlabelled: int, hidden: HiddenStates | None = None) -> Objective:
    """Returns the objective of the transfer set: the mean of each row's own loss, plus `hidden_mse`.

    Args:
        soft: objective of the rows without a gold label.
        gold: objective of the rows with one.
        unlabelled: number of rows without a gold label; they come first.
        hidden: the teacher's hidden states of every row; None: not matched, and the model returns bare logits.
    """
    def objective(outputs, batch: Batch) -> Tensor:
        logits = outputs if hidden is None else outputs.logits
        loss, has_gold = logits.new_zeros(()), batch.rows >= unlabelled
        for one, chosen in ((soft, ~has_gold), (gold, has_gold)):
            if bool(chosen.any()):
                part = replace(batch, labels=batch.labels[chosen], rows=batch.rows[chosen])
                # Weighted by the share of the rows, so that every row of the batch counts alike.
                loss = loss + one(logits[chosen], part) * chosen.float().mean()
        return loss if hidden is None else loss + match_hidden(outputs.matched, batch, hidden)
    return objective


def pretraining_objective(hidden: HiddenStates | None, lm_weight: float) -> Objective:
    """Returns the objective lm_weight x the language model's loss + `hidden_mse`; a model may return one of them alone."""
    def objective(outputs, batch: Batch) -> Tensor:
        # Without a language model the hidden states are matched alone.
        loss = 0.0
        if outputs.language is not None:
            loss = lm_weight * outputs.language * share_of_step(batch, neighbours)
        return loss if hidden is None else loss + match_hidden(outputs.matched, batch, hidden)
    return objective


def match_hidden(projected: Tensor, batch: Batch, hidden: HiddenStates) -> Tensor:
    """Computes a batch's part of `hidden_mse` over the sentences with a teacher's hidden states: the first rows of the set.

    Args:
        projected: (real tokens, d) of the whole batch, row by row.
    """
    known = _matched_rows(batch, hidden)
    # Plain text has no hidden states. The projection still gets a gradient, of zeros, as in every other step.
    if not bool(known.any()):
        return 0.0 * projected.sum()
    # From sentences to their real tokens, which the model returns row by row.
    tokens = known.repeat_interleave(batch.attention_mask.sum(1))
    targets = hidden.of(batch.rows.cpu()[known])
    loss = hidden_mse(projected[tokens.to(projected.device)], targets.to(projected.device),
                      hidden.weights.to(projected.device))
    # Each token of the step counts alike, in a batch of long sentences as in one of short ones.
    return loss * share_of_step(batch, lambda one: int(one.attention_mask[_matched_rows(one, hidden)].sum()))


def _matched_rows(batch: Batch, hidden: HiddenStates) -> Tensor:
    # On the CPU, like the mask: the choice of tokens must not be delayed by the GPU.
    return (batch.rows < len(hidden)).cpu()
