"""Measures a classifier's calibration: reliability, expected calibration error, temperature.

    python run.py diagnose runs/LoRA-12345

After Guo et al. 2017, "On Calibration of Modern Neural Networks".
"""
from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

BINS = 15  # of equal width, as in Guo et al.
TEMPERATURES = (0.01, 100.0)  # bounds of the search for the best one


def nll(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> float:
    """Returns the mean negative log-likelihood (nats) of labels (N,) under softmax(logits (N, K) / temperature)."""
    return float(-log_softmax(logits / temperature, -1)[np.arange(len(labels)), labels].mean())


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the temperature with the lowest negative log-likelihood, from 0.01 to 100; above 1: overconfident."""
    # Searched on a logarithmic scale: 0.5 and 2 are equally far from no scaling.
    low, high = np.log(TEMPERATURES)
    return float(np.exp(minimize_scalar(lambda log_t: nll(logits, labels, np.exp(log_t)), bounds=(low, high),
                                        method="bounded", options={"xatol": 1e-6}).x))


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> list[dict]:
    """Returns the bins of confidence that hold rows: bounds (low, high], n, mean confidence and accuracy of each.

    Args:
        probabilities: (N, K); a row's confidence is its largest one.
        labels: (N,) class indices.
    """
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    # A bin holds its upper bound; clipped, because rounding may put a confidence of 1 above the last one.
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    found = []
    for i in range(bins):
        inside = index == i
        # An empty bin has neither mean; its gap would weigh nothing.
        if inside.any():
            found.append({"low": i / bins, "high": (i + 1) / bins, "n": int(inside.sum()),
                          "confidence": float(confidence[inside].mean()), "accuracy": float(right[inside].mean())})
    return found


def calibration_error(bins: list[dict]) -> float:
    """Returns the expected calibration error: the mean gap of accuracy and confidence, weighted by rows (Guo et al., 3)."""
    return sum(b["n"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / sum(b["n"] for b in bins)


def calibration(logits: np.ndarray, labels: np.ndarray, temperature: float) -> dict:
    """Returns n, bins, and calibration error and negative log-likelihood, unscaled and at the given temperature."""
    bins = reliability(np.exp(log_softmax(logits, -1)), labels)
    scaled = reliability(np.exp(log_softmax(logits / temperature, -1)), labels)
    return {"n": len(labels), "ece": calibration_error(bins), "ece_scaled": calibration_error(scaled),
            "nll": nll(logits, labels), "nll_scaled": nll(logits, labels, temperature), "bins": bins}
