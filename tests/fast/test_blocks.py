"""fused: the shorter way gives the library's logits and gradients, and really is shorter."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES, PAD, adapted, fast_classifier, logits_of, toy_batch, toy_net
from torch import nn

from data.backbones import blocks_of
from fast.attention import Rotate, unique_tokens
from fast.blocks import FAMILIES, fuse
from model import LoRAOptions, TextClassifier, inject_lora
from train_utils import trainable


def plain(classifier: TextClassifier) -> TextClassifier:
    """The same classifier on the library's way."""
    classifier.has_fused_blocks = False
    return classifier


OPTIONS = [{}, {"targets": ("q", "v")}, {"layers": "1-1"}, {"layers": "0-0"}, {"dropout": 0.3}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_gradients_are_those_of_the_librarys_way(architecture, options):
    found = []
    for classifier in (adapted(architecture, **options), plain(adapted(architecture, **options))):
        assert classifier.fused == (not found)
        ids, mask = toy_batch()
        logits = classifier(ids, mask)
        F.cross_entropy(logits, torch.tensor([0, 1, 1, 0])).backward()
        found.append((logits.detach(), {n: p.grad for n, p in trainable(classifier).items()}))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=0)
    assert found[0][1].keys() == found[1][1].keys()
    for name, grad in found[1][1].items():
        # A query that is never read gets none here, and zeros there.
        torch.testing.assert_close(found[0][1][name], grad, atol=1e-5 * max(1, float(grad.abs().max())), rtol=0, msg=name)


@pytest.mark.parametrize("changes", [{"activation_function": "gelu_pytorch_tanh"}, {"activation_function": "gelu"},
                                     {"scale_attn_by_inverse_layer_idx": True}], ids=str)
def test_gpt2s_variants_give_the_librarys_logits(changes):
    net = toy_net("gpt2", **changes)
    ids, mask = toy_batch()
    with torch.no_grad():
        expected = net(input_ids=ids, attention_mask=mask).logits
    classifier = fast_classifier(net)
    assert classifier.has_fused_blocks
    torch.testing.assert_close(logits_of(classifier), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sizes", [
    {"hidden_size": 15, "num_attention_heads": 3, "intermediate_size": 7, "num_hidden_layers": 3},
    {"hidden_size": 33, "num_attention_heads": 1, "intermediate_size": 65, "num_hidden_layers": 1}], ids=str)
@pytest.mark.parametrize("every", [False, True])
def test_mpnets_odd_sizes_give_the_librarys_states_with_a_bias_that_matters(sizes, every):
    net = toy_net("mpnet", max_position_embeddings=80, **sizes)
    nn.init.normal_(net.base_model.encoder.relative_attention_bias.weight, std=2)
    # Distances on both sides of the first bucket that holds several (8), and pads.
    ids, mask = toy_batch((3, 70, 1, 41))
    with torch.no_grad():
        states = net.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        expected = net(input_ids=ids, attention_mask=mask).logits
        classifier = fast_classifier(net)
        found = []
        net.base_model.register_forward_hook(lambda module, args, output: found.append(output[0]))
        torch.testing.assert_close(classifier.batch_logits(ids, mask, every), expected, atol=1e-5, rtol=0)
        assert found[0].shape[1] == (70 if every else 1)
        real = mask.bool()[:, :found[0].shape[1]]
        torch.testing.assert_close(found[0][real], states[:, :found[0].shape[1]][real], atol=1e-5, rtol=0)
        net.base_model.encoder.relative_attention_bias.weight.zero_()
        assert (classifier(ids, mask) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kinds", [["c2p"], ["p2c"], ["c2p", "p2c"]], ids=str)
@pytest.mark.parametrize("changes", [
    {"share_att_key": True, "position_buckets": 6}, {"share_att_key": False, "position_buckets": -1},
    {"share_att_key": False, "position_buckets": 6, "norm_rel_ebd": "none", "position_biased_input": True,
     "type_vocab_size": 2, "embedding_size": 11}], ids=str)
def test_debertas_distances_are_the_librarys_in_all_forms(kinds, changes):
    # Sentences longer than the buckets and than the span of 12 distances, and pads.
    net = toy_net("deberta-v2", pos_att_type=kinds, max_relative_positions=12, max_position_embeddings=80, **changes)
    net.requires_grad_(False)
    nn.init.normal_(net.base_model.encoder.rel_embeddings.weight, std=2)
    ids, mask = toy_batch((3, 70, 1, 41))
    found = []
    for classifier in (fast_classifier(net), plain(fast_classifier(net))):
        assert classifier.fused == (not found)
        states = []
        hook = net.base_model.register_forward_hook(lambda module, args, output, to=states: to.append(output[0]))
        logits = [classifier.batch_logits(ids, mask, every) for every in (False, True)]
        logits.append(classifier.batch_logits(ids[:, :3], torch.ones(4, 3, dtype=torch.long)))
        hook.remove()
        found.append((logits, states[1][mask.bool()]))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    net.base_model.encoder.rel_embeddings.weight.zero_()
    assert (classifier.batch_logits(ids, mask) - found[0][0][0]).abs().max() > 1e-3


def test_a_deberta_with_a_convolution_or_without_distances_keeps_the_librarys_blocks():
    for changes in ({"conv_kernel_size": 3}, {"pos_att_type": []}, {"relative_attention": False}):
        assert not fast_classifier(toy_net("deberta-v2", **changes)).has_fused_blocks


def test_a_head_that_reads_all_tokens_gets_them():
    net = toy_net("modernbert", classifier_pooling="mean")
    ids, mask = toy_batch()
    with torch.no_grad():
        expected = net(input_ids=ids, attention_mask=mask).logits
        first = toy_net("modernbert")(input_ids=ids, attention_mask=mask).logits
    classifier = fast_classifier(net)
    assert classifier.has_fused_blocks and (expected - first).abs().max() > 1e-3
    torch.testing.assert_close(logits_of(classifier, (ids, mask)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture, changes", [
    ("gpt2", {"activation_function": "relu"}), ("llama", {"hidden_act": "relu"}), ("bert", {"is_decoder": True}),
    ("gemma3_text", {"use_bidirectional_attention": True})], ids=str)
def test_what_is_not_known_is_left_alone(architecture, changes):
    net = toy_net(architecture, **changes)
    before = [type(module) for module in net.modules()]
    assert not fuse(net.base_model) and [type(module) for module in net.modules()] == before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_library_s_own_call_is_as_before(architecture):
    """Generation, and whoever calls the backbone, find the library's model."""
    net, ids = toy_net(architecture), toy_batch((6, 6))[0]
    with torch.no_grad():
        before = net.base_model(input_ids=ids).last_hidden_state
        fast_classifier(net)
        assert torch.equal(net.base_model(input_ids=ids).last_hidden_state, before)
    assert before.shape[1] == 6


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_last_blocks_mlp_sees_the_pooled_tokens_only(architecture):
    classifier = adapted(architecture)
    last = list(blocks_of(classifier.net.base_model).values())[-1]
    down = [module for module in last.modules() if isinstance(module, nn.LayerNorm) or "RMSNorm" in type(module).__name__]
    assert down
    norm = {"gpt2": "ln_f", "llama": "norm"}.get(architecture)
    module = getattr(classifier.net.base_model, norm) if norm else down[-1]
    shapes = []
    module.register_forward_hook(lambda module, args, out: shapes.append(out.shape[:-1].numel()))
    logits_of(classifier)
    assert shapes == [4]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_fully_trained_backbone_and_an_unfrozen_one_get_their_gradients(architecture):
    for full in (False, True):
        classifier = fast_classifier(toy_net(architecture)).eval()
        classifier.configure("full" if full else "lora")
        classifier.requires_grad_(True)
        classifier(*toy_batch()).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in classifier.net.base_model.layers[0].parameters()) \
            if architecture == "llama" else classifier.net.base_model.wpe.weight.grad.any()


def test_a_backbone_unfrozen_in_part_is_refused_and_not_trained_in_part():
    net = toy_net("gpt2")
    inject_lora(net, LoRAOptions(rank=2))
    classifier = fast_classifier(net)
    net.base_model.h[0].mlp.c_fc.base.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="requires a gradient"):
        classifier(*toy_batch())


# ---------------------------------------------------------------- rows

def test_sentences_share_the_rows_of_their_common_beginning_and_no_others():
    ids = torch.tensor([[5, 6, 7, PAD], [5, 6, 8, 9], [6, 6, 7, PAD], [5, 6, 7, PAD]])
    mask = (ids != PAD).long()
    rows = unique_tokens(ids, mask)
    assert rows.ids[:, 0].tolist() == [5, 6, 7, 8, 9, 6, 6, 7]
    assert rows.positions[:, 0].tolist() == [0, 1, 2, 2, 3, 0, 1, 2]
    assert rows.index.view(4, 4).tolist() == [[0, 1, 2, 2], [0, 1, 3, 4], [5, 6, 7, 7], [0, 1, 2, 2]]
    assert rows.last.tolist() == [2, 4, 7, 2]
    assert rows.first.tolist() == [0, 1, 2, 6, 7, 8, 9, 10]
    x = torch.randn(8, 3)
    assert torch.equal(rows.gather(rows.spread(x)), x)


@pytest.mark.parametrize("architecture", ["mistral", "qwen2"])
def test_a_window_hides_what_stands_before_it(architecture):
    """The windows of 4 tokens in two blocks reach 6 tokens back."""
    classifier = fast_classifier(toy_net(architecture, **({} if architecture == "mistral" else {"max_window_layers": 0})))
    ids, mask = toy_batch((12, 12, 5))
    changed = ids.clone()
    changed[:, :12 - 7] = (ids[:, :12 - 7] + 1) % PAD
    found, again = logits_of(classifier, (ids, mask)), logits_of(classifier, (changed, mask))
    torch.testing.assert_close(found[:2], again[:2], atol=1e-5, rtol=0)
    assert (found[2] - again[2]).abs().max() > 1e-3
    changed[:, 12 - 7] = (ids[:, 12 - 7] + 1) % PAD
    assert (found[:2] - logits_of(classifier, (changed, mask))[:2]).abs().min() > 1e-4


def test_where_nothing_is_shared_nothing_is_moved():
    rows = unique_tokens(torch.tensor([[1, 2], [3, 4]]), torch.ones(2, 2, dtype=torch.int64))
    assert rows.index is None and rows.first is None and rows.mask is None
    x = torch.randn(4, 3)
    assert rows.spread(x).data_ptr() == x.data_ptr() == rows.gather(rows.spread(x)).data_ptr()


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2", "qwen3"])
def test_shared_beginnings_change_neither_logits_nor_gradients(architecture):
    ids, mask = toy_batch((5, 9, 5, 12))
    ids[1, :4] = ids[0, :4]
    ids[2] = ids[0]
    assert len(unique_tokens(ids, mask).ids) == 5 + 5 + 12
    found = []
    for classifier in (adapted(architecture), plain(adapted(architecture))):
        logits = classifier(ids, mask)
        logits[:, 0].square().sum().backward()
        found.append([logits.detach(), *(p.grad for p in trainable(classifier).values())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * max(1, float(theirs.abs().max())), rtol=0)


def test_rotation_has_the_gradient_of_its_formula():
    torch.manual_seed(0)
    angle = torch.randn(3, 2, dtype=torch.float64).repeat(1, 2)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    turned = lambda x: Rotate.apply(x.clone(), angle.cos(), angle.sin(), 8)  # noqa: E731
    assert torch.autograd.gradcheck(turned, x)
    heads = x[:, :8].view(3, 2, 4)
    half = torch.cat([-heads[..., 2:], heads[..., :2]], -1)
    expected = heads * angle.cos()[:, None] + half * angle.sin()[:, None]
    torch.testing.assert_close(turned(x), torch.cat([expected.flatten(1), x[:, 8:]], 1), atol=1e-12, rtol=0)


def test_the_page_names_every_family():
    page = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text()
    named = page.partition("fused blocks and are the fastest: ")[2].partition(". All others")[0]
    types = {name.replace("-", "_").removesuffix("_text") for name in re.findall("`([a-z0-9_-]+)`", named)}
    assert types == {name.partition(".")[0] for name in FAMILIES}
