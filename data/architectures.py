"""Facts about the architectures of `transformers`: the roles of their projections, and their oddities.

    from data.architectures import find_targets
    find_targets(net.base_model, ("q", "v"))        # {"attn.c_attn": {"q", "v"}} for GPT-2
"""
from __future__ import annotations

import fnmatch
import itertools
import re
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN
from transformers.pytorch_utils import Conv1D

from data.backbones import blocks_of
from machine import hardware
from machine.errors import UserError
from options.schema import ROLES

# Which module of a block plays which role. GPT-2 and ModernBERT compute q, k and v in one fused projection.
ROLE_MODULES = {
    "gpt2": {"q": ["attn.c_attn"], "k": ["attn.c_attn"], "v": ["attn.c_attn"], "o": ["attn.c_proj"],
             "mlp": ["mlp.c_fc", "mlp.c_proj"]},
    "llama": {"q": ["self_attn.q_proj"], "k": ["self_attn.k_proj"], "v": ["self_attn.v_proj"],
              "o": ["self_attn.o_proj"], "mlp": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]},
    "bert": {"q": ["attention.self.query"], "k": ["attention.self.key"], "v": ["attention.self.value"],
             "o": ["attention.output.dense"], "mlp": ["intermediate.dense", "output.dense"]},
    "distilbert": {"q": ["attention.q_lin"], "k": ["attention.k_lin"], "v": ["attention.v_lin"],
                   "o": ["attention.out_lin"], "mlp": ["ffn.lin1", "ffn.lin2"]},
    "mpnet": {"q": ["attention.attn.q"], "k": ["attention.attn.k"], "v": ["attention.attn.v"],
              "o": ["attention.attn.o"], "mlp": ["intermediate.dense", "output.dense"]},
    "deberta-v2": {"q": ["attention.self.query_proj"], "k": ["attention.self.key_proj"], "v": ["attention.self.value_proj"],
                   "o": ["attention.output.dense"], "mlp": ["intermediate.dense", "output.dense"]},
    "modernbert": {"q": ["attn.Wqkv"], "k": ["attn.Wqkv"], "v": ["attn.Wqkv"], "o": ["attn.Wo"],
                   "mlp": ["mlp.Wi", "mlp.Wo"]},
}
FUSED_QKV = ("attn.c_attn", "attn.Wqkv")  # q, k and v side by side


def parse_layers(text: str | None, blocks: int) -> list[int]:
    """Returns the block numbers of "0-11", "0,2,4-5" or None (all).

    Raises:
        UserError: malformed, or beyond the model's blocks.
    """
    if text is None:
        return list(range(blocks))
    chosen = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last >= blocks:
            raise UserError(f"--layers {text}: expected block numbers 0 to {blocks - 1}, such as 0-{blocks - 1}")
        chosen.update(range(first, last + 1))
    return sorted(chosen)


def find_targets(backbone: nn.Module, targets: tuple[str, ...], rank: int = 1) -> dict[str, set[str] | None]:
    """Finds the linear modules inside the blocks that the targets name; not every block has all of them (experts, say).

    Args:
        rank: of the updates. Where the roles are not known and every linear layer is adapted, those too narrow for it are
            left out (a router of experts, say).

    Returns:
        name inside a block -> the roles that chose it, or None where a pattern chose it whole.

    Raises:
        UserError: a target that matches nothing; the modules that exist are named.
    """
    kind = backbone.config.model_type
    # Blocks may differ: each has some of these layers.
    linears = {}
    for block in blocks_of(backbone).values():
        linears.update((name, module) for name, module in block.named_modules() if isinstance(module, (nn.Linear, Conv1D)))
    if not linears:
        raise UserError(f"--method lora: the blocks of a {kind} model have no linear layer that can be adapted; expected "
                        "--method head, full or none")
    # Qwen2, Mistral and many others name their layers as Llama does.
    table, known = None, set()
    for roles in ROLE_MODULES.values():
        named = set(itertools.chain.from_iterable(roles.values()))
        if table is None and named <= set(linears):
            table, known = roles, named
    # All roles ask for all of a block: layers that no role covers would stay frozen.
    if set(targets) >= set(ROLES) and known != set(linears):
        wide = [name for name, module in linears.items() if min(module.weight.shape) >= rank] or list(linears)
        warnings.warn(f"the roles of a {kind} model are not known here; every linear layer of its blocks is adapted: "
                      f"{', '.join(wide)}", stacklevel=2)
        return dict.fromkeys(wide)
    found: dict[str, set[str] | None] = {}
    for target in targets:
        if target in ROLES and table is None:
            raise UserError(f"--targets {target}: the roles of a {kind} model are not known here; name its modules "
                            f"instead: {', '.join(linears)}")
        # A fused layer may play several roles.
        if target in ROLES:
            for name in table[target]:
                roles = found.setdefault(name, set())
                if roles is not None:
                    roles.add(target)
            continue
        names = [n for n in linears if n == target or n.endswith("." + target) or fnmatch.fnmatchcase(n, target)]
        if not names:
            raise UserError(f"--targets {target}: matches no linear layer; expected any of {', '.join(ROLES)}, or a "
                            f"pattern for {', '.join(linears)}")
        found.update(dict.fromkeys(names))
    return found


def misread_by_peft(model_type: str, names: list[str]) -> list[str]:
    """Returns the adapted modules that PEFT takes for the experts of a mixture.

    Since `transformers` 5 the experts are fused into one tensor. PEFT goes by the modules' names: dense layers and shared
    experts of the same name are loaded as if they were the experts.
    """
    # Model types share a conversion with one of these two kinds of mixtures.
    fused = {"qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"), "mixtral": ("gate", "w1", "w2", "w3")}
    experts = fused.get({"mixtral": "mixtral", **_MODEL_TO_CONVERSION_PATTERN}.get(model_type), ())
    return [name for name in names if name.rpartition(".")[2] in experts]


def warn_of_misread(model_type: str, names: list[str]) -> None:
    """Warns of adapted modules that `misread_by_peft` finds."""
    if misread := misread_by_peft(model_type, names):
        warnings.warn(f"PEFT takes {misread[0]} of a {model_type} model for its experts and will not load this "
                      "adapter as it is; one with --targets of its attention alone it loads", stacklevel=2)


# ---------------------------------------------------------------- computation that depends on the batch

# Lengths of two sentences in tokens. Odd and even ones: Funnel halves a batch's columns. The long one is cut to the model's
# positions; windows and sparse attention begin to matter there.
LENGTHS = ((6, 10), (5, 11), (7, 12), (9, 160))


def depends_on_batch(name: str, config, compute: Callable[[Tensor, Tensor], Tensor], positions: int = 512) -> bool:
    """Returns whether a sentence's result depends on the lengths of the other sentences of its batch.

    The results of some architectures do: XLNet's head reads the last column, pad or not; FNet mixes all columns; others sum
    over windows or hash. Without a pad all are right. The answer comes from the configuration, where it tells of a length
    at which the computation changes, and from pairs of sentences, computed alone and together.

    Args:
        name: of the model, for errors.
        config: the model's configuration; gets a pad token where the library refuses batches without one.
        compute: (token ids (B, T), attention mask (B, T)) -> (B, n), in evaluation mode.
        positions: the longest sentence, in tokens.

    Raises:
        UserError: the model cannot compute a result of token ids alone, uses random numbers for it (Reformer's hashes), or
            the result depends on other sentences of the same length too.
    """
    if hasattr(config, "hash_seed"):
        raise UserError(f"--model {name}: a {config.model_type} classifier draws random numbers in evaluation too; the same "
                        "sentence would have other logits each time")
    # Without an id the library refuses batches of several sentences (CTRL). A decoder with known roles is pooled here.
    if getattr(config, "pad_token_id", None) is None and config.model_type not in ROLE_MODULES:
        config.pad_token_id = -1
    # A length at which the computation changes may be thousands of tokens: it is read, not computed.
    if changes_with_length(config, positions):
        return True
    # The architectures with known roles have no windows: short sentences tell all of their lengths.
    usual = config.model_type in ROLE_MODULES and not getattr(config, "is_decoder", False)
    for short, long in LENGTHS[:2] if usual else LENGTHS:
        if _differs(name, config, compute, short, min(long, positions)):
            return True
    if not usual and _differs(name, config, compute, 6, 6):
        raise UserError(f"--model {name}: the logits of a {config.model_type} classifier depend on the other sentences of a "
                        "batch, of the same length too; the same sentence would have other logits each time")
    return False


def changes_with_length(config, positions: int) -> bool:
    """Returns whether rotary positions have other frequencies in a batch with a long sentence.

    The library chooses them by the longest sentence of a batch: LongRoPE (Ding et al. 2024) from the original number of
    positions on, dynamic NTK beyond all positions of the configuration.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    # One set of parameters, or one for each type of layer.
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    for parameters in kinds:
        kind = str(parameters.get("rope_type"))
        known = parameters.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
        # Dynamic frequencies even depend on earlier batches; sentences are never longer than the positions.
        if "dynamic" in kind:
            known = getattr(text, "max_position_embeddings", None)
        if ("dynamic" in kind or kind == "longrope") and positions > (known or 0):
            return True
    return False


@torch.inference_mode()
def _differs(name: str, config, compute: Callable[[Tensor, Tensor], Tensor], short: int, long: int) -> bool:
    """Returns whether a sentence of `short` tokens has another result next to one of `long` tokens than alone.

    Raises:
        UserError: the model does not take token ids alone.
    """
    text = config.get_text_config()
    special = {getattr(text, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos", "sep", "cls", "decoder_start")}
    # BART and T5 pool at the end token.
    end = text.eos_token_id if isinstance(getattr(text, "eos_token_id", None), int) else 2
    words = [token for token in range(3, 20) if token not in special][:9]
    pad = max(getattr(config, "pad_token_id", None) or 0, 0)
    words *= 1 + long // len(words)
    # Two sentences of one length differ in their words.
    other = words[short == long:][:long - 1]
    ids = torch.tensor([[*words[:short - 1], end, *[pad] * (long - short)], [*other, end]])
    mask = torch.tensor([[1] * short + [0] * (long - short), [1] * long])
    try:
        alone, together = compute(ids[:1, :short], mask[:1, :short]), compute(ids, mask)[:1]
    except Exception as error:
        if hardware.exhausted(error):
            raise
        what = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"--model {name}: a {config.model_type} classifier does not take token ids alone ({what})") from None
    # Up to rounding: kernels sum in another order for other shapes.
    return not torch.allclose(together, alone, rtol=0, atol=1e-4 * float(alone.abs().max()))


def compute_by_length(compute: Callable[[Tensor, Tensor], Tensor], input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Computes a result (B, n) of token ids (B, T) without a pad: the sentences of each length together.

    Some heads and blocks read pads too, whatever the mask says; see `depends_on_batch`.
    """
    lengths, parts = attention_mask.sum(1), []
    # Ascending, as the stable order below expects.
    for length in lengths.unique():
        ids = input_ids[lengths == length, :length]
        parts.append(compute(ids, torch.ones_like(ids, device="cpu")))
    return torch.cat(parts)[lengths.argsort(stable=True).argsort()]
