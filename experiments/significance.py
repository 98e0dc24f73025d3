"""Tests significance (the mode `test`): intervals over seeds, paired tests over the sentences of one file.

    python run.py test runs/LoRA-12345 runs/distil-12345 --data FILE

An interval over seeds tells whether a method is better, a paired test whether one set of weights is better than another.
"""
from __future__ import annotations

import json
import math
import statistics
import warnings
from pathlib import Path

import numpy as np

from experiments import paired

CONFIDENCE = 0.95
SCORES = ("accuracy", "mcc", "macro_f1", "f1_micro", "f1_macro", "pearson", "spearman", "mse")
AT_ONCE = 10_000_000  # counts of a bootstrap held in memory at a time: 80 MB


# ---------------------------------------------------------------- over seeds

def spread(values: list[float]) -> dict:
    """Returns mean, sample standard deviation (n - 1) and 95 % interval of the mean; None for both of a single value.

    The interval is mean ± t * sd / √n, with t the 0.975 quantile of Student's t with n - 1 degrees of freedom.
    """
    # Imported late: SciPy's statistics take half a second, and most modes never need them.
    from scipy import stats

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

    Returns:
        best and last: split -> score -> `spread`; best_epoch and last_epoch: `spread`.
    """
    found = {}
    for which, key in (("best", "validation"), ("last", "last_validation")):
        if key in summaries[0]:
            found[which] = {}
            for split in summaries[0][key]:
                found[which][split] = _spreads([summary[key][split] for summary in summaries])
        if f"{which}_epoch" in summaries[0]:
            found[f"{which}_epoch"] = spread([summary[f"{which}_epoch"] for summary in summaries])
    return found


def majority(validation: dict[str, dict]) -> dict[str, dict]:
    """Returns the entry of studies with the accuracy of always saying the commonest class; none without classes."""
    found = {split: values["majority_accuracy"] for split, values in validation.items() if "majority_accuracy" in values}
    return {"majority_accuracy": found} if found else {}


def _spreads(scores: list[dict]) -> dict[str, dict]:
    """Returns the spread of every score that all seeds have."""
    found = {}
    for name in SCORES:
        # An older run recorded no macro-F1.
        if all(name in one for one in scores):
            found[name] = spread([one[name] for one in scores])
    return found


def paired_differences(one: dict, other: dict) -> dict:
    """Returns the spread of `one` minus `other`, paired by seed, so that the seed's share in both cancels.

    Args:
        one, other: results of `over_seeds` with their `seeds`; a seed of only one of them is left out.
    """
    # A run that diverged has no scores: its seed is on one side only.
    seeds = [seed for seed in one["seeds"] if seed in other["seeds"]]
    found = {"seeds": seeds}
    for which in ("best", "last"):
        if seeds and which in one and which in other:
            found[which] = {}
            for split, scores in one[which].items():
                theirs = other[which][split]
                found[which][split] = {
                    name: spread(_seed_differences(one["seeds"], scores[name], other["seeds"], theirs[name]))
                    for name in scores if name in theirs}
    return found


def _seed_differences(seeds: list[str], score: dict, other_seeds: list[str], other: dict) -> list[float]:
    """Returns the differences of a score's values over the seeds of both sides, in the order of the first side."""
    by_seed = dict(zip(other_seeds, other["values"], strict=True))
    return [value - by_seed[seed] for seed, value in zip(seeds, score["values"], strict=True) if seed in by_seed]


# ---------------------------------------------------------------- over the sentences of a file

def matthews(correct: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Returns Matthews correlation for K classes (Gorodkin 2004) from counts; 0 where it is not defined.

    Args:
        correct: (...) number of rows predicted right.
        predicted, true: (..., K) number of rows of each class, as predicted and as labelled.

    Returns:
        (...) from -1 to 1.
    """
    n = true.sum(-1)
    variances = (n ** 2 - (predicted ** 2).sum(-1)) * (n ** 2 - (true ** 2).sum(-1))
    covariance = correct * n - (predicted * true).sum(-1)
    # A variance is 0 if all rows are of one class: the ratio would be 0 / 0.
    return np.divide(covariance, np.sqrt(variances), out=np.zeros(np.shape(variances)), where=variances > 0)


def paired_bootstrap(labels: np.ndarray, a: np.ndarray, b: np.ndarray, classes: int, resamples: int = 10_000,
                     seed: int = 0) -> dict[str, dict]:
    """Returns the differences a - b in accuracy and MCC, with their 95 % percentile intervals (Efron & Tibshirani 1993).

    A resample draws N sentences with replacement, both models' answers together.

    Args:
        labels, a, b: (N,) class indices: the truth and two models' predictions.
        classes: K.

    Returns:
        accuracy and mcc: {value, interval [low, high]}.
    """
    # Sentences with the same label and the same two answers count alike. A resample is then one multinomial sample of
    # the counts of such cells, at most K^3 numbers instead of N.
    cells, counts = np.unique(np.stack([labels, a, b], 1), axis=0, return_counts=True)  # (C, 3), (C,)
    one_hot = np.eye(classes)[cells]  # (C, 3, K)
    n = len(labels)

    def differences(resampled: np.ndarray) -> np.ndarray:  # counts (R, C) -> (R, 2)
        resampled = resampled.astype(np.float64)
        true, scores = resampled @ one_hot[:, 0], []
        for model in (1, 2):
            correct = resampled @ (cells[:, 0] == cells[:, model])
            scores.append(np.stack([correct / n, matthews(correct, resampled @ one_hot[:, model], true)], -1))
        return scores[0] - scores[1]

    # In parts, so that memory stays bounded; the generator gives the same resamples however they are cut.
    rng, step = np.random.default_rng(seed), max(1, AT_ONCE // len(cells))
    parts = [differences(rng.multinomial(n, counts / n, min(step, resamples - start)))
             for start in range(0, resamples, step)]
    low, high = np.quantile(np.concatenate(parts), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    value = differences(counts[None])[0]
    return {name: {"value": float(value[i]), "interval": [float(low[i]), float(high[i])]}
            for i, name in enumerate(("accuracy", "mcc"))}


def mcnemar(a_right: np.ndarray, b_right: np.ndarray) -> dict:
    """Returns McNemar's exact test (McNemar 1947) of two models' answers to the same sentences.

    The null hypothesis: of the sentences that only one model has right, each model has half.

    Args:
        a_right, b_right: (N,) booleans.

    Returns:
        only_a_right, only_b_right (counts) and p_value, of the two-sided binomial test.
    """
    from scipy import stats  # late, as above

    only_a, only_b = int((a_right & ~b_right).sum()), int((b_right & ~a_right).sum())
    p = float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0
    return {"only_a_right": only_a, "only_b_right": only_b, "p_value": p}


def paired_test(a: Path, b: Path, data: Path, resamples: int = 10_000, seed: int = 0,
                allow_training_data: bool = False) -> dict:
    """Scores two finished runs on one file and tests their difference.

    Args:
        a, b: folders of LoRA or distillation runs (the student of the latter), of the same task and classes.
        data: in the format of their task.
        allow_training_data: score a file that one of them was trained on, with a warning.

    Raises:
        UserError: not finished runs, of different tasks or classes, or a file that one of them was trained on.
    """
    # Imported late: the intervals over seeds do without PyTorch.
    import torch

    from data_utils import label_array
    from experiments.evaluate import score_rows
    from machine.errors import UserError
    from metrics.problems import problem_of
    from record.folder import read_run

    (config_a, summary_a), (config_b, summary_b) = read_run(a), read_run(b)
    for name, one, other in (("task", config_a["options"]["task"], config_b["options"]["task"]),
                             ("problem", problem_of(config_a).name, problem_of(config_b).name),
                             ("classes", config_a.get("classes"), config_b.get("classes"))):
        if one != other:
            raise UserError(f"{b}: {name} {_in_words(other)}, but {a} has {_in_words(one)}; expected two runs of one task")
    rows_a, rows_b = (score_rows(run, data, allow_training_data) for run in (a, b))
    if rows_a.split.labels != rows_b.split.labels:
        raise UserError(f"{data}: the two runs read different rows of it (their column options differ)")
    for note in dict.fromkeys([*rows_a.notes, *rows_b.notes]):
        warnings.warn(note, stacklevel=2)
    labels, problem = torch.from_numpy(label_array(rows_a.split.labels)), rows_a.problem
    truth, predicted_a, predicted_b = (values.numpy() for values in (
        labels, problem.choose(rows_a.logits), problem.choose(rows_b.logits)))
    found = {"data": str(data), "n": len(labels),
             "a": {"run": str(a), "mode": summary_a["mode"], "trained_on": rows_a.trained_on,
                   **problem.scores(rows_a.logits, labels)},
             "b": {"run": str(b), "mode": summary_b["mode"], "trained_on": rows_b.trained_on,
                   **problem.scores(rows_b.logits, labels)}}
    bootstrap = {"resamples": resamples, "seed": seed, "confidence": CONFIDENCE, "interval": "percentile"}
    # McNemar's test is about answers that are right or wrong; a resample of one class is a few counts.
    if problem.name in paired.SCORES:
        return {**found, "bootstrap": bootstrap, "difference": paired.paired_scores(
            problem.name, truth.astype(float), predicted_a.astype(float), predicted_b.astype(float), resamples, seed)}
    return {**found, "difference": paired_bootstrap(truth, predicted_a, predicted_b, len(rows_a.classes), resamples, seed),
            "bootstrap": bootstrap, "mcnemar": mcnemar(predicted_a == truth, predicted_b == truth)}


def _in_words(value) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def paired_test_text(result: dict) -> str:
    """Returns the result of `paired_test` as lines for the terminal."""
    from metrics.problems import SHOWN  # late, as above

    lines, headings = [f"{result['data']}: n {result['n']}"], {"mcc": "MCC", **SHOWN}
    for name in ("a", "b"):
        one = result[name]
        scores = [f"{headings[key]} {one[key]:.4f}" + (f" (majority {one['majority_accuracy']:.4f})" if key == "accuracy"
                                                       else "") for key in SHOWN if key in result["difference"]]
        lines.append(f"  {name.upper()} {one['run']} ({one['mode']}): {', '.join(scores)}")
    for key, name in headings.items():
        if key not in result["difference"]:
            continue
        difference = result["difference"][key]
        lines.append(f"  A minus B, {name}: {difference['value']:+.4f}, 95 % interval [{difference['interval'][0]:+.4f}, "
                     f"{difference['interval'][1]:+.4f}] (paired bootstrap, {result['bootstrap']['resamples']:,} resamples)")
    if test := result.get("mcnemar"):
        lines.append(f"  McNemar: only A right {test['only_a_right']}, only B right {test['only_b_right']}, exact "
                     f"p = {test['p_value']:.3g}")
    return "\n".join(lines)


# ---------------------------------------------------------------- the command line


def main(args) -> None:
    """Prints the test of the difference of two runs on a file."""
    result = paired_test(args.run, args.other, args.data, args.resamples, args.seed, args.allow_training_data)
    print(json.dumps(result) if args.json else paired_test_text(result))
