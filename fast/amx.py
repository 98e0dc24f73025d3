"""Computes float32 matmuls by AMX tiles of bfloat16 (Intel's Xeons since 2023).

    amx.load()                                       # compiles amx.c once; UserError where CPU or compiler are missing
    amx.matmul([(x, [weight.t()]), (h, [B.t()])], [bias])  # x W^T + h B^T + bias

Each number is the sum of two bfloat16, which gives 16 bits of mantissa; float32 has 24, TF32 11, bfloat16 8.
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
    try:
        lib = compiled.load(SOURCE, FEATURES)
    except UserError as error:
        raise UserError(f"{OPTION}: {error}; use fp32") from None
    lib.matmul.argtypes = ARGUMENTS
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
        out: where the result goes, its rows contiguous.

    Raises:
        ValueError: shapes that do not fit; addresses are all that amx.c is given.
        MemoryError: there is none for the packed numbers; `out` is as it was.
    """
    M, widths = terms[0][0].shape[0], [b.shape[1] for b in terms[0][1]]
    if out is None:
        out = terms[0][0].new_empty(M, sum(widths))
    if out.shape != (M, sum(widths)) or any(
            a.shape[0] != M or not a.shape[1] or [b.shape for b in bs] != [(a.shape[1], n) for n in widths]
            for a, bs in terms):
        raise ValueError(f"{[(tuple(a.shape), [tuple(b.shape) for b in bs]) for a, bs in terms]} do not give "
                         f"{tuple(out.shape)}")
    terms = [(a if a.stride(1) == 1 else a.contiguous(), [b if 1 in b.stride() else b.contiguous() for b in bs])
             for a, bs in terms]
    numbers = []  # as the structures of amx.c, whose fields are all of 8 bytes
    for a, _ in terms:
        numbers += a.data_ptr(), a.shape[1], a.stride(0)
    for _, bs in terms:
        for b in bs:
            across, along = b.stride()
            numbers += b.data_ptr(), across if along == 1 else along, along != 1
    for bias, width in zip(biases, widths, strict=True):
        numbers += 0 if bias is None else bias.data_ptr(), width
    array = (LONG * len(numbers))(*numbers)
    first = ctypes.addressof(array)
    rights = first + 24 * len(terms)
    if load().matmul(first, len(terms), rights, rights + 24 * len(terms) * len(widths), len(widths), out.data_ptr(),
                     M, out.stride(0), torch.get_num_threads()):
        raise MemoryError
    return out
