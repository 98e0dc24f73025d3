"""Transformer blocks that compute no more than the classifier reads, and keep no more than training needs.

    fuse(net.base_model)                           # GPT-2, Llama, BERT, DistilBERT; says whether it knows the model
    rows = rows_of(input_ids, attention_mask)      # a decoder's
    net.base_model(input_ids=rows.ids, position_ids=rows.positions, rows=rows)      # hidden states (B, 1, C)

The classes below are those of `transformers` with another way through the same parameters; without the
argument `rows` (or `pooled`) they are the library's in every respect. The outcome is the same up to rounding:

- One token of each sentence is read in the end. The last block computes queries, output projection and MLP
  for that token alone; of the others it needs keys and values only.
- In a decoder, tokens with the same beginning have the same hidden state: sentences that begin alike share
  the rows of their common beginning. Pads have no row.
- Frozen layers go through `lora.product`, which groups them and recomputes what is cheap.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertAttention, BertLayer, BertSelfAttention
from transformers.models.distilbert.modeling_distilbert import DistilBertSelfAttention, TransformerBlock
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Block
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from lora import GELU, ExactGELU, LayerNorm, RMSNorm, SwiGLU, product

ACTIVATIONS = {"gelu_new": GELU(), "gelu_pytorch_tanh": GELU(), "gelu": ExactGELU()}


def fuse(backbone: nn.Module) -> bool:
    """Turns the blocks into the classes below; False, and nothing done, where the architecture is not known."""
    config = backbone.config
    activation = getattr(config, "activation_function", None) or getattr(config, "hidden_act", None) \
        or getattr(config, "activation", None)
    if getattr(config, "add_cross_attention", False) or activation not in (
            ("silu",) if config.model_type == "llama" else ACTIVATIONS):
        return False
    known = {base: ours for ours in (RowsGPT2Block, RowsGPT2Attention, RowsLlamaLayer, RowsLlamaAttention, PooledBertLayer,
                                     PooledBertAttention, PooledBertSelfAttention, PooledDistilBertBlock,
                                     PooledDistilBertAttention) for base in ours.__bases__}
    blocks = [module for module in backbone.modules() if type(module) in (
        GPT2Block, LlamaDecoderLayer, BertLayer, TransformerBlock, *known.values())]
    if len(blocks) != config.num_hidden_layers:
        return False
    for module in backbone.modules():
        module.__class__ = known.get(type(module), type(module))
    for i, block in enumerate(blocks):
        block.last = i == len(blocks) - 1
    return True


# ---------------------------------------------------------------- decoders: one row for each different beginning

@dataclass
class Rows:
    """The tokens of a batch (B, T) that are computed: U rows."""

    ids: Tensor  # (U, 1) token ids
    positions: Tensor  # (U, 1)
    index: Tensor | None  # (B * T,) row of each token, a pad's being its sentence's last; None: all tokens in order
    first: Tensor | None  # (U,) the first token that a row stands for
    last: Tensor  # (B,) row of each sentence's last token
    mask: Tensor | None  # (B, 1, 1, T) whether a token is real; None where all are
    shape: tuple[int, int]  # B, T

    def spread(self, x: Tensor) -> Tensor:  # (U, C) -> (B, T, C)
        return (x if self.index is None else x.index_select(0, self.index)).view(*self.shape, -1)

    def gather(self, x: Tensor) -> Tensor:  # (B, T, C) -> (U, C)
        x = x.flatten(0, 1)
        return x if self.first is None else x.index_select(0, self.first)


def rows_of(input_ids: Tensor, attention_mask: Tensor) -> Rows:
    """Rows of a right-padded batch (B, T)."""
    B, T = input_ids.shape
    lengths = attention_mask.sum(1)
    if input_ids.is_cuda:  # one shape for all batches of a size, and nothing that waits for the GPU
        places = torch.arange(T, device=input_ids.device).expand(B, T)
        return Rows(input_ids.reshape(-1, 1), places.reshape(-1, 1), None, None,
                    torch.arange(B, device=input_ids.device) * T + lengths - 1,
                    attention_mask.bool()[:, None, None], (B, T))
    rows: dict[tuple[int, int], int] = {}  # (row of what came before, token) -> row
    index, first, last = [], [], []
    for b, (sentence, length) in enumerate(zip(input_ids.tolist(), lengths.tolist(), strict=True)):
        row = -1
        for t, token in enumerate(sentence[:length]):
            row = rows.setdefault((row, token), len(rows))
            if row == len(first):
                first.append(b * T + t)
            index.append(row)
        index += [row] * (T - length)
        last.append(row)
    index, first, last = map(torch.tensor, (index, first, last))
    plain = len(first) == B * T
    return Rows(input_ids.reshape(-1)[first, None], (first % T)[:, None], None if plain else index,
                None if plain else first, last, None if bool(attention_mask.all()) else attention_mask.bool()[:, None, None],
                (B, T))


def attend(q: Tensor, k: Tensor, v: Tensor, size: int, scale: float, rows: Rows) -> Tensor:
    """Causal attention with heads of `size` channels: q (B, T or 1, C), k and v (B, T, C of fewer heads) -> as q."""
    q, k, v = (x.unflatten(-1, (-1, size)).transpose(1, 2) for x in (q, k, v))  # (B, heads, T, size)
    if q.shape[2] == k.shape[2]:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    else:  # the last token's: heads that share a key stand as so many queries of it
        y = F.scaled_dot_product_attention(q.reshape(len(q), k.shape[1], -1, size), k, v, rows.mask, scale=scale)
        y = y.reshape(len(q), -1, 1, size)
    return y.transpose(1, 2).flatten(2)


class RowsGPT2Attention(GPT2Attention):
    def forward(self, hidden_states, *args, rows: Rows | None = None, norm=None, last=False, **kwargs):
        if rows is None:
            return super().forward(hidden_states, *args, **kwargs)
        C = self.embed_dim
        if last:
            q = product([self.c_attn], hidden_states[rows.last], LayerNorm(norm), slice(0, C)).unsqueeze(1)
            k, v = rows.spread(product([self.c_attn], hidden_states, LayerNorm(norm), slice(C, None))).split(C, -1)
        else:
            q, k, v = rows.spread(product([self.c_attn], hidden_states, LayerNorm(norm))).split(C, -1)
        y = attend(q, k, v, self.head_dim, self.scaling, rows)
        return product([self.c_proj], y.flatten(0, 1) if last else rows.gather(y))


class RowsGPT2Block(GPT2Block):
    def forward(self, hidden_states, *args, rows: Rows | None = None, **kwargs):
        if rows is None:
            return super().forward(hidden_states, *args, **kwargs)
        x = hidden_states.squeeze(1)  # (U, C)
        y = self.attn(x, rows=rows, norm=self.ln_1, last=self.last)
        x = y.add_(x[rows.last] if self.last else x)
        y = product([self.mlp.c_fc], x, LayerNorm(self.ln_2))
        y = product([self.mlp.c_proj], y, ACTIVATIONS[self.attn.config.activation_function])
        return y.add_(x).unsqueeze(1)


class _Rotate(torch.autograd.Function):
    """Rotary position embedding (Su et al. 2021) of the first heads of x, in place.

    Channels i and i + n / 2 of a head are turned as one complex number; backward turns them back.
    """

    @staticmethod
    def turn(x: Tensor, cos: Tensor, sin: Tensor, columns: int) -> Tensor:
        half = cos.shape[-1] // 2
        a, b = x[:, :columns].unflatten(-1, (-1, 2, half)).unbind(2)  # (U, heads, half) each
        cos, sin = cos[:, None, :half], sin[:, None, :half]
        b_sin, a_sin = b * sin, a * sin
        a.mul_(cos).sub_(b_sin)
        b.mul_(cos).add_(a_sin)
        return x

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, columns: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.columns = columns
        ctx.mark_dirty(x)
        return _Rotate.turn(x, cos, sin, columns)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _Rotate.turn(grad.clone(), cos, -sin, ctx.columns), None, None, None


class RowsLlamaAttention(LlamaAttention):
    def forward(self, hidden_states, *args, rows: Rows | None = None, norm=None, position_embeddings=None, last=False,
                **kwargs):
        if rows is None:
            return super().forward(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)
        D, before = self.head_dim, RMSNorm(norm)
        cos, sin = (x.expand(len(rows.ids), -1, -1).squeeze(1) for x in position_embeddings)  # (U, D)
        q_size, k_size = (self.config.num_attention_heads * D, self.config.num_key_value_heads * D)
        if last:
            q = product([self.q_proj], hidden_states[rows.last], before)
            q = _Rotate.apply(q, cos[rows.last], sin[rows.last], q_size).unsqueeze(1)
            kv = _Rotate.apply(product([self.k_proj, self.v_proj], hidden_states, before), cos, sin, k_size)
            k, v = rows.spread(kv).split(k_size, -1)
        else:
            qkv = product([self.q_proj, self.k_proj, self.v_proj], hidden_states, before)
            qkv = rows.spread(_Rotate.apply(qkv, cos, sin, q_size + k_size))
            q, k, v = qkv.split([q_size, k_size, k_size], -1)
        y = attend(q, k, v, D, self.scaling, rows)
        return product([self.o_proj], y.flatten(0, 1) if last else rows.gather(y))


class RowsLlamaLayer(LlamaDecoderLayer):
    def forward(self, hidden_states, *args, rows: Rows | None = None, **kwargs):
        if rows is None:
            return super().forward(hidden_states, *args, **kwargs)
        x = hidden_states.squeeze(1)  # (U, C)
        y = self.self_attn(x, rows=rows, norm=self.input_layernorm, last=self.last,
                           position_embeddings=kwargs["position_embeddings"])
        x = y.add_(x[rows.last] if self.last else x)
        y = product([self.mlp.gate_proj, self.mlp.up_proj], x, RMSNorm(self.post_attention_layernorm))
        return product([self.mlp.down_proj], y, SwiGLU()).add_(x).unsqueeze(1)


# ---------------------------------------------------------------- encoders: [CLS] is read

def attend_to_all(q: Tensor, kv: Tensor, size: int, scale: float, mask: Tensor | None) -> Tensor:
    """Attention of q (B, T or 1, C) over k and v side by side (B, T, 2 C) -> as q."""
    q, k, v = (x.unflatten(-1, (-1, size)).transpose(1, 2) for x in (q, *kv.chunk(2, -1)))
    if mask is not None and mask.shape[2] != q.shape[2]:
        mask = mask[:, :, :q.shape[2]]
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2).flatten(2)


def project(linears: list[nn.Module], x: Tensor, before=None) -> Tensor:
    """`lora.product` of x (B, T, in)."""
    return product(linears, x.flatten(0, 1), before).unflatten(0, x.shape[:2])


def qkv_attention(q: nn.Module, k: nn.Module, v: nn.Module, x: Tensor, size: int, scale: float, mask: Tensor | None,
                  last: bool) -> Tensor:
    """Attention of x (B, T, C) to itself; of its first token alone if `last`."""
    if last:
        return attend_to_all(project([q], x[:, :1]), project([k, v], x), size, scale, mask)
    qkv = project([q, k, v], x)
    return attend_to_all(qkv[..., :x.shape[-1]], qkv[..., x.shape[-1]:], size, scale, mask)


class PooledBertSelfAttention(BertSelfAttention):
    def forward(self, hidden_states, attention_mask=None, *args, pooled=False, last=False, **kwargs):
        if not pooled:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        return qkv_attention(self.query, self.key, self.value, hidden_states, self.attention_head_size, self.scaling,
                             attention_mask, last), None


class PooledBertAttention(BertAttention):
    def forward(self, hidden_states, attention_mask=None, *args, pooled=False, last=False, **kwargs):
        if not pooled:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        y, _ = self.self(hidden_states, attention_mask, pooled=True, last=last)
        return self.output(y, hidden_states[:, :1] if last else hidden_states), None


class PooledBertLayer(BertLayer):
    def forward(self, hidden_states, attention_mask=None, *args, pooled=False, **kwargs):
        if not pooled:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        x, _ = self.attention(hidden_states, attention_mask, pooled=True, last=self.last)
        y = project([self.intermediate.dense], x)
        y = project([self.output.dense], y, ACTIVATIONS[self.attention.self.config.hidden_act])
        return self.output.LayerNorm(y.add_(x))


class PooledDistilBertAttention(DistilBertSelfAttention):
    def forward(self, hidden_states, attention_mask=None, pooled=False, last=False, **kwargs):
        if not pooled:
            return super().forward(hidden_states, attention_mask, **kwargs)
        y = qkv_attention(self.q_lin, self.k_lin, self.v_lin, hidden_states, self.attention_head_size, self.scaling,
                          attention_mask, last)
        return project([self.out_lin], y), None


class PooledDistilBertBlock(TransformerBlock):
    def forward(self, hidden_states, attention_mask=None, pooled=False, **kwargs):
        if not pooled:
            return super().forward(hidden_states, attention_mask, **kwargs)
        y, _ = self.attention(hidden_states, attention_mask, pooled=True, last=self.last)
        x = self.sa_layer_norm(y + (hidden_states[:, :1] if self.last else hidden_states))
        y = project([self.ffn.lin1], x)
        y = project([self.ffn.lin2], y, ACTIVATIONS[self.attention.config.activation])
        return self.output_layer_norm(y.add_(x))
