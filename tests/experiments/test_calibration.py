"""Calibration held to scikit-learn, and to logits whose temperature is known."""
import numpy as np
import pytest
from scipy.special import softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss

from experiments import calibration


def rows(n: int = 4000, classes: int = 2, overconfident: float = 1.0, seed: int = 0):
    """Logits, times a factor, and labels drawn from the probabilities before it."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (n, classes))
    labels = np.array([rng.choice(classes, p=p) for p in softmax(logits, -1)])
    return overconfident * logits, labels


@pytest.mark.parametrize("classes", [2, 5])
def test_the_temperature_undoes_the_factor_that_the_logits_were_multiplied_by(classes):
    for factor in (0.4, 1, 3):
        logits, labels = rows(classes=classes, overconfident=factor)
        found = calibration.fit_temperature(logits, labels)
        assert found == pytest.approx(factor, rel=0.08)
        best = calibration.nll(logits, labels, found)
        assert all(best <= calibration.nll(logits, labels, found * near) for near in (0.97, 1.03))


def test_the_loss_is_scikit_learns():
    logits, labels = rows(classes=3)
    assert calibration.nll(logits, labels, 2.0) == pytest.approx(log_loss(labels, softmax(logits / 2, -1)))


@pytest.mark.parametrize("classes", [2, 4])
def test_bins_are_scikit_learns_and_the_error_is_their_weighted_gap(classes):
    logits, labels = rows(classes=classes, overconfident=2)
    p = softmax(logits, -1)
    found = calibration.reliability(p, labels)
    accuracy, confidence = calibration_curve(p.argmax(-1) == labels, p.max(-1), n_bins=15)
    assert [b["accuracy"] for b in found] == pytest.approx(accuracy)
    assert [b["confidence"] for b in found] == pytest.approx(confidence)
    assert sum(b["n"] for b in found) == len(labels)
    assert all(b["low"] < b["confidence"] <= b["high"] for b in found)
    index, error = np.minimum((p.max(-1) * 15).astype(int), 14), 0.0
    for i in range(15):
        if (here := index == i).any():
            error += here.mean() * abs((p.argmax(-1) == labels)[here].mean() - p.max(-1)[here].mean())
    assert calibration.calibration_error(found) == pytest.approx(error)


def test_a_temperature_mends_the_error_of_overconfident_logits():
    logits, labels = rows(overconfident=4)
    found = calibration.calibration(logits, labels, calibration.fit_temperature(logits, labels))
    assert found["ece"] > 0.1 and found["ece_scaled"] < 0.03 and found["nll_scaled"] < found["nll"]


def test_certainty_falls_into_the_last_bin():
    found = calibration.reliability(np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([0, 1]))
    assert [(b["n"], b["accuracy"]) for b in found] == [(1, 0.0), (1, 1.0)] and found[-1]["high"] == 1
    assert calibration.calibration_error(found) == pytest.approx(0.25)
