"""Nothing frozen is computed twice: what enters the lowest trained block is computed once and cached.

    prefix = FrozenPrefix(classifier)      # after inject_lora
    prefix.cache(batches)                   # once; each batch now carries its hidden states
    logits = classifier(batch.input_ids, batch.attention_mask, batch.cached)

The composition of the batches is fixed for a run, so a cached tensor is the very result that a fresh
computation of the same batch gives, bit for bit. Nothing is cached beyond the process, hence nothing
can go stale. Dropout inside the frozen part is off throughout training.
"""
from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from data.backbones import blocks_of
from data_utils import Batch
from record.files import UserError

if TYPE_CHECKING:
    from model import TextClassifier



class _Reached(Exception):
    """Carries the hidden states out of a forward pass that need not go on."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden


def lowest_trained_block(classifier: TextClassifier) -> int:
    """Number of the lowest block with a trained parameter; 0 if the embeddings train, the count if only the head does."""
    backbone = classifier.net.base_model
    blocks = blocks_of(backbone)[1]
    inside = {id(p) for block in blocks for p in block.parameters()}
    if any(p.requires_grad and id(p) not in inside for p in backbone.parameters()):
        return 0
    return next((i for i, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters())), len(blocks))


class FrozenPrefix:
    """The part of a classifier below its lowest trained block.

    Attributes:
        lowest: number of the lowest trained block.
        head_only: nothing in the backbone trains; its pooled output is cached instead of hidden states.
    """

    def __init__(self, classifier: TextClassifier):
        self.classifier = classifier
        self.backbone = classifier.net.base_model
        self.blocks = blocks_of(self.backbone)[1]
        self.lowest = lowest_trained_block(classifier)
        self.head_only = self.lowest == len(self.blocks)
        self.cached: Tensor | None = None  # what the pass that is running starts from
        if self.head_only:
            self._wrap(self.backbone, self._backbone_output)
        else:
            for i, block in enumerate(self.blocks[:self.lowest]):
                self._wrap(block, (lambda hidden: self.cached) if i == 0 else (lambda hidden: hidden))
        classifier.prefix = self

    def _wrap(self, module: nn.Module, instead) -> None:
        """Lets the module answer with `instead(its first input)` while there is something cached to start from."""
        forward = module.forward

        def answer(*args, **kwargs):
            if self.cached is None:
                return forward(*args, **kwargs)
            return instead(args[0] if args else kwargs.get("hidden_states"))
        module.forward = answer

    def _backbone_output(self, _) -> BaseModelOutputWithPooling:
        """Kept (B, 1 or 2, C): the pooled token's hidden state and, where the architecture has one, its pooler's output."""
        return BaseModelOutputWithPooling(last_hidden_state=self.cached[:, :1], pooler_output=self.cached[:, -1])

    @torch.inference_mode()
    def compute(self, batch: Batch) -> Tensor:
        """What the trained part reads of a batch: (B, T, C), or (B, 1 or 2, C) if only the head trains."""
        device = next(self.backbone.parameters()).device
        input_ids, mask = batch.input_ids.to(device), batch.attention_mask
        was_training = self.classifier.training
        self.classifier.eval()
        try:
            if self.head_only:
                return self._pooled(input_ids, mask)
            hook = self.blocks[self.lowest].register_forward_pre_hook(_stop, with_kwargs=True)
            try:
                self.classifier.text_logits(input_ids, mask)
            except _Reached as reached:
                return reached.hidden
            finally:
                hook.remove()
        finally:
            self.classifier.train(was_training)
        raise RuntimeError(f"block {self.lowest} was never reached")

    def _pooled(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        if self.classifier.decoder:
            return self.classifier.pool(input_ids, mask).unsqueeze(1)
        output = self.backbone(**self.classifier.encoder_inputs(input_ids, mask))
        pooler = getattr(output, "pooler_output", None)
        first = output.last_hidden_state[:, 0]
        return torch.stack([first] if pooler is None else [first, pooler], 1)

    def cache(self, batches: list[Batch], folder: Path | None = None, budget: int = 2 << 30, used: int = 0) -> int:
        """Computes and attaches `cached` to each batch, or to each of its parts.

        Args:
            batches: of any split; their composition must not change afterwards.
            folder: where what exceeds the budget is memory-mapped, in a file without a name that goes
                with the process; the system's temporary folder if None.
            budget: bytes to hold in memory.
            used: bytes of it that are taken already.

        Returns:
            Bytes of the budget that are used now.
        """
        pinned = next(self.backbone.parameters()).is_cuda
        for batch in (piece for whole in batches for piece in whole.micro_batches()):
            # A copy outside inference mode, for autograd will save it.
            hidden = self.compute(batch).cpu()
            size = hidden.numel() * hidden.element_size()
            if used + size <= budget:
                # Pinned, it is copied to a GPU beside what the GPU computes.
                batch.cached, used = hidden.pin_memory() if pinned else hidden.clone(), used + size
                continue
            try:
                with tempfile.NamedTemporaryFile(dir=folder, prefix=".cached-") as file:
                    # Written, not copied into a mapping of an empty file: on a full disk that would be a SIGBUS.
                    file.write(hidden.contiguous().view(-1).view(torch.uint8).numpy())
                    file.flush()
                    batch.cached = torch.from_file(file.name, shared=True, size=hidden.numel(), dtype=hidden.dtype)
            except OSError as error:
                raise UserError(f"{folder or tempfile.gettempdir()}: no room to keep what frozen blocks compute "
                                f"({error.strerror}); give more --keep-memory, or --no-keep") from None
            batch.cached = batch.cached.view(hidden.shape)
        return used


def _stop(module, args, kwargs):
    raise _Reached(args[0] if args else kwargs["hidden_states"])


