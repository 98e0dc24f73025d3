"""The one door to `fast/`: with the folder the same numbers come sooner, without it everything works, slower.

    speed.choose("auto")                    # or "reference": use nothing of fast/
    print(speed.install(classifier))

No other module outside `fast/` imports that folder.
"""
from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor, nn

import sampling as reference
from data.precision import round_frozen
from data_utils import Batch
from machine import hardware
from model import TextClassifier
from options.schema import RunOptions
from record.folder import recorded_config, recorded_kernels
from sampling import Sampling

# Only the missing folder is expected: a package that `fast/` itself does not find is an error.
try:
    from fast import amx, choice, frozen, generation, installation, matmul
    MISSING = ""
except ModuleNotFoundError as error:
    if not str(error.name).partition(".")[0] == "fast":
        raise
    MISSING = "the fast path is not there (no folder fast/): the reference computes"

KERNELS = ("auto", "reference", "torch", "onepass")
_kernels = "auto"  # the last argument of `choose`


def choose(kernels: str = "auto") -> None:
    """Chooses the way to compute for everything that is installed from now on.

    Args:
        kernels: `reference`: nothing of `fast/`; `auto`: the fastest on this machine; or a library of `fast/`.
    """
    global _kernels
    _kernels = kernels
    if not MISSING:
        choice.use_kernels(None if kernels in ("auto", "reference") else kernels)


def is_fast() -> bool:
    """Returns whether `install` swaps anything."""
    return not MISSING and _kernels != "reference"


def install(model: nn.Module) -> str:
    """Gives a classifier, a language model or a student the fast path; see `fast.installation.install`.

    Returns:
        One line for the user: the way that computes.
    """
    if is_fast():
        return installation.install(model)
    return MISSING or "the reference computes (--kernels reference)"


# ---------------------------------------------------------------- the way of a recorded run

def use_recorded_machine(options: RunOptions) -> None:
    """Gives a run that is resumed or repeated the recorded threads and libraries: they decide how sums are rounded."""
    config = recorded_config(options)
    # A new run: the option decides, and the rule of `fast.choice`.
    if config is None:
        choose(options.fast)
        if not MISSING:
            choice.use_matmul(None)
        return
    hardware.use_threads(config.get("threads"))
    kernels = recorded_kernels(config)
    choose(kernels)
    if not MISSING:
        # Runs without this entry are older than the choice and had PyTorch's own matmuls.
        choice.use_matmul(config.get("matmul", "torch"))
    elif kernels != "reference":
        warnings.warn(f"{MISSING}, and the result may differ in its last digits", stacklevel=2)


def in_use() -> dict[str, str]:
    """Returns the entries of config.json that name the way to compute."""
    if is_fast():
        return {"matmul": choice.matmul(), "kernels": choice.kernels()}
    return {"matmul": "torch", "kernels": "reference"}


def is_fused(classifier: TextClassifier) -> bool:
    """Returns whether fused blocks compute a classifier: they profit from shared prefixes and from several threads."""
    return getattr(classifier, "fused", False)


def grouped_logits(classifier: TextClassifier, input_ids: Tensor, attention_mask: Tensor, group: Tensor,
                   route: Callable[..., None]) -> Tensor:
    """Returns logits (B, labels) where the layers treat sentences of different groups differently: a user's own adapter.

    Args:
        input_ids: (B, T), right-padded; attention_mask: (B, T), on the CPU.
        group: (B,) ascending, the group of each sentence.
        route: is called before the forward pass with the group of each row that a layer reads: of sentences (B,), and of
            tokens (B * T,), or of fewer tokens where sentences of a group share the rows of a prefix.
    """
    # An encoder computes every token, so that the reference's routing is right for its fused blocks too.
    if classifier.decoder and is_fused(classifier):
        return classifier.grouped_logits(input_ids, attention_mask, group, route)
    route(group, group.repeat_interleave(input_ids.shape[1]))
    return classifier.text_logits(input_ids, attention_mask)


# ---------------------------------------------------------------- precision

def has_tiles() -> bool:
    """Returns whether this machine has bf16x3: float32 matmuls by AMX tiles of bfloat16."""
    return is_fast() and amx.available()


def check_precision(precision: str) -> None:
    """Raises `UserError` if this machine cannot compute in a precision."""
    # Before a model is loaded: the error comes at once.
    if precision == "bf16x3" and is_fast() and hardware.device().type == "cpu":
        amx.load()


def set_precision(backbone: nn.Module, precision: str) -> None:
    """Sets the precision of a backbone's frozen weights: fp32, bf16x3 or bf16; trained parameters stay float32."""
    if is_fast():
        matmul.set_precision(backbone, precision)
    else:
        round_frozen(backbone, precision)


# ---------------------------------------------------------------- once instead of again

def has_frozen_blocks(classifier: TextClassifier) -> bool:
    """Returns whether `cache_frozen` has something to cache."""
    return is_fast() and frozen.has_frozen_blocks(classifier)


def cache_frozen(classifier: TextClassifier, splits: list[list[Batch]], folder: Path | None, memory: float) -> str:
    """Caches the output of frozen blocks for every batch; see `fast.frozen.cache_frozen`."""
    return frozen.cache_frozen(classifier, splits, folder, memory) if is_fast() else ""


def sample_tokens(lm, prompts, sampling: Sampling, *, batch_size: int = 64, **how) -> Iterator[list[int]]:
    """Samples texts, `batch_size` together where the fast path takes the model; see `sampling.sample_tokens`."""
    if is_fast() and generation.takes(lm):
        return generation.sample_together(lm, prompts, sampling, batch_size=batch_size, **how)
    return reference.sample_tokens(lm, prompts, sampling, **how)


def samples_together(lm) -> bool:
    """Returns whether `sample_tokens` computes many texts of this model in one batch."""
    return is_fast() and generation.takes(lm)
