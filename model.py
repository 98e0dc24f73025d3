"""LoRA and its injection into a pretrained transformer, the text classifier on top, and the small student: DistilRNN.

    python -c "import model; print(model.load_classifier('tiny', num_labels=2)[0])"

This file is the reference. It needs PyTorch and the backbones of `transformers`, and it computes each formula as the papers
write it. `fast/` computes the same numbers sooner; nothing here knows about it.
"""
from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from data.architectures import FUSED_QKV, compute_by_length, depends_on_batch, find_targets, parse_layers, warn_of_misread
from data.backbones import (
    blocks_of,
    freeze_backbone,
    fresh_modules,
    is_decoder,
    load_causal_lm,
    load_config,
    load_sequence_classifier,
    max_length_of,
)
from data.feature_head import FeatureHead
from data.module_patterns import checked_names, size_of
from layers import MinGRU, RNNConfig, StudentEmbedding
from machine.errors import UserError
from machine.hardware import send
from options.schema import LoRAOptions

# ---------------------------------------------------------------- LoRA

class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained low-rank update: y = W x + b + scaling * B A x.

    LoRA, Hu et al. 2021, equation 3; scaling = alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023).

    With `slices`, each (start, stop) range of the outputs has an A and a B of its own (GPT-2's fused c_attn adapted in q and
    v only). The As are stacked and the Bs form one block matrix: one LoRA of the summed rank.

    Args:
        base: `nn.Linear`, or GPT-2's `Conv1D` (W stored transposed); frozen here.
        rank: rank of each update.
        alpha: numerator of the scaling.
        dropout: probability that an input of A is zeroed in training.
        rslora: scale by alpha / sqrt(rank).
        slices: output ranges to adapt; all outputs if None.
    """

    def __init__(self, base: nn.Linear | Conv1D, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False,
                 slices: list[tuple[int, int]] | None = None):
        super().__init__()
        self.out_features, self.in_features = weight_of(base).shape
        # Without slices the whole output is the one slice, so that one code serves both.
        self.slices = slices or [(0, self.out_features)]
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.dropout = nn.Dropout(dropout)
        adapted = sum(stop - start for start, stop in self.slices)
        # Float32 even where W is bfloat16: the updates of one step are too small for bfloat16.
        self.lora_A = nn.Parameter(torch.empty(rank * len(self.slices), self.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(adapted, rank, device=base.weight.device))
        # A random and B zero: B A = 0, so a fresh adapter changes nothing, and the gradient of B is not zero.
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        # W holds the update already.
        if self.merged:
            return self.base(x)
        # A and B stay float32 where activations are bfloat16 (on a GPU).
        A, B = (factor.to(x.dtype) for factor in self.factors())  # (rank, in), (out, rank)
        return self.base(x) + self.scaling * F.linear(F.linear(self.dropout(x), A), B)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Returns A (rank, in_features) and B (out_features, rank) of the update; a variant may compute its own."""
        return self.lora_A, self.block_B()

    def block_B(self) -> Tensor:
        """Returns B over all outputs, (out_features, rank * slices): block by block where there are slices."""
        if self.slices == [(0, self.out_features)]:
            return self.lora_B
        # Slice i of the outputs reads the i-th group of `rank` rows of A alone; elsewhere B is zero.
        block = self.lora_B.new_zeros(self.out_features, self.lora_A.shape[0])
        row = 0
        for i, (start, stop) in enumerate(self.slices):
            block[start:stop, i * self.rank:(i + 1) * self.rank] = self.lora_B[row:row + stop - start]
            row += stop - start
        return block

    def delta(self) -> Tensor:
        """Returns the update of W, scaling * B A, (out_features, in_features), in float32."""
        A, B = self.factors()
        return self.scaling * (B.float() @ A.float())

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the update to the frozen weight: W + scaling * B A. A second call does nothing.

        Raises:
            ValueError: the update is not finite; the weight is left as it was.
        """
        if not self.merged:
            weight_of(self.base).add_(self.finite_delta())
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtracts the update from the frozen weight again; raises as `merge` does."""
        if self.merged:
            weight_of(self.base).sub_(self.finite_delta())
            self.merged = False

    def finite_delta(self) -> Tensor:
        """Returns `delta` in the type of W; raises `ValueError` if one of its values is not finite."""
        # Checked before W is touched: NaN could not be subtracted again.
        delta = self.delta()
        if not torch.isfinite(delta).all():
            raise ValueError("the adapter holds values that are not finite; nothing was merged")
        return delta.to(self.base.weight.dtype)

    @property
    def weight(self) -> Tensor:
        """Returns the frozen weight: some of the library's blocks (T5's) read its type."""
        return self.base.weight

    def low_rank_terms(self) -> list[tuple[Tensor, Tensor, float]] | None:
        """Returns the terms (A, B, scaling) that `forward` adds to the frozen layer; None: only `forward` computes them."""
        # A merged layer is its frozen layer.
        if self.merged:
            return []
        # With dropout W and A read different inputs.
        return None if self.dropout.p > 0 and self.training else [(*self.factors(), self.scaling)]

    def __init_subclass__(cls) -> None:
        # A variant that writes its own `forward` is not the sum above, unless it says so itself.
        if "forward" in vars(cls) and "low_rank_terms" not in vars(cls):
            cls.low_rank_terms = lambda self: None


def weight_of(linear: nn.Linear | Conv1D) -> Tensor:
    """Returns the weight as (out_features, in_features), a view where it is stored transposed."""
    return linear.weight.t() if isinstance(linear, Conv1D) else linear.weight


def lora_layers(net: nn.Module) -> dict[str, LoRALinear]:
    """Returns every `LoRALinear` by its full name."""
    return {name: module for name, module in net.named_modules() if isinstance(module, LoRALinear)}


def inject_lora(net: PreTrainedModel, options: LoRAOptions, layer_class: type[LoRALinear] = LoRALinear) -> list[str]:
    """Replaces the targeted projections by `LoRALinear`s and freezes everything else but the task head: biases too.

    Seed first: A is sampled here.

    Args:
        layer_class: `LoRALinear`, or a variant of it (variants/).

    Returns:
        The full names of the adapted modules.

    Raises:
        UserError: targets or layers that match nothing, or a rank that does not fit.
    """
    blocks = list(blocks_of(net.base_model).items())
    targets = find_targets(net.base_model, options.targets, options.rank)
    # Collect every layer first, so that a rank that does not fit leaves the model as it is.
    bases = {}  # full name -> the layer, the roles that chose it, its rank and alpha
    for layer in parse_layers(options.layers, len(blocks)):
        block_name, block = blocks[layer]
        modules = dict(block.named_modules())
        for name in (name for name in targets if name in modules):
            outputs, inputs = weight_of(modules[name]).shape
            rank, alpha = size_of(options, f"{net.base_model_prefix}.{block_name}.{name}")
            if not 1 <= rank <= min(inputs, outputs):
                raise UserError(f"--rank {rank}: expected 1 to {min(inputs, outputs)} for {name} ({inputs} x {outputs})")
            bases[f"{block_name}.{name}"] = modules[name], targets[name], rank, alpha
    if not bases:
        raise UserError(f"--layers {options.layers}: none of these blocks has a layer {', '.join(targets)}")
    names = checked_names(options, [f"{net.base_model_prefix}.{name}" for name in bases])
    # Freeze before the injection: A and B are new parameters and stay trainable.
    freeze_backbone(net)
    for name, (base, roles, rank, alpha) in bases.items():
        slices = None
        # GPT-2 computes q, k and v side by side in one layer; a subset of them adapts only its thirds of the outputs.
        if name.endswith(FUSED_QKV) and roles and roles < {"q", "k", "v"}:
            third = weight_of(base).shape[0] // 3
            slices = [(i * third, (i + 1) * third) for i, role in enumerate("qkv") if role in roles]
        net.base_model.set_submodule(name, layer_class(base, rank, alpha, options.dropout, options.rslora, slices))
    warn_of_misread(net.config.model_type, names)
    return names


def count_parameters(net: nn.Module) -> dict[str, int | float]:
    """Counts total and trainable parameters, shared ones once, and the reduction in percent."""
    total = sum(p.numel() for p in net.parameters())
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    return {"total": total, "trainable": trainable, "reduction_percent": 100.0 * (1 - trainable / total)}


# ---------------------------------------------------------------- a backbone with a head

class TextClassifier(nn.Module):
    """A `transformers` sequence classifier: logits (B, labels) of token ids (B, T).

    `net` is the library's own class (GPT2ForSequenceClassification, ...), so parameter names are those of its checkpoints
    and of PEFT's adapters. A decoder is pooled at the last real token and needs no attention mask: with right padding and
    causal attention no real token ever attends to a pad.
    """

    def __init__(self, net: PreTrainedModel):
        super().__init__()
        self.net = net
        self.decoder = isinstance(getattr(net, "score", None), nn.Linear)
        self.by_length = False  # whether sentences of each length are computed apart (set by `probe`)
        self.method = "lora"  # set by `configure`, as is `feature_head`
        self.feature_head: FeatureHead | None = None  # None without numeric features

    @property
    def trains_backbone(self) -> bool:
        """Returns whether the backbone's own weights train, or its biases."""
        return self.method in ("full", "bitfit")

    @property
    def reads_text(self) -> bool:
        """Returns whether the logits depend on the text; if not, they depend on the features alone."""
        return self.method != "features"

    def configure(self, method: str, lora: LoRAOptions | None = None, features: Tensor | None = None,
                  inject: Callable[[PreTrainedModel, LoRAOptions], object] = inject_lora) -> TextClassifier:
        """Prepares the classifier for a method: its inputs and its trained parameters.

        Training and loading both come here. Seed first: A and the feature head's first layer are sampled, in this order.

        Args:
            method: lora, ia3, bitfit, full, head, features or none.
            lora: the adapter to inject for the first three; None where a saved one will be loaded.
            features: (N, F) float64, training rows for the feature head's mean and deviation, NaN where a value is
                missing; None without feature columns.
            inject: puts the adapter in; raises `UserError` for one that does not fit.
        """
        self.method = method
        # Everything starts trainable, so each method freezes what it does not train.
        if lora is not None and method in ("lora", "ia3", "bitfit"):
            inject(self.net, lora)
        elif method in ("features", "none"):
            self.net.requires_grad_(False)
        elif method != "full":
            freeze_backbone(self.net)
        if features is not None:
            self.feature_head = FeatureHead(features, self.net.config.num_labels).requires_grad_(method != "none")
        return self

    @classmethod
    def from_causal_lm(cls, lm: PreTrainedModel, num_labels: int) -> TextClassifier:
        """Puts a fresh head on the backbone of `lm`, shared with it."""
        config = copy.deepcopy(lm.config)
        config.num_labels = num_labels
        # Pooling reads the mask. With a pad id the backbone would only warn.
        lm.config.pad_token_id = None
        # On the meta device the second backbone, which is replaced at once, takes no memory.
        with torch.device("meta"):
            net = AutoModelForSequenceClassification.from_config(config)
        setattr(net, net.base_model_prefix, lm.base_model)
        # Zeros are even odds: with large hidden states (SmolLM2's) the logits of a random head would have to be unlearnt.
        net.score = nn.Linear(net.score.in_features, num_labels, bias=False)
        nn.init.zeros_(net.score.weight)
        return cls(net)

    def head_names(self) -> list[str]:
        """Returns the names of the task head's modules; they are no part of the pretrained backbone."""
        children = [name for name, module in self.net.named_children()
                    if name != self.net.base_model_prefix and next(module.parameters(), None) is not None]
        return [*fresh_modules(self.net), *children]

    def train(self, mode: bool = True) -> TextClassifier:
        """Sets training mode; the backbone's own dropout stays off unless the backbone itself is trained."""
        super().train(mode)
        # A frozen backbone computes the same features each time; dropout in it would be noise that nothing learns from.
        if not self.trains_backbone:
            self.net.base_model.eval()
            for layer in lora_layers(self.net).values():
                layer.train(mode)
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor, features: Tensor | None = None) -> Tensor:
        """Returns logits (B, labels) of token ids (B, T).

        Args:
            input_ids: (B, T), right-padded.
            attention_mask: (B, T), 1 for a real token; kept on the CPU, so that reading it does not wait for a GPU.
            features: (B, F) numbers for the feature head, NaN where one is missing.
        """
        if self.feature_head is None:
            return self.text_logits(input_ids, attention_mask)
        # The feature head's logits start at zero and are added to those of the text.
        logits = self.feature_head(features)
        return logits + self.text_logits(input_ids, attention_mask) if self.reads_text else logits

    def text_logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns the logits (B, labels) that the text alone gives."""
        if self.by_length:
            return compute_by_length(self.batch_logits, input_ids, attention_mask)
        return self.batch_logits(input_ids, attention_mask)

    def batch_logits(self, input_ids: Tensor, attention_mask: Tensor, every: bool = False) -> Tensor:
        """Returns the logits (B, labels) of one forward pass, pads included; `every`: a hook reads all tokens' states."""
        if self.decoder:
            return self.head_logits(self.pool(input_ids, attention_mask))
        return self.net(input_ids=input_ids, attention_mask=self.encoder_mask(input_ids, attention_mask)).logits.float()

    def pool(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns a decoder's hidden states at the last real token, (B, T), (B, T) -> (B, C)."""
        hidden = self.net.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, C)
        # The last real token, not the last column: it alone has read the whole sentence and no pad.
        last = send(attention_mask.sum(1) - 1, hidden.device)
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]

    def head_logits(self, pooled: Tensor) -> Tensor:
        """Returns the logits that a decoder's head gives hidden states, (rows, C) -> (rows, labels)."""
        return self.net.score(pooled.to(self.net.score.weight.dtype)).float()

    def encoder_mask(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor | None:
        """Returns the mask (B, T) on the device of the ids, or None where no token is a pad."""
        # Without a mask attention takes a faster kernel.
        return None if bool(attention_mask.all()) else send(attention_mask, input_ids.device)

    def probe(self, name: str) -> None:
        """Sets `by_length` by computing two short sentences; raises `UserError` if the model does not take ids alone."""
        self.eval()
        compute = self.pool if self.decoder else self.text_logits
        self.by_length = depends_on_batch(name, self.net.config, compute, max_length_of(self.net))
        self.train()

    def token_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns a decoder's hidden states of every token, after the final norm: (B, T), (B, T) -> (B, T, C)."""
        return self.net.base_model(input_ids=input_ids, use_cache=False).last_hidden_state


def load_classifier(name: str, num_labels: int) -> tuple[TextClassifier, PreTrainedModel | None]:
    """Returns the backbone of `--model` under a fresh head, and for a decoder the language model that shares the backbone.

    Raises:
        UserError: the model cannot be loaded, or is no classifier of text alone.
    """
    # A decoder is loaded as a language model, so that `gen` and the check of a fresh adapter can use the same backbone.
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
    classifier.probe(name)
    return classifier, lm


# ---------------------------------------------------------------- the student

# A new cell is a class with the arguments of nn.LSTM, and one entry. It maps x (B, T, E) and lengths (B,) to states.
CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "mingru": MinGRU}


class DistilRNN(nn.Module):
    """Embedding, RNN in one or both directions, pooling over real tokens, linear classifier.

    After Tang et al. 2019, "Distilling Task-Specific Knowledge from BERT into Simple Neural Networks".
    """

    def __init__(self, config: RNNConfig):
        super().__init__()
        self.config = config
        self.embedding = StudentEmbedding(config)
        self.rnn = CELLS[config.cell](self.embedding.width, config.hidden_size, config.rnn_layers, batch_first=True,
                                      bidirectional=config.directions == 2)
        self.dropout = nn.Dropout(config.dropout)
        width = config.directions * config.hidden_size
        self.classifier = nn.Linear(width, config.num_labels)
        if config.pooling == "attention":
            # A token's score, before softmax over the sentence.
            self.attention = nn.Linear(width, 1, bias=False)

    def states(self, input_ids: Tensor, attention_mask: Tensor, rnn: nn.Module | None = None) -> Tensor:
        """Returns the RNN's states (B, T, DH), forward direction first, or those of another `rnn` in its place."""
        # Batches keep the mask on the CPU, so that its lengths are known without waiting for a GPU.
        return self.rnn_states(rnn or self.rnn, self.dropout(self.embedding(input_ids)), attention_mask.sum(1))

    def rnn_states(self, rnn: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
        """Returns the states (B, T, DH) of padded rows x (B, T, E) with these lengths (B,)."""
        if not isinstance(rnn, nn.RNNBase):
            return rnn(x, lengths)
        # PyTorch's cells read packed rows: the backward direction begins at the last real token and not at the pads.
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(rnn(packed)[0], batch_first=True, total_length=x.shape[1])[0]

    def classify(self, states: Tensor, attention_mask: Tensor) -> Tensor:  # (B, T, DH), (B, T) -> (B, labels)
        """Pools the states over real tokens and computes logits."""
        mask = send(attention_mask, states.device).bool().unsqueeze(-1)  # (B, T, 1)
        # Pads never win the maximum, get no attention, and are not counted in the mean.
        if self.config.pooling == "max":
            pooled = states.masked_fill(~mask, -math.inf).max(1).values
        elif self.config.pooling == "attention":
            pooled = (self.attention(states).masked_fill(~mask, -math.inf).softmax(1) * states).sum(1)
        else:
            pooled = states.masked_fill(~mask, 0.0).sum(1) / mask.sum(1)
        return self.classifier(self.dropout(pooled))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # (B, T), (B, T) -> (B, labels)
        return self.classify(self.states(input_ids, attention_mask), attention_mask)
