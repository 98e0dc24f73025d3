"""What is reduced of a teacher: PCA against NumPy's singular values, its hidden states against the library's."""
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import adapted, toy_batch

from data_utils import Batch
from distillation import teachers
from distillation.labels import Joined, hidden_states, logits_alone
from distillation.pca import principal_components
from distillation.teachers import HiddenStates, Teacher, mean_logits, states_and_logits, token_scores
from machine.errors import UserError
from record.tensors import load_checked, save_checked


def test_principal_components_are_those_of_a_singular_value_decomposition():
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9)
    pca = principal_components(rows, 3)
    centred = rows.double().numpy() - rows.double().numpy().mean(0)
    _, values, vectors = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs((vectors[:3] * pca.components.T.numpy()).sum(1)), 1, atol=1e-5)
    np.testing.assert_allclose(pca.std.numpy(), values[:3] / np.sqrt(50), rtol=1e-5)
    reduced = pca.reduce(rows)
    np.testing.assert_allclose(reduced.mean(0).numpy(), 0, atol=1e-5)
    np.testing.assert_allclose(reduced.numpy().std(0), 1, rtol=1e-4)
    assert all(column[column.abs().argmax()] > 0 for column in pca.components.T)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert"])
def test_hidden_states_are_the_librarysof_real_tokens(architecture):
    teacher, (ids, mask) = adapted(architecture), toy_batch()
    one = Batch(ids, mask, torch.zeros(4, dtype=torch.int64), torch.arange(4), int(mask.sum()))
    found = hidden_states(teacher, one)
    with torch.no_grad():
        rows = [teacher.net(input_ids=ids[row:row + 1, :length], output_hidden_states=True).hidden_states[-1][0]
                for row, length in enumerate(mask.sum(1).tolist())]
    torch.testing.assert_close(found, torch.cat(rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert", "distilbert", "mpnet"])
def test_states_and_logits_come_of_one_forward_pass(architecture):
    teacher, (ids, mask) = adapted(architecture), toy_batch()
    one = Batch(ids, mask, torch.zeros(4, dtype=torch.int64), torch.arange(4), int(mask.sum()))
    with torch.no_grad():
        states, logits = hidden_states(teacher, one), teacher(ids, mask)
    passes = []
    teacher.net.base_model.register_forward_hook(lambda *_: passes.append(1))
    found = states_and_logits(teacher, one)
    assert len(passes) == 1
    torch.testing.assert_close(found, (states, logits), atol=1e-5, rtol=1e-5)
    assert torch.equal(logits_alone(teacher, one), found[1])


def test_a_backbone_without_a_state_for_each_token_has_logits_all_the_same(monkeypatch):
    teacher, (ids, mask) = adapted("bert"), toy_batch()
    one = Batch(ids, mask, torch.zeros(4, dtype=torch.int64), torch.arange(4), int(mask.sum()))
    check = teachers.of_real_tokens
    monkeypatch.setattr(teachers, "of_real_tokens", lambda teacher, states, batch: check(teacher, states[:, ::2], batch))
    with pytest.raises(UserError, match="does not give one hidden state a token; choose --match none"):
        states_and_logits(teacher, one)
    with torch.no_grad():
        expected = teacher(ids, mask)
    assert torch.equal(logits_alone(teacher, one), expected)


def test_the_last_tokens_scores_are_the_logits_around_their_mean():
    teacher, (ids, mask) = adapted("gpt2"), toy_batch()
    one = Batch(ids, mask, torch.zeros(4, dtype=torch.int64), torch.arange(4), int(mask.sum()))
    with torch.no_grad():
        logits, scores = teacher(ids, mask), token_scores(teacher, hidden_states(teacher, one))
    last = mask.sum(1).cumsum(0) - 1
    torch.testing.assert_close(scores[last], logits - logits.mean(-1, keepdim=True), atol=1e-5, rtol=1e-5)
    assert token_scores(adapted("bert"), torch.zeros(3, 32)).shape == (3, 0)


def test_several_teachers_are_averaged():
    one, other = adapted("gpt2"), adapted("gpt2", seed=5)
    with torch.no_grad():
        parts = [teacher(*toy_batch()) for teacher in (one, other)]
    assert not torch.allclose(*parts)
    torch.testing.assert_close(mean_logits(parts), (parts[0] + parts[1]) / 2)
    # The softmax of mean logits is the probabilities' geometric mean, normalised.
    product = np.prod([part.double().softmax(-1).numpy() for part in parts], axis=0) ** 0.5
    np.testing.assert_allclose(mean_logits(parts).double().softmax(-1), product / product.sum(-1, keepdims=True), rtol=1e-5)


def test_a_teacher_reads_its_own_separator_between_columns():
    assert Teacher(None, None, None).texts(["one </s> two"]) == ["one </s> two"]
    assert Teacher(None, None, None, (" </s> ", " [SEP] ")).texts(["one </s> two"]) == ["one [SEP] two"]


def test_joined_files_are_read_as_one_and_take_no_memory_of_the_process(tmp_path):
    whole = torch.randn(9, 4).half()
    for number, (start, end) in enumerate(((0, 4), (4, 5), (5, 9))):
        save_checked(tmp_path / f"{number}", {"hidden": whole[start:end]}, "key")
    joined = Joined([load_checked(tmp_path / f"{number}")[0]["hidden"] for number in range(3)])
    assert joined.shape == (9, 4)
    states = HiddenStates(joined, torch.ones(4), torch.tensor([0, 1, 4, 5]), torch.tensor([1, 4, 5, 9]))
    rows = torch.tensor([3, 0, 2, 1])
    assert states.of(rows).equal(torch.cat([whole[5:9], whole[:1], whole[4:5], whole[1:4]]).float())
    # Linux lists the files that are mapped.
    if (maps := Path("/proc/self/maps")).exists():
        assert str(tmp_path / "2") in maps.read_text()


def test_hidden_states_are_taken_by_row():
    starts, ends = torch.tensor([0, 1, 3]), torch.tensor([1, 3, 6])
    states = HiddenStates(torch.arange(12).view(6, 2).half(), torch.ones(2), starts, ends)
    assert states.of(torch.tensor([2, 0])).tolist() == [[6, 7], [8, 9], [10, 11], [0, 1]]
