"""BitFit: the biases of the backbone train, with the task head, and nothing else.

    y = W x + (b + delta)

Ben Zaken et al. 2022, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models". Every
bias counts: of linear layers (out_features,) and of norms (channels,).

Cost: about 0.1 % of the parameters, and the whole backward pass, through the library's own blocks: fused blocks give a bias
no gradient. The biases change the base: an `AdapterBank` cannot hold them, and PEFT has no layout for them alone.
"""
from __future__ import annotations

from transformers import PreTrainedModel

from data.backbones import freeze_backbone
from machine.errors import UserError
from options.schema import LoRAOptions


def is_bias(name: str) -> bool:
    """Returns whether a parameter is a bias, by its name."""
    return name == "bias" or name.endswith((".bias", "_bias"))


def inject(net: PreTrainedModel, options: LoRAOptions | None = None) -> None:
    """Freezes the backbone but for its biases.

    Raises:
        UserError: it has none.
    """
    freeze_backbone(net)
    biases = [p for name, p in net.base_model.named_parameters() if is_bias(name)]
    if not biases:
        raise UserError(f"--method bitfit: a {net.config.model_type} model has no biases; expected --method lora or ia3")
    for p in biases:
        p.requires_grad_(True)
