"""Chooses the libraries that compute on the CPU: those of matmuls with wide weights, and those of everything else.

    choice.matmul()                     # "gemm", "onednn" or "torch"
    choice.use_matmul("torch")          # as a run recorded it: the library decides the order in which sums are rounded
    if by_gemm(x, W): ...

The choice follows rules, not timings, because timings differ from run to run and the choice decides the last digits.
"""
from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from fast import gemm, onepass
from machine.hardware import cpu_description

MATMULS = ("gemm", "onednn", "torch")  # for wide weights: gemm.c, oneDNN in float32, or PyTorch's own choice
KERNELS = ("onepass", "torch")  # for norms, activations and attention of short sentences: onepass.c or PyTorch
_matmul: str | None = None  # the last argument of `use_matmul`
_kernels: str | None = None  # the last argument of `use_kernels`


# ---------------------------------------------------------------- matmuls with wide weights

@functools.cache
def has_onednn() -> bool:
    """Returns whether this build of PyTorch has oneDNN's linear operators."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def slow_by_mkl() -> bool:
    """Returns whether MKL, PyTorch's own choice, uses half of this CPU's width: AMD's CPUs with AVX-512."""
    return "AuthenticAMD" in cpu_description() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def fastest_matmul() -> str:
    """Returns the library for matmuls with wide weights on this CPU.

    Where MKL is slow it is gemm.c, or oneDNN without a compiler for it; elsewhere PyTorch's own choice.
    """
    if not slow_by_mkl():
        return "torch"
    return "gemm" if gemm.available() else "onednn" if torch.backends.mkl.is_available() and has_onednn() else "torch"


def matmul() -> str:
    """Returns the library in use for matmuls with wide weights on the CPU, one of `MATMULS`."""
    return _matmul or fastest_matmul()


def use_matmul(library=None) -> None:
    """Sets the library for matmuls with wide weights to a recorded one; None: by rule.

    Warns in one line if this machine does not have it.
    """
    global _matmul
    # A run from another machine still resumes, with a warning: an error would be worse than other last digits.
    if library in ("gemm", "onednn") and not {"gemm": gemm.available, "onednn": has_onednn}[library]():
        name = "fast/gemm.c (it needs AVX-512 with bfloat16 and a C compiler)" if library == "gemm" else "oneDNN"
        warnings.warn(f"matmuls by {name} cannot be had here, PyTorch's own are used: sums are rounded in another "
                      "order, and the result may differ in its last digits", stacklevel=2)
        library = "torch"
    _matmul = library if library in MATMULS else None


def is_dense(W: Tensor) -> bool:
    """Returns whether a matrix, or its transpose, has no gaps between its rows, as oneDNN's fast code needs."""
    return W.is_contiguous() or W.t().is_contiguous()


def by_onednn(x: Tensor, W: Tensor) -> bool:
    """Returns whether oneDNN computes x W^T."""
    return (matmul() == "onednn" and x.dtype == W.dtype == torch.float32 and x.device.type == W.device.type == "cpu"
            and x.numel() > 0 and is_dense(W))


def by_gemm(x: Tensor, W: Tensor) -> bool:
    """Returns whether gemm.c computes x W^T."""
    # The kernel is for float32 activations; either the rows or the columns of W must be contiguous.
    return (matmul() == "gemm" and x.dtype == torch.float32 and W.dtype in (torch.float32, torch.bfloat16)
            and x.is_cpu and W.is_cpu and 1 in W.stride())


# ---------------------------------------------------------------- norms, activations, attention

def kernels() -> str:
    """Returns the library in use for norms, activations and attention on the CPU, one of `KERNELS`."""
    return _kernels or ("onepass" if onepass.available() else "torch")


def use_kernels(name=None) -> None:
    """Sets the library for norms, activations and attention to a recorded one; None: by rule.

    Warns in one line if this machine does not have it.
    """
    global _kernels
    if name == "onepass" and not onepass.available():
        warnings.warn("norms and attention by fast/onepass.c cannot be had here (it needs AVX-512 and a C compiler), "
                      "PyTorch's own are used: sums are rounded in another order, and the result may differ in its last "
                      "digits", stacklevel=2)
        name = "torch"
    _kernels = name if name in KERNELS else None


def by_onepass(*tensors: Tensor) -> bool:
    """Returns whether onepass.c computes with these tensors."""
    return kernels() == "onepass" and all(x.is_cpu and x.dtype == torch.float32 for x in tensors)
