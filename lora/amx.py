"""Computes float32 matmuls, prologues and attention by AMX tiles of bfloat16 (Intel's Xeons since 2023).

    amx.load()                                       # compiles amx.c once; UserError where CPU or compiler are missing
    amx.matmul([(x, [weight.t()]), (h, [B.t()])], [bias])  # x W^T + h B^T + bias
    amx.attend(q, k, v, chains, size, scale)               # softmax(scale q k^T) v

In a matmul each number is the sum of two bfloat16, which gives 16 bits of mantissa; float32 has 24, TF32 11, bfloat16 8.
A row's result does not depend on the other rows. Prologues and attention stay float32 and make one pass over the numbers
where PyTorch makes several.
"""
from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from record.files import UserError

OPTION = "--precision bf16x3"
SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-fopenmp", "-shared", "-fPIC", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mamx-tile", "-mamx-bf16")
NEEDED = {"avx512f", "avx512bw", "avx512vl", "amx_tile", "amx_bf16"}  # the same in Linux's words


POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
ARGUMENTS = {  # as in amx.c
    "matmul": [POINTER, LONG, POINTER, POINTER, LONG, POINTER, LONG, LONG, INT],
    "gelu": [POINTER, POINTER, LONG, INT],
    "gelu_backward": [POINTER, POINTER, POINTER, POINTER, LONG, INT],
    "swiglu": [POINTER, POINTER, LONG, LONG, INT],
    "swiglu_backward": [POINTER, POINTER, POINTER, POINTER, LONG, LONG, INT],
    "rms_norm": [POINTER, POINTER, FLOAT, POINTER, LONG, LONG, INT],
    "rms_norm_backward": [POINTER, POINTER, FLOAT, POINTER, POINTER, POINTER, LONG, LONG, INT],
    "attend": [POINTER, POINTER, POINTER, LONG, INT],
    "attend_backward": [POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, INT],
}


class _Attention(ctypes.Structure):
    _fields_ = [*((name, POINTER) for name in ("chain", "start", "length", "q", "k", "v", "cos", "sin")),
                *((name, LONG) for name in ("tokens", "rows", "heads", "groups", "size", "ldq", "ldk")), ("scale", FLOAT)]


def flags_of_cpu() -> set[str]:
    """Returns the CPU features that Linux lists; an empty set on other systems."""
    try:
        return set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return set()


@functools.cache
def load() -> ctypes.CDLL:
    """Loads amx.c, which the first run that needs it compiles into the user's cache folder.

    Raises:
        UserError: the CPU has no tiles, the system refuses them, or no compiler works.
    """
    if missing := sorted(NEEDED - flags_of_cpu()):
        raise UserError(f"{OPTION}: this CPU has no {', '.join(missing)}; use fp32")
    compiler = shlex.split(os.environ.get("CC", "")) or list(filter(shutil.which, ("cc", "gcc", "clang")))[:1]
    if not compiler:
        raise UserError(f"{OPTION}: needs a C compiler (gcc or clang, or its name in CC); use fp32")
    key = hashlib.sha256(repr((compiler, FLAGS)).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    library = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-distil" / f"amx-{key}.so"
    try:
        if not library.exists():
            _compile(compiler, library)
        lib = ctypes.CDLL(str(library))
    except OSError as error:
        raise UserError(f"{OPTION}: {error}") from None
    for name, arguments in ARGUMENTS.items():
        getattr(lib, name).argtypes = arguments
    if lib.request_tiles():
        raise UserError(f"{OPTION}: the system does not grant AMX tiles; use fp32")
    return lib


def _compile(compiler: list[str], library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # it appears whole or not at all
        built = Path(folder) / library.name
        result = subprocess.run([*compiler, *FLAGS, "-o", built, SOURCE], capture_output=True, text=True)
        if result.returncode:
            said = next((line for line in result.stderr.splitlines() if "error" in line), "no message")
            raise UserError(f"{OPTION}: {shlex.join(compiler)} does not compile {SOURCE.name}: {said}")
        os.replace(built, library)


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


# ---------------------------------------------------------------- prologues

# All are (rows, n). Forward gives y; backward, given x and the gradient of y, gives y again and the gradient of x.

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


# ---------------------------------------------------------------- attention

@dataclass(frozen=True)
class Chains:
    """The rows that each of N tokens attends to, all int64: `length[i]` of them, at `chain[start[i]]` and after it.

    The last is the token's own.
    """

    chain: Tensor
    start: Tensor  # (N,)
    length: Tensor  # (N,)


def attend(q: Tensor, k: Tensor, v: Tensor, chains: Chains, size: int, scale: float,
           rotary: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Computes softmax(scale q k^T) v over each token's chain, head by head.

    Made for short chains: the time grows with the sum of their lengths, and for long chains matmuls are faster.

    Args:
        q: (N, heads * size), float32, as k and v. Rows of each may lie apart; k's and v's by as much.
        k: (rows, groups * size): consecutive query heads share a key head.
        v: as k.
        rotary: cosine and sine (rows, size) of the rotary embedding: q and k are rotated first, in place.

    Returns:
        y (N, heads * size), and (N, heads): what `attend_backward` wants.

    Raises:
        ValueError: strides other than those described.
        MemoryError
    """
    y, lse = q.new_empty(q.shape), q.new_empty(len(q), q.shape[1] // size)
    if load().attend(_attention(q, k, v, chains, size, scale, rotary), y.data_ptr(), lse.data_ptr(), len(chains.chain),
                     torch.get_num_threads()):
        raise MemoryError
    return y, lse


def attend_backward(q: Tensor, k: Tensor, v: Tensor, chains: Chains, size: int, scale: float,
                    rotary: tuple[Tensor, Tensor] | None, y: Tensor, lse: Tensor, grad: Tensor,
                    out: tuple[Tensor, Tensor, Tensor]) -> None:
    """Writes the gradients of q, k and v as they were before rotation.

    Args:
        q: as `attend` left it, like k.
        grad: of y.
        out: where the gradients go; their rows lie as q's, k's and v's.

    Raises:
        ValueError: strides other than those described.
        MemoryError
    """
    if [t.stride() for t in out] != [t.stride() for t in (q, k, v)]:
        raise ValueError("the gradients of q, k and v do not lie as these do")
    grad = grad.contiguous()
    if load().attend_backward(_attention(q, k, v, chains, size, scale, rotary),
                              *(t.data_ptr() for t in (y, lse, grad, *out)), torch.get_num_threads()):
        raise MemoryError


def _attention(q: Tensor, k: Tensor, v: Tensor, chains: Chains, size: int, scale: float,
               rotary: tuple[Tensor, Tensor] | None):
    """Returns the structure's address; the caller must keep the tensors alive."""
    if q.stride(1) != 1 or k.stride(1) != 1 or k.stride() != v.stride() or not all(t.is_contiguous() for t in rotary or ()):
        raise ValueError("attention wants rows that are contiguous, k's and v's as far apart, and whole tables of angles")
    cos, sin = (None, None) if rotary is None else (t.data_ptr() for t in rotary)
    return ctypes.byref(_Attention(
        *(t.data_ptr() for t in (chains.chain, chains.start, chains.length, q, k, v)), cos, sin, len(q), len(k),
        q.shape[1] // size, k.shape[1] // size, size, q.stride(0), k.stride(0), scale))
