"""Scores of a classifier's predictions: accuracy, MCC, macro-F1, the confusion matrix, and scores of each class."""
from __future__ import annotations

import importlib
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def metrics():
    """Returns `sklearn.metrics`, imported when first needed and without pandas.

    scikit-learn imports pandas if it is installed, and pandas imports pyarrow: 64 MiB that no metric here needs.
    """
    hide = "pandas" not in sys.modules
    # An import of a module whose entry is None fails, as if it were not installed.
    if hide:
        sys.modules["pandas"] = None
    try:
        return importlib.import_module("sklearn.metrics")
    finally:
        if hide:
            del sys.modules["pandas"]


def scores(logits: Tensor, labels: Tensor) -> dict[str, int | float]:
    """Computes n, mean cross-entropy (nats), accuracy, MCC, macro-F1, and the majority-class baseline's accuracy.

    Macro-F1 is the mean over all classes of the logits; a class without label and prediction counts 0. MCC of several
    classes is that of Gorodkin (2004), "Comparing two K-category assignments by a K-category correlation coefficient".

    Args:
        logits: (N, classes), on the CPU.
        labels: (N,), int64, on the CPU.
    """
    sk, truth, predictions, classes = metrics(), labels.numpy(), logits.argmax(-1).numpy(), range(logits.shape[1])
    # In float64, so that the mean over many rows does not lose the last digits.
    return {"n": len(labels), "loss": float(F.cross_entropy(logits.double(), labels)),
            "accuracy": float(sk.accuracy_score(truth, predictions)),
            "mcc": float(sk.matthews_corrcoef(truth, predictions)),
            "macro_f1": float(sk.f1_score(truth, predictions, labels=classes, average="macro", zero_division=0)),
            "majority_accuracy": float(torch.bincount(labels).max()) / len(labels)}


def confusion(logits: Tensor, labels: Tensor) -> list[list[int]]:
    """Counts the confusion matrix [label][prediction] of logits (N, classes) and labels (N,)."""
    # All classes are named: without that, a class without label and prediction has no row.
    return metrics().confusion_matrix(labels.numpy(), logits.argmax(-1).numpy(), labels=range(logits.shape[1])).tolist()


def per_class(matrix: list[list[int]], names: tuple[str, ...]) -> dict[str, dict[str, int | float]]:
    """Computes precision, recall, F1 and n (labels) of each class from a confusion matrix [label][prediction].

    A share of nothing is 0: precision of a class that is never predicted, recall of one without labels.
    """
    counts, result = np.array(matrix), {}
    for i, name in enumerate(names):
        hits, predicted, labelled = counts[i, i], counts[:, i].sum(), counts[i].sum()
        result[name] = {"n": int(labelled), "precision": float(hits / predicted) if predicted else 0.0,
                        "recall": float(hits / labelled) if labelled else 0.0,
                        # 2 PR / (P + R), without dividing by 0 if there is no hit.
                        "f1": float(2 * hits / (predicted + labelled)) if predicted + labelled else 0.0}
    return result


def scores_of_sums(sums: dict[str, float], matrix: list[list[int]]) -> dict[str, float]:
    """Computes loss, cross-entropy, accuracy and MCC of an epoch's training examples.

    Args:
        sums: over the epoch, by name: loss, cross_entropy, correct (predictions) and rows (examples).
        matrix: the epoch's confusion matrix [label][prediction].
    """
    # The cells as weighted examples: the labels themselves were not kept.
    cells = [(i, j, count) for i, row in enumerate(matrix) for j, count in enumerate(row) if count]
    labels, predictions, weights = zip(*cells, strict=True)
    return {"loss": sums["loss"] / sums["rows"], "cross_entropy": sums["cross_entropy"] / sums["rows"],
            "accuracy": sums["correct"] / sums["rows"],
            "mcc": float(metrics().matthews_corrcoef(labels, predictions, sample_weight=weights))}
