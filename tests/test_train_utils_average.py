"""The averaged weights: their formula, that training does not feel them, and that a resume keeps them."""
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_train_utils_checkpoints import DROPOUT, assert_ends_alike, train
from toy_training import ToyModel, toy_batches, toy_data, toy_dev, weights

import train_utils
from machine import signals
from machine.signals import Interrupted
from metrics import classification
from record.ownership import CHECKPOINT
from train_utils import Checkpointing, Data, Hooks, fit, label_loss, score_by_loss, validate
from training import average, checkpoints

AVERAGED = replace(DROPOUT, ema=0.6)


def steps_of(ema: float, epochs: int = 1):
    """Trains a toy model.

    Returns:
        its weights after each step, the trained model, and the progress.
    """
    model, seen = ToyModel(0, dropout=0.4), []
    torch.manual_seed(1)

    def stop():
        seen.append({name: value.clone() for name, value in weights(model).items()})

    progress = fit(model, toy_data(), label_loss(), replace(DROPOUT, ema=ema, epochs=epochs), hooks=Hooks(stop=stop))
    return seen, model, progress


@pytest.mark.parametrize("ema", [0.15, 0.6, 0.999])
def test_what_is_kept_and_scored_is_the_average_of_the_steps(ema):
    """With the largest decay the bound (1 + k) / (10 + k) holds in every step, with the smallest it never does."""
    seen, model, progress = steps_of(ema)
    assert len(seen) == 3
    for name, value in weights(model).items():
        average = seen[0][name].double().numpy()
        for k, step in enumerate(seen[1:], 2):
            decay = min(ema, (1 + k) / (10 + k))
            average = decay * average + (1 - decay) * step[name].double().numpy()
        np.testing.assert_allclose(value.numpy(), average, rtol=1e-5, atol=1e-7)
    assert not torch.equal(weights(model)["net.score.weight"], seen[-1]["net.score.weight"])
    assert progress.history[0]["validation"] == validate(model, toy_dev())[0]


def test_training_itself_goes_on_from_the_weights():
    averaged, plain = steps_of(0.6, epochs=3)[0], steps_of(0.0, epochs=3)[0]
    assert len(averaged) == len(plain) == 9
    for one, other in zip(averaged, plain, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("step", [1, 3, 4, 8])
def test_an_averaged_training_stopped_and_resumed_ends_in_the_same_bits(tmp_path, step):
    with pytest.raises(Interrupted):
        train(tmp_path, stop_at=step, options=AVERAGED)
    assert_ends_alike(train(tmp_path, resume=True, options=AVERAGED), train(options=AVERAGED))


# ---------------------------------------------------------------- a signal at every statement

LOOP = {module.__file__ for module in (train_utils, average, checkpoints)}
# The functions that change a training's state; the others compute.
STATE = {"run", "train_epoch", "step", "update", "validate", "in_model", "restore", "finish_epoch", "best_weights", "save",
         "save_checkpoint"}


def statements(work, at: int | None = None) -> list[tuple[str, int]]:
    """Calls `work()`, and handles SIGTERM before statement `at` of the functions in STATE, counted from 0.

    Returns:
        The statements that were reached, as (function, line), each at its first time: most are in the first epoch, so that
        the second one trains on with the saved state.
    """
    seen = []

    def trace(frame, event, argument):
        if frame.f_code.co_filename not in LOOP or frame.f_code.co_name not in STATE:
            return None
        place = frame.f_code.co_name, frame.f_lineno
        if event == "line" and place not in seen:
            seen.append(place)
            if len(seen) - 1 == at:
                # Nothing is left to be counted, and untraced code is twice as fast.
                sys.settrace(None)
                signals._handle(signal.SIGTERM, None)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
        signals._received.clear()
    return seen


def trained_with_average(folder, resume=False):
    """Trains a toy model with an average, two steps in each of two epochs; a resumed one starts from another state."""
    model = ToyModel(99 if resume else 0, dropout=0.4)
    torch.manual_seed(99 if resume else 1)
    data = Data(toy_batches(8, 4), {"in_domain": toy_batches(3, 3, seed=1)})
    progress = fit(model, data, label_loss(), replace(AVERAGED, epochs=2, accumulate=1),
                   Checkpointing(folder, resume=resume), Hooks(stop=signals.received, score=score_by_loss(label_loss())))
    return weights(model), progress


def test_a_signal_at_any_statement_of_the_loop_and_a_resume_end_in_the_same_bits(tmp_path, monkeypatch):
    # Most of a toy epoch's time is scikit-learn's, whose scores change no state.
    monkeypatch.setattr(classification, "scores_of_sums",
                        lambda sums, confusion: {"loss": sums["loss"], "matrix": confusion})
    whole = []
    places = statements(lambda: whole.append(trained_with_average(tmp_path)))
    assert {name for name, _ in places} == STATE
    for at in range(len(places)):
        folder = tmp_path / str(at)
        folder.mkdir()
        with pytest.raises(Interrupted):
            statements(lambda folder=folder: trained_with_average(folder), at)
        # Without a checkpoint the run begins again: a stop before the first step left none.
        resumed = trained_with_average(folder, resume=(folder / CHECKPOINT).exists())
        assert_ends_alike(resumed, whole[0])
