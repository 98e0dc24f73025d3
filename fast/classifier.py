"""`FastClassifier`: a `TextClassifier` that computes no more than its logits need.

- Its fused blocks (blocks.py) compute each different prefix of a batch once, no pad, and in the last block the pooled token
  alone.
- The output of its frozen blocks can be cached (frozen.py); the forward pass then begins after them.

`fast.install` swaps the class of a classifier for this one.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fast.attention import UniqueTokens, unique_tokens
from fast.encoders import FusedEncoder, net_head
from model import TextClassifier

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def backbone_states(backbone: PreTrainedModel, unique: UniqueTokens) -> Tensor:
    """Returns a fused decoder's states (rows, C), after its final norm: of each sentence's last token, or of all tokens."""
    # Fused blocks read no mask. Without this one, the library would build one and wait for the GPU in doing so.
    none = unique.ids.new_ones(1, 1, 1, 1)
    return backbone(input_ids=unique.ids, attention_mask=none, position_ids=unique.positions, use_cache=False,
                    unique=unique).last_hidden_state[:, 0]


class FastClassifier(TextClassifier):
    """A classifier under `fast.install`; its logits are those of `TextClassifier` up to rounding."""

    has_fused_blocks = False  # set by `fast.install`: whether the architecture has fused blocks
    prefix = None  # set by `frozen.cache_frozen`: the `FrozenPrefix` that reads and fills the cache

    @property
    def fused(self) -> bool:
        """Returns whether the fused blocks compute."""
        # They give the backbone's own weights no gradient: full fine-tuning takes the library's blocks.
        trained = torch.is_grad_enabled() and next(self.net.base_model.parameters()).requires_grad
        # A model that computes sentences by length keeps the library's blocks.
        return self.has_fused_blocks and not self.by_length and not self.trains_backbone and not trained

    def forward(self, input_ids: Tensor, attention_mask: Tensor, features: Tensor | None = None,
                cached: Tensor | None = None) -> Tensor:
        """Returns logits (B, labels); see `TextClassifier.forward`.

        Args:
            cached: the output of the frozen part for this batch (`frozen.CachedBatch`), read instead of computed.
        """
        if cached is None:
            return super().forward(input_ids, attention_mask, features)
        self.prefix.cached = cached
        try:
            return super().forward(input_ids, attention_mask, features)
        finally:
            self.prefix.cached = None

    def batch_logits(self, input_ids: Tensor, attention_mask: Tensor, every: bool = False) -> Tensor:
        # Some of the library's classifiers hand no argument on: backbone and head are called in turn.
        if self.fused and isinstance(self.net.base_model, FusedEncoder):
            mask = self.encoder_mask(input_ids, attention_mask)
            states = self.net.base_model(input_ids=input_ids, attention_mask=mask, pooled=True, every=every)
            return net_head(self.net, states.last_hidden_state).float()
        # Another encoder's fused blocks hang on one argument, passed through the library's model to each block; they give
        # the first token's state alone.
        if self.fused and not self.decoder and not every:
            mask = self.encoder_mask(input_ids, attention_mask)
            some = {"every": True} if self.reads_all_tokens else {}
            return self.net(input_ids=input_ids, attention_mask=mask, pooled=True, **some).logits.float()
        return super().batch_logits(input_ids, attention_mask, every)

    @property
    def reads_all_tokens(self) -> bool:
        """Returns whether an encoder's head reads the mean of all tokens (ModernBERT's choice), not the first one."""
        return getattr(self.net.config, "classifier_pooling", "cls") != "cls"

    def encoder_mask(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor | None:
        mask = super().encoder_mask(input_ids, attention_mask)
        config = self.net.config
        # An architecture with windows makes its masks from the plain one.
        if mask is not None and not mask.is_cpu and self.has_fused_blocks and config._attn_implementation == "sdpa" \
                and not hasattr(config, "layer_types"):
            # The form that attention takes; for any other one the library asks the GPU whether it masks anything.
            mask = mask.bool()[:, None, None]
        return mask

    def pool(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # With the head alone in training the cache holds the pooled states: no block is left to compute.
        if self.prefix is not None and self.prefix.cached is not None and self.prefix.head_only:
            return self.prefix.cached[:, 0]
        if self.fused:
            return backbone_states(self.net.base_model, unique_tokens(input_ids, attention_mask))
        return super().pool(input_ids, attention_mask)

    def grouped_logits(self, input_ids: Tensor, attention_mask: Tensor, group: Tensor,
                       route: Callable[..., None]) -> Tensor:
        """Returns logits of sentences in groups; see `speed.grouped_logits`."""
        B, T = input_ids.shape
        # Sentences of different groups share no row: each row gets the adapter of one group.
        unique = unique_tokens(input_ids, attention_mask, group.tolist())
        # `route` tells tokens from sentences by their number: with as many of both, sentences share no prefix either.
        if len(unique.ids) == B and T > 1:
            unique = unique_tokens(input_ids, attention_mask, list(range(B)))
        token = torch.arange(B * T, device=input_ids.device) if unique.first is None else unique.first
        route(group, group[token // T])
        return self.head_logits(backbone_states(self.net.base_model, unique))

    def token_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if not self.fused:
            return super().token_states(input_ids, attention_mask)
        # Every token's state is read; tokens with the same prefix have the same state.
        unique = replace(unique_tokens(input_ids, attention_mask), last=None)
        return unique.spread(backbone_states(self.net.base_model, unique))
