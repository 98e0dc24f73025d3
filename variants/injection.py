"""The variants by name: the one place that chooses what `TextClassifier.configure` injects, and what its training adds.

    configure(classifier, "lora", LoRAOptions(variant="dora"))

A new variant is a file here with its equation, and an entry: its name is a choice of `--variant`.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel

from machine.errors import UserError
from model import TextClassifier, inject_lora
from options.schema import LoRAOptions, RunOptions
from variants import adalora, bitfit, ia3, lora_fa, lora_plus, vera
from variants.dora import DoRALinear
from variants.pissa import PiSSALinear
from variants.rank_budget import RankBudget

# The choices of --variant. rsLoRA is plain LoRA with another scaling, which the options hold.
VARIANTS: dict[str, Callable[[PreTrainedModel, LoRAOptions], object]] = {
    "lora": inject_lora, "rslora": inject_lora, "dora": partial(inject_lora, layer_class=DoRALinear),
    "pissa": partial(inject_lora, layer_class=PiSSALinear), "loraplus": lora_plus.inject, "lora-fa": lora_fa.inject,
    "vera": vera.inject, "adalora": adalora.inject}
PLAIN = ("lora", "rslora", "loraplus", "lora-fa")  # variants of the layer `LoRALinear` itself
METHODS = {"ia3": ia3.inject, "bitfit": bitfit.inject}


def configure(classifier: TextClassifier, method: str, lora: LoRAOptions | None = None, features: Tensor | None = None
              ) -> TextClassifier:
    """Prepares a classifier for a method, and for `lora` in the variant of its options; see `TextClassifier.configure`."""
    inject = VARIANTS[lora.variant if lora else "lora"] if method == "lora" else METHODS.get(method, inject_lora)
    return classifier.configure(method, lora, features, inject)


def check(options: RunOptions) -> None:
    """Checks that a run's method and options have a meaning for its variant.

    Raises:
        UserError: they have none; says why.
    """
    lora = options.lora
    if options.method != "lora":
        # rsLoRA is a scaling: like --rank it may be a common option of a comparison, whose other methods do not read it.
        if lora.variant not in ("lora", "rslora"):
            raise UserError(f"--variant {lora.variant}: a variant of --method lora; --method {options.method} has none")
        if lora.rank_pattern or lora.alpha_pattern:
            raise UserError(f"--rank-pattern, --alpha-pattern: sizes of --method lora; --method {options.method} has none")
    if lora.variant in ("vera", "adalora") and lora.rank_pattern:
        why = "its layers share matrices of one rank" if lora.variant == "vera" else "it chooses the ranks itself"
        raise UserError(f"--rank-pattern: not with --variant {lora.variant}: {why}")
    if lora.variant == "adalora" and options.train.ema:
        raise UserError("--ema: not with --variant adalora: an average has none of the zeros that are its ranks")
    if options.init and lora.variant not in PLAIN:
        raise UserError(f"--init: not with --variant {lora.variant}, which begins from other values than a saved adapter's; "
                        f"expected one of {', '.join(PLAIN)}")


def after_update(classifier: TextClassifier, method: str, lora: LoRAOptions) -> Callable[[int, int], None]:
    """Returns what training does after each optimiser step (from 1) of a total: AdaLoRA drops components."""
    if method == "lora" and lora.variant == "adalora":
        return RankBudget(classifier.net, lora.rank).after_step
    return lambda step, total: None


def penalty(classifier: TextClassifier, method: str, lora: LoRAOptions) -> Callable[[], Tensor] | None:
    """Returns what training adds to the loss; None for nothing, as with all but AdaLoRA."""
    if method == "lora" and lora.variant == "adalora":
        return lambda: adalora.GAMMA * adalora.orthogonality(classifier.net)
    return None
