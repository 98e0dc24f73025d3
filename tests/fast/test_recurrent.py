"""recurrent: both ways of running rows of different lengths give what each row gives alone, gradients included."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fast import recurrent
from fast.recurrent import rnn_states


def network(cell: str, layers: int, both: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return {"lstm": nn.LSTM, "gru": nn.GRU}[cell](6, 8, layers, batch_first=True, bidirectional=both)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("pads", [0.0, 1e9], ids=["packed", "by direction"])
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), layers=st.integers(1, 3), longer=st.integers(0, 2),
       both=st.booleans())
def test_rows_are_what_they_are_alone(cell, pads, lengths, layers, longer, both):
    rnn, width, size = network(cell, layers, both), max(lengths) + longer, 16 if both else 8
    x = torch.randn(len(lengths), width, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recurrent, "PADS", pads)
        states = rnn_states(rnn, x, torch.tensor(lengths))
    assert states.shape == (len(lengths), width, size)
    alone = [rnn(x[row:row + 1, :length])[0][0] for row, length in enumerate(lengths)]
    real = [states[row, :length] for row, length in enumerate(lengths)]
    torch.testing.assert_close(torch.cat(real), torch.cat(alone), rtol=1e-5, atol=1e-6)

    weight = torch.randn(sum(lengths), size, generator=torch.Generator().manual_seed(2))
    inputs = [x, *rnn.parameters()]
    for ours, theirs in zip(torch.autograd.grad((torch.cat(real) * weight).sum(), inputs),
                            torch.autograd.grad((torch.cat(alone) * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_way_is_chosen_by_the_share_of_pads(monkeypatch):
    """Rows of 9 and 2 tokens: 18 places for 11 tokens. Rows of 9 and 1, 1, 1: 36 places for 12."""
    rnn, ways = network("lstm", 1), []
    monkeypatch.setattr(recurrent, "_by_direction", lambda rnn, x, lengths: ways.append(len(lengths)) or rnn(x)[0])
    for lengths in ([9, 2], [9, 1, 1, 1], [9, 9]):
        rnn_states(rnn, torch.randn(len(lengths), 9, 6), torch.tensor(lengths))
    assert ways == [2]


def test_a_forward_rnn_turns_no_row_around_and_packs_only_many_pads(monkeypatch):
    """Rows of 9 and 2 tokens: 18 places for 11 tokens. Rows of 9, 1 and 1: 27 places for 11."""
    rnn, packed, pack = network("lstm", 2, both=False), [], nn.utils.rnn.pack_padded_sequence
    monkeypatch.setattr(recurrent, "_by_direction", None)
    monkeypatch.setattr(nn.utils.rnn, "pack_padded_sequence",
                        lambda x, sizes, **how: packed.append(len(sizes)) or pack(x, sizes, **how))
    for lengths in ([9, 2], [9, 1, 1], [9, 9]):
        assert rnn_states(rnn, torch.randn(len(lengths), 9, 6), torch.tensor(lengths)).shape == (len(lengths), 9, 8)
    assert packed == [3]


def test_a_shared_first_layer_is_read(monkeypatch):
    """A network whose parameters are another one's (distillation/heads.py) goes both ways, too."""
    from distillation.pretraining import first_layer
    from layers import RNNConfig
    from model import DistilRNN
    torch.manual_seed(0)
    first = first_layer(DistilRNN(RNNConfig(20, 2, 6, 8, rnn_layers=2)))
    x, lengths = torch.randn(3, 5, 6), torch.tensor([5, 3, 4])
    split = rnn_states(first, x, lengths)
    monkeypatch.setattr(recurrent, "PADS", 0.0)
    packed = rnn_states(first, x, lengths)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(split[row, :length], packed[row, :length], rtol=1e-5, atol=1e-6)
