"""Measures whether a classifier's probabilities hold: reliability, calibration error, temperature.

    python run.py diagnose runs/LoRA-12345

After Guo et al. 2017, "On Calibration of Modern Neural Networks".
"""
from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

BINS = 15  # of equal width, as Guo et al. have them
TEMPERATURES = (0.01, 100.0)  # between which the best one is looked for


def nll(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> float:
    """Returns the mean negative log-likelihood (nats) of labels (N,) under softmax(logits (N, K) / temperature)."""
    return float(-log_softmax(logits / temperature, -1)[np.arange(len(labels)), labels].mean())


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the temperature with the lowest negative log-likelihood, from 0.01 to 100; above 1: overconfident."""
    low, high = np.log(TEMPERATURES)
    return float(np.exp(minimize_scalar(lambda log_t: nll(logits, labels, np.exp(log_t)), bounds=(low, high),
                                        method="bounded", options={"xatol": 1e-6}).x))


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> list[dict]:
    """Returns, of each bin of confidence that holds rows, its bounds (low, high], rows, mean confidence and accuracy.

    Args:
        probabilities: (N, K); a row's confidence is its largest.
        labels: (N,) class indices.
    """
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return [{"low": i / bins, "high": (i + 1) / bins, "n": int(here.sum()),
             "confidence": float(confidence[here].mean()), "accuracy": float(right[here].mean())}
            for i in range(bins) if (here := index == i).any()]


def calibration_error(bins: list[dict]) -> float:
    """Returns the expected calibration error: the mean gap of accuracy and confidence, weighted by rows (Guo et al., 3)."""
    return sum(b["n"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / sum(b["n"] for b in bins)


def calibration(logits: np.ndarray, labels: np.ndarray, temperature: float) -> dict:
    """Returns n, and calibration error and negative log-likelihood as they are and at the given temperature."""
    bins = reliability(np.exp(log_softmax(logits, -1)), labels)
    scaled = reliability(np.exp(log_softmax(logits / temperature, -1)), labels)
    return {"n": len(labels), "ece": calibration_error(bins), "ece_scaled": calibration_error(scaled),
            "nll": nll(logits, labels), "nll_scaled": nll(logits, labels, temperature), "bins": bins}
