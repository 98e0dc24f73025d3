"""Tells whether a difference is more than chance: intervals over seeds, paired tests over the sentences of one file.

    python run.py test runs/LoRA-12345 runs/distil-12345 --data FILE
"""
from __future__ import annotations

import math
import statistics
from pathlib import Path

import numpy as np

CONFIDENCE = 0.95
SCORES = ("accuracy", "mcc", "macro_f1")
AT_ONCE = 10_000_000  # counts of a bootstrap that are held at a time: 80 MB


# ---------------------------------------------------------------- over seeds

def spread(values: list[float]) -> dict:
    """Returns mean, sample standard deviation (n - 1) and 95 % interval of the mean; a single value has neither.

    The interval is mean ± t * sd / √n, with t the 0.975 quantile of Student's t with n - 1 degrees of freedom.
    """
    from scipy import stats  # late: half a second

    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return {"mean": mean, "sd": None, "interval": None, "values": values}
    sd = statistics.stdev(values)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * sd / math.sqrt(n)
    return {"mean": mean, "sd": sd, "interval": [mean - half, mean + half], "values": values}


def over_seeds(summaries: list[dict]) -> dict:
    """Returns the spread of every score, of the best and of the last epoch alike.

    Args:
        summaries: summary.json of each seed's run, or the part of one of its models; a teacher's has no epochs.
    """
    found = {}
    for which, key in (("best", "validation"), ("last", "last_validation")):
        if key in summaries[0]:
            found[which] = {split: {
                name: spread([summary[key][split][name] for summary in summaries])
                for name in SCORES if all(name in summary[key][split] for summary in summaries)}
                for split in summaries[0][key]}
        if f"{which}_epoch" in summaries[0]:
            found[f"{which}_epoch"] = spread([summary[f"{which}_epoch"] for summary in summaries])
    return found


def paired_differences(one: dict, other: dict) -> dict:
    """Returns the spread of `one` minus `other`, paired by seed: what both owe to the seed cancels.

    Args:
        one, other: results of `over_seeds` with their `seeds`; a seed that only one of them has is left out.
    """
    seeds = [seed for seed in one["seeds"] if seed in other["seeds"]]
    found = {"seeds": seeds}
    for which in ("best", "last"):
        if seeds and which in one and which in other:
            found[which] = {split: {
                name: spread([_of_seed(one, which, split, name, seed) - _of_seed(other, which, split, name, seed)
                              for seed in seeds])
                for name in scores if name in other[which][split]} for split, scores in one[which].items()}
    return found


def _of_seed(row: dict, which: str, split: str, name: str, seed: str) -> float:
    return row[which][split][name]["values"][row["seeds"].index(seed)]


# ---------------------------------------------------------------- over the sentences of a file

def matthews(correct: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Returns Matthews correlation, of K classes (Gorodkin 2004), from counts; 0 where it is not defined.

    Args:
        correct: (...) rows predicted right.
        predicted, true: (..., K) rows of each class, as predicted and as labelled.
    """
    n = true.sum(-1)
    product = (n ** 2 - (predicted ** 2).sum(-1)) * (n ** 2 - (true ** 2).sum(-1))
    covariance = correct * n - (predicted * true).sum(-1)
    return np.divide(covariance, np.sqrt(product), out=np.zeros(np.shape(product)), where=product > 0)


def paired_bootstrap(labels: np.ndarray, a: np.ndarray, b: np.ndarray, classes: int, resamples: int = 10_000,
                     seed: int = 0) -> dict[str, dict]:
    """Returns the differences a - b in accuracy and MCC, with their 95 % percentile intervals (Efron & Tibshirani 1993).

    A resample draws N sentences with replacement, both models' answers together. Sentences with the same label and
    the same two answers are alike, so that a resample is a multinomial draw of how often each such cell occurs.

    Args:
        labels, a, b: (N,) class indices: the truth and two models' predictions.
        classes: K.
    """
    cells, counts = np.unique(np.stack([labels, a, b], 1), axis=0, return_counts=True)  # (C, 3), (C,)
    one_hot = np.eye(classes)[cells]  # (C, 3, K)
    n = len(labels)

    def differences(drawn: np.ndarray) -> np.ndarray:  # (R, C) -> (R, 2)
        drawn = drawn.astype(np.float64)
        true, scores = drawn @ one_hot[:, 0], []
        for model in (1, 2):
            correct = drawn @ (cells[:, 0] == cells[:, model])
            scores.append(np.stack([correct / n, matthews(correct, drawn @ one_hot[:, model], true)], -1))
        return scores[0] - scores[1]
    rng, step = np.random.default_rng(seed), max(1, AT_ONCE // len(cells))
    drawn = np.concatenate([differences(rng.multinomial(n, counts / n, min(step, resamples - start)))
                            for start in range(0, resamples, step)])
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    value = differences(counts[None])[0]
    return {name: {"value": float(value[i]), "interval": [float(low[i]), float(high[i])]}
            for i, name in enumerate(("accuracy", "mcc"))}


def mcnemar(a_right: np.ndarray, b_right: np.ndarray) -> dict:
    """Returns McNemar's exact test (McNemar 1947): of the sentences that only one model has right, are half each one's?

    Args:
        a_right, b_right: (N,) booleans.
    """
    from scipy import stats

    only_a, only_b = int((a_right & ~b_right).sum()), int((b_right & ~a_right).sum())
    p = float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0
    return {"only_a_right": only_a, "only_b_right": only_b, "p_value": p}


def paired_test(a: Path, b: Path, data: Path, resamples: int = 10_000, seed: int = 0) -> dict:
    """Scores two finished runs on one file and tests their difference.

    Args:
        a, b: folders of LoRA or distillation runs (of these the student), of the same task and classes.
        data: in the format of their task.

    Raises:
        UserError: not finished runs, or of different tasks or classes.
    """
    from experiments.evaluate import answers
    from machine.errors import UserError
    from record.folder import read_run
    from train_utils import scores

    (config_a, summary_a), (config_b, summary_b) = read_run(a), read_run(b)
    for what, one, other in (("task", config_a["options"]["task"], config_b["options"]["task"]),
                             ("classes", config_a.get("classes"), config_b.get("classes"))):
        if one != other:
            raise UserError(f"{b}: {what} {_said(other)}, but {a} has {_said(one)}; expected two runs of one task")
    (logits_a, split, classes), (logits_b, other_split, _) = answers(a, data), answers(b, data)
    if split.labels != other_split.labels or len(split) != len(other_split):
        raise UserError(f"{data}: the two runs read different rows of it (their column options differ)")
    import torch

    labels = torch.tensor(split.labels)
    truth, said_a, said_b = labels.numpy(), logits_a.argmax(-1).numpy(), logits_b.argmax(-1).numpy()
    return {"data": str(data), "n": len(split), "a": {"run": str(a), "mode": summary_a["mode"], **scores(logits_a, labels)},
            "b": {"run": str(b), "mode": summary_b["mode"], **scores(logits_b, labels)},
            "difference": paired_bootstrap(truth, said_a, said_b, len(classes), resamples, seed),
            "bootstrap": {"resamples": resamples, "seed": seed, "confidence": CONFIDENCE, "interval": "percentile"},
            "mcnemar": mcnemar(said_a == truth, said_b == truth)}


def _said(value) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def paired_test_text(result: dict) -> str:
    """Returns what `paired_test` found as lines for the terminal."""
    lines = [f"{result['data']}: n {result['n']}"]
    for name in ("a", "b"):
        one = result[name]
        lines.append(f"  {name.upper()} {one['run']} ({one['mode']}): accuracy {one['accuracy']:.4f} (majority "
                     f"{one['majority_accuracy']:.4f}), MCC {one['mcc']:.4f}")
    for key, name in (("mcc", "MCC"), ("accuracy", "accuracy")):
        difference = result["difference"][key]
        lines.append(f"  A minus B, {name}: {difference['value']:+.4f}, 95 % interval [{difference['interval'][0]:+.4f}, "
                     f"{difference['interval'][1]:+.4f}] (paired bootstrap, {result['bootstrap']['resamples']:,} resamples)")
    test = result["mcnemar"]
    lines.append(f"  McNemar: only A right {test['only_a_right']}, only B right {test['only_b_right']}, exact "
                 f"p = {test['p_value']:.3g}")
    return "\n".join(lines)
