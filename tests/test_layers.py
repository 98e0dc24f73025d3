"""layers: minGRU against a loop over time in NumPy float64, values and gradients."""
import numpy as np
import pytest
import torch
from conftest import toy_batch
from hypothesis import given
from hypothesis import strategies as st

from layers import MinGRU, scan
from model import DistilRNN, RNNConfig


def loop(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """One direction of one layer of a sentence, (T, E) -> (T, H): Feng et al. 2024, step by step."""
    h, states = np.zeros(len(bias) // 2), []
    for step in x:
        gate, candidate = np.split(weight @ step + bias, 2)
        z = 1 / (1 + np.exp(-gate))
        c = np.where(candidate >= 0, candidate + 0.5, 1 / (1 + np.exp(-candidate)))
        h = (1 - z) * h + z * c
        states.append(h)
    return np.stack(states)


def looped(rnn: MinGRU, x: np.ndarray) -> np.ndarray:
    """All layers and directions of a sentence, (T, E) -> (T, DH)."""
    for layer in range(rnn.num_layers):
        weight, bias = (getattr(rnn, f"{name}_l{layer}").detach().double().numpy() for name in ("weight", "bias"))
        if not rnn.bidirectional:
            x = loop(x, weight, bias)
            continue
        (ahead, behind), (ahead_bias, behind_bias) = np.split(weight, 2), np.split(bias, 2)
        x = np.concatenate([loop(x, ahead, ahead_bias), loop(x[::-1], behind, behind_bias)[::-1]], 1)
    return x


def cell(layers: int, both: bool) -> MinGRU:
    torch.manual_seed(0)
    rnn = MinGRU(4, 3, layers, bidirectional=both)
    with torch.no_grad():
        for p in rnn.parameters():  # so large that both branches of g are taken
            p.normal_()
    return rnn


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 3), st.booleans(), st.integers(0, 2))
def test_every_row_is_the_loop_over_its_own_tokens(lengths, layers, both, longer):
    rnn = cell(layers, both)
    x = torch.randn(len(lengths), max(lengths) + longer, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = rnn(x, torch.tensor(lengths))
    assert states.shape == (*x.shape[:2], 6 if both else 3)
    for row, length in enumerate(lengths):
        expected = looped(rnn, x[row, :length].double().numpy())
        np.testing.assert_allclose(states[row, :length].numpy(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("both", [False, True])
def test_gradients_are_finite_differences_of_the_loop(both):
    rnn, lengths = cell(2, both).double(), torch.tensor([6, 3])
    x = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weights = torch.randn(2, 6, 6 if both else 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    real = (torch.arange(6) < lengths.unsqueeze(1)).unsqueeze(-1)
    inputs = [x, *rnn.parameters()]
    found = torch.autograd.grad((rnn(x, lengths) * weights * real).sum(), inputs)

    def value() -> float:
        rows = [looped(rnn, x[row, :length].detach().numpy()) for row, length in enumerate(lengths.tolist())]
        return sum((states * weights[row, :len(states)].numpy()).sum() for row, states in enumerate(rows))
    for tensor, gradient in zip(inputs, found, strict=True):
        flat = tensor.detach().view(-1)
        for place in range(0, len(flat), 5):
            before, sides = flat[place].item(), []
            for change in (1e-6, -1e-6):
                flat[place] = before + change
                sides.append(value())
            flat[place] = before
            assert abs((sides[0] - sides[1]) / 2e-6 - gradient.view(-1)[place].item()) < 1e-6


@given(st.integers(1, 40))
def test_a_scan_is_its_recurrence(steps):
    generator = torch.Generator().manual_seed(steps)
    keep, new = torch.rand(2, steps, 3, generator=generator), torch.randn(2, steps, 3, generator=generator)
    h = torch.zeros(2, 3, dtype=torch.float64)
    for step in range(steps):
        h = keep[:, step].double() * h + new[:, step].double()
        torch.testing.assert_close(scan(keep, new)[:, step], h.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("directions", [1, 2])
def test_a_student_of_this_cell_does_not_depend_on_batch_mates_or_padding(directions):
    torch.manual_seed(0)
    net = DistilRNN(RNNConfig(101, embedding_size=6, hidden_size=5, directions=directions, rnn_layers=2, cell="mingru"))
    net.eval()
    ids, mask = toy_batch((5, 9, 1, 12))
    with torch.no_grad():
        together = net(ids, mask)
        wider = net(*(torch.nn.functional.pad(t, (0, 4)) for t in (ids, mask)))
        alone = torch.cat([net(ids[i:i + 1, :n], mask[i:i + 1, :n]) for i, n in enumerate(mask.sum(1).tolist())])
    assert together.std(0).min() > 1e-3
    torch.testing.assert_close(alone, together, atol=1e-6, rtol=0)
    torch.testing.assert_close(wider, together, atol=1e-6, rtol=0)
