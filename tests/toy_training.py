"""A toy model and toy batches for the tests of the training loop and of its checkpoints."""
import numpy as np
import pytest
import torch
from torch import nn

import train_utils
from data_utils import bucket_by_length, collate
from train_utils import Data, TrainOptions

OPTIONS = TrainOptions(seed=7, epochs=2, lr=0.05, warmup=0.1)


class ToyModel(nn.Module):
    """Embedding, frozen layer, dropout, mean over real tokens, norm, head named as a classifier's."""

    def __init__(self, seed: int = 0, size: int = 6, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.ModuleDict({"embedding": nn.Embedding(20, size), "frozen": nn.Linear(size, size),
                                  "norm": nn.LayerNorm(size), "score": nn.Linear(size, 2)})
        # Frozen weights are no part of a checkpoint: whoever resumes has the same ones again.
        nn.init.orthogonal_(self.net["frozen"].weight, generator=torch.Generator().manual_seed(5))
        nn.init.zeros_(self.net["frozen"].bias)
        self.net["frozen"].requires_grad_(False)
        self.dropout = nn.Dropout(dropout)

    def head_names(self):
        return ["score"]

    def forward(self, input_ids, attention_mask):
        hidden = self.dropout(torch.tanh(self.net["frozen"](self.net["embedding"](input_ids))))
        mask = attention_mask.unsqueeze(-1)
        return self.net["score"](self.net["norm"]((hidden * mask).sum(1) / mask.sum(1)))


def toy_batches(rows: int = 20, size: int = 4, seed: int = 0):
    """Random sentences whose label says whether their first token is below 10."""
    draw = np.random.default_rng(seed)
    ids = [draw.integers(0, 20, draw.integers(1, 7)).tolist() for _ in range(rows)]
    labels = [int(tokens[0] < 10) for tokens in ids]
    return [collate(ids, labels, chosen, 0) for chosen in bucket_by_length([len(t) for t in ids], size, seed)]


def toy_dev():
    return {"in_domain": toy_batches(12, 5, seed=1), "out_of_domain": toy_batches(8, 5, seed=2)}


def toy_data() -> Data:
    return Data(toy_batches(), toy_dev())


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def without_times(history: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in history]


def scripted(monkeypatch: pytest.MonkeyPatch, in_domain: list[tuple[float, float]]) -> None:
    """Replaces validation by given (MCC, loss) pairs; another split is best in epoch 1."""
    results = iter([{"in_domain": {"mcc": mcc, "loss": loss}, "out_of_domain": {"mcc": -epoch, "loss": epoch}}
                    for epoch, (mcc, loss) in enumerate(in_domain)])
    monkeypatch.setattr(train_utils, "validate", lambda *_: (next(results), {}))
