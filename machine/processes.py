"""The processes of one run: the rank of this one, and the operations that all of them do together.

    torchrun --nproc-per-node 2 run.py LoRA 12345

torchrun (and `accelerate launch`, which starts it) runs the same command several times and numbers the processes in their
environment. They sum a few small tensors (`all_reduce_sum`), agree on numbers (`all_reduce_max`) and print each line once
(`claim_once`). Without a launcher every function returns at once.
"""
from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from machine import signals
from machine.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# The variables that a launcher sets.
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How long one process may keep the others waiting: its disk may be slow, or it may have much to write.
TIMEOUT = timedelta(minutes=30)
_rank, _count, _store = 0, 1, None


class Lost(RuntimeError):
    """Reports that another process of the run has ended."""


def rank() -> int:
    """Returns the number of this process, from 0."""
    return _rank


def count() -> int:
    """Returns the number of processes that compute this run."""
    return _count


def is_main() -> bool:
    """Returns whether this process is the one that writes and prints: the first."""
    return _rank == 0


def launcher() -> str:
    """Returns the words that start as many processes as now, as a command line that can be copied."""
    if _count == 1:
        return "python"
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", _count))
    nodes = f"--nnodes {_count // on_this_machine} " if on_this_machine < _count else ""
    return f"torchrun {nodes}--nproc-per-node {on_this_machine}"


# ---------------------------------------------------------------- joining

def connect() -> None:
    """Finds the other processes if a launcher started several; all but the first are silent from then on.

    Raises:
        Lost: the first process cannot be reached.
    """
    global _rank, _count, _store
    if not all(name in os.environ for name in LAUNCHED) or os.environ["WORLD_SIZE"] == "1":
        return
    _rank, _count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not is_main():
        # tqdm reads this variable when it is imported, so it is set before PyTorch and its friends are.
        os.environ["TQDM_DISABLE"] = "1"
        sys.stdout = open(os.devnull, "w")
    # Otherwise the library reports a lost process with pages of addresses.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch import distributed

    _store = _together(lambda: next(distributed.rendezvous("env://", timeout=TIMEOUT)))[0]


def start(device: str) -> None:
    """Opens the connections on which the processes exchange tensors: gloo between CPUs, NCCL between GPUs.

    Args:
        device: kind of the device that computes: cpu, cuda or mps.

    Raises:
        UserError: more processes than GPUs, or a kind of device without such connections.
        Lost: another process has ended.
    """
    if _count == 1:
        return
    import torch
    from torch import distributed

    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", _rank))
        if local >= torch.cuda.device_count():
            raise UserError(f"{_count} processes: each needs a GPU, and here are {torch.cuda.device_count()}; start fewer, "
                            "or choose --device cpu")
        torch.cuda.set_device(local)
    elif device != "cpu":
        raise UserError(f"--device {device}: is for one process; several compute on CPUs or on GPUs of CUDA")
    # gloo is opened next to NCCL, because numbers to agree on are tensors in the CPU's memory.
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    _together(lambda: distributed.init_process_group(backend, store=_store, rank=_rank, world_size=_count, timeout=TIMEOUT))


def stop() -> None:
    """Closes the connections; the other processes may have ended already."""
    if _count > 1:
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()


# ---------------------------------------------------------------- operations of all processes

def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sums a tensor over all processes, in place, and returns it; the sum is the same in each process.

    Raises:
        Lost: another process has ended.
        signals.Interrupted: another process has ended after a signal that this one received too.
    """
    if _count > 1:
        from torch import distributed

        _together(lambda: distributed.all_reduce(tensor))
    return tensor


def gather(tensor: Tensor) -> Tensor:
    """Returns the tensors (...) of all processes, in the order of their ranks, as (count, ...)."""
    if _count == 1:
        return tensor[None]
    # A sum with zeros is exact, and NCCL and gloo both have it for every type of tensor used here.
    rows = tensor.new_zeros(_count, *tensor.shape)
    rows[_rank] = tensor
    return all_reduce_sum(rows)


def all_reduce_max(*numbers: int) -> tuple[int, ...]:
    """Returns the maximum of each number over all processes; none returns before all have called."""
    if _count == 1:
        return numbers
    import torch

    return tuple(gather(torch.tensor(numbers, dtype=torch.int64)).amax(0).tolist())


def broadcast(number: int) -> int:
    """Returns the first process's number (0 or more)."""
    return all_reduce_max(number if is_main() else 0)[0]


def shard(values: list) -> list:
    """Returns this process's share of a list: every count-th value, from its rank on."""
    return values[_rank::_count]


def barrier() -> None:
    """Returns when every process has called it."""
    all_reduce_max(0)


def claim_once(line: str) -> bool:
    """Returns whether this process is the first with a line, so that a line of several processes is printed once."""
    if _store is None:
        return True
    # A restarted group shares the store with the one before it, and may print the line again.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    try:
        return _store.add(f"said {attempt} {line}", 1) == 1
    except RuntimeError:
        # The process that held the store has ended: better twice than never.
        return True


def _together(operation: Callable):
    """Runs an operation of all processes.

    Raises:
        Lost: another process has ended.
        signals.Interrupted: it has, but this process has received a signal itself, and does not blame the other.
    """
    # gloo, NCCL and the store raise errors of several classes; RuntimeError is common to them.
    try:
        return operation()
    except RuntimeError:
        if number := signals.received():
            raise signals.Interrupted(number) from None
        raise Lost(f"another of the {_count} processes has ended") from None
