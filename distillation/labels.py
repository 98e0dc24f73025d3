"""Teachers' targets for many sentences, computed once and cached: in one file of a run, or in chunks that runs share.

    logits = teacher_logits([(model, batches)], folder / "teacher_logits.safetensors")
    logits, hidden = Labeller(cache, teacher, key, tokenizer, train_sentences, options).targets(ids, match=True)
"""
from __future__ import annotations

import bisect
import copy
import inspect
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import speed
import train_utils
from data.backbones import max_length_of
from data_utils import Batch, encode
from distillation.batching import equal_length_batches, neighbour_batches
from distillation.cache import Cache, digest
from distillation.pca import Reduction, principal_components
from distillation.sharing import cores, share
from distillation.teachers import (
    HiddenStates,
    Teacher,
    mean_logits,
    of_real_tokens,
    reduced_states,
    states_and_logits,
    token_scores,
)
from machine import processes
from machine.errors import UserError
from machine.hardware import device, send
from model import TextClassifier, lora_layers
from options.schema import DistilOptions
from record import tensors

LABELLED = 1024  # sentences in a chunk
SORTED = 64 * LABELLED  # sentences that are sorted before they are cut into chunks
TOKENS = 2048  # tokens in a batch of the teacher's, pads included
PCA_TOKENS = 30_000  # tokens from which the principal components are computed


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


@torch.inference_mode()
def hidden_states(teacher: TextClassifier, batch: Batch) -> Tensor:
    """Computes the states of `states_and_logits` without the logits: (real tokens, C).

    Raises:
        UserError: the backbone does not give one state for each token.
    """
    ids, mask = batch.input_ids, batch.attention_mask
    if teacher.decoder:
        return of_real_tokens(teacher, teacher.token_states(ids, mask), batch)
    # Some backbones (FNet) have no mask.
    backbone = teacher.net.base_model
    takes_mask = "attention_mask" in inspect.signature(backbone.forward).parameters
    states = backbone(input_ids=ids, **({"attention_mask": send(mask, ids.device)} if takes_mask else {}))[0]
    return of_real_tokens(teacher, states, batch)


def logits_alone(teacher: TextClassifier, batch: Batch) -> Tensor:
    """Computes the logits (B, labels) of a batch without features: the same bytes as with states, if it has any."""
    try:
        return states_and_logits(teacher, batch)[1]
    except UserError:
        # Logits of a backbone without a state for each token never come with states.
        return teacher(*batch.inputs()).float()


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
class Labeller:
    """A teacher and the cache of its targets."""

    cache: Cache
    teacher: TextClassifier
    key: str  # digest of the teacher's weights, and its precision
    tokenizer: object
    train: list[str]  # the training sentences: the principal components are those of their hidden states
    options: DistilOptions

    @classmethod
    def of(cls, teacher: Teacher, cache: Cache, train: list[str], options: DistilOptions) -> Labeller:
        """Returns the labeller of a teacher, in the precision of --label-precision."""
        # Labels in bfloat16 are other labels, and have other files.
        key = tensors.weights_digest(teacher.model) + (" bf16" if options.label_precision == "bf16" else "")
        return cls(cache, as_labeller(teacher.model, options.label_precision), key, teacher.tokenizer, train, options)

    def targets(self, ids: list[list[int]], match: bool) -> tuple[Tensor, HiddenStates | None]:
        """Returns the teacher's logits (N, labels) and, with `match`, its reduced hidden states.

        Args:
            ids: token ids of each sentence.
            match: whether hidden states are needed; chunks that have them serve without it, too.

        Raises:
            UserError: a chunk that is damaged.
        """
        # The same components for every chunk, so that chunks of several runs fit together.
        pca, scale = self.components() if match else (None, None)
        order = self.order(ids)
        # A chunk is named by its content: other seeds and larger sets find it again.
        chunks: dict[Path, tuple[str, list]] = {}
        for start in range(0, len(ids), LABELLED):
            chunk = [ids[row] for row in order[start:start + LABELLED]]
            path, key = self.place(chunk, match)
            chunks[path] = key, chunk

        def label(path: Path) -> None:
            key, chunk = chunks[path]
            tensors.save_checked(path, self.compute(chunk, pca, scale), key)

        # Fused blocks keep no state of a forward pass, so that threads can share them. Others may keep one.
        threads = cores() if speed.is_fused(self.teacher) else 1
        share({path: len(chunk) for path, (_, chunk) in chunks.items()}, label, self.cache.check_stop, threads, "teacher")

        # Read back, also by the process that has just computed them: all runs use the rounded values of the files.
        logits, values = [], []
        for path, (key, _) in chunks.items():
            found, its_key = tensors.load_checked(path)
            if its_key != key:
                raise UserError(f"{path}: holds other sentences' outputs; remove it")
            logits.append(found["logits"])
            values.append(found.get("hidden"))
        # From the order of the chunks back to that of the sentences.
        back = torch.tensor(order).argsort()
        logits = torch.cat(logits)[back]
        if not match:
            return logits, None
        lengths = torch.tensor([len(ids[row]) for row in order])
        ends = lengths.cumsum(0)
        # The states stay in their files, mapped into memory: those of a million sentences are several GB.
        weights = self.weights(pca, len(scale))
        return logits, HiddenStates(Joined(values), weights, (ends - lengths)[back], ends[back], pca.std)

    def order(self, ids: list[list[int]]) -> list[int]:
        """Returns the rows in the order in which they are labelled.

        Sentences that begin alike are neighbours, because a decoder computes their first tokens once; for an encoder,
        sentences of one length. They are sorted SORTED at a time, so that the first chunks of a larger set are those of a
        smaller one.
        """
        def key(row: int) -> tuple:
            return not self.teacher.decoder and len(ids[row]), ids[row]

        order = []
        for start in range(0, len(ids), SORTED):
            order += sorted(range(start, min(start + SORTED, len(ids))), key=key)
        return order

    def place(self, chunk: list[list[int]], match: bool) -> tuple[Path, str]:
        """Returns a chunk's file, named by its content, and its key.

        Logits alone have a file of their own (size 0), unless one with hidden states exists.
        """
        # The size of the hidden states is a part of the key: other sizes are other targets.
        for size in (self.options.match_size,) if match else (self.options.match_size, 0):
            key = digest(f"{self.key} {size} {json.dumps(chunk)}")
            path = self.cache.folder / f"outputs-{key[:24]}.safetensors"
            if path.exists():
                break
        return path, key

    def weights(self, pca: Reduction, scores: int) -> Tensor:
        """Returns the weights in `losses.hidden_mse`, (d + scores,).

        Dimensions weigh by their standard deviation, `match_weight` in all; scores weigh alike, `score_weight` in all.
        """
        return torch.cat([self.options.match_weight * pca.std / pca.std.sum(),
                          torch.full((scores,), self.options.score_weight / max(1, scores))])

    @torch.inference_mode()
    def compute(self, ids: list[list[int]], pca: Reduction | None, scale: Tensor | None) -> dict[str, Tensor]:
        """Computes a chunk: logits (n, labels), and with `pca` hidden states and scores (tokens, d) in float16."""
        logits, parts = torch.empty(len(ids), self.teacher.net.config.num_labels), [None] * len(ids)
        # Where unique tokens are computed once, pads cost nothing, and neighbours share the most tokens.
        together = self.teacher.decoder and not self.teacher.by_length and speed.is_fused(self.teacher)
        batches = neighbour_batches if together else equal_length_batches
        for batch in batches(ids, [0] * len(ids), list(range(len(ids))), TOKENS, self.tokenizer):
            self.cache.check_stop()
            if pca is None:
                logits[batch.rows] = logits_alone(self.teacher, batch.to(device())).cpu()
                continue
            hidden, batch_logits = states_and_logits(self.teacher, batch.to(device()))
            logits[batch.rows], lengths = batch_logits.cpu(), batch.attention_mask.sum(1)
            states = reduced_states(self.teacher, hidden, pca, scale)
            for row, part in zip(batch.rows.tolist(), states.split(lengths.tolist()), strict=True):
                parts[row] = part
        return {"logits": logits, **({"hidden": torch.cat(parts)} if pca else {})}

    def components(self) -> tuple[Reduction, Tensor]:
        """Returns the principal components of the teacher's hidden states, and the scale of its tokens' scores (labels,).

        They are computed from training sentences, and cached in a file.
        """
        key = f"{self.key} {self.options.match_size}"
        path = self.cache.folder / f"components-{digest(key)[:24]}.safetensors"

        def compute(path: Path) -> None:
            # Long texts tell no more, and a model with fewer positions cannot read them.
            ids = encode(self.tokenizer, self.train, min(512, max_length_of(self.teacher.net)))
            # Random batches until there are enough tokens: a sample of the training sentences.
            parts, tokens = [], 0
            for batch in equal_length_batches(ids, [0] * len(ids), list(range(len(ids))), TOKENS, self.tokenizer):
                parts.append(hidden_states(self.teacher, batch.to(device())).cpu())
                tokens += batch.tokens
                if tokens > PCA_TOKENS:
                    break
            hidden = torch.cat(parts)
            with torch.inference_mode():
                scores = token_scores(self.teacher, hidden.to(device()))
                # An encoder has none, and PyTorch warns about the deviation of nothing.
                scale = (scores.std(0) if scores.shape[1] else scores[0]).clamp(min=1e-6).cpu()
            pca = principal_components(hidden, min(self.options.match_size, hidden.shape[1]))
            tensors.save_checked(path, {**vars(pca), "scale": scale}, key)

        share({path: 0}, compute, self.cache.check_stop)
        found, _ = tensors.load_checked(path)
        scale = found.pop("scale")
        return Reduction(**found), scale
