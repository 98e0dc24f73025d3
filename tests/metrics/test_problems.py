"""Each problem's loss, scores and counts against transformers, scikit-learn, SciPy and NumPy."""
import copy
import pickle

import numpy as np
import pytest
import torch
from conftest import toy_batch, toy_net
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import f1_score

from machine.errors import UserError
from metrics.problems import PROBLEMS, SINGLE_LABEL, problem_of
from model import TextClassifier

MULTI, NUMBER = PROBLEMS["multi-label"], PROBLEMS["regression"]


def drawn(rows: int = 30, labels: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of several labels at once; the last label is in no row."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, labels, generator=generator)
    truth = (torch.rand(rows, labels, generator=generator) < 0.4).float()
    truth[:, -1] = 0
    return logits, truth


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
@pytest.mark.parametrize("name, outputs, labels", [
    ("single-label", 3, torch.tensor([0, 2, 1, 1])), ("multi-label", 3, torch.eye(4)[:, :3]),
    ("regression", 1, torch.tensor([0.5, -1.0, 4.0, 2.25]))])
def test_logits_and_loss_are_those_of_transformers(architecture, name, outputs, labels):
    problem = PROBLEMS[name]
    net = toy_net(architecture, num_labels=outputs, problem_type=problem.problem_type)
    ids, mask = toy_batch()
    expected = net(input_ids=ids, attention_mask=mask, labels=labels)
    logits = TextClassifier(net).eval()(ids, mask)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert logits.abs().max() > 0.1
    assert problem.loss(logits, labels).item() == pytest.approx(expected.loss.item(), rel=1e-5)


@pytest.mark.parametrize("problem, outputs", [(MULTI, 3), (NUMBER, 1)])
def test_the_whole_loss_of_rows_adds_up_over_batches(problem, outputs):
    logits, labels = drawn(labels=outputs)
    labels = labels if problem is MULTI else torch.randn(30)
    parts = sum(problem.total_loss(logits[rows], labels[rows]) for rows in (slice(0, 7), slice(7, 30)))
    assert float(parts) == pytest.approx(30 * float(problem.loss(logits, labels)), rel=1e-5)


def test_f1_is_scikit_learns_and_so_is_that_of_the_commonest_label():
    logits, truth = drawn()
    found, chosen = MULTI.scores(logits, truth), (1 / (1 + np.exp(-logits.numpy())) > 0.5).astype(int)
    for how in ("micro", "macro"):
        assert found[f"f1_{how}"] == pytest.approx(f1_score(truth, chosen, average=how, zero_division=0))
        assert 0 < found[f"f1_{how}"] < 1
    always = np.zeros_like(chosen)
    always[:, truth.sum(0).argmax()] = 1
    for how in ("micro", "macro"):
        assert found[f"majority_f1_{how}"] == pytest.approx(f1_score(truth, always, average=how, zero_division=0))
    p = 1 / (1 + np.exp(-logits.double().numpy()))
    assert found["loss"] == pytest.approx(-np.mean(truth.numpy() * np.log(p) + (1 - truth.numpy()) * np.log(1 - p)))


def test_counts_give_the_scores_of_each_label_and_of_training():
    logits, truth = drawn()
    counts = sum(MULTI.count(logits[rows], truth[rows]) for rows in (slice(0, 11), slice(11, 30)))
    assert counts.tolist() == MULTI.matrix(logits, truth) and counts.shape == MULTI.no_counts(4).shape
    per_class = MULTI.per_class(counts.tolist(), ("a", "b", "c", "d"))
    expected = f1_score(truth, logits > 0, average=None, zero_division=0)
    assert [per_class[name]["f1"] for name in "abcd"] == pytest.approx(expected.tolist())
    assert [per_class[name]["n"] for name in "abcd"] == truth.sum(0).int().tolist()
    scores = MULTI.train_scores({"loss": 3.0, "cross_entropy": 6.0, "rows": 30}, counts.tolist())
    assert scores == {"loss": 0.1, "cross_entropy": 0.2, "f1_micro": pytest.approx(MULTI.scores(logits, truth)["f1_micro"]),
                      "f1_macro": pytest.approx(expected.mean())}
    assert int(MULTI.right(logits, truth)) == int((MULTI.choose(logits) == truth).all(-1).sum())


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=3, max_size=40))
def test_correlations_are_scipys_and_a_constant_has_none(rows):
    truth, outputs = (torch.tensor(values, dtype=torch.float64) for values in zip(*rows, strict=True))
    found = NUMBER.scores(outputs[:, None], truth)
    assert found["mse"] == found["loss"] == pytest.approx(float(((truth - outputs) ** 2).mean()))
    assert found["mean_mse"] == pytest.approx(float(truth.var(correction=0)), abs=1e-12)
    varies = len(set(truth.tolist())) > 1 and len(set(outputs.tolist())) > 1
    expected = stats.spearmanr(truth, outputs).statistic if varies else 0.0
    assert found["spearman"] == pytest.approx(expected, abs=1e-9)
    assert NUMBER.scores(torch.ones(3, 1), truth[:3])["pearson"] == 0


def test_answers_have_labels_or_a_number():
    found = MULTI.answer(torch.tensor([2.0, -1.0, 1.0]), ("a", "b", "c"))
    assert found["labels"] == ["a", "c"] and found["label"] == "a,c"
    assert found["probability"] == pytest.approx(1 / (1 + np.exp(-1.0)))
    none = MULTI.answer(torch.tensor([-1.0, -2.0]), ("a", "b"))
    assert none["label"] == "none" and none["probability"] == pytest.approx(1 / (1 + np.exp(-1)) / (1 + np.exp(-2)))
    assert NUMBER.answer(torch.tensor([2.5]), ("score",)) == {"label": "2.5000", "score": 2.5}


def test_a_fresh_head_begins_at_the_mean_or_at_the_shares_of_the_labels():
    layer = torch.nn.Linear(2, 1)
    NUMBER.start(layer, [1.0, 2.0, 6.0])
    assert layer.bias.item() == 3
    NUMBER.start(torch.nn.Linear(2, 1, bias=False), [1.0])
    layer = torch.nn.Linear(3, 2)
    MULTI.start(layer, [(1.0, 0.0)] * 6)
    torch.testing.assert_close(layer.bias.sigmoid(), torch.tensor([7 / 8, 1 / 8]))
    before = layer.bias.clone()
    SINGLE_LABEL.start(layer, [0, 1])
    assert torch.equal(layer.bias, before)


def test_a_run_without_a_record_has_one_of_several_classes_and_copies_are_the_same_object():
    assert problem_of({}) is SINGLE_LABEL and problem_of({"problem": "regression"}) is NUMBER
    assert copy.deepcopy(MULTI) is MULTI and pickle.loads(pickle.dumps(NUMBER)) is NUMBER
    with pytest.raises(UserError, match="problem is 'ranking'; expected one of single-label, multi-label, regression"):
        problem_of({"problem": "ranking"})
