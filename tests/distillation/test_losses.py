"""The student's losses against their formulas in NumPy float64."""
import numpy as np
import torch
from conftest import VOCAB

from data_utils import Batch
from distillation import losses
from distillation.teachers import HiddenStates


def drawn(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(lengths: list[int], rows: list[int], labels: list[int]) -> Batch:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return Batch(torch.randint(0, VOCAB, mask.shape), mask, torch.tensor(labels), torch.tensor(rows), sum(lengths))


def test_logit_mse_is_its_formula():
    student, teacher = drawn(5, 3), drawn(5, 3, seed=1)
    expected = ((student.double().numpy() - teacher.double().numpy()) ** 2).sum() / 15
    np.testing.assert_allclose(float(losses.logit_mse(student, teacher)), expected, rtol=1e-6)


def test_hidden_mse_is_its_formula():
    student, teacher, weights = drawn(7, 4), drawn(7, 4, seed=1), drawn(4, seed=2).abs()
    s, t, w = (x.double().numpy() for x in (student, teacher, weights))
    expected = sum(w[j] * (s[i, j] - t[i, j]) ** 2 for i in range(7) for j in range(4)) / 7
    np.testing.assert_allclose(float(losses.hidden_mse(student, teacher, weights)), expected, rtol=1e-6)


def test_no_gradient_reaches_the_teacher():
    teacher = drawn(4, 2).requires_grad_()
    student = drawn(4, 2, seed=1).requires_grad_()
    (losses.logit_mse(student, teacher) + losses.hidden_mse(student, teacher, torch.ones(2))).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_a_hard_teacher_is_the_cross_entropy_with_its_choice():
    logits, teacher, labels = drawn(6, 3), drawn(6, 3, seed=1), torch.tensor([0, 1, 2, 0, 1, 2])
    loss = losses.distillation(teacher, 1.0, 0.7, kind="hard")(logits, batch([2] * 6, list(range(6)), labels.tolist()))
    log = logits.double().log_softmax(-1).numpy()
    choice = teacher.argmax(-1).numpy()
    expected = -np.mean([0.7 * log[i, choice[i]] + 0.3 * log[i, labels[i]] for i in range(6)])
    np.testing.assert_allclose(float(loss), expected, rtol=1e-6)


def test_each_row_of_the_transfer_set_has_its_own_loss():
    """Rows 0 to 2 are soft labels alone, rows 3 and 4 have gold ones beside."""
    teacher, logits, rows, labels = drawn(5, 2), drawn(4, 2, seed=1), [4, 0, 2, 3], [1, 0, 0, 1]
    soft, gold = (losses.distillation(teacher, 2.0, alpha) for alpha in (1.0, 0.4))
    one = batch([3] * 4, rows, labels)
    expected = sum(float(losses.kd_loss(logits[i:i + 1], teacher[row:row + 1], torch.tensor([labels[i]]), 2.0,
                                            0.4 if row >= 3 else 1.0)) for i, row in enumerate(rows)) / 4
    np.testing.assert_allclose(float(losses.transfer(soft, gold, 3)(logits, one)), expected, rtol=1e-5)


def test_hidden_states_are_matched_where_they_are_known():
    lengths, rows = [2, 4, 1], [1, 9, 0]  # row 9 is plain text, of which nothing is known
    hidden = HiddenStates(drawn(3, 4).half(), torch.tensor([0.5, 1.0, 0.0, 2.0]), torch.tensor([0, 1]), torch.tensor([1, 3]))
    projected = drawn(7, 4, seed=1)
    expected = losses.hidden_mse(projected[[0, 1, 6]], hidden.values[[1, 2, 0]].float(), hidden.weights)
    found = losses.matched(projected, batch(lengths, rows, [0] * 3), hidden)
    torch.testing.assert_close(found, expected)
    assert float(losses.matched(projected[:2], batch([2], [9], [0]), hidden)) == 0.0
