"""The size of a student within a budget of parameters.

    config = sized_student(options, vocab_size, num_labels, teacher_parameters)
"""
from __future__ import annotations

from collections.abc import Sequence

import torch

from layers import RNNConfig
from machine.errors import UserError
from model import DistilRNN
from options.schema import DistilOptions

# The options that are parts of the student's configuration.
SIZES = ("embedding_size", "hidden_size", "directions", "rnn_layers", "cell", "pooling", "dropout", "vocabulary",
         "rare_tokens", "frozen_embeddings")
STEP, WIDEST = 8, 512  # embeddings and states that are computed are multiples of 8; embeddings are no wider
# Embedding and hidden sizes of a default student, which has the first that fit its budget. Those in stages depend on the
# number of directions in which it reads; the largest fit into 8 MB in 8-bit weights.
STAGED_SIZES = {1: ((128, 352), (96, 264), (64, 176), (48, 132), (32, 88), (24, 66), (16, 44)),
                2: ((128, 288), (96, 216), (64, 144), (48, 108), (32, 72), (24, 54), (16, 36))}
PLAIN_SIZES = ((RNNConfig.embedding_size, RNNConfig.hidden_size), (72, 96), (48, 64), (36, 48), (24, 32), (12, 16))


def student_parameters(config: RNNConfig) -> int:
    """Counts the parameters of a student, embeddings included, without building it."""
    # On the meta device tensors have shapes and no memory.
    with torch.device("meta"):
        return sum(p.numel() for p in DistilRNN(config).parameters())


def sized_student(options: DistilOptions, vocab_size: int, num_labels: int, teacher: int) -> RNNConfig:
    """Returns the student: it fills --student-parameters, or is the largest default within a tenth of its teacher.

    Args:
        teacher: number of the first teacher's parameters.

    Raises:
        UserError: no student fits.
    """
    sizes = {name: getattr(options, name) for name in SIZES}
    if options.student_parameters:
        return filled_config(vocab_size, num_labels, options.student_parameters, **sizes)
    largest_first = PLAIN_SIZES if options.plain else STAGED_SIZES[options.directions]
    return student_config(vocab_size, num_labels, teacher // 10, largest_first, **sizes)


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


def filled_config(vocab_size: int, num_labels: int, budget: int, **sizes) -> RNNConfig:
    """Returns the student that fills `budget` parameters: with the largest state that fits.

    Sizes given explicitly (not None) are taken as they are. Without a given size embeddings take at most half of the budget
    and are no wider than the state.

    Raises:
        UserError: no state fits next to the embeddings, or the sizes given do not fit.
    """
    sizes = {name: value for name, value in sizes.items() if value is not None}
    tables = (sizes.get("vocabulary") or vocab_size) * (2 if sizes.get("frozen_embeddings") else 1)

    def config(**more) -> RNNConfig:
        return RNNConfig(vocab_size, num_labels, **{**more, **sizes})

    # The widest first. The narrowest may not fit either: the error below names it.
    widest = max(1, min(WIDEST, budget // 2 // tables) // STEP) * STEP
    embedding = next((width for width in range(widest, STEP, -STEP)
                      if _fits(config(embedding_size=width, hidden_size=width), budget)), STEP)
    # The number of parameters grows with the state: double it until it is too large, then halve the interval.
    fits, too_large = 0, 1
    while "hidden_size" not in sizes and _fits(config(embedding_size=embedding, hidden_size=too_large * STEP), budget):
        fits, too_large = too_large, 2 * too_large
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        if _fits(config(embedding_size=embedding, hidden_size=middle * STEP), budget):
            fits = middle
        else:
            too_large = middle
    found = config(embedding_size=embedding, hidden_size=max(1, fits) * STEP)
    if not _fits(found, budget):
        raise UserError(f"--student-parameters {budget}: a student with embeddings of {found.embedding_size} and a state of "
                        f"{found.hidden_size} has {student_parameters(found)}; expected a smaller --vocabulary, "
                        "--embedding-size or --hidden-size, or more parameters")
    return found


def _fits(config: RNNConfig, budget: int) -> bool:
    return student_parameters(config) <= budget
