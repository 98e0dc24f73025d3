"""Adapter files in PEFT's layout: what is saved here loads there, and the other way round.

A folder holds `adapter_config.json` and `adapter_model.safetensors`: A and B of every adapted layer and
the classification head, nothing of the frozen model.
"""
from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from files import UserError, read_json, write_file, write_json
from model import LoRALinear, TextClassifier, lora_layers

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's name for the wrapped model
# Features of PEFT's LoRA that change the formula; an adapter that uses one is refused, not misread.
UNSUPPORTED = ("use_dora", "lora_bias", "use_qalora", "trainable_token_indices", "layer_replication", "alora_invocation_tokens",
               "use_bdlora", "arrow_config", "target_parameters")


def save_adapter(classifier: TextClassifier, folder: Path, base: str) -> None:
    """Writes adapter and head.

    A layer adapted in slices is written as the one block matrix of the summed rank, which is the same
    function: alpha grows with the rank so that the scaling stays.

    Args:
        classifier: with at least one `LoRALinear`, or with a trained head alone.
        folder: existing folder.
        base: name or path of the base model, for whoever loads the adapter.
    """
    layers = lora_layers(classifier.net)
    state, ranks, alphas = {}, {}, {}
    for name, layer in layers.items():
        state[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A
        state[f"{PREFIX}{name}.lora_B.weight"] = layer.block_B()
        if len(layer.slices) > 1:
            ranks[name] = layer.lora_A.shape[0]
            times = len(layer.slices)
            alphas[name] = layer.alpha * (math.sqrt(times) if layer.rslora else times)
    for name in classifier.head_names():
        for key, value in classifier.net.get_submodule(name).state_dict().items():
            state[f"{PREFIX}{name}.{key}"] = value
    first = next(iter(layers.values()))
    write_json(folder / CONFIG_FILE, {
        "peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": base, "inference_mode": True,
        "r": first.rank, "lora_alpha": first.alpha, "lora_dropout": first.dropout.p, "use_rslora": first.rslora,
        "rank_pattern": ranks, "alpha_pattern": alphas, "target_modules": sorted(layers),
        "modules_to_save": classifier.head_names(), "bias": "none", "init_lora_weights": True,
        "fan_in_fan_out": isinstance(first.base, Conv1D)})
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    write_file(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))


def base_of(folder: Path) -> str:
    """Name or path of the base model an adapter was made for.

    Raises:
        UserError: no adapter there.
    """
    return str(read_json(Path(folder) / CONFIG_FILE).get("base_model_name_or_path"))


def load_adapter(net: PreTrainedModel, folder: Path, head: bool = True) -> list[str]:
    """Puts a saved adapter on a model: `LoRALinear` where it adapts, its head in place of the model's.

    Args:
        net: a sequence classifier, or (with `head=False`) the language model of the same backbone.
        folder: as `save_adapter` or PEFT's `save_pretrained` writes it.
        head: whether to load the task head too.

    Returns:
        Names of the adapted modules.

    Raises:
        UserError: missing or damaged files, an unsupported kind of adapter, or one for another base.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG_FILE)
    used = [key for key in UNSUPPORTED if config.get(key)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or used:
        raise UserError(f"{folder / CONFIG_FILE}: not a plain LoRA adapter "
                        f"({', '.join(used) or config.get('peft_type') or 'no peft_type'}); expected peft_type LORA")
    state = load_tensors(folder / WEIGHTS_FILE)
    names = [key.removeprefix(PREFIX).removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    modules = dict(net.named_modules())
    layers = {}
    for name in names:  # everything is checked before anything is changed
        A, B = state.pop(f"{PREFIX}{name}.lora_A.weight"), state.pop(f"{PREFIX}{name}.lora_B.weight", None)
        base = modules.get(name)
        expected = (base.nx, base.nf) if isinstance(base, Conv1D) else \
            (base.in_features, base.out_features) if isinstance(base, nn.Linear) else None
        if B is None or expected is None or (A.shape[1], B.shape[0], B.shape[1]) != (*expected, A.shape[0]):
            raise UserError(f"{folder}: adapter for another base: {name} "
                            f"{'does not exist' if expected is None else 'has another shape'} in this model; "
                            f"it was made for {config.get('base_model_name_or_path')}")
        layer = LoRALinear(base, A.shape[0], float(_pattern(config, "alpha_pattern", name, config["lora_alpha"])),
                           float(config.get("lora_dropout", 0.0)), bool(config.get("use_rslora")))
        with torch.no_grad():
            layer.lora_A.copy_(A)
            layer.lora_B.copy_(B)
        layers[name] = layer
    if head:
        own = net.state_dict()
        heads = {key.removeprefix(PREFIX): value for key, value in state.items()}
        wrong = [k for k, v in heads.items() if k not in own or own[k].shape != v.shape]
        missing = [k for k in own if not k.startswith(net.base_model_prefix + ".") and k not in heads]
        if wrong or missing:
            raise UserError(f"{folder / WEIGHTS_FILE}: no classification head for this model ({(wrong or missing)[0]})")
        with torch.no_grad():
            for key, value in heads.items():
                own[key].copy_(value)
    net.base_model.requires_grad_(False)
    for name, layer in layers.items():
        net.set_submodule(name, layer)
    return names


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads a safetensors file.

    Raises:
        UserError: missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: missing or damaged ({str(error).splitlines()[0]})") from None


def _pattern(config: dict, key: str, name: str, default):
    """PEFT's pattern lookup: the first key that is the module's name or its dotted ending."""
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def merge_adapter(net: nn.Module) -> None:
    """Merges every `LoRALinear` into its frozen weight, or none.

    Raises:
        ValueError: one of them holds values that are not finite; nothing was merged.
    """
    layers = lora_layers(net).values()
    for layer in layers:
        if not torch.isfinite(layer.delta()).all():
            raise ValueError("the adapter holds values that are not finite; nothing was merged")
    for layer in layers:
        layer.merge()


def unmerge_adapter(net: nn.Module) -> None:
    """Takes every `LoRALinear` out of its frozen weight again."""
    for layer in lora_layers(net).values():
        layer.unmerge()
