"""LoRA's injection; backbones from `transformers` with a classification head; DistilRNN.

    python -c "import model; print(model.load_classifier('tiny', num_labels=2)[0])"

Backbones are the library's own; `fast/blocks.py` gives their blocks a faster forward pass. This file adds what the library
does not have: the roles (q, k, v, o, mlp) that name a backbone's projections, and the small student.
"""
from __future__ import annotations

import copy
import fnmatch
import math
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapters.peft_layout import misread_by_peft
from data.backbones import (
    blocks_of,
    freeze_backbone,
    fresh_modules,
    is_decoder,
    load_causal_lm,
    load_config,
    load_sequence_classifier,
)
from fast.blocks import UniqueTokens, fuse, unique_tokens
from fast.linear import LoRALinear, lora_layers, weight_of
from fast.matmul import speed_up
from fast.recurrent import rnn_states
from machine import hardware
from machine.errors import UserError
from machine.hardware import device, send
from options.schema import PLAIN_SIZES, ROLES, LoRAOptions, RNNConfig

if TYPE_CHECKING:
    from fast.frozen import FrozenPrefix

# Which module of a block plays which role. GPT-2 computes q, k and v in one fused projection.
ROLE_MODULES = {
    "gpt2": {"q": ["attn.c_attn"], "k": ["attn.c_attn"], "v": ["attn.c_attn"], "o": ["attn.c_proj"],
             "mlp": ["mlp.c_fc", "mlp.c_proj"]},
    "llama": {"q": ["self_attn.q_proj"], "k": ["self_attn.k_proj"], "v": ["self_attn.v_proj"],
              "o": ["self_attn.o_proj"], "mlp": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]},
    "bert": {"q": ["attention.self.query"], "k": ["attention.self.key"], "v": ["attention.self.value"],
             "o": ["attention.output.dense"], "mlp": ["intermediate.dense", "output.dense"]},
    "distilbert": {"q": ["attention.q_lin"], "k": ["attention.k_lin"], "v": ["attention.v_lin"],
                   "o": ["attention.out_lin"], "mlp": ["ffn.lin1", "ffn.lin2"]},
}
FUSED_QKV = "attn.c_attn"


# ---------------------------------------------------------------- LoRA

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
    linears = {name: module for block in blocks_of(backbone).values() for name, module in block.named_modules()
               if isinstance(module, (nn.Linear, Conv1D))}
    if not linears:
        raise UserError(f"--method lora: the blocks of a {kind} model have no linear layer that can be adapted; expected "
                        "--method head, full or none")
    table = next((roles for roles in ROLE_MODULES.values() if all(set(names) <= set(linears) for names in roles.values())),
                 None)
    known = set() if table is None else {name for names in table.values() for name in names}
    if set(targets) >= set(ROLES) and known != set(linears):
        wide = [name for name, module in linears.items() if min(weight_of(module).shape) >= rank] or list(linears)
        warnings.warn(f"the roles of a {kind} model are not known here; every linear layer of its blocks is adapted: "
                      f"{', '.join(wide)}", stacklevel=2)
        return dict.fromkeys(wide)
    found: dict[str, set[str] | None] = {}
    for target in targets:
        if target in ROLES and table is None:
            raise UserError(f"--targets {target}: the roles of a {kind} model are not known here; name its modules "
                            f"instead: {', '.join(linears)}")
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


def inject_lora(net: PreTrainedModel, options: LoRAOptions) -> list[str]:
    """Replaces the targeted projections by `LoRALinear` and freezes everything else but the task head.

    Seed first: A is drawn here.

    Returns:
        The full names of the adapted modules.

    Raises:
        UserError: targets or layers that match nothing, or a rank that does not fit.
    """
    blocks = list(blocks_of(net.base_model).items())
    targets = find_targets(net.base_model, options.targets, options.rank)
    chosen = [blocks[layer] for layer in parse_layers(options.layers, len(blocks))]
    bases = {}  # full name -> the layer and the roles that chose it
    for block_name, block in chosen:
        inside = dict(block.named_modules())
        for name in (name for name in targets if name in inside):
            outputs, inputs = weight_of(inside[name]).shape
            if not 1 <= options.rank <= min(inputs, outputs):
                raise UserError(f"--rank {options.rank}: expected 1 to {min(inputs, outputs)} for {name} "
                                f"({inputs} x {outputs})")
            bases[f"{block_name}.{name}"] = inside[name], targets[name]
    if not bases:
        raise UserError(f"--layers {options.layers}: none of these blocks has a layer {', '.join(targets)}")
    freeze_backbone(net)
    for name, (base, roles) in bases.items():
        slices = None
        if name.endswith(FUSED_QKV) and roles and roles < {"q", "k", "v"}:
            third = weight_of(base).shape[0] // 3
            slices = [(i * third, (i + 1) * third) for i, role in enumerate("qkv") if role in roles]
        lora = LoRALinear(base, options.rank, options.alpha, options.dropout, options.rslora, slices)
        net.base_model.set_submodule(name, lora)
    names = [f"{net.base_model_prefix}.{name}" for name in bases]
    if misread := misread_by_peft(net, names):
        warnings.warn(f"PEFT takes {misread[0]} of a {net.config.model_type} model for its experts and will not load this "
                      "adapter as it is; one with --targets of its attention alone it loads", stacklevel=2)
    return names


def count_parameters(net: nn.Module) -> dict[str, int | float]:
    """Counts total and trainable parameters, shared ones once, and the reduction in percent."""
    total = sum(p.numel() for p in net.parameters())
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    return {"total": total, "trainable": trainable, "reduction_percent": 100.0 * (1 - trainable / total)}


# ---------------------------------------------------------------- backbones with a head

class TextClassifier(nn.Module):
    """A `transformers` sequence classifier whose forward pass computes no more than the logits need.

    `net` is the library's own class (GPT2ForSequenceClassification, ...), so parameter names are those
    of its checkpoints and of PEFT's adapters. A decoder is pooled at the last real token, and needs no
    attention mask: with right padding and causal attention no real token ever attends to a pad. If the architecture
    is known (`fused`), the last block computes the pooled token alone.
    """

    def __init__(self, net: PreTrainedModel):
        super().__init__()
        self.net = net
        self.decoder = isinstance(getattr(net, "score", None), nn.Linear)
        self.by_length = False  # whether sentences of each length are computed apart, without a pad (set by `probe`)
        self.known = fuse(net.base_model)
        speed_up(net)
        self.method = "lora"  # set by `configure`, as is `feature_head`
        self.feature_head: FeatureHead | None = None  # None without numeric features
        self.prefix: FrozenPrefix | None = None  # set by the caller to cache what frozen blocks compute

    @property
    def full(self) -> bool:
        """Returns whether the backbone itself is trained."""
        return self.method == "full"

    @property
    def reads_text(self) -> bool:
        """Returns whether the logits depend on the text; if not, they depend on the features alone."""
        return self.method != "features"

    def configure(self, method: str, lora: LoRAOptions | None = None, features: Tensor | None = None) -> TextClassifier:
        """Prepares the classifier for a method: what it reads, and what trains. Training and loading both come here.

        Seed first: LoRA's A and the feature head's first layer are drawn here, in this order.

        Args:
            method: lora, full, head, features or none.
            lora: for `lora`, the adapter to inject; None where a saved adapter will be loaded.
            features: (N, F) float64, the training rows by which a feature head standardises, NaN where a value is
                missing; None without feature columns.

        Raises:
            UserError: see `inject_lora`.
        """
        self.method = method
        if method == "lora" and lora is not None:
            inject_lora(self.net, lora)
        elif method in ("features", "none"):
            self.net.requires_grad_(False)
        elif method != "full":
            freeze_backbone(self.net)
        if features is not None:
            self.feature_head = FeatureHead(features, self.net.config.num_labels).requires_grad_(method != "none")
        return self

    @classmethod
    def from_causal_lm(cls, lm: PreTrainedModel, num_labels: int) -> TextClassifier:
        """Puts a fresh head on the backbone of `lm`, shared with it.

        The head starts at zero, so that training starts from even odds: hidden states can be large (SmolLM2's
        are), and a random head's first logits would have to be unlearned.
        """
        config = copy.deepcopy(lm.config)
        config.num_labels = num_labels
        lm.config.pad_token_id = None  # pooling reads the mask; with a pad id the backbone would only warn
        with torch.device("meta"):
            net = AutoModelForSequenceClassification.from_config(config)
        setattr(net, net.base_model_prefix, lm.base_model)
        net.score = nn.Linear(net.score.in_features, num_labels, bias=False)
        nn.init.zeros_(net.score.weight)
        return cls(net)

    def head_names(self) -> list[str]:
        """Returns the names of the task head's modules, which are no part of the pretrained backbone."""
        children = [n for n, module in self.net.named_children()
                    if n != self.net.base_model_prefix and any(True for _ in module.parameters())]
        return [*fresh_modules(self.net), *children]

    def train(self, mode: bool = True) -> TextClassifier:
        """Sets training mode; the backbone's own dropout stays off unless the backbone itself is trained."""
        super().train(mode)
        if not self.full:
            self.net.base_model.eval()
            for layer in lora_layers(self.net).values():
                layer.train(mode)
        return self

    def fused(self) -> bool:
        """Returns whether the fused blocks compute, which give the backbone's own weights no gradient."""
        trained = torch.is_grad_enabled() and next(self.net.base_model.parameters()).requires_grad
        return self.known and not self.full and not trained

    def encoder_inputs(self, input_ids: Tensor, attention_mask: Tensor) -> dict:
        """Returns the arguments of an encoder's forward pass, without a mask where no token is a pad."""
        mask = None if bool(attention_mask.all()) else send(attention_mask, input_ids.device)
        if mask is not None and not mask.is_cpu and self.known and self.net.config._attn_implementation == "sdpa":
            mask = mask.bool()[:, None, None]  # as attention takes it: any other the library asks whether it masks anything
        return {"input_ids": input_ids, "attention_mask": mask, **({"pooled": True} if self.fused() else {})}

    def pool(self, input_ids: Tensor, attention_mask: Tensor, unique: UniqueTokens | None = None) -> Tensor:
        """Returns a decoder's hidden states at the last real token, (B, T), (B, T) -> (B, C).

        Args:
            unique: the batch's unique tokens, if already computed.
        """
        if self.fused():
            return self.states_of(unique or unique_tokens(input_ids, attention_mask))
        hidden = self.net.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, C)
        last = send(attention_mask.sum(1) - 1, hidden.device)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]

    def states_of(self, unique: UniqueTokens) -> Tensor:
        """Returns a fused decoder's states (rows, C), after its final norm: of each sentence's last token, or of all."""
        # Fused blocks read no mask. Without this one, the library would build one and wait for the GPU in doing so.
        none = unique.ids.new_ones(1, 1, 1, 1)
        return self.net.base_model(input_ids=unique.ids, attention_mask=none, position_ids=unique.positions, use_cache=False,
                                   unique=unique).last_hidden_state[:, 0]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, cached: Tensor | None = None,
                features: Tensor | None = None) -> Tensor:
        """Returns logits (B, labels) of token ids (B, T).

        Args:
            input_ids: (B, T), right-padded.
            attention_mask: (B, T), 1 for a real token; kept on the CPU, so that reading it does not wait for a GPU.
            cached: what `self.prefix` computed of this batch; if given, the frozen part is not computed.
            features: (B, F) numbers for the feature head, NaN where one is missing.
        """
        if self.feature_head is None:
            return self.text_logits(input_ids, attention_mask, cached)
        logits = self.feature_head(features)
        return logits + self.text_logits(input_ids, attention_mask, cached) if self.reads_text else logits

    def text_logits(self, input_ids: Tensor, attention_mask: Tensor, cached: Tensor | None = None) -> Tensor:
        """Returns the logits (B, labels) that the text alone gives."""
        if self.prefix is not None:
            self.prefix.cached = cached
        try:
            if self.by_length:
                return self.logits_by_length(input_ids, attention_mask)
            if not self.decoder:
                return self.net(**self.encoder_inputs(input_ids, attention_mask)).logits.float()
            pooled = cached[:, 0] if cached is not None and self.prefix.head_only else self.pool(input_ids, attention_mask)
            return self.net.score(pooled.to(self.net.score.weight.dtype)).float()
        finally:
            if self.prefix is not None:
                self.prefix.cached = None

    def logits_by_length(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Computes logits by the library's own forward pass, the sentences of each length together and without a pad."""
        lengths = attention_mask.sum(1)
        logits = [(rows, self.net(input_ids=input_ids[rows, :length]).logits.float()) for length in lengths.unique()
                  for rows in [(lengths == length).nonzero()[:, 0]]]
        return torch.cat([part for _, part in logits])[torch.cat([rows for rows, _ in logits]).argsort()]


class FeatureHead(nn.Module):
    """A network with one hidden layer from numeric features, standardised and with missing values marked, to logits.

    Mean and standard deviation are those of the training rows and are saved with the weights. A missing
    value becomes the mean, and a second input marks it as missing. The last layer starts at zero, so that a
    fresh head changes nothing.

    Args:
        features: (N, F) float64, the training rows, NaN where a value is missing.
        num_labels: classes.
        hidden_size: of the hidden layer.

    Raises:
        UserError: the device that computes has no float64.
    """

    def __init__(self, features: Tensor, num_labels: int, hidden_size: int = 32):
        super().__init__()
        if device().type == "mps":
            raise UserError("--device mps: has no float64, which numeric features need; use --device cpu")
        there = ~features.isnan()
        count = there.sum(0).clamp(min=1)
        mean = features.nan_to_num().sum(0) / count
        variance = (features - mean).nan_to_num().square().sum(0) / count
        # What rounding alone leaves of a constant's variance; the bound of scikit-learn's StandardScaler.
        eps = torch.finfo(features.dtype).eps
        constant = variance <= count * eps * variance + (count * mean * eps).square()
        self.register_buffer("mean", mean)
        # A constant feature carries no information; dividing by 1 leaves it at zero.
        self.register_buffer("std", torch.where(constant, 1.0, variance.sqrt()))
        self.hidden = nn.Linear(2 * features.shape[1], hidden_size)
        self.out = nn.Linear(hidden_size, num_labels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def standardise(self, features: Tensor) -> Tensor:  # (B, F) -> (B, F) float32
        return ((features - self.mean) / self.std).nan_to_num(nan=0.0).float()

    def forward(self, features: Tensor) -> Tensor:  # (B, F) -> (B, labels)
        numbers = torch.cat([self.standardise(features), features.isnan().float()], -1)
        return self.out(F.gelu(self.hidden(numbers)))


def load_classifier(name: str, num_labels: int) -> tuple[TextClassifier, PreTrainedModel | None]:
    """Returns the backbone of `--model` under a fresh head, and for a decoder the language model that shares the backbone.

    Raises:
        UserError: the model cannot be loaded, or is no classifier of text alone.
    """
    config = load_config(name)
    if is_decoder(config) and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        lm = load_causal_lm(name, config)
        classifier = TextClassifier.from_causal_lm(lm, num_labels)
    else:
        lm, config.num_labels = None, num_labels
        classifier = TextClassifier(load_sequence_classifier(name, config))
    if not classifier.head_names():
        raise UserError(f"--model {name}: the head of a {config.model_type} classifier is a part of its backbone; expected "
                        "one apart from it, which alone is trained and saved")
    if not classifier.known:
        probe(classifier, name)
    return classifier, lm


@torch.inference_mode()
def probe(classifier: TextClassifier, name: str) -> None:
    """Runs two short sentences through an architecture that is not known here; turns `by_length` on where it has to be.

    Logits must not depend on what else is in the batch, but those of some architectures do: XLNet's head reads the last
    column, pad or not; FNet mixes all columns; others sum over windows or hash. Without a pad all are right.

    Raises:
        UserError: it cannot compute logits of token ids alone, or draws random numbers in doing so (Reformer's hashes).
    """
    config, was_training = classifier.net.config, classifier.training
    if hasattr(config, "hash_seed"):
        raise UserError(f"--model {name}: a {config.model_type} classifier draws random numbers in evaluation too; the same "
                        "sentence would have other logits each time")
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = -1  # without an id the library refuses batches of several sentences (CTRL)
    text = config.get_text_config()
    special = {getattr(text, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos", "sep", "cls", "decoder_start")}
    end = text.eos_token_id if isinstance(getattr(text, "eos_token_id", None), int) else 2  # which BART and T5 pool at
    words = [token for token in range(3, 20) if token not in special][:9]
    pad = max(config.pad_token_id, 0)
    ids = torch.tensor([[*words[:5], end, pad, pad, pad, pad], [*words, end]])
    mask = torch.tensor([[1] * 6 + [0] * 4, [1] * 10])
    compute = classifier.eval().pool if classifier.decoder else classifier.text_logits
    try:
        alone, together = compute(ids[:1, :6], mask[:1, :6]), compute(ids, mask)[:1]
        classifier.by_length = not torch.allclose(together, alone, rtol=0, atol=1e-4 * float(alone.abs().max()))
    except Exception as error:
        if hardware.exhausted(error):
            raise
        what = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"--model {name}: a {config.model_type} classifier does not take token ids alone ({what})") from None
    finally:
        classifier.train(was_training)


# ---------------------------------------------------------------- the student

class DistilRNN(nn.Module):
    """Embedding, LSTM or GRU in one or both directions, pooling over real tokens, linear classifier.

    After Tang et al. 2019, "Distilling Task-Specific Knowledge from BERT into Simple Neural Networks".
    """

    def __init__(self, config: RNNConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        cell = {"lstm": nn.LSTM, "gru": nn.GRU}[config.cell]
        self.rnn = cell(config.embedding_size, config.hidden_size, config.rnn_layers, batch_first=True,
                        bidirectional=config.directions == 2)
        self.dropout = nn.Dropout(config.dropout)
        width = config.directions * config.hidden_size
        self.classifier = nn.Linear(width, config.num_labels)
        if config.pooling == "attention":
            self.attention = nn.Linear(width, 1, bias=False)  # a token's score, before softmax

    def states(self, input_ids: Tensor, attention_mask: Tensor, rnn: nn.Module | None = None) -> Tensor:
        """Returns the RNN's states (B, T, DH), forward direction first, or those of another `rnn` in its place."""
        x = self.dropout(self.embedding(input_ids))  # (B, T, E)
        return rnn_states(rnn or self.rnn, x, attention_mask.sum(1))  # the mask is on the CPU, where batches keep it

    def classify(self, states: Tensor, attention_mask: Tensor) -> Tensor:  # (B, T, DH), (B, T) -> (B, labels)
        """Pools the states over real tokens and computes logits."""
        mask = send(attention_mask, states.device).bool().unsqueeze(-1)  # (B, T, 1)
        if self.config.pooling == "max":
            pooled = states.masked_fill(~mask, -math.inf).max(1).values
        elif self.config.pooling == "attention":
            pooled = (self.attention(states).masked_fill(~mask, -math.inf).softmax(1) * states).sum(1)
        else:
            pooled = states.masked_fill(~mask, 0.0).sum(1) / mask.sum(1)
        return self.classifier(self.dropout(pooled))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # (B, T), (B, T) -> (B, labels)
        return self.classify(self.states(input_ids, attention_mask), attention_mask)


def student_parameters(config: RNNConfig) -> int:
    """Counts the parameters of a student, embeddings included, without building it."""
    with torch.device("meta"):
        return sum(p.numel() for p in DistilRNN(config).parameters())


def student_config(vocab_size: int, num_labels: int, budget: int, largest_first: Sequence[tuple[int, int]] = PLAIN_SIZES,
                   **sizes) -> RNNConfig:
    """Returns the largest default student that fits `budget` parameters.

    Sizes given explicitly (not None) are taken as they are.

    Args:
        largest_first: embedding and hidden sizes to choose from.

    Raises:
        UserError: not even the smallest default fits.
    """
    sizes = {name: value for name, value in sizes.items() if value is not None}
    for embedding, hidden in largest_first:
        config = RNNConfig(vocab_size, num_labels, **{"embedding_size": embedding, "hidden_size": hidden, **sizes})
        if student_parameters(config) <= budget or {"embedding_size", "hidden_size"} <= set(sizes):
            return config
    raise UserError(f"no default student fits {budget:,} parameters with a vocabulary of {vocab_size:,}; give "
                    "--embedding-size and --hidden-size")
