"""Computes norms, activations, LoRA's narrow matmuls and short sentences' attention in one pass each (CPUs with AVX-512).

    if choice.by_onepass(x):                               # a float32 tensor on such a CPU, with a C compiler
        y = onepass.rms_norm(x, weight, eps)
    onepass.attend(q, k, v, Form(chains, size, scale))     # softmax(scale q k^T) v

PyTorch makes several passes, and copies the input of its attention; its narrow matmuls take twice as long. A row's result
depends neither on the other rows nor on the number of threads.
"""
from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fast import compiled

SOURCE = Path(__file__).with_suffix(".c")
FEATURES = {"avx512f": "-mavx512f"}
POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
# The types of each function's arguments, as in onepass.c: without them ctypes would cut an address to 32 bits.
ARGUMENTS = {
    "gelu": [POINTER, POINTER, LONG, INT],
    "gelu_backward": [POINTER, POINTER, POINTER, POINTER, LONG, INT],
    "swiglu": [POINTER, POINTER, LONG, LONG, INT],
    "swiglu_backward": [POINTER, POINTER, POINTER, POINTER, LONG, LONG, INT],
    "rms_norm": [POINTER, POINTER, FLOAT, POINTER, LONG, LONG, INT],
    "rms_norm_backward": [POINTER, POINTER, FLOAT, POINTER, POINTER, POINTER, LONG, LONG, INT],
    "layer_norm": [POINTER, POINTER, POINTER, FLOAT, POINTER, LONG, LONG, INT],
    "layer_norm_backward": [POINTER, POINTER, POINTER, FLOAT, POINTER, POINTER, POINTER, LONG, LONG, INT],
    "narrow": [POINTER, LONG, POINTER, POINTER, LONG, LONG, LONG, INT],
    "update": [POINTER, LONG, POINTER, POINTER, LONG, LONG, LONG, INT],
    "outer": [POINTER, POINTER, LONG, POINTER, LONG, LONG, LONG, INT],
    "attend": [POINTER, POINTER, POINTER, LONG, INT],
    "attend_backward": [POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, INT],
}


class _Attention(ctypes.Structure):
    _fields_ = [*((name, POINTER) for name in ("chain", "start", "length", "q", "k", "v", "cos", "sin")),
                *((name, LONG) for name in ("tokens", "rows", "heads", "groups", "size", "ldq", "ldk")), ("scale", FLOAT)]


@functools.cache
def load() -> ctypes.CDLL | None:
    """Loads onepass.c; returns None where the CPU has no AVX-512 or no compiler works."""
    # No error: PyTorch can do all of it.
    return compiled.load_if_possible(SOURCE, FEATURES, ARGUMENTS)


def available() -> bool:
    return load() is not None


# ---------------------------------------------------------------- prologues

# All are (rows, n). Forward gives y; backward, given x and the gradient of y, gives y again and the gradient of x. The C
# functions get addresses alone, so that each function makes its inputs contiguous first and allocates its outputs.

def gelu(x: Tensor) -> Tensor:
    """Computes GELU in its tanh form."""
    x = x.contiguous()
    y = torch.empty_like(x)
    load().gelu(x.data_ptr(), y.data_ptr(), x.numel(), torch.get_num_threads())
    return y


def gelu_backward(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, grad = x.contiguous(), grad.contiguous()
    y, dx = torch.empty_like(x), torch.empty_like(x)
    load().gelu_backward(x.data_ptr(), grad.data_ptr(), y.data_ptr(), dx.data_ptr(), x.numel(), torch.get_num_threads())
    return y, dx


def swiglu(x: Tensor) -> Tensor:
    """Computes silu(gate) * up, of gate and up side by side: (rows, 2 n) -> (rows, n)."""
    x, y = x.contiguous(), x.new_empty(len(x), x.shape[1] // 2)
    load().swiglu(x.data_ptr(), y.data_ptr(), *y.shape, torch.get_num_threads())
    return y


def swiglu_backward(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, grad = x.contiguous(), grad.contiguous()
    y, dx = torch.empty_like(grad), torch.empty_like(x)
    load().swiglu_backward(x.data_ptr(), grad.data_ptr(), y.data_ptr(), dx.data_ptr(), *y.shape, torch.get_num_threads())
    return y, dx


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computes weight * x / sqrt(mean(x²) + eps) of each row."""
    x = x.contiguous()
    y = torch.empty_like(x)
    load().rms_norm(x.data_ptr(), weight.data_ptr(), eps, y.data_ptr(), *x.shape, torch.get_num_threads())
    return y


def rms_norm_backward(x: Tensor, weight: Tensor, eps: float, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, grad = x.contiguous(), grad.contiguous()
    y, dx = torch.empty_like(x), torch.empty_like(x)
    load().rms_norm_backward(x.data_ptr(), weight.data_ptr(), eps, grad.data_ptr(), y.data_ptr(), dx.data_ptr(), *x.shape,
                             torch.get_num_threads())
    return y, dx


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Computes weight * (x - mean) / sqrt(variance + eps) + bias of each row."""
    x = x.contiguous()
    y = torch.empty_like(x)
    load().layer_norm(x.data_ptr(), weight.data_ptr(), bias.data_ptr(), eps, y.data_ptr(), *x.shape, torch.get_num_threads())
    return y


def layer_norm_backward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, grad = x.contiguous(), grad.contiguous()
    y, dx = torch.empty_like(x), torch.empty_like(x)
    load().layer_norm_backward(x.data_ptr(), weight.data_ptr(), bias.data_ptr(), eps, grad.data_ptr(), y.data_ptr(),
                               dx.data_ptr(), *x.shape, torch.get_num_threads())
    return y, dx


# ---------------------------------------------------------------- matmuls with a narrow matrix

def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def narrow(x: Tensor, A: Tensor) -> Tensor:
    """Computes x A^T for an A of few rows: (rows, n) (rank, n) -> (rows, rank)."""
    x, A = _rows(x), A.contiguous()
    h = x.new_empty(len(x), len(A))
    load().narrow(x.data_ptr(), x.stride(0), A.data_ptr(), h.data_ptr(), *x.shape, len(A), torch.get_num_threads())
    return h


def update(y: Tensor, h: Tensor, b: Tensor) -> Tensor:
    """Adds h b to y in place: (rows, n) (rows, rank) (rank, n) -> y; the rows of y may lie apart.

    Raises:
        ValueError: a row of y is not contiguous.
    """
    # A contiguous copy of y, as the other functions make it, would take the sum and be lost.
    if y.stride(1) != 1:
        raise ValueError("an update wants rows that are contiguous")
    h, b = h.contiguous(), b.contiguous()
    load().update(y.data_ptr(), y.stride(0), h.data_ptr(), b.data_ptr(), *y.shape, len(b), torch.get_num_threads())
    return y


def outer(h: Tensor, x: Tensor) -> Tensor:
    """Computes h^T x: (rows, rank) (rows, n) -> (rank, n)."""
    h, x = h.contiguous(), _rows(x)
    g = x.new_empty(h.shape[1], x.shape[1])
    load().outer(h.data_ptr(), x.data_ptr(), x.stride(0), g.data_ptr(), *x.shape, h.shape[1], torch.get_num_threads())
    return g


# ---------------------------------------------------------------- attention

@dataclass(frozen=True)
class Chains:
    """The rows that each of N tokens attends to, all int64: `length[i]` of them, from `chain[start[i]]` on.

    The last of them is the token's own.
    """

    chain: Tensor
    start: Tensor  # (N,)
    length: Tensor  # (N,)


class Form(NamedTuple):
    """The form of an attention: the rows that each token attends to, and the heads."""

    chains: Chains
    size: int  # channels of a head
    scale: float
    rotary: tuple[Tensor, Tensor] | None = None  # cosine and sine (rows, size): q and k are rotated first, in place


def attend(q: Tensor, k: Tensor, v: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Computes softmax(scale q k^T) v over each token's chain, head by head.

    It suits short chains: the time grows with the sum of their lengths, and for long chains matmuls are faster.

    Args:
        q: (N, heads * size), float32, as k and v. Rows of each may lie apart; k's and v's by as much.
        k: (rows, groups * size): consecutive query heads share a key head.
        v: as k.

    Returns:
        y (N, heads * size), and the logarithms of the sums of exponentials (N, heads) for `attend_backward`.

    Raises:
        ValueError: strides other than those described.
        MemoryError: no memory for the kernel's buffers.
    """
    # The backward pass computes the probabilities again from these logarithms: saving them would take (N, heads, length).
    y, lse = q.new_empty(q.shape), q.new_empty(len(q), q.shape[1] // form.size)
    if load().attend(_attention(q, k, v, form), y.data_ptr(), lse.data_ptr(), len(form.chains.chain),
                     torch.get_num_threads()):
        raise MemoryError
    return y, lse


def attend_backward(qkv: tuple[Tensor, Tensor, Tensor], form: Form, y: Tensor, lse: Tensor, grad: Tensor,
                    out: tuple[Tensor, Tensor, Tensor]) -> None:
    """Writes the gradients of q, k and v as they were before rotation.

    Args:
        qkv: q, k and v as `attend` left them.
        grad: the gradient of y.
        out: receives the gradients; their strides are those of q, k and v.

    Raises:
        ValueError: strides other than those described.
        MemoryError: no memory for the kernel's buffers.
    """
    # The kernel has one set of strides for inputs and gradients.
    if [t.stride() for t in out] != [t.stride() for t in qkv]:
        raise ValueError("the gradients of q, k and v do not lie as these do")
    grad = grad.contiguous()
    if load().attend_backward(_attention(*qkv, form), *(t.data_ptr() for t in (y, lse, grad, *out)),
                              torch.get_num_threads()):
        raise MemoryError


def _attention(q: Tensor, k: Tensor, v: Tensor, form: Form):
    """Returns the structure's address; the caller must keep the tensors alive."""
    chains, size, rotary = form.chains, form.size, form.rotary
    if q.stride(1) != 1 or k.stride(1) != 1 or k.stride() != v.stride() or not all(t.is_contiguous() for t in rotary or ()):
        raise ValueError("attention needs rows that are contiguous, k's and v's as far apart, and whole tables of angles")
    cos, sin = (None, None) if rotary is None else (t.data_ptr() for t in rotary)
    return ctypes.byref(_Attention(
        *(t.data_ptr() for t in (chains.chain, chains.start, chains.length, q, k, v)), cos, sin, len(q), len(k),
        q.shape[1] // size, k.shape[1] // size, size, q.stride(0), k.stride(0), form.scale))
