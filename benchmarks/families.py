"""The families of architectures with fused blocks, as train_throughput.py measures them: real sizes, random weights."""
from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks import common
from record.files import make_folder

BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
# The widths of published models: BERT's base size, SmolLM2-135M, Qwen2.5-0.5B, Qwen3-0.6B, Gemma 3 270M. Mistral and
# Gemma 2 have none so small.
FAMILIES = {
    "gpt2": {}, "bert": BASE, "distilbert": {}, "mpnet": BASE, "roberta": BASE, "xlm-roberta": BASE,
    "electra": {**BASE, "embedding_size": 768},
    # DeBERTa-v3-base's.
    "deberta-v2": {**BASE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 256,
                   "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0,
                   "layer_norm_eps": 1e-7},
    "llama": {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536},
    "mistral": {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 3584},
    "qwen2": {"hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864},
    "qwen3": {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 3072,
              "head_dim": 128},
    "gemma3_text": {"hidden_size": 640, "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 2048,
                    "head_dim": 256, "sliding_window": 512},
    "gemma2": {"hidden_size": 640, "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 2048,
               "head_dim": 256},
    "modernbert": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 1152},
}
# No dropout in the backbone, as this project has none: PEFT at its best.
DROPOUTS = ("attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout",
            "attention_dropout")


def base_of_family(family: str, work: Path, blocks: int) -> str:
    """Makes a folder with a model of some blocks, random weights, and SmolLM2's tokenizer; returns its path."""
    folder = make_folder(work / f"family-{family}")
    tokenizer = common.tokenizer_of("smollm2")
    default = AutoConfig.for_model(family)
    sizes = {name: 0.0 for name in DROPOUTS if hasattr(default, name)}
    config = AutoConfig.for_model(family, **{
        "num_hidden_layers": blocks, "vocab_size": 50_304, "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.pad_token_id, **sizes, **FAMILIES[family]})
    torch.manual_seed(0)
    # A decoder's language model, or an encoder without a head: as people publish them.
    is_decoder = hasattr(config, "num_key_value_heads") or family == "gpt2"
    net = (AutoModelForCausalLM if is_decoder else AutoModelForSequenceClassification).from_config(config)
    (net if is_decoder else net.base_model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
