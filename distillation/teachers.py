"""What a teacher knows, in the sizes of a student: its embeddings and hidden states reduced by PCA."""
from __future__ import annotations

import copy
import inspect
import threading
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import speed
from data_utils import Batch
from machine.errors import UserError
from machine.hardware import send
from model import DistilRNN, TextClassifier, lora_layers


@dataclass
class Reduction:
    """Principal components: `reduce` standardises what it projects on them."""

    mean: Tensor  # (C,)
    components: Tensor  # (C, d), orthonormal columns, the largest variance first
    std: Tensor  # (d,) of the rows that it was computed from

    def reduce(self, rows: Tensor) -> Tensor:  # (N, C) -> (N, d)
        return (rows - self.mean) @ self.components / self.std


def token_scores(teacher: TextClassifier, hidden: Tensor) -> Tensor:
    """Returns the logits around their mean (tokens, labels) that a decoder's head gives each prefix; of an encoder none."""
    if not teacher.decoder or teacher.by_length:
        return hidden.new_zeros(len(hidden), 0)
    score = teacher.net.score
    logits = score(hidden.to(score.weight.dtype)).float()
    return logits - logits.mean(-1, keepdim=True)


def principal_components(rows: Tensor, size: int) -> Reduction:
    """Computes the `size` first principal components of rows (N, C) (Pearson 1901), in float64.

    Each component's largest entry is positive, so that the same rows always have the same components.
    """
    rows = rows.double().cpu()
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))  # in ascending order
    components = vectors.flip(-1)[:, :size]
    largest = components.gather(0, components.abs().argmax(0, keepdim=True))
    std = values.flip(-1)[:size].clamp(min=1e-12).sqrt()
    return Reduction(mean.float(), (components * largest.sign()).float(), std.float())


@torch.no_grad()
def embed_as(teacher: TextClassifier, student: DistilRNN) -> None:
    """Gives the student the teacher's token embeddings, reduced by PCA to its size and scaled to a variance of 1.

    Tokens and dimensions that the teacher does not have keep what the student has.
    """
    rows = teacher.net.base_model.get_input_embeddings().weight[:len(student.embedding.weight)].float().cpu()
    size = min(student.config.embedding_size, rows.shape[1])
    pca = principal_components(rows, size)
    reduced = pca.reduce(rows) * pca.std
    student.embedding.weight[:len(rows), :size] = (reduced / reduced.std()).to(student.embedding.weight)


def as_labeller(teacher: TextClassifier, precision: str) -> TextClassifier:
    """Returns the teacher as it labels: itself, or with `bf16` a copy that is faster and rounds otherwise.

    In the copy LoRA's updates are merged into the frozen weights, and these are bfloat16.
    """
    if precision != "bf16":
        return teacher
    labeller = copy.deepcopy(teacher)
    for layer in lora_layers(labeller.net).values():
        layer.merge()
    speed.set_precision(labeller.net.base_model, "bf16")
    return labeller


@torch.inference_mode()
def hidden_states(teacher: TextClassifier, batch: Batch) -> Tensor:
    """Computes the backbone's last hidden states, after its final norm, of a batch's real tokens: (real tokens, C).

    Raises:
        UserError: the backbone does not give one state a token.
    """
    ids, mask = batch.input_ids, batch.attention_mask
    if teacher.decoder:
        states = teacher.token_states(ids, mask)
    else:
        backbone = teacher.net.base_model
        masked = {"attention_mask": send(mask, ids.device)} if "attention_mask" in inspect.signature(
            backbone.forward).parameters else {}
        states = backbone(input_ids=ids, **masked)[0]
    return _of_real_tokens(teacher, states, batch)


def _of_real_tokens(teacher: TextClassifier, states: Tensor, batch: Batch) -> Tensor:  # (B, T, C) -> (real tokens, C)
    if states.shape[:2] != batch.input_ids.shape:
        raise UserError(f"--match hidden: a {teacher.net.config.model_type} model does not give one hidden state a token; "
                        "choose --match none")
    return states[send(batch.attention_mask, states.device).bool()].float()


@torch.inference_mode()
def states_and_logits(teacher: TextClassifier, batch: Batch, needed: bool = True) -> tuple[Tensor | None, Tensor]:
    """Computes `hidden_states` and the logits (B, labels) of a batch without features, in one forward pass.

    Args:
        needed: whether the states are; without them the logits are the same bytes.

    Raises:
        UserError: the backbone does not give one state a token, and the states are needed.
    """
    if needed:
        return _states_and_logits(teacher, batch)
    try:
        return None, _states_and_logits(teacher, batch)[1]
    except UserError:  # such a backbone's logits never come with states, with which they would have to agree
        return None, teacher(*batch.inputs()).float()


def _states_and_logits(teacher: TextClassifier, batch: Batch) -> tuple[Tensor, Tensor]:
    ids, mask = batch.input_ids, batch.attention_mask
    if teacher.decoder and not teacher.by_length:
        hidden, head = hidden_states(teacher, batch), teacher.net.score
        last = send(mask.sum(1).cumsum(0) - 1, hidden.device)
        return hidden, head(hidden[last].to(head.weight.dtype)).float()
    found, mine = [], threading.get_ident()  # another thread may be at other sentences
    hook = teacher.net.base_model.register_forward_hook(
        lambda module, inputs, outputs: found.append(outputs[0]) if threading.get_ident() == mine else None)
    try:
        logits = teacher.net(input_ids=ids, attention_mask=teacher.encoder_mask(ids, mask)).logits.float()
    finally:
        hook.remove()
    return _of_real_tokens(teacher, found[0], batch), logits


class Averaged(nn.Module):
    """Several teachers of one task, whose logits are averaged."""

    def __init__(self, teachers: list[TextClassifier]):
        super().__init__()
        self.teachers = nn.ModuleList(teachers)

    def forward(self, *inputs) -> Tensor:  # as a teacher takes them -> (B, labels)
        return torch.stack([teacher(*inputs) for teacher in self.teachers]).mean(0)


@dataclass
class HiddenStates:
    """Reduced hidden states of many sentences, one after the other, and with a decoder the tokens' scores.

    A token's scores are the logits (around their mean) that the head gives the sentence as far as the token.
    """

    values: Tensor  # (tokens, d) float16, on the CPU
    weights: Tensor  # (d,) of the dimensions in `objectives.hidden_mse`
    starts: Tensor  # (N,) where each sentence begins
    ends: Tensor  # (N,) where it ends

    def __len__(self) -> int:
        return len(self.starts)

    def of(self, rows: Tensor) -> Tensor:
        """Returns the states (tokens of these sentences, d) in float32."""
        rows = rows.cpu()
        return torch.cat([self.values[start:end] for start, end in zip(
            self.starts[rows].tolist(), self.ends[rows].tolist(), strict=True)]).float()
