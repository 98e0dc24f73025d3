"""An RNN in one or both directions over rows of different lengths, without packing them.

    states = rnn_states(nn.LSTM(8, 16, batch_first=True, bidirectional=True), x, lengths)

On a CPU an `nn.LSTM` of packed rows computes one small matmul for each step. oneDNN's kernel for whole sequences takes all
rows at once, at one length, and is several times as fast. It needs no packing where pads come last in the order of reading:
so they do in the forward direction, and in the backward one once each row is reversed within its own length.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from machine.hardware import send
from model import DistilRNN

# The highest ratio of padded size to real tokens at which computing the pads is cheaper than packing.
PADS = 2.0


def rnn_states(rnn: nn.LSTM | nn.GRU, x: Tensor, lengths: Tensor) -> Tensor:
    """Returns the states (B, T, directions x H) of an RNN, the forward direction first.

    Args:
        x: (B, T, E), rows padded at their end.
        lengths: (B,) real tokens of each row, at least one; on the CPU, reading them does not wait for a GPU.

    The states at a row's pads are arbitrary.
    """
    few_pads = x.device.type == "cpu" and x.shape[0] * x.shape[1] <= PADS * int(lengths.sum())
    # One direction reads the pads after all real tokens: they change no state that is read.
    if bool((lengths == x.shape[1]).all()) or few_pads and not rnn.bidirectional:
        return rnn(x)[0]
    if few_pads:
        return _by_direction(rnn, x, lengths)
    # Sorted here: the library would wait for the GPU.
    sizes, order = lengths.cpu().sort(descending=True)
    packed = nn.utils.rnn.pack_padded_sequence(x.index_select(0, send(order, x.device)), sizes, batch_first=True)
    states, _ = nn.utils.rnn.pad_packed_sequence(rnn(packed)[0], batch_first=True, total_length=x.shape[1])
    return states.index_select(0, send(order.argsort(), states.device))


def _by_direction(rnn: nn.LSTM | nn.GRU, x: Tensor, lengths: Tensor) -> Tensor:
    """Computes each direction of each layer by itself, the backward one over reversed rows."""
    # Reversed within its length, a row has its pads last again; the second reversal puts the states in order.
    rows, width = x.shape[:2]
    at, last = torch.arange(width), lengths.unsqueeze(1) - 1
    reverse = torch.where(at <= last, last - at, at) + width * torch.arange(rows).unsqueeze(1)  # (B, T), its own inverse

    def reversed_rows(y: Tensor) -> Tensor:
        return y.flatten(0, 1).index_select(0, reverse.flatten()).view_as(y)

    for layer in range(rnn.num_layers):
        ahead, behind = _one(rnn, x, f"l{layer}"), _one(rnn, reversed_rows(x), f"l{layer}_reverse")
        x = torch.cat([ahead, reversed_rows(behind)], -1)
    return x


def _one(rnn: nn.LSTM | nn.GRU, x: Tensor, suffix: str) -> Tensor:
    """Returns one direction of one layer (B, T, H), from states of zero."""
    weights = [getattr(rnn, f"{name}_{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    start = x.new_zeros(1, x.shape[0], rnn.hidden_size)
    # The arguments of torch.lstm: biases, one layer, no dropout between layers, training, one direction, batch first.
    kind = (True, 1, 0.0, rnn.training, False, True)
    if isinstance(rnn, nn.LSTM):
        return torch.lstm(x, (start, start), weights, *kind)[0]
    return torch.gru(x, start, weights, *kind)[0]


class FastDistilRNN(DistilRNN):
    """A student under `fast.install`."""

    def rnn_states(self, rnn: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
        # Another cell than PyTorch's two goes the reference's way.
        return rnn_states(rnn, x, lengths) if isinstance(rnn, nn.LSTM | nn.GRU) else super().rnn_states(rnn, x, lengths)
