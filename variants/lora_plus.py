"""LoRA+: plain LoRA with a higher learning rate for B than for A.

    rate of B = ratio * rate of A (--loraplus-ratio)

Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", section 4: with equal rates A and B of a wide
model do not both learn; the paper's ratio is 2^4.

Cost: none. The layers are plain LoRA's: fused, served by an `AdapterBank`, saved as plain LoRA.
"""
from __future__ import annotations

from transformers import PreTrainedModel

from model import inject_lora, lora_layers
from options.schema import LoRAOptions


def inject(net: PreTrainedModel, options: LoRAOptions) -> None:
    """Adapts a model by LoRA, and marks each B (out_features, rank) for its rate; raises as `inject_lora` does."""
    inject_lora(net, options)
    for layer in lora_layers(net).values():
        # `make_optimizer` reads it.
        layer.lora_B.lr_ratio = options.loraplus_ratio
