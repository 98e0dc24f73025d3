"""The student's sizes, and its layers that PyTorch lacks: embeddings with a vocabulary of their own, a cell without a loop.

    states = MinGRU(8, 16, bidirectional=True)(x, lengths)    # (B, T, 8), (B,) -> (B, T, 32)
"""
from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from machine.hardware import send
from options.schema import DistilOptions


@dataclass(frozen=True)
class RNNConfig:
    """Holds the sizes of a `DistilRNN`."""

    vocab_size: int
    num_labels: int = 2
    embedding_size: int = 96
    hidden_size: int = 128  # of each direction
    directions: int = 2  # 1: forward alone
    rnn_layers: int = DistilOptions.rnn_layers
    cell: str = DistilOptions.cell
    pooling: str = "max"  # max, mean or attention, over real tokens
    dropout: float = DistilOptions.dropout  # on embeddings and on the pooled vector
    vocabulary: int | None = None  # rows of the embedding table; None: one for each of the `vocab_size` tokens
    # Tokens without a row of their own: they share `buckets`, or are the mean of `pieces`.
    rare_tokens: str = DistilOptions.rare_tokens
    frozen_embeddings: bool = False  # a frozen copy of the first embeddings next to the trained ones

    def recorded(self) -> dict:
        """Returns the sizes as a run records them: those that came later only where they are in use."""
        # A run from before them is repeated to the byte.
        unused = {"vocabulary": not self.vocabulary, "rare_tokens": not self.vocabulary,
                  "frozen_embeddings": not self.frozen_embeddings}
        return {name: value for name, value in asdict(self).items() if not unused.get(name)}


class StudentEmbedding(nn.Embedding):
    """The student's embeddings: a table with a row for each token, or with fewer rows, some of them shared.

    Ids are those of the tokenizer in either case. With `config.vocabulary` the buffer `rows` maps an id to its row, (V,), or
    to the two rows that it is the mean of, (V, 2): those of its pieces.

    With `config.frozen_embeddings` a copy of the first table stays as it is, and a token's vector is the trained one next to
    the frozen one: the two channels of Kim 2014, "Convolutional Neural Networks for Sentence Classification".
    """

    def __init__(self, config: RNNConfig):
        super().__init__(config.vocabulary or config.vocab_size, config.embedding_size)
        rows = None
        if config.vocabulary:
            # Any valid map: a distillation writes its own over it, and a saved student has one.
            rows = torch.arange(config.vocab_size, dtype=torch.int32) % config.vocabulary
            if config.rare_tokens == "pieces":
                rows = rows.unsqueeze(1).repeat(1, 2)
        # In the file of the weights, so that a student is read with the rows that it was trained with.
        self.register_buffer("rows", rows)
        self.frozen = nn.Parameter(self.weight.detach().clone(), requires_grad=False) if config.frozen_embeddings else None
        self.width = config.embedding_size * (2 if config.frozen_embeddings else 1)  # of a token's vector

    def forward(self, ids: Tensor) -> Tensor:  # (B, T) -> (B, T, width)
        rows = ids if self.rows is None else self.rows[ids]  # (B, T), or with pieces (B, T, 2)
        vectors = super().forward(rows)
        if self.frozen is not None:
            vectors = torch.cat([vectors, F.embedding(rows, self.frozen)], -1)
        return vectors.mean(2) if rows.dim() > ids.dim() else vectors


# ---------------------------------------------------------------- a cell that is parallel over time

class MinGRU(nn.Module):
    """minGRU: a GRU in which gate and candidate read the input alone, not the state.

    Feng et al. 2024, "Were RNNs All We Needed?" (arXiv 2410.01201), section 3.1, with g of appendix B:

        h_t = (1 - z_t) h_(t-1) + z_t c_t, from h_0 = 0
        z_t = sigmoid(W_z x_t + b_z)
        c_t = g(W_c x_t + b_c), g(a) = a + 0.5 for a >= 0, else sigmoid(a)

    That is linear in h, so that `scan` computes all steps at once. The arguments are those of nn.LSTM. Layer k has
    `weight_lk` (D * 2 * H, E), W_z and W_c of the forward direction, then those of the backward one, and `bias_lk`.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, batch_first: bool = True,
                 bidirectional: bool = False):
        super().__init__()
        # A student's rows always come first.
        assert batch_first
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bidirectional, directions = bidirectional, 2 if bidirectional else 1
        for layer in range(num_layers):
            width = directions * hidden_size if layer else input_size
            # As nn.Linear begins, which the paper uses.
            outputs, bound = 2 * directions * hidden_size, 1 / math.sqrt(width)
            for name, shape in (("weight", (outputs, width)), ("bias", (outputs,))):
                self.register_parameter(f"{name}_l{layer}", nn.Parameter(torch.empty(shape).uniform_(-bound, bound)))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # (B, T, E), (B,) -> (B, T, DH)
        """Returns the states, forward direction first; those at a row's pads are arbitrary."""
        pads = (torch.arange(x.shape[1]) >= lengths.cpu().unsqueeze(1)).unsqueeze(-1)  # (B, T, 1)
        pads = send(pads, x.device) if self.bidirectional and bool(pads.any()) else None
        for layer in range(self.num_layers):
            # One matmul for both gates of both directions and of all steps.
            gates = F.linear(x, getattr(self, f"weight_l{layer}"), getattr(self, f"bias_l{layer}"))
            ahead, *behind = gates.split(2 * self.hidden_size, -1)
            states = [scan(*self.step(ahead))]
            for one in behind:
                keep, new = self.step(one)
                # The backward direction comes to the pads first. They keep its state at zero.
                if pads is not None:
                    keep, new = keep.masked_fill(pads, 1.0), new.masked_fill(pads, 0.0)
                states.append(scan(keep.flip(1), new.flip(1)).flip(1))
            x = torch.cat(states, -1)
        return x

    @staticmethod
    def step(gates: Tensor) -> tuple[Tensor, Tensor]:  # (B, T, 2H) -> (B, T, H), (B, T, H)
        """Returns each step as h_t = keep * h_(t-1) + new."""
        gate, candidate = gates.chunk(2, -1)
        # 1 - sigmoid(a) = sigmoid(-a), without cancellation.
        return torch.sigmoid(-gate), torch.sigmoid(gate) * torch.where(candidate >= 0, candidate + 0.5,
                                                                       torch.sigmoid(candidate))


def scan(keep: Tensor, new: Tensor) -> Tensor:
    """Returns all h_t = keep_t h_(t-1) + new_t, from h_0 = 0, in log2(T) rounds: (B, T, H), (B, T, H) -> (B, T, H).

    Hillis and Steele 1986, "Data parallel algorithms". Nothing is divided, and no logarithm is taken.
    """
    reach = 1
    while reach < keep.shape[1]:
        # (keep, new) of a position stand for the last `reach` steps before it. Joined with those of the position `reach`
        # steps earlier they stand for twice as many; the first positions have no more than they have.
        earlier_keep, earlier_new = keep[:, :-reach], new[:, :-reach]
        new = torch.cat([new[:, :reach], torch.addcmul(new[:, reach:], keep[:, reach:], earlier_new)], 1)
        keep = torch.cat([keep[:, :reach], keep[:, reach:] * earlier_keep], 1)
        reach *= 2
    return new
