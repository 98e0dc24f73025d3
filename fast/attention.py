"""Attention over the rows that fused blocks compute: a decoder's different prefixes, or all tokens of an encoder.

    unique = unique_tokens(input_ids, attention_mask)       # a decoder's rows (U, C)
    y = unique.attention(form, q, kv, rotary)               # of each row, or of each sentence's last token

In a decoder, tokens with the same prefix have the same hidden state: sentences with a shared prefix share its rows. Pads
have no row. An encoder's tokens read each other in both directions: each has a row.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from fast import onepass
from fast.choice import by_onepass
from machine.hardware import send

# The longest sentence, in tokens, with attention by onepass.attend; for longer ones PyTorch is faster.
SHORT = 32


@dataclass(frozen=True)
class Heads:
    """The form of a block's attention."""

    layer: int  # the block's number
    counts: tuple[int, int]  # query heads and key heads; consecutive query heads share a key head
    size: int  # channels of a head
    scale: float  # of the scores
    window: int | None = None  # the last tokens that a token reads, itself included; None: all
    cap: float | None = None  # scores s become cap * tanh(s / cap) (Gemma 2)

    @property
    def widths(self) -> tuple[int, int]:
        """Returns the channels of all query heads, and of all key heads."""
        return self.counts[0] * self.size, self.counts[1] * self.size


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

    def pooled(self, x: Tensor) -> Tensor:  # (U, C) -> (B, C)
        """Returns the rows that the head reads."""
        return x[self.last]

    def attention(self, heads: Heads, q: Tensor, kv: Tensor | None, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Computes a block's attention; see `causal_attention`."""
        y = causal_attention(heads, q, kv, rotary, self)
        if self.keep is not None:
            self.keep(heads.layer, *_CausalAttention.parts(q, kv, *heads.widths)[1:])
        return y

    def window(self, width: int, last: bool) -> Tensor | None:
        """Returns whether a token is one of the `width` before the reader; None: no sentence is longer.

        Returns:
            (T, T), or (B, 1, 1, T) if only the last token of each sentence reads; pads are false in the latter.
        """
        B, T = self.shape
        if T <= width:
            return None
        places = torch.arange(T, device=self.ids.device)
        # Not negative, and below the width: the distance back from the reader.
        back = (self.positions[self.last] if last else places[:, None]) - places
        near = (back >= 0) & (back < width)
        return near.view(B, 1, 1, T) if last else near


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


def causal_attention(heads: Heads, q: Tensor, kv: Tensor | None, rotary: tuple[Tensor, Tensor] | None,
                     unique: UniqueTokens) -> Tensor:
    """Computes causal attention, y (U, C), or that of each sentence's last token alone, (B, C).

    Args:
        q: (B, C), queries of the last tokens, or (U, C + 2 K), queries, keys and values of all rows side by side. Both q
            and kv are rotated in place.
        kv: (U, 2 K), keys and values side by side, or None: they are in q.
        rotary: cosine and sine (U, size) of the rotary embedding, if the model has one.
    """
    (C, K), size, scale = heads.widths, heads.size, heads.scale
    near = None if heads.window is None else unique.window(heads.window, kv is not None)
    # Short sentences are faster without the copies below: onepass.c reads the rows in place.
    if near is None and heads.cap is None and unique.shape[1] <= SHORT and by_onepass(q):
        return _CausalAttention.apply(q, kv, (C, K), size, scale, unique, rotary)
    if rotary is not None:
        q = Rotate.apply(q, *(rotary if kv is None else (x[unique.last] for x in rotary)), C if kv is not None else C + K)
        kv = None if kv is None else Rotate.apply(kv, *rotary, K)
    # PyTorch's attention reads whole sentences: from rows to (B, T, ...), and back after it.
    q, k, v = unique.spread(q).split([C, K, K], -1) if kv is None else (q.unsqueeze(1), *unique.spread(kv).split(K, -1))
    q, k, v = (x.unflatten(-1, (-1, size)).transpose(1, 2) for x in (q, k, v))  # (B, heads, T, size)
    if kv is None:
        if heads.cap is not None:
            y = capped_attention(heads, q, k, v, q.new_ones(q.shape[2], q.shape[2]).tril().bool() if near is None else near)
        else:
            y = F.scaled_dot_product_attention(q, k, v, near, is_causal=near is None, scale=scale, enable_gqa=C != K)
        return unique.gather(y.transpose(1, 2).flatten(2))
    # Query heads that share a key head are passed as several queries of that head.
    mask = unique.mask if near is None else near
    q = q.reshape(len(q), heads.counts[1], -1, size)
    if heads.cap is not None:
        return capped_attention(heads, q, k, v, mask).reshape(len(q), C)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).reshape(len(q), C)


def capped_attention(heads: Heads, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Computes softmax(cap tanh(scale q kᵀ / cap)) v, attention with capped scores (Gemma Team 2024, "Gemma 2", section 2).

    Args:
        q: (B, query heads, T, size).
        k, v: (B, key heads, T', size); consecutive query heads share a key head.
        mask: broadcast to (B, query heads, T, T'), true where a key is read; None: all are.

    Returns:
        (B, query heads, T, size).
    """
    shared = q.shape[1] // k.shape[1]
    k, v = (x if shared == 1 else x.repeat_interleave(shared, 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)).mul(heads.scale / heads.cap).tanh().mul(heads.cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


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


# ---------------------------------------------------------------- encoders: a row for each token

@dataclass
class AllTokens:
    """The tokens of a batch (B, T) that an encoder computes, pads included: B * T rows."""

    shape: tuple[int, int]  # B, T
    mask: Tensor | None  # (B or 1, heads or 1, T or 1, T), what attention adds to its scores, or which of them it reads
    last: bool | None  # True: the head reads the first token alone; None: all
    # Adds scores to those of queries and keys (encoders.py); the mask then says which of them attention reads.
    distances: Callable[[Tensor, Tensor], Tensor] | None = None

    def pooled(self, x: Tensor) -> Tensor:  # (B * T, C) -> (B, C)
        """Returns the rows that the head reads."""
        return x.unflatten(0, self.shape)[:, 0]

    def attention(self, heads: Heads, q: Tensor, kv: Tensor | None, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Computes attention of all rows, (B * T, C), or of the first token of each sentence, (B, C); see `UniqueTokens`.

        Args:
            rotary: cosine and sine (1, T, size).
        """
        C = heads.widths[0]
        if rotary is not None:
            angles = [x.expand(self.shape[0], -1, -1) for x in rotary]
            q = Rotate.apply(q, *(x.flatten(0, 1) if kv is None else x[:, 0] for x in angles), 2 * C if kv is None else C)
            kv = None if kv is None else Rotate.apply(kv, *(x.flatten(0, 1) for x in angles), C)
        q, kv = (q[:, :C], q[:, C:]) if kv is None else (q, kv)
        kv = kv.unflatten(0, self.shape)
        # The last block has one query, and some masks of the library have a row for each token.
        q, mask = q.unflatten(0, (len(kv), -1)), self.mask
        if mask is not None and mask.shape[2] != q.shape[1]:
            mask = mask[:, :, :q.shape[1]]
        q, k, v = (x.unflatten(-1, (-1, heads.size)).transpose(1, 2) for x in (q, *kv.chunk(2, -1)))
        if self.distances is not None:
            scores = self.distances(q, k) * heads.scale
            mask = scores if mask is None else scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        y = F.scaled_dot_product_attention(q, k, v, mask, scale=heads.scale)
        return y.transpose(1, 2).flatten(2).flatten(0, 1)
