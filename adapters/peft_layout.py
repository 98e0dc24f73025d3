"""Adapter files in PEFT's layout: what is saved here loads there, and the other way round.

A folder holds `adapter_config.json` and `adapter_model.safetensors`: A and B of every adapted layer and
the classification head, nothing of the frozen model.
"""
from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from data.backbones import freeze_backbone, fresh_modules
from machine.errors import UserError
from model import LoRALinear, TextClassifier, lora_layers
from record.files import read_json, write_file, write_json
from record.tensors import load_tensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's name for the wrapped model
# Features of PEFT's LoRA that change the formula; an adapter that uses one is refused, not misread.
UNSUPPORTED = ("use_dora", "lora_bias", "use_qalora", "trainable_token_indices", "layer_replication",
               "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "target_parameters")
# Initialisations that change the frozen weights too, so that A and B alone are not the whole of the update.
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


def save_adapter(classifier: TextClassifier, folder: Path, base: str) -> None:
    """Writes adapter and head.

    A layer adapted in slices is written as the one block matrix of the summed rank, which is the same
    function: alpha grows with the rank so that the scaling stays.

    Args:
        classifier: with at least one `LoRALinear`.
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
    for name in _saved_whole(classifier):
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


def _saved_whole(classifier: TextClassifier) -> list[str]:
    """Modules that PEFT takes for the head: it goes by how a name ends, and asks for the weights of each (ModernVBERT's
    vision model has a `head` of its own).
    """
    heads, adapted = classifier.head_names(), lora_layers(classifier.net)
    return [name for name, _ in classifier.net.named_modules() if name in heads or name.endswith(tuple(
        f".{head}" for head in heads)) and not any(other.startswith(name) for other in adapted)]


def base_of(folder: Path) -> str:
    """Returns name or path of the base model that an adapter was made for.

    Raises:
        UserError: no adapter there, or one that does not say.
    """
    base = read_json(Path(folder) / CONFIG_FILE).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{Path(folder) / CONFIG_FILE}: names no base_model_name_or_path; give --model")
    return base


@dataclass(frozen=True)
class Adapter:
    """What an adapter's files hold."""

    pairs: dict[str, tuple[Tensor, Tensor]]  # by the adapted module's name: A (rank, in) and B (out, rank)
    alphas: dict[str, float]
    dropout: float
    rslora: bool
    whole: dict[str, Tensor]  # other tensors by name: the head, and whatever of the backbone was trained as a whole

    def scaling(self, name: str) -> float:
        """Scaling of a module's update."""
        rank = len(self.pairs[name][0])
        return self.alphas[name] / (math.sqrt(rank) if self.rslora else rank)


def read_adapter(net: nn.Module, folder: Path) -> Adapter:
    """Reads an adapter for a model, of which nothing is changed.

    Raises:
        UserError: missing or damaged files, an unsupported kind of adapter, or one for another base.
    """
    config = read_json(folder / CONFIG_FILE)
    used = [key for key in UNSUPPORTED if config.get(key)]
    if str(config.get("init_lora_weights")).startswith(CHANGES_BASE):
        used.append(f"init_lora_weights {config['init_lora_weights']}")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or used:
        raise UserError(f"{folder / CONFIG_FILE}: not a plain LoRA adapter "
                        f"({', '.join(used) or config.get('peft_type') or 'no peft_type'}); expected peft_type LORA")
    state = load_tensors(folder / WEIGHTS_FILE)
    names = [key.removeprefix(PREFIX).removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    if not names:
        raise UserError(f"{folder / WEIGHTS_FILE}: no LoRA weights in it")
    try:
        alphas = {name: float(_pattern(config, "alpha_pattern", name, config["lora_alpha"])) for name in names}
        dropout = nn.Dropout(float(config.get("lora_dropout") or 0.0)).p
    except (KeyError, TypeError, ValueError, AttributeError, re.error):
        raise UserError(f"{folder / CONFIG_FILE}: lora_alpha, alpha_pattern or lora_dropout is missing or not as "
                        "expected") from None
    modules = dict(net.named_modules())
    pairs = {}
    for name in names:
        A, B = state.pop(f"{PREFIX}{name}.lora_A.weight"), state.pop(f"{PREFIX}{name}.lora_B.weight", None)
        expected = shape_of(modules.get(name))
        rank = B.shape[1] if B is not None and B.ndim == 2 else 0
        if expected is None or rank < 1 or A.shape != (rank, expected[0]) or B.shape != (expected[1], rank):
            raise UserError(f"{folder}: adapter for another base: {name} "
                            f"{'does not exist' if expected is None else 'has another shape'} in this model; "
                            f"it was made for {config.get('base_model_name_or_path')}")
        pairs[name] = A, B
    return Adapter(pairs, alphas, dropout, bool(config.get("use_rslora")),
                   {key.removeprefix(PREFIX): value for key, value in state.items()})


def load_adapter(net: PreTrainedModel, folder: Path, head: bool = True) -> list[str]:
    """Puts a saved adapter on a model: `LoRALinear` where it adapts, its head in place of the model's.

    Args:
        net: a sequence classifier, or (with `head=False`) the language model of the same backbone.
        folder: as `save_adapter` or PEFT's `save_pretrained` writes it.
        head: whether to load the task head too.

    Returns:
        Names of the adapted modules.

    Raises:
        UserError: see `read_adapter`; nothing was changed.
    """
    folder = Path(folder)
    adapter = read_adapter(net, folder)
    own, inside = net.state_dict(), net.base_model_prefix + "."
    whole = {key: value for key, value in adapter.whole.items() if head or key.startswith(inside)}
    wrong = [key for key, value in whole.items() if key not in own or own[key].shape != value.shape]
    fresh = tuple(f"{name}." for name in fresh_modules(net))  # of the backbone, and yet the head's
    missing = [key for key in own if head and key not in whole and (key.startswith(fresh) or not key.startswith(inside))]
    if missing:
        lost = ("; the base lacks it too, and where the adapter was trained it was another: PEFT saves it with "
                "modules_to_save" if missing[0].startswith(fresh) else "")
        raise UserError(f"{folder / WEIGHTS_FILE}: no classification head for this model ({missing[0]} is missing{lost})")
    if wrong:
        raise UserError(f"{folder / WEIGHTS_FILE}: {wrong[0]} does not exist or has another shape in this model")
    with torch.no_grad():
        for key, value in whole.items():
            own[key].copy_(value)
    freeze_backbone(net)
    for name, (A, B) in adapter.pairs.items():
        layer = LoRALinear(net.get_submodule(name), A.shape[0], adapter.alphas[name], adapter.dropout, adapter.rslora)
        with torch.no_grad():
            layer.lora_A.copy_(A)
            layer.lora_B.copy_(B)
        net.set_submodule(name, layer)
    return list(adapter.pairs)


def start_from(classifier: TextClassifier, folder: Path, head: bool) -> None:
    """Copies a saved adapter into the fresh one of a classifier, which trains on from there.

    Args:
        classifier: with `LoRALinear`s of the same rank, scaling, targets and layers as the saved adapter's.
        head: whether to copy the saved head too.

    Raises:
        UserError: see `read_adapter`; or the saved adapter is one of another rank, scaling, target or layer.
    """
    adapter, layers = read_adapter(classifier.net, folder), lora_layers(classifier.net)
    other = sorted(set(layers) ^ set(adapter.pairs))
    if other:
        raise UserError(f"--init {folder}: {other[0]} is adapted {'here' if other[0] in layers else 'there'} alone; "
                        "expected --targets and --layers of that run")
    for name, (A, B) in adapter.pairs.items():
        layer = layers[name]
        try:
            _copy_update(layer, A, B)
        except ValueError:
            raise UserError(f"--init {folder}: {name} has an update of rank {len(A)} there, of rank {len(layer.lora_A)} "
                            "here, or of other outputs; expected --rank and --targets of that run") from None
        if not math.isclose(adapter.scaling(name), layer.scaling, rel_tol=1e-6):
            raise UserError(f"--init {folder}: scaled by {adapter.scaling(name):g} there, by {layer.scaling:g} here; "
                            "expected --alpha of that run (and --rslora, or not)")
    own = classifier.net.state_dict()
    with torch.no_grad():
        for key, value in adapter.whole.items() if head else ():
            own[key].copy_(value)


@torch.no_grad()
def _copy_update(layer: LoRALinear, A: Tensor, block: Tensor) -> None:
    """Copies A (rank * slices, in_features) and the result of `block_B` of a layer with the same rank and slices.

    Raises:
        ValueError: another rank, or other outputs.
    """
    if A.shape != layer.lora_A.shape or block.shape != (layer.out_features, len(A)):
        raise ValueError("an update of another rank")
    parts = [block[start:stop, i * layer.rank:(i + 1) * layer.rank] for i, (start, stop) in enumerate(layer.slices)]
    B = torch.cat(parts)
    # Entries outside the slices would be lost.
    if B.count_nonzero() != block.count_nonzero():
        raise ValueError("an update of other outputs")
    layer.lora_A.copy_(A)
    layer.lora_B.copy_(B)


def shape_of(linear: nn.Module | None) -> tuple[int, int] | None:
    """Returns (in_features, out_features) of a linear layer or of an adapted one; None for anything else."""
    if isinstance(linear, Conv1D):
        return linear.nx, linear.nf
    shape = getattr(linear, "in_features", None), getattr(linear, "out_features", None)
    return None if None in shape else shape


def _pattern(config: dict, key: str, name: str, default):
    """Looks a module up in PEFT's patterns: the first key that is the module's name or its dotted ending."""
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
