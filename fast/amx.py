"""Computes float32 matmuls by AMX tiles of bfloat16 (Intel's Xeons since 2023).

    amx.load()                                       # compiles amx.c once; UserError where CPU or compiler are missing
    amx.matmul([(x, [weight.t()]), (h, [B.t()])], [bias])  # x W^T + h B^T + bias

Each number is the sum of two bfloat16 numbers: 16 bits of mantissa, where float32 has 24, TF32 11 and bfloat16 8.
A row's result does not depend on the other rows.
"""
from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from fast import compiled
from machine.errors import UserError

OPTION = "--precision bf16x3"
SOURCE = Path(__file__).with_suffix(".c")
FEATURES = {"avx512f": "-mavx512f", "avx512bw": "-mavx512bw", "avx512vl": "-mavx512vl", "amx_tile": "-mamx-tile",
            "amx_bf16": "-mamx-bf16"}
POINTER, LONG, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
ARGUMENTS = [POINTER, LONG, POINTER, POINTER, LONG, POINTER, LONG, LONG, INT]  # of matmul, as in amx.c


@functools.cache
def load() -> ctypes.CDLL:
    """Loads amx.c.

    Raises:
        UserError: the CPU has no tiles, the system refuses them, or no compiler works.
    """
    # `--precision bf16x3` is a choice of the user, so that a missing kernel is an error and not a slower way.
    try:
        lib = compiled.load(SOURCE, FEATURES)
    except UserError as error:
        raise UserError(f"{OPTION}: {error}; use fp32") from None
    lib.matmul.argtypes = ARGUMENTS
    # Linux gives a process its tiles on request only: their 8 KiB belong to the state that each thread saves.
    if lib.request_tiles():
        raise UserError(f"{OPTION}: the system does not grant AMX tiles; use fp32")
    return lib


def available() -> bool:
    """Returns whether `load` succeeds."""
    try:
        load()
    except UserError:
        return False
    return True


def matmul(terms: list[tuple[Tensor, list[Tensor]]], biases: list[Tensor | None] = (None,),
           out: Tensor | None = None) -> Tensor:
    """Computes the sum of a b over the terms, plus bias, for bs that lie side by side: (M, K) (K, N) each -> (M, sum of N).

    Args:
        terms: a, and its bs; float32 on the CPU. A b may be the transpose of a contiguous matrix.
        biases: (N,) each, one for every b of a term.
        out: place of the result, with contiguous rows.

    Raises:
        ValueError: shapes that do not fit together.
        MemoryError: no memory for the packed numbers; `out` is unchanged.
    """
    M, widths = terms[0][0].shape[0], [b.shape[1] for b in terms[0][1]]
    if out is None:
        out = terms[0][0].new_empty(M, sum(widths))
    # amx.c gets addresses and sizes only: a wrong shape would read memory of somebody else.
    fits = out.shape == (M, sum(widths))
    for a, bs in terms:
        depth = a.shape[1]
        fits = fits and len(a) == M and depth > 0 and [b.shape for b in bs] == [(depth, width) for width in widths]
    if not fits:
        raise ValueError(f"{[_shapes(*term) for term in terms]} do not give {tuple(out.shape)}")
    terms = [_with_one_stride(*term) for term in terms]
    # One array of 8-byte numbers: the fields of all structures of amx.c, one structure after the other.
    numbers = []
    for a, _ in terms:
        numbers += a.data_ptr(), a.shape[1], a.stride(0)
    for _, bs in terms:
        for b in bs:
            across, along = b.stride()
            # The last field tells amx.c that b is the transpose of the matrix in memory.
            numbers += b.data_ptr(), across if along == 1 else along, along != 1
    for bias, width in zip(biases, widths, strict=True):
        numbers += 0 if bias is None else bias.data_ptr(), width
    array = (LONG * len(numbers))(*numbers)
    # The lists of as, bs and biases follow each other; a structure of the first two has 24 bytes.
    first = ctypes.addressof(array)
    rights = first + 24 * len(terms)
    if load().matmul(first, len(terms), rights, rights + 24 * len(terms) * len(widths), len(widths), out.data_ptr(),
                     M, out.stride(0), torch.get_num_threads()):
        raise MemoryError
    return out


def _shapes(a: Tensor, bs: list[Tensor]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Returns the shapes of a term, for an error."""
    return tuple(a.shape), [tuple(b.shape) for b in bs]


def _with_one_stride(a: Tensor, bs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Returns a term in a layout that one stride describes: rows of a, and rows or columns of each b, contiguous."""
    return a if a.stride(1) == 1 else a.contiguous(), [b if 1 in b.stride() else b.contiguous() for b in bs]
