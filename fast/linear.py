"""LoRALinear, and `frozen_linear`, the one matmul that every frozen layer of a training step goes through.

    frozen_linear([q_proj, k_proj, v_proj], x, RMSNormPrologue(norm))    # (rows, C) -> (rows, q + k + v)

A training step with LoRA saves far more for its backward pass than it trains. `frozen_linear` saves little: the prologue
of a frozen layer (a norm, an activation) is cheap, so the backward pass recomputes it, and layers that read the same
input are one matmul.
"""
from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters.mixed import MixedLinear
from fast import amx
from fast.gemm import Update
from fast.matmul import add_update, by_onednn, joined, narrow, outer, product
from fast.prologue import ApplyPrologue

DENSE_ROWS = 64  # input rows from which copying strided weights pays off: oneDNN is fast on dense weights only


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained low-rank update: y = W x + b + scaling * B A x.

    LoRA, Hu et al. 2021, equation 3; scaling = alpha / rank, or alpha / sqrt(rank) for rsLoRA
    (Kalajdzievski 2023). A starts random (Kaiming uniform, a = sqrt(5)), B at zero, so that a fresh
    adapter changes nothing.

    With `slices`, each (start, stop) range of the outputs gets an A and a B of its own and the other
    outputs stay as they are: GPT-2's fused c_attn adapted in q and v only, say. The As are stacked and
    the Bs form one block matrix, which is one LoRA of the summed rank.

    Args:
        base: `nn.Linear`, or GPT-2's `Conv1D`, which stores W transposed; frozen here.
        rank: rank of each update.
        alpha: numerator of the scaling.
        dropout: probability with which an input of A is zeroed in training.
        rslora: scale by alpha / sqrt(rank).
        slices: output ranges to adapt; all outputs if None.
    """

    def __init__(self, base: nn.Linear | Conv1D, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False,
                 slices: list[tuple[int, int]] | None = None):
        super().__init__()
        weight = weight_of(base)
        self.out_features, self.in_features = weight.shape
        self.slices = slices or [(0, self.out_features)]
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.dropout = nn.Dropout(dropout)
        # Adapters stay float32 where the frozen weights are bfloat16: their updates are too small for it.
        self.lora_A = nn.Parameter(torch.empty(rank * len(self.slices), self.in_features, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(sum(stop - start for start, stop in self.slices), rank,
                                               device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.merged = False

    @property
    def weight(self) -> Tensor:
        """Returns the frozen weight: some of the library's blocks (T5's) read its type."""
        return self.base.weight

    def block_B(self) -> Tensor:
        """Returns B over all outputs, (out_features, rank * slices): block by block where there are slices."""
        if self.slices == [(0, self.out_features)]:
            return self.lora_B
        block = self.lora_B.new_zeros(self.out_features, self.lora_A.shape[0])
        row = 0
        for i, (start, stop) in enumerate(self.slices):
            block[start:stop, i * self.rank:(i + 1) * self.rank] = self.lora_B[row:row + stop - start]
            row += stop - start
        return block

    @torch.no_grad()
    def start_from(self, A: Tensor, block: Tensor) -> None:
        """Copies A (rank * slices, in_features) and what `block_B` returned of a layer of the same rank and slices.

        Raises:
            ValueError: of another rank, or of other outputs.
        """
        if A.shape != self.lora_A.shape or block.shape != (self.out_features, len(A)):
            raise ValueError("an update of another rank")
        B = torch.cat([block[start:stop, i * self.rank:(i + 1) * self.rank] for i, (start, stop) in enumerate(self.slices)])
        if B.count_nonzero() != block.count_nonzero():
            raise ValueError("an update of other outputs")
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        rows = x.reshape(-1, self.in_features)
        if self.dropout.p > 0 and self.training and not self.merged:  # W and A see different inputs
            y = frozen_linear([self.base], rows)
            A, B = self.lora_A.to(x.dtype), self.block_B().to(x.dtype)
            y = torch.addmm(y, torch.nn.functional.linear(self.dropout(rows), A), B.t(), alpha=self.scaling)
        else:
            y = frozen_linear([self], rows)
        return y.view(*x.shape[:-1], self.out_features)

    def delta(self) -> Tensor:
        """Returns the update of W, (out_features, in_features), in float32."""
        return self.scaling * (self.block_B().float() @ self.lora_A.float())

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the update to the frozen weight; a second call does nothing.

        Raises:
            ValueError: the update is not finite; the weight is left as it was.
        """
        self._shift(merge=True)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtracts the update from the frozen weight again."""
        self._shift(merge=False)

    def _shift(self, merge: bool) -> None:
        if self.merged == merge:
            return
        delta = self.delta()
        if not torch.isfinite(delta).all():
            raise ValueError("the adapter holds values that are not finite; nothing was merged")
        weight = weight_of(self.base)
        weight.add_(delta.to(weight.dtype), alpha=1 if merge else -1)
        self.merged = merge

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling}, slices={self.slices}"


def lora_layers(net: nn.Module) -> dict[str, LoRALinear]:
    """Returns every `LoRALinear` by its full name."""
    return {name: module for name, module in net.named_modules() if isinstance(module, LoRALinear)}


def weight_of(linear: nn.Linear | Conv1D) -> Tensor:
    """Returns the weight as (out_features, in_features), a view where it is stored transposed."""
    return linear.weight.t() if isinstance(linear, Conv1D) else linear.weight


# ---------------------------------------------------------------- the frozen linear

class _FrozenLinear(torch.autograd.Function):
    """y W^T + b + scaling (y A^T) B^T with y = prologue(x), for Ws that never train.

    `spans` are the outputs that each update covers; their As come next, then as many Bs. The As are stacked, for all
    updates read the same y.

    Saves x and the narrow y A^T for the backward pass, recomputes y there, and adds each update in place, so that no
    second (rows, features) tensor is written in either direction. If W is bfloat16 and x is not, only the matmuls with
    W run in bfloat16. If `tiles`, the AMX kernel computes matmuls and updates.
    """

    @staticmethod
    def block(spans: list[slice], Bs: list[Tensor], outputs: int) -> Tensor:
        """Returns the transposed Bs (rank, some outputs) of all updates as one of the summed rank: (ranks, outputs)."""
        block, rank = Bs[0].new_zeros(sum(map(len, Bs)), outputs), 0
        for span, part in zip(spans, Bs, strict=True):
            block[rank:(rank := rank + len(part)), span] = part
        return block

    @staticmethod
    def forward(ctx, x: Tensor, scaling: float, prologue, weights: list[Tensor], biases: list[Tensor | None], tiles: bool,
                spans: list[slice], *updates: Tensor) -> Tensor:
        As, Bs = updates[:len(spans)], [B.t().contiguous() for B in updates[len(spans):]]  # (rank, some outputs)
        ctx.spans, ctx.ranks = spans, list(map(len, As))
        A = None if not As else As[0] if len(As) == 1 else torch.cat(As)
        y = x if prologue is None else prologue(x)  # (rows, in)
        h = None if A is None else narrow(y, A)  # (rows, ranks)
        ctx.save_for_backward(None if A is None and prologue is None else x, h, A, *Bs, *weights)
        ctx.scaling, ctx.prologue, ctx.tiles = scaling, prologue, tiles
        sizes = list(map(len, weights))
        if tiles:
            update = [] if A is None else [(h, (_FrozenLinear.block(spans, Bs, sum(sizes)) * scaling).split(sizes, 1))]
            return amx.matmul([(y, [weight.t() for weight in weights]), *update], biases)
        updates = [Update(part, B, span, scaling)
                   for span, part, B in zip(spans, () if h is None else h.split(ctx.ranks, 1), Bs, strict=True)]
        if len(weights) == 1:
            return product(y, weights[0], biases[0], updates=updates).to(x.dtype)  # (rows, out)
        out = torch.cat([product(y, weight, bias) for weight, bias in zip(weights, biases, strict=True)], 1).to(x.dtype)
        for part, B, span, scaling in updates:
            add_update(out[:, span], part, B, scaling)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, A, *saved = ctx.saved_tensors
        Bs, weights = saved[:len(ctx.spans)], saved[len(ctx.spans):]
        grad_x = grad_h = None
        if A is not None:
            grads = [grad[:, span] for span in ctx.spans]
            grad_h = [narrow(g, B) for g, B in zip(grads, Bs, strict=True)]
            grad_h = (grad_h[0] if len(Bs) == 1 else torch.cat(grad_h, 1)).mul_(ctx.scaling)  # (rows, ranks)
            grad_Bs = [outer(part, g).mul_(ctx.scaling).t() for part, g in zip(h.split(ctx.ranks, 1), grads, strict=True)]
        if ctx.needs_input_grad[0]:
            parts = list(zip(grad.split(list(map(len, weights)), 1), weights, strict=True))
            if ctx.tiles:
                grad_x = amx.matmul([(g, [W]) for g, W in (parts if A is None else [*parts, (grad_h, A)])])  # of y
            else:
                for i, (g, W) in enumerate(parts):
                    updates = [] if A is None or i + 1 < len(parts) else [Update(grad_h, A)]
                    grad_x = product(g, W.t(), add=grad_x, updates=updates).to(grad.dtype)
            if ctx.prologue is not None:
                x, grad_x = ctx.prologue.backward(x, grad_x)
        elif ctx.prologue is not None:
            x = ctx.prologue(x)
        updates = [] if A is None else [*outer(grad_h, x).split(ctx.ranks), *grad_Bs]
        return grad_x, None, None, None, None, None, None, *updates


def frozen_linear(linears: list[nn.Module], x: Tensor, prologue=None, outputs: slice = slice(None)) -> Tensor:
    """Computes the outputs of layers that read the same input, side by side: (rows, in) -> (rows, sum of their outputs).

    Args:
        linears: each an `nn.Linear`, a `Conv1D`, a `LoRALinear` or a `MixedLinear`, frozen.
        x: (rows, in).
        prologue: computes the layers' input from x; one of the classes of prologue.py, or None.
        outputs: of a single layer, computes these outputs only.

    Raises:
        RuntimeError: a weight requires a gradient, which this function does not compute.
    """
    if any(isinstance(linear, MixedLinear) for linear in linears):
        return _mixed_linear(linears, x if prologue is None else prologue(x), outputs)
    layers = [layer for layer in linears if isinstance(layer, LoRALinear) and not layer.merged]
    if any(layer.dropout.p > 0 and layer.training for layer in layers) or len({la.scaling for la in layers}) > 1:
        y = x if prologue is None else ApplyPrologue.apply(x, prologue)
        parts = [layer(y) if isinstance(layer, LoRALinear) else frozen_linear([layer], y) for layer in linears]
        return torch.cat(parts, -1)[:, outputs]
    bases = [linear.base if isinstance(linear, LoRALinear) else linear for linear in linears]
    for base in bases:
        if base.weight.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{base}: its weight requires a gradient; frozen_linear() is for frozen layers")
    weights, biases = [weight_of(base) for base in bases], [base.bias for base in bases]
    Bs = [layer.block_B() for layer in layers]
    if outputs != slice(None):
        weights, biases = [weights[0][outputs]], [None if biases[0] is None else biases[0][outputs]]
        if by_onednn(x, weight_of(bases[0])) and len(x) >= DENSE_ROWS:
            weights = [weights[0].t().contiguous().t()]
        Bs = [B[outputs] for B in Bs]
    ends = list(itertools.accumulate(map(len, weights)))
    spans = [slice(end - len(weight), end) for linear, weight, end in zip(linears, weights, ends, strict=True)
             if linear in layers]
    tiles = by_tiles(linears, x)
    if len(weights) > 1 and not tiles and (together := joined(weights, biases)) is not None:
        weights, biases = [together], [None if biases[0] is None else torch.cat(biases)]
    return _FrozenLinear.apply(x, layers[0].scaling if layers else 1.0, prologue, weights, biases, tiles, spans,
                               *(layer.lora_A.to(x.dtype) for layer in layers), *(B.to(x.dtype) for B in Bs))


@torch.no_grad()
def _mixed_linear(linears: list[nn.Module], x: Tensor, outputs: slice) -> Tensor:
    """Computes `frozen_linear` where each row has its own adapter: one frozen matmul of all rows, then their updates."""
    bases = [linear.base if isinstance(linear, MixedLinear) else linear for linear in linears]
    y = frozen_linear(bases, x, outputs=outputs)
    parts = [y] if len(bases) == 1 else y.split([len(weight_of(base)) for base in bases], 1)
    for linear, part in zip(linears, parts, strict=True):
        if isinstance(linear, MixedLinear):
            linear.add_update(part, x, outputs)
    return y


def by_tiles(linears: list[nn.Module], x: Tensor) -> bool:
    """Returns whether the AMX kernel computes these layers' matmuls with x."""
    bases = [linear.base if isinstance(linear, LoRALinear) else linear for linear in linears]
    return all(getattr(base, "tiles", False) for base in bases) and all(
        t.device.type == "cpu" and t.dtype == torch.float32 for t in (x, *(base.weight for base in bases)))
