"""Computes x W^T by the library that is fastest on this CPU, for frozen and plain linears alike.

    wide_matmul(x, W, bias)                # (rows, in) (out, in) -> (rows, out); no gradients
    set_precision(backbone, "bf16")    # how its frozen linears are computed

PyTorch takes MKL for float32; on an AMD CPU that is half of the width. gemm.py uses all of it, and so does oneDNN, a part of
every PyTorch build. `choice.py` chooses between them, and a run records the choice.
"""
from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fast import amx, choice, gemm, onepass
from fast.choice import by_gemm, by_onednn, by_onepass
from fast.gemm import Update
from machine import hardware
from machine.errors import UserError

# oneDNN caches the code that it generates for each shape, half a MiB each, and batches of sentences rarely repeat their
# number of rows. A larger cache than the shapes of one kind of block, forward and backward, does not pay. oneDNN reads the
# variable at its first matmul.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
# The highest rank of matmuls by onepass.py: beyond it, reading the wide matrix is the smaller part of the time.
NARROW = 32


def wide_matmul(x: Tensor, W: Tensor, bias: Tensor | None = None, add: Tensor | None = None, updates: Sequence[Update] = ()
            ) -> Tensor:
    """Computes x W^T + bias + add + the updates, without gradients, in W's type: (rows, in) -> (rows, out).

    Args:
        x: (rows, in).
        W: (out, in), or the transpose of an (in, out) matrix.
        bias: (out,).
        add: (rows, out), of the result's type; may be written over.

    Returns:
        In the wider one of x's and W's types.
    """
    # gemm.c does all of it in one pass over the result.
    if by_gemm(x, W):
        return gemm.matmul(x, W, bias, updates, add, add is not None)
    # bfloat16 weights and float32 activations: the matmul in bfloat16, the sum with `add` in float32.
    if x.dtype != W.dtype:
        y = wide_matmul(x.to(W.dtype), W, bias).to(torch.promote_types(x.dtype, W.dtype))
        y = y if add is None else add.add_(y)
    elif by_onednn(x, W):
        y = (torch.ops.mkldnn._linear_pointwise(x.contiguous(), W, bias, "none", [], "") if add is None else
             torch.ops.mkldnn._linear_pointwise.binary(x.contiguous(), add, W, bias, "add"))
    elif add is None:
        y = F.linear(x, W, bias)
    else:
        y = add.addmm_(x, W.t())
        y = y if bias is None else y.add_(bias)
    for h, b, span, scaling in updates:
        add_update(y[:, span], h.to(y.dtype), b.to(y.dtype), scaling)
    return y


# Matmuls with a narrow matrix, LoRA's A or B: by onepass.py, else by MKL. oneDNN would generate and cache code for each
# number of rows.

def narrow(x: Tensor, W: Tensor) -> Tensor:
    """Computes x W^T for a W of few rows: LoRA's A, or B transposed."""
    if len(W) <= NARROW and by_onepass(x, W):
        return onepass.narrow(x, W)
    # On an AMD CPU MKL is 1.4 to 8 times as fast with the narrow matrix in front.
    return torch.mm(x, W.t()) if choice.matmul() == "torch" else torch.mm(W.contiguous(), x.t()).t()


def add_update(out: Tensor, h: Tensor, b: Tensor, scaling: float = 1.0) -> None:
    """Adds scaling h b to out (rows, outputs), with or without gaps between its rows; h (rows, rank), b (rank, outputs)."""
    if len(b) <= NARROW and by_onepass(out, h, b):
        onepass.update(out, h if scaling == 1 else h * scaling, b)
    elif out.shape[1] % 1024 == 0 and out.is_contiguous() and by_onednn(h, b.t()):
        # Rows 4 KiB apart share cache lines: MKL takes 7 times as long.
        out.copy_(wide_matmul(h * scaling, b.t(), add=out))
    else:
        out.addmm_(h, b, alpha=scaling)


def outer(h: Tensor, x: Tensor) -> Tensor:
    """Computes h^T x for a narrow h (rows, rank): (rank, in) for an x (rows, in)."""
    if h.shape[1] <= NARROW and by_onepass(h, x):
        return onepass.outer(h, x)
    # With the narrow matrix in front MKL is 2 to 3 times as fast.
    return torch.mm(h.t(), x)


# Frozen layers that read the same input are one matmul where their weights lie side by side in memory.

@torch.no_grad()
def lay_side_by_side(linears: list[nn.Module]) -> None:
    """Moves the frozen weights of linears, adapted or not, into one tensor; each weight is a view of it from now on."""
    weights = [getattr(linear, "base", linear).weight for linear in linears]
    if any(weight.requires_grad for weight in weights) or len({(weight.dtype, weight.device) for weight in weights}) > 1:
        return
    together = torch.cat([weight.data for weight in weights])
    for weight, part in zip(weights, together.split(list(map(len, weights))), strict=True):
        weight.data = part


def joined(weights: list[Tensor], biases: list[Tensor | None]) -> Tensor | None:
    """Returns weights (out, in) as one of all outputs; None if they do not follow each other, or only some have a bias."""
    if len({bias is None for bias in biases}) > 1:
        return None
    # Read from the addresses and not from a note of `lay_side_by_side`: moving a model to a device undoes it.
    first, following = weights[0], weights[0].data_ptr()
    for weight in weights:
        if not (weight.is_contiguous() and weight.dtype == first.dtype and weight.data_ptr() == following
                and weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()):
            return None
        following += weight.numel() * weight.element_size()
    return first.as_strided((sum(map(len, weights)), first.shape[1]), first.stride())


def layers_of_one_input(backbone: nn.Module) -> list[list[nn.Module]]:
    """Returns the groups of linears that read the same input, as the fused blocks name them in `together`."""
    groups = []
    for module in backbone.modules():
        for names in getattr(module, "together", ()):
            groups.append([module.get_submodule(name) for name in names])
    return groups


class _Matmul(torch.autograd.Function):
    """`wide_matmul` with gradients for x, W and bias; computed in W's type if x has another type."""

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x.to(W.dtype) if ctx.needs_input_grad[1] else None, W)
        ctx.dtype = x.dtype
        return wide_matmul(x, W, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W = ctx.saved_tensors
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        grad_x = wide_matmul(grad, W.t()).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        grad_W = wide_matmul(grad.to(W.dtype).t(), x.t()) if ctx.needs_input_grad[1] else None
        return grad_x, grad_W, grad_bias


def _apply(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor | None:
    """Computes x W^T + bias for an x of any shape; returns None where PyTorch's own `forward` should compute it."""
    # Autocast, and the cases where no other library is faster, are PyTorch's.
    if torch.is_autocast_enabled(x.device.type) or x.dtype == W.dtype and not by_onednn(x, W) and not by_gemm(x, W):
        return None
    return _Matmul.apply(x.reshape(-1, x.shape[-1]), W, bias).view(*x.shape[:-1], len(W))


class FastLinear(nn.Linear):
    """`nn.Linear` by the fastest library; its weight may have another type than its input."""

    tiles = False  # set by `set_precision`: whether the AMX kernel computes this layer in the fused blocks

    def forward(self, x: Tensor) -> Tensor:
        y = _apply(x, self.weight, self.bias)
        return super().forward(x) if y is None else y


class FastConv1D(Conv1D):
    """`Conv1D` by the fastest library; its weight may have another type than its input."""

    tiles = False  # as in FastLinear

    def forward(self, x: Tensor) -> Tensor:
        y = _apply(x, self.weight.t(), self.bias)
        return super().forward(x) if y is None else y


class FastEmbedding(nn.Embedding):
    """`nn.Embedding` that returns float32 rows on a CPU even if its weight is bfloat16."""

    def forward(self, ids: Tensor) -> Tensor:
        rows = super().forward(ids)
        return rows.float() if rows.dtype == torch.bfloat16 and rows.device.type == "cpu" else rows


def set_precision(backbone: nn.Module, precision: str) -> None:
    """Sets the precision of the frozen linears of a backbone under `fast.install`; trained parameters stay float32.

    fp32: in float32, by the library that `choice.py` chose.

    bf16: frozen linears and embeddings become bfloat16. On a CPU activations and all else stay float32: bfloat16 makes
    its matmuls faster, and its other operations slower. On a GPU everything frozen becomes bfloat16.

    bf16x3: all numbers stay float32. In the fused blocks each matmul with a frozen weight, and with B of the update, is
    computed as three bfloat16 matmuls (amx.py).

    Raises:
        UserError: bf16x3 on a machine without it.
    """
    linears = [module for module in backbone.modules()
               if isinstance(module, FastLinear | FastConv1D) and not module.weight.requires_grad]
    if precision == "bf16x3" and linears:
        if hardware.device().type != "cpu":
            raise UserError("--precision bf16x3: is for CPUs; on a GPU use bf16 or fp32")
        amx.load()
    for module in linears:
        module.tiles = precision == "bf16x3"
    on_cpu = hardware.device().type == "cpu"
    if precision == "bf16":
        embeddings = [module for module in backbone.modules() if isinstance(module, FastEmbedding)]
        for module in [*linears, *embeddings] if on_cpu else [backbone]:
            for p in module.parameters():
                if not p.requires_grad:
                    p.data = p.data.bfloat16()
    # The kernel of bf16x3 takes several weights wherever they lie.
    groups = [] if precision == "bf16x3" else layers_of_one_input(backbone)
    if on_cpu and (precision == "bf16" or groups):
        # Copied out of the memory-mapped checkpoint: a single view of it would keep the whole file in memory.
        for p in backbone.parameters():
            if not p.requires_grad and p.dtype == torch.float32:
                p.data = p.data.clone()
    for group in groups:
        lay_side_by_side(group)
    hardware.release_freed_memory()
