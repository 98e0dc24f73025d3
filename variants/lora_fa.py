"""LoRA-FA: plain LoRA with A frozen at its random start; B alone trains.

    y = W x + s B A0 x + b

Zhang et al. 2023, "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", equation 3.

Cost: half of plain LoRA's trained numbers, (out_features, rank) a layer; the backward pass needs A0 x alone, of width rank.
The layers are plain LoRA's: fused, served by an `AdapterBank`, saved as plain LoRA.
"""
from __future__ import annotations

from transformers import PreTrainedModel

from model import inject_lora, lora_layers
from options.schema import LoRAOptions


def inject(net: PreTrainedModel, options: LoRAOptions) -> None:
    """Adapts a model by LoRA and freezes each A; raises `UserError` as `inject_lora` does."""
    inject_lora(net, options)
    for layer in lora_layers(net).values():
        layer.lora_A.requires_grad_(False)
