"""Relational KD (Park et al. 2019): the student learns the distances and angles among the teacher's pooled states.

    objective = relational_objective(logits, pooled_states(teacher, batches), alpha=0.5, label_smoothing=0.0)
    fit(Pooled(student), data, objective, options)
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_utils import Batch
from distillation.heads import Outputs
from distillation.labels import hidden_states
from distillation.soft_losses import mixed
from model import DistilRNN, TextClassifier
from train_utils import Objective

RKD_WEIGHTS = 1.0, 2.0  # of distances and of angles: the paper's RKD-DA


def relations(student_states: Tensor, teacher_states: Tensor) -> Tensor:
    """Computes the difference (Huber's) of distances and of angles among the pooled states of a batch.

    Park et al. 2019, "Relational Knowledge Distillation", equations 5 to 10: distances are divided by their mean, angles are
    cosines at the middle one of three sentences. The widths may differ. A batch of one sentence has no relations: 0.

    Args:
        student_states: (B, H); teacher_states: (B, C), no gradient flows into them.
    """
    # The classifier's gradient is zero then, and not missing.
    if len(student_states) < 2:
        return 0.0 * student_states.sum()
    found = [(_distances(states), _angles(states)) for states in (student_states, teacher_states.detach())]
    return sum(weight * F.smooth_l1_loss(ours, theirs) for weight, ours, theirs in zip(RKD_WEIGHTS, *found, strict=True))


def _distances(states: Tensor) -> Tensor:  # (B, D) -> (B, B)
    """Returns the distance of each pair over the mean distance of different sentences."""
    # The root has no gradient at zero, where a sentence meets itself or its double.
    squares = (states[:, None] - states[None]).square().sum(-1)
    distances = squares.clamp(min=1e-12).sqrt() * (squares > 0)
    others = distances[distances > 0]
    return distances / others.mean() if len(others) else distances


def _angles(states: Tensor) -> Tensor:  # (B, D) -> (B, B, B)
    """Returns the cosine between the directions to two sentences from a third."""
    # The cosines of all pairs are one matmul of unit vectors for each third sentence.
    directions = F.normalize(states[None] - states[:, None], dim=-1)  # (from, to, D)
    return directions @ directions.transpose(1, 2)


def relational(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, alpha: float,
               label_smoothing: float, student_states: Tensor, teacher_states: Tensor) -> Tensor:
    """Computes alpha `relations` + (1 - alpha) CE: states alone teach, and no logits."""
    return mixed(relations(student_states, teacher_states), student_logits, labels, alpha, label_smoothing)


def relational_objective(teacher_logits: Tensor, teacher_states: Tensor, alpha: float, label_smoothing: float) -> Objective:
    """Returns the objective of `rkd`, of a `Pooled` student.

    Args:
        teacher_states: (N, C) pooled, of the training rows.
    """
    return lambda outputs, batch: relational(outputs.logits, teacher_logits[batch.rows], batch.labels, 1.0, alpha,
                                             label_smoothing, outputs.pooled, teacher_states[batch.rows])


class Pooled(nn.Module):
    """A student that returns its pooled states too; in evaluation the student alone."""

    def __init__(self, student: DistilRNN):
        super().__init__()
        self.student = student

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Outputs | Tensor:
        if not self.training:
            return self.student(input_ids, attention_mask)
        # The pooled states are the input of the last layer.
        found = []
        hook = self.student.classifier.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
        try:
            logits = self.student(input_ids, attention_mask)
        finally:
            hook.remove()
        return Outputs(logits, pooled=found[0])


def pooled_states(teacher: TextClassifier, batches: list[Batch]) -> Tensor:
    """Computes the last hidden state (N, C) of each row: of its last token for a decoder, of its first for an encoder.

    Raises:
        UserError: see `hidden_states`.
    """
    # The batches are in random order: the states are put back in the order of the rows.
    found = {}
    for batch in batches:
        states = hidden_states(teacher, batch.to(next(teacher.parameters()).device)).cpu()
        # The states of a batch's sentences stand one after the other.
        ends = batch.attention_mask.sum(1).cumsum(0).cpu()
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        found.update(zip(batch.rows.tolist(), states[ends - 1 if teacher.decoder else starts], strict=True))
    return torch.stack([found[row] for row in range(len(found))])
