"""Reads and writes adapters in PEFT's layout: an adapter saved here loads in PEFT, and vice versa.

A folder holds `adapter_config.json` and `adapter_model.safetensors`: A and B of every adapted layer and
the classification head, nothing of the frozen model. Every tensor of a file is loaded, or refused by its name.
"""
from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapters.peft_kinds import PREFIX, as_plain, check_kind, minus_start, settings_and_tensors
from data.backbones import freeze_backbone, fresh_modules
from data.module_patterns import fits
from machine.errors import UserError
from model import LoRALinear, TextClassifier, lora_layers
from record.files import read_json, write_file, write_json
from record.tensors import load_tensors
from variants.dora import DoRALinear
from variants.ia3 import IA3Linear

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
METHODS = ("lora", "ia3")  # values of --method with an adapter in PEFT's layout

def save_adapter(classifier: TextClassifier, folder: Path, base: str) -> None:
    """Writes adapter and head, in the layout of the variant's own kind (peft_kinds.py).

    Args:
        classifier: with at least one `LoRALinear`.
        folder: existing folder.
        base: name or path of the base model, for whoever loads the adapter.
    """
    kind, settings, tensors = settings_and_tensors(lora_layers(classifier.net), classifier.head_names())
    state = {key if key.startswith("base_model.") else PREFIX + key: value for key, value in tensors.items()}
    for name in _saved_whole(classifier):
        for key, value in classifier.net.get_submodule(name).state_dict().items():
            state[f"{PREFIX}{name}.{key}"] = value
    write_json(folder / CONFIG_FILE, {
        "peft_type": kind, "task_type": "SEQ_CLS", "base_model_name_or_path": base, "inference_mode": True,
        **settings})
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    write_file(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))


def _saved_whole(classifier: TextClassifier) -> list[str]:
    """Returns the modules that PEFT takes for the head, by name.

    PEFT compares the end of a module's name with the head's; ModernVBERT's vision model has such a module too. Modules with
    adapted layers inside are left out.
    """
    heads, adapted = classifier.head_names(), lora_layers(classifier.net)
    found = []
    for name, _ in classifier.net.named_modules():
        named_alike = _is_one_of(name, heads) and not any(other.startswith(name) for other in adapted)
        if name in heads or named_alike:
            found.append(name)
    return found


def _is_one_of(name: str, modules: Iterable[str]) -> bool:
    """Returns whether a module is one of those that PEFT finds by these names: by the whole name or its dotted ending."""
    return any(name == module or name.endswith(f".{module}") for module in modules)


def base_of(folder: Path) -> str:
    """Returns name or path of an adapter's base model.

    Raises:
        UserError: no adapter there, or one that does not name its base, or one revision of it.
    """
    file = Path(folder) / CONFIG_FILE
    config = read_json(file)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        raise UserError(f"{file}: names no base_model_name_or_path; give --model")
    # The newest version of the base may have other weights.
    if revision not in (None, "main"):
        raise UserError(f"{file}: was made for the revision {revision} of {base}; give --model with a folder of that "
                        "revision")
    return base


# ---------------------------------------------------------------- reading

@dataclass(frozen=True)
class Adapter:
    """The tensors of an adapter's file, and the settings that they need."""

    pairs: dict[str, tuple[Tensor, Tensor]]  # by the adapted module's name: A (rank, in) and B (out, rank)
    alphas: dict[str, float]
    dropout: float
    rslora: bool
    whole: dict[str, Tensor]  # other tensors by name: the head, and modules of the backbone that were trained as a whole
    saved: tuple[str, ...] = ()  # the modules of `whole`, by their names or the endings of them
    classifies: bool = True  # whether it was made for a classifier of texts
    magnitudes: dict[str, Tensor] = field(default_factory=dict)  # DoRA's, (out,) by the module's name
    scales: dict[str, Tensor] = field(default_factory=dict)  # IA3's: (1, in) of inputs, (out, 1) of outputs

    @property
    def other_formula(self) -> str:
        """Returns the name of a variant that is no sum of low-rank updates; empty for such a sum."""
        return "DoRA" if self.magnitudes else "IA3" if self.scales else ""

    def scaling(self, name: str) -> float:
        """Returns the scaling of a module's update."""
        rank = len(self.pairs[name][0])
        return self.alphas[name] / (math.sqrt(rank) if self.rslora else rank)


def read_adapter(net: nn.Module, folder: Path) -> Adapter:
    """Reads an adapter for a model, and leaves the model as it is.

    Raises:
        UserError: missing or damaged files, an unsupported kind of adapter, or one for another base.
    """
    config = read_json(folder / CONFIG_FILE)
    check_kind(config, folder / CONFIG_FILE)
    # PEFT's older files. Reading one could run any code.
    if not (folder / WEIGHTS_FILE).exists() and (folder / PICKLED_FILE).exists():
        raise UserError(f"{folder / WEIGHTS_FILE}: missing; {PICKLED_FILE} beside it is a pickle, which is never read: save "
                        "the adapter again with PEFT's save_pretrained, which writes safetensors")
    modules, file = dict(net.named_modules()), folder / WEIGHTS_FILE
    config, state = as_plain(config, load_tensors(file), modules, file)
    matrices, whole = _sorted_by_kind(state, file, bool(config.get("use_dora")))
    if config["peft_type"] == "IA3":
        return Adapter({}, {}, 0.0, False, whole, tuple(config.get("modules_to_save") or ()),
                       config.get("task_type") in ("SEQ_CLS", None), scales=_vectors(whole, modules, folder))
    if not matrices:
        raise UserError(f"{file}: no LoRA weights in it")
    pairs, alphas, magnitudes, rslora = {}, {}, {}, bool(config.get("use_rslora"))
    try:
        dropout = nn.Dropout(float(config.get("lora_dropout") or 0.0)).p
        for name in matrices:
            alphas[name] = float(_pattern(config, "alpha_pattern", name, config["lora_alpha"]))
            # The scaling depends on the rank: a file of another one would be scaled wrongly.
            pairs[name] = _pair(name, matrices[name], modules, int(_pattern(config, "rank_pattern", name, config["r"])))
            if config.get("use_dora"):
                magnitudes[name] = _magnitude(name, matrices[name], pairs[name])
            if config.get("init_lora_weights") == "pissa":
                rank = len(pairs[name][0])
                scaling = alphas[name] / (math.sqrt(rank) if rslora else rank)
                pairs[name] = minus_start(*pairs[name], modules[name], scaling)
                # The scaling stays, at twice the rank.
                alphas[name] *= math.sqrt(2) if rslora else 2
    except _Misfit as misfit:
        raise UserError(f"{folder}: {misfit}; it was made for {config.get('base_model_name_or_path')}") from None
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, re.error):
        raise UserError(f"{folder / CONFIG_FILE}: r, lora_alpha, rank_pattern, alpha_pattern or lora_dropout is missing or "
                        "not as expected") from None
    # PEFT saves the base's weight next to an adapted output layer; it must be the weight that is there.
    for key in [key for key in whole if ".base_layer." in key]:
        own, value = net.state_dict().get(key.replace(".base_layer.", ".")), whole.pop(key)
        if own is None or own.shape != value.shape or not torch.equal(own, value.to(own)):
            raise UserError(f"{folder / WEIGHTS_FILE}: adapter for another base: {key} is not the weight of this model")
    return Adapter(pairs, alphas, dropout, rslora, whole, tuple(config.get("modules_to_save") or ()),
                   config.get("task_type") in ("SEQ_CLS", None), magnitudes)


def _sorted_by_kind(state: dict[str, Tensor], file: Path, dora: bool = False
                    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Sorts the tensors of an adapter's file.

    Args:
        dora: whether its settings say that there are magnitudes.

    Returns:
        A and B by module and letter, and the other tensors by name.

    Raises:
        UserError: a tensor of another variant of LoRA, or a name that is not as PEFT writes it.
    """
    matrices, whole = {}, {}
    for key, value in state.items():
        name = key.removeprefix(PREFIX)
        if name == key:
            raise UserError(f"{file}: {key} does not begin with {PREFIX}, as the names in PEFT's files do")
        module, _, part = name.partition(".lora_")
        if part in ("A.weight", "B.weight"):
            matrices.setdefault(module, {})[part[0]] = value
        elif dora and part == "magnitude_vector":
            matrices.setdefault(module, {})[part] = value
        elif part.startswith("embedding_"):
            raise UserError(f"{file}: {name} is LoRA on an embedding; expected LoRA on linear layers alone")
        elif re.fullmatch(r"[AB]\..+\.weight", part):
            raise UserError(f"{file}: {name} names the adapter ({part[2:-7]}); expected {module}.lora_{part[0]}.weight, as "
                            "PEFT's save_pretrained writes it")
        elif part:
            raise UserError(f"{file}: {name} belongs to a variant of LoRA that is not computed here; expected lora_A.weight "
                            "and lora_B.weight alone")
        else:
            whole[name] = value
    return matrices, whole


class _Misfit(Exception):
    """An update that does not fit its module."""


def _magnitude(name: str, tensors: dict[str, Tensor], pair: tuple[Tensor, Tensor]) -> Tensor:
    """Returns DoRA's magnitudes (out,) of a module; raises `_Misfit`."""
    if "magnitude_vector" not in tensors:
        raise _Misfit(f"{name}.lora_magnitude_vector is missing")
    # Older files of PEFT's have it as a column.
    magnitude = tensors["magnitude_vector"].flatten()
    if len(magnitude) != len(pair[1]):
        raise _Misfit(f"{name}.lora_magnitude_vector has {len(magnitude)} values; expected {len(pair[1])}")
    return magnitude


def _vectors(whole: dict[str, Tensor], modules: dict[str, nn.Module], folder: Path) -> dict[str, Tensor]:
    """Takes IA3's vectors out of the other tensors of a file; raises `UserError` for one that does not fit."""
    found = {key.removesuffix(".ia3_l"): whole.pop(key) for key in list(whole) if key.endswith(".ia3_l")}
    for name, vector in found.items():
        shape = shape_of(modules.get(name))
        if shape is None or vector.shape not in ((1, shape[0]), (shape[1], 1)):
            raise UserError(f"{folder}: adapter for another base: {name} does not exist or has another shape in this model")
    if not found:
        raise UserError(f"{folder / WEIGHTS_FILE}: no IA3 vectors in it")
    return found


def _pair(name: str, matrices: dict[str, Tensor], modules: dict[str, nn.Module], rank: int) -> tuple[Tensor, Tensor]:
    """Returns A (rank, in_features) and B (out_features, rank) of a module.

    Args:
        modules: the model's modules by name.
        rank: according to the configuration.

    Raises:
        _Misfit: no such linear layer, one of the two is missing, or another shape; says so.
    """
    if name not in modules:
        # Trained on the backbone without its head, or the other way round: one prefix more or less.
        alike = next((own for own in modules if own.endswith(f".{name}") or own and name.endswith(f".{own}")), None)
        hint = f" (it has {alike})" if alike and shape_of(modules[alike]) else ""
        raise _Misfit(f"adapter for another base: {name} does not exist in this model{hint}")
    expected = shape_of(modules[name])
    if expected is None:
        raise _Misfit(f"{name} is no linear layer but {type(modules[name]).__name__} in this model")
    lacking = [f"lora_{letter}" for letter in "AB" if letter not in matrices]
    if lacking:
        raise _Misfit(f"{name}.{lacking[0]}.weight is missing")
    A, B = matrices["A"], matrices["B"]
    own = B.shape[1] if B.ndim == 2 else 0
    if own < 1 or A.shape != (own, expected[0]) or B.shape != (expected[1], own):
        raise _Misfit(f"adapter for another base: {name} has another shape in this model")
    if own != rank:
        raise _Misfit(f"{name} has rank {own}, and {CONFIG_FILE} says {rank} (r, rank_pattern)")
    return A, B


# ---------------------------------------------------------------- loading

def _fitting(net: PreTrainedModel, adapter: Adapter, folder: Path, head: bool) -> dict[str, Tensor]:
    """Returns the tensors of an adapter, other than A and B, that belong into a model.

    Args:
        head: whether the model is a classifier; else the tensors of a classifier's head are left out.

    Raises:
        UserError: a tensor that has no place in the model, or of a module that `modules_to_save` does not name.
    """
    own, file, children = net.state_dict(), folder / WEIGHTS_FILE, dict(net.named_children())
    embeddings, whole = (net.get_input_embeddings(), net.get_output_embeddings()), {}
    for key, value in adapter.whole.items():
        module = key.rpartition(".")[0]
        # PEFT goes by the end of a module's name, dot or not.
        saved = any(part.endswith(adapter.saved) for part in _parents(key))
        # A language model has no place for a classifier's head, and needs none.
        if not head and saved and adapter.classifies and key.partition(".")[0] not in children:
            continue
        if key not in own or own[key].shape != value.shape:
            raise UserError(f"{file}: {key} does not exist or has another shape in this model")
        # Embeddings may stand in a file without being trained: PEFT's save_embedding_layers.
        if not saved and net.get_submodule(module) not in embeddings:
            raise UserError(f"{file}: {key} is no LoRA matrix, and modules_to_save does not name {module}")
        whole[key] = value
    # PEFT would leave a module without its tensors as it is in the base.
    for wanted in adapter.saved:
        keys = {name: _keys_of(name, module) for name, module in net.named_modules() if _is_one_of(name, [wanted])}
        found = [inside for inside in keys.values() if inside and not whole.keys().isdisjoint(inside)]
        lacking = [key for inside in found or keys.values() for key in inside if key not in whole]
        if lacking:
            raise UserError(f"{file}: {lacking[0]} is missing, and modules_to_save names {wanted}")
    return whole


def _parents(key: str) -> list[str]:
    """Returns the modules that hold a tensor: a.b.weight -> a.b, a."""
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def _keys_of(name: str, module: nn.Module) -> list[str]:
    """Returns the full names of a module's tensors, those of adapters excepted."""
    return [f"{name}.{key}" for key in module.state_dict() if ".lora_" not in f".{key}"]


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
    _check_head(net, adapter, folder, head)
    whole = _fitting(net, adapter, folder, head)
    # Everything fits: from here on the model changes.
    with torch.no_grad():
        for key, value in whole.items():
            _copy_whole(net, key, value, shared=not any(part.endswith(adapter.saved) for part in _parents(key)))
    freeze_backbone(net)
    for name, (A, B) in adapter.pairs.items():
        base = net.get_submodule(name)
        # A merge must not reach the embedding that shares the output layer's weight.
        _own_parameter(net, base, "weight")
        variant = DoRALinear if name in adapter.magnitudes else LoRALinear
        layer = variant(base, A.shape[0], adapter.alphas[name], adapter.dropout, adapter.rslora)
        with torch.no_grad():
            layer.lora_A.copy_(A)
            layer.lora_B.copy_(B)
            if name in adapter.magnitudes:
                layer.lora_magnitude.copy_(adapter.magnitudes[name])
        net.set_submodule(name, layer)
    for name, vector in adapter.scales.items():
        layer = IA3Linear(net.get_submodule(name), inputs=len(vector) == 1)
        with torch.no_grad():
            layer.ia3_l.copy_(vector.flatten())
        net.set_submodule(name, layer)
    return [*adapter.pairs, *adapter.scales]


def _check_head(net: PreTrainedModel, adapter: Adapter, folder: Path, head: bool) -> None:
    """Checks that an adapter brings the whole head of a classifier.

    Raises:
        UserError: a tensor of the head is missing.
    """
    inside = net.base_model_prefix + "."
    # Parts of the backbone that the base's files lack belong to the head.
    fresh = tuple(f"{name}." for name in fresh_modules(net))
    for key in net.state_dict() if head else ():
        if key in adapter.whole or key.startswith(inside) and not key.startswith(fresh):
            continue
        lost = ("; the base lacks it too, and where the adapter was trained it was another: PEFT saves it with "
                "modules_to_save" if key.startswith(fresh) else "")
        raise UserError(f"{folder / WEIGHTS_FILE}: no classification head for this model ({key} is missing{lost})")


def _copy_whole(net: nn.Module, key: str, value: Tensor, shared: bool) -> None:
    """Copies a tensor into a model.

    Args:
        shared: whether it goes into all modules that share it (a language model's embedding and output layer). PEFT trains
            a copy for the one module that `modules_to_save` names, and the other keeps the base's.
    """
    module, _, name = key.rpartition(".")
    module = net.get_submodule(module)
    if not shared:
        _own_parameter(net, module, name)
    getattr(module, name).copy_(value)


def _own_parameter(net: nn.Module, module: nn.Module, name: str) -> None:
    """Gives a module a copy of a parameter that it shares with other modules."""
    parameter = getattr(module, name)
    holders = [key for key, p in net.named_parameters(remove_duplicate=False) if p is parameter]
    if len(holders) > 1:
        setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))


def start_from(classifier: TextClassifier, folder: Path, head: bool) -> None:
    """Copies a saved adapter into the fresh one of a classifier, which trains on from there.

    Args:
        classifier: with `LoRALinear`s of the same rank, scaling, targets and layers as the saved adapter's.
        head: whether to copy the saved head too.

    Raises:
        UserError: see `read_adapter`; or the saved adapter is one of another rank, scaling, target or layer.
    """
    adapter, layers = read_adapter(classifier.net, folder), lora_layers(classifier.net)
    if adapter.other_formula:
        raise UserError(f"--init {folder}: an adapter of {adapter.other_formula}; expected plain LoRA")
    other = sorted(set(layers) ^ set(adapter.pairs))
    if other:
        raise UserError(f"--init {folder}: {other[0]} is adapted {'here' if other[0] in layers else 'there'} alone; "
                        "expected --targets and --layers of that run")
    # Training saves adapter and head alone: other modules would be lost.
    heads = tuple(classifier.head_names())
    for key in adapter.whole:
        if not any(part.endswith(heads) for part in _parents(key)):
            raise UserError(f"--init {folder}: {key} is no LoRA matrix and not of the head; a run trains these alone")
    whole = _fitting(classifier.net, adapter, folder, head=True) if head else {}
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
        for key, value in whole.items():
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
    return next((value for pattern, value in (config.get(key) or {}).items() if fits(pattern, name)), default)


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
