"""Losses for skewed classes: scikit-learn's weights, and the formulas in NumPy float64."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import one_line
from hypothesis import given
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight

from data_utils import Batch
from experiments.parser import Parser
from machine.errors import UserError
from options.schema import TrainOptions
from training.losses import class_weights, classification_loss, focal, weighted_cross_entropy


def drawn(rows: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * 2
    return logits, torch.randint(0, classes, (rows,), generator=generator)


def log_p_of(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))[np.arange(len(labels)), labels]


@given(labels=st.lists(st.integers(0, 3), min_size=4, max_size=60).filter(lambda found: set(found) == {0, 1, 2, 3}))
def test_balanced_weights_are_scikit_learns(labels):
    found = class_weights("balanced", labels, 4)
    np.testing.assert_allclose(found, compute_class_weight("balanced", classes=np.arange(4), y=labels), rtol=1e-6)
    assert float(found[torch.tensor(labels)].mean()) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_weighted_loss_is_its_formula_and_adds_up_over_batches(classes):
    logits, labels = drawn(12, classes)
    weights = torch.arange(1.0, classes + 1)
    expected = -(weights.numpy()[labels] * log_p_of(logits.numpy(), labels.numpy())).mean()
    assert weighted_cross_entropy(logits, labels, weights).item() == pytest.approx(expected, rel=1e-9)
    parts = [weighted_cross_entropy(logits[rows], labels[rows], weights) * len(logits[rows]) / 12
             for rows in (slice(0, 5), slice(5, 12))]
    assert sum(parts).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("weights", [None, torch.tensor([3.0, 1.0])])
def test_focal_is_its_formula_in_value_and_gradient(gamma, weights):
    logits, labels = drawn(6, 2)

    def formula(x: np.ndarray) -> float:
        log_p = log_p_of(x, labels.numpy())
        w = 1.0 if weights is None else weights.double().numpy()[labels]
        return float((-w * (1 - np.exp(log_p)) ** gamma * log_p).mean())

    logits.requires_grad_()
    loss = focal(logits, labels, weights, gamma)
    assert loss.item() == pytest.approx(formula(logits.detach().numpy()), rel=1e-9)
    loss.backward()
    for index in np.ndindex(6, 2):
        sides = []
        for sign in (1, -1):
            moved = logits.detach().numpy().copy()
            moved[index] += sign * 1e-6
            sides.append(formula(moved))
        assert logits.grad[index].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-4, abs=1e-7)


def test_focal_of_gamma_0_is_the_cross_entropy():
    logits, labels = drawn(8, 3)
    torch.testing.assert_close(focal(logits, labels, None, 0.0), F.cross_entropy(logits, labels))


def test_the_options_choose_the_loss():
    logits, labels = drawn(8, 2)
    batch = Batch(torch.ones(8, 2), torch.ones(8, 2), labels, torch.arange(8), 16)
    assert classification_loss(TrainOptions(seed=1), labels.tolist(), 2) is None
    found = classification_loss(TrainOptions(seed=1, loss="focal", class_weights="2,1"), labels.tolist(), 2)(logits, batch)
    torch.testing.assert_close(found, focal(logits, labels, torch.tensor([2.0, 1.0]), 2.0))
    smooth = TrainOptions(seed=1, class_weights="1,1", label_smoothing=0.1)
    torch.testing.assert_close(classification_loss(smooth, labels.tolist(), 2)(logits, batch),
                               F.cross_entropy(logits, labels, label_smoothing=0.1))


@pytest.mark.parametrize("options, labels, said", [
    ({"class_weights": "1,2,3"}, [0, 1], "--class-weights 1,2,3: 3 weights for 2 classes"),
    ({"class_weights": "balanced"}, [0, 0], "--class-weights balanced: class number 1 has no training row"),
    ({"loss": "focal", "label_smoothing": 0.1}, [0, 1], "--label-smoothing: not with --loss focal")])
def test_losses_without_a_meaning_are_one_line(options, labels, said):
    with pytest.raises(UserError, match=said) as error:
        classification_loss(TrainOptions(seed=1, **options), labels, 2)
    assert one_line(error)


@pytest.mark.parametrize("text", ["1", "a,b", "-1,2", "0,0", "nan,1", ""])
def test_words_that_are_no_weights_are_refused(text, capsys):
    with pytest.raises(SystemExit):
        Parser("LoRA").parse(["12345", f"--class-weights={text}"])
    assert "expected balanced|none|W,W[,...]" in capsys.readouterr().err
