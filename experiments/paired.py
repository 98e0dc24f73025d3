"""Paired bootstrap of the scores of several labels and of numbers; significance.py has that of one of several classes.

    paired_scores("regression", truth, a, b)["spearman"]    # {"value": ..., "interval": [low, high]}
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np

AT_ONCE = 2_000_000  # values of a bootstrap held in memory at a time: 16 MB each
CONFIDENCE = 0.95


def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns Pearson's correlation along the last dimension; 0 where one side is constant."""
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    size = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return np.divide((x * y).sum(-1), size, out=np.zeros(np.shape(size)), where=size > 0)


def number_scores(rows: np.ndarray, truth: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Computes Pearson, Spearman and MSE of resamples.

    Args:
        rows: (R, N) row numbers of each resample.
        truth, outputs: (N,).

    Returns:
        (R, 3).
    """
    # Imported late: SciPy's statistics take half a second.
    from scipy.stats import rankdata

    y, x = truth[rows], outputs[rows]
    # Ranks within the resample: ties have their mean rank.
    spearman = pearson(rankdata(x, axis=-1), rankdata(y, axis=-1))
    return np.stack([pearson(x, y), spearman, ((x - y) ** 2).mean(-1)], -1)


def label_scores(rows: np.ndarray, truth: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Computes micro and macro F1 of resamples: (R, N), (N, labels), (N, labels) -> (R, 2)."""
    # A resample's sums are its counts of the rows times the rows.
    counts = np.stack([np.bincount(one, minlength=len(truth)) for one in rows]).astype(float)
    hits, sizes = 2 * counts @ (truth * chosen), counts @ (truth + chosen)
    micro = hits.sum(-1) / np.maximum(sizes.sum(-1), 1)
    return np.stack([micro, (hits / np.maximum(sizes, 1)).mean(-1)], -1)


# problem -> names of the scores, and the function that computes them.
SCORES: dict[str, tuple[tuple[str, ...], Callable[..., np.ndarray]]] = {
    "regression": (("pearson", "spearman", "mse"), number_scores), "multi-label": (("f1_micro", "f1_macro"), label_scores)}


def paired_scores(problem: str, truth: np.ndarray, a: np.ndarray, b: np.ndarray, resamples: int = 10_000, seed: int = 0
                  ) -> dict[str, dict]:
    """Returns the differences a - b of each score, with their 95 % percentile intervals (Efron & Tibshirani 1993).

    A resample draws N rows with replacement, both models' answers together.

    Args:
        truth, a, b: (N,) numbers, or (N, labels) of 0 and 1: the labels and two models' answers.

    Returns:
        Score -> {value, interval [low, high]}.
    """
    names, compute = SCORES[problem]
    n, rng, parts = len(truth), np.random.default_rng(seed), []
    # In parts, so that memory stays bounded.
    step = max(1, AT_ONCE // truth.size)
    for start in range(0, resamples, step):
        rows = rng.integers(0, n, (min(step, resamples - start), n))
        parts.append(compute(rows, truth, a) - compute(rows, truth, b))
    low, high = np.quantile(np.concatenate(parts), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    whole = np.arange(n)[None]
    value = (compute(whole, truth, a) - compute(whole, truth, b))[0]
    return {name: {"value": float(value[i]), "interval": [float(low[i]), float(high[i])]} for i, name in enumerate(names)}
