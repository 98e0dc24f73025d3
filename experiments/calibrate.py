"""Calibrates a finished run on held-out rows: a temperature for its probabilities, and a threshold for two classes.

    python run.py calibrate runs/LoRA-12345
    python run.py calibrate runs/LoRA-12345 --least-precision 0.9 --positive unacceptable
    python run.py predict runs/LoRA-12345 "A sentence." --calibrated --at-least 0.9

The temperature is that of Guo et al. 2017, "On Calibration of Modern Neural Networks".
"""
from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.special import softmax

from experiments.calibration import calibration_error, fit_temperature, nll, reliability
from experiments.evaluate import score_rows
from machine.errors import UserError
from metrics.classification import metrics
from metrics.problems import problem_of
from record.calibration import write_calibration
from record.files import read_json
from record.folder import read_run

LEAST_ROWS = 20
FOLDS = 5


def calibrate_run(folder: Path, data: Path | None = None, least_precision: float | None = None,
                  positive: str | None = None, allow_training_data: bool = False) -> dict:
    """Fits the temperature and, for two classes, the threshold of the positive class; writes calibration.json.

    Args:
        folder: of a finished LoRA or distillation run (its student is calibrated).
        data: labelled rows of the run's task; None: the split that chose the run's best epoch.
        least_precision: the threshold reaches this precision with the highest recall; None: the best MCC.
        positive: label or name of the class that the threshold is about; None: the second class.

    Returns:
        The content of calibration.json.

    Raises:
        UserError: no such run, rows that were trained on, too few rows or classes, or a precision that is out of reach.
    """
    problem_of(read_run(folder)[0]).check(f"calibrate {folder}", True)
    scored = score_rows(folder, data, allow_training_data, selection=True)
    logits, labels = scored.logits.double().numpy(), np.array(scored.split.labels)
    if len(labels) < LEAST_ROWS:
        raise UserError(f"{scored.name}: {len(labels)} rows; expected at least {LEAST_ROWS} to calibrate on")
    if len(set(labels)) < 2:
        raise UserError(f"{scored.name}: all rows have one class; expected at least two to calibrate on")
    temperature = fit_temperature(logits, labels)
    found = {"data": scored.name, "n": len(labels), "temperature": temperature,
             "before": quality(logits, labels), "after": quality(held_out(logits, labels), labels)}
    if len(scored.classes) == 2:
        names = read_json(folder / "config.json").get("class_names", scored.classes)
        if positive in names:
            positive = scored.classes[names.index(positive)]
        if positive is not None and positive not in scored.classes:
            expected = scored.classes if list(names) == list(scored.classes) else [*scored.classes, *names]
            raise UserError(f"--positive {positive}: no class of the run; expected one of {', '.join(expected)}")
        found |= threshold_of(logits / temperature, labels, scored.classes, least_precision, positive)
        found["positive_name"] = names[found["positive"]]
    elif least_precision is not None or positive is not None:
        raise UserError(f"{folder}: has {len(scored.classes)} classes; --least-precision and --positive are for two")
    write_calibration(folder, found)
    return {**found, "notes": scored.notes}


def quality(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns expected calibration error and negative log-likelihood (nats) of logits (N, K)."""
    return {"ece": calibration_error(reliability(softmax(logits, -1), labels)), "nll": nll(logits, labels)}


def held_out(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns logits (N, K), each divided by a temperature that was fitted without its row, for an unbiased error."""
    from sklearn.model_selection import KFold

    scaled = np.empty_like(logits)
    for others, own in KFold(FOLDS, shuffle=True, random_state=0).split(logits):
        scaled[own] = logits[own] / fit_temperature(logits[others], labels[others])
    return scaled


def threshold_of(logits: np.ndarray, labels: np.ndarray, classes: list[str], least_precision: float | None,
                 positive: str | None) -> dict:
    """Returns index, threshold and scores of the positive class: at least this probability, and it is chosen.

    Args:
        logits: (N, 2), calibrated.

    Raises:
        UserError: a precision that no threshold reaches.
    """
    index = 1 if positive is None else list(classes).index(positive)
    truth, probabilities = labels == index, softmax(logits, -1)[:, index]
    # Counts at every threshold that changes a decision, the highest first; float64 for their products.
    counts = metrics().confusion_matrix_at_thresholds(truth, probabilities)
    tn, fp, fn, tp = (np.asarray(count, dtype=float) for count in counts[:4])
    thresholds = np.asarray(counts[4])
    precision, recall = tp / np.maximum(tp + fp, 1), tp / np.maximum(tp + fn, 1)
    root = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    mcc = np.where(root > 0, (tp * tn - fp * fn) / np.maximum(root, 1), 0.0)
    if least_precision is None:
        best = int(mcc.argmax())
    else:
        reached = np.flatnonzero((precision >= least_precision) & (tp > 0))
        if not len(reached):
            raise UserError(f"--least-precision {least_precision:g}: no threshold reaches it for {classes[index]} "
                            f"(the highest precision is {precision[tp > 0].max():.3f})")
        best = int(reached[recall[reached].argmax()])
    # Halfway to the next probability below, so that rounding does not change a decision.
    below = probabilities[probabilities < thresholds[best]]
    threshold = float((thresholds[best] + below.max()) / 2) if len(below) else 0.0
    return {"positive": index, "positive_class": classes[index], "threshold": threshold,
            "chosen_for": "mcc" if least_precision is None else f"precision {least_precision:g}",
            "precision": float(precision[best]), "recall": float(recall[best]), "mcc": float(mcc[best])}


# ---------------------------------------------------------------- the command line


def main(args) -> None:
    """Calibrates a run and prints temperature, threshold and errors."""
    from machine.streams import note

    found = calibrate_run(args.run, args.data, args.least_precision, args.positive, args.allow_training_data)
    for text in found.pop("notes"):
        note(f"warning: {text}")
    if args.json:
        import json

        print(json.dumps(found))
        return
    before, after = found["before"], found["after"]
    print(f"{found['n']:,} rows of {found['data']}\n  temperature {found['temperature']:.3f}; calibration error "
          f"{before['ece']:.3f} -> {after['ece']:.3f}, negative log-likelihood {before['nll']:.3f} -> {after['nll']:.3f} "
          f"({FOLDS} folds)")
    if "threshold" in found:
        print(f"  {found['positive_name']} from a probability of {found['threshold']:.3f} (chosen for "
              f"{found['chosen_for']}): precision {found['precision']:.3f}, recall {found['recall']:.3f}, MCC "
              f"{found['mcc']:.3f}")
    print(f"  in {args.run}/calibration.json; predict, serve, export and merge take --calibrated")
