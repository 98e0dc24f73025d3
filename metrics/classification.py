"""What a run records of predictions: accuracy, MCC and macro-F1, the confusion matrix, and scores by class."""
from __future__ import annotations

import importlib
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def metrics():
    """Returns `sklearn.metrics`, imported late, for the first step does not wait for it, and without pandas.

    scikit-learn imports pandas, and pandas pyarrow, wherever they are installed: 64 MiB that no metric here needs.
    """
    hide = "pandas" not in sys.modules
    if hide:
        sys.modules["pandas"] = None  # so that an import of it fails
    try:
        return importlib.import_module("sklearn.metrics")
    finally:
        if hide:
            del sys.modules["pandas"]


def scores(logits: Tensor, labels: Tensor) -> dict[str, int | float]:
    """Computes n, mean cross-entropy (nats), accuracy, MCC, macro-F1, and the accuracy of always saying the commonest label.

    Macro-F1 is over all classes that the logits know; one that is neither there nor predicted counts 0.
    """
    sk, truth, predictions, classes = metrics(), labels.numpy(), logits.argmax(-1).numpy(), range(logits.shape[1])
    return {"n": len(labels), "loss": float(F.cross_entropy(logits.double(), labels)),
            "accuracy": float(sk.accuracy_score(truth, predictions)),
            "mcc": float(sk.matthews_corrcoef(truth, predictions)),
            "macro_f1": float(sk.f1_score(truth, predictions, labels=classes, average="macro", zero_division=0)),
            "majority_accuracy": float(torch.bincount(labels).max()) / len(labels)}


def confusion(logits: Tensor, labels: Tensor) -> list[list[int]]:
    """Counts the confusion matrix [label][prediction]."""
    return metrics().confusion_matrix(labels.numpy(), logits.argmax(-1).numpy(), labels=range(logits.shape[1])).tolist()


def per_class(matrix: list[list[int]], names: tuple[str, ...]) -> dict[str, dict[str, int | float]]:
    """Computes precision, recall, F1 and n (rows) of each class from a confusion matrix; a share of no rows is 0."""
    counts, result = np.array(matrix), {}
    for i, name in enumerate(names):
        hits, said, there = counts[i, i], counts[:, i].sum(), counts[i].sum()
        result[name] = {"n": int(there), "precision": float(hits / said) if said else 0.0,
                        "recall": float(hits / there) if there else 0.0,
                        "f1": float(2 * hits / (said + there)) if said + there else 0.0}
    return result


def scores_of_sums(sums: dict[str, float], matrix: list[list[int]]) -> dict[str, float]:
    """Computes loss, cross-entropy, accuracy and MCC of an epoch's training rows from their sums and confusion matrix.

    Without a matrix (rows without a class) the loss alone.
    """
    if not matrix:
        return {"loss": sums["loss"] / sums["rows"]}
    cells = [(i, j, count) for i, row in enumerate(matrix) for j, count in enumerate(row) if count]
    labels, predictions, weights = zip(*cells, strict=True)
    return {"loss": sums["loss"] / sums["rows"], "cross_entropy": sums["cross_entropy"] / sums["rows"],
            "accuracy": sums["correct"] / sums["rows"],
            "mcc": float(metrics().matthews_corrcoef(labels, predictions, sample_weight=weights))}
