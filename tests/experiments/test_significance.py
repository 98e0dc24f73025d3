"""Intervals over seeds and paired tests over sentences, held to SciPy, scikit-learn and values written out."""
import json
import math

import numpy as np
import pytest
import toy
from scipy import stats
from sklearn.metrics import accuracy_score, matthews_corrcoef

from experiments import significance


def answers(n: int = 300, classes: int = 2, seed: int = 0):
    """Labels and two models' predictions, the first right more often."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    return labels, *(np.where(rng.random(n) < share, labels, rng.integers(0, classes, n)) for share in (0.6, 0.3))


# ---------------------------------------------------------------- over seeds

def test_a_spread_is_numpys_and_its_interval_scipys():
    values = [0.41, 0.47, 0.36, 0.52]
    found = significance.spread(values)
    assert found["mean"] == pytest.approx(np.mean(values)) and found["sd"] == pytest.approx(np.std(values, ddof=1))
    assert found["interval"] == pytest.approx(stats.t.interval(0.95, 3, np.mean(values), stats.sem(values)))
    assert found["interval"][1] - found["mean"] == pytest.approx(3.182446 * np.std(values, ddof=1) / 2)  # a table of t
    assert significance.spread([0.4]) == {"mean": 0.4, "sd": None, "interval": None, "values": [0.4]}


def test_differences_are_paired_by_seed_and_a_seed_that_one_side_lacks_is_left_out():
    def row(seeds, values):
        summaries = [{"best_epoch": 1, "validation": {"dev": {"accuracy": v + 0.1, "mcc": v, "n": 3}}} for v in values]
        return {"seeds": seeds, **significance.over_seeds(summaries)}
    one, other = row(["1", "2", "3"], [0.5, 0.7, 0.2]), row(["3", "1", "4"], [0.1, 0.3, 0.9])
    assert one["best"]["dev"].keys() == {"accuracy", "mcc"} and "last" not in one
    found = significance.paired_differences(one, other)
    assert found["seeds"] == ["1", "3"]
    assert found["best"]["dev"]["mcc"]["values"] == pytest.approx([0.5 - 0.3, 0.2 - 0.1])
    assert significance.paired_differences(one, row(["9"], [0.1])) == {"seeds": []}


# ---------------------------------------------------------------- over sentences

@pytest.mark.parametrize("classes", [2, 3, 7])
def test_matthews_is_scikit_learns(classes):
    labels, a, b = answers(classes=classes)
    for said in (a, b, np.zeros_like(labels)):
        eye = np.eye(classes)
        found = significance.matthews((said == labels).sum(), eye[said].sum(0), eye[labels].sum(0))
        assert found == pytest.approx(matthews_corrcoef(labels, said), abs=1e-12)


def test_a_bootstrap_is_that_of_resampled_sentences():
    """Against sentences drawn one by one, and MCC as the Pearson correlation that it is of two classes; both are random."""
    labels, a, b = answers(200)
    b = np.where(np.random.default_rng(5).random(200) < 0.7, a, b)  # models that err on the same sentences
    rng = np.random.default_rng(2)
    i, j = rng.integers(0, 200, (2, 3000, 200))

    def pearson(x, y):  # (R, N), (R, N) -> (R,)
        return ((x - x.mean(1, keepdims=True)) * (y - y.mean(1, keepdims=True))).mean(1) / (x.std(1) * y.std(1))

    found = significance.paired_bootstrap(labels, a, b, 2, 4000, seed=1)
    for name, score, theirs in (("accuracy", lambda x, y: (x == y).mean(1), accuracy_score),
                                ("mcc", pearson, matthews_corrcoef)):
        assert found[name]["value"] == pytest.approx(theirs(labels, a) - theirs(labels, b), abs=1e-12)
        slow = np.quantile(score(labels[i], a[i]) - score(labels[i], b[i]), [0.025, 0.975])
        assert found[name]["interval"] == pytest.approx(slow, abs=0.07 * np.ptp(slow))
        unpaired = np.quantile(score(labels[i], a[i]) - score(labels[j], b[j]), [0.025, 0.975])
        assert np.ptp(found[name]["interval"]) < 0.8 * np.ptp(unpaired)


def test_a_bootstrap_follows_its_seed_and_not_how_much_is_held_at_a_time(monkeypatch):
    case = answers()
    found = significance.paired_bootstrap(*case, 2, 500, seed=3)
    assert significance.paired_bootstrap(*case, 2, 500, seed=4) != found
    monkeypatch.setattr(significance, "AT_ONCE", 100)
    assert significance.paired_bootstrap(*case, 2, 500, seed=3) == found


@pytest.mark.parametrize("only_a, only_b, p", [(5, 1, 14 / 64), (1, 5, 14 / 64), (10, 0, 2 / 1024), (3, 3, 1), (0, 0, 1)])
def test_mcnemars_exact_p_is_the_binomial_sum_written_out(only_a, only_b, p):
    a = np.array([True] * only_a + [False] * only_b + [True, False] * 20)
    b = np.array([False] * only_a + [True] * only_b + [True, False] * 20)
    found = significance.mcnemar(a, b)
    assert (found["only_a_right"], found["only_b_right"]) == (only_a, only_b)
    assert found["p_value"] == pytest.approx(p)
    n, k = only_a + only_b, min(only_a, only_b)
    assert found["p_value"] == pytest.approx(min(1, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2 ** n))


# ---------------------------------------------------------------- the command

def test_two_runs_are_tested_on_one_file(work, distilled_run, capsys):
    data = work / "cola" / "in_domain_dev.tsv"
    scored = []
    for run in (work / "LoRA", distilled_run):
        assert toy.main("eval", run, "--data", data, "--json") == 0
        scored.append(json.loads(capsys.readouterr().out))
    assert toy.main("test", work / "LoRA", distilled_run, "--data", data, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    for key in ("accuracy", "mcc"):
        assert [found[side][key] for side in "ab"] == [one[key] for one in scored]
        low, high = found["difference"][key]["interval"]
        assert found["difference"][key]["value"] == pytest.approx(scored[0][key] - scored[1][key])
        assert low < found["difference"][key]["value"] < high
    assert found["n"] == 12 and found["bootstrap"]["resamples"] == 10_000
    n = found["mcnemar"]["only_a_right"] - found["mcnemar"]["only_b_right"]
    assert n / 12 == pytest.approx(found["difference"]["accuracy"]["value"])
    assert toy.main("test", work / "LoRA", work / "LoRA", "--data", data) == 0
    said = capsys.readouterr().out
    assert "MCC: +0.0000, 95 % interval [+0.0000, +0.0000]" in said and "p = 1" in said


def test_runs_of_different_tasks_or_classes_are_one_line(work, tmp_path, capsys):
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in toy.toy_rows(40, 3)))
    assert toy.main("LoRA", "12345", "--model", work / "model", "--data", tmp_path / "train.csv", "--epochs", 1, "--method",
                    "head", "--out", tmp_path / "csv", "--no-plots") == 0
    capsys.readouterr()
    assert toy.main("test", work / "LoRA", tmp_path / "csv", "--data", work / "cola" / "in_domain_dev.tsv") == 2
    assert capsys.readouterr().err == (
        f"run.py: {tmp_path / 'csv'}: task csv, but {work / 'LoRA'} has cola; expected two runs of one task\n")
    assert toy.main("test", work / "LoRA", tmp_path, "--data", work / "cola" / "in_domain_dev.tsv") == 2
    assert capsys.readouterr().err.startswith(f"run.py: {tmp_path}: not a run's folder")
