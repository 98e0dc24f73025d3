"""Prologues: the operations between two frozen linears, cheap enough to be computed again in the backward pass.

    y = prologue(x)                                 # (rows, n): a norm or an activation, its weights frozen
    y, grad_x = prologue.backward(x, grad_y)        # y once more, and the gradient of x

Where the machine has AVX-512 and a C compiler, onepass.py computes all but the exact GELU in one pass.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast import onepass
from fast.choice import by_onepass


class LayerNormPrologue:
    """Layer normalisation by the weights of an `nn.LayerNorm`."""

    def __init__(self, norm: nn.LayerNorm):
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def _normalised(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the norm's output, and mean and 1 / standard deviation of each row."""
        return torch.native_layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is not None and by_onepass(x, self.weight, self.bias):
            return onepass.layer_norm(x, self.weight, self.bias, self.eps)
        return self._normalised(x)[0]

    def backward(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        if self.bias is not None and by_onepass(x, self.weight, self.bias):
            return onepass.layer_norm_backward(x, self.weight, self.bias, self.eps, grad)
        y, mean, rstd = self._normalised(x)
        # Of the three gradients (input, weight, bias) the first alone: the norm is frozen.
        return y, torch.ops.aten.native_layer_norm_backward(
            grad, x, x.shape[-1:], mean, rstd, self.weight, self.bias, [True, False, False])[0]


class RMSNormPrologue:
    """Llama's RMS normalisation: weight * x / sqrt(mean(x²) + eps), computed in float32 at least."""

    def __init__(self, norm: nn.Module, offset: float = 0.0):
        # Gemma's weights are differences from one; in float32, as the library adds them.
        self.weight = norm.weight.float() + offset if offset else norm.weight
        self.eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps

    def _normalised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x / rms and 1 / rms."""
        # In float32, as the library does: a mean of squares is too rough in bfloat16.
        x = x.float() if x.dtype == torch.bfloat16 else x
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()
        return x * r, r

    def __call__(self, x: Tensor) -> Tensor:
        if by_onepass(x, self.weight):
            return onepass.rms_norm(x, self.weight, self.eps)
        return self._normalised(x)[0].mul_(self.weight).to(x.dtype)

    def backward(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        if by_onepass(x, self.weight):
            return onepass.rms_norm_backward(x, self.weight, self.eps, grad)
        # dx = r (g - u mean(g u)) with g = grad * weight.
        u, r = self._normalised(x)
        g = grad.to(u.dtype) * self.weight
        mean = torch.linalg.vecdot(g, u).div_(x.shape[-1]).unsqueeze_(-1)
        dx = g.addcmul_(u, mean.neg_()).mul_(r)
        return u.mul_(self.weight).to(x.dtype), dx.to(x.dtype)


class GELUPrologue:
    """GELU in its tanh form (`gelu_new`, `gelu_pytorch_tanh`), as x sigmoid(2 K (x + C x³)).

    A CPU computes ROWS rows at a time; they stay in its cache from one operation to the next. Forward and both results of
    backward together take as long as PyTorch's kernels take for forward and gradient.
    """

    K, C, ROWS = math.sqrt(2 / math.pi), 0.044715, 32

    def __call__(self, x: Tensor) -> Tensor:
        if by_onepass(x):
            return onepass.gelu(x)
        if x.is_cuda:
            return F.gelu(x, approximate="tanh")
        y = torch.empty_like(x)
        for some, out in zip(x.split(self.ROWS), y.split(self.ROWS), strict=True):
            # x sigmoid(x (2 K + 2 K C x²)), all in `out`.
            torch.mul(some, some, out=out)
            out.mul_(2 * self.K * self.C).add_(2 * self.K).mul_(some).sigmoid_().mul_(some)
        return y

    def backward(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        if by_onepass(x):
            return onepass.gelu_backward(x, grad)
        if x.is_cuda:
            return self(x), torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
        y, dx = torch.empty_like(x), torch.empty_like(x)
        for some, g, out, d in zip(*(t.split(self.ROWS) for t in (x, grad, y, dx)), strict=True):
            # x² stays in d: the sigmoid s and its argument's slope both need it.
            torch.mul(some, some, out=d)
            s = (d * (2 * self.K * self.C)).add_(2 * self.K).mul_(some).sigmoid_()
            torch.mul(some, s, out=out)
            # dy/dx = s + y (1 - s) slope, with slope = 2 K + 6 K C x²; d is y slope first.
            d.mul_(6 * self.K * self.C).add_(2 * self.K).mul_(out)
            d.addcmul_(d, s, value=-1).add_(s).mul_(g)
        return y, dx


class ExactGELUPrologue:
    """GELU by the error function (`gelu`)."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.gelu(x)

    def backward(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        return F.gelu(x), torch.ops.aten.gelu_backward(grad, x)


class HeadNormPrologue:
    """Normalises each head of the first columns of x; the columns after them stay as they are (Qwen3's q and k).

    Args:
        norms: RMS norms over the channels of a head, of consecutive columns.
        widths: the number of columns of each norm.
    """

    def __init__(self, norms: list[RMSNormPrologue], widths: list[int]):
        ends = list(itertools.accumulate(widths))
        self.parts = [(norm, slice(end - width, end)) for norm, width, end in zip(norms, widths, ends, strict=True)]

    def __call__(self, x: Tensor) -> Tensor:
        y = x.clone()
        for norm, columns in self.parts:
            y[:, columns] = norm(x[:, columns].reshape(-1, len(norm.weight))).view(len(x), -1)
        return y

    def backward(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        y, dx = x.clone(), grad.clone()
        for norm, columns in self.parts:
            parts = norm.backward(*(t[:, columns].reshape(-1, len(norm.weight)) for t in (x, grad)))
            y[:, columns], dx[:, columns] = (part.view(len(x), -1) for part in parts)
        return y, dx


class GatedPrologue:
    """An activation of a gate, times what it lets through; both side by side (Shazeer 2020): (rows, 2 n) -> (rows, n).

    Args:
        activation: of the gate.
        gradient: of the activation: (its gradient, its input) -> the input's gradient.
    """

    def __init__(self, activation: Callable[[Tensor], Tensor], gradient: Callable[[Tensor, Tensor], Tensor]):
        self.activation, self.gradient = activation, gradient

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return self.activation(gate).mul_(up)

    def backward(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = x.chunk(2, -1)
        # Both gradients are written into the two halves of one tensor: nothing is concatenated.
        dx = torch.empty_like(x)
        d_gate, d_up = dx.chunk(2, -1)
        y = self.activation(gate)
        torch.mul(grad, y, out=d_up)
        d_gate.copy_(self.gradient(grad * up, gate))
        return y.mul_(up), dx


class SwiGLUPrologue(GatedPrologue):
    """SwiGLU: the activation is silu."""

    def __init__(self):
        super().__init__(F.silu, torch.ops.aten.silu_backward)

    def __call__(self, x: Tensor) -> Tensor:
        return onepass.swiglu(x) if by_onepass(x) else super().__call__(x)

    def backward(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        return onepass.swiglu_backward(x, grad) if by_onepass(x) else super().backward(x, grad)


class ApplyPrologue(torch.autograd.Function):
    """Computes one prologue by itself, with its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, prologue) -> Tensor:
        ctx.save_for_backward(x)
        ctx.prologue = prologue
        return prologue(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.prologue.backward(*ctx.saved_tensors, grad)[1], None
