"""The student's losses against their formulas in NumPy float64."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import VOCAB
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_training import toy_batches

from data_utils import Batch
from distillation import losses
from distillation.edited import mark_edits
from distillation.heads import Outputs
from distillation.losses import LOSSES, kd_loss, kd_objective
from distillation.teachers import HiddenStates
from experiments.parser import Parser

FAST = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LOGITS = st.lists(st.tuples(*[st.floats(-30, 30, width=32)] * 6), min_size=1, max_size=8)


def drawn(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(lengths: list[int], rows: list[int], labels: list[int]) -> Batch:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return Batch(torch.randint(0, VOCAB, mask.shape), mask, torch.tensor(labels), torch.tensor(rows), sum(lengths))


# ---------------------------------------------------------------- the KD losses

def kd_in_numpy(student, teacher, labels, temperature, alpha) -> float:
    """alpha T² KL(softmax(teacher / T) ‖ softmax(student / T)) + (1 - alpha) CE, written out in float64."""
    def log_softmax(x):
        x = x - x.max(1, keepdims=True)
        return x - np.log(np.exp(x).sum(1, keepdims=True))

    log_p, log_q = (log_softmax(np.asarray(x, dtype=np.float64) / temperature) for x in (teacher, student))
    kl = (np.exp(log_p) * (log_p - log_q)).sum() / len(labels)
    ce = -log_softmax(np.asarray(student, dtype=np.float64))[np.arange(len(labels)), labels].mean()
    return alpha * temperature ** 2 * kl + (1 - alpha) * ce


def as_tensors(rows, dtype=torch.float64):
    """Student and teacher logits (B, 3) and labels (B,) of rows of six numbers."""
    both = torch.tensor(rows, dtype=dtype)
    return both[:, :3], both[:, 3:], torch.arange(len(rows)) % 3


@FAST
@given(rows=LOGITS, temperature=st.floats(0.5, 20), alpha=st.floats(0, 1))
def test_kd_loss_is_the_formula(rows, temperature, alpha):
    student, teacher, labels = as_tensors(rows)
    expected = kd_in_numpy(student.numpy(), teacher.numpy(), labels.numpy(), temperature, alpha)
    assert kd_loss(student, teacher, labels, temperature, alpha).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    in_float32 = kd_loss(student.float(), teacher.float(), labels, temperature, alpha).item()
    assert in_float32 == pytest.approx(expected, rel=1e-4, abs=1e-3)


@settings(FAST, max_examples=30)
@given(rows=st.lists(st.tuples(*[st.floats(-4, 4)] * 6), min_size=1, max_size=4), temperature=st.floats(0.5, 10),
       alpha=st.floats(0, 1))
def test_kd_gradient_is_the_formulas_by_finite_differences(rows, temperature, alpha):
    student, teacher, labels = as_tensors(rows)
    student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    kd_loss(student, teacher, labels, temperature, alpha).backward()
    assert teacher.grad is None  # the teacher is not trained
    step, numeric = 1e-6, np.zeros(student.shape)
    for index in np.ndindex(*student.shape):
        sides = []
        for sign in (1, -1):
            moved = student.detach().numpy().copy()
            moved[index] += sign * step
            sides.append(kd_in_numpy(moved, teacher.detach().numpy(), labels.numpy(), temperature, alpha))
        numeric[index] = (sides[0] - sides[1]) / (2 * step)
    np.testing.assert_allclose(student.grad.numpy(), numeric, rtol=1e-4, atol=1e-6)


def test_kl_runs_from_the_teacher_to_the_student():
    """KL(p‖q) for p = (3/4, 1/4), q = (1/2, 1/2) is ln 2 - H(p); the other direction gives another number."""
    student, teacher = torch.tensor([[0, 0], [math.log(3), 0]], dtype=torch.float64).split(1)
    p_q = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    q_p = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert abs(p_q - q_p) > 0.01
    assert kd_loss(student, teacher, torch.tensor([0]), 1.0, 1.0).item() == pytest.approx(p_q, abs=1e-12)


def test_kd_averages_over_the_batch_not_over_its_entries():
    student, teacher, labels = as_tensors([(1, 2, 3, 3, 1, 0)])
    once = kd_loss(student, teacher, labels, 3.0, 1.0)
    torch.testing.assert_close(kd_loss(student.repeat(5, 1), teacher.repeat(5, 1), labels.repeat(5), 3.0, 1.0), once)


@FAST
@given(rows=LOGITS, temperature=st.floats(0.5, 20))
def test_alpha_0_is_cross_entropy_and_alpha_1_ignores_the_labels(rows, temperature):
    student, teacher, labels = as_tensors(rows)
    torch.testing.assert_close(kd_loss(student, teacher, labels, temperature, 0.0), F.cross_entropy(student, labels))
    assert kd_loss(student, teacher, labels, temperature, 1.0) == kd_loss(student, teacher, 2 - labels, temperature, 1.0)
    same = kd_loss(teacher, teacher, labels, temperature, 1.0).item()
    assert same == pytest.approx(0, abs=1e-9)  # a student that equals its teacher has nothing left to learn


def test_distillation_takes_the_teachers_logits_by_row():
    batch = toy_batches(8, 3)[1]
    teacher, logits = torch.randn(8, 2), torch.randn(len(batch.rows), 2)
    expected = kd_loss(logits, torch.stack([teacher[row] for row in batch.rows.tolist()]), batch.labels, 2.0, 0.7)
    assert kd_objective(teacher, 2.0, 0.7)(logits, batch) == expected
    assert kd_objective(teacher.flip(0), 2.0, 0.7)(logits, batch) != expected


def test_logit_mse_is_its_formula():
    student, teacher, labels = drawn(5, 3), drawn(5, 3, seed=1), torch.tensor([0, 1, 2, 0, 1])
    soft = ((student.double().numpy() - teacher.double().numpy()) ** 2).sum() / 15
    hard = -student.double().log_softmax(-1).numpy()[np.arange(5), labels.numpy()].mean()
    for alpha in (1.0, 0.7, 0.0):
        found = float(losses.logit_mse(student, teacher, labels, 4.0, alpha))
        np.testing.assert_allclose(found, alpha * soft + (1 - alpha) * hard, rtol=1e-6)


def test_hidden_mse_is_its_formula():
    student, teacher, weights = drawn(7, 4), drawn(7, 4, seed=1), drawn(4, seed=2).abs()
    s, t, w = (x.double().numpy() for x in (student, teacher, weights))
    expected = sum(w[j] * (s[i, j] - t[i, j]) ** 2 for i in range(7) for j in range(4)) / 7
    np.testing.assert_allclose(float(losses.hidden_mse(student, teacher, weights)), expected, rtol=1e-6)


def test_no_gradient_reaches_the_teacher():
    teacher = drawn(4, 2).requires_grad_()
    student = drawn(4, 2, seed=1).requires_grad_()
    labels = torch.tensor([0, 1, 1, 0])
    total = sum(loss(student, teacher, labels, 2.0, 0.9) for name, loss in LOSSES.items() if name not in losses.POOLED)
    (total + losses.hidden_mse(student, teacher, torch.ones(2))).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_a_hard_teacher_is_the_cross_entropy_with_its_choice():
    logits, teacher, labels = drawn(6, 3), drawn(6, 3, seed=1), torch.tensor([0, 1, 2, 0, 1, 2])
    loss = kd_objective(teacher, 1.0, 0.7, loss="hard")(logits, batch([2] * 6, list(range(6)), labels.tolist()))
    log = logits.double().log_softmax(-1).numpy()
    choice = teacher.argmax(-1).numpy()
    expected = -np.mean([0.7 * log[i, choice[i]] + 0.3 * log[i, labels[i]] for i in range(6)])
    np.testing.assert_allclose(float(loss), expected, rtol=1e-6)


def test_each_row_of_the_transfer_set_has_its_own_loss():
    """Rows 0 to 2 are soft labels alone, rows 3 and 4 have gold ones beside."""
    teacher, logits, rows, labels = drawn(5, 2), drawn(4, 2, seed=1), [4, 0, 2, 3], [1, 0, 0, 1]
    soft, gold = (kd_objective(teacher, 2.0, alpha) for alpha in (1.0, 0.4))
    one = batch([3] * 4, rows, labels)
    expected = sum(float(losses.kd_loss(logits[i:i + 1], teacher[row:row + 1], torch.tensor([labels[i]]), 2.0,
                                            0.4 if row >= 3 else 1.0)) for i, row in enumerate(rows)) / 4
    np.testing.assert_allclose(float(losses.transfer_objective(soft, gold, 3)(logits, one)), expected, rtol=1e-5)


def test_hidden_states_are_matched_where_they_are_known():
    lengths, rows = [2, 4, 1], [1, 9, 0]  # row 9 is plain text, of which nothing is known
    hidden = HiddenStates(drawn(3, 4).half(), torch.tensor([0.5, 1.0, 0.0, 2.0]), torch.tensor([0, 1]), torch.tensor([1, 3]))
    projected = drawn(7, 4, seed=1)
    expected = losses.hidden_mse(projected[[0, 1, 6]], hidden.values[[1, 2, 0]].float(), hidden.weights)
    found = losses.match_hidden(projected, batch(lengths, rows, [0] * 3), hidden)
    torch.testing.assert_close(found, expected)
    assert float(losses.match_hidden(projected[:2], batch([2], [9], [0]), hidden)) == 0.0


def test_edit_bce_is_its_formula():
    logits, touched = drawn(7), torch.tensor([1.0, 0, 0, 1, 0, 0, 0])
    p = 1 / (1 + np.exp(-logits.double().numpy()))
    expected = -np.where(touched.numpy() > 0, np.log(p), np.log(1 - p)).mean()
    np.testing.assert_allclose(float(losses.edit_bce(logits, touched)), expected, rtol=1e-6)


def test_edited_tokens_are_told_in_every_row_and_classes_where_somebody_knows_them():
    """Rows 0 and 1 are new; without soft labels the gold ones of rows 2 and 3 alone teach a class."""
    ids, rows, labels = [[1, 2], [3, 4, 5], [6], [7, 8]], [1, 3, 0], [1, 0, 1]
    marks = mark_edits(ids, {0: [1], 1: [3, 9, 5]})
    one, teacher = batch([3, 2, 2], rows, labels), drawn(4, 2)
    logits, edited = drawn(3, 2, seed=1), drawn(7, seed=2)
    soft, gold = kd_objective(teacher, 1.0, 1.0), kd_objective(teacher, 1.0, 0.0)
    outputs, touched = Outputs(logits, edited=edited), np.array([0, 1, 0, 0, 0, 0, 1])
    p = 1 / (1 + np.exp(-edited.double().numpy()))
    bce = -np.where(touched, np.log(p), np.log(1 - p)).mean()
    of_gold = F.cross_entropy(logits[1:2].double(), torch.tensor([0])) / 3
    found = losses.transfer_objective(None, gold, 2, edits=marks, edit_weight=0.3)(outputs, one)
    np.testing.assert_allclose(float(found), float(of_gold) + 0.3 * bce, rtol=1e-5)
    # Beside soft labels it is added to the loss that was there.
    beside = losses.transfer_objective(soft, gold, 2, edits=marks, edit_weight=0.3)(outputs, one)
    np.testing.assert_allclose(float(beside - losses.transfer_objective(soft, gold, 2)(logits, one)), 0.3 * bce, rtol=1e-5)


def test_the_command_line_offers_every_kd_loss(capsys):
    for name in LOSSES:
        assert Parser("distil").parse(["12345", "--kd-loss", name]).kd_loss == name
    with pytest.raises(SystemExit):
        Parser("distil").parse(["12345", "--kd-loss", "no-loss"])
    assert f"expected one of {', '.join(LOSSES)}" in capsys.readouterr().err
