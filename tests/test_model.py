"""model: what is injected, the head against `transformers`, DistilRNN against NumPy."""

import json

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, CONTEXT, PAD, VOCAB, adapted, logits_of, one_line, randomize_B, toy_batch, toy_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

from benchmarks.architectures import config_of
from data.backbones import blocks_of, load_causal_lm, load_config
from lora import adapters
from lora.linear import lora_layers
from model import (
    ROLES,
    DistilRNN,
    LoRAOptions,
    RNNConfig,
    TextClassifier,
    count_parameters,
    find_targets,
    inject_lora,
    load_classifier,
    parse_layers,
    probe,
    student_config,
    student_parameters,
)
from record.files import UserError


def base_logits(architecture: str) -> torch.Tensor:
    return logits_of(TextClassifier(toy_net(architecture)))


# ---------------------------------------------------------------- invariants 1 to 5

@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fresh_adapter_changes_no_logit_and_a_trained_one_does(architecture):
    fresh = adapted(architecture, trained=False)
    assert all(not layer.lora_B.any() for layer in lora_layers(fresh.net).values())
    assert torch.equal(logits_of(fresh), base_logits(architecture))
    randomize_B(fresh.net)
    assert (logits_of(fresh) - base_logits(architecture)).abs().min() > 1e-3


def test_each_adapted_layer_alone_reaches_the_logits():
    classifier = adapted("gpt2", trained=False)
    base = logits_of(classifier)
    for name, layer in lora_layers(classifier.net).items():
        nn.init.normal_(layer.lora_B)
        assert not torch.allclose(logits_of(classifier), base, atol=1e-3), name
        nn.init.zeros_(layer.lora_B)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("targets", [ROLES, ("q", "v")])
def test_adapter_and_head_get_gradients_and_move_and_nothing_else_does(architecture, targets):
    classifier = adapted(architecture, trained=False, targets=targets).train()
    base = base_logits(architecture)
    ids, mask = toy_batch()
    parameters = dict(classifier.net.named_parameters())
    heads = tuple(name + "." for name in classifier.head_names())
    ours = {name for name in parameters if ".lora_" in name or name.startswith(heads)}
    before = {name: value.clone() for name, value in classifier.net.state_dict().items()}
    optimiser = torch.optim.AdamW(classifier.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        optimiser.zero_grad()
        nn.functional.cross_entropy(classifier(ids, mask), torch.tensor([0, 1, 1, 0])).backward()
        assert {name for name, p in parameters.items() if p.grad is not None} == ours
        optimiser.step()
    assert {name for name, value in classifier.net.state_dict().items() if not torch.equal(value, before[name])} == ours
    assert any(name.startswith(heads) for name in ours) and any("embed" in n or "wte" in n for n in before)
    assert not torch.allclose(logits_of(classifier.eval()), base, atol=1e-3)


VARIANTS = [(a, {}) for a in ARCHITECTURES] + [("gpt2", {"targets": ("q", "v")}), ("llama", {"rslora": True})]


@pytest.mark.parametrize("architecture, options", VARIANTS)
def test_merged_equals_unmerged_twice_is_once_and_unmerge_restores(architecture, options):
    classifier = adapted(architecture, **options)
    unmerged = logits_of(classifier)
    assert not torch.allclose(unmerged, base_logits(architecture), atol=1e-2)
    before = {name: p.clone() for name, p in classifier.net.named_parameters()}
    adapters.merge_adapter(classifier.net)
    once = {name: p.clone() for name, p in classifier.net.named_parameters()}
    assert sum(not torch.equal(once[n], before[n]) for n in before) == len(lora_layers(classifier.net))
    torch.testing.assert_close(logits_of(classifier), unmerged, atol=1e-5, rtol=0)
    adapters.merge_adapter(classifier.net)
    assert all(torch.equal(p, once[name]) for name, p in classifier.net.named_parameters())
    adapters.unmerge_adapter(classifier.net)
    for name, p in classifier.net.named_parameters():
        torch.testing.assert_close(p, before[name], atol=1e-6, rtol=0)
    torch.testing.assert_close(logits_of(classifier), unmerged, atol=1e-5, rtol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_value_in_the_last_layer_refuses_the_merge_of_all(value):
    classifier = adapted("gpt2")
    layers = list(lora_layers(classifier.net).values())
    before = {name: p.clone() for name, p in classifier.net.named_parameters() if ".base." in name}
    with torch.no_grad():
        layers[-1].lora_B[0, 0] = value
    for merge in (lambda: adapters.merge_adapter(classifier.net), layers[-1].merge):
        with pytest.raises(ValueError, match="not finite; nothing was merged"):
            merge()
        assert not any(layer.merged for layer in layers)
        assert all(torch.equal(p, before[n]) for n, p in classifier.net.named_parameters() if n in before)


def test_the_seed_before_injection_fixes_A():
    first, again, other = (adapted("gpt2", seed=s, trained=False).net.state_dict() for s in (1, 1, 2))
    A = [name for name in first if name.endswith("lora_A")]
    assert A and all(torch.equal(first[n], again[n]) and not torch.equal(first[n], other[n]) for n in A)


# ---------------------------------------------------------------- what is adapted

EXPECTED_TARGETS = {
    "gpt2": {"q": {"attn.c_attn"}, "o": {"attn.c_proj"}, "mlp": {"mlp.c_fc", "mlp.c_proj"}},
    "llama": {"q": {"self_attn.q_proj"}, "k": {"self_attn.k_proj"}, "v": {"self_attn.v_proj"},
              "o": {"self_attn.o_proj"}, "mlp": {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}},
    "bert": {"q": {"attention.self.query"}, "k": {"attention.self.key"}, "v": {"attention.self.value"},
             "o": {"attention.output.dense"}, "mlp": {"intermediate.dense", "output.dense"}},
    "distilbert": {"q": {"attention.q_lin"}, "k": {"attention.k_lin"}, "v": {"attention.v_lin"},
                   "o": {"attention.out_lin"}, "mlp": {"ffn.lin1", "ffn.lin2"}},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_roles_name_each_architectures_projections(architecture):
    backbone = toy_net(architecture).base_model
    for role, names in EXPECTED_TARGETS[architecture].items():
        assert set(find_targets(backbone, (role,))) == names
    linears = {name for name, module in next(iter(blocks_of(backbone).values())).named_modules()
               if isinstance(module, (nn.Linear, Conv1D))}
    assert set(find_targets(backbone, ROLES)) == linears == set.union(*EXPECTED_TARGETS[architecture].values())


@pytest.mark.parametrize("pattern, names", [
    ("c_proj", {"attn.c_proj", "mlp.c_proj"}), ("*.c_fc", {"mlp.c_fc"}), ("mlp.c_fc", {"mlp.c_fc"}),
    ("mlp.*", {"mlp.c_fc", "mlp.c_proj"}), ("*", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"})])
def test_patterns_match_whole_names_or_dotted_endings(pattern, names):
    assert find_targets(toy_net("gpt2").base_model, (pattern,)) == dict.fromkeys(names)


@pytest.mark.parametrize("targets, slices", [
    (("q",), [(0, 32)]), (("k",), [(32, 64)]), (("v", "q"), [(0, 32), (64, 96)]), (("q", "k", "v"), [(0, 96)]),
    (("c_attn",), [(0, 96)]), (("q", "c_attn"), [(0, 96)]), (("c_attn", "q"), [(0, 96)])])
def test_roles_slice_the_fused_projection_and_patterns_take_it_whole(targets, slices):
    layers = lora_layers(adapted("gpt2", targets=targets).net)
    assert list(layers) == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    assert all(layer.slices == slices for layer in layers.values())


def test_q_and_v_of_the_fused_projection_leave_k_exactly_as_it_was():
    net, base = adapted("gpt2", targets=("q", "v")).net, toy_net("gpt2")
    x = torch.randn(2, 6, 32)
    y, plain = net.transformer.h[0].attn.c_attn(x), base.transformer.h[0].attn.c_attn(x)
    assert [torch.equal(a, b) for a, b in zip(y.split(32, -1), plain.split(32, -1), strict=True)] == [False, True, False]


def test_the_returned_names_are_the_adapted_modules_of_the_chosen_layers():
    for architecture in ARCHITECTURES:
        net = toy_net(architecture)
        names = inject_lora(net, LoRAOptions(rank=2, layers="1"))
        assert set(names) == set(lora_layers(net)) and len(names) == len(set(names))
        assert names and all(".1." in name and ".0." not in name for name in names)


UNKNOWN = {
    "gpt_neox": (GPTNeoXForSequenceClassification, GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=CONTEXT), {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h",
                                           "mlp.dense_4h_to_h"}),
    "opt": (OPTForSequenceClassification, OPTConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32,
        max_position_embeddings=CONTEXT), {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
                                           "fc1", "fc2"}),
}


@pytest.mark.parametrize("architecture", UNKNOWN)
def test_an_unknown_architecture_is_adapted_in_every_linear_layer_of_its_blocks(architecture):
    net_class, config, names = UNKNOWN[architecture]
    torch.manual_seed(0)
    net = net_class(config).eval()
    classifier = TextClassifier(net)
    base = logits_of(classifier)
    with pytest.warns(UserWarning, match="are not known here; every linear layer of its blocks is adapted: "):
        assert len(inject_lora(net, LoRAOptions(rank=2))) == 2 * len(names)
    assert {name.split(".layers.")[1][2:] for name in lora_layers(net)} == names
    assert torch.equal(logits_of(classifier), base)
    randomize_B(net, std=1.0)
    assert not torch.allclose(logits_of(classifier), base, atol=1e-3)


@pytest.mark.parametrize("architecture", UNKNOWN)
def test_a_role_of_an_unknown_architecture_is_refused_and_its_modules_are_named(architecture):
    net_class, config, names = UNKNOWN[architecture]
    net = net_class(config)
    with pytest.raises(UserError, match=rf"--targets q: the roles of a {architecture} model") as error:
        inject_lora(net, LoRAOptions(targets=("q", "v")))
    assert set(one_line(error).split(": ")[-1].split(", ")) == names
    assert len(inject_lora(net, LoRAOptions(rank=2, targets=(sorted(names)[0],)))) == 2


@pytest.mark.parametrize("options, named", [
    ({"rank": 0}, "--rank 0: expected 1 to 32 for attn.c_attn (32 x 96)"),
    ({"rank": -1}, "--rank -1: expected 1 to 32"), ({"rank": 33}, "--rank 33: expected 1 to 32"),
    ({"targets": ("c_attnn",)}, "--targets c_attnn: matches no linear layer; expected any of q, k, v, o, mlp, or a "
                                "pattern for attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj"),
    ({"targets": ("q", "wte")}, "--targets wte: matches no"), ({"targets": ("ln_1",)}, "--targets ln_1: matches no"),
    ({"layers": "0-2"}, "--layers 0-2: expected block numbers 0 to 1"), ({"layers": "2"}, "--layers 2:")])
def test_what_cannot_be_adapted_is_named_in_one_line(options, named):
    net = toy_net("gpt2")
    with pytest.raises(UserError) as error:
        inject_lora(net, LoRAOptions(**{"rank": 2, **options}))
    assert one_line(error).startswith(named)
    assert not lora_layers(net)


def test_a_rank_that_fits_only_some_layers_adapts_none():
    net = toy_net("llama")  # two key-value heads: k and v have 16 outputs
    with pytest.raises(UserError, match=r"--rank 17: expected 1 to 16 for self_attn.k_proj \(32 x 16\)"):
        inject_lora(net, LoRAOptions(rank=17))
    assert not lora_layers(net)
    assert inject_lora(net, LoRAOptions(rank=16))


@given(st.lists(st.tuples(st.integers(0, 23), st.integers(0, 23)).map(sorted), min_size=1, max_size=6),
       st.sampled_from([",", ", ", " ,"]))
def test_layers_are_the_union_of_their_ranges(ranges, comma):
    text = comma.join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
    expected = sorted({n for a, b in ranges for n in range(a, b + 1)})
    assert parse_layers(text, 24) == expected
    if expected[-1] > 0:
        with pytest.raises(UserError, match="--layers"):
            parse_layers(text, expected[-1])


@given(st.text(alphabet="0123456789-, x٣", max_size=8))
def test_any_text_is_block_numbers_in_range_or_one_error(text):
    try:
        layers = parse_layers(text, 12)
    except UserError:
        return
    assert layers == sorted(set(layers)) and layers and 0 <= layers[0] and layers[-1] < 12


@pytest.mark.parametrize("text", ["", ",", "3-1", "-1", "1-", "0,,1", "0;1", "a", "1.5", "12", "0-12"])
def test_malformed_layers_are_refused(text):
    with pytest.raises(UserError, match="expected block numbers 0 to 11, such as 0-11") as error:
        parse_layers(text, 12)
    one_line(error)


def test_no_layers_given_means_all():
    assert parse_layers(None, 3) == [0, 1, 2]


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
    probe(classifier, architecture)
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
        probe(TextClassifier(net), "x")
    one_line(error)


# ---------------------------------------------------------------- full-size counts

def on_meta(net_class, config, **options) -> nn.Module:
    """A full-size model without its weights; with options, adapted."""
    with torch.device("meta"):
        net = net_class(config)
    if options:
        inject_lora(net, LoRAOptions(**options))
    return net


def test_gpt2_has_124439808_parameters_and_1179648_in_a_rank_8_adapter():
    assert count_parameters(on_meta(GPT2LMHeadModel, GPT2Config()))["total"] == 124_439_808
    net = on_meta(GPT2ForSequenceClassification, GPT2Config(), rank=8)
    assert sum(p.numel() for name, p in net.named_parameters() if ".lora_" in name) == 1_179_648
    head = 2 * 768
    counts = count_parameters(net)
    assert counts["trainable"] == 1_179_648 + head
    assert counts["total"] == 124_439_808 + 1_179_648 + head
    assert counts["reduction_percent"] == pytest.approx(100 * (1 - counts["trainable"] / counts["total"]))
    assert len(lora_layers(net)) == 48


def test_distilbert_has_66955010_parameters_592130_in_its_head_and_12_layers_for_q_and_v():
    net = on_meta(DistilBertForSequenceClassification, DistilBertConfig())
    assert count_parameters(net) == {"total": 66_955_010, "trainable": 66_955_010, "reduction_percent": 0.0}
    net.base_model.requires_grad_(False)
    assert count_parameters(net)["trainable"] == 592_130
    net = on_meta(DistilBertForSequenceClassification, DistilBertConfig(), rank=8, targets=("q", "v"))
    assert len(lora_layers(net)) == 12
    assert count_parameters(net)["trainable"] == 592_130 + 12 * 8 * (768 + 768)


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


# ---------------------------------------------------------------- the student

def student(seed: int = 0, **sizes) -> DistilRNN:
    torch.manual_seed(seed)
    return DistilRNN(RNNConfig(VOCAB, **{"embedding_size": 6, "hidden_size": 5, **sizes})).eval()


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize("rnn_layers", [1, 2])
def test_student_logits_do_not_depend_on_batch_mates_or_padding(cell, pooling, rnn_layers):
    net = student(cell=cell, pooling=pooling, rnn_layers=rnn_layers)
    ids, mask = toy_batch((5, 9, 1, 12))
    with torch.no_grad():
        together = net(ids, mask)
        wider = net(*(nn.functional.pad(t, (0, 4)) for t in (ids, mask)))
        alone = torch.cat([net(ids[i:i + 1, :n], mask[i:i + 1, :n]) for i, n in enumerate(mask.sum(1).tolist())])
    assert together.std(0).min() > 1e-3  # rows differ
    torch.testing.assert_close(alone, together, atol=1e-6, rtol=0)
    torch.testing.assert_close(wider, together, atol=1e-6, rtol=0)


def lstm_direction(x: np.ndarray, weights: dict, suffix: str) -> np.ndarray:
    """One direction of an LSTM, (T, E) -> (T, H): Hochreiter and Schmidhuber 1997, with the forget gate."""
    w_ih, w_hh, b_ih, b_hh = (weights[f"rnn.{n}_l0{suffix}"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h = c = np.zeros(w_hh.shape[1])
    states = []
    for step in x:
        i, f, g, o = np.split(w_ih @ step + b_ih + w_hh @ h + b_hh, 4)
        i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
        c = f * c + i * np.tanh(g)
        h = o * np.tanh(c)
        states.append(h)
    return np.stack(states)


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_the_lstm_student_is_its_formula_in_float64(pooling):
    net = student(pooling=pooling)
    weights = {name: p.detach().double().numpy() for name, p in net.named_parameters()}
    ids, mask = toy_batch((7, 4))
    with torch.no_grad():
        logits = net(ids, mask)
    for row, length in enumerate((7, 4)):
        x = weights["embedding.weight"][ids[row, :length].numpy()]
        states = np.concatenate([lstm_direction(x, weights, ""), lstm_direction(x[::-1], weights, "_reverse")[::-1]], axis=1)
        pooled = states.max(0) if pooling == "max" else states.mean(0)
        expected = weights["classifier.weight"] @ pooled + weights["classifier.bias"]
        np.testing.assert_allclose(logits[row].numpy(), expected, atol=1e-6)


def test_student_dropout_acts_in_training_only():
    net = student(dropout=0.5)
    assert not torch.equal(net.train()(*toy_batch()), net(*toy_batch()))
    assert torch.equal(net.eval()(*toy_batch()), net(*toy_batch()))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 50_000), st.integers(2, 5), st.integers(1_000, 13_000_000))
def test_a_default_student_fits_its_budget_or_there_is_none(vocab_size, num_labels, budget):
    try:
        config = student_config(vocab_size, num_labels, budget)
    except UserError:
        smallest = RNNConfig(vocab_size, num_labels, 12, 16)
        assert student_parameters(smallest) > budget
        return
    assert student_parameters(config) <= budget


def test_parameters_are_counted_without_building_the_student():
    for cell in ("lstm", "gru"):
        config = RNNConfig(VOCAB, embedding_size=6, hidden_size=5, rnn_layers=2, cell=cell)
        assert student_parameters(config) == count_parameters(DistilRNN(config))["total"]


def test_the_default_student_for_gpt2_is_not_shrunk_and_is_about_five_million():
    config = student_config(50_257, 2, budget=12_443_980)
    assert (config.embedding_size, config.hidden_size, config.cell, config.pooling) == (96, 128, "lstm", "max")
    assert student_parameters(config) == 50_257 * 96 + 2 * 4 * 128 * (96 + 128 + 2) + 2 * (256 + 1)
    assert 4_900_000 < student_parameters(config) < 5_200_000


def test_sizes_given_are_taken_as_they_are():
    config = student_config(1000, 2, budget=10, embedding_size=50, hidden_size=60, cell="gru", dropout=None)
    assert (config.embedding_size, config.hidden_size, config.cell, config.dropout) == (50, 60, "gru", 0.3)
    assert student_config(1000, 2, budget=200_000, hidden_size=100).hidden_size == 100
