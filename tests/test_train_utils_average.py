"""The averaged weights: their formula, that training does not feel them, and that a resume keeps them."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_train_utils_checkpoints import DROPOUT, assert_ends_alike, train
from toy_training import ToyModel, toy_data, toy_dev, weights

from machine.signals import Interrupted
from train_utils import Hooks, cross_entropy, fit, validate

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

    progress = fit(model, toy_data(), cross_entropy(), replace(DROPOUT, ema=ema, epochs=epochs), hooks=Hooks(stop=stop))
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
