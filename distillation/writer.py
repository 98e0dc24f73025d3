"""The teacher's base as a writer of sentences: adapted to the training sentences for an epoch, then sampled.

The sentences are cached in chunks, `written-512-00000.json` and so on; each chunk has a seed of its own.
"""
from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch
from torch import Tensor, nn

import speed
from data.backbones import load_causal_lm, max_length_of
from data_utils import Batch, encode
from distillation.batching import equal_length_batches
from distillation.cache import Cache
from distillation.heads import Outputs
from distillation.sharing import cores, share
from machine.errors import UserError
from machine.hardware import bf16_is_fast, device
from model import inject_lora, lora_layers
from options.schema import LoRAOptions, TrainOptions
from record.files import read_json, write_json
from sampling import Sampling
from train_utils import Checkpointing, Data, Hooks, fit, score_by_loss

# Sentences in a chunk, by --transfer-version: more at a time are faster, fewer wait less for a small transfer set.
CHUNKS = {1: 1024, 2: 512}
TOGETHER = 256  # sentences that are sampled in one batch


class CausalLoss(nn.Module):
    """A language model with its loss as output; each row of a batch begins with the start token."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Outputs:
        hidden = self.lm.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, C)
        # Each real token is predicted from the state before it; logits of pads are not computed.
        real = attention_mask[:, 1:].bool().to(hidden.device)
        logits = self.lm.lm_head(hidden[:, :-1][real]).float()  # (tokens, V)
        return Outputs(None, language=nn.functional.cross_entropy(logits, input_ids[:, 1:][real]))


def language_loss(outputs: Outputs, batch: Batch) -> Tensor:
    """Returns the language model's loss: the objective of the writer."""
    return outputs.language


def longest_length(sentences: list[str]) -> int:
    """Returns the 95th percentile of the sentences' lengths in words."""
    # Not the longest one: a single long sentence would let in texts of any length.
    lengths = sorted(len(sentence.split()) for sentence in sentences)
    return lengths[len(lengths) * 95 // 100]


def border_token(tokenizer) -> int:
    """Returns the token between two texts of pretraining: a text begins and ends with it.

    Raises:
        UserError: the tokenizer has none.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    border = tokenizer.get_vocab().get("<|endoftext|>", end)
    if border is None:
        raise UserError("--augment: the teacher's tokenizer has no end token, so its language model cannot write sentences; "
                        "expected --augment 0")
    return border


@dataclass
class Writer:
    """A base's language model that writes sentences like those of a task."""

    cache: Cache
    model: str  # the base, as --model names it
    tokenizer: object
    sentences: list[str]  # the training sentences
    size: int  # sentences in a chunk

    def written(self, least: int) -> Iterator[str]:
        """Yields sentences without end; an empty text stands for a sentence that is too long.

        Args:
            least: the number of sentences that will surely be taken; they are sampled by all cores at a time.
        """
        lm, longest, together = None, longest_length(self.sentences), -(-least // self.size)

        def chunk(number: int) -> Path:
            # Early runs have no size in the names of their files.
            size = "" if self.size == CHUNKS[1] else f"{self.size}-"
            return self.cache.folder / f"written-{size}{number:05d}.json"

        def write(path: Path) -> None:
            seed = int(path.stem.rpartition("-")[2])
            # The start token has a position too.
            most = min(3 * longest, max_length_of(lm) - 1)
            sentences = sample_sentences(lm, self.tokenizer, self.size, most, seed, self.cache.check_stop)
            write_json(path, {"sentences": sentences})

        for number in itertools.count():
            self.cache.check_stop()
            # For a while files without a size in their names had fewer sentences.
            if chunk(number).exists() and len(read_json(chunk(number))["sentences"]) != self.size:
                chunk(number).unlink()
            if not chunk(number).exists():
                lm = lm or self.language_model()
                # Fused blocks keep nothing of a forward pass, so that threads can share the model.
                threads = cores() if speed.samples_together(lm) else 1
                # First all chunks that are surely taken, then a few at a time: some sentences are too long, or not new.
                last = max(together, number + max(1, together // 16))
                wanted = {chunk(some): self.size for some in range(number, last)}
                share(wanted, write, self.cache.check_stop, threads, "writing")
            for text in read_json(chunk(number))["sentences"]:
                yield text if len(text.split()) <= longest else ""

    def language_model(self):
        """Returns the base's language model after an epoch of LoRA on the training sentences, updates merged."""
        # One writer for all seeds of the run: they share its sentences.
        torch.manual_seed(0)
        lm = load_causal_lm(self.model)
        lm.requires_grad_(False)
        inject_lora(lm, LoRAOptions(rank=16, alpha=32))
        speed.install(lm)
        speed.set_precision(lm.base_model, "bf16" if bf16_is_fast() else "fp32")
        model = CausalLoss(lm).to(device())

        # Every 20th sentence is held out, so that the epoch has a score.
        end = border_token(self.tokenizer)
        # Room for the two borders within the model's positions.
        most = min(8 * longest_length(self.sentences), max_length_of(lm) - 2)
        ids = [[end, *row, end] for row in encode(self.tokenizer, self.sentences, most)]
        train = [row for row in range(len(ids)) if row % 20]
        held_out = list(range(0, len(ids), 20))
        batches, dev = (equal_length_batches(ids, [0] * len(ids), rows, 512, self.tokenizer) for rows in (train, held_out))
        # A checkpoint every two minutes: the epoch takes minutes, and nothing of it is lost.
        options = TrainOptions(seed=0, epochs=1, lr=3e-4, weight_decay=0.0, precision="fp32", save_every=2)

        # Another process may be training it: under the lock its finished checkpoint is found.
        with filelock.FileLock(self.cache.folder / "writer.lock"):
            fit(model, Data(batches, {"held_out": dev}, "held_out"), language_loss, options,
                Checkpointing(self.cache.folder, "writer.", resume=True),
                Hooks(stop=self.cache.stop, score=score_by_loss(language_loss)))
        # Merged, because sampling computes every layer for one token at a time.
        for layer in lora_layers(lm).values():
            layer.merge()
        return lm.eval()


def sample_sentences(lm, tokenizer, count: int, max_new_tokens: int, seed: int, check_stop: Callable[[], None]
                     ) -> list[str]:
    """Samples texts from the start token alone, at temperature 1 from all tokens; the same seed, the same texts.

    Args:
        check_stop: called after each step; raises if the process was asked to stop.

    Returns:
        `count` texts with single spaces; an empty one where no end came within `max_new_tokens`.
    """
    # From the token between two texts the model writes a text of its own.
    end = border_token(tokenizer)
    rows = speed.sample_tokens(lm, [[end]] * count, Sampling(seed=seed), max_new_tokens=max_new_tokens, end={end},
                               batch_size=TOGETHER, progress=lambda tokens: check_stop())
    return [" ".join(tokenizer.decode(row, skip_special_tokens=True).split()) if row[-1] == end else "" for row in rows]
