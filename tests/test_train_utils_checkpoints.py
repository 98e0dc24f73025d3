"""Checkpoints: a stopped training ends in the same bits; every damaged byte is refused or harmless."""
import itertools
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from toy_training import (
    OPTIONS,
    ToyModel,
    assert_same_bits,
    scripted,
    toy_batches,
    toy_data,
    weights,
    without_times,
)

import train_utils
from machine.errors import UserError
from machine.signals import Interrupted
from metrics.problems import PROBLEMS
from record.ownership import CHECKPOINT
from train_utils import Checkpointing, Hooks, fit, label_loss, make_optimizer
from training.checkpoints import Progress, load_checkpoint, save_checkpoint, trainable

FAST = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DROPOUT = replace(OPTIONS, epochs=3, weight_decay=0.1, accumulate=2, schedule="cosine")  # 3 steps an epoch


def train(folder=None, stop_at=None, resume=False, options=DROPOUT):
    """A toy training with dropout; a resumed one starts from other weights and another random state."""
    model = ToyModel(99 if resume else 0, dropout=0.4)
    torch.manual_seed(99 if resume else 1)
    calls = []

    def stop():
        calls.append(1)
        return 15 if len(calls) == stop_at else None

    progress = fit(model, toy_data(), label_loss(), options, folder and Checkpointing(folder, resume=resume),
                   Hooks(stop=stop))
    return weights(model), progress


@pytest.fixture(scope="module")
def uninterrupted():
    return train()


def assert_ends_alike(run, uninterrupted):
    assert_same_bits(run[0], uninterrupted[0])
    assert without_times(run[1].history) == without_times(uninterrupted[1].history)
    assert run[1].best_epoch == uninterrupted[1].best_epoch
    assert tuple(run[1].best_score) == uninterrupted[1].best_score


@pytest.mark.parametrize("step", range(1, 10))
def test_a_training_stopped_after_any_step_and_resumed_ends_in_the_same_bits(tmp_path, uninterrupted, step):
    """Invariant 12, dropout on."""
    with pytest.raises(Interrupted) as stopped:
        train(tmp_path, stop_at=step)
    assert stopped.value.signal == 15
    assert_ends_alike(train(tmp_path, resume=True), uninterrupted)


def test_a_training_stopped_after_every_step_ends_in_the_same_bits(tmp_path, uninterrupted):
    for step in range(9):
        with pytest.raises(Interrupted):
            train(tmp_path, stop_at=1, resume=step > 0)
    assert_ends_alike(train(tmp_path, resume=True), uninterrupted)


def test_the_random_state_matters_to_what_is_compared(uninterrupted):
    """Without it the tests above would pass for a checkpoint that forgets it."""
    torch.manual_seed(2)
    model = ToyModel(0, dropout=0.4)
    torch.manual_seed(2)
    fit(model, toy_data(), label_loss(), DROPOUT)
    assert not torch.equal(weights(model)["net.score.weight"], uninterrupted[0]["net.score.weight"])


def test_resuming_a_finished_training_repeats_nothing(tmp_path, uninterrupted):
    train(tmp_path)
    assert_ends_alike(train(tmp_path, stop_at=1, resume=True), uninterrupted)


def test_a_patient_training_stays_stopped_when_resumed(tmp_path, monkeypatch):
    options = replace(DROPOUT, patience=1)
    scripted(monkeypatch, [(0.5, 1.0), (0.4, 1.0)])  # a third validation would be an error
    assert len(train(tmp_path, options=options)[1].history) == 2
    assert len(train(tmp_path, options=options, resume=True)[1].history) == 2


def test_checkpoints_within_an_epoch_come_as_often_as_asked(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(train_utils, "save_checkpoint", lambda path, model, optimizer, progress, best: saved.append(
        (progress.epoch, progress.step_in_epoch)))
    train(tmp_path)
    assert saved == [(2, 0), (3, 0), (4, 0)]
    saved.clear()
    train(tmp_path, options=replace(DROPOUT, save_every=1e-9))
    assert saved == [(1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (3, 0), (3, 1), (3, 2), (3, 3), (4, 0)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint in the middle of the second epoch, its bytes, and what it holds."""
    folder = tmp_path_factory.mktemp("checkpoint")
    with pytest.raises(Interrupted):
        train(folder, stop_at=5)
    path = folder / CHECKPOINT
    return path, path.read_bytes(), state_of(path)


def state_of(path) -> tuple[dict[str, torch.Tensor], dict]:
    """Everything that a load puts into model, optimiser and generator, and the progress."""
    model = ToyModel(99)
    optimizer = make_optimizer(model, DROPOUT)
    progress, best = load_checkpoint(path, model, optimizer)
    state = {"rng": torch.get_rng_state(), **weights(model), **{f"best.{name}": value for name, value in best.items()}}
    for name, p in trainable(model).items():
        state.update({f"{key}.{name}": value for key, value in optimizer.state[p].items()})
    return state, vars(progress)


def test_a_checkpoint_brings_back_all_that_it_was_given(tmp_path):
    model = ToyModel(1, dropout=0.4)
    optimizer = make_optimizer(model, OPTIONS)
    for batch in toy_batches()[:2]:
        label_loss()(model(batch.input_ids, batch.attention_mask), batch).backward()
        optimizer.step()
    best = {name: p.detach() + 1 for name, p in trainable(model).items()}
    progress = Progress(epoch=2, step_in_epoch=1, step=6, best_epoch=1, best_score=(0.1, -0.30000000000000004),
                        sums={"loss": 1 / 3}, confusion=[[1, 2], [3, 4]], history=[{"epoch": 1}])
    save_checkpoint(tmp_path / "c", model, optimizer, progress, best)
    expected = torch.rand(3)
    state, loaded = state_of(tmp_path / "c")
    torch.set_rng_state(state["rng"])
    assert torch.equal(torch.rand(3), expected)
    assert json.loads(json.dumps(loaded)) == json.loads(json.dumps(vars(progress)))
    for name, p in trainable(model).items():
        assert torch.equal(state[name], p) and torch.equal(state[f"best.{name}"], best[name])
        for key, value in optimizer.state[p].items():
            assert torch.equal(state[f"{key}.{name}"], value)


def refused_or_harmless(checkpoint, data: bytes) -> bool:
    path, _, (state, progress) = checkpoint
    damaged = path.with_name("damaged")
    damaged.write_bytes(data)
    try:
        again, loaded = state_of(damaged)
    except UserError as error:
        assert str(damaged) in str(error) and len(str(error).splitlines()) == 1
        return True
    assert_same_bits(again, state)
    assert loaded == progress
    return False


@settings(FAST, max_examples=400)
@given(data=st.data())
def test_a_flipped_bit_anywhere_in_a_checkpoint_is_refused_or_harmless(checkpoint, data):
    damaged = bytearray(checkpoint[1])
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    refused_or_harmless(checkpoint, bytes(damaged))


def test_every_flipped_bit_of_the_tensors_is_refused(checkpoint):
    """The bytes that no format check sees: the checksum must."""
    data = checkpoint[1]
    start = 8 + int.from_bytes(data[:8], "little")
    for position in range(start, len(data), 61):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        assert refused_or_harmless(checkpoint, bytes(damaged)), position


@settings(FAST, max_examples=150)
@given(data=st.data())
def test_a_checkpoint_cut_at_any_byte_is_refused(checkpoint, data):
    assert refused_or_harmless(checkpoint, checkpoint[1][:data.draw(st.integers(0, len(checkpoint[1]) - 1))])


def test_a_whole_checkpoint_is_not_refused(checkpoint):
    assert not refused_or_harmless(checkpoint, checkpoint[1])


@pytest.mark.parametrize("other", [nn.Linear(3, 2), ToyModel(size=8)])
def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(checkpoint, other):
    before = weights(other)
    with pytest.raises(UserError, match="the checkpoint is of another model"):
        load_checkpoint(checkpoint[0], other, make_optimizer(other, DROPOUT))
    assert_same_bits(weights(other), before)


def test_the_text_of_a_checkpoint_has_the_keys_of_earlier_versions():
    """As the first version with confusion matrices and sums by process wrote it."""
    old = ('{"epoch": 2, "group": 3, "step": 8, "best_epoch": 1, "best_score": [0.5, -0.25], "sums": {"loss": 0.5}, '
           '"parts": [], "confusion": [[1, 0], [0, 2]], "history": [{"epoch": 1}], "finished": false}')
    progress = Progress.from_json(old)
    assert (progress.epoch, progress.step_in_epoch, progress.step) == (2, 3, 8)
    assert json.loads(progress.as_json()) == json.loads(old)


@pytest.mark.parametrize("name", ["multi-label", "regression"])
def test_other_problems_resume_to_the_same_bytes(tmp_path, name):
    def data():
        found = toy_data()
        for batch in [*found.batches, *found.dev["in_domain"], *found.dev["out_of_domain"]]:
            one = batch.labels.float()
            batch.labels = torch.stack([one, 1 - one], 1) if name == "multi-label" else one
        return replace(found, problem=PROBLEMS[name])

    def train(folder, resume=False, stop=lambda: None):
        model = ToyModel()
        if name == "regression":
            model.net["score"] = torch.nn.Linear(6, 1)
            torch.nn.init.ones_(model.net["score"].weight)
            torch.nn.init.zeros_(model.net["score"].bias)
        progress = fit(model, data(), label_loss(problem=PROBLEMS[name]), DROPOUT, Checkpointing(folder, resume=resume),
                       Hooks(stop=stop))
        return progress.history, {key: value.clone() for key, value in model.state_dict().items()}

    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    history, weights = train(tmp_path / "whole")
    steps = itertools.count()
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", stop=lambda: 15 if next(steps) == 2 else None)
    resumed, again = train(tmp_path / "parts", resume=True)
    assert without_times(resumed) == without_times(history)
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    assert PROBLEMS[name].chosen in history[-1]["validation"]["in_domain"]
    assert {"f1_micro", "mse"} & set(history[-1]["train"])
