"""Several batches in one optimiser step train the same as one large batch, though their losses are means over tokens."""
from dataclasses import replace

import pytest
import torch
from conftest import VOCAB

from data_utils import Batch, collate
from distillation.batching import share_of_step
from distillation.edited import mark_edits
from distillation.heads import Matched
from distillation.losses import kd_objective, transfer_objective
from distillation.pretraining import LanguageModel, pretraining_objective
from distillation.teachers import HiddenStates
from model import DistilRNN, RNNConfig
from train_utils import Data, Hooks, Trainer, TrainOptions

# A teacher's hidden states are known of the first six rows alone; a row of one token has no neighbour to predict.
LENGTHS, TARGETED = [3, 9, 1, 2, 7, 5, 4, 8], 6
# Rows of a step's batches: parts of other numbers of rows and tokens, one of plain text alone.
PARTS = ([0, 1], [2, 3], [6, 7], [4, 5])


def drawn(*shape) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def sentences() -> list[list[int]]:
    ids = torch.randint(1, VOCAB, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    return [row[:length].tolist() for row, length in zip(ids, LENGTHS, strict=True)]


def hidden_states() -> HiddenStates:
    starts = [sum(LENGTHS[:row]) for row in range(TARGETED)]
    ends = [start + length for start, length in zip(starts, LENGTHS, strict=False)]
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    return HiddenStates(drawn(sum(LENGTHS[:TARGETED]), 3).half(), weights, torch.tensor(starts), torch.tensor(ends))


def objectives() -> dict:
    """Returns head and objective of every stage with a mean over tokens, by name."""
    ranks, hidden, marks = torch.arange(VOCAB), hidden_states(), mark_edits(sentences(), {0: [1], 6: [2, 3, 4]})
    soft, gold = (kd_objective(drawn(len(LENGTHS), 2), 2.0, alpha) for alpha in (1.0, 0.5))
    return {"language": (lambda net: LanguageModel(net, ranks), pretraining_objective(None, 0.7)),
            "hidden": (lambda net: LanguageModel(net, None, 3), pretraining_objective(hidden, 1.0)),
            "both": (lambda net: LanguageModel(net, ranks, 3), pretraining_objective(hidden, 0.7)),
            "transfer": (lambda net: Matched(net, 3), transfer_objective(soft, gold, 3, hidden)),
            "edits": (lambda net: Matched(net, edits=True), transfer_objective(None, gold, 3, edits=marks))}


def after_one_step(name: str, batches: list[Batch]) -> tuple[dict[str, torch.Tensor], float]:
    """Returns the gradients of one optimiser step over some batches by name, and its mean loss."""
    torch.manual_seed(0)
    head, objective = objectives()[name]
    model = head(DistilRNN(RNNConfig(VOCAB, embedding_size=6, hidden_size=5, dropout=0.0))).double()
    options = TrainOptions(seed=0, accumulate=len(batches), clip=0.0)
    trainer = Trainer(model, Data(batches, {}), objective, options, None, Hooks())
    found = {}
    trainer.optimizer.step = lambda: found.update(
        {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    trainer.progress.sums = dict.fromkeys(("rows", "tokens"), 0.0)
    trainer.step(batches)
    return found, trainer.progress.sums["loss"] / trainer.progress.sums["rows"]


def batch_of(rows: list[int]) -> Batch:
    return collate(sentences(), [row % 2 for row in range(len(LENGTHS))], rows, 0)


@pytest.mark.parametrize("name", ["language", "hidden", "both", "transfer", "edits"])
@pytest.mark.parametrize("micro", [False, True])
def test_several_batches_in_one_step_equal_one_large_batch(name, micro):
    whole = batch_of(list(range(len(LENGTHS))))
    parts = [batch_of(rows) for rows in PARTS]
    expected, loss = after_one_step(name, [whole])
    # Several batches accumulate; a large one is cut into micro-batches.
    found, same_loss = after_one_step(name, [replace(whole, micro=parts)] if micro else parts)
    assert found.keys() == expected.keys() and same_loss == pytest.approx(loss, rel=1e-9)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-7, atol=1e-9, msg=key)
    # Equal weights of all batches would have been something else.
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-4


@pytest.mark.parametrize("step", ["none", "itself"])
def test_a_batch_that_is_the_whole_step_counts_as_it_is(step):
    batch = batch_of([0, 1, 4])
    batch.step = None if step == "none" else [batch]
    assert share_of_step(batch, lambda one: one.tokens) == 1.0
    assert share_of_step(batch, lambda one: 0) == 0.0
