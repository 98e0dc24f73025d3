"""adapters: saved, reloaded, exchanged with `peft`, and refused where they would be misread."""

import dataclasses
import json
import re
from pathlib import Path

import peft
import pytest
import torch
from conftest import ARCHITECTURES, VOCAB, adapted, gpt2_lm, logits_of, randomize_B, toy_batch, toy_net
from peft.tuners.lora.config import MontecloraConfig, VeloraConfig
from peft_toys import (
    HEADS,
    VARIANTS,
    base_logits,
    fine_tuned,
    head_weights,
    refused_unchanged,
    with_other_head,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertForMaskedLM, BertForSequenceClassification

from adapters.peft_kinds import IGNORED, READ, UNSUPPORTED
from adapters.peft_layout import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    base_of,
    load_adapter,
    load_tensors,
    save_adapter,
    start_from,
)
from data.architectures import misread_by_peft
from fast.installation import install
from machine.errors import UserError
from model import LoRAOptions, load_classifier, lora_layers

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in (
    "FutureWarning:transformers", "UserWarning:peft", "peft.utils.warning.PeftWarning")]


# ---------------------------------------------------------------- invariants 6 and 7

@pytest.mark.parametrize("architecture, options", VARIANTS)
def test_a_reload_under_another_seed_gives_the_same_logits_exactly(tmp_path, architecture, options):
    classifier = fine_tuned(architecture, **options)
    save_adapter(classifier, tmp_path, "the-base")
    again = with_other_head(architecture)
    assert not torch.equal(logits_of(again), logits_of(classifier))
    names = load_adapter(again.net, tmp_path)
    install(again)
    assert torch.equal(logits_of(again.eval()), logits_of(classifier))
    assert set(names) == set(lora_layers(again.net)) == set(lora_layers(classifier.net))
    trainable = {name for name, p in again.net.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or name.startswith(tuple(HEADS[architecture])) for name in trainable) and trainable


def test_the_folder_holds_adapter_files_only_and_they_hold_no_frozen_weight(tmp_path):
    classifier = fine_tuned("distilbert")
    save_adapter(classifier, tmp_path, "the-base")
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    keys = {key.removeprefix("base_model.model.") for key in load_file(tmp_path / WEIGHTS_FILE)}
    layers = lora_layers(classifier.net)
    assert keys == {f"{name}.lora_{x}.weight" for name in layers for x in "AB"} | {
        f"{head}.{kind}" for head in HEADS["distilbert"] for kind in ("weight", "bias")}
    assert base_of(tmp_path) == "the-base"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_is_saved_and_restored_with_the_adapter(tmp_path, architecture):
    classifier = fine_tuned(architecture)
    save_adapter(classifier, tmp_path, "the-base")
    again = with_other_head(architecture)
    assert classifier.head_names() == HEADS[architecture]
    theirs = head_weights(again.net)
    assert theirs and not any(torch.equal(theirs[name], ours) for name, ours in head_weights(classifier.net).items())
    load_adapter(again.net, tmp_path)
    for name in HEADS[architecture]:
        for key, value in classifier.net.get_submodule(name).state_dict().items():
            assert torch.equal(again.net.get_submodule(name).state_dict()[key], value)


def test_an_adapter_without_its_head_is_refused(tmp_path):
    save_adapter(fine_tuned("gpt2"), tmp_path, "the-base")
    state = load_file(tmp_path / WEIGHTS_FILE)
    del state["base_model.model.score.weight"]
    save_file(state, tmp_path / WEIGHTS_FILE)
    refused_unchanged(toy_net("gpt2"), tmp_path, r"no classification head for this model \(score.weight is missing\)")


# ---------------------------------------------------------------- invariant 8: peft

def save_with_peft(architecture: str, folder, **config) -> torch.Tensor:
    """Trains nothing but sets everything with `peft`, saves, and returns its logits."""
    model = peft.get_peft_model(toy_net(architecture), peft.LoraConfig(
        task_type="SEQ_CLS", **{"r": 4, "lora_alpha": 6, "modules_to_save": list(HEADS[architecture]), **config}))
    torch.manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                p.normal_(std=0.2)
    model.save_pretrained(folder)
    ids, mask = toy_batch()
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("architecture, options", VARIANTS)
def test_an_adapter_saved_here_loads_in_peft(tmp_path, architecture, options):
    classifier = fine_tuned(architecture, **options)
    save_adapter(classifier, tmp_path, "the-base")
    model = peft.PeftModel.from_pretrained(with_other_head(architecture).net, tmp_path).eval()
    ids, mask = toy_batch()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits, logits_of(classifier), atol=1e-5, rtol=0)


TARGETS = {"gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "v_proj", "up_proj"], "bert": ["query", "value"],
           "distilbert": ["q_lin", "lin2"], "mpnet": ["attn.q", "output.dense"]}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("config", [
    {}, {"use_rslora": True}, {"lora_dropout": 0.4}, {"init_lora_weights": "gaussian"},
    {"layers_to_transform": [1]}, {"init_lora_weights": "orthogonal"}, {"init_lora_weights": "mica"},
    {"fan_in_fan_out": True}, {"exclude_modules": [".*0.*"], "layers_to_transform": None}], ids=str)
def test_an_adapter_saved_by_peft_loads_here(tmp_path, architecture, config):
    logits = save_with_peft(architecture, tmp_path, target_modules=TARGETS[architecture], **config)
    classifier = with_other_head(architecture)
    names = load_adapter(classifier.net, tmp_path)
    assert names and all(name.endswith(tuple(TARGETS[architecture])) for name in names)
    assert not torch.allclose(logits, base_logits(architecture), atol=1e-2)
    torch.testing.assert_close(logits_of(classifier.eval()), logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rslora", [False, True])
def test_pefts_rank_and_alpha_patterns_are_followed(tmp_path, rslora):
    logits = save_with_peft("gpt2", tmp_path, target_modules=["c_attn", "c_proj", "c_fc"], use_rslora=rslora,
                            rank_pattern={"c_attn": 2, r"h.1.mlp.c_proj": 7}, alpha_pattern={"mlp.c_proj": 30, "c_fc": 1})
    classifier = with_other_head("gpt2")
    load_adapter(classifier.net, tmp_path)
    layers = {name.removeprefix("transformer.h."): (layer.rank, layer.alpha) for name, layer in
              lora_layers(classifier.net).items()}
    assert layers == {"0.attn.c_attn": (2, 6), "1.attn.c_attn": (2, 6), "0.attn.c_proj": (4, 6), "1.attn.c_proj": (4, 6),
                      "0.mlp.c_fc": (4, 1), "1.mlp.c_fc": (4, 1), "0.mlp.c_proj": (4, 30), "1.mlp.c_proj": (7, 30)}
    torch.testing.assert_close(logits_of(classifier.eval()), logits, atol=1e-5, rtol=0)


def test_slices_are_saved_as_one_block_matrix_of_the_summed_rank(tmp_path):
    classifier = fine_tuned("gpt2", targets=("q", "v", "o"))
    save_adapter(classifier, tmp_path, "the-base")
    config, state = json.loads((tmp_path / CONFIG_FILE).read_text()), load_file(tmp_path / WEIGHTS_FILE)
    fused = [f"transformer.h.{i}.attn.c_attn" for i in (0, 1)]
    assert (config["r"], config["rank_pattern"]) == (4, dict.fromkeys(fused, 8))
    assert (config["lora_alpha"], config["alpha_pattern"]) == (6.0, dict.fromkeys(fused, 12.0))
    assert config["fan_in_fan_out"] is True  # Conv1D stores W transposed
    A, B = (state[f"base_model.model.{fused[0]}.lora_{x}.weight"] for x in "AB")
    assert A.shape == (8, 32) and B.shape == (96, 8)
    assert not B[:32, 4:].any() and not B[32:64].any() and not B[64:, :4].any()
    layer = lora_layers(classifier.net)[fused[0]]
    torch.testing.assert_close(12 / 8 * (B @ A), layer.delta())


def test_modules_of_the_backbone_that_peft_saved_whole_are_restored(tmp_path):
    net = toy_net("bert")
    model = peft.get_peft_model(net, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"],
                                                     modules_to_save=["classifier", "pooler"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                p.normal_(std=0.2)
    model.save_pretrained(tmp_path)
    ids, mask = toy_batch()
    classifier = with_other_head("bert")
    load_adapter(classifier.net, tmp_path)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits_of(classifier.eval()), expected, atol=1e-5, rtol=0)


def lacking_pooler(folder, seed: int = 0) -> str:
    """A masked language model in a folder: BERT without the pooler that its classifier reads."""
    torch.manual_seed(seed)
    BertForMaskedLM(toy_net("bert").config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("saved", [["classifier", "pooler"], ["classifier"]])
def test_pefts_adapter_of_a_base_without_a_pooler_brings_one_or_is_refused(tmp_path, saved):
    base = lacking_pooler(tmp_path / "base")
    torch.manual_seed(3)
    net = BertForSequenceClassification.from_pretrained(base, num_labels=2).eval()
    model = peft.get_peft_model(net, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"],
                                                     modules_to_save=saved))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                p.normal_(std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    classifier, _ = load_classifier(base, 2)
    if "pooler" not in saved:
        with pytest.raises(UserError, match=r"no classification head .*bert.pooler.dense.* is missing; the base lacks it"):
            load_adapter(classifier.net, tmp_path / "adapter")
        assert not lora_layers(classifier.net)
        return
    load_adapter(classifier.net, tmp_path / "adapter")
    ids, mask = toy_batch()
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits_of(classifier.eval()), expected, atol=1e-5, rtol=0)
    trained = {name for name, p in classifier.net.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert trained == {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}


def test_an_adapter_brings_the_pooler_that_its_base_lacked(tmp_path):
    base = lacking_pooler(tmp_path / "base")
    classifier = load_classifier(base, 2)[0].configure("lora", LoRAOptions(rank=2))
    randomize_B(classifier.net)
    nn.init.normal_(classifier.net.bert.pooler.dense.weight, std=0.3)
    (tmp_path / "adapter").mkdir()
    save_adapter(classifier, tmp_path / "adapter", base)
    again, _ = load_classifier(base, 2)
    assert not torch.allclose(again.net.bert.pooler.dense.weight, classifier.net.bert.pooler.dense.weight, atol=0.1)
    load_adapter(again.net, tmp_path / "adapter")
    assert torch.equal(logits_of(again.eval()), logits_of(classifier.eval()))


@pytest.mark.parametrize("names, misread", [
    (["model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.o_proj"], ["model.layers.0.mlp.gate_proj"]),
    (["model.layers.0.self_attn.o_proj"], [])])
def test_layers_that_peft_takes_for_experts_are_named(names, misread):
    assert misread_by_peft("llama", names) == []
    assert misread_by_peft("deepseek_v3", names) == misread


# ---------------------------------------------------------------- what is refused

@pytest.fixture
def saved(tmp_path):
    save_adapter(fine_tuned("gpt2"), tmp_path, "the-base")
    return tmp_path


def test_an_adapter_for_another_base_is_refused(saved):
    refused_unchanged(toy_net("llama"), saved, r"adapter for another base: transformer\.h\.0\.\S+ does not exist in this "
                                               "model; it was made for the-base")
    refused_unchanged(toy_net("gpt2", n_embd=36), saved, r"transformer\.h\.0\.\S+ has another shape")
    refused_unchanged(toy_net("gpt2", n_layer=1), saved, r"transformer\.h\.1\.\S+ does not exist")
    refused_unchanged(toy_net("gpt2", num_labels=5), saved, "score.weight does not exist or has another shape")
    load_adapter(toy_net("gpt2"), saved)


def test_truncated_weights_are_refused_at_every_length(saved):
    data = (saved / WEIGHTS_FILE).read_bytes()
    net = toy_net("gpt2")
    for length in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        (saved / WEIGHTS_FILE).write_bytes(data[:length])
        refused_unchanged(net, saved, "missing or damaged")
    (saved / WEIGHTS_FILE).write_bytes(b"\xff" * len(data))
    refused_unchanged(net, saved, "missing or damaged")


@pytest.mark.parametrize("file, match", [(CONFIG_FILE, "cannot be read"), (WEIGHTS_FILE, "missing or damaged")])
def test_a_missing_file_or_a_folder_in_its_place_is_refused(saved, file, match):
    (saved / file).unlink()
    refused_unchanged(toy_net("gpt2"), saved, match)
    (saved / file).mkdir()
    refused_unchanged(toy_net("gpt2"), saved, match)


@pytest.mark.parametrize("text", ["", "{", "nul", "[]", "3", '"LORA"', "\udcff"])
def test_a_malformed_configuration_is_refused(saved, text):
    (saved / CONFIG_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    refused_unchanged(toy_net("gpt2"), saved, CONFIG_FILE)


# ---------------------------------------------------------------- names in the file

A_KEY = "base_model.model.transformer.h.1.mlp.c_fc.lora_A.weight"


@pytest.mark.parametrize("renamed, match", [
    (A_KEY.removeprefix("base_model.model."), r"does not begin with base_model\.model\., as the names in PEFT's files do"),
    (A_KEY.replace("base_model.model.", "module."), "does not begin with base_model"),
    (A_KEY.replace("base_model.model.", "base_model."), "does not begin with base_model"),
    (A_KEY.replace("transformer.", ""), r"h\.1\.mlp\.c_fc does not exist in this model \(it has transformer\.h\.1\.mlp"),
    (A_KEY.replace("model.transformer", "model.model.transformer"), r"does not exist in this model \(it has"),
    (A_KEY.replace("weight", "default.weight"), r"names the adapter \(default\); expected transformer\.h\.1\.mlp"),
    (A_KEY.replace("lora_A.weight", "lora_magnitude_vector"), "belongs to a variant of LoRA that is not computed here"),
    (A_KEY.replace("lora_A.weight", "lora_B.bias"), "belongs to a variant of LoRA that is not computed here"),
    (A_KEY.replace("mlp.c_fc", "ln_1"), r"transformer\.h\.1\.ln_1 is no linear layer but LayerNorm"),
    ("base_model.model.transformer.wpe.weight", "transformer.wpe.weight does not exist or has another shape"),
    ("base_model.model.score.bias", "score.bias does not exist"), ("", "does not begin with")])
def test_a_key_that_peft_does_not_write_is_named(saved, renamed, match):
    state = load_file(saved / WEIGHTS_FILE)
    value = state.pop(A_KEY)
    if ".lora_" not in renamed:
        state[A_KEY] = value
    save_file({**state, renamed: value.clone()}, saved / WEIGHTS_FILE)
    refused_unchanged(toy_net("gpt2"), saved, match)


@pytest.mark.parametrize("key", ["h.0.ln_1.weight", "h.1.attn.c_attn.bias", "wpe.weight", "ln_f.bias"])
@pytest.mark.parametrize("head", [True, False])
def test_weights_of_the_base_that_no_setting_explains_are_refused(saved, key, head):
    """PEFT would load some of them and leave out others, without a word."""
    net = toy_net("gpt2") if head else gpt2_lm()
    value = net.state_dict()[f"transformer.{key}"].clone() + 1
    save_file({**load_file(saved / WEIGHTS_FILE), f"base_model.model.transformer.{key}": value}, saved / WEIGHTS_FILE)
    refused_unchanged(net, saved, f"transformer.{key} is no LoRA matrix, and modules_to_save does not name", head)
    fresh = adapted("gpt2", trained=False)
    with pytest.raises(UserError, match=f"--init .*: transformer.{key} is no LoRA matrix and not of the head"):
        start_from(fresh, saved, head)


@pytest.mark.parametrize("key", ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "bert.pooler.dense"])
def test_a_module_to_save_without_its_tensors_is_refused(tmp_path, key):
    save_with_peft("bert", tmp_path, target_modules=["query"], modules_to_save=["classifier", "pooler"])
    state = {name: value for name, value in load_file(tmp_path / WEIGHTS_FILE).items() if key not in name}
    save_file(state, tmp_path / WEIGHTS_FILE)
    refused_unchanged(toy_net("bert"), tmp_path, r"bert\.pooler\.dense\.\w+ is missing, and modules_to_save names pooler")


# ---------------------------------------------------------------- the table of settings

def test_every_setting_of_peft_is_read_refused_or_ignored_and_stands_in_the_table():
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields == READ | IGNORED | set(UNSUPPORTED)
    assert len(fields) == len(READ) + len(IGNORED) + len(UNSUPPORTED)
    page = (Path(__file__).resolve().parents[2] / "docs" / "architectures.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (\w+)", page, re.MULTILINE))
    assert {name for name, verdict in rows.items() if name in fields and verdict == "refused"} == set(UNSUPPORTED)
    assert fields <= set(rows)


def test_pefts_defaults_are_read(tmp_path):
    """None of the settings that PEFT writes into every file is taken for one that is not known."""
    save_with_peft("bert", tmp_path, target_modules=["query"])
    assert fields_of(tmp_path) >= {"qalora_group_size", "megatron_core", "peft_version"}
    load_adapter(toy_net("bert"), tmp_path)


def fields_of(folder) -> set[str]:
    return {key for key, value in json.loads((folder / CONFIG_FILE).read_text()).items() if value}


@pytest.mark.parametrize("revision, refused", [(None, False), ("main", False), ("v2", True)])
def test_a_base_of_one_revision_is_not_guessed(saved, revision, refused):
    config = json.loads((saved / CONFIG_FILE).read_text())
    (saved / CONFIG_FILE).write_text(json.dumps(config | {"revision": revision}))
    if not refused:
        assert base_of(saved) == "the-base"
        return
    with pytest.raises(UserError, match="was made for the revision v2 of the-base; give --model"):
        base_of(saved)


@pytest.mark.parametrize("change, match", [
    ({"use_dora": True}, "lora_magnitude_vector is missing"), ({"bias": "all"}, r"\(bias all: biases of the base"),
    ({"lora_bias": True}, "lora_bias"),
    ({"peft_type": "LOHA"}, r"\(LOHA\); expected peft_type LORA"), ({"peft_type": None}, "no peft_type"),
    ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights pissa_niter_16"), ({"init_lora_weights": "olora"}, "olora"),
    ({"lora_alpha": None}, "lora_alpha"), ({"lora_alpha": "many"}, "lora_alpha"), ({"lora_dropout": 1.5}, "lora_dropout"),
    ({"alpha_pattern": ["c_attn"]}, "alpha_pattern"), ({"alpha_pattern": {"(": 1}}, "alpha_pattern"),
    ({"rank_pattern": {"c_fc": "x"}}, "rank_pattern"), ({"r": None}, "r, lora_alpha"), ({"r": 3}, "has rank 4"),
    ({"init_lora_weights": "OLoRA"}, "init_lora_weights OLoRA"), ({"enable_lora": [True]}, "enable_lora, which is not"),
    ({"modules_to_save": "score"}, "modules_to_save is not a list"), ({"modules_to_save": [1]}, "modules_to_save is not"),
    *(({name: {"x": 1}}, name) for name in UNSUPPORTED)], ids=str)
def test_kinds_that_would_be_misread_and_values_that_make_no_sense_are_refused(saved, change, match):
    config = json.loads((saved / CONFIG_FILE).read_text()) | change
    (saved / CONFIG_FILE).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    refused_unchanged(toy_net("gpt2"), saved, match)


@pytest.mark.parametrize("config", [
    {"bias": "lora_only"}, {"bias": "all"}, {"lora_bias": True}, {"velora_config": VeloraConfig()},
    {"monteclora_config": MontecloraConfig()}], ids=str)
def test_pefts_own_unsupported_adapters_are_refused(tmp_path, config):
    save_with_peft("distilbert", tmp_path, target_modules=["q_lin"], **config)
    refused_unchanged(toy_net("distilbert"), tmp_path, "not an adapter that is computed here")


def test_an_embedding_adapter_of_pefts_is_refused_and_not_half_loaded(tmp_path):
    save_with_peft("gpt2", tmp_path, target_modules=["wte", "c_attn"])
    refused_unchanged(toy_net("gpt2"), tmp_path, r"transformer\.wte\.lora_embedding_A is LoRA on an embedding")
    refused_unchanged(gpt2_lm(), tmp_path, r"transformer\.wte\.lora_embedding_A is LoRA on an embedding", head=False)


SHAPE, RANK = "transformer.h.1.mlp.c_fc has another shape", "transformer.h.1.mlp.c_fc has rank 2, and adapter_config"


@pytest.mark.parametrize("change, match", [
    (lambda A, B: (A, None), r"transformer\.h\.1\.mlp\.c_fc\.lora_B\.weight is missing"),
    (lambda A, B: (None, B), r"transformer\.h\.1\.mlp\.c_fc\.lora_A\.weight is missing"),
    (lambda A, B: (A[:2], B), SHAPE), (lambda A, B: (A[0], B), SHAPE), (lambda A, B: (A, B[:, 0]), SHAPE),
    (lambda A, B: (A[:0], B[:, :0]), SHAPE), (lambda A, B: (B, A), SHAPE),
    (lambda A, B: (torch.zeros(()), torch.zeros(())), SHAPE), (lambda A, B: (A[:2], B[:, :2]), RANK)])
def test_pairs_of_A_and_B_that_do_not_belong_together_are_refused(saved, change, match):
    state = load_file(saved / WEIGHTS_FILE)
    key = "base_model.model.transformer.h.1.mlp.c_fc.lora_{}.weight"
    A, B = change(state.pop(key.format("A")), state.pop(key.format("B")))
    state.update({key.format(x): t.contiguous() for x, t in (("A", A), ("B", B)) if t is not None})
    save_file(state, saved / WEIGHTS_FILE)
    refused_unchanged(toy_net("gpt2"), saved, match)


def test_a_file_without_lora_weights_is_refused(saved):
    save_file({"base_model.model.score.weight": torch.zeros(2, 32)}, saved / WEIGHTS_FILE)
    refused_unchanged(toy_net("gpt2"), saved, "no LoRA weights in it")


def test_a_pickled_adapter_is_refused_unread(saved):
    (saved / WEIGHTS_FILE).unlink()
    (saved / "adapter_model.bin").write_bytes(b"cos\nabort\n(tR.")  # would end the process if it were unpickled
    refused_unchanged(toy_net("gpt2"), saved, "adapter_model.safetensors: missing; adapter_model.bin beside it is a pickle")
    (saved / WEIGHTS_FILE).write_bytes(b"cos\nabort\n(tR.")
    refused_unchanged(toy_net("gpt2"), saved, "missing or damaged")


def test_an_adapter_that_names_no_base_asks_for_one(saved):
    config = json.loads((saved / CONFIG_FILE).read_text())
    (saved / CONFIG_FILE).write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match=f"^{saved / CONFIG_FILE}: names no base_model_name_or_path; give --model$"):
        base_of(saved)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path / 'absent' / CONFIG_FILE}: cannot be written"):
        save_adapter(fine_tuned("gpt2"), tmp_path / "absent", "the-base")


def test_tensors_are_read_back_exactly(tmp_path):
    save_file({"x": torch.arange(VOCAB)}, tmp_path / "t.safetensors")
    assert torch.equal(load_tensors(tmp_path / "t.safetensors")["x"], torch.arange(VOCAB))
