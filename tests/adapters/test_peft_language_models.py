"""Adapters of causal language models, exchanged with `peft`; some output layers share a weight with the embeddings."""


import peft
import pytest
import torch
from conftest import gpt2_lm, randomize_B, toy_batch, toy_net
from peft_toys import refused_unchanged
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from adapters.peft_layout import (
    WEIGHTS_FILE,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from model import LoRAOptions, TextClassifier, inject_lora

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in (
    "FutureWarning:transformers", "UserWarning:peft", "peft.utils.warning.PeftWarning")]

def test_a_language_model_takes_a_classifiers_adapter_without_its_head(tmp_path):
    lm = gpt2_lm()
    classifier = TextClassifier.from_causal_lm(lm, 2)
    torch.manual_seed(4)
    inject_lora(classifier.net, LoRAOptions(rank=4))
    randomize_B(classifier.net)
    save_adapter(classifier, tmp_path, "the-base")
    ids = toy_batch()[0]
    plain = gpt2_lm()
    with torch.no_grad():
        base = plain(ids).logits
        load_adapter(plain, tmp_path, head=False)
        assert not torch.allclose(plain.eval()(ids).logits, base, atol=1e-3)
        assert torch.equal(plain(ids).logits, lm.eval()(ids).logits)  # lm shares the adapted backbone


def test_a_causal_language_models_adapter_saved_by_peft_loads_here(tmp_path):
    model = peft.get_peft_model(gpt2_lm(), peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"],
                                                           fan_in_fan_out=True))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.2)
    model.save_pretrained(tmp_path)
    ids, plain = toy_batch()[0], gpt2_lm()
    with torch.no_grad():
        expected, base = model.eval()(ids).logits, plain(ids).logits
        load_adapter(plain, tmp_path, head=False)
        assert not torch.allclose(expected, base, atol=1e-3)
        torch.testing.assert_close(plain.eval()(ids).logits, expected, atol=1e-5, rtol=0)



def language_model(architecture: str):
    """A language model with a shared embedding (GPT-2) or without one (Llama)."""
    torch.manual_seed(0)
    config = toy_net(architecture).config
    return AutoModelForCausalLM.from_config(config).eval()


def save_language_model(folder, architecture: str, std: float = 0.2, **config) -> torch.Tensor:
    """Saves an adapter of PEFT's with random values everywhere that it trains; returns its logits."""
    layers = {"gpt2": ["c_attn"], "llama": ["q_proj"]}[architecture]
    model = peft.get_peft_model(language_model(architecture), peft.LoraConfig(
        task_type="CAUSAL_LM", **{"r": 4, "target_modules": layers, **config}))
    torch.manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                p.normal_(std=std)
    model.save_pretrained(folder)
    with torch.no_grad():
        return model.eval()(toy_batch()[0]).logits


NAMES = {"gpt2": ("wte", "c_attn"), "llama": ("embed_tokens", "q_proj")}


@pytest.mark.parametrize("architecture", NAMES)
@pytest.mark.parametrize("config", [
    lambda embedding, layer: {"modules_to_save": ["lm_head"]}, lambda embedding, layer: {"modules_to_save": [embedding]},
    lambda embedding, layer: {"modules_to_save": [embedding, "lm_head"]},
    lambda embedding, layer: {"modules_to_save": [embedding], "ensure_weight_tying": True},
    lambda embedding, layer: {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    lambda embedding, layer: {"target_modules": ["lm_head", layer]},
    lambda embedding, layer: {"target_modules": ["lm_head", layer], "modules_to_save": [embedding]}])
def test_output_layers_and_embeddings_of_pefts_adapters_compute_as_in_peft(tmp_path, architecture, config):
    options = config(*NAMES[architecture])
    expected = save_language_model(tmp_path, architecture, **options)
    lm, ids = language_model(architecture), toy_batch()[0]
    with torch.no_grad():
        assert not torch.allclose(lm(ids).logits, expected, atol=1e-2)
        load_adapter(lm, tmp_path, head=False)
        torch.testing.assert_close(lm.eval()(ids).logits, expected, atol=2e-5, rtol=0)
        # A merge into the output layer leaves the embedding as it is.
        merge_adapter(lm)
        torch.testing.assert_close(lm(ids).logits, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("config, match", [
    ({"modules_to_save": ["lm_head"]}, r"no classification head for this model \(score.weight is missing\)"),
    ({"target_modules": ["lm_head"]}, "adapter for another base: lm_head does not exist")])
def test_a_language_models_adapter_is_no_classifiers(tmp_path, config, match):
    save_language_model(tmp_path, "gpt2", **config)
    refused_unchanged(toy_net("gpt2"), tmp_path, match)


def test_an_embedding_of_another_base_beside_an_adapted_output_layer_is_refused(tmp_path):
    save_language_model(tmp_path, "gpt2", target_modules=["lm_head"])
    other = language_model("gpt2")
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    refused_unchanged(other, tmp_path, r"adapter for another base: lm_head.base_layer.weight is not", head=False)


def test_an_embedding_that_was_saved_untrained_is_loaded_as_it_is(tmp_path):
    save_language_model(tmp_path, "gpt2")
    lm = language_model("gpt2")
    key = "base_model.model.transformer.wte.weight"  # PEFT's save_embedding_layers
    save_file({**load_file(tmp_path / WEIGHTS_FILE), key: lm.transformer.wte.weight.detach() * 2}, tmp_path / WEIGHTS_FILE)
    load_adapter(lm, tmp_path, head=False)
    assert lm.lm_head.weight is lm.transformer.wte.weight
    assert torch.equal(lm.lm_head.weight, 2 * language_model("gpt2").lm_head.weight)
