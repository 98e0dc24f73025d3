"""Toy models and a toy tokenizer: two layers, 32 channels, random weights, no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import; test_hub.py sets its own for its subprocesses
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    PreTrainedTokenizerFast,
)

import speed
from fast import choice
from fast.installation import install
from model import LoRAOptions, TextClassifier, inject_lora, lora_layers

# One thread, unless the environment asks for more: the suite has to pass with either.
THREADS = int(os.environ.get("OMP_NUM_THREADS") or 1)
torch.set_num_threads(THREADS)

settings.register_profile("untimed", deadline=None)  # how long an example takes says how busy the machine is
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def same_machine():
    """Gives each test the threads, library and kernels of the first: a resumed run takes those that it recorded."""
    yield
    torch.set_num_threads(THREADS)
    choice.use_matmul()
    speed.choose()


VOCAB, PAD, CONTEXT = 101, 100, 32
SIZES = {
    "gpt2": (GPT2ForSequenceClassification, GPT2Config, {
        "n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": CONTEXT, "bos_token_id": PAD, "eos_token_id": PAD}),
    "llama": (LlamaForSequenceClassification, LlamaConfig, {
        "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}),
    "bert": (BertForSequenceClassification, BertConfig, {
        "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT}),
    "distilbert": (DistilBertForSequenceClassification, DistilBertConfig, {
        "n_layers": 2, "dim": 32, "hidden_dim": 48, "n_heads": 4, "max_position_embeddings": CONTEXT}),
    "mpnet": (MPNetForSequenceClassification, MPNetConfig, {  # positions are counted from 2 on
        "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT + 2}),
}
ARCHITECTURES = sorted(SIZES)
# The other architectures with fused blocks, of odd sizes; a window of 4 tokens is shorter than the sentences of the tests.
ODD = {"num_hidden_layers": 2, "hidden_size": 30, "intermediate_size": 39, "num_attention_heads": 3,
       "max_position_embeddings": 130}  # RoBERTa's positions are counted from the pad token on
GROUPED = {**ODD, "num_key_value_heads": 1, "head_dim": 14}
FAMILIES = {
    "roberta": ODD, "xlm-roberta": ODD, "electra": {**ODD, "embedding_size": 11},
    "deberta-v2": {**ODD, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4,
                   "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False},
    "mistral": {**GROUPED, "sliding_window": 4},
    "qwen2": {**GROUPED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {**GROUPED, "attention_bias": True},
    "gemma2": {**GROUPED, "sliding_window": 4, "query_pre_attn_scalar": 9, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**GROUPED, "sliding_window": 4, "query_pre_attn_scalar": 9, "layer_types": [
        "sliding_attention", "full_attention"]},
    "modernbert": {**ODD, "local_attention": 6, "layer_types": ["full_attention", "sliding_attention"],
                   **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)},
}


def toy_net(architecture: str, seed: int = 0, **changes):
    """A randomly initialised sequence classifier of `transformers`, in evaluation mode.

    The weights are ten times a fresh model's, so that attention, norms and heads all matter to the logits.
    """
    torch.manual_seed(seed)
    usual = {"vocab_size": VOCAB, "pad_token_id": PAD, "initializer_range": 0.2}
    if architecture in FAMILIES:
        config = AutoConfig.for_model(architecture, **{**usual, **FAMILIES[architecture], **changes})
        net = AutoModelForSequenceClassification.from_config(config)
        # The library starts norms and biases at ones and zeros, which would hide them.
        for name, p in net.named_parameters():
            if p.ndim == 1:
                nn.init.normal_(p, float("norm" in name.lower() and "weight" in name), 0.1)
        return net.eval()
    net_class, config_class, sizes = SIZES[architecture]
    return net_class(config_class(**{**usual, **sizes, **changes})).eval()


def gpt2_lm(seed: int = 0) -> GPT2LMHeadModel:
    """A toy GPT-2 language model, in evaluation mode."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, initializer_range=0.2, **SIZES["gpt2"][2])).eval()


def adapted(architecture: str, seed: int = 0, trained: bool = True, sizes: dict | None = None, **options) -> TextClassifier:
    """A toy classifier with a LoRA adapter; `trained`: with B non-zero, as after training; `sizes`: of its own."""
    net = toy_net(architecture, **(sizes or {}))
    torch.manual_seed(seed)
    inject_lora(net, LoRAOptions(**{"rank": 4, "alpha": 6.0, **options}))
    if trained:
        randomize_B(net)
    return fast_classifier(net)


def fast_classifier(net) -> TextClassifier:
    """The classifier of a net under the fast path, in evaluation mode."""
    classifier = TextClassifier(net).eval()
    install(classifier)
    return classifier


def randomize_B(net: torch.nn.Module, std: float = 0.1) -> None:
    with torch.no_grad():
        for layer in lora_layers(net).values():
            layer.lora_B.normal_(std=std)


def toy_batch(lengths: tuple[int, ...] = (5, 9, 1, 12), seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and their mask, (B, T) each."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(0, PAD, mask.shape, generator=generator)
    return ids.where(mask.bool(), torch.tensor(PAD)), mask


@torch.no_grad()
def logits_of(classifier: TextClassifier, batch=None) -> torch.Tensor:
    return classifier(*(batch or toy_batch()))


def one_line(error: pytest.ExceptionInfo) -> str:
    """The message of an error, which has no line break."""
    message = str(error.value)
    assert "\n" not in message
    return message


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer as GPT-2's, trained on three sentences."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        ["The cat sat on the mat.", "A dog ran to the cat.", "The mat was on the dog."],
        trainers.BpeTrainer(vocab_size=280, special_tokens=["<|endoftext|>"], show_progress=False,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|endoftext|>",
                                        unk_token="<|endoftext|>", model_max_length=CONTEXT)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory) -> Path:
    """A toy GPT-2 with its tokenizer, as `save_pretrained` writes a checkpoint."""
    folder = tmp_path_factory.mktemp("toy-gpt2")
    tokenizer = write_tokenizer(folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(
        vocab_size=len(tokenizer), n_layer=2, n_embd=32, n_head=4, n_positions=CONTEXT, initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)).save_pretrained(folder)
    return folder
