"""`frozen_linear`: the matmul of every frozen layer in a fused block, LoRA's update included.

    frozen_linear([q_proj, k_proj, v_proj], x, RMSNormPrologue(norm))    # (rows, C) -> (rows, q + k + v)

A training step with LoRA saves far more for its backward pass than it trains. `frozen_linear` saves little: the prologue
of a frozen layer (a norm, an activation) is cheap, so the backward pass recomputes it, and layers that read the same
input are one matmul.
"""
from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fast import amx
from fast.choice import by_onednn
from fast.gemm import Update
from fast.matmul import add_update, joined, narrow, outer, wide_matmul
from fast.prologue import ApplyPrologue
from model import LoRALinear, weight_of

# Copying strided weights pays off from this number of input rows: oneDNN is fast on dense weights only.
DENSE_ROWS = 64


class _FrozenLinear(torch.autograd.Function):
    """y W^T + b + scaling (y A^T) B^T with y = prologue(x), for Ws that never train.

    `spans` holds the range of outputs of each update; the As of all updates follow it, then their Bs. The As are stacked,
    because all updates read the same y.

    Saves x and the narrow y A^T for the backward pass, recomputes y there, and adds each update in place: neither
    direction writes a second (rows, features) tensor. If W is bfloat16 and x is not, only the matmuls with W run in
    bfloat16. With `tiles` the AMX kernel computes matmuls and updates.
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
        # The gradients of A and of a prologue need x. A plain frozen layer needs neither: it saves no activation at all.
        ctx.save_for_backward(None if A is None and prologue is None else x, h, A, *Bs, *weights)
        ctx.scaling, ctx.prologue, ctx.tiles = scaling, prologue, tiles
        sizes = list(map(len, weights))
        if tiles:
            # The update is one more term of the kernel's sum, with a block matrix of all Bs.
            update = [] if A is None else [(h, (_FrozenLinear.block(spans, Bs, sum(sizes)) * scaling).split(sizes, 1))]
            return amx.matmul([(y, [weight.t() for weight in weights]), *update], biases)
        updates = [Update(part, B, span, scaling)
                   for span, part, B in zip(spans, () if h is None else h.split(ctx.ranks, 1), Bs, strict=True)]
        # gemm.c adds the updates while the sums are in its registers.
        if len(weights) == 1:
            return wide_matmul(y, weights[0], biases[0], updates=updates).to(x.dtype)  # (rows, out)
        out = torch.cat([wide_matmul(y, weight, bias) for weight, bias in zip(weights, biases, strict=True)], 1).to(x.dtype)
        for part, B, span, scaling in updates:
            add_update(out[:, span], part, B, scaling)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, A, *saved = ctx.saved_tensors
        Bs, weights = saved[:len(ctx.spans)], saved[len(ctx.spans):]
        grad_x = grad_h = None
        if A is not None:
            # Of each update: d h = scaling * d out B, and d B = scaling * (h^T d out)^T.
            grads = [grad[:, span] for span in ctx.spans]
            grad_h = [narrow(g, B) for g, B in zip(grads, Bs, strict=True)]
            grad_h = (grad_h[0] if len(Bs) == 1 else torch.cat(grad_h, 1)).mul_(ctx.scaling)  # (rows, ranks)
            grad_Bs = [outer(part, g).mul_(ctx.scaling).t() for part, g in zip(h.split(ctx.ranks, 1), grads, strict=True)]
        # d y = d out W + d h A. Below the lowest adapted layer nothing needs a gradient, and both matmuls are left out.
        if ctx.needs_input_grad[0]:
            parts = list(zip(grad.split(list(map(len, weights)), 1), weights, strict=True))
            if ctx.tiles:
                grad_x = amx.matmul([(g, [W]) for g, W in (parts if A is None else [*parts, (grad_h, A)])])  # of y
            else:
                # Each weight adds to the same tensor, and the last one adds the update too.
                for i, (g, W) in enumerate(parts):
                    updates = [] if A is None or i + 1 < len(parts) else [Update(grad_h, A)]
                    grad_x = wide_matmul(g, W.t(), add=grad_x, updates=updates).to(grad.dtype)
            # The prologue gives its output again, for the gradient of A, with the gradient of x.
            if ctx.prologue is not None:
                x, grad_x = ctx.prologue.backward(x, grad_x)
        elif ctx.prologue is not None:
            x = ctx.prologue(x)
        # By now x is y, the input of the matmul: d A = d h^T y.
        updates = [] if A is None else [*outer(grad_h, x).split(ctx.ranks), *grad_Bs]
        return grad_x, None, None, None, None, None, None, *updates


def frozen_linear(linears: list[nn.Module], x: Tensor, prologue=None, outputs: slice = slice(None)) -> Tensor:
    """Computes the outputs of frozen layers that read the same input, side by side: (rows, in) -> (rows, sum of outputs).

    Args:
        linears: each an `nn.Linear`, a `Conv1D`, or an adapted one, with `base` and `low_rank_terms`.
        x: (rows, in).
        prologue: computes the layers' input from x; one of the classes of prologue.py, or None.
        outputs: of a single layer, computes these outputs only.

    Raises:
        RuntimeError: a weight requires a gradient; this function computes none for it.
    """
    terms = [_low_rank_terms(linear) for linear in linears]
    # One scaling serves all updates; a layer without terms has its own forward pass (dropout, another variant of LoRA).
    if None in terms or len({scaling for some in terms for _, _, scaling in some}) > 1:
        # Layers with different inputs or scalings are computed apart, and the prologue they share only once.
        # The view gets the sum of their gradients, whoever else reads x: the order of a sum decides its last digits.
        y = x.view_as(x) if prologue is None else ApplyPrologue.apply(x, prologue)
        parts = []
        for linear, some in zip(linears, terms, strict=True):
            parts.append(frozen_linear([linear], y) if some == [] else linear(y))
        return torch.cat(parts, -1)[:, outputs]
    bases = [base_of(linear) for linear in linears]
    # A weight that trains would silently get no gradient below.
    for base in bases:
        if base.weight.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{base}: its weight requires a gradient; frozen_linear() is for frozen layers")
    weights, biases = [weight_of(base) for base in bases], [base.bias for base in bases]
    # GPT-2's last block computes q of the pooled tokens and k, v of all tokens from one fused weight.
    if outputs != slice(None):
        weights, biases = [weights[0][outputs]], [None if biases[0] is None else biases[0][outputs]]
        if by_onednn(x, weight_of(bases[0])) and len(x) >= DENSE_ROWS:
            weights = [weights[0].t().contiguous().t()]
    # Each update covers the columns of its own layer.
    ends = list(itertools.accumulate(map(len, weights)))
    spans, As, Bs, scaling = [], [], [], 1.0
    for some, weight, end in zip(terms, weights, ends, strict=True):
        for A, B, scaling in some:  # noqa: B007 (one scaling serves all terms)
            spans.append(slice(end - len(weight), end))
            As.append(A.to(x.dtype))
            Bs.append(B[outputs].to(x.dtype))
    tiles = by_tiles(linears, x)
    # One wide matmul is faster than several narrower ones; the weights lie side by side since `set_precision`.
    if len(weights) > 1 and not tiles and (together := joined(weights, biases)) is not None:
        weights, biases = [together], [None if biases[0] is None else torch.cat(biases)]
    return _FrozenLinear.apply(x, scaling, prologue, weights, biases, tiles, spans, *As, *Bs)


def base_of(linear: nn.Module) -> nn.Linear | Conv1D:
    """Returns the frozen layer under an adapted one; a layer that is not adapted is its own base."""
    return linear if isinstance(linear, nn.Linear | Conv1D) else linear.base


def _low_rank_terms(linear: nn.Module) -> list[tuple[Tensor, Tensor, float]] | None:
    return [] if isinstance(linear, nn.Linear | Conv1D) else linear.low_rank_terms()


def by_tiles(linears: list[nn.Module], x: Tensor) -> bool:
    """Returns whether the AMX kernel computes these layers' matmuls with x."""
    bases = [base_of(linear) for linear in linears]
    if not all(getattr(base, "tiles", False) for base in bases):
        return False
    # On a GPU, or with weights in bfloat16, the layers keep their mark, and other kernels compute.
    factors = [x, *(base.weight for base in bases)]
    return all(t.device.type == "cpu" and t.dtype == torch.float32 for t in factors)


class FastLoRALinear(LoRALinear):
    """`LoRALinear` by `frozen_linear`, for architectures without fused blocks."""

    # `forward` below computes the same sum, so that fused blocks may take its terms.
    low_rank_terms = LoRALinear.low_rank_terms

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        rows = x.reshape(-1, self.in_features)
        # With dropout W and A read different inputs, and one `frozen_linear` cannot serve both.
        if self.low_rank_terms() is None:
            y = frozen_linear([self.base], rows)
            A, B = (factor.to(x.dtype) for factor in self.factors())
            y = torch.addmm(y, torch.nn.functional.linear(self.dropout(rows), A), B.t(), alpha=self.scaling)
        else:
            y = frozen_linear([self], rows)
        return y.view(*x.shape[:-1], self.out_features)
