"""The other KD losses against their formulas in NumPy float64: values, and gradients by finite differences."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_utils import Batch
from distillation.annealing import Temperature
from distillation.heads import Outputs
from distillation.losses import LOSSES, kd_loss, kd_objective
from distillation.relations import Pooled, relational_objective, relations
from distillation.soft_losses import weights_of
from layers import RNNConfig
from model import DistilRNN
from options.schema import DistilOptions

T = 3.0


def drawn(*shape, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(x) -> np.ndarray:
    x = np.exp(x - x.max(1, keepdims=True))
    return x / x.sum(1, keepdims=True)


def kl(p, q) -> float:
    return float((p * (np.log(p) - np.log(q))).sum() / len(p))


def reverse_kl(s, t, labels) -> float:
    return T ** 2 * kl(softmax(s / T), softmax(t / T))


def js(s, t, labels, weight=0.5) -> float:
    q, p = softmax(s / T), softmax(t / T)
    m = weight * p + (1 - weight) * q
    return T ** 2 * (weight * kl(p, m) + (1 - weight) * kl(q, m))


def dkd(s, t, labels, weight=8.0) -> float:
    total = 0.0
    for row, label in enumerate(labels):
        q, p = (softmax(x[row:row + 1] / T)[0] for x in (s, t))
        rest = [k for k in range(len(q)) if k != label]
        total += kl(np.array([[p[label], 1 - p[label]]]), np.array([[q[label], 1 - q[label]]]))
        total += weight * kl(p[None, rest] / p[rest].sum(), q[None, rest] / q[rest].sum())
    return T ** 2 * total / len(labels)


def dist(s, t, labels) -> float:
    q, p = softmax(s / T), softmax(t / T)
    columns = np.mean([1 - np.corrcoef(q[:, k], p[:, k])[0, 1] for k in range(q.shape[1])])
    rows = np.mean([1 - np.corrcoef(q[b], p[b])[0, 1] for b in range(len(q))]) if q.shape[1] > 2 else 0.0
    return T ** 2 * (columns + rows)


def rkd(s, t, labels=None) -> float:
    def huber(x):
        x = abs(x)
        return 0.5 * x ** 2 if x < 1 else x - 0.5

    def parts(x):
        B = len(x)
        distances = np.array([[np.linalg.norm(x[i] - x[j]) for j in range(B)] for i in range(B)])
        angles = np.zeros((B, B, B))
        for i, j, k in np.ndindex(B, B, B):
            a, b = x[j] - x[i], x[k] - x[i]
            angles[i, j, k] = a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) if i not in (j, k) else 0.0
        return distances / distances[distances > 0].mean(), angles

    (ds, as_), (dt, at) = parts(s), parts(t)
    return np.mean([huber(x) for x in (ds - dt).flat]) + 2 * np.mean([huber(x) for x in (as_ - at).flat])


FORMULAS = {"reverse-kl": reverse_kl, "js": js, "dkd": dkd, "dist": dist}


def check(compute, formula, student: torch.Tensor) -> None:
    """Value and gradient of `compute` at a student's numbers are the formula's."""
    student = student.clone().requires_grad_()
    value = compute(student)
    np.testing.assert_allclose(value.item(), formula(student.detach().numpy()), rtol=1e-6, atol=1e-9)
    value.backward()
    numeric, step = np.zeros(student.shape), 1e-6
    for index in np.ndindex(*student.shape):
        sides = []
        for sign in (1, -1):
            moved = student.detach().numpy().copy()
            moved[index] += sign * step
            sides.append(formula(moved))
        numeric[index] = (sides[0] - sides[1]) / (2 * step)
    assert np.abs(numeric).max() > 1e-3
    np.testing.assert_allclose(student.grad.numpy(), numeric, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_loss_is_its_formula_in_value_and_gradient(name, classes):
    student, teacher = drawn(6, classes, seed=1), drawn(6, classes, seed=2)
    labels = torch.arange(6) % classes

    def formula(s):
        ce = -np.log(softmax(s))[np.arange(6), labels.numpy()].mean()
        return 0.7 * FORMULAS[name](s, teacher.numpy(), labels.numpy()) + 0.3 * ce

    check(lambda s: LOSSES[name](s, teacher, labels, T, 0.7), formula, student)


@pytest.mark.parametrize("name, weight, formula", [("js", 0.1, js), ("dkd", 2.0, dkd)])
def test_a_weight_is_the_formulas(name, weight, formula):
    student, teacher, labels = drawn(4, 3, seed=1), drawn(4, 3, seed=2), torch.tensor([0, 1, 2, 0])
    found = LOSSES[name](student, teacher, labels, T, 1.0, weight=weight).item()
    assert found == pytest.approx(formula(student.numpy(), teacher.numpy(), labels.numpy(), weight), rel=1e-9)
    assert found != pytest.approx(LOSSES[name](student, teacher, labels, T, 1.0).item(), rel=1e-3)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_student_that_equals_its_teacher_has_nothing_left_to_learn(name, classes):
    logits = drawn(5, classes, seed=1)
    assert LOSSES[name](logits, logits, torch.arange(5) % classes, T, 1.0).item() == pytest.approx(0.0, abs=1e-6)


# ---------------------------------------------------------------- two classes

@pytest.mark.parametrize("weight", [0.0, 1.0, 8.0])
def test_dkd_of_two_classes_is_kd(weight):
    student, teacher, labels = drawn(6, 2, seed=1), drawn(6, 2, seed=2), torch.arange(6) % 2
    found = LOSSES["dkd"](student, teacher, labels, T, 0.7, weight=weight)
    torch.testing.assert_close(found, kd_loss(student, teacher, labels, T, 0.7))


def test_dist_of_two_classes_is_one_correlation_and_its_rows_have_no_gradient():
    student, teacher = drawn(6, 2, seed=1).requires_grad_(), drawn(6, 2, seed=2)
    q, p = (F.softmax(x / T, -1).detach().numpy()[:, 1] for x in (student, teacher))
    found = LOSSES["dist"](student, teacher, torch.arange(6) % 2, T, 1.0).item()
    assert found == pytest.approx(T ** 2 * (1 - np.corrcoef(q, p)[0, 1]), rel=1e-6)
    rows = F.softmax(student / T, -1)
    centred = rows - rows.mean(1, keepdim=True)
    (gradient,) = torch.autograd.grad((centred[:, 0] / centred.norm(dim=1)).sum(), student)
    assert gradient.abs().max() < 1e-12


# ---------------------------------------------------------------- relations of pooled states

def test_relations_are_their_formula_in_value_and_gradient():
    teacher = drawn(5, 7, seed=2)
    check(lambda s: relations(s, teacher), lambda s: rkd(s, teacher.numpy()), drawn(5, 4, seed=1))


def test_relations_do_not_see_scale_shift_or_rotation():
    states = drawn(5, 4, seed=1)
    rotation = torch.linalg.qr(drawn(4, 4, seed=3)).Q
    assert relations(3 * states @ rotation + 1, states).item() == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("rows", [1, 2])
def test_relations_of_few_or_equal_sentences_have_finite_gradients(rows):
    states = torch.ones(rows, 4, requires_grad=True)
    relations(states, drawn(rows, 3, seed=1).float()).backward()
    assert torch.isfinite(states.grad).all()


def test_the_relational_objective_takes_states_by_row():
    logits, states = drawn(8, 2, seed=1), drawn(8, 3, seed=2)
    rows = torch.tensor([5, 1, 2])
    batch = Batch(torch.ones(3, 2), torch.ones(3, 2), torch.tensor([0, 1, 1]), rows, 6)
    outputs = Outputs(drawn(3, 2, seed=3), pooled=drawn(3, 4, seed=4))
    found = relational_objective(logits, states, 0.7, 0.0)(outputs, batch)
    expected = 0.7 * relations(outputs.pooled, states[rows]) + 0.3 * F.cross_entropy(outputs.logits, batch.labels)
    torch.testing.assert_close(found, expected)


def test_a_student_returns_its_pooled_states_in_training_alone():
    torch.manual_seed(0)
    student = DistilRNN(RNNConfig(vocab_size=11, dropout=0.0))
    model, ids = Pooled(student), torch.randint(0, 11, (3, 5))
    outputs = model.train()(ids, torch.ones_like(ids))
    torch.testing.assert_close(student.classifier(outputs.pooled), outputs.logits)
    assert torch.equal(model.eval()(ids, torch.ones_like(ids)), student(ids, torch.ones_like(ids)))


# ---------------------------------------------------------------- temperature

def test_the_temperature_is_constant_or_falls_to_one():
    constant, annealed = Temperature(5.0), Temperature(5.0, "anneal")
    values = []
    for step in range(5):
        constant.begin_step(step, 5)
        annealed.begin_step(step, 5)
        values.append((float(constant), float(annealed)))
    assert values == [(5.0, 5.0), (5.0, 4.0), (5.0, 3.0), (5.0, 2.0), (5.0, 1.0)]
    teacher, logits = drawn(4, 2, seed=1), drawn(3, 2, seed=2)
    batch = Batch(torch.ones(3, 2), torch.ones(3, 2), torch.tensor([0, 1, 1]), torch.tensor([3, 0, 2]), 6)
    objective = kd_objective(teacher, annealed, 0.5)
    assert objective(logits, batch) == kd_objective(teacher, 1.0, 0.5)(logits, batch)
    annealed.begin_step(0, 5)
    assert objective(logits, batch) == kd_objective(teacher, 5.0, 0.5)(logits, batch)


def test_the_weights_of_the_options_reach_the_losses_that_have_one():
    assert weights_of(DistilOptions("t", kd_loss="js", js_weight=0.2)) == {"weight": 0.2}
    assert weights_of(DistilOptions("t", kd_loss="dkd")) == {"weight": 8.0} and weights_of(DistilOptions("t")) == {}
