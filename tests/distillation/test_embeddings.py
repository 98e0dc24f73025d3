"""A student's first embeddings: PCA and means of hidden states against NumPy."""
import numpy as np
import pytest
import torch
from conftest import VOCAB, adapted
from hypothesis import given
from hypothesis import strategies as st

from distillation.embeddings import embed_as, fill_in, token_means
from distillation.teachers import HiddenStates
from distillation.vocabulary import token_counts
from model import DistilRNN, RNNConfig


@pytest.mark.parametrize("size", [6, 40])
def test_a_students_embeddings_are_the_teachers_main_components(size):
    """As far as these go: of 32 channels no more than 32 dimensions can be had."""
    teacher = adapted("gpt2")
    torch.manual_seed(0)
    student = DistilRNN(RNNConfig(101, embedding_size=size, hidden_size=5))
    before = student.embedding.weight.detach().clone()
    embed_as(teacher, student)
    rows = teacher.net.base_model.get_input_embeddings().weight.detach().double().numpy()
    centred = rows - rows.mean(0)
    _, _, vectors = np.linalg.svd(centred, full_matrices=False)
    there = min(size, 32)
    expected = centred @ vectors[:there].T
    found = student.embedding.weight.detach()
    scaled = np.abs(expected / expected.std())
    np.testing.assert_allclose(np.abs(found[:, :there].numpy()), scaled, atol=2e-2)
    assert torch.equal(found[:, there:], before[:, there:])


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=8), st.randoms())
def test_a_tokens_mean_is_that_of_its_states_wherever_they_stand(ids, chance):
    order = list(range(len(ids)))
    chance.shuffle(order)
    values = torch.randn(sum(map(len, ids)), 5, generator=torch.Generator().manual_seed(0)).half()
    starts, ends, at, std = [0] * len(ids), [0] * len(ids), 0, torch.tensor([2.0, 1.0, 0.5])
    for row in order:
        starts[row], ends[row], at = at, at + len(ids[row]), at + len(ids[row])
    # Three components, and two scores behind them.
    hidden = HiddenStates(values, torch.ones(5), torch.tensor(starts), torch.tensor(ends), std)
    means = token_means(ids, hidden, 12)
    for token in range(12):
        states = [values[starts[row] + place, :3].double() * std
                  for row, tokens in enumerate(ids) for place, one in enumerate(tokens) if one == token]
        expected = torch.stack(states).mean(0) if states else torch.zeros(3)
        torch.testing.assert_close(means[token], expected.float(), atol=1e-5, rtol=1e-5)


def test_tokens_that_never_occur_are_predicted_from_their_embeddings():
    """Where the means are linear in the embeddings the prediction is right; what stood there is not read."""
    generator = torch.Generator().manual_seed(0)
    static, linear = torch.randn(60, 8, generator=generator), torch.randn(8, 5, generator=generator)
    means, seen = static @ linear + 3, torch.arange(60) % 4 > 0
    found = fill_in(torch.where(seen.unsqueeze(1), means, 99.0), static, seen)
    assert torch.equal(found[seen], means[seen])
    torch.testing.assert_close(found, means, atol=5e-3, rtol=0)


@pytest.mark.parametrize("vocabulary", [None, 40])
def test_contextual_embeddings_are_components_of_the_means(vocabulary):
    generator, teacher = torch.Generator().manual_seed(0), adapted("gpt2")
    ids = torch.randint(0, 90, (30, 7), generator=generator).tolist()
    counts = token_counts(ids, VOCAB)
    static = teacher.net.base_model.get_input_embeddings().weight.detach()
    means = torch.where((counts > 0).unsqueeze(1), torch.randn(VOCAB, 5, generator=generator), 0.0)
    torch.manual_seed(0)
    student = DistilRNN(RNNConfig(VOCAB, embedding_size=6, hidden_size=5, vocabulary=vocabulary))
    rows = np.arange(VOCAB) if vocabulary is None else np.arange(VOCAB) % vocabulary
    first = student.embedding.weight.detach().clone()
    embed_as(teacher, student, counts, means)
    assert (counts[90:] == 0).all()
    # Written out: each row the mean of its tokens, by frequency; without any occurrence a ridge regression.
    weights, table, vectors = counts.double().numpy() + 1e-6, [], []
    for row in range(len(set(rows))):
        share = weights[rows == row] / weights[rows == row].sum()
        table.append(share @ means.double().numpy()[rows == row])
        vectors.append(share @ static.double().numpy()[rows == row])
    table, vectors = np.stack(table), np.stack(vectors)
    seen = np.array([counts.numpy()[rows == row].sum() > 0 for row in range(len(table))])
    inputs, targets = vectors - vectors[seen].mean(0), table - table[seen].mean(0)
    ridge = 1e-4 * (inputs[seen] ** 2).sum(0).mean()
    # The same as rows of data: a ridge is least squares with sqrt(ridge) times the identity below.
    above = np.concatenate([inputs[seen], np.sqrt(ridge) * np.eye(32)])
    linear = np.linalg.lstsq(above, np.concatenate([targets[seen], np.zeros((32, 5))]), rcond=None)[0]
    targets[~seen] = inputs[~seen] @ linear
    centred = targets - targets.mean(0)
    expected = centred @ np.linalg.svd(centred, full_matrices=False)[2].T
    found = student.embedding.weight.detach()
    np.testing.assert_allclose(np.abs(found[:, :5].numpy()), np.abs(expected / expected.std()), atol=2e-2)
    assert torch.equal(found[:, 5:], first[:, 5:])
