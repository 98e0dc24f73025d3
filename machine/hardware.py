"""Describes and sets up this machine: its CPU, its device, its threads, and its memory."""
from __future__ import annotations

import ctypes
import platform
import re
import sys
import warnings
from pathlib import Path

from machine.errors import UserError

DEVICES = ("auto", "cpu", "cuda", "mps")
_chosen = "auto"


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Returns the CPU's model name from Linux's list; on other systems the name that Python knows, or the architecture."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory; does nothing with another C library.

    By default glibc hands large tensors back to the kernel as soon as they are freed, and every training step then pays the
    page faults of its activations again.
    """
    # Another C library has no such function (musl, macOS), and Windows has no library of that name.
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h.
    trim_threshold, mmap_threshold = -1, -3
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)


def release_freed_memory() -> None:
    """Gives freed memory back to the system, once, after a phase that needed much more than the next one (glibc)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass


def peak_memory_bytes() -> int:
    """Returns the peak memory of this process in bytes: allocated memory on a CUDA GPU, else resident memory (MPS too).

    Returns 0 on Windows, where Python's standard library does not report it.
    """
    import torch

    if device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    # Imported here, so that a system without this module loses the figure and nothing else.
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # getrusage(2) counts bytes on macOS, KiB elsewhere.
    return peak if sys.platform == "darwin" else peak * 1024


def exhausted(error: BaseException) -> bool:
    """Returns whether memory ran out: an error of Python, of a GPU, or of PyTorch's allocator on the CPU."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # On the CPU PyTorch raises a plain RuntimeError: its text alone tells it from other errors.
    shortage = "can't allocate memory|not enough memory|out of memory|bad_alloc"
    return isinstance(error, RuntimeError) and re.search(shortage, str(error)) is not None


def use_device(name: str) -> None:
    """Chooses the device that computes.

    Args:
        name: one of DEVICES. auto: a CUDA GPU if PyTorch finds one, else the CPU. No test has run on an Apple GPU, so auto
            never chooses it.

    Raises:
        UserError: this machine has no such device.
    """
    import torch

    global _chosen
    found = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not found.get(name, name == "auto"):
        raise UserError(f"--device {name}: not there; this PyTorch ({torch.__version__}) finds "
                        + ", ".join(kind for kind, is_found in found.items() if is_found))
    _chosen = name


def device():
    """Returns the `torch.device` that computes: the chosen one, else a CUDA GPU, else the CPU."""
    import torch

    if _chosen != "auto":
        return torch.device(_chosen)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def send(tensor, to):
    """Returns a copy of a tensor on a device; a copy to a CUDA GPU does not block."""
    # MPS may read the source's memory after it was freed, so a copy to MPS blocks.
    return tensor.to(to, non_blocking=to.type == "cuda")


def random_sources() -> dict:
    """Returns the random number generators of a training, by name; each has get_rng_state and set_rng_state."""
    import torch

    # The CPU's generator counts on every device: it initialises weights and orders batches.
    sources = {"rng": torch}
    if device().type != "cpu":
        sources[f"rng.{device().type}"] = {"cuda": torch.cuda, "mps": torch.mps}[device().type]
    return sources


def use_threads(threads) -> None:
    """Sets the number of CPU threads to a recorded one, because it decides the order in which sums are rounded.

    Warns in one line if PyTorch does not accept the number. Anything but a number from 1 to 1,024 is ignored: it was not
    written by a run.
    """
    if not isinstance(threads, int) or isinstance(threads, bool) or not 0 < threads <= 1024:
        return
    import torch

    torch.set_num_threads(threads)
    if torch.get_num_threads() != threads:
        warnings.warn(f"{threads} threads cannot be had here, {torch.get_num_threads()} are used: sums are rounded in "
                      "another order, and the result may differ in its last digits", stacklevel=2)


def cpu_description() -> str:
    """Returns the system's description of the CPU, vendor included."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()  # on Windows, the vendor too


def bf16_is_fast() -> bool:
    """Returns whether this machine multiplies in bfloat16 without converting to float32 first."""
    import torch

    return device().type != "cpu" or torch.cpu._is_avx512_bf16_supported()
