"""A student's heads in training alone: for hidden states of the teacher, for edited tokens, and those of a language model.

    Matched(student, 64)            # logits, and the forward states projected onto 64 dimensions
    Matched(student, edits=True)    # logits, and of each token whether an edit touched it
    LanguageModel(student, ranks)   # the tokens before and after each token

None of their parameters is part of the student: in evaluation, export and serving `DistilRNN` stands alone.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from data_utils import Batch
from machine.hardware import send
from model import DistilRNN

CUTOFFS = (2000, 10_000)  # ranks at which the adaptive softmax goes on to rarer, narrower clusters


class Outputs(NamedTuple):
    """The outputs of a student with heads."""

    logits: Tensor | None  # (B, labels); None: no classes
    matched: Tensor | None = None  # (real tokens, d), row by row: the projected states
    language: Tensor | None = None  # the language model's loss: mean of its directions (nats a token)
    edited: Tensor | None = None  # (real tokens,), row by row: the logit of "an edit touched this token"
    pooled: Tensor | None = None  # (B, DH) the states that the classifier reads


class Matched(nn.Module):
    """A student with heads that read its states at each token; in evaluation the student alone.

    Its forward states are projected onto the teacher's hidden states: at each token the forward direction has read the same
    tokens as a decoder, no more and no less. An encoder has read the whole sentence, as both directions together have. The
    detector of edits reads both directions, as ELECTRA's discriminator (Clark et al. 2020, equation 2).

    Args:
        size: dimensions of the teacher's reduced hidden states; 0: none are matched.
        edits: whether there is a detector of edits.
        directions: of the states that are projected: 1, the forward one, or 2.
    """

    def __init__(self, student: DistilRNN, size: int = 0, edits: bool = False, directions: int = 1):
        super().__init__()
        self.student, config = student, student.config
        self.width = min(directions, config.directions) * config.hidden_size
        self.projection = nn.Linear(self.width, size) if size else None
        self.detector = nn.Linear(config.directions * config.hidden_size, 1) if edits else None

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Outputs | Tensor:
        if not self.training:
            return self.student(input_ids, attention_mask)
        # One pass of the RNN serves the classes and the heads.
        states = self.student.states(input_ids, attention_mask)  # (B, T, DH)
        real, matched, edited = _real(attention_mask, states), None, None
        # The classes and the detector read both directions. The forward states stand first.
        if self.projection is not None:
            matched = self.projection(states[..., :self.width][real])
        if self.detector is not None:
            edited = self.detector(states[real]).squeeze(-1)
        return Outputs(self.student.classify(states, attention_mask), matched, edited=edited)


class Pooled(nn.Module):
    """A student that returns its pooled states too; in evaluation the student alone."""

    def __init__(self, student: DistilRNN):
        super().__init__()
        self.student = student

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Outputs | Tensor:
        if not self.training:
            return self.student(input_ids, attention_mask)
        # The pooled states are the input of the last layer.
        found = []
        hook = self.student.classifier.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
        try:
            logits = self.student(input_ids, attention_mask)
        finally:
            hook.remove()
        return Outputs(logits, pooled=found[0])


class LanguageModel(nn.Module):
    """A student as a language model in each of its directions, after Peters et al. 2018 (ELMo), equation 1.

    Each direction predicts the token that it reads next. Both share one adaptive softmax (Grave et al. 2017), in which rare
    tokens cost little. Of several layers the first is trained: in a second one each direction would have read the states of
    the other one, and these know the token.

    Args:
        ranks: (vocabulary,) the rank of each token id by frequency, 0 the most frequent; None: no language model, the
            hidden states are matched alone.
        size: dimensions of the teacher's reduced hidden states; 0: none are matched.
    """

    def __init__(self, student: DistilRNN, ranks: Tensor | None, size: int = 0):
        super().__init__()
        self.student, config = student, student.config
        # The forward direction alone is matched: the backward one knows tokens that a decoder has not read.
        self.projection = nn.Linear(config.hidden_size, size) if size else None
        self.rnn = first_layer(student)
        self.softmax = None
        if ranks is not None:
            # A vocabulary smaller than every cutoff has two clusters of equal size.
            cutoffs = [cut for cut in CUTOFFS if cut < config.vocab_size] or [config.vocab_size // 2]
            self.softmax = nn.AdaptiveLogSoftmaxWithLoss(config.hidden_size, config.vocab_size, cutoffs)
            self.register_buffer("ranks", ranks, persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Outputs:
        states = self.student.states(input_ids, attention_mask, self.rnn)
        ahead, *behind = self.student.dropout(states).split(self.student.config.hidden_size, -1)  # (B, T, H) each
        real = _real(attention_mask, states)
        # Pads are left out of both losses.
        matched = language = None
        if self.projection is not None:
            matched = self.projection(ahead[real])
        if self.softmax is not None:
            # The adaptive softmax numbers tokens by frequency. A pair is two neighbours that are both real.
            ids, pairs = self.ranks[input_ids], real[:, 1:]
            # Forward, a token's state predicts the next token; backward, the one before.
            losses = [self.softmax(ahead[:, :-1][pairs], ids[:, 1:][pairs]).loss]
            losses += [self.softmax(one[:, 1:][pairs], ids[:, :-1][pairs]).loss for one in behind]
            language = sum(losses) / len(losses)
        return Outputs(None, matched, language)


def _real(attention_mask: Tensor, states: Tensor) -> Tensor:
    return send(attention_mask, states.device).bool()


def first_layer(student: DistilRNN) -> nn.Module:
    """Returns the student's RNN if it has one layer, else an RNN of one layer that shares the parameters of its first."""
    config, rnn = student.config, student.rnn
    if config.rnn_layers == 1:
        return rnn
    # Built without memory: its parameters are replaced at once.
    with torch.device("meta"):
        first = type(rnn)(rnn.input_size, rnn.hidden_size, 1, batch_first=True, bidirectional=rnn.bidirectional)
    for name, _ in list(first.named_parameters()):
        setattr(first, name, getattr(rnn, name))
    return first


def token_ranks(batches: list[Batch], vocabulary: int) -> Tensor:
    """Returns the rank (vocabulary,) of each token id by how often it occurs in the batches, 0 the most frequent."""
    # Stable: tokens of equal frequency keep the order of their ids.
    counts = torch.zeros(vocabulary, dtype=torch.int64)
    for batch in batches:
        counts += torch.bincount(batch.input_ids[batch.attention_mask.bool()], minlength=vocabulary)
    return counts.argsort(descending=True, stable=True).argsort()
