"""Encoders that hand no argument on to their blocks in the library: their forward pass under `fuse` (blocks.py).

    states = net.base_model(input_ids=ids, attention_mask=mask, pooled=True)      # the first token's, (B, 1, C)
    logits = net_head(net, states)

Both read the distance of two tokens in each block: MPNet adds a learnt number to their score, DeBERTa adds two dot products.
"""
from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from fast.frozen_linear import frozen_linear


class FusedEncoder:
    """Stands before the library's model among the bases of its fused class; `block_inputs` says how tokens are read."""

    @staticmethod
    def fits(config) -> bool:
        """Returns whether this forward pass computes all that the configuration asks for."""
        return True

    def forward(self, input_ids=None, attention_mask=None, *args, pooled=False, every=False, **kwargs):
        """Returns the library's output; with `pooled` the first token's state alone, with `every` the states of all."""
        if not pooled:
            return super().forward(input_ids, attention_mask, *args, **kwargs)
        x = self.embeddings(input_ids=input_ids)  # (B, T, C)
        real = None if attention_mask is None else attention_mask.bool()[:, None, None]  # (B, 1, 1, T)
        mask, distances = self.block_inputs(x, real)
        for layer in self.encoder.layer:
            x = layer(x, mask, pooled=True, every=every, distances=distances)
        return BaseModelOutput(last_hidden_state=x)

    def block_inputs(self, x: Tensor, real: Tensor | None) -> tuple[Tensor | None, Distances | None]:
        """Returns the inputs of all blocks next to the states: a mask of the scores or what is added to them, and distances.

        Args:
            x: (B, T, C).
            real: (B, 1, 1, T), whether a token is no pad; None: all are.
        """
        raise NotImplementedError


class MPNetEncoder(FusedEncoder):
    """MPNet (Song et al. 2020)."""

    def block_inputs(self, x: Tensor, real: Tensor | None) -> tuple[Tensor, None]:
        # A bias of the scores for each distance of two tokens, the same in all blocks: (1, heads, T, T).
        bias = self.encoder.compute_position_bias(x[:1]).to(x.dtype)
        return bias if real is None else bias.masked_fill(~real, torch.finfo(x.dtype).min), None


class DebertaEncoder(FusedEncoder):
    """DeBERTa of versions 2 and 3 (He et al. 2021 and 2023)."""

    @staticmethod
    def fits(config) -> bool:
        # All blocks read distances, and no convolution follows the first one.
        return bool(config.relative_attention and config.pos_att_type) and not getattr(config, "conv_kernel_size", 0)

    def block_inputs(self, x: Tensor, real: Tensor | None) -> tuple[Tensor | None, Distances]:
        from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

        # Only the vectors of this batch's distances are projected; the library projects all of them, 512 as a rule.
        T, attention = x.shape[1], self.encoder.layer[0].attention.self
        place = torch.arange(T, device=x.device)
        distance = torch.arange(1 - T, T, device=x.device)
        if attention.position_buckets > 0:
            sizes = attention.position_buckets, attention.max_relative_positions
            distance = make_log_bucket_position(distance, *sizes).long()
        span = attention.pos_ebd_size
        # Distances beyond the span share its last vector, and those of one bucket share one.
        rows, inverse = torch.unique((distance + span).clamp(0, 2 * span - 1), return_inverse=True)
        index = inverse[place[:, None] - place + T - 1]
        return real, Distances(self.encoder.get_rel_embedding()[rows].to(x.dtype), index)


ENCODERS = {"MPNetModel": MPNetEncoder, "DebertaV2Model": DebertaEncoder}  # by the library's class


@functools.cache
def fused_model(library: type[nn.Module]) -> type[nn.Module]:
    """Returns the subclass of a model's class that has the forward pass above too."""
    return type(f"Fused{library.__name__}", (ENCODERS[library.__name__], library), {})


@dataclass
class Distances:
    """The vectors of the distances between the tokens of a batch."""

    vectors: Tensor  # (R, C)
    index: Tensor  # (T, T), the vector of each pair [reader, read]

    def seen_by(self, attention: nn.Module) -> DistanceScores:
        """Projects the vectors for one block's attention, as keys, as queries, or both."""
        kinds = attention.pos_att_type
        if attention.share_att_key:
            key, query = attention.key_proj, attention.query_proj
        else:
            key, query = (getattr(attention, name, None) for name in ("pos_key_proj", "pos_query_proj"))
        return DistanceScores(frozen_linear([key], self.vectors) if "c2p" in kinds else None,
                              frozen_linear([query], self.vectors) if "p2c" in kinds else None, self.index)


@dataclass
class DistanceScores:
    """The scores of the distances in one block: "disentangled attention", equation 4 of He et al. (2021)."""

    keys: Tensor | None  # (R, channels): each query reads the distance
    queries: Tensor | None  # (R, channels): each distance reads the key
    index: Tensor  # (T, T)

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        """Returns unscaled scores of the first Q readers, (B, heads, Q, size), (B, heads, T, size) -> (B, heads, Q, T)."""
        index, heads, found = self.index[:q.shape[2]], q.shape[1], []
        # Each token is scored with all R distances, and `index` chooses those of its pairs.
        if self.keys is not None:
            scores = q @ _by_head(self.keys, heads)  # (B, heads, Q, R)
            found.append(torch.take_along_dim(scores, index[None, None], -1))
        if self.queries is not None:
            scores = k @ _by_head(self.queries, heads)  # (B, heads, T, R)
            found.append(torch.take_along_dim(scores, index.t()[None, None], -1).transpose(2, 3))
        return sum(found)


def _by_head(rows: Tensor, heads: int) -> Tensor:  # (R, channels) -> (heads, size, R)
    return rows.view(len(rows), heads, -1).permute(1, 2, 0)


def net_head(net: nn.Module, states: Tensor) -> Tensor:
    """Returns the logits (B, labels) that the head of such an encoder gives its states (B, 1 or T, C)."""
    pooler = getattr(net, "pooler", None)
    return net.classifier(states if pooler is None else net.dropout(pooler(states)))
