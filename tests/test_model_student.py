"""model: DistilRNN against its formula in NumPy float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import VOCAB, toy_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distillation.student_size import STEP, WIDEST, filled_config, student_config, student_parameters
from machine.errors import UserError
from model import DistilRNN, RNNConfig, count_parameters

# ---------------------------------------------------------------- the student

def student(seed: int = 0, **sizes) -> DistilRNN:
    torch.manual_seed(seed)
    return DistilRNN(RNNConfig(VOCAB, **{"embedding_size": 6, "hidden_size": 5, **sizes})).eval()


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("pooling", ["max", "mean", "attention"])
@pytest.mark.parametrize("rnn_layers", [1, 2])
@pytest.mark.parametrize("directions", [1, 2])
def test_student_logits_do_not_depend_on_batch_mates_or_padding(cell, pooling, rnn_layers, directions):
    net = student(cell=cell, pooling=pooling, rnn_layers=rnn_layers, directions=directions)
    ids, mask = toy_batch((5, 9, 1, 12))
    with torch.no_grad():
        together = net(ids, mask)
        wider = net(*(nn.functional.pad(t, (0, 4)) for t in (ids, mask)))
        alone = torch.cat([net(ids[i:i + 1, :n], mask[i:i + 1, :n]) for i, n in enumerate(mask.sum(1).tolist())])
    assert together.std(0).min() > 1e-3  # rows differ
    torch.testing.assert_close(alone, together, atol=1e-6, rtol=0)
    torch.testing.assert_close(wider, together, atol=1e-6, rtol=0)


def lstm_direction(x: np.ndarray, weights: dict, suffix: str) -> np.ndarray:
    """One direction of an LSTM, (T, E) -> (T, H): Hochreiter and Schmidhuber 1997, with the forget gate."""
    w_ih, w_hh, b_ih, b_hh = (weights[f"rnn.{n}_l0{suffix}"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h = c = np.zeros(w_hh.shape[1])
    states = []
    for step in x:
        i, f, g, o = np.split(w_ih @ step + b_ih + w_hh @ h + b_hh, 4)
        i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
        c = f * c + i * np.tanh(g)
        h = o * np.tanh(c)
        states.append(h)
    return np.stack(states)


@pytest.mark.parametrize("pooling", ["max", "mean", "attention"])
@pytest.mark.parametrize("directions", [1, 2])
def test_the_lstm_student_is_its_formula_in_float64(pooling, directions):
    net = student(pooling=pooling, directions=directions)
    weights = {name: p.detach().double().numpy() for name, p in net.named_parameters()}
    ids, mask = toy_batch((7, 4))
    with torch.no_grad():
        logits = net(ids, mask)
    for row, length in enumerate((7, 4)):
        x = weights["embedding.weight"][ids[row, :length].numpy()]
        ahead = lstm_direction(x, weights, "")
        states = ahead if directions == 1 else np.concatenate(
            [ahead, lstm_direction(x[::-1], weights, "_reverse")[::-1]], axis=1)
        shares = np.exp(states @ weights["attention.weight"][0]) if pooling == "attention" else np.ones(length)
        pooled = states.max(0) if pooling == "max" else shares / shares.sum() @ states
        expected = weights["classifier.weight"] @ pooled + weights["classifier.bias"]
        np.testing.assert_allclose(logits[row].numpy(), expected, atol=1e-6)


def test_student_dropout_acts_in_training_only():
    net = student(dropout=0.5)
    assert not torch.equal(net.train()(*toy_batch()), net(*toy_batch()))
    assert torch.equal(net.eval()(*toy_batch()), net(*toy_batch()))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 50_000), st.integers(2, 5), st.integers(1_000, 13_000_000))
def test_a_default_student_fits_its_budget_or_there_is_none(vocab_size, num_labels, budget):
    try:
        config = student_config(vocab_size, num_labels, budget)
    except UserError:
        smallest = RNNConfig(vocab_size, num_labels, 12, 16)
        assert student_parameters(smallest) > budget
        return
    assert student_parameters(config) <= budget


def test_parameters_are_counted_without_building_the_student():
    for cell, directions in (("lstm", 1), ("lstm", 2), ("gru", 2)):
        config = RNNConfig(VOCAB, embedding_size=6, hidden_size=5, directions=directions, rnn_layers=2, cell=cell)
        assert student_parameters(config) == count_parameters(DistilRNN(config))["total"]


def test_the_default_student_for_gpt2_is_not_shrunk_and_is_about_five_million():
    config = student_config(50_257, 2, budget=12_443_980)
    assert (config.embedding_size, config.hidden_size, config.cell, config.pooling) == (96, 128, "lstm", "max")
    assert student_parameters(config) == 50_257 * 96 + 2 * 4 * 128 * (96 + 128 + 2) + 2 * (256 + 1)
    assert 4_900_000 < student_parameters(config) < 5_200_000


def test_sizes_given_are_taken_as_they_are():
    config = student_config(1000, 2, budget=10, embedding_size=50, hidden_size=60, cell="gru", dropout=None)
    assert (config.embedding_size, config.hidden_size, config.cell, config.dropout) == (50, 60, "gru", 0.3)
    assert student_config(1000, 2, budget=200_000, hidden_size=100).hidden_size == 100


@settings(deadline=None, max_examples=25)
@given(st.integers(20, 3000), st.integers(20_000, 3_000_000), st.sampled_from(["lstm", "gru", "mingru"]), st.integers(1, 2),
       st.booleans())
def test_a_student_fills_its_budget_with_the_largest_state_that_fits(rows, budget, cell, layers, frozen):
    more = {"vocabulary": rows, "cell": cell, "rnn_layers": layers, "frozen_embeddings": frozen}
    try:
        config = filled_config(5000, 2, budget, **more, hidden_size=None)
    except UserError as error:
        assert f"--student-parameters {budget}: " in str(error)
        assert student_parameters(RNNConfig(5000, 2, STEP, STEP, **more)) > budget
        return
    assert student_parameters(config) <= budget < student_parameters(replace(config, hidden_size=config.hidden_size + STEP))
    # Embeddings have at most half of the budget, and are as wide as that and the state allow.
    width, tables = config.embedding_size, rows * (2 if frozen else 1)
    assert width == STEP or width * tables <= budget / 2 and width <= config.hidden_size
    wider = RNNConfig(5000, 2, width + STEP, width + STEP, **more)
    assert width == WIDEST or (width + STEP) * tables > budget / 2 or student_parameters(wider) > budget


def test_sizes_given_with_a_budget_are_kept_or_refused():
    config = filled_config(49_152, 2, 7_000_000, vocabulary=12_000, embedding_size=256, rnn_layers=2, directions=1)
    assert (config.embedding_size, config.rnn_layers) == (256, 2) and student_parameters(config) > 6_900_000
    assert filled_config(1000, 2, 50_000, embedding_size=8, hidden_size=9).hidden_size == 9
    with pytest.raises(UserError, match="--student-parameters 5000: a student with embeddings of 8 and a state of 9 has "):
        filled_config(1000, 2, 5000, embedding_size=8, hidden_size=9)
