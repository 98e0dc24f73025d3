"""The student's own vocabulary: rows of its embedding table for frequent tokens, shared rows for all others.

    counts = token_counts(ids, vocab_size)                      # in the transfer set and the training set
    rows = vocabulary_rows(counts, config, tokenizer)           # the buffer `rows` of the student's embeddings
    vectors, known = row_means(teacher_vectors, counts, rows)   # the first embeddings of those rows

Frequencies are those of sentences that train: no development sentence is counted.
"""
from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from layers import RNNConfig

SHARE = 16  # one row out of so many is a bucket: rare tokens share it
NEVER = 1e-6  # count of a token that never occurs: next to nothing among others, and something in a row without others


def token_counts(ids: Iterable[list[int]], vocab_size: int) -> Tensor:
    """Counts each token id, (vocab_size,), in lists of token ids."""
    # An array of integers, because a list of a million sentences' tokens would take eight times the memory.
    flat = np.fromiter(itertools.chain.from_iterable(ids), np.int64)
    return torch.from_numpy(np.bincount(flat, minlength=vocab_size))


def vocabulary_rows(counts: Tensor, config: RNNConfig, tokenizer) -> Tensor:
    """Returns the row of each token id, (vocab_size,), or with `pieces` two rows, (vocab_size, 2), as int32.

    The most frequent tokens have a row each. The others share the last rows, the buckets, in turns by their rank: so the
    more frequent of them stand in different buckets. With `pieces` a rare token is the mean of two rows: that of the longest
    beginning and that of the longest ending that have a row of their own, or its bucket where there is none.

    Args:
        counts: (vocab_size,) of each token id; of equals the lower id comes first.
    """
    buckets = config.vocabulary // SHARE
    own = config.vocabulary - buckets
    order = counts.argsort(descending=True, stable=True)
    rows = torch.empty(len(counts), dtype=torch.int32)
    rows[order[:own]] = torch.arange(own, dtype=torch.int32)
    rows[order[own:]] = own + torch.arange(len(counts) - own, dtype=torch.int32) % buckets
    if config.rare_tokens == "buckets":
        return rows

    # A frequent token is the mean of its row and the same row, so that one lookup serves all tokens.
    both = rows.unsqueeze(1).repeat(1, 2)
    # The tokens as the tokenizer spells them, with its mark for a space ("Ġ") or for a continuation ("##").
    names = [name or "" for name in tokenizer.convert_ids_to_tokens(list(range(len(counts))))]
    known = {names[token]: row for row, token in enumerate(order[:own].tolist())}
    for token in order[own:].tolist():
        for place, row in enumerate(_pieces(names[token], known)):
            if row is not None:
                both[token, place] = row
    return both


def _pieces(name: str, known: dict[str, int]) -> tuple[int | None, int | None]:
    """Returns the rows of a token's longest known beginning and ending; None where there is none."""
    # One character at the beginning is the tokenizer's mark, or tells next to nothing.
    beginning = next((known[name[:end]] for end in range(len(name) - 1, 1, -1) if name[:end] in known), None)
    # In a tokenizer with marks of continuation the ending is spelt with one.
    tails = (tail for start in range(1, len(name)) for tail in (f"##{name[start:]}", name[start:]))
    return beginning, next((known[tail] for tail in tails if tail in known), None)


def row_means(vectors: Tensor, counts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the means of the vectors of each row's tokens, weighted by the tokens' counts.

    Args:
        vectors: (T, C) of the first T token ids.
        counts: (vocab_size,), of each token id.
        rows: see `vocabulary_rows`. A token of two different rows is not counted in either.

    Returns:
        (R, C) the means, and (R,) the rows that have a token at all.
    """
    # A token of pieces is no part of a row: the row is another token's own.
    alone = rows if rows.dim() == 1 else torch.where(rows[:, 0] == rows[:, 1], rows[:, 0], -1)
    alone = alone[:len(vectors)].long()
    tokens = (alone >= 0).nonzero().squeeze(1)
    known, place = alone[tokens].unique(return_inverse=True)
    # Shares of a row first: a token that is alone in its row has exactly 1, and its vector stays as it is.
    weights = counts[tokens].double() + NEVER
    share = weights / torch.zeros(len(known), dtype=torch.float64).index_add_(0, place, weights)[place]
    means = torch.zeros(len(known), vectors.shape[1]).index_add_(0, place, vectors[tokens] * share.float().unsqueeze(1))
    return means, known
