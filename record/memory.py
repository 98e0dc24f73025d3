"""Memory: how much was used at most, and how it is handed out."""
from __future__ import annotations

import ctypes
import re
import resource


def keep_freed_memory() -> None:
    """Makes glibc hold on to freed memory.

    By default it hands large tensors back to the kernel as soon as they are freed, and every training
    step then pays the page faults of its activations anew. Does nothing with another C library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)


def peak_memory_bytes() -> int:
    """Peak memory of this process: allocated on the GPU if there is one, else resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def exhausted(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, a GPU's or that of PyTorch's allocator for the CPU."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or isinstance(error, RuntimeError) and bool(
        re.search("can't allocate memory|not enough memory|out of memory|bad_alloc", str(error)))
