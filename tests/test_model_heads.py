"""model: the task head against `transformers`; blocks and heads of every kind of architecture."""

import json

import pytest
import torch
from conftest import ARCHITECTURES, PAD, adapted, logits_of, one_line, toy_batch, toy_net
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    DistilBertModel,
    GPT2ForSequenceClassification,
)

from benchmarks.architectures import config_of
from data.backbones import load_causal_lm, load_config
from machine.errors import UserError
from model import (
    LoRAOptions,
    TextClassifier,
    inject_lora,
    load_classifier,
    lora_layers,
)

# ---------------------------------------------------------------- the head

@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_equal_the_librarys_own_with_right_padding(architecture):
    net = toy_net(architecture)
    ids, mask = toy_batch()
    with torch.no_grad():
        expected = net(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits_of(TextClassifier(net), (ids, mask)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_do_not_depend_on_batch_mates_or_on_what_the_pads_hold(architecture):
    classifier = adapted(architecture)
    ids, mask = toy_batch((5, 9, 1, 12))
    together = logits_of(classifier, (ids, mask))
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = logits_of(classifier, (ids[row:row + 1, :length], mask[row:row + 1, :length]))
        torch.testing.assert_close(together[row:row + 1], alone, atol=1e-5, rtol=0)
    other_pads = ids.where(mask.bool(), torch.tensor(7))
    torch.testing.assert_close(logits_of(classifier, (other_pads, mask)), together, atol=1e-5, rtol=0)
    other_last = ids.clone()
    other_last[0, 4] = (ids[0, 4] + 1) % PAD  # the last real token is read
    assert not torch.allclose(logits_of(classifier, (other_last, mask))[0], together[0], atol=1e-4)


def test_a_pad_token_that_is_a_real_token_does_not_confuse_the_pooling():
    classifier = adapted("gpt2")
    ids, mask = toy_batch((6, 6))
    ids[0, 5] = PAD  # pad == eos, at the end of a sentence: a real token all the same
    changed = ids.clone()
    changed[0, 5] = 3
    before, after = logits_of(classifier, (ids, mask)), logits_of(classifier, (changed, mask))
    assert not torch.allclose(before[0], after[0], atol=1e-3)
    torch.testing.assert_close(before[1], after[1])


def test_a_language_model_under_a_head_is_the_librarys_classifier_for_the_same_weights(gpt2_folder):
    lm, config = load_causal_lm(str(gpt2_folder)), load_config(str(gpt2_folder))
    torch.manual_seed(5)
    classifier = TextClassifier.from_causal_lm(lm, num_labels=3).eval()
    assert not classifier.net.score.weight.any()  # even odds to begin with
    nn.init.normal_(classifier.net.score.weight)
    config.num_labels, config.pad_token_id = 3, PAD
    reference = GPT2ForSequenceClassification(config).eval()
    reference.load_state_dict(classifier.net.state_dict())
    ids, mask = toy_batch()
    with torch.no_grad():
        expected = reference(input_ids=ids, attention_mask=mask).logits
    assert expected.shape == (4, 3)
    torch.testing.assert_close(logits_of(classifier, (ids, mask)), expected, atol=1e-5, rtol=0)
    assert classifier.net.base_model is lm.base_model  # shared, not copied
    assert not any(p.is_meta for p in classifier.parameters()) and not any(b.is_meta for b in classifier.buffers())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_mode_reaches_base_dropout_only_where_the_base_is_trained(architecture):
    net = toy_net(architecture)
    inject_lora(net, LoRAOptions(rank=2, dropout=0.5))
    classifier = TextClassifier(net).train()
    layers = set(lora_layers(net).values())
    inside = {m for layer in layers for m in layer.modules()}
    backbone = [m for m in net.base_model.modules() if m not in inside]
    assert not any(m.training for m in backbone)
    assert all(layer.dropout.training for layer in layers)
    assert all(m.training for name, m in net.named_children() if name != net.base_model_prefix)
    classifier.configure("full")
    assert all(m.training for m in classifier.train().modules())
    assert not any(m.training for m in classifier.eval().modules())


def test_base_dropout_leaves_lora_logits_alone_and_moves_those_of_a_fully_trained_model():
    classifier = adapted("gpt2", trained=True)
    expected = logits_of(classifier.eval())
    assert torch.equal(logits_of(classifier.train()), expected)
    classifier.configure("full")
    assert not torch.allclose(logits_of(classifier.train()), expected, atol=1e-3)


def test_an_encoder_folder_gets_the_librarys_own_head(tmp_path):
    torch.manual_seed(0)
    net = toy_net("distilbert")
    DistilBertModel(net.config).save_pretrained(tmp_path)
    classifier, lm = load_classifier(str(tmp_path), 3)
    assert lm is None and not classifier.decoder
    assert classifier.head_names() == ["pre_classifier", "classifier"] and classifier.net.classifier.out_features == 3


@pytest.mark.parametrize("classes", [2, 5])
def test_a_head_that_was_saved_gives_way_to_a_fresh_one(tmp_path, classes):
    """Somebody's fine-tuned checkpoint of two classes: its head knows another task, were their numbers equal."""
    saved = toy_net("bert")
    saved.save_pretrained(tmp_path)
    torch.manual_seed(1)
    net = load_classifier(str(tmp_path), classes)[0].net
    assert net.classifier.out_features == classes and not net.classifier.bias.any()
    assert net.classifier.weight.std().item() == pytest.approx(saved.config.initializer_range, rel=0.3)
    assert classes == 5 or not torch.equal(net.classifier.weight, saved.classifier.weight)
    bert, other = net.bert.state_dict(), saved.bert.state_dict()
    assert bert.keys() == other.keys() and all(torch.equal(bert[key], other[key]) for key in bert)


def test_a_backbone_of_another_shape_is_refused_and_not_drawn_anew(tmp_path):
    toy_net("bert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(UserError, match="cannot be loaded: bert.*has another shape than config.json says"):
        load_classifier(str(tmp_path), 2)


# ---------------------------------------------------------------- blocks that are not all alike, heads of every kind

def library_net(architecture: str):
    """A toy classifier of any architecture of the library, with random weights."""
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config_of(architecture)).eval()


def ids_with_ends(lengths: tuple[int, ...] = (5, 9, 3, 12)) -> tuple[torch.Tensor, torch.Tensor]:
    """A toy batch in the ids of `config_of`, with an end token at each sentence's end, which BART and T5 pool at."""
    ids, mask = toy_batch(lengths)
    ids = (3 + ids % 20).scatter(1, mask.sum(1, keepdim=True) - 1, 2)
    return ids.where(mask.bool(), torch.tensor(config_of("bert").pad_token_id)), mask


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture, by_length", [
    ("deberta", False), ("eurobert", False), ("bart", False), ("t5", False), ("falcon", False), ("jamba", False),
    ("xlnet", True), ("fnet", True), ("ctrl", True), ("t5gemma", True), ("nystromformer", True)])
def test_logits_are_the_librarys_of_each_sentence_alone(architecture, by_length):
    """Whatever a head reads and blocks mix; where pads would have a say, sentences of each length are computed apart."""
    classifier = TextClassifier(library_net(architecture))
    classifier.probe(architecture)
    ids, mask = ids_with_ends()
    together = logits_of(classifier.eval(), (ids, mask))
    with torch.no_grad():
        alone = torch.cat([library_net(architecture)(input_ids=ids[row:row + 1, :length]).logits
                           for row, length in enumerate(mask.sum(1).tolist())])
    assert classifier.by_length == by_length and together.std(0).min() > 1e-3
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)


def test_sentences_of_one_length_come_back_in_their_order():
    classifier = TextClassifier(library_net("fnet"))
    classifier.by_length = True
    ids, mask = ids_with_ends((5, 7, 5, 3, 7))
    order = torch.tensor([4, 2, 0, 3, 1])
    torch.testing.assert_close(logits_of(classifier, (ids[order], mask[order])), logits_of(classifier, (ids, mask))[order])


def test_blocks_of_two_kinds_are_adapted_where_they_have_the_layer():
    net = library_net("deepseek_v3")  # one dense block, one with experts
    with pytest.warns(UserWarning) as said:
        names = inject_lora(net, LoRAOptions(rank=4))
    assert "every linear layer of its blocks is adapted" in str(said[0].message)
    assert set(names) == set(lora_layers(net))
    ends = {block: {name.rpartition(".")[2] for name in names if f".{block}.mlp" in name} for block in (0, 1)}
    assert ends[0] == ends[1] == {"gate_proj", "up_proj", "down_proj"}  # of the dense layer, and of the shared expert
    assert any("layers.1.mlp.shared_experts.up_proj" in name for name in names)
    with pytest.raises(UserError, match=r"--layers 1: none of these blocks has a layer mlp.gate_proj"):
        inject_lora(library_net("deepseek_v3"), LoRAOptions(rank=4, targets=("mlp.gate_proj",), layers="1"))


def test_layers_too_narrow_for_the_rank_are_left_out_where_all_are_adapted():
    net = library_net("jamba")
    with pytest.warns(UserWarning, match="every linear layer"):
        narrow = {name for name in inject_lora(net, LoRAOptions(rank=2))}
    with pytest.warns(UserWarning, match="every linear layer"):
        wide = set(inject_lora(library_net("jamba"), LoRAOptions(rank=8)))
    assert wide < narrow and {name.rpartition(".")[2] for name in narrow - wide} == {"dt_proj"}
    with pytest.raises(UserError, match="--rank 8: expected 1 to 2 for mamba.dt_proj"):
        inject_lora(library_net("jamba"), LoRAOptions(rank=8, targets=("dt_proj",)))


def test_recurrent_layers_beside_llamas_are_adapted_too():
    """Qwen3.5 names attention and MLP as Llama does, and has blocks of linear attention beside them."""
    net = library_net("qwen3_5_text")
    with pytest.warns(UserWarning, match="every linear layer"):
        names = inject_lora(net, LoRAOptions(rank=4))
    assert any("linear_attn" in name for name in names) and any("self_attn.q_proj" in name for name in names)
    assert inject_lora(library_net("qwen3_5_text"), LoRAOptions(rank=4, targets=("q", "v"))) == [
        "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]


def test_what_peft_would_misread_is_said():
    with pytest.warns(UserWarning, match="PEFT takes model.layers.0.mlp.gate_proj of a deepseek_v3 model for its experts"):
        inject_lora(library_net("deepseek_v3"), LoRAOptions(rank=4, targets=("mlp.gate_proj",)))


@pytest.mark.parametrize("architecture, named", [
    ("perceiver", "the head of a perceiver classifier is a part of its backbone"),
    ("reformer", "a reformer classifier draws random numbers in evaluation too")])
def test_a_classifier_that_cannot_be_served_is_refused_in_one_line(tmp_path, architecture, named):
    library_net(architecture).base_model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"--model {tmp_path}: {named}") as error:
        load_classifier(str(tmp_path), 2)
    one_line(error)


def test_a_classifier_that_needs_more_than_token_ids_is_refused_in_one_line(monkeypatch):
    net = library_net("deberta")

    def forward(input_ids, boxes, **more):
        raise AssertionError
    monkeypatch.setattr(net, "forward", forward)
    with pytest.raises(UserError, match=r"--model x: a deberta classifier does not take token ids alone \(.*boxes") as error:
        TextClassifier(net).probe("x")
    one_line(error)
