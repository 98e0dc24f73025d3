"""Toy classifiers with adapters and trained heads, for the tests of PEFT's layout."""

import pytest
import torch
from conftest import ARCHITECTURES, adapted, fast_classifier, logits_of, toy_net
from torch import nn

from adapters.peft_layout import (
    load_adapter,
)
from machine.errors import UserError
from model import TextClassifier, lora_layers

HEADS = {"gpt2": ["score"], "llama": ["score"], "bert": ["classifier"], "distilbert": ["pre_classifier", "classifier"],
         "mpnet": ["classifier"]}
VARIANTS = [(a, {}) for a in ARCHITECTURES] + [
    ("gpt2", {"targets": ("q", "v")}), ("gpt2", {"targets": ("q", "v", "mlp"), "rslora": True}),
    ("gpt2", {"targets": ("k", "c_fc"), "layers": "1"}), ("llama", {"rslora": True, "targets": ("q", "v", "down_proj")}),
    ("gpt2", {"targets": ("q", "v"), "rank": 20, "alpha": 3.0})]


def fine_tuned(architecture: str, **options) -> TextClassifier:
    """As after training: B and head are not what they began as, and the logits show it."""
    classifier = adapted(architecture, **options)
    randomize_heads(classifier.net)
    assert not torch.allclose(logits_of(classifier), base_logits(architecture), atol=1e-2)
    with torch.no_grad():  # the adapter shows on its own as well, not through the head alone
        with_adapter = logits_of(classifier)
        kept = [layer.lora_B.clone() for layer in lora_layers(classifier.net).values()]
        for layer in lora_layers(classifier.net).values():
            layer.lora_B.zero_()
        assert not torch.allclose(logits_of(classifier), with_adapter, atol=1e-2)
        for layer, B in zip(lora_layers(classifier.net).values(), kept, strict=True):
            layer.lora_B.copy_(B)
    return classifier


def randomize_heads(net: nn.Module) -> None:
    for weight in head_weights(net).values():
        nn.init.normal_(weight, std=0.3)


def head_weights(net) -> dict[str, torch.Tensor]:
    """The matrices of the head by name."""
    return {name: p for name, p in net.named_parameters()
            if name.startswith(tuple(HEADS[net.config.model_type])) and p.ndim > 1}


def base_logits(architecture: str) -> torch.Tensor:
    return logits_of(fast_classifier(toy_net(architecture)))


def with_other_head(architecture: str) -> TextClassifier:
    """The same frozen backbone under a head of another seed: what a second process starts from."""
    classifier = fast_classifier(toy_net(architecture)).eval()
    torch.manual_seed(99)
    randomize_heads(classifier.net)
    return classifier


def refused_unchanged(net, folder, match: str, head: bool = True) -> None:
    """`load_adapter` raises one line and leaves modules, values and gradient marks as they were."""
    def snapshot():
        return {name: (type(m), m.training) for name, m in net.named_modules()}, {
            name: (p.requires_grad, p.clone()) for name, p in net.named_parameters()}

    modules, values = snapshot()
    with pytest.raises(UserError, match=match) as error:
        load_adapter(net, folder, head)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert snapshot()[0] == modules
    for name, (grad, value) in snapshot()[1].items():
        assert grad == values[name][0] and torch.equal(value, values[name][1]), name
