"""The inputs of a distillation: teachers above all, and their targets: logits, last hidden states, scores of tokens.

The targets of many sentences are computed once and cached: labels.py.
"""
from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from data_utils import Batch, Task
from distillation.cache import Base
from distillation.pca import Reduction
from distillation.soft_labels import SoftLabels
from layers import RNNConfig
from machine.errors import UserError
from machine.hardware import send
from metrics.problems import problem_of_type
from model import TextClassifier
from train_utils import Data


@dataclass(frozen=True)
class Teacher:
    """A teacher with its tokenizer: several teachers of one task read the same sentences, each as its own tokens."""

    model: TextClassifier
    tokenizer: object
    data: Data  # the task's batches as it reads them
    # The separators of text columns, the first teacher's and its own, if the two differ.
    separators: tuple[str, str] | None = None

    def texts(self, sentences: list[str]) -> list[str]:
        """Returns the first teacher's texts with this teacher's separator between their columns."""
        return sentences if self.separators is None else [one.replace(*self.separators) for one in sentences]


@dataclass
class Inputs:
    """Everything that a distillation starts from."""

    task: Task
    tokenizer: object  # the first teacher's, and the student's
    base: Base  # of the first teacher
    teachers: list[Teacher]
    student: RNNConfig
    texts: Data  # the first teacher's batches without numeric features, as the student reads them
    plain: list[str]  # plain sentences (--text)
    labels: list[SoftLabels]  # of files (--labels)


@dataclass
class HiddenStates:
    """Reduced hidden states of many sentences, one after the other; for a decoder the tokens' scores stand behind them."""

    values: Tensor  # (tokens, d) float16, on the CPU; of many sentences a `labels.Joined`
    weights: Tensor  # (d,) of the dimensions in `losses.hidden_mse`
    starts: Tensor  # (N,) the first token of each sentence
    ends: Tensor  # (N,) the first token after it
    std: Tensor | None = None  # standard deviation of each state's dimension before it was standardised; scores have none

    def __len__(self) -> int:
        return len(self.starts)

    def of(self, rows: Tensor) -> Tensor:
        """Returns the states (tokens of these sentences, d) in float32."""
        rows = rows.cpu()
        bounds = zip(self.starts[rows].tolist(), self.ends[rows].tolist(), strict=True)
        return torch.cat([self.values[start:end] for start, end in bounds]).float()


def mean_logits(logits: list[Tensor]) -> Tensor:
    """Returns the mean of several teachers' logits, each (N, labels): their probabilities' geometric mean, normalised."""
    return torch.stack(logits).mean(0)


def token_scores(teacher: TextClassifier, hidden: Tensor) -> Tensor:
    """Returns a decoder's logits for each prefix of a sentence: (tokens, C) -> (tokens, labels)."""
    # An encoder has none: its states have read the whole sentence, and no prefix.
    if not teacher.decoder or teacher.by_length:
        return hidden.new_zeros(len(hidden), 0)
    score = teacher.net.score
    logits = score(hidden.to(score.weight.dtype)).float()
    # The same constant in all logits changes no probability: only differences are a target.
    return logits - logits.mean(-1, keepdim=True) if problem_of_type(teacher.net.config.problem_type).shift_free else logits


def reduced_states(teacher: TextClassifier, hidden: Tensor, pca: Reduction, scale: Tensor) -> Tensor:
    """Returns the targets of tokens: (tokens, C) -> (tokens, d + labels) in float16, on the CPU.

    Args:
        pca: principal components of the teacher's hidden states; their projections are standardised.
        scale: (labels,) standard deviations of `token_scores`, which stand behind them.
    """
    scores = token_scores(teacher, hidden).cpu() / scale
    # Half precision: rounding is far below the error of the match, and cached files are half as large.
    return torch.cat([pca.reduce(hidden.cpu()), scores], -1).half()


@torch.inference_mode()
def states_and_logits(teacher: TextClassifier, batch: Batch) -> tuple[Tensor, Tensor]:
    """Computes the last hidden states, after the final norm, and the logits of a batch, in one forward pass.

    Args:
        batch: without features.

    Returns:
        (real tokens, C) of the backbone, and (B, labels).

    Raises:
        UserError: the backbone does not give one state for each token.
    """
    ids, mask = batch.input_ids, batch.attention_mask
    if teacher.decoder and not teacher.by_length:
        hidden, head = of_real_tokens(teacher, teacher.token_states(ids, mask), batch), teacher.net.score
        # The states of all real tokens stand one after the other: a sentence ends where its length is used up.
        last = send(mask.sum(1).cumsum(0) - 1, hidden.device)
        return hidden, head(hidden[last].to(head.weight.dtype)).float()
    # An encoder's head is the library's own: a hook takes the states out of its forward pass. The hook is called in every
    # thread that computes with this model, and keeps the states of its own.
    found, own = [], threading.get_ident()
    hook = teacher.net.base_model.register_forward_hook(
        lambda module, inputs, outputs: found.append(outputs[0]) if threading.get_ident() == own else None)
    try:
        logits = teacher.batch_logits(ids, mask, every=True)
    finally:
        hook.remove()
    return of_real_tokens(teacher, found[0], batch), logits


def of_real_tokens(teacher: TextClassifier, states: Tensor, batch: Batch) -> Tensor:
    """Returns the states of real tokens, row by row, in float32: (B, T, C) -> (real tokens, C)."""
    if states.shape[:2] != batch.input_ids.shape:
        raise UserError(f"--match hidden: a {teacher.net.config.model_type} model does not give one hidden state a token; "
                        "choose --match none")
    return states[send(batch.attention_mask, states.device).bool()].float()
