"""The size of a student within a budget of parameters."""
from __future__ import annotations

from collections.abc import Sequence

import torch

from machine.errors import UserError
from model import DistilRNN
from options.schema import PLAIN_SIZES, RNNConfig


def student_parameters(config: RNNConfig) -> int:
    """Counts the parameters of a student, embeddings included, without building it."""
    # On the meta device tensors have shapes and no memory.
    with torch.device("meta"):
        return sum(p.numel() for p in DistilRNN(config).parameters())


def student_config(vocab_size: int, num_labels: int, budget: int, largest_first: Sequence[tuple[int, int]] = PLAIN_SIZES,
                   **sizes) -> RNNConfig:
    """Returns the largest default student that fits `budget` parameters.

    Sizes given explicitly (not None) are taken as they are.

    Args:
        largest_first: embedding and hidden sizes to choose from.

    Raises:
        UserError: not even the smallest default fits.
    """
    # Sizes from the command line are taken as they are, whatever they cost.
    sizes = {name: value for name, value in sizes.items() if value is not None}
    for embedding, hidden in largest_first:
        config = RNNConfig(vocab_size, num_labels, **{"embedding_size": embedding, "hidden_size": hidden, **sizes})
        if student_parameters(config) <= budget or {"embedding_size", "hidden_size"} <= set(sizes):
            return config
    raise UserError(f"no default student fits {budget:,} parameters with a vocabulary of {vocab_size:,}; give "
                    "--embedding-size and --hidden-size")
