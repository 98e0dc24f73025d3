"""Teachers and their targets: logits, last hidden states, the scores of a sentence's tokens."""
from __future__ import annotations

import bisect
import copy
import inspect
import itertools
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import speed
import train_utils
from data_utils import Batch
from machine import processes
from machine.errors import UserError
from machine.hardware import send
from metrics.problems import problem_of_type
from model import TextClassifier, lora_layers
from record import tensors
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


def mean_logits(logits: list[Tensor]) -> Tensor:
    """Returns the mean of several teachers' logits, each (N, labels): their probabilities' geometric mean, normalised."""
    return torch.stack(logits).mean(0)


class Joined:
    """Tensors (n, d) as if one stood after the other: those that are memory-mapped files take no memory of the process."""

    def __init__(self, parts: list[Tensor]):
        self.parts = parts
        self.firsts = [0, *itertools.accumulate(map(len, parts))]  # the first row of each part, and the number of rows
        self.shape = (self.firsts[-1], parts[0].shape[1])

    def __getitem__(self, rows: slice) -> Tensor:
        """Returns rows that stand in one part."""
        part = bisect.bisect_right(self.firsts, rows.start) - 1
        first = self.firsts[part]
        return self.parts[part][rows.start - first:rows.stop - first]


@dataclass
class HiddenStates:
    """Reduced hidden states of many sentences, one after the other; for a decoder the tokens' scores stand behind them.

    A token's scores are the logits (around their mean) of the head for the sentence up to the token.
    """

    values: Tensor | Joined  # (tokens, d) float16, on the CPU
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


def teacher_logits(teachers: list[tuple[nn.Module, list[Batch]]], path: Path) -> Tensor:
    """Returns the teachers' mean logits (N, labels) on the training split, computed once and cached in a file.

    Args:
        teachers: each with the split's batches as it reads them.

    Raises:
        UserError: the file is damaged.
    """
    # A changed teacher, data set or tokenizer has another key, and is never answered from the file.
    models = [model for model, _ in teachers]
    # Several teachers have one digest, under the names that their weights have had from the first; batches that some of them
    # share count once.
    whole = models[0] if len(models) == 1 else nn.ModuleDict({"teachers": nn.ModuleList(models)})
    key = tensors.weights_digest(whole) + "".join(dict.fromkeys(tensors.batches_digest(batches) for _, batches in teachers))
    if processes.broadcast(path.exists()):
        cached, its_key = tensors.load_checked(path)
        if its_key == key:
            return cached["logits"]
    logits = mean_logits([train_utils.compute_logits(model, batches) for model, batches in teachers])
    tensors.save_checked(path, {"logits": logits}, key)
    return logits


def as_labeller(teacher: TextClassifier, precision: str) -> TextClassifier:
    """Returns the teacher itself, or for `bf16` a faster copy: LoRA's updates merged into bfloat16 weights."""
    if precision != "bf16":
        return teacher
    # A copy: the teacher itself is scored in its own precision.
    labeller = copy.deepcopy(teacher)
    for layer in lora_layers(labeller.net).values():
        layer.merge()
    speed.set_precision(labeller.net.base_model, "bf16")
    return labeller


# ---------------------------------------------------------------- one batch

def token_scores(teacher: TextClassifier, hidden: Tensor) -> Tensor:
    """Returns a decoder's logits for each prefix, those of classes around their mean: (tokens, C) -> (tokens, labels).

    An encoder has none: (tokens, 0).
    """
    if not teacher.decoder or teacher.by_length:
        return hidden.new_zeros(len(hidden), 0)
    score = teacher.net.score
    logits = score(hidden.to(score.weight.dtype)).float()
    if not problem_of_type(teacher.net.config.problem_type).shift_free:
        return logits
    # The same constant in all logits changes no probability: only differences are a target.
    return logits - logits.mean(-1, keepdim=True)


@torch.inference_mode()
def hidden_states(teacher: TextClassifier, batch: Batch) -> Tensor:
    """Computes the backbone's last hidden states, after its final norm, of a batch's real tokens: (real tokens, C).

    Raises:
        UserError: the backbone does not give one state for each token.
    """
    ids, mask = batch.input_ids, batch.attention_mask
    if teacher.decoder:
        states = teacher.token_states(ids, mask)
    else:
        backbone = teacher.net.base_model
        takes_mask = "attention_mask" in inspect.signature(backbone.forward).parameters
        states = backbone(input_ids=ids, **({"attention_mask": send(mask, ids.device)} if takes_mask else {}))[0]
    return _of_real_tokens(teacher, states, batch)


def _of_real_tokens(teacher: TextClassifier, states: Tensor, batch: Batch) -> Tensor:  # (B, T, C) -> (real tokens, C)
    if states.shape[:2] != batch.input_ids.shape:
        raise UserError(f"--match hidden: a {teacher.net.config.model_type} model does not give one hidden state a token; "
                        "choose --match none")
    return states[send(batch.attention_mask, states.device).bool()].float()


def pooled_states(teacher: TextClassifier, batches: list[Batch]) -> Tensor:
    """Computes the last hidden state (N, C) of each row: of its last token for a decoder, of its first for an encoder.

    Raises:
        UserError: see `hidden_states`.
    """
    found = {}
    for batch in batches:
        states = hidden_states(teacher, batch.to(next(teacher.parameters()).device)).cpu()
        ends = batch.attention_mask.sum(1).cumsum(0).cpu()
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        found.update(zip(batch.rows.tolist(), states[ends - 1 if teacher.decoder else starts], strict=True))
    return torch.stack([found[row] for row in range(len(found))])


@torch.inference_mode()
def states_and_logits(teacher: TextClassifier, batch: Batch, needed: bool = True) -> tuple[Tensor | None, Tensor]:
    """Computes `hidden_states` and the logits (B, labels) of a batch without features, in one forward pass.

    Args:
        needed: whether the states are needed; without them the logits are the same bytes.

    Raises:
        UserError: the states are needed, and the backbone does not give one for each token.
    """
    if needed:
        return _states_and_logits(teacher, batch)
    try:
        return None, _states_and_logits(teacher, batch)[1]
    except UserError:
        # Logits of such a backbone never come with states, with which they would have to agree.
        return None, teacher(*batch.inputs()).float()


def _states_and_logits(teacher: TextClassifier, batch: Batch) -> tuple[Tensor, Tensor]:
    ids, mask = batch.input_ids, batch.attention_mask
    if teacher.decoder and not teacher.by_length:
        hidden, head = hidden_states(teacher, batch), teacher.net.score
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
    return _of_real_tokens(teacher, found[0], batch), logits
