"""PEFT's kinds of adapters: the settings that are known of each, and the tensors of each variant in its file.

A sum of low-rank updates is read as plain LoRA, whatever its kind: VeRA and AdaLoRA, and PiSSA in PEFT's own form.
"""
from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from machine.errors import UserError
from model import LoRALinear, weight_of
from variants.adalora import AdaLoRALinear
from variants.dora import DoRALinear
from variants.ia3 import IA3Linear
from variants.pissa import principal
from variants.vera import KEY, START_D, VeRALinear, shared_matrices

PREFIX = "base_model.model."  # PEFT's name for the wrapped model

# Every field of PEFT's LoraConfig stands in one of these three; docs/architectures.md has a line for each.
READ = frozenset({
    "peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias",
    "rank_pattern", "alpha_pattern", "modules_to_save", "init_lora_weights", "use_dora"})
# Variants of another formula, or with tensors of their own; an adapter that uses one is refused, not misread.
UNSUPPORTED = (
    "lora_bias", "use_qalora", "trainable_token_indices", "layer_replication", "alora_invocation_tokens",
    "use_bdlora", "arrow_config", "kasa_config", "target_parameters", "velora_config", "monteclora_config",
    "megatron_config")
# Settings of training, and the choice of layers: the file's own tensors show which layers are adapted.
IGNORED = frozenset({
    "auto_mapping", "peft_version", "inference_mode", "target_modules", "exclude_modules", "fan_in_fan_out",
    "layers_to_transform", "layers_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "runtime_config", "ensure_weight_tying"})
# Settings of every kind, and those of each kind alone.
COMMON = frozenset({
    "peft_type", "task_type", "base_model_name_or_path", "revision", "modules_to_save", "bias", "auto_mapping",
    "peft_version", "inference_mode", "target_modules", "exclude_modules", "fan_in_fan_out", "layers_to_transform",
    "layers_pattern"})
KINDS = {
    "LORA": READ | IGNORED,
    "ADALORA": READ | IGNORED | {"init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
                                 "total_step"},
    "VERA": COMMON | {"r", "vera_dropout", "projection_prng_key", "save_projection", "d_initial", "init_weights"},
    "IA3": COMMON | {"feedforward_modules", "init_ia3_weights"}}
# Initialisations that change the frozen weights too, so that A and B alone are not the whole of the update. Of PiSSA's the
# exact one can be repeated; the one by random projections cannot.
CHANGES_BASE = ("pissa_niter", "olora", "corda", "lora_ga", "loftq")
RANKNUM = 1e-5  # PEFT scales AdaLoRA by alpha / (first rank + this)


def check_kind(config: dict, file: Path) -> None:
    """Checks that an adapter's configuration describes an adapter as it is computed here.

    Raises:
        UserError: another kind, a variant of LoRA, or a setting that is not known.
    """
    kind = config.get("peft_type")
    # A damaged file may hold a list here, and a dictionary takes no list for a key.
    settings = KINDS.get(kind, KINDS["LORA"]) if isinstance(kind, str) else KINDS["LORA"]
    used = [key for key in UNSUPPORTED if config.get(key)]
    # A newer PEFT may have settings that change the formula.
    used += [f"{key}, which is not known here" for key, value in config.items()
             if value and key not in settings and key not in UNSUPPORTED]
    if str(config.get("init_lora_weights")).lower().startswith(CHANGES_BASE):
        used.append(f"init_lora_weights {config['init_lora_weights']}, which changes the base too")
    if (bias := config.get("bias") or "none") != "none":
        used.append(f"bias {bias}: biases of the base were trained too")
    if not isinstance(kind, str) or kind not in KINDS or used:
        raise UserError(f"{file}: not an adapter that is computed here ({', '.join(used) or kind or 'no peft_type'}); "
                        f"expected peft_type {', '.join(KINDS)}")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and name for name in saved):
        raise UserError(f"{file}: modules_to_save is not a list of names")


# ---------------------------------------------------------------- writing

def settings_and_tensors(layers: dict[str, LoRALinear], heads: list[str]) -> tuple[str, dict, dict[str, Tensor]]:
    """Returns PEFT's kind, settings and tensors of adapted layers, all of one variant.

    Args:
        layers: by name.
        heads: the modules of the task head, by name.
    """
    first = next(iter(layers.values()))
    kind, write = {VeRALinear: ("VERA", _of_vera), IA3Linear: ("IA3", _of_ia3)}.get(type(first), ("LORA", _of_lora))
    settings, state = write(layers, heads)
    return kind, {**settings, "fan_in_fan_out": isinstance(first.base, Conv1D)}, state


def _of_lora(layers: dict[str, LoRALinear], heads: list[str]) -> tuple[dict, dict[str, Tensor]]:
    """Returns settings and tensors of a sum of low-rank updates, DoRA's magnitudes with them.

    A layer adapted in slices is written as the one block matrix of the summed rank, which is the same function: alpha grows
    with the rank so that the scaling stays. So is PiSSA's update, of twice the rank.
    """
    first = next(iter(layers.values()))
    # PEFT reads a rank and an alpha that differ from the first layer's from the two patterns.
    state, ranks, alphas, names = {}, {}, {}, []
    for name, (A, B) in _kept_factors(layers).items():
        layer = layers[name]
        times = len(A) / layer.rank
        alpha = layer.alpha * (math.sqrt(times) if layer.rslora else times)
        state |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        if isinstance(layer, DoRALinear):
            state[f"{name}.lora_magnitude_vector"] = layer.magnitude(layer.norm_of_sum())
        names.append(name)
        if len(A) != first.rank:
            ranks[name] = len(A)
        if alpha != first.alpha:
            alphas[name] = alpha
    dora = {"use_dora": True} if isinstance(first, DoRALinear) else {}
    return {"r": first.rank, "lora_alpha": first.alpha, "lora_dropout": first.dropout.p, "use_rslora": first.rslora, **dora,
            "rank_pattern": ranks, "alpha_pattern": alphas, "target_modules": sorted(names),
            "modules_to_save": heads, "bias": "none", "init_lora_weights": True}, state


def _kept_factors(layers: dict[str, LoRALinear]) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns A and B of each layer, without the components that AdaLoRA dropped, and without layers that have none."""
    found = {name: layer.factors() for name, layer in layers.items()}
    kept = {name: layer.lora_E[:, 0] != 0 for name, layer in layers.items() if isinstance(layer, AdaLoRALinear)}
    # Before the first step all of them are zero.
    if any(bool(keep.any()) for keep in kept.values()):
        found = {name: (A[kept[name]], B[:, kept[name]]) for name, (A, B) in found.items() if bool(kept[name].any())}
    return found


def _of_vera(layers: dict[str, VeRALinear], heads: list[str]) -> tuple[dict, dict[str, Tensor]]:
    """Returns settings and tensors of VeRA, its shared matrices among them."""
    first, state = next(iter(layers.values())), {}
    for name, layer in layers.items():
        state |= {f"{name}.vera_lambda_d": layer.vera_lambda_d, f"{name}.vera_lambda_b": layer.lambda_b()}
    # Every layer has a part of them; the largest parts are the whole.
    state["base_model.vera_A"] = max((layer.shared_A for layer in layers.values()), key=lambda A: A.shape[1])
    state["base_model.vera_B"] = max((layer.shared_B for layer in layers.values()), key=len)
    return {"r": first.rank, "vera_dropout": first.dropout.p, "projection_prng_key": KEY, "save_projection": True,
            "d_initial": START_D, "target_modules": sorted(layers), "modules_to_save": heads, "bias": "none"}, state


def _of_ia3(layers: dict[str, IA3Linear], heads: list[str]) -> tuple[dict, dict[str, Tensor]]:
    """Returns settings and tensors of IA3: vectors of inputs as rows, of outputs as columns."""
    state = {f"{name}.ia3_l": layer.scales()[None] if layer.inputs else layer.scales()[:, None]
             for name, layer in layers.items()}
    return {"target_modules": sorted(layers), "modules_to_save": heads, "feedforward_modules": sorted(
        name for name, layer in layers.items() if layer.inputs)}, state


# ---------------------------------------------------------------- reading

def as_plain(config: dict, state: dict[str, Tensor], modules: dict[str, nn.Module], file: Path
             ) -> tuple[dict, dict[str, Tensor]]:
    """Returns settings and tensors of VeRA or AdaLoRA in the form of plain LoRA; those of other kinds as they are.

    Args:
        state: the file's tensors by name.
        modules: of the model, by name.
        file: of the tensors, for errors.

    Raises:
        UserError: tensors are missing or do not fit each other.
    """
    convert = {"VERA": _plain_vera, "ADALORA": _plain_adalora}.get(config["peft_type"])
    try:
        return convert(config, dict(state), modules) if convert else (config, state)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
        raise UserError(f"{file}: not a whole adapter of the kind {config['peft_type']} for this model ({error})") from None


def _plain_vera(config: dict, state: dict[str, Tensor], modules: dict[str, nn.Module]) -> tuple[dict, dict[str, Tensor]]:
    rank, ending = config["r"], ".vera_lambda_d"
    names = [key.removesuffix(ending) for key in state if key.endswith(ending)]
    inside = {name: modules[name.removeprefix(PREFIX)] for name in names}
    shapes = {name: weight_of(getattr(module, "base", module)).shape for name, module in inside.items()}  # (out, in)
    # Without the shared matrices in the file, they follow from the seed and the largest layer.
    A, B = state.pop("base_model.vera_A", None), state.pop("base_model.vera_B", None)
    if A is None or B is None:
        A, B = shared_matrices(rank, max(width for _, width in shapes.values()), max(rows for rows, _ in shapes.values()),
                               config.get("projection_prng_key") or 0)
    if len(A) != rank or B.shape[1] != rank:
        raise ValueError(f"its shared matrices have the ranks {len(A)} and {B.shape[1]}, and r is {rank}")
    for name, (rows, width) in shapes.items():
        d, b = state.pop(f"{name}.vera_lambda_d"), state.pop(f"{name}.vera_lambda_b")
        if d.shape != (rank,) or b.shape != (rows,) or A.shape[1] < width or len(B) < rows:
            raise ValueError(f"{name} has another shape or rank")
        state |= {f"{name}.lora_A.weight": d[:, None] * A[:, :width], f"{name}.lora_B.weight": b[:, None] * B[:rows]}
    kept = {key: value for key, value in config.items() if key in READ}
    return {**kept, "lora_alpha": rank, "lora_dropout": config.get("vera_dropout"), "peft_type": "LORA"}, state


def _plain_adalora(config: dict, state: dict[str, Tensor], modules: dict[str, nn.Module]
                   ) -> tuple[dict, dict[str, Tensor]]:
    first, ranks, alphas = config["init_r"], {}, {}
    scaling = (config["lora_alpha"] if config["lora_alpha"] > 0 else first) / (first + RANKNUM)
    for key in [key for key in state if key.endswith(".lora_E")]:
        name = key.removesuffix(".lora_E")
        E, A, B = state.pop(key), state.pop(f"{name}.lora_A"), state.pop(f"{name}.lora_B")
        # A layer that lost all of its components has none in the file.
        if len(E):
            state |= {f"{name}.lora_A.weight": A * E, f"{name}.lora_B.weight": B}
            module = name.removeprefix(PREFIX)
            ranks[module], alphas[module] = len(E), scaling * len(E)
    return {**config, "r": first, "rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": False,
            "peft_type": "LORA"}, state


def minus_start(A: Tensor, B: Tensor, base: nn.Module, scaling: float) -> tuple[Tensor, Tensor]:
    """Returns A and B of twice the rank: an update in PiSSA's own form, minus the principal part that it began as."""
    with torch.no_grad():
        start_A, start_B = principal(weight_of(getattr(base, "base", base)), len(A), scaling)
    return torch.cat([A, start_A.to(A)]), torch.cat([B, -start_B.to(B)], 1)
