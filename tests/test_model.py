"""model: what LoRA adapts, and what that does to logits and gradients."""


import pytest
import torch
from conftest import (
    ARCHITECTURES,
    CONTEXT,
    VOCAB,
    adapted,
    fast_classifier,
    logits_of,
    one_line,
    randomize_B,
    toy_batch,
    toy_net,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

from adapters import peft_layout
from data.architectures import find_targets, parse_layers
from data.backbones import blocks_of
from machine.errors import UserError
from model import (
    LoRAOptions,
    TextClassifier,
    count_parameters,
    inject_lora,
    lora_layers,
)
from options.schema import ROLES


def base_logits(architecture: str) -> torch.Tensor:
    return logits_of(fast_classifier(toy_net(architecture)))


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
    peft_layout.merge_adapter(classifier.net)
    once = {name: p.clone() for name, p in classifier.net.named_parameters()}
    assert sum(not torch.equal(once[n], before[n]) for n in before) == len(lora_layers(classifier.net))
    torch.testing.assert_close(logits_of(classifier), unmerged, atol=1e-5, rtol=0)
    peft_layout.merge_adapter(classifier.net)
    assert all(torch.equal(p, once[name]) for name, p in classifier.net.named_parameters())
    peft_layout.unmerge_adapter(classifier.net)
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
    for merge in (lambda: peft_layout.merge_adapter(classifier.net), layers[-1].merge):
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
    "mpnet": {"q": {"attention.attn.q"}, "k": {"attention.attn.k"}, "v": {"attention.attn.v"},
              "o": {"attention.attn.o"}, "mlp": {"intermediate.dense", "output.dense"}},
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


def test_modernberts_fused_projection_has_the_values_last():
    """Without queries or without keys attention is the mean of all values; without values it is nothing."""
    layers = lora_layers(adapted("modernbert", targets=("v",)).net)
    assert layers and all(layer.slices == [(60, 90)] for layer in layers.values())
    net, (ids, mask), found = toy_net("modernbert"), toy_batch(), []
    attention = net.base_model.layers[0].attn
    attention.register_forward_hook(lambda module, args, output: found.append(output[0]))
    weight = attention.Wqkv.weight.detach().clone()
    with torch.no_grad():
        for rows in (slice(0), slice(0, 30), slice(30, 60), slice(60, 90)):
            attention.Wqkv.weight.copy_(weight)
            attention.Wqkv.weight[rows] = 0
            net(input_ids=ids, attention_mask=mask)
    whole, without_q, without_k, without_v = (one[mask.bool()] for one in found)
    torch.testing.assert_close(without_q, without_k)
    assert not torch.allclose(whole, without_q, atol=1e-3) and not without_v.any() and without_q.any()


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
