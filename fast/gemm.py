"""Computes matmuls with wide weights, float32 or bfloat16, by AVX-512 (gemm.c): AMD's CPUs since 2022.

    if choice.by_gemm(x, W):                              # float32 activations on such a CPU, with a C compiler
        y = gemm.matmul(x, W, bias, [Update(h, b, slice(0, 768), 2.0)])   # x W^T + bias, and 2 h b in 768 columns

A float32 weight is multiplied in float32. A bfloat16 weight is multiplied by x rounded to bfloat16; the sums stay float32.
A row's result depends neither on the other rows nor on the number of threads.
"""
from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fast import compiled

SOURCE = Path(__file__).with_suffix(".c")
FEATURES = {"avx512f": "-mavx512f", "avx512bw": "-mavx512bw", "avx512vl": "-mavx512vl", "avx512_bf16": "-mavx512bf16"}
POINTER, LONG = ctypes.c_void_p, ctypes.c_long


class Update(NamedTuple):
    """A low-rank term of a matmul: scaling h b in the columns `span`."""

    h: Tensor  # (rows, rank)
    b: Tensor  # (rank, columns)
    span: slice = slice(None)
    scaling: float = 1.0


# The fields of these two structures are those of gemm.c, which asserts their sizes.

class _Update(ctypes.Structure):
    _fields_ = [("h", POINTER), ("b", POINTER), *((name, LONG) for name in ("ldh", "rank", "start", "columns")),
                ("scaling", ctypes.c_float)]


class _Arguments(ctypes.Structure):
    _fields_ = [*((name, POINTER) for name in ("a", "b", "bias", "c", "updates")), *((name, LONG) for name in (
        "M", "N", "K", "lda", "ldb", "ldc", "transposed", "rough", "add", "count"))]


@functools.cache
def load() -> ctypes.CDLL | None:
    """Loads gemm.c; returns None where the CPU has no AVX-512 with bfloat16 or no compiler works."""
    # No compiler is no error: `choice.py` then takes oneDNN or PyTorch.
    return compiled.load_if_possible(SOURCE, FEATURES, {"product": [ctypes.POINTER(_Arguments), ctypes.c_int]})


def available() -> bool:
    return load() is not None


def matmul(x: Tensor, W: Tensor, bias: Tensor | None = None, updates: Sequence[Update] = (), out: Tensor | None = None,
            add: bool = False) -> Tensor:
    """Computes x W^T + bias + the updates: (rows, in) -> (rows, outputs), in float32.

    Args:
        x: (rows, in), float32.
        W: (outputs, in), float32 or bfloat16; its rows or its columns are contiguous.
        bias: (outputs,), float32 or bfloat16.
        out: place of the result, with contiguous rows; it may be a part of a wider tensor.
        add: add to the numbers in `out`.

    Raises:
        ValueError: shapes or strides that do not fit together.
        MemoryError: no memory for the packed numbers; `out` is unchanged.
    """
    (M, K), N = x.shape, len(W)
    # gemm.c takes one stride for each matrix, so that one of its two dimensions must be contiguous.
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty(M, N) if out is None else out
    bias = bias if bias is None else bias.to(torch.float32).contiguous()
    terms = [(u.h if u.h.stride(1) == 1 else u.h.contiguous(), u.b.contiguous(), *u.span.indices(N)[:2], u.scaling)
             for u in updates]
    # gemm.c gets addresses and sizes only: a wrong shape would read memory of somebody else.
    if (W.shape[1] != K or out.shape != (M, N) or out.stride(1) != 1 or out.dtype != torch.float32 or 1 not in W.stride()
            or bias is not None and bias.shape != (N,)
            or any(h.shape != (M, len(b)) or b.shape[1] != stop - start for h, b, start, stop, _ in terms)):
        shapes = [(tuple(u.h.shape), tuple(u.b.shape), u.span) for u in updates]
        raise ValueError(f"{tuple(x.shape)} by {tuple(W.shape)}, with updates of {shapes}, does not give {tuple(out.shape)}")
    across, along = W.stride()
    transposed = along == 1
    # `terms` keeps the copies above alive until gemm.c has read them.
    array = (_Update * len(terms))(*((h.data_ptr(), b.data_ptr(), h.stride(0), len(b), start, stop - start, scaling)
                                     for h, b, start, stop, scaling in terms))
    if load().product(ctypes.byref(_Arguments(
            x.data_ptr(), W.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(), ctypes.addressof(array),
            M, N, K, x.stride(0), across if transposed else along, out.stride(0), transposed, W.dtype == torch.bfloat16, add,
            len(terms))), torch.get_num_threads()):
        raise MemoryError
    return out
