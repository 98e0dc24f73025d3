"""Transformer blocks that compute no more than the classifier reads, and save no more than training needs.

    fuse(net.base_model)                           # whether its architecture is one of FAMILIES
    unique = unique_tokens(input_ids, attention_mask)      # a decoder's (attention.py)
    net.base_model(input_ids=unique.ids, position_ids=unique.positions, unique=unique)      # hidden states (B, 1, C)

`FAMILIES` describes the blocks of each architecture, and `FusedBlock` computes each of them from its description, as a
second forward pass over the same parameters; without the argument `unique` (or `pooled`) a block behaves as the library's.
The result is the same up to rounding:

- The head reads one token of each sentence. The last block computes queries, output projection and MLP for that token
  alone; it needs only keys and values of the other tokens.
- In a decoder, sentences with a shared prefix share its rows (attention.py).
- Frozen layers go through `frozen_linear`: it groups them and recomputes cheap operations in the backward pass.
"""
from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.attention import AllTokens, Heads, UniqueTokens
from fast.encoders import ENCODERS, fused_model
from fast.frozen_linear import frozen_linear
from fast.prologue import (
    ApplyPrologue,
    ExactGELUPrologue,
    GatedPrologue,
    GELUPrologue,
    HeadNormPrologue,
    LayerNormPrologue,
    RMSNormPrologue,
    SwiGLUPrologue,
)

ACTIVATIONS = {"gelu_new": GELUPrologue(), "gelu_pytorch_tanh": GELUPrologue(), "gelu": ExactGELUPrologue()}
# Activations of a gated MLP: that of the gate, times the values.
GATED = {"silu": SwiGLUPrologue(), "gelu": GatedPrologue(F.gelu, torch.ops.aten.gelu_backward),
         "gelu_pytorch_tanh": GatedPrologue(partial(F.gelu, approximate="tanh"),
                                            partial(torch.ops.aten.gelu_backward, approximate="tanh"))}


@dataclass(frozen=True)
class Family:
    """A kind of block, by the names of its parts: attention and MLP, each with a norm and added to its input."""

    causal: bool  # a decoder's
    qkv: tuple[str, ...]  # projections to queries, keys and values; or one for all three
    out: str  # projection of attention's output
    up: tuple[str, ...]  # first layers of the MLP
    down: str  # its last layer
    before: tuple[str, str] | None = None  # norms of the inputs of attention and MLP
    after: tuple[str, str] | None = None  # norms of the two sums
    outputs: tuple[str, str] | None = None  # norms of the outputs of attention and MLP, before they are added
    offset: float = 0.0  # added to the weights of all norms
    head_norms: tuple[str, str] | None = None  # norms of each head of queries and keys
    capped: bool = False  # whether attention's scores have the configuration's cap
    window: bool = False  # whether the configuration's sliding window holds for every block
    gated: bool = False  # whether the MLP is gated: its first layers, or halves of its one, are the gate and the values
    activation: str = "hidden_act"  # the name of the MLP's activation in the configuration

    @property
    def together(self) -> tuple[tuple[str, ...], ...]:
        """Returns the layers that read the same input: see `fast.matmul.set_precision`."""
        return tuple(names for names in (self.qkv, self.up) if len(names) > 1)


GPT2 = Family(True, ("attn.c_attn",), "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj", before=("ln_1", "ln_2"),
              activation="activation_function")
LLAMA = Family(True, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj",
               ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", before=("input_layernorm", "post_attention_layernorm"),
               gated=True)
BERT = Family(False, ("attention.self.query", "attention.self.key", "attention.self.value"), "attention.output.dense",
              ("intermediate.dense",), "output.dense", after=("attention.output.LayerNorm", "output.LayerNorm"))
DISTILBERT = Family(False, ("attention.q_lin", "attention.k_lin", "attention.v_lin"), "attention.out_lin",
                    ("ffn.lin1",), "ffn.lin2", after=("sa_layer_norm", "output_layer_norm"), activation="activation")
MPNET = Family(False, ("attention.attn.q", "attention.attn.k", "attention.attn.v"), "attention.attn.o",
               ("intermediate.dense",), "output.dense", after=("attention.LayerNorm", "output.LayerNorm"))
DEBERTA = replace(BERT, qkv=("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"))
MISTRAL = replace(LLAMA, window=True)
QWEN3 = replace(LLAMA, head_norms=("self_attn.q_norm", "self_attn.k_norm"))
GEMMA2 = replace(LLAMA, before=("input_layernorm", "pre_feedforward_layernorm"), offset=1.0, activation="hidden_activation",
                 outputs=("post_attention_layernorm", "post_feedforward_layernorm"), capped=True)
GEMMA3 = replace(GEMMA2, head_norms=QWEN3.head_norms, capped=False)
MODERNBERT = Family(False, ("attn.Wqkv",), "attn.Wo", ("mlp.Wi",), "mlp.Wo", before=("attn_norm", "mlp_norm"), gated=True,
                    activation="hidden_activation")
# By the folder of the library's model and the class of its block.
FAMILIES = {
    "gpt2.GPT2Block": GPT2, "llama.LlamaDecoderLayer": LLAMA, "mistral.MistralDecoderLayer": MISTRAL,
    "qwen2.Qwen2DecoderLayer": LLAMA, "qwen3.Qwen3DecoderLayer": QWEN3,
    "gemma2.Gemma2DecoderLayer": GEMMA2, "gemma3.Gemma3DecoderLayer": GEMMA3,
    "bert.BertLayer": BERT, "roberta.RobertaLayer": BERT, "xlm_roberta.XLMRobertaLayer": BERT,
    "camembert.CamembertLayer": BERT, "electra.ElectraLayer": BERT,
    "distilbert.TransformerBlock": DISTILBERT, "mpnet.MPNetLayer": MPNET,
    "deberta_v2.DebertaV2Layer": DEBERTA,
    "modernbert.ModernBertEncoderLayer": MODERNBERT,
}


def family_of(block: nn.Module) -> Family | None:
    """Returns the description of a block of the library, fused or not; None: there is none."""
    if isinstance(block, FusedBlock):
        return block.family
    package, _, path = type(block).__module__.partition(".models.")
    return FAMILIES.get(f"{path.partition('.')[0]}.{type(block).__name__}") if package == "transformers" else None


def fuse(backbone: nn.Module) -> bool:
    """Swaps the classes of a backbone's blocks for fused ones.

    Called by `fast.install` alone. The class of an existing module is swapped, and no new module built, so that the
    parameters and their names stay those of the checkpoint.

    Returns:
        Whether this architecture has fused blocks; if not, nothing is changed.
    """
    config = backbone.config
    # A second call finds the fused classes of the first.
    blocks = [module for module in backbone.modules() if family_of(module) is not None]
    # A model with other blocks among these would mix two ways of passing hidden states.
    if not blocks or len(blocks) != getattr(config, "num_hidden_layers", None):
        return False
    family = family_of(blocks[0])
    prologue = (GATED if family.gated else ACTIVATIONS).get(getattr(config, family.activation))
    # Cross-attention, a decoder's blocks that read what follows, and an encoder's that do not are the library's.
    settings = ("add_cross_attention", "use_bidirectional_attention" if family.causal else "is_decoder")
    if prologue is None or any(getattr(config, name, False) for name in settings):
        return False
    encoder = ENCODERS.get(type(backbone).__name__)
    if encoder is not None and not encoder.fits(config):
        return False
    for i, block in enumerate(blocks):
        if not isinstance(block, FusedBlock):
            block.__class__ = fused_class(type(block))
        block.last, block.heads, block.activation = i == len(blocks) - 1, heads_of(block, i, config), prologue
    if encoder is not None:
        backbone.__class__ = fused_model(type(backbone))
    return True


@functools.cache
def fused_class(library: type[nn.Module]) -> type[nn.Module]:
    """Returns the subclass of a block's class that has the fused forward pass too."""
    family = FAMILIES[f"{library.__module__.split('.')[2]}.{library.__name__}"]
    return type(f"Fused{library.__name__}", (FusedDecoderBlock if family.causal else FusedEncoderBlock, library),
                {"family": family, "together": family.together})


def heads_of(block: nn.Module, layer: int, config) -> Heads:
    """Returns the form of a block's attention."""
    # The module that holds the queries' projection holds the sizes too.
    attention = block.get_submodule(block.family.qkv[0].rpartition(".")[0])
    size = getattr(attention, "head_dim", None) or attention.attention_head_size
    queries = config.num_attention_heads
    # DeBERTa's scores are sums of up to three dot products.
    parts = 1 + len(getattr(attention, "pos_att_type", ()))
    # Mistral has one window for all blocks; in other families each block has its own, or none.
    window = config.sliding_window if block.family.window else getattr(attention, "sliding_window", None)
    return Heads(layer, (queries, getattr(config, "num_key_value_heads", None) or queries), size,
                 getattr(attention, "scaling", (size * parts) ** -0.5), window,
                 config.attn_logit_softcapping if block.family.capped else None)


def is_fused(backbone: nn.Module) -> bool:
    """Returns whether `fuse` swapped the classes of a backbone's blocks."""
    return any(isinstance(module, FusedBlock) for module in backbone.modules())


def norm_prologue(block: FusedBlock, name: str) -> LayerNormPrologue | RMSNormPrologue | None:
    """Returns a block's norm as the prologue of the layers that read it; None for one that does nothing."""
    norm = attrgetter(name)(block)
    if isinstance(norm, nn.Identity):
        return None
    return LayerNormPrologue(norm) if isinstance(norm, nn.LayerNorm) else RMSNormPrologue(norm, block.family.offset)


class FusedBlock:
    """The fused forward pass of a block; stands before the library's class among the bases of `fused_class`."""

    family: Family
    # Set by `fuse`. The last block of a model computes the pooled token alone.
    last: bool
    heads: Heads
    activation: object  # a prologue

    def compute(self, x: Tensor, tokens: UniqueTokens | AllTokens, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Computes the block's output: (rows, C) -> the same, or (B, C) where only the pooled tokens are read."""
        family, part = self.family, lambda name: attrgetter(name)(self)
        last = self.last and tokens.last is not None
        # The norms are handed on as prologues: their output exists only within `frozen_linear`.
        norms = [None, None] if family.before is None else [norm_prologue(self, name) for name in family.before]
        # Of the last block's queries the head reads those of the pooled tokens; keys and values it needs of all rows.
        qkv, kv = [part(name) for name in family.qkv], None
        if not last:
            q = frozen_linear(qkv, x, norms[0])
        elif len(qkv) == 1:
            width = self.heads.widths[0]
            q = frozen_linear(qkv, tokens.pooled(x), norms[0], slice(0, width))
            kv = frozen_linear(qkv, x, norms[0], slice(width, None))
        else:
            q = frozen_linear(qkv[:1], tokens.pooled(x), norms[0])
            kv = frozen_linear(qkv[1:], x, norms[0])
        if family.head_norms is not None:
            q, kv = self.normalise_heads(q, kv)
        y = frozen_linear([part(family.out)], tokens.attention(self.heads, q, kv, rotary))
        # In place: `frozen_linear` does not save its own output, so that autograd does not need y.
        x = self.add(0, y, tokens.pooled(x) if last else x)
        y = frozen_linear([part(name) for name in family.up], x, norms[1])
        return self.add(1, frozen_linear([part(family.down)], y, self.activation), x)

    def normalise_heads(self, q: Tensor, kv: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Normalises each head of queries and keys; see `causal_attention` for both arguments."""
        norms, widths = [norm_prologue(self, name) for name in self.family.head_norms], self.heads.widths
        if kv is None:
            return ApplyPrologue.apply(q, HeadNormPrologue(norms, widths)), None
        q, kv = (ApplyPrologue.apply(x, HeadNormPrologue([norm], [width]))
                 for x, norm, width in zip((q, kv), norms, widths, strict=True))
        return q, kv

    def add(self, number: int, y: Tensor, x: Tensor) -> Tensor:
        """Adds the output y of attention (0) or MLP (1) to its input x."""
        if self.family.outputs is not None:
            y = ApplyPrologue.apply(y, norm_prologue(self, self.family.outputs[number]))
        y = y.add_(x)
        return y if self.family.after is None else attrgetter(self.family.after[number])(self)(y)


class FusedDecoderBlock(FusedBlock):
    """A decoder's block: it reads the rows of `UniqueTokens`."""

    def forward(self, hidden_states, *args, unique: UniqueTokens | None = None, **kwargs):
        if unique is None:
            return super().forward(hidden_states, *args, **kwargs)
        rotary = kwargs.get("position_embeddings")
        # One row of angles for each row of tokens, contiguous for onepass.c.
        if rotary is not None:
            rotary = tuple(x.expand(len(unique.ids), -1, -1).squeeze(1).contiguous() for x in rotary)  # (U, size) each
        return self.compute(hidden_states.squeeze(1), unique, rotary).unsqueeze(1)


class FusedEncoderBlock(FusedBlock):
    """An encoder's block: it reads all tokens, pads too, and the head reads the first one."""

    def forward(self, hidden_states, attention_mask=None, *args, pooled=False, every=False, distances=None, **kwargs):
        if not pooled:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        scores = None if distances is None else distances.seen_by(self.attention.self)
        tokens = AllTokens(hidden_states.shape[:2], attention_mask, None if every else True, scores)
        y = self.compute(hidden_states.flatten(0, 1), tokens, kwargs.get("position_embeddings"))
        return y.unflatten(0, (len(hidden_states), -1))
