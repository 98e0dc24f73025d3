"""The scores against their formulas, the loop against its contract."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sklearn import metrics
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from toy_training import (
    OPTIONS,
    ToyModel,
    assert_same_bits,
    scripted,
    toy_batches,
    toy_data,
    toy_dev,
    weights,
)

from data_utils import collate, split_large
from distillation.losses import kd_objective
from metrics.classification import confusion, per_class, scores
from record.ownership import CHECKPOINT
from train_utils import (
    Checkpointing,
    Data,
    Diverged,
    Hooks,
    compute_logits,
    fit,
    label_loss,
    labels_of,
    lr_factor,
    make_optimizer,
    score_by_loss,
    validate,
)
from training.checkpoints import load_checkpoint, trainable

FAST = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# ---------------------------------------------------------------- scores

@FAST
@given(rows=st.lists(st.tuples(st.integers(0, 1), st.floats(-9, 9, width=32), st.floats(-9, 9, width=32)),
                     min_size=1, max_size=40))
@example(rows=[(1, 0.0, 1.0)] * 5)  # one class, always predicted
@example(rows=[(1, 0.0, 1.0), (0, 0.0, 1.0)])
def test_scores_are_sklearns(rows):
    labels, logits = torch.tensor([row[0] for row in rows]), torch.tensor([row[1:] for row in rows])
    result = scores(logits, labels)
    predicted = logits.numpy().argmax(1)
    assert result["n"] == len(rows)
    assert result["accuracy"] == metrics.accuracy_score(labels, predicted)
    assert result["mcc"] == metrics.matthews_corrcoef(labels, predicted)
    assert result["loss"] == pytest.approx(
        metrics.log_loss(labels, torch.softmax(logits.double(), 1).numpy(), labels=[0, 1]), abs=1e-9)
    assert result["majority_accuracy"] == max(labels.sum().item(), len(rows) - labels.sum().item()) / len(rows)


def test_scores_worked_out_by_hand():
    """6 true, 2 false positives; 1 false, 3 true negatives: MCC = (6·3 - 2·1) / sqrt(8·7·5·4)."""
    labels = torch.tensor([1] * 6 + [0] * 2 + [1] + [0] * 3)
    predicted = torch.tensor([1] * 8 + [0] * 4)
    result = scores(F.one_hot(predicted, 2).float() * math.log(3), labels)
    assert result["accuracy"] == 9 / 12 and result["majority_accuracy"] == 7 / 12
    assert result["mcc"] == pytest.approx(16 / math.sqrt(8 * 7 * 5 * 4))
    assert result["loss"] == pytest.approx(-(9 * math.log(3 / 4) + 3 * math.log(1 / 4)) / 12, abs=1e-6)


def test_always_saying_the_majority_has_mcc_0():
    assert scores(torch.tensor([[0.0, 1.0]] * 10), torch.tensor([1] * 7 + [0] * 3))["mcc"] == 0


def test_predict_keeps_the_splits_order():
    batches, model = toy_batches(23, 4), ToyModel(dropout=0.5).train()
    logits = compute_logits(model, batches)
    assert model.training  # put back
    model.eval()
    for batch in batches:
        for i, row in enumerate(batch.rows.tolist()):
            alone = model(batch.input_ids[i:i + 1], batch.attention_mask[i:i + 1])[0]
            torch.testing.assert_close(logits[row], alone, rtol=0, atol=1e-6)
    labels = {row: label for batch in batches for row, label in zip(batch.rows.tolist(), batch.labels.tolist(), strict=True)}
    assert labels_of(batches).tolist() == [labels[row] for row in range(23)]
    assert len({tuple(row) for row in logits.tolist()}) > 10


def test_all_is_the_score_of_both_splits_together():
    model, dev = ToyModel(3), toy_dev()
    result, matrices = validate(model, dev)
    together = scores(torch.cat([compute_logits(model, split) for split in dev.values()]),
                      torch.cat([labels_of(split) for split in dev.values()]))
    assert result["all"] == together and result["all"]["n"] == 20
    assert (np.array(matrices["in_domain"]) + np.array(matrices["out_of_domain"]) == np.array(matrices["all"])).all()
    assert np.trace(np.array(matrices["all"])) / 20 == pytest.approx(together["accuracy"])
    assert set(validate(model, {"only": dev["in_domain"]})[0]) == {"only"}


@FAST
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_scores_by_class_are_scikit_learns(pairs):
    """A class that is never there or never predicted counts 0, also in macro-F1."""
    truth, predicted = (torch.tensor(values) for values in zip(*pairs, strict=True))
    logits = torch.nn.functional.one_hot(predicted, 4).float()
    result = per_class(confusion(logits, truth), ("a", "b", "c", "d"))
    expected = metrics.precision_recall_fscore_support(truth, predicted, labels=range(4), zero_division=0)
    for key, values in zip(("precision", "recall", "f1", "n"), expected, strict=True):
        assert [row[key] for row in result.values()] == pytest.approx(list(values))
    assert scores(logits, truth)["macro_f1"] == pytest.approx(np.mean(expected[2]))


# ---------------------------------------------------------------- the schedule and the optimiser

@FAST
@given(total=st.integers(1, 500), warmup=st.floats(0, 1), schedule=st.sampled_from(["linear", "cosine", "constant"]))
def test_the_rate_rises_to_its_peak_and_then_decays(total, warmup, schedule):
    factors = [lr_factor(step, total, warmup, schedule) for step in range(total)]
    rising = math.ceil(warmup * total)
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[:rising] == pytest.approx([(i + 1) / rising for i in range(rising)])
    after = factors[rising:]
    if after:
        assert after[0] == 1
        assert all(a == b == 1 if schedule == "constant" else a > b for a, b in zip(after, after[1:], strict=False))
    if len(after) > 100 and schedule != "constant":
        assert after[-1] < 0.02
        assert after[len(after) // 2] == pytest.approx(0.5, abs=0.02)
    if len(after) > 100 and schedule == "cosine":
        assert after[len(after) // 4] == pytest.approx((1 + math.sqrt(0.5)) / 2, abs=0.02)


def test_biases_and_norms_do_not_decay_and_frozen_parameters_do_not_train():
    model = ToyModel()
    decay = {id(p): group["weight_decay"] for group in make_optimizer(model, replace(OPTIONS, weight_decay=0.3)).param_groups
             for p in group["params"]}
    assert {name: decay.get(id(p)) for name, p in model.named_parameters()} == {
        "net.embedding.weight": 0.3, "net.frozen.weight": None, "net.frozen.bias": None, "net.norm.weight": 0,
        "net.norm.bias": 0, "net.score.weight": 0.3, "net.score.bias": 0}


def test_the_head_has_a_rate_of_its_own_if_asked():
    def peaks(options):
        model = ToyModel()
        by_id = {id(p): group["peak"] for group in make_optimizer(model, options).param_groups for p in group["params"]}
        return {name: by_id[id(p)] for name, p in trainable(model).items()}

    assert set(peaks(OPTIONS).values()) == {0.05}
    assert peaks(replace(OPTIONS, head_lr=0.5)) == {name: 0.5 if "score" in name else 0.05 for name in peaks(OPTIONS)}


# ---------------------------------------------------------------- the loop

def steps_of(batches, objective, options, model=None):
    """Gradients and rates that each optimiser step of a training saw, and the model it left."""
    model, seen = model or ToyModel(), []

    def look(optimizer, *_):
        seen.append(({name: p.grad.clone() for name, p in trainable(model).items()},
                     [group["lr"] for group in optimizer.param_groups]))

    hook = register_optimizer_step_pre_hook(look)
    try:
        fit(model, Data(batches, toy_dev()), objective, options)
    finally:
        hook.remove()
    return seen, model


@pytest.mark.parametrize("kd", [False, True])
def test_accumulation_equals_one_large_batch(kd):
    """Batches of unlike sizes: an average of averages would not do."""
    ids = [[row % 20, row * 7 % 20] for row in range(8)]
    labels = [0, 1, 1, 0, 1, 1, 1, 0]
    large = [collate(ids, labels, list(range(8)), 0)]
    small = [collate(ids, labels, list(range(3)), 0), collate(ids, labels, list(range(3, 8)), 0)]
    objective = kd_objective(torch.randn(8, 2, generator=torch.Generator().manual_seed(1)), 2.0, 0.7) if kd \
        else label_loss()
    options = replace(OPTIONS, epochs=3, clip=0.0)
    whole, one = steps_of(large, objective, options)
    parts, two = steps_of(small, objective, replace(options, accumulate=2))
    assert len(whole) == len(parts) == 3
    for (expected, _), (gradients, _) in zip(whole, parts, strict=True):
        assert max(value.abs().max() for value in expected.values()) > 1e-2
        for name in expected:
            torch.testing.assert_close(gradients[name], expected[name], rtol=0, atol=1e-6)
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(two)[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kd", [False, True])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(kd):
    ids = [[row % 20, row * 7 % 20, row % 3][:2 + (row > 15)] for row in range(22)]
    labels = [row % 3 % 2 for row in range(22)]
    groups = ([0, 1], [2, 3], [4, 5], [6, 7], [8, 9], list(range(10, 22)))
    teacher = torch.randn(22, 2, generator=torch.Generator().manual_seed(1))
    objective = kd_objective(teacher, 2.0, 0.7) if kd else label_loss()
    found, sizes = [], []

    def look(logits, batch):
        sizes.append(len(logits))
        return objective(logits, batch)

    for prepare in (split_large, list):
        batches = prepare([collate(ids, labels, rows, 0) for rows in groups])
        seen, model = steps_of(batches, look, replace(OPTIONS, epochs=1, clip=0.0))
        found.append((seen, weights(model)))
    assert sorted(sizes) == [2] * 10 + [6, 6, 12]  # of 36 tokens, the mean being 56 / 6
    for (ours, _), (theirs, _) in zip(found[0][0], found[1][0], strict=True):
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6)
    for name, value in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], value, rtol=0, atol=1e-6)


def test_a_last_group_of_fewer_batches_is_a_step_too():
    seen, _ = steps_of(toy_batches(20, 4), label_loss(), replace(OPTIONS, epochs=1, accumulate=2))
    assert len(seen) == 3  # 5 batches


def test_the_gradient_is_clipped_to_the_norm_asked_for():
    def norms(clip):
        seen, _ = steps_of(toy_batches(), lambda logits, batch: 100 * F.cross_entropy(logits, batch.labels),
                           replace(OPTIONS, clip=clip))
        return [math.sqrt(sum(value.square().sum().item() for value in gradients.values())) for gradients, _ in seen]

    assert min(norms(0.0)) > 1  # 0: no clipping
    assert norms(0.5) == pytest.approx([0.5] * 10, rel=1e-4)


def test_each_step_has_its_rate_and_the_run_ends_near_0():
    seen, _ = steps_of(toy_batches(80, 4), label_loss(), replace(OPTIONS, epochs=3, warmup=0.1))
    assert [rates[0] for _, rates in seen] == [0.05 * lr_factor(i, 60, 0.1, "linear") for i in range(60)]
    assert seen[-1][1][0] < 0.05 * 0.02


def test_training_learns_and_leaves_frozen_parameters_alone():
    model = ToyModel()
    before = weights(model)
    progress = fit(model, toy_data(), label_loss(), replace(OPTIONS, epochs=15))
    assert progress.history[-1]["train"]["loss"] < 0.5 * progress.history[0]["train"]["loss"]
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert moved == set(trainable(model))


def test_an_epochs_line_counts_every_row_and_token_once():
    model, batches = ToyModel(), toy_batches(22, 4)
    seen = []

    def objective(logits, batch):
        seen.append((logits.detach(), batch))
        return F.cross_entropy(logits, batch.labels)

    line = fit(model, Data(batches, toy_dev()), objective, replace(OPTIONS, epochs=1, accumulate=2)).history[0]
    expected = scores(torch.cat([logits for logits, _ in seen]), torch.cat([batch.labels for _, batch in seen]))
    assert line["train"] == {"loss": pytest.approx(expected["loss"]), "cross_entropy": pytest.approx(expected["loss"]),
                             "accuracy": expected["accuracy"], "mcc": pytest.approx(expected["mcc"])}
    assert line["tokens"] == sum(batch.tokens for batch in batches)


def test_the_best_epoch_is_the_select_splits_by_mcc_then_loss_and_its_weights_stay(monkeypatch):
    scripted(monkeypatch, [(0.1, 0.1), (0.5, 0.9), (0.5, 0.7), (0.5, 0.8), (0.4, 0.1), (0.5, 0.7)])
    model, after = ToyModel(), []
    progress = fit(model, toy_data(), label_loss(), replace(OPTIONS, epochs=6),
                   hooks=Hooks(on_epoch=lambda _: after.append(weights(model))))
    assert progress.best_epoch == 3  # of equals the first
    assert_same_bits(weights(model), after[2])
    assert not torch.equal(after[2]["net.score.weight"], after[5]["net.score.weight"])


def test_patience_stops_after_so_many_epochs_without_a_better_one(monkeypatch):
    script = [(0.1, 1.0), (0.2, 1.0), (0.2, 1.0), (0.1, 0.5), (0.9, 0.1)]
    scripted(monkeypatch, script)
    progress = fit(ToyModel(), toy_data(), label_loss(), replace(OPTIONS, epochs=5, patience=2))
    assert (len(progress.history), progress.best_epoch) == (4, 2)
    scripted(monkeypatch, script)
    assert len(fit(ToyModel(), toy_data(), label_loss(), replace(OPTIONS, epochs=5)).history) == 5


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_good_checkpoint(tmp_path, poison):
    calls = []

    def objective(logits, batch):
        calls.append(1)
        return F.cross_entropy(logits, batch.labels) + (poison if len(calls) == 8 else 0)

    with pytest.raises(Diverged, match="step 8 .epoch 2., learning rate .*lower --lr"):
        fit(ToyModel(), toy_data(), objective, OPTIONS, Checkpointing(tmp_path))
    model = ToyModel(9)
    progress, _ = load_checkpoint(tmp_path / CHECKPOINT, model, make_optimizer(model, OPTIONS))
    assert (progress.epoch, progress.step) == (2, 5)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_gradient_that_is_not_finite_changes_no_weight():
    model = ToyModel()
    before = weights(model)
    with pytest.raises(Diverged, match="gradient norm"):  # the loss is finite, its derivative at 0 is not
        fit(model, toy_data(), lambda logits, _: (logits * 0).sum().abs().sqrt(), OPTIONS)
    assert_same_bits(weights(model), before)


# ---------------------------------------------------------------- values that are not finite after the last step

class Failing(ToyModel):
    """Answers NaN in evaluation from a given call on. A parameter of its own computes nothing, and is saved."""

    def __init__(self, fails_at: float = math.inf):
        super().__init__()
        self.calls, self.fails_at = 0, fails_at
        self.spare = nn.Parameter(torch.ones(3))

    def forward(self, input_ids, attention_mask):
        logits = super().forward(input_ids, attention_mask)
        self.calls += not self.training
        return logits * (math.nan if not self.training and self.calls >= self.fails_at else 1)


def finite_everywhere(value) -> bool:
    """Returns whether no number in a nesting of lists and dictionaries is NaN or infinite."""
    if isinstance(value, dict):
        return all(finite_everywhere(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(finite_everywhere(item) for item in value)
    return not isinstance(value, float) or math.isfinite(value)


def state_and_history(folder, model):
    """Loads a checkpoint; returns its progress and whether all of it is finite."""
    progress, best = load_checkpoint(folder / CHECKPOINT, model, make_optimizer(model, OPTIONS))
    tensors = [*best.values(), *trainable(model).values()]
    return progress, all(bool(torch.isfinite(one).all()) for one in tensors) and finite_everywhere(progress.history)


@pytest.mark.parametrize("epoch, calls", [(1, 1), (1, 4), (2, 6)])  # five batches in each validation
def test_a_validation_that_is_not_finite_ends_the_training_and_reaches_no_checkpoint(tmp_path, epoch, calls):
    reported = []
    with pytest.raises(Diverged, match=f"validation loss nan on .* after step {5 * epoch} .epoch {epoch}.*lower --lr"):
        fit(Failing(calls), toy_data(), label_loss(), OPTIONS, Checkpointing(tmp_path),
            Hooks(on_epoch=lambda history: reported.append(len(history))))
    assert reported == list(range(1, epoch)) and (tmp_path / CHECKPOINT).exists() == (epoch > 1)
    whole, resumed = Failing(), Failing()
    fit(whole, toy_data(), label_loss(), OPTIONS)
    if epoch > 1:
        assert state_and_history(tmp_path, Failing())[1]
        fit(resumed, toy_data(), label_loss(), OPTIONS, Checkpointing(tmp_path, resume=True))
        assert_same_bits(weights(resumed), weights(whole))


def test_a_validation_by_loss_alone_that_is_not_finite_ends_the_training(tmp_path):
    def objective(logits, batch):
        return F.cross_entropy(logits, batch.labels)

    with pytest.raises(Diverged, match="validation loss nan on in_domain after step 5"):
        fit(Failing(1), toy_data(), objective, OPTIONS, Checkpointing(tmp_path), Hooks(score=score_by_loss(objective)))
    assert not (tmp_path / CHECKPOINT).exists()


@pytest.mark.parametrize("step, options, left_at", [
    (10, OPTIONS, 5), (5, OPTIONS, None), (7, replace(OPTIONS, save_steps=1), 6), (10, replace(OPTIONS, ema=0.5), 5)])
def test_a_weight_that_the_last_update_broke_is_in_no_checkpoint(tmp_path, step, options, left_at):
    """Loss, gradient and validation are finite all the same."""
    model, steps = Failing(), []

    def break_weight(*_):
        steps.append(1)
        if len(steps) == step:
            with torch.no_grad():
                model.spare[1] = math.inf

    hook = register_optimizer_step_post_hook(break_weight)
    try:
        with pytest.raises(Diverged, match=f"spare is not finite after step {step} "):
            fit(model, toy_data(), label_loss(), options, Checkpointing(tmp_path))
    finally:
        hook.remove()
    assert (tmp_path / CHECKPOINT).exists() == (left_at is not None)
    if left_at is not None:
        progress, good = state_and_history(tmp_path, Failing())
        assert good and progress.step == left_at
