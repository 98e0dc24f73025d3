"""Marks the tokens that an edit touched: a task with labels that cost nothing, for the student.

    touched([5, 6, 7, 8], [5, 7, 6, 8])    # [1, 3]: 7 has moved, and 8 follows the gap that it left

ELECTRA's question (Clark et al. 2020: was this token replaced?), asked of edited sentences (data/edits.py). The tokens of
both sentences are compared, whatever the tokenizer and the edit: no edit has to tell its place, no tokenizer its offsets.
(Those written in Python have none.)
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import SequenceMatcher

import torch
from torch import Tensor

from distillation.transfer_set import New


@dataclass
class Marks:
    """Of each token of many sentences, whether an edit touched it; one sentence after the other."""

    values: Tensor  # (tokens,) bool, on the CPU
    starts: Tensor  # (N + 1,) the first token of each sentence, and the number of tokens

    def of(self, rows: Tensor) -> Tensor:
        """Returns the marks (tokens of these sentences,) as float32."""
        rows = rows.cpu()
        bounds = zip(self.starts[rows].tolist(), self.starts[rows + 1].tolist(), strict=True)
        return torch.cat([self.values[start:end] for start, end in bounds]).float()


def mark_edits(ids: list[list[int]], originals: dict[int, list[int]]) -> Marks:
    """Marks the tokens of sentences; a sentence that was not edited has no mark.

    Args:
        ids: token ids of each sentence.
        originals: row -> token ids of the sentence that was edited.
    """
    # One tensor for all sentences: lists of a million would take many times the memory.
    starts = torch.tensor([0, *map(len, ids)]).cumsum(0)
    values = torch.zeros(int(starts[-1]), dtype=torch.bool)
    for row, original in originals.items():
        values[starts[row] + torch.tensor(touched(original, ids[row]), dtype=torch.int64)] = True
    return Marks(values, starts)


def originals(new: list[New], ids_of: Callable[[list[str]], list[list[int]]]) -> dict[int, list[int]]:
    """Returns the token ids of the sentences that were edited, by the row of the edited ones.

    Args:
        ids_of: returns the token ids of texts.
    """
    # Tokenised together, because a call for each sentence is slow.
    edited = {row: one.original for row, one in enumerate(new) if one.original is not None}
    return dict(zip(edited, ids_of(list(edited.values())), strict=True))


def touched(original: list[int], edited: list[int]) -> list[int]:
    """Returns the places in `edited` of new and of moved tokens, and of the token after a gap (the last one at the end)."""
    # One place of a sentence is edited: only the tokens between its equal ends have to be compared.
    most = min(len(original), len(edited))
    first = next((at for at in range(most) if original[at] != edited[at]), most)
    same = next((at for at in range(most - first) if original[-1 - at] != edited[-1 - at]), most - first)
    before, after = original[first:len(original) - same], edited[first:len(edited) - same]
    # Places of the whole sentence: the equal beginning stands before the part that was compared.
    found = set()
    for kind, _, _, start, end in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        # Of a removed token nothing is left but the gap, which the token after it shows.
        if kind == "delete":
            found.add(min(first + start, len(edited) - 1))
        elif kind != "equal":
            found.update(range(first + start, first + end))
    return sorted(found)
