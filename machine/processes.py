"""The processes of one run: which of them this is, and what they compute together.

    torchrun --nproc-per-node 2 run.py LoRA 12345

torchrun (and `accelerate launch`, which starts it) runs the same command several times and numbers the processes in
their environment. They sum a few small tensors (`all_reduce_sum`), agree on numbers (`all_reduce_max`) and print each line
once (`claim_once`). A process that is alone waits for nobody: every function returns at once.
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

NUMBERED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what a launcher sets
LIMIT = timedelta(minutes=30)  # for which processes wait for each other: one may have a slow disk, or much to write
_rank, _count, _store = 0, 1, None


class Lost(RuntimeError):
    """Another process of the run has ended."""


def rank() -> int:
    """Returns the number of this process, from 0."""
    return _rank


def count() -> int:
    """Returns how many processes compute this run."""
    return _count


def is_main() -> bool:
    """Returns whether this is the process that writes and prints."""
    return _rank == 0


def launcher() -> str:
    """Returns what starts as many processes as there are, for a command line that can be copied."""
    if _count == 1:
        return "python"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", _count))
    return "torchrun " + (f"--nnodes {_count // here} " if here < _count else "") + f"--nproc-per-node {here}"


# ---------------------------------------------------------------- joining

def connect() -> None:
    """Finds the other processes, where a launcher started several; all but the first are silent from here on.

    Raises:
        Lost: the first process cannot be reached.
    """
    global _rank, _count, _store
    if not all(name in os.environ for name in NUMBERED) or os.environ["WORLD_SIZE"] == "1":
        return
    _rank, _count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not is_main():
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
        sys.stdout = open(os.devnull, "w")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of a lost process the library tells with pages of addresses
    from torch import distributed

    _store = _together(lambda: next(distributed.rendezvous("env://", timeout=LIMIT)))[0]


def start(device: str) -> None:
    """Opens the ways on which the processes exchange tensors: gloo between CPUs, NCCL between GPUs.

    Raises:
        UserError: more processes than GPUs, or a kind of device on which there is no such way.
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
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    _together(lambda: distributed.init_process_group(backend, store=_store, rank=_rank, world_size=_count, timeout=LIMIT))


def stop() -> None:
    """Closes what `start` opened; the others may be gone already."""
    if _count > 1:
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()


# ---------------------------------------------------------------- what they do together

def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Adds a tensor up over all processes, in place, and returns it; the outcome is the same on each.

    Raises:
        Lost: another process has ended.
        signals.Interrupted: so it has, for a signal that has reached this one too.
    """
    if _count > 1:
        from torch import distributed

        _together(lambda: distributed.all_reduce(tensor))
    return tensor


def gather(tensor: Tensor) -> Tensor:
    """Returns the tensors (...) of all processes, in the order of their numbers, as (count, ...)."""
    if _count == 1:
        return tensor[None]
    rows = tensor.new_zeros(_count, *tensor.shape)
    rows[_rank] = tensor
    return all_reduce_sum(rows)


def all_reduce_max(*numbers: int) -> tuple[int, ...]:
    """Returns the largest of each number over all processes, which is a way to agree; nobody leaves before all came."""
    if _count == 1:
        return numbers
    import torch

    return tuple(gather(torch.tensor(numbers, dtype=torch.int64)).amax(0).tolist())


def broadcast(number: int) -> int:
    """Returns the number (0 or more) that the first process has."""
    return all_reduce_max(number if is_main() else 0)[0]


def shard(values: list) -> list:
    """Returns those of a list that this process computes."""
    return values[_rank::_count]


def barrier() -> None:
    """Waits until every process has come here."""
    all_reduce_max(0)


def claim_once(what: str) -> bool:
    """Returns whether this process is the first to say it: what several have to say is said once."""
    if _store is None:
        return True
    try:
        return _store.add(f"said {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)} {what}", 1) == 1
    except RuntimeError:  # gone with the process that held it
        return True


def _together(operation: Callable):
    """Runs an operation that takes all processes; one that was asked to stop does not blame the others."""
    try:
        return operation()
    except RuntimeError:  # gloo, NCCL and the store have errors of several classes
        if number := signals.received():
            raise signals.Interrupted(number) from None
        raise Lost(f"another of the {_count} processes has ended") from None
