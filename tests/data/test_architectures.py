"""architectures: a sentence's logits do not depend on its batch, whatever the configuration allows."""

import copy

import pytest
import torch
from conftest import CONTEXT, fast_classifier, logits_of, one_line, toy_batch, toy_net

from data import architectures
from data.architectures import changes_with_length, depends_on_batch
from machine.errors import UserError
from model import TextClassifier, load_classifier

ROPE = {"rope_theta": 10000.0, "factor": 4.0}
LONG = {**ROPE, "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 2.0, 5.0]}


def of_original(positions: int) -> dict:
    """Returns LongRoPE's parameters with other frequencies for sentences beyond so many positions."""
    return {"rope_parameters": {**LONG, "original_max_position_embeddings": positions}}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("architecture, changes, by_length", [
    ("llama", of_original(8), True), ("llama", of_original(20), True), ("llama", of_original(31), True),
    ("llama", {**of_original(20), "pad_token_id": None}, True), ("llama", of_original(CONTEXT), False),
    ("llama", {"rope_parameters": {**ROPE, "rope_type": "dynamic"}}, False),
    ("llama", {"rope_parameters": {**ROPE, "rope_type": "linear"}}, False),
    ("llama", {"rope_parameters": {**ROPE, "rope_type": "yarn", "original_max_position_embeddings": 8}}, False),
    ("bert", {"is_decoder": True}, False), ("bert", {"is_decoder": True, "add_cross_attention": True}, False),
    ("bert", {"chunk_size_feed_forward": 1}, False), ("bert", {}, False), ("distilbert", {}, False),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, False), ("gpt2", {"add_cross_attention": True}, False)])
def test_logits_are_those_of_each_sentence_alone(architecture, changes, by_length, fast):
    net = toy_net(architecture, **changes)
    digest = copy.deepcopy(net.config.to_dict())
    classifier = TextClassifier(net)
    classifier.probe("x")
    assert classifier.by_length == by_length
    assert net.config.to_dict() == digest  # it is recorded
    if fast:
        chosen = classifier.by_length
        classifier = fast_classifier(net)
        classifier.by_length = chosen
    ids, mask = toy_batch((5, 9, 3, 30, 5, 21))
    together = logits_of(classifier.eval(), (ids, mask))
    with torch.no_grad():
        alone = torch.cat([toy_net(architecture, **changes)(input_ids=ids[row:row + 1, :length]).logits
                           for row, length in enumerate(mask.sum(1).tolist())])
    assert together.std(0).min() > 1e-3
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_without_the_probe_long_sentences_change_short_ones():
    """The case above is one: other frequencies move the logits."""
    classifier = TextClassifier(toy_net("llama", **of_original(20)))
    ids, mask = toy_batch((5, 30))
    together = logits_of(classifier.eval(), (ids, mask))[:1]
    assert not torch.allclose(together, logits_of(classifier, (ids[:1, :5], mask[:1, :5])), atol=1e-3)


@pytest.mark.parametrize("rope, positions, changes", [
    ({"rope_type": "longrope", "original_max_position_embeddings": 8}, 8, False),
    ({"rope_type": "longrope", "original_max_position_embeddings": 8}, 9, True),
    ({"rope_type": "longrope"}, 9, True),
    ({"a": {"rope_type": "default"}, "b": {"rope_type": "longrope", "original_max_position_embeddings": 8}}, 9, True),
    ({"a": {"rope_type": "default"}, "b": {"rope_type": "default"}}, 900, False),
    ({"rope_type": "dynamic"}, CONTEXT, False), ({"rope_type": "dynamic"}, CONTEXT + 1, True),
    (None, 900, False), ({}, 9, False)])
def test_a_length_at_which_frequencies_change_is_read(rope, positions, changes):
    config = toy_net("llama").config
    config.rope_parameters = rope
    assert changes_with_length(config, positions) == changes


def test_an_odd_configuration_that_cannot_compute_every_length_is_one_line():
    said = "--model x: a bert classifier does not take token ids alone .*chunk size 2"
    with pytest.raises(UserError, match=said) as error:
        TextClassifier(toy_net("bert", chunk_size_feed_forward=2)).probe("x")
    one_line(error)


def probed(compute, model_type: str = "other", positions: int = 512) -> bool:
    config = copy.deepcopy(toy_net("bert").config)
    config.model_type = model_type
    return depends_on_batch("x", config, compute, positions)


def of_words(ids, mask):
    return (ids * mask).sum(1, keepdim=True).float()


@pytest.mark.parametrize("threshold, depends", [(9, True), (11, True), (100, True), (160, False)])
def test_lengths_up_to_a_window_of_attention_are_tried(threshold, depends):
    assert probed(lambda ids, mask: of_words(ids, mask) * (1 + (ids.shape[1] > threshold))) == depends


@pytest.mark.parametrize("columns", [2, 3])
def test_batches_of_odd_and_even_lengths_are_tried(columns):
    assert probed(lambda ids, mask: of_words(ids, mask) + 50 * (ids.shape[1] % columns == 0))


def test_no_sentence_is_longer_than_the_models_positions():
    widths = []
    probed(lambda ids, mask: (widths.append(ids.shape[1]), of_words(ids, mask))[1], positions=12)
    assert max(widths) == 12 and max(short for short, _ in architectures.LENGTHS) == 9


def test_a_model_that_mixes_sentences_of_one_length_is_refused():
    """A mixture of experts with a capacity, say: no order of computation gives each sentence what it gets alone."""
    said = "--model x: .* depend on the other sentences of a batch, of the same length too"
    with pytest.raises(UserError, match=said) as error:
        probed(lambda ids, mask: of_words(ids, mask) + (of_words(ids, mask).sum() if ids.shape[1] == 6 else 0) * (
            mask.all().item() and len(ids) > 1))
    one_line(error)


def test_a_model_folder_with_longrope_is_computed_by_length(tmp_path):
    toy_net("llama", **of_original(20)).save_pretrained(tmp_path)
    assert load_classifier(str(tmp_path), 2)[0].by_length
