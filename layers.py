"""Layers of the student that PyTorch lacks: embeddings with a vocabulary of their own."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from options.schema import RNNConfig


class StudentEmbedding(nn.Embedding):
    """The student's embeddings: a table with a row for each token, or with fewer rows, some of them shared.

    Ids are those of the tokenizer in either case. With `config.vocabulary` the buffer `rows` maps an id to its row, (V,), or
    to the two rows that it is the mean of, (V, 2): those of its pieces.
    """

    def __init__(self, config: RNNConfig):
        super().__init__(config.vocabulary or config.vocab_size, config.embedding_size)
        rows = None
        if config.vocabulary:
            # Any valid map: a distillation writes its own over it, and a saved student has one.
            rows = torch.arange(config.vocab_size, dtype=torch.int32) % config.vocabulary
            if config.rare_tokens == "pieces":
                rows = rows.unsqueeze(1).repeat(1, 2)
        # In the file of the weights, so that a student is read with the rows that it was trained with.
        self.register_buffer("rows", rows)

    def forward(self, ids: Tensor) -> Tensor:  # (B, T) -> (B, T, E)
        if self.rows is None:
            return super().forward(ids)
        vectors = super().forward(self.rows[ids])
        return vectors if self.rows.dim() == 1 else vectors.mean(2)
