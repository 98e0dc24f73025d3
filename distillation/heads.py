"""A student's heads in training alone: for hidden states of the teacher, and for edited tokens.

    Matched(student, 64)            # logits, and the forward states projected onto 64 dimensions
    Matched(student, edits=True)    # logits, and of each token whether an edit touched it

None of their parameters is part of the student: in evaluation, export and serving `DistilRNN` stands alone.
"""
from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from machine.hardware import send
from model import DistilRNN


class Outputs(NamedTuple):
    """The outputs of a student with heads."""

    logits: Tensor | None  # (B, labels); None: no classes
    matched: Tensor | None = None  # (real tokens, d), row by row: the projected states
    language: Tensor | None = None  # the loss of `pretraining.LanguageModel`: mean of its directions (nats a token)
    edited: Tensor | None = None  # (real tokens,), row by row: the logit of "an edit touched this token"
    pooled: Tensor | None = None  # (B, DH) of `relations.Pooled`: the states that the classifier reads


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
        real, matched, edited = real_tokens(attention_mask, states), None, None
        # The classes and the detector read both directions. The forward states stand first.
        if self.projection is not None:
            matched = self.projection(states[..., :self.width][real])
        if self.detector is not None:
            edited = self.detector(states[real]).squeeze(-1)
        return Outputs(self.student.classify(states, attention_mask), matched, edited=edited)


def real_tokens(attention_mask: Tensor, states: Tensor) -> Tensor:
    """Returns the mask (B, T) of real tokens on the device of the states, as bool."""
    return send(attention_mask, states.device).bool()
