"""Caches the output of the frozen blocks below the lowest trained block, so that it is computed once.

    print(cache_frozen(classifier, [batches, *dev.values()], folder, memory=2.0))
    logits = classifier(*batches[0].inputs())       # begins after the frozen blocks

The composition of the batches is fixed for a run, so a cached tensor is the very result that a fresh computation of the
same batch gives, bit for bit. Nothing is cached beyond the process, hence nothing can go stale. Dropout inside the frozen
part is off throughout training.

Blocks return a tensor or a tuple; heads read one token, all tokens or a pooler's output. `FrozenPrefix.cache` finds out by
computing a few sentences with and without the cache: unless the logits are the same bit for bit, nothing is cached, and
`obstacle` names the reason.
"""
from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.backbones import blocks_of, fresh_modules
from data_utils import Batch
from fast.classifier import FastClassifier
from machine import hardware
from machine.errors import UserError
from machine.hardware import send


class CachedBatch(Batch):
    """A batch that carries the output of the classifier's frozen part; `cache` swaps the class of a `Batch`."""

    cached: Tensor

    def to(self, device: torch.device) -> CachedBatch:
        batch = super().to(device)
        attach(batch, send(self.cached, device))
        return batch

    def inputs(self) -> tuple[Tensor | None, ...]:
        return self.input_ids, self.attention_mask, self.features, self.cached


def attach(batch: Batch, cached: Tensor) -> None:
    """Makes a batch one with a cached result."""
    # In place: the training loop and this cache hold the same batch.
    batch.__class__ = CachedBatch
    batch.cached = cached


def cache_frozen(classifier: FastClassifier, splits: list[list[Batch]], folder: Path | None, memory: float) -> str:
    """Caches the output of the frozen blocks below the lowest trained one for every batch.

    Args:
        splits: batches of the training and the development splits.
        folder: see `FrozenPrefix.cache`.
        memory: GiB to hold in memory; the rest is memory-mapped.

    Returns:
        One line for the user: the size of the cache, or the reason for none; empty where nothing is frozen.
    """
    if not has_frozen_blocks(classifier):
        return ""
    prefix = classifier.prefix = FrozenPrefix(classifier)
    start, used = time.perf_counter(), 0
    # All splits share one budget: the training split, first in the list, gets its memory first.
    for split in splits:
        used = prefix.cache(split, folder, int(memory * 2 ** 30), used)
    if prefix.obstacle:
        return f"  {prefix.obstacle}; they are computed each time"
    return (f"  cached what the {prefix.lowest} frozen blocks below the lowest trained one compute: "
            f"{used / 2 ** 20:.0f} MiB in memory, {time.perf_counter() - start:.1f} s")


class _Reached(Exception):
    """Carries a block's output out of a forward pass, and ends the pass there."""

    def __init__(self, output):
        super().__init__()
        self.output = output


class NotCacheable(Exception):
    """Names the reason why the output of the frozen part cannot be cached."""


def lowest_trained_block(classifier: FastClassifier) -> int:
    """Returns the number of the lowest block that trains: 0 if embeddings train, the count if the head alone does."""
    net = classifier.net
    blocks = list(blocks_of(net.base_model).values())
    inside = set()
    for module in (*blocks, *map(net.get_submodule, fresh_modules(net))):
        inside.update(map(id, module.parameters()))
    # A trained parameter outside the blocks and the head (an embedding) changes the input of the first block.
    if any(p.requires_grad and id(p) not in inside for p in net.base_model.parameters()):
        return 0
    for i, block in enumerate(blocks):
        if any(p.requires_grad for p in block.parameters()):
            return i
    return len(blocks)


def has_frozen_blocks(classifier: FastClassifier) -> bool:
    """Returns whether a block has a fixed output: none has with a trained embedding, or without a text to read."""
    return classifier.reads_text and lowest_trained_block(classifier) > 0


class FrozenPrefix:
    """The part of a classifier below its lowest trained block.

    The classifier sets `cached` for the time of a forward pass that starts from a cached result.

    Attributes:
        lowest: number of the lowest trained block.
        head_only: whether nothing in the backbone trains; the cache then holds the head's input.
        obstacle: the reason why nothing can be cached, set by `cache`; empty otherwise.
    """

    def __init__(self, classifier: FastClassifier):
        self.classifier = classifier
        self.backbone = classifier.net.base_model
        self.blocks = list(blocks_of(self.backbone).values())
        self.lowest = lowest_trained_block(classifier)
        self.head_only = not any(p.requires_grad for p in self.backbone.parameters())
        self.cached: Tensor | None = None  # set for the running forward pass by the classifier
        self.obstacle = ""
        self.checked = False
        self.first_token = True  # whether only the first of an encoder's last hidden states is cached
        # Embeddings, below the first block, are computed each time: they cost little.
        if self.head_only:
            self._wrap(self.backbone, self._head_input)
        else:
            for block in self.blocks[:self.lowest]:
                self._wrap(block, self._block_output)

    def _wrap(self, module: nn.Module, instead: Callable) -> None:
        """Wraps the module's forward: returns the value of `instead` while a cached result is set, else computes.

        The forward of this one object is wrapped, because the library's model calls its blocks itself and offers no way to
        begin after one of them. This method is the only one that wraps a forward.
        """
        forward = module.forward
        module.forward = lambda *args, **kwargs: (forward if self.cached is None else instead)(*args, **kwargs)

    @torch.inference_mode()
    def compute(self, batch: Batch) -> Tensor:
        """Computes the input of the trained part for a batch: hidden states (B, T, C), or fewer if only the head trains.

        Raises:
            NotCacheable: the trained part reads more than that.
        """
        device = next(self.backbone.parameters()).device
        inputs = batch.input_ids.to(device), batch.attention_mask
        # A result with dropout would be one sample, repeated in every epoch.
        was_training = self.classifier.training
        self.classifier.eval()
        try:
            if self.head_only and self.classifier.decoder:
                return self.classifier.pool(*inputs).unsqueeze(1)
            # The pass ends at the last frozen module: the hook raises with its output.
            hook = (self.backbone if self.head_only else self.blocks[self.lowest - 1]).register_forward_hook(_stop)
            try:
                self.classifier.text_logits(*inputs)
            except _Reached as reached:
                return self._read_by_head(reached.output) if self.head_only else self._hidden_of(reached.output)
            finally:
                hook.remove()
        finally:
            self.classifier.train(was_training)
        raise NotCacheable("a frozen block is never reached")

    # A block's output is hidden states, or a tuple or list that begins with them. The rest of it (attention weights, say) is
    # not cached, and `_check` finds out whether a later layer needs it.

    def _hidden_of(self, output: Tensor | tuple) -> Tensor:
        """Returns the hidden states in a block's output, and notes its form for `_block_output`."""
        self.more = (None,) * (len(output) - 1) if isinstance(output, tuple | list) else None
        hidden = output if self.more is None else output[0]
        if not isinstance(hidden, Tensor):
            raise NotCacheable("their output is not hidden states")
        return hidden

    def _block_output(self, *args, **kwargs) -> Tensor | tuple:
        return self.cached if self.more is None else (self.cached, *self.more)

    # The backbone's output is hidden states and, in some architectures, its pooler's output.

    def _read_by_head(self, output) -> Tensor:
        """Returns the head's possible input from the backbone's output: (B, T or 1, C), the pooler's output as last row."""
        hidden, pooler = (getattr(output, name, None) for name in ("last_hidden_state", "pooler_output"))
        if not isinstance(hidden, Tensor) or hidden.ndim != 3:
            raise NotCacheable("its backbone hands on no hidden states by name")
        self.output_class, self.pooler = type(output), pooler is not None
        hidden = hidden[:, :1] if self.first_token else hidden
        return hidden if pooler is None else torch.cat([hidden, pooler.unsqueeze(1)], 1)

    def _head_input(self, *args, **kwargs):
        """Rebuilds the backbone's output with its strides: with other strides matmuls round differently."""
        hidden = self.cached[:, :-1] if self.pooler else self.cached
        tokens = (args[0] if args else kwargs["input_ids"]).shape[1]
        if self.first_token and not self.classifier.has_fused_blocks:
            # The head reads the first token alone, from a tensor with the strides of all tokens.
            hidden = F.pad(hidden, (0, 0, 0, tokens - 1))
        states = {"last_hidden_state": hidden.contiguous()}
        if self.pooler:
            states["pooler_output"] = self.cached[:, -1].contiguous()
        return self.output_class(**states)

    def _check(self, batches: list[Batch]) -> None:
        """Compares cached and fresh results on two sentences with pads and two without, if the architecture is not known.

        Raises:
            NotCacheable: the results differ, or cannot be computed from the cache.
        """
        if self.classifier.by_length:
            raise NotCacheable("sentences of each length are computed on their own")
        # For these the tests hold that the rest reads nothing but the cached output.
        if self.head_only and self.classifier.decoder:
            return
        if self.classifier.has_fused_blocks and not self.classifier.reads_all_tokens:
            return
        # With and without pads: without them the library builds no mask, and takes another kernel.
        kinds = {bool(batch.attention_mask.all()): batch for batch in sorted(batches, key=lambda b: b.input_ids.shape[1])}
        for batch in (_two_rows(batch) for batch in kinds.values()):
            fresh = self._outcome(batch)
            if self.head_only and self.first_token:
                # A head that reads another token, too, or all of them gives other logits; all zeros would prove nothing.
                self.first_token = bool(fresh.any()) and self._same(batch, fresh)
            if not (self.head_only and self.first_token or self._same(batch, fresh)):
                raise NotCacheable("what follows them depends on more than their hidden states")

    def _same(self, batch: Batch, fresh: Tensor) -> bool:
        attach(batch, self.compute(batch))
        try:
            return torch.equal(self._outcome(batch), fresh)
        # Code of any architecture may raise anything when it meets hidden states of an unexpected form.
        except Exception as error:
            if hardware.exhausted(error):
                raise
            return False

    @torch.inference_mode()
    def _outcome(self, batch: Batch) -> Tensor:
        """Returns the logits, or the backbone's output where a part of it trains (a fresh head's logits may be zeros)."""
        outputs, was_training = [], self.classifier.training
        hook = self.backbone.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
        batch = batch.to(next(self.backbone.parameters()).device)
        try:
            if isinstance(batch, CachedBatch):
                self.cached = batch.cached
            logits = self.classifier.eval().text_logits(batch.input_ids, batch.attention_mask)
        finally:
            self.cached = None
            hook.remove()
            self.classifier.train(was_training)
        return logits if self.head_only else outputs[0]

    def cache(self, batches: list[Batch], folder: Path | None = None, budget: int = 2 << 30, used: int = 0) -> int:
        """Computes and attaches `cached` to each batch, or to each of its micro-batches.

        Args:
            batches: of any split; their composition must not change afterwards.
            folder: place of the memory-mapped results beyond the budget, in files without a name that disappear with the
                process; the system's temporary folder if None.
            budget: bytes to hold in memory.
            used: bytes of it that are taken already.

        Returns:
            Bytes of the budget that are used now.
        """
        pinned = next(self.backbone.parameters()).is_cuda
        # The training loop computes micro-batches one at a time: each has a cached result of its own.
        parts = [part for whole in batches for part in whole.micro_batches()]
        if not self.checked:
            try:
                self._check(parts)
            except NotCacheable as error:
                self.obstacle = f"a {self.backbone.config.model_type} model's frozen blocks cannot be cached: {error}"
            self.checked = True
        if self.obstacle:
            return used
        for batch in parts:
            # Copied outside inference mode, because autograd will save the tensor.
            hidden = self.compute(batch).cpu()
            size = hidden.numel() * hidden.element_size()
            if used + size <= budget:
                # Pinned, so that copying to a GPU overlaps with computation.
                attach(batch, hidden.pin_memory() if pinned else hidden.clone())
                used += size
            else:
                attach(batch, _memory_mapped(hidden, folder))
        return used


def _memory_mapped(hidden: Tensor, folder: Path | None) -> Tensor:
    """Returns a copy of a tensor in a memory-mapped file without a name.

    Raises:
        UserError: no room for it.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".cached-") as file:
            # Written, not copied into a mapped empty file, which raises SIGBUS if the disk is full.
            file.write(hidden.contiguous().view(-1).view(torch.uint8).numpy())
            file.flush()
            return torch.from_file(file.name, shared=True, size=hidden.numel(), dtype=hidden.dtype).view(hidden.shape)
    except OSError as error:
        raise UserError(f"{folder or tempfile.gettempdir()}: no room to keep what frozen blocks compute "
                        f"({error.strerror}); give more --keep-memory, or --no-keep") from None


def _two_rows(batch: Batch) -> Batch:
    """Returns a batch of the first and the last sentence, the shortest and the longest."""
    ends = [0, -1]
    return Batch(batch.input_ids[ends], batch.attention_mask[ends], batch.labels[ends], batch.rows[ends], 0)


def _stop(module, args, output):
    raise _Reached(output)
