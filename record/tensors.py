"""Reads and writes tensors together with their checksum; computes digests of weights and of batches."""
from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from machine.errors import UserError
from record.files import write_file


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads a safetensors file.

    Raises:
        UserError: missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: missing or damaged ({str(error).splitlines()[0]})") from None


def save_checked(path: Path, tensors: dict[str, Tensor], text: str) -> None:
    """Writes tensors and a text into one safetensors file that holds its own SHA-256.

    Raises:
        UserError: see `record.files.write_file`.
    """
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    # One entry of metadata: the library writes several of them in any order, and equal content must give equal bytes.
    write_file(path, save(tensors, {"checked": _checked_digest(tensors, text) + text}))


def load_checked(path: Path) -> tuple[dict[str, Tensor], str]:
    """Reads the tensors and the text that `save_checked` wrote.

    Raises:
        UserError: missing, or a value is not as it was written.
    """
    try:
        with safe_open(path, "pt") as file:
            checked = (file.metadata() or {}).get("checked", "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: damaged ({str(error).splitlines()[0]})") from None
    # 64 hexadecimal digits of the digest stand before the text.
    digest, text = checked[:64], checked[64:]
    if digest != _checked_digest(tensors, text):
        raise UserError(f"{path}: damaged (its checksum does not match)")
    return tensors, text


def _checked_digest(tensors: dict[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        # As bytes, because NumPy has no bfloat16.
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ---------------------------------------------------------------- digests

def weights_digest(model: nn.Module) -> str:
    """Returns the SHA-256 over every parameter and buffer of a model, names included."""
    return _digest(_named_bytes(model))


def digest_meanwhile(model: nn.Module) -> Future[str]:
    """Starts `weights_digest` of a model in a thread of its own: hashing does not hold Python's lock.

    Until the result is known nothing may write to the weights; they may be wrapped, moved or given another type. The
    future's `result()` raises the thread's error. The process may end before the thread does.
    """
    # The names and bytes are listed now: the caller replaces modules while the thread hashes.
    future, named = Future(), list(_named_bytes(model))

    def work() -> None:
        try:
            future.set_result(_digest(named))
        except BaseException as error:
            future.set_exception(error)
    threading.Thread(target=work, daemon=True).start()
    return future


def _named_bytes(model: nn.Module) -> Iterator[tuple[str, np.ndarray]]:
    """Yields name, shape and type of each parameter and buffer, and its bytes (a view if the tensor is on the CPU)."""
    for name, value in sorted(model.state_dict().items()):
        yield (f"{name}{tuple(value.shape)}{value.dtype}",
               value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _digest(named: Iterable[tuple[str, np.ndarray]]) -> str:
    digest = hashlib.sha256()
    for name, data in named:
        digest.update(name.encode())
        digest.update(data)
    return digest.hexdigest()


def batches_digest(batches: list) -> str:
    """Returns the SHA-256 over the token ids, masks, row numbers and features of batches: the data as tokenized."""
    digest = hashlib.sha256()
    for batch in batches:
        features = () if batch.features is None else (batch.features,)
        for tensor in (batch.input_ids, batch.attention_mask, batch.rows, *features):
            digest.update(str(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
