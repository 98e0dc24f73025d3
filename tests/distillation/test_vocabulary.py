"""The student's own vocabulary: rows against a loop over sorted tokens, and a student against one with a whole table."""
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import VOCAB, adapted, toy_batch
from hypothesis import given
from hypothesis import strategies as st

from distillation.embeddings import embed_as
from distillation.student_size import student_parameters
from distillation.vocabulary import row_means, token_counts, vocabulary_rows
from model import DistilRNN, RNNConfig


def config(vocabulary: int, vocab_size: int = VOCAB, **more) -> RNNConfig:
    return RNNConfig(vocab_size, **{"embedding_size": 6, "hidden_size": 5, "vocabulary": vocabulary, **more})


def spelling(*names):
    """A tokenizer that knows how its tokens are spelt, and nothing else."""
    return SimpleNamespace(convert_ids_to_tokens=lambda ids: [names[one] for one in ids])


@given(st.lists(st.lists(st.integers(0, 39), min_size=1), max_size=20), st.integers(16, 40))
def test_frequent_tokens_have_a_row_each_and_the_others_share_the_last_ones(ids, vocabulary):
    counts = token_counts(ids, 40)
    occurring = Counter(token for row in ids for token in row)
    assert counts.tolist() == [occurring[token] for token in range(40)]
    rows = vocabulary_rows(counts, config(vocabulary, 40), None).tolist()
    buckets = vocabulary // 16
    order = sorted(range(40), key=lambda token: (-occurring[token], token))
    frequent, rare = order[:vocabulary - buckets], order[vocabulary - buckets:]
    assert [rows[token] for token in frequent] == list(range(vocabulary - buckets))
    assert [rows[token] for token in rare] == [vocabulary - buckets + at % buckets for at in range(len(rare))]


NAMES = ("Ġun", "happy", "Ġhappy", "ness", "ing", "s", "Ġ", *(f"<{number}>" for number in range(8)),
         "Ġunhappy", "happiness", "Ġhappys", "Ġxyz", "zzz")


@pytest.mark.parametrize("token, beginning, ending", [
    ("Ġunhappy", "Ġun", "happy"), ("Ġhappys", "Ġhappy", "s"), ("happiness", None, "ness"), ("Ġxyz", None, None),
    ("zzz", None, None)])
def test_a_rare_token_is_its_longest_known_beginning_and_ending(token, beginning, ending):
    """16 rows: 15 for the first 15 names, and one bucket."""
    counts = torch.arange(len(NAMES), 0, -1)
    rows = vocabulary_rows(counts, config(16, len(NAMES), rare_tokens="pieces"), spelling(*NAMES))
    assert rows[:15].tolist() == [[row, row] for row in range(15)]
    expected = [15 if piece is None else NAMES.index(piece) for piece in (beginning, ending)]
    assert rows[NAMES.index(token)].tolist() == expected


def test_an_ending_is_a_continuation_where_the_tokenizer_marks_them():
    names = ("walk", "ing", "##ing", *(f"<{number}>" for number in range(12)), "walking", None)
    rows = vocabulary_rows(torch.arange(len(names), 0, -1), config(16, len(names), rare_tokens="pieces"), spelling(*names))
    assert rows[-2:].tolist() == [[0, 2], [15, 15]]


@given(st.lists(st.integers(0, 5), min_size=12, max_size=12), st.lists(st.integers(0, 3), min_size=12, max_size=12),
       st.integers(8, 12))
def test_shared_rows_are_means_weighted_by_frequency(counts, rows, tokens):
    vectors = torch.randn(tokens, 3, generator=torch.Generator().manual_seed(0))
    means, known = row_means(vectors, torch.tensor(counts), torch.tensor(rows, dtype=torch.int32))
    assert known.tolist() == sorted({*rows[:tokens]})
    for row, mean in zip(known.tolist(), means, strict=True):
        members = [token for token in range(tokens) if rows[token] == row]
        weights = np.array([counts[token] for token in members], dtype=np.float64)
        # Where no token of a row occurs, all count alike.
        weights = weights if weights.sum() else np.ones(len(members))
        expected = weights @ vectors[members].double().numpy() / weights.sum()
        np.testing.assert_allclose(mean.numpy(), expected, atol=2e-5)
        if len(members) == 1:
            assert torch.equal(mean, vectors[members[0]])


@pytest.mark.parametrize("rare_tokens", ["buckets", "pieces"])
def test_a_student_with_fewer_rows_is_one_whose_table_has_every_tokens_vector(rare_tokens):
    torch.manual_seed(0)
    small = DistilRNN(config(40, rare_tokens=rare_tokens)).eval()
    small.embedding.rows.copy_(torch.randint(0, 40, small.embedding.rows.shape))
    whole = DistilRNN(RNNConfig(VOCAB, embedding_size=6, hidden_size=5)).eval()
    table = small.embedding.weight.detach()
    rows = small.embedding.rows.long().view(VOCAB, -1)
    vectors = torch.stack([sum(table[row] for row in its_rows) / len(its_rows) for its_rows in rows.tolist()])
    weights = {name: value for name, value in small.state_dict().items() if "embedding" not in name}
    whole.load_state_dict({**weights, "embedding.weight": vectors})
    with torch.no_grad():
        logits = small(*toy_batch())
        assert logits.std(0).min() > 1e-3
        torch.testing.assert_close(logits, whole(*toy_batch()), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rare_tokens", ["buckets", "pieces"])
def test_the_first_embeddings_are_components_of_the_rows_means(rare_tokens):
    teacher = adapted("gpt2")
    torch.manual_seed(0)
    student = DistilRNN(config(32, rare_tokens=rare_tokens))
    counts = torch.randint(0, 9, (VOCAB,), generator=torch.Generator().manual_seed(1))
    names = [f"Ġword{number % 7}" if number % 2 else f"part{number}" for number in range(VOCAB)]
    student.embedding.rows.copy_(vocabulary_rows(counts, student.config, spelling(*names)))
    embed_as(teacher, student, counts)
    vectors = teacher.net.base_model.get_input_embeddings().weight.detach()
    means, known = row_means(vectors, counts, student.embedding.rows)
    centred = means.double().numpy() - means.double().numpy().mean(0)
    _, _, components = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ components[:6].T
    found = student.embedding.weight.detach()[known].numpy()
    np.testing.assert_allclose(np.abs(found), np.abs(expected / expected.std()), atol=2e-2)
    assert len(known) >= 30


def test_a_frozen_copy_stays_as_the_first_embeddings_were_and_is_read():
    student = DistilRNN(config(40, frozen_embeddings=True, rnn_layers=2))
    assert torch.equal(student.embedding.frozen, student.embedding.weight)
    embed_as(adapted("gpt2"), student, torch.arange(VOCAB))
    first = student.embedding.weight.detach().clone()
    assert torch.equal(student.embedding.frozen, first) and student.rnn.input_size == 12
    ids, mask = toy_batch()
    vectors = student.embedding(ids)
    expected = first[student.embedding.rows[ids].long()]
    assert torch.equal(vectors[..., :6], expected) and torch.equal(vectors[..., 6:], expected)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=1.0)
    student(ids, mask).square().sum().backward()
    optimizer.step()
    assert student.embedding.frozen.grad is None and torch.equal(student.embedding.frozen, first)
    assert not torch.equal(student.embedding.weight, first)
    # The copy matters to the logits, and counts.
    before = student.eval()(ids, mask)
    student.embedding.frozen.zero_()
    assert not torch.allclose(before, student(ids, mask))
    alone = student_parameters(config(40, rnn_layers=2))
    assert student_parameters(student.config) == alone + 40 * 6 + 2 * 4 * 5 * 6
