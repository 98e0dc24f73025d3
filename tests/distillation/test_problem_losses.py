"""KD of several labels and of numbers against their formulas in NumPy float64."""
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distillation.losses import kd_objective, loss_of
from distillation.problem_losses import bernoulli_kl, label_logit_mse, number_mse
from machine.errors import UserError
from metrics.problems import PROBLEMS

LOGITS = st.lists(st.tuples(*[st.floats(-20, 20)] * 4), min_size=1, max_size=6)
MULTI, NUMBER = PROBLEMS["multi-label"], PROBLEMS["regression"]


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x)))


def bce(logits: np.ndarray, labels: np.ndarray) -> float:
    return -(labels * log_sigmoid(logits) + (1 - labels) * log_sigmoid(-logits)).mean()


def of(rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student and teacher logits (B, 2) and labels (B, 2) of rows of four numbers."""
    both = torch.tensor(rows, dtype=torch.float64)
    return both[:, :2], both[:, 2:], (both[:, 1:3] > 0).double()


@given(rows=LOGITS, temperature=st.floats(0.5, 10), alpha=st.floats(0, 1))
def test_several_labels_are_as_many_coins(rows, temperature, alpha):
    student, teacher, labels = of(rows)
    s, t = student.numpy() / temperature, teacher.numpy() / temperature
    p = np.exp(log_sigmoid(t))
    kl = (p * (log_sigmoid(t) - log_sigmoid(s)) + (1 - p) * (log_sigmoid(-t) - log_sigmoid(-s))).mean()
    expected = alpha * temperature ** 2 * kl + (1 - alpha) * bce(student.numpy(), labels.numpy())
    assert bernoulli_kl(student, teacher, labels, temperature, alpha).item() == pytest.approx(expected, rel=1e-7, abs=1e-7)
    expected = alpha * ((student - teacher) ** 2).mean() + (1 - alpha) * bce(student.numpy(), labels.numpy())
    assert label_logit_mse(student, teacher, labels, temperature, alpha).item() == pytest.approx(float(expected))


def test_the_gradient_is_that_of_soft_targets_and_none_reaches_the_teacher():
    student, teacher, labels = of([(0.5, -1.0, 2.0, 0.3), (1.0, 2.0, -3.0, 0.1)])
    student, teacher = (logits.clone().requires_grad_() for logits in (student, teacher))
    bernoulli_kl(student, teacher, labels, 1.0, 1.0).backward()
    expected = (student.detach().sigmoid() - teacher.detach().sigmoid()) / student.numel()
    torch.testing.assert_close(student.grad, expected)
    assert teacher.grad is None


@given(rows=LOGITS, alpha=st.floats(0, 1))
def test_numbers_are_matched_by_their_squares(rows, alpha):
    student, teacher, _ = of(rows)
    student, teacher, labels = student[:, :1], teacher[:, :1], teacher[:, 1]
    s, t, y = (values.numpy().reshape(-1) for values in (student, teacher, labels))
    expected = alpha * ((s - t) ** 2).mean() + (1 - alpha) * ((s - y) ** 2).mean()
    assert number_mse(student, teacher, labels, 4.0, alpha).item() == pytest.approx(expected)


def test_each_problem_has_its_losses_and_others_are_refused():
    assert loss_of("kl", MULTI) is bernoulli_kl and loss_of("kl", NUMBER) is loss_of("mse", NUMBER) is number_mse
    with pytest.raises(UserError, match="--kd-loss dkd: not for a multi-label problem; expected one of kl, mse"):
        kd_objective(torch.zeros(2, 2), 1.0, 0.5, loss="dkd", problem=MULTI)
