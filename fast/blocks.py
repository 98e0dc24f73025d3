"""Transformer blocks that compute no more than the classifier reads, and save no more than training needs.

    fuse(net.base_model)                           # GPT-2, Llama, BERT, DistilBERT, MPNet; False: none
    unique = unique_tokens(input_ids, attention_mask)      # a decoder's
    net.base_model(input_ids=unique.ids, position_ids=unique.positions, unique=unique)      # hidden states (B, 1, C)

The classes below are subclasses of those of `transformers`, with a second forward pass over the same parameters; without
the argument `unique` (or `pooled`) they behave as the library's. The result is the same up to rounding:

- The head reads one token of each sentence. The last block computes queries, output projection and MLP for that token
  alone; it needs only keys and values of the other tokens.
- In a decoder, tokens with the same prefix have the same hidden state: sentences with a shared prefix share its rows. Pads
  have no row.
- Frozen layers go through `frozen_linear`: it groups them and recomputes cheap operations in the backward pass.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bert.modeling_bert import BertAttention, BertLayer, BertSelfAttention
from transformers.models.distilbert.modeling_distilbert import DistilBertSelfAttention, TransformerBlock
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Block
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer
from transformers.models.mpnet.modeling_mpnet import MPNetAttention, MPNetLayer, MPNetModel

from fast import onepass
from fast.choice import by_onepass
from fast.frozen_linear import frozen_linear
from fast.prologue import ExactGELUPrologue, GELUPrologue, LayerNormPrologue, RMSNormPrologue, SwiGLUPrologue
from machine.hardware import send

ACTIVATIONS = {"gelu_new": GELUPrologue(), "gelu_pytorch_tanh": GELUPrologue(), "gelu": ExactGELUPrologue()}
# The longest sentence, in tokens, with attention by onepass.attend; for longer ones PyTorch is faster.
SHORT = 32


def fuse(backbone: nn.Module) -> bool:
    """Swaps the classes of the blocks and of their attention for the fused ones of this file.

    Called by `fast.install` alone. The class of an existing module is swapped, and no new module built, so that the
    parameters and their names stay those of the checkpoint.

    Returns:
        Whether this architecture has fused blocks; if not, nothing is changed.
    """
    config = backbone.config
    # The name of the activation in GPT-2; in Llama, BERT and MPNet; in DistilBERT.
    activation = getattr(config, "activation_function", None) or getattr(config, "hidden_act", None) \
        or getattr(config, "activation", None)
    if getattr(config, "add_cross_attention", False) or activation not in (
            ("silu",) if config.model_type == "llama" else ACTIVATIONS):
        return False
    # From each class of the library to its fused subclass.
    fused = {ours.__bases__[0]: ours for ours in (
        FusedGPT2Block, FusedGPT2Attention, FusedLlamaLayer, FusedLlamaAttention, FusedBertLayer, FusedBertAttention,
        FusedBertSelfAttention, FusedDistilBertBlock, FusedDistilBertAttention, FusedMPNetModel, FusedMPNetLayer,
        FusedMPNetAttention)}
    kinds = (GPT2Block, LlamaDecoderLayer, BertLayer, TransformerBlock, MPNetLayer)
    # A second call finds the fused classes of the first.
    blocks = [module for module in backbone.modules() if type(module) in (*kinds, *map(fused.get, kinds))]
    # A model with other blocks among these would mix two ways of passing hidden states.
    if not blocks or len(blocks) != config.num_hidden_layers:
        return False
    for module in backbone.modules():
        module.__class__ = fused.get(type(module), type(module))
    for i, block in enumerate(blocks):
        block.last = i == len(blocks) - 1
    return True


def is_fused(backbone: nn.Module) -> bool:
    """Returns whether `fuse` swapped the classes of a backbone's blocks."""
    kinds = (FusedGPT2Block, FusedLlamaLayer, FusedBertLayer, FusedDistilBertBlock, FusedMPNetLayer)
    return any(isinstance(module, kinds) for module in backbone.modules())


# ---------------------------------------------------------------- decoders: one row for each different prefix

@dataclass
class UniqueTokens:
    """The tokens of a batch (B, T) that a decoder computes: U rows."""

    ids: Tensor  # (U, 1) token ids
    positions: Tensor  # (U, 1)
    index: Tensor | None  # (B * T,) row of each token, for a pad the last row of its sentence; None: all tokens in order
    first: Tensor | None  # (U,) the first of the tokens of each row; None: as above
    last: Tensor | None  # (B,) row of each sentence's last token, the only one that the head reads; None: it reads all rows
    mask: Tensor | None  # (B, 1, 1, T) whether a token is real; None where all are
    shape: tuple[int, int]  # B, T
    # Called by each block with its number and the keys and values of all rows.
    keep: Callable[[int, Tensor, Tensor], None] | None = None

    @cached_property
    def chains(self) -> tuple[onepass.Chains, onepass.Chains | None]:
        """Returns the rows that each row attends to, and those that each sentence's last token (`last`) attends to."""
        # The tokens of a sentence stand in order in `index`: a token attends to a run of it that begins at its sentence.
        B, T = self.shape
        chain = torch.arange(B * T) if self.index is None else self.index
        first = chain if self.first is None else self.first
        length = self.positions[:, 0] + 1
        return (onepass.Chains(chain, first - first % T, length),
                None if self.last is None else onepass.Chains(chain, torch.arange(0, B * T, T), length[self.last]))

    def spread(self, x: Tensor) -> Tensor:  # (U, C) -> (B, T, C)
        return (x if self.index is None else x.index_select(0, self.index)).view(*self.shape, -1)

    def gather(self, x: Tensor) -> Tensor:  # (B, T, C) -> (U, C)
        x = x.flatten(0, 1)
        return x if self.first is None else x.index_select(0, self.first)

    def block_attention(self, layer: int, q: Tensor, kv: Tensor | None, heads: tuple[int, int], size: int, *how) -> Tensor:
        """Computes a block's attention; see `causal_attention`."""
        y = causal_attention(q, kv, heads, size, *how, unique=self)
        if self.keep is not None:
            self.keep(layer, *_CausalAttention.parts(q, kv, heads[0] * size, heads[1] * size)[1:])
        return y


def unique_tokens(input_ids: Tensor, attention_mask: Tensor, keys: list[int] | None = None) -> UniqueTokens:
    """Finds the unique tokens of a right-padded batch (B, T); its mask is on the CPU.

    Args:
        keys: one for each sentence; sentences with different keys (adapters, say) share no row.
    """
    B, T = input_ids.shape
    lengths = attention_mask.sum(1)
    mask = None if bool(attention_mask.all()) else attention_mask.bool()[:, None, None]
    # On a GPU every token has a row: reading the ids would wait for the GPU, and U would differ from batch to batch.
    if not input_ids.is_cpu:
        places = torch.arange(T, device=input_ids.device).expand(B, T)
        last = send(torch.arange(B, device=lengths.device) * T + lengths - 1, input_ids.device)
        return UniqueTokens(input_ids.reshape(-1, 1), places.reshape(-1, 1), None, None, last,
                            None if mask is None else send(mask, input_ids.device), (B, T))
    # A trie over the sentences: (row of the prefix, next token) -> row.
    rows: dict[tuple[int, int], int] = {}
    index, first, last = [], [], []
    for b, (sentence, length) in enumerate(zip(input_ids.tolist(), lengths.tolist(), strict=True)):
        # A root of its own for each key keeps the prefixes of different keys apart.
        row = -1 if keys is None else -1 - keys[b]
        for t, token in enumerate(sentence[:length]):
            row = rows.setdefault((row, token), len(rows))
            if row == len(first):
                first.append(b * T + t)
            index.append(row)
        # A pad has no row of its own; causal attention never reads it, and any finite number will do.
        index += [row] * (T - length)
        last.append(row)
    index, first, last = map(torch.tensor, (index, first, last))
    # Without a shared prefix and without pads the rows are the tokens: no gathering is needed.
    plain = len(first) == B * T
    return UniqueTokens(input_ids.reshape(-1)[first, None], (first % T)[:, None], None if plain else index,
                None if plain else first, last, mask, (B, T))


def causal_attention(q: Tensor, kv: Tensor | None, heads: tuple[int, int], size: int, scale: float,
                     rotary: tuple[Tensor, Tensor] | None = None, *, unique: UniqueTokens) -> Tensor:
    """Computes causal attention, y (U, C), or that of each sentence's last token alone, (B, C).

    Args:
        q: (B, C), queries of the last tokens, or (U, C + 2 K), queries, keys and values of all rows side by side. Both q
            and kv are rotated in place.
        kv: (U, 2 K), keys and values side by side, or None: they are in q.
        heads: numbers of query heads and of key heads; consecutive query heads share a key head.
        size: channels of a head.
        rotary: cosine and sine (U, size) of the rotary embedding, if the model has one.
    """
    C, K = heads[0] * size, heads[1] * size
    # Short sentences are faster without the copies below: onepass.c reads the rows in place.
    if unique.shape[1] <= SHORT and by_onepass(q):
        return _CausalAttention.apply(q, kv, (C, K), size, scale, unique, rotary)
    if rotary is not None:
        q = Rotate.apply(q, *(rotary if kv is None else (x[unique.last] for x in rotary)), C if kv is not None else C + K)
        kv = None if kv is None else Rotate.apply(kv, *rotary, K)
    # PyTorch's attention reads whole sentences: from rows to (B, T, ...), and back after it.
    q, k, v = unique.spread(q).split([C, K, K], -1) if kv is None else (q.unsqueeze(1), *unique.spread(kv).split(K, -1))
    q, k, v = (x.unflatten(-1, (-1, size)).transpose(1, 2) for x in (q, k, v))  # (B, heads, T, size)
    if kv is None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=C != K)
        return unique.gather(y.transpose(1, 2).flatten(2))
    # Query heads that share a key head are passed as several queries of that head.
    y = F.scaled_dot_product_attention(q.reshape(len(q), heads[1], -1, size), k, v, unique.mask, scale=scale)
    return y.reshape(len(q), C)


class _CausalAttention(torch.autograd.Function):
    """`causal_attention` by onepass.c, with the rows read in place. Saves its inputs and y for the backward pass."""

    @staticmethod
    def parts(q: Tensor, kv: Tensor | None, C: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values."""
        return q.split([C, K, K], 1) if kv is None else (q, *kv.split(K, 1))

    @staticmethod
    def forward(ctx, q: Tensor, kv: Tensor | None, widths: tuple[int, int], size: int, scale: float, unique: UniqueTokens,
                rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        ctx.widths, ctx.form = widths, onepass.Form(unique.chains[kv is not None], size, scale, rotary)
        y, lse = onepass.attend(*_CausalAttention.parts(q, kv, *widths), ctx.form)
        # q and kv are rotated in place by now; the kernel's backward pass rotates the gradients back.
        ctx.save_for_backward(q, kv, y, lse)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, y, lse = ctx.saved_tensors
        # The kernel writes each gradient in the layout of its input.
        d_q, d_kv = (t if t is None else torch.empty_strided(t.shape, t.stride()) for t in (q, kv))
        onepass.attend_backward(_CausalAttention.parts(q, kv, *ctx.widths), ctx.form, y, lse, grad,
                                _CausalAttention.parts(d_q, d_kv, *ctx.widths))
        return d_q, d_kv, None, None, None, None, None


class FusedGPT2Attention(GPT2Attention):
    def forward(self, hidden_states, *args, unique: UniqueTokens | None = None, norm=None, last=False, **kwargs):
        if unique is None:
            return super().forward(hidden_states, *args, **kwargs)
        C, kv = self.embed_dim, None
        # Of the last block's queries the head reads those of the pooled tokens; keys and values it needs of all rows.
        if last:
            q = frozen_linear([self.c_attn], hidden_states[unique.last], LayerNormPrologue(norm), slice(0, C))
            kv = frozen_linear([self.c_attn], hidden_states, LayerNormPrologue(norm), slice(C, None))
        else:
            q = frozen_linear([self.c_attn], hidden_states, LayerNormPrologue(norm))
        heads = (self.num_heads, self.num_heads)
        y = unique.block_attention(self.layer_idx, q, kv, heads, self.head_dim, self.scaling, None)
        return frozen_linear([self.c_proj], y)


class FusedGPT2Block(GPT2Block):
    last = False  # set by `fuse`: whether this is the model's last block; it computes the pooled token alone

    def forward(self, hidden_states, *args, unique: UniqueTokens | None = None, **kwargs):
        if unique is None:
            return super().forward(hidden_states, *args, **kwargs)
        x = hidden_states.squeeze(1)  # (U, C)
        last = self.last and unique.last is not None
        # The norms are handed on as prologues: their output exists only within `frozen_linear`.
        y = self.attn(x, unique=unique, norm=self.ln_1, last=last)
        # In place: `frozen_linear` does not save its own output, so that autograd does not need y.
        x = y.add_(x[unique.last] if last else x)
        y = frozen_linear([self.mlp.c_fc], x, LayerNormPrologue(self.ln_2))
        y = frozen_linear([self.mlp.c_proj], y, ACTIVATIONS[self.attn.config.activation_function])
        return y.add_(x).unsqueeze(1)


class Rotate(torch.autograd.Function):
    """Rotary position embedding (Su et al. 2021) of the first heads of x, in place.

    Channels i and i + n / 2 of a head are rotated as one complex number; backward rotates the gradient back.
    """

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor, columns: int) -> Tensor:
        half = cos.shape[-1] // 2
        a, b = x[:, :columns].unflatten(-1, (-1, 2, half)).unbind(2)  # (U, heads, half) each
        cos, sin = cos[:, None, :half], sin[:, None, :half]
        # Both mixed terms first: the two lines after them write over a and b.
        b_sin, a_sin = b * sin, a * sin
        a.mul_(cos).sub_(b_sin)
        b.mul_(cos).add_(a_sin)
        return x

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, columns: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.columns = columns
        ctx.mark_dirty(x)
        return Rotate.rotate(x, cos, sin, columns)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        # The inverse rotation; a copy, because the gradient may be somebody else's too.
        return Rotate.rotate(grad.clone(), cos, -sin, ctx.columns), None, None, None


class FusedLlamaAttention(LlamaAttention):
    together = (("q_proj", "k_proj", "v_proj"),)  # read the same input: see `fast.matmul.set_precision`

    def forward(self, hidden_states, *args, unique: UniqueTokens | None = None, norm=None, position_embeddings=None,
                last=False, **kwargs):
        if unique is None:
            return super().forward(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)
        prologue, kv = RMSNormPrologue(norm), None
        # One row of angles for each row of tokens, contiguous for onepass.c.
        rotary = tuple(x.expand(len(unique.ids), -1, -1).squeeze(1).contiguous() for x in position_embeddings)  # (U, D) each
        if last:
            q = frozen_linear([self.q_proj], hidden_states[unique.last], prologue)
            kv = frozen_linear([self.k_proj, self.v_proj], hidden_states, prologue)
        else:
            q = frozen_linear([self.q_proj, self.k_proj, self.v_proj], hidden_states, prologue)
        heads = (self.config.num_attention_heads, self.config.num_key_value_heads)
        y = unique.block_attention(self.layer_idx, q, kv, heads, self.head_dim, self.scaling, rotary)
        return frozen_linear([self.o_proj], y)


class FusedLlamaLayer(LlamaDecoderLayer):
    last = False  # as in FusedGPT2Block
    together = (("mlp.gate_proj", "mlp.up_proj"),)

    def forward(self, hidden_states, *args, unique: UniqueTokens | None = None, **kwargs):
        if unique is None:
            return super().forward(hidden_states, *args, **kwargs)
        x = hidden_states.squeeze(1)  # (U, C)
        last = self.last and unique.last is not None
        y = self.self_attn(x, unique=unique, norm=self.input_layernorm, last=last,
                           position_embeddings=kwargs["position_embeddings"])
        x = y.add_(x[unique.last] if last else x)
        y = frozen_linear([self.mlp.gate_proj, self.mlp.up_proj], x, RMSNormPrologue(self.post_attention_layernorm))
        return frozen_linear([self.mlp.down_proj], y, SwiGLUPrologue()).add_(x).unsqueeze(1)


# ---------------------------------------------------------------- encoders: [CLS] is read

def attend_to_all(q: Tensor, kv: Tensor, size: int, scale: float, mask: Tensor | None) -> Tensor:
    """Computes attention of q (B, T or 1, C) over k and v side by side (B, T, 2 C) -> as q."""
    q, k, v = (x.unflatten(-1, (-1, size)).transpose(1, 2) for x in (q, *kv.chunk(2, -1)))
    # The last block has one query, and some masks of the library have a row for each token.
    if mask is not None and mask.shape[2] != q.shape[2]:
        mask = mask[:, :, :q.shape[2]]
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2).flatten(2)


def project(linears: list[nn.Module], x: Tensor, prologue=None) -> Tensor:
    """Computes `frozen_linear` of x (B, T, in)."""
    return frozen_linear(linears, x.flatten(0, 1), prologue).unflatten(0, x.shape[:2])


def qkv_attention(q: nn.Module, k: nn.Module, v: nn.Module, x: Tensor, size: int, scale: float, mask: Tensor | None,
                  last: bool) -> Tensor:
    """Computes attention of x (B, T, C) to itself; that of its first token alone if `last`."""
    if last:
        return attend_to_all(project([q], x[:, :1]), project([k, v], x), size, scale, mask)
    qkv = project([q, k, v], x)
    return attend_to_all(qkv[..., :x.shape[-1]], qkv[..., x.shape[-1]:], size, scale, mask)


class FusedBertSelfAttention(BertSelfAttention):
    together = (("query", "key", "value"),)

    def forward(self, hidden_states, attention_mask=None, *args, pooled=False, last=False, **kwargs):
        if not pooled:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        return qkv_attention(self.query, self.key, self.value, hidden_states, self.attention_head_size, self.scaling,
                             attention_mask, last), None


class FusedBertAttention(BertAttention):
    def forward(self, hidden_states, attention_mask=None, *args, pooled=False, last=False, **kwargs):
        if not pooled:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        y, _ = self.self(hidden_states, attention_mask, pooled=True, last=last)
        return self.output(y, hidden_states[:, :1] if last else hidden_states), None


class FusedBertLayer(BertLayer):
    last = False  # as in FusedGPT2Block

    def forward(self, hidden_states, attention_mask=None, *args, pooled=False, **kwargs):
        if not pooled:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        x, _ = self.attention(hidden_states, attention_mask, pooled=True, last=self.last)
        y = project([self.intermediate.dense], x)
        y = project([self.output.dense], y, ACTIVATIONS[self.attention.self.config.hidden_act])
        return self.output.LayerNorm(y.add_(x))


class FusedDistilBertAttention(DistilBertSelfAttention):
    together = (("q_lin", "k_lin", "v_lin"),)

    def forward(self, hidden_states, attention_mask=None, pooled=False, last=False, **kwargs):
        if not pooled:
            return super().forward(hidden_states, attention_mask, **kwargs)
        y = qkv_attention(self.q_lin, self.k_lin, self.v_lin, hidden_states, self.attention_head_size, self.scaling,
                          attention_mask, last)
        return project([self.out_lin], y), None


class FusedDistilBertBlock(TransformerBlock):
    last = False  # as in FusedGPT2Block

    def forward(self, hidden_states, attention_mask=None, pooled=False, **kwargs):
        if not pooled:
            return super().forward(hidden_states, attention_mask, **kwargs)
        y, _ = self.attention(hidden_states, attention_mask, pooled=True, last=self.last)
        x = self.sa_layer_norm(y + (hidden_states[:, :1] if self.last else hidden_states))
        y = project([self.ffn.lin1], x)
        y = project([self.ffn.lin2], y, ACTIVATIONS[self.attention.config.activation])
        return self.output_layer_norm(y.add_(x))


class FusedMPNetModel(MPNetModel):
    """MPNet (Song et al. 2020); the library's model hands no argument on to its blocks."""

    def forward(self, input_ids=None, attention_mask=None, *args, pooled=False, every=False, **kwargs):
        """Returns the library's output; with `pooled` the first token's state alone, with `every` the states of all."""
        if not pooled:
            return super().forward(input_ids, attention_mask, *args, **kwargs)
        x = self.embeddings(input_ids=input_ids)
        # A bias of the scores for each distance of two tokens, the same in all blocks: (1, heads, T, T).
        bias = self.encoder.compute_position_bias(x[:1]).to(x.dtype)
        if attention_mask is not None:
            bias = bias.masked_fill(~attention_mask.bool()[:, None, None], torch.finfo(x.dtype).min)  # (B, heads, T, T)
        for layer in self.encoder.layer:
            x = layer(x, bias, pooled=True, every=every, activation=self.config.hidden_act)
        return BaseModelOutput(last_hidden_state=x)


class FusedMPNetAttention(MPNetAttention):
    together = (("attn.q", "attn.k", "attn.v"),)

    def forward(self, hidden_states, attention_mask=None, *args, pooled=False, last=False, **kwargs):
        if not pooled:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        attn, x = self.attn, hidden_states
        size = attn.attention_head_size
        y = qkv_attention(attn.q, attn.k, attn.v, x, size, size ** -0.5, attention_mask, last)
        return self.LayerNorm(project([attn.o], y).add_(x[:, :1] if last else x))


class FusedMPNetLayer(MPNetLayer):
    last = False  # as in FusedGPT2Block

    def forward(self, hidden_states, attention_mask=None, *args, pooled=False, every=False, activation="", **kwargs):
        if not pooled:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        x = self.attention(hidden_states, attention_mask, pooled=True, last=self.last and not every)
        y = project([self.intermediate.dense], x)
        y = project([self.output.dense], y, ACTIVATIONS[activation])
        return self.output.LayerNorm(y.add_(x))
