"""Pretraining, the optional first stage: the student as a language model, and matching of hidden states.

    LanguageModel(student, ranks)    # the tokens before and after each token
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from data_utils import Batch
from distillation.batching import share_of_step
from distillation.heads import Outputs, real_tokens
from distillation.losses import match_hidden
from distillation.stages import Plan, Stage
from distillation.teachers import HiddenStates
from model import DistilRNN
from train_utils import Data, Objective, score_by_loss

CUTOFFS = (2000, 10_000)  # ranks at which the adaptive softmax goes on to rarer, narrower clusters
HELD_OUT_EVERY, HELD_OUT_MOST = 50, 500  # sentences held out of pretraining


def pretraining_stage(plan: Plan, teacher: bool = True) -> Stage:
    """Returns the stage of pretraining; a few of its sentences are held out.

    Args:
        teacher: False: the same stage without a teacher, a language model of plain text and the training set.
    """
    sentences, options = plan.sentences, plan.options
    hidden = sentences.hidden if teacher else None
    # Without a language model only sentences with hidden states of the teacher teach something.
    language = options.lm_weight > 0 or hidden is None
    # No transfer set without a teacher, who has written or chosen its sentences.
    rows = range(0 if teacher else sentences.unlabelled, len(sentences.ids) if language else sentences.targeted)
    # A single token has no neighbour to predict.
    rows = [row for row in rows if len(sentences.ids[row]) > 1]
    # Every 50th row is held out, or fewer: at most 500 rows in all.
    every = max(HELD_OUT_EVERY, len(rows) // HELD_OUT_MOST)
    held_out, rest = rows[::every], [row for at, row in enumerate(rows) if at % every] or rows
    batches, dev = plan.batches(rest), plan.batches(held_out)
    vocabulary, size = len(plan.inputs.tokenizer), 0 if hidden is None else hidden.values.shape[1]
    objective = pretraining_objective(hidden, options.lm_weight or 1.0)
    # The rows have no classes: the best epoch is the one with the lowest loss on the rows held out.
    return Stage("pretrain", Data(batches, {"held_out": dev}, "held_out"), objective,
                 plan.train_options(options.pretrain), options.stage_dropout,
                 lambda student: LanguageModel(student, token_ranks(batches, vocabulary) if language else None, size),
                 score_by_loss(objective))


def pretraining_objective(hidden: HiddenStates | None, lm_weight: float) -> Objective:
    """Returns the objective lm_weight x the language model's loss + `hidden_mse`; a model may return one of them alone."""
    def objective(outputs, batch: Batch) -> Tensor:
        # Without a language model the hidden states are matched alone.
        loss = 0.0
        if outputs.language is not None:
            loss = lm_weight * outputs.language * share_of_step(batch, neighbours)
        return loss if hidden is None else loss + match_hidden(outputs.matched, batch, hidden)
    return objective


def neighbours(batch: Batch) -> int:
    """Returns the number of pairs of neighbouring tokens: the predictions of a language model in one direction."""
    return int(batch.attention_mask[:, 1:].sum())


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
        real = real_tokens(attention_mask, states)
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
