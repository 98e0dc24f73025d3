"""A student as a language model and with a projection: nothing leaks, nothing of it is left in the student."""
import pytest
import torch
from conftest import VOCAB, toy_batch

from data_utils import Batch
from distillation.heads import Matched
from distillation.pretraining import LanguageModel, first_layer, token_ranks
from model import DistilRNN, RNNConfig


def student(layers: int = 1, cell: str = "lstm", directions: int = 2) -> DistilRNN:
    torch.manual_seed(0)
    return DistilRNN(RNNConfig(VOCAB, embedding_size=6, hidden_size=5, directions=directions, rnn_layers=layers, cell=cell,
                               dropout=0.0))


@pytest.mark.parametrize(("layers", "cell"), [(1, "lstm"), (2, "lstm"), (2, "gru"), (2, "mingru")])
def test_no_direction_has_read_the_token_that_it_predicts(layers, cell):
    """With another token at one place, each direction's state beside it stays what it was."""
    net, (ids, mask) = student(layers, cell), toy_batch((6, 6))
    first = LanguageModel(net, torch.arange(VOCAB)).rnn
    other = ids.clone()
    other[:, 3] = (ids[:, 3] + 1) % VOCAB
    with torch.no_grad():
        one, two = (net.states(x, mask, first) for x in (ids, other))
    assert torch.equal(one[:, :3, :5], two[:, :3, :5]) and torch.equal(one[:, 4:, 5:], two[:, 4:, 5:])
    assert not torch.equal(one[:, 3], two[:, 3])


@pytest.mark.parametrize("directions", [1, 2])
def test_the_language_models_loss_is_the_mean_of_its_directions(directions):
    net, (ids, mask) = student(directions=directions), toy_batch((5, 9, 1, 12))
    ranks = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))
    model = LanguageModel(net, ranks).eval()
    with torch.no_grad():
        found = model(ids, mask).language
        states, losses = net.states(ids, mask), ([], [])
        for row, length in enumerate(mask.sum(1).tolist()):
            for t in range(length - 1):
                ahead = model.softmax.log_prob(states[row, t, :5][None])[0, ranks[ids[row, t + 1]]]
                losses[0].append(-ahead)
                if directions == 2:
                    behind = model.softmax.log_prob(states[row, t + 1, 5:][None])[0, ranks[ids[row, t]]]
                    losses[1].append(-behind)
    torch.testing.assert_close(found, sum(torch.stack(one).mean() for one in losses[:directions]) / directions)


@pytest.mark.parametrize("directions", [1, 2])
def test_the_first_layer_shares_its_parameters(directions):
    net = student(2, directions=directions)
    first = first_layer(net)
    assert all(p is getattr(net.rnn, name) for name, p in first.named_parameters()) and first.num_layers == 1


@pytest.mark.parametrize("lengths", [(6, 6), (5, 9, 1)])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("matched", [1, 2])
def test_a_matched_student_gives_its_own_logits_and_a_row_for_each_real_token(lengths, directions, matched):
    net, inputs = student(directions=directions), toy_batch(lengths)
    model = Matched(net, 3, directions=matched).train()
    outputs = model(*inputs)
    assert torch.equal(outputs.logits, net(*inputs)) and outputs.matched.shape == (sum(lengths), 3)
    states = net.states(*inputs)[0, :lengths[0], :5 * min(matched, directions)]
    torch.testing.assert_close(outputs.matched[:lengths[0]], model.projection(states))
    assert torch.equal(model.eval()(*inputs), net.eval()(*inputs))


@pytest.mark.parametrize("directions", [1, 2])
def test_the_detector_of_edits_reads_every_state_and_is_no_part_of_the_student(directions):
    net, inputs = student(directions=directions), toy_batch((5, 9, 1))
    model = Matched(net, edits=True).train()
    outputs = model(*inputs)
    assert torch.equal(outputs.logits, net(*inputs)) and outputs.edited.shape == (15,) and outputs.matched is None
    torch.testing.assert_close(outputs.edited[:5], model.detector(net.states(*inputs)[0, :5]).squeeze(-1))
    assert torch.equal(model.eval()(*inputs), net.eval()(*inputs))
    assert Matched(net, 3).detector is None and Matched(net, 3, edits=True).train()(*inputs).matched.shape == (15, 3)


def test_ranks_are_by_frequency():
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    batch = Batch(torch.tensor([[4, 2, 4], [2, 4, 9]]), mask, torch.zeros(2), torch.arange(2), 5)
    assert token_ranks([batch], 10)[[4, 2, 9]].tolist()[:2] == [0, 1] and token_ranks([batch], 10)[9] > 1
