"""Describes and sets up this machine: its CPU, its device, its threads, and its memory."""
from __future__ import annotations

import ctypes
import platform
import re
import resource
import warnings
from pathlib import Path

from machine.errors import UserError

DEVICES = ("auto", "cpu", "cuda", "mps")
_chosen = "auto"


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Returns the CPU's model name, as Linux tells it; elsewhere what Python knows, at least the architecture."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def keep_freed_memory() -> None:
    """Makes glibc hold on to freed memory.

    By default glibc hands large tensors back to the kernel as soon as they are freed, and every training
    step then pays the page faults of its activations anew. Does nothing with another C library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)


def release_freed_memory() -> None:
    """Gives freed memory back to the system once, where a lot of it will not be needed again (glibc)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass


def peak_memory_bytes() -> int:
    """Returns the peak memory of this process in bytes: allocated on the GPU that computes, else resident (MPS too)."""
    import torch

    if device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def exhausted(error: BaseException) -> bool:
    """Returns whether an error says that memory ran out: Python's, a GPU's or that of PyTorch's allocator for the CPU."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or isinstance(error, RuntimeError) and bool(
        re.search("can't allocate memory|not enough memory|out of memory|bad_alloc", str(error)))


def use_device(name: str) -> None:
    """Chooses the device that computes.

    Args:
        name: one of DEVICES. auto: the GPU that CUDA finds, else the CPU; an Apple GPU is chosen by name alone, for no
            test has run on one.

    Raises:
        UserError: there is no such device here.
    """
    import torch

    global _chosen
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(name, name == "auto"):
        raise UserError(f"--device {name}: not there; this PyTorch ({torch.__version__}) finds "
                        + ", ".join(kind for kind, found in there.items() if found))
    _chosen = name


def device():
    """Returns the `torch.device` that computes: the one chosen, else the GPU that CUDA finds, else the CPU."""
    import torch

    if _chosen != "auto":
        return torch.device(_chosen)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def send(tensor, to):
    """Returns a tensor on a device; on its way to a GPU of CUDA nobody waits for what the GPU still computes."""
    # MPS may read the tensor's memory after it was given back, so there the copy is waited for.
    return tensor.to(to, non_blocking=to.type == "cuda")


def random_sources() -> dict:
    """Returns the random number generators that a training draws from, by name: each has get_rng_state and set_rng_state."""
    import torch

    sources = {"rng": torch}
    if device().type != "cpu":
        sources[f"rng.{device().type}"] = {"cuda": torch.cuda, "mps": torch.mps}[device().type]
    return sources


def use_threads(threads) -> None:
    """Sets the number of CPU threads to a recorded one: threads decide in which order sums are rounded.

    Warns in one line where PyTorch does not take that number.
    """
    if not isinstance(threads, int) or isinstance(threads, bool) or not 0 < threads <= 1024:
        return  # nothing usable was recorded
    import torch

    torch.set_num_threads(threads)
    if torch.get_num_threads() != threads:
        warnings.warn(f"{threads} threads cannot be had here, {torch.get_num_threads()} are used: sums are rounded in "
                      "another order, and the result may differ in its last digits", stacklevel=2)


def cpu_description() -> str:
    """Returns what the system says of the CPU, its vendor included."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()  # on Windows, the vendor too


def bf16_is_fast() -> bool:
    """Returns whether this machine multiplies in bfloat16 without converting to float32 first."""
    import torch

    return device().type != "cpu" or torch.cpu._is_avx512_bf16_supported()
