"""Other distances between a teacher's and a student's answers; losses.py has the KL and the choice among them all.

    decoupled(student_logits, teacher_logits, labels, temperature=4.0, alpha=0.9, weight=8.0)

Every one is alpha times a soft part, plus (1 - alpha) CE with the gold labels. T² keeps the gradient of a soft part of
softmaxes at temperature T as large as at 1, as in `losses.kd_loss`. Shapes: logits (B, labels), labels (B,).
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from options.schema import DistilOptions

EPS = 1e-12  # of a constant row or column, which correlates with nothing


def mixed(soft: Tensor, student_logits: Tensor, labels: Tensor, alpha: float, label_smoothing: float) -> Tensor:
    """Computes alpha soft + (1 - alpha) CE."""
    return alpha * soft + (1 - alpha) * F.cross_entropy(student_logits, labels, label_smoothing=label_smoothing)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Computes KL(p ‖ q) of logarithms (B, labels), averaged over the batch."""
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def log_softmaxes(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Returns log softmax(logits / T) of student and teacher; no gradient flows into the teacher."""
    return F.log_softmax(student_logits / temperature, -1), F.log_softmax(teacher_logits.detach() / temperature, -1)


def logit_mse(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, alpha: float,
              label_smoothing: float = 0.0) -> Tensor:
    """Computes alpha mean((student - teacher)²) + (1 - alpha) CE; the mean is over sentences and classes.

    Ba and Caruana 2014, "Do Deep Nets Really Need to be Deep?", equation 1 (there without the mean over classes). Shapes as
    in `losses.kd_loss`; logits have no temperature.
    """
    # Detached: the teacher is not trained.
    return mixed(F.mse_loss(student_logits, teacher_logits.detach()), student_logits, labels, alpha, label_smoothing)


def hard_labels(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, alpha: float,
                label_smoothing: float = 0.0) -> Tensor:
    """Computes alpha CE(student, argmax(teacher)) + (1 - alpha) CE: all that a teacher without logits can give.

    Shapes as in `losses.kd_loss`; a class alone has no temperature.
    """
    return mixed(F.cross_entropy(student_logits, teacher_logits.argmax(-1)), student_logits, labels, alpha, label_smoothing)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, alpha: float,
               label_smoothing: float = 0.0) -> Tensor:
    """Computes alpha T² KL(student ‖ teacher) + (1 - alpha) CE: the student is not asked to cover all of the teacher.

    Gu et al. 2024, "MiniLLM", equation 1, for a single choice instead of a text.
    """
    # The student first: it pays where the teacher gives nothing, and not where it misses one of the teacher's answers.
    log_q, log_p = log_softmaxes(student_logits, teacher_logits, temperature)
    return mixed(temperature ** 2 * kl(log_q, log_p), student_logits, labels, alpha, label_smoothing)


def jensen_shannon(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, alpha: float,
                   label_smoothing: float = 0.0, weight: float = 0.5) -> Tensor:
    """Computes alpha T² (w KL(p ‖ m) + (1 - w) KL(q ‖ m)) + (1 - alpha) CE, m = w p + (1 - w) q, p the teacher.

    Agarwal et al. 2024, "On-Policy Distillation of Language Models", equation 1. Near w = 0 it behaves as KL(p ‖ q), near
    w = 1 as KL(q ‖ p), each times a factor that vanishes.

    Args:
        weight: w, between 0 and 1.
    """
    log_q, log_p = log_softmaxes(student_logits, teacher_logits, temperature)
    w = torch.tensor(weight, dtype=log_p.dtype, device=log_p.device)
    # The logarithm of the mixture, without leaving logarithms.
    log_m = torch.logaddexp(log_p + w.log(), log_q + (1 - w).log())
    soft = w * kl(log_p, log_m) + (1 - w) * kl(log_q, log_m)
    return mixed(temperature ** 2 * soft, student_logits, labels, alpha, label_smoothing)


def decoupled(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, alpha: float,
              label_smoothing: float = 0.0, weight: float = 8.0) -> Tensor:
    """Computes alpha T² (KL of (target, rest) + w KL among the rest) + (1 - alpha) CE.

    Zhao et al. 2022, "Decoupled Knowledge Distillation", equation 7, with their alpha at 1. Plain KD weighs the second part
    by the teacher's doubt about the target. For two classes the rest is one class: the second part is 0 for any w, the first
    one is all of KL, and the loss is `kd_loss`'s.

    Args:
        labels: the targets: gold labels, or the teacher's choice where there is none.
        weight: w of the classes other than the target.
    """
    log_q, log_p = log_softmaxes(student_logits, teacher_logits, temperature)
    # The classes other than the target, of each sentence.
    rest = ~F.one_hot(labels, log_p.shape[1]).bool()

    def parts(log: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (log target, log rest), (B, 2), and the logarithms among the rest, (B, labels - 1)."""
        others = log[rest].view(len(log), -1)
        return torch.stack([log[~rest], others.logsumexp(-1)], -1), others.log_softmax(-1)

    (target_q, others_q), (target_p, others_p) = parts(log_q), parts(log_p)
    soft = kl(target_p, target_q) + weight * kl(others_p, others_q)
    return mixed(temperature ** 2 * soft, student_logits, labels, alpha, label_smoothing)


def correlation(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """Returns Pearson's correlation along a dimension."""
    # Centred, or it would be the cosine.
    x, y = x - x.mean(dim, keepdim=True), y - y.mean(dim, keepdim=True)
    return (x * y).sum(dim) / (x.norm(dim=dim) * y.norm(dim=dim)).clamp(min=EPS)


def dist(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, alpha: float,
         label_smoothing: float = 0.0) -> Tensor:
    """Computes alpha T² (mean over rows (1 - rho) + mean over classes (1 - rho)) + (1 - alpha) CE, rho Pearson's.

    Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher", equations 8 to 11, both weights 1: relations between
    the classes of a sentence, and between the sentences of a batch for each class. Rows of two classes correlate by 1 or -1
    whatever their size: their part has no gradient and is left out. The columns of two classes mirror each other: what is
    left is one correlation of the batch's probabilities.
    """
    q, p = (log.exp() for log in log_softmaxes(student_logits, teacher_logits, temperature))
    # Over the sentences of the batch first, a correlation for each class; then over the classes of a sentence.
    soft = (1 - correlation(q, p, 0)).mean()
    if q.shape[1] > 2:
        soft = soft + (1 - correlation(q, p, 1)).mean()
    return mixed(temperature ** 2 * soft, student_logits, labels, alpha, label_smoothing)


def weights_of(options: DistilOptions) -> dict[str, float]:
    """Returns the weight inside the chosen loss, for the losses that have one, as an argument of theirs."""
    found = {"js": options.js_weight, "dkd": options.dkd_weight}.get(options.kd_loss)
    return {} if found is None else {"weight": found}
