"""Puts the fast path in the place of the reference: the one place that swaps classes.

    print(install(classifier))      # after LoRA's injection
"""
from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fast import choice
from fast.blocks import fuse
from fast.classifier import FastClassifier
from fast.frozen_linear import FastLoRALinear
from fast.matmul import FastConv1D, FastEmbedding, FastLinear
from fast.recurrent import FastDistilRNN
from machine.hardware import device
from model import DistilRNN, LoRALinear, TextClassifier

# A layer of any other class (a new variant of LoRA, say) keeps its own forward pass.
FAST = {nn.Linear: FastLinear, Conv1D: FastConv1D, nn.Embedding: FastEmbedding, LoRALinear: FastLoRALinear,
        DistilRNN: FastDistilRNN, TextClassifier: FastClassifier}


def install(model: nn.Module) -> str:
    """Swaps the classes of a model and of its modules for fast ones; a second call adds the modules that are new.

    The class of an existing module is swapped, and no new module built, so that the parameters and their names stay those
    of the checkpoint.

    Args:
        model: a `TextClassifier`, a language model, a `DistilRNN`, or a module that holds one.

    Returns:
        One line for the user: the libraries that compute.
    """
    for module in model.modules():
        module.__class__ = FAST.get(type(module), type(module))
        if isinstance(module, FastClassifier):
            module.has_fused_blocks = fuse(module.net.base_model)
    # A language model without a classifier around it: `gen` samples from its fused blocks.
    if isinstance(model, PreTrainedModel):
        fuse(model.base_model)
    return (f"matmuls by {choice.matmul()}, norms and attention by {choice.kernels()}" if device().type == "cpu"
            else "fused blocks")
