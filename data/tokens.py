"""Turns texts into token ids; those of a large split are made by all cores, and mapped from the user's cache into memory.

    found = tokenise(tokenizer, task.train.sentences, max_length=128)
    found.ids[found.ends[3]:found.ends[4]]      # the tokens of row 3
"""
from __future__ import annotations

import functools
import itertools
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.arrow import AT_A_TIME, Column, as_arrow, in_parts, read_columns, write_columns
from data.cache import cache_folder, fingerprint, kept
from data.digests import tokenizer_digest
from data.segments import arguments_of
from machine import threads
from machine.errors import UserError
from machine.progress import Bar

if TYPE_CHECKING:
    import pyarrow as pa

LARGE_SPLIT = 20_000  # rows: a larger split is tokenised by all cores, and its batches are made when they are asked for
TOKENS = "tokens.arrow"


@dataclass(frozen=True)
class TokenIds:
    """Holds the token ids of many sentences in two arrays, in memory or mapped from a file."""

    ids: np.ndarray  # (tokens of all sentences,) int32, one sentence after the other
    ends: np.ndarray  # (sentences + 1,) int64: where each sentence begins, and where the last one ends
    cut: int = 0  # sentences that were too long

    @classmethod
    def of(cls, sentences: Sequence[Sequence[int]], cut: int = 0) -> TokenIds:
        """Packs the token ids of some sentences."""
        ends = np.array([0, *itertools.accumulate(map(len, sentences))])
        return cls(np.fromiter(itertools.chain.from_iterable(sentences), np.int32, ends[-1]), ends, cut)

    @classmethod
    def joined(cls, parts: Sequence[TokenIds]) -> TokenIds:
        """Joins neighbouring parts of a split."""
        ends = np.concatenate([[0], *(part.lengths for part in parts)]).cumsum()
        return cls(np.concatenate([part.ids for part in parts]), ends, sum(part.cut for part in parts))

    @property
    def lengths(self) -> np.ndarray:
        """Returns the tokens in each sentence."""
        return np.diff(self.ends)

    def padded(self, rows: np.ndarray, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the token ids of some rows, padded on the right, and their mask: (B, T), (B, T)."""
        first = self.ends[rows]
        lengths = self.ends[rows + 1] - first
        places = np.arange(lengths.max())
        mask = places < lengths[:, None]
        input_ids = np.full(mask.shape, pad_id)
        input_ids[mask] = self.ids[(first[:, None] + places)[mask]]
        return input_ids, mask


def encode(tokenizer, sentences: Sequence[str], max_length: int, truncate: str = "tail") -> list[list[int]]:
    """Returns the token ids of each sentence, cut to `max_length` tokens; one warning counts the sentences cut.

    Args:
        truncate: the part of a sentence that is cut if it is too long: its `head` (the end of a review holds
            the verdict), its `tail`, or its `middle`. The tokenizer's own special tokens at both ends stay.

    Raises:
        UserError: a sentence without a token, or a `max_length` without room for one.
    """
    parts = list(_encoded(sentences, tokenizer, max_length, truncate))
    ids = list(itertools.chain.from_iterable(rows for rows, _ in parts))
    _warn_of_cuts(sum(cut for _, cut in parts), len(ids), max_length, truncate)
    return ids


def tokenise(tokenizer, sentences: Sequence[str], max_length: int, truncate: str = "tail") -> TokenIds:
    """Returns the token ids of a split's sentences; see `encode`.

    Those of a large split are kept in the cache: the next run with the same sentences, tokenizer and options finds them.

    Raises:
        UserError: see `encode`.
    """
    how, found = (tokenizer, max_length, truncate), None
    if len(sentences) > LARGE_SPLIT:
        texts = sentences if isinstance(sentences, Column) else Column.of(sentences)
        key = fingerprint(texts.sha256(), tokenizer_digest(tokenizer), getattr(tokenizer, "pair_separator", None), *how[1:])
        found = kept(cache_folder() / f"tokens-{key}", functools.partial(_write, texts, how, key), _mapped)
    if found is None:
        found = TokenIds.joined([TokenIds.of(*part) for part in _encoded(sentences, *how)])
    _warn_of_cuts(found.cut, len(sentences), max_length, truncate)
    return found


def _warn_of_cuts(cut: int, rows: int, max_length: int, truncate: str) -> None:
    if cut:
        warnings.warn(f"{cut} of {rows} sentences are longer than {max_length} tokens and were truncated "
                      f"({truncate} cut)", stacklevel=3)


# ---------------------------------------------------------------- some texts at a time

def _encoded(sentences: Sequence[str], tokenizer, max_length: int, truncate: str) -> Iterator[tuple[list[list[int]], int]]:
    """Yields token ids and the number of cuts of some sentences at a time.

    The library's record of a text takes many times the memory of its ids.
    """
    start = 0
    for texts in in_parts(sentences):
        yield encode_part(texts, start, tokenizer, max_length, truncate)
        start += len(texts)


def encode_part(sentences: list[str], start: int, tokenizer, max_length: int, truncate: str) -> tuple[list[list[int]], int]:
    """Returns the token ids of some sentences, and the number of sentences that were cut.

    Args:
        start: row of the first sentence in its split, for errors.

    Raises:
        UserError: see `encode`.
    """
    texts = arguments_of(tokenizer, sentences)
    settings = {"add_special_tokens": True, "verbose": False, "return_attention_mask": False, "return_token_type_ids": False}
    ids = tokenizer(*texts, truncation=False, **settings)["input_ids"]
    for row, tokens in enumerate(ids):
        if not tokens:
            raise UserError(f"row {start + row + 1}: the tokenizer makes no token of {sentences[row]!r}")
    long = [row for row, tokens in enumerate(ids) if len(tokens) > max_length]
    if not long:
        return ids, 0
    parts = [list(map(part.__getitem__, long)) for part in texts]
    if len(texts) == 2:
        shorter = _shortened(tokenizer, parts, settings, max_length, truncate)
    else:
        # The tokenizer's own truncation knows no middle.
        special = tokenizer(*parts, truncation=False, return_special_tokens_mask=True, **settings)["special_tokens_mask"]
        shorter = [_cut(ids[row], mask, max_length, truncate) for row, mask in zip(long, special, strict=True)]
    for row, tokens in zip(long, shorter, strict=True):
        ids[row] = tokens
    return ids, len(long)


def _shortened(tokenizer, pairs: list[list[str]], settings: dict, max_length: int, truncate: str) -> list[list[int]]:
    """Cuts the longer text of each pair, token by token, as the tokenizer does; returns the ids.

    Raises:
        UserError: the tokenizer has no way to cut the middle, or `max_length` has no room for two texts.
    """
    if truncate == "middle":
        raise UserError("--truncate middle: not for pairs of texts, of which the tokenizer cuts the longer one; expected "
                        "tail or head")
    own = tokenizer.num_special_tokens_to_add(pair=True)
    if max_length < own + 2:
        raise UserError(f"--max-length {max_length}: no room for two texts beside the tokenizer's {own} own tokens")
    side, tokenizer.truncation_side = tokenizer.truncation_side, {"tail": "right", "head": "left"}[truncate]
    try:
        return tokenizer(*pairs, truncation="longest_first", max_length=max_length, **settings)["input_ids"]
    finally:
        tokenizer.truncation_side = side


def _cut(tokens: list[int], special: list[int], max_length: int, truncate: str) -> list[int]:
    """Cuts one sentence's tokens to `max_length`; special tokens at both ends stay."""
    # Special tokens before the first and after the last token of text.
    opening = special.index(0) if 0 in special else len(tokens)
    closing = special[::-1].index(0) if 0 in special else 0
    room = max_length - opening - closing
    if room < 1:
        raise UserError(f"--max-length {max_length}: no room for a token beside the tokenizer's {opening + closing} own")
    body = tokens[opening:len(tokens) - closing]
    # Tokens that stay at the front; the others stay at the end.
    first = {"tail": room, "head": 0, "middle": room // 2}[truncate]
    return tokens[:opening] + body[:first] + body[len(body) - (room - first):] + tokens[len(tokens) - closing:]


# ---------------------------------------------------------------- large splits

def _write(texts: Column, how: tuple, key: str, folder: Path) -> None:
    """Tokenises a split in as many processes as there are CPUs, and writes its tokens into a folder.

    Args:
        how: tokenizer, max_length and truncate.
        key: the fingerprint of the tokens.
    """
    import datasets
    import pyarrow as pa

    folder.mkdir()
    table = pa.table({"texts": pa.chunked_array(list(map(as_arrow, texts.chunks)))})
    rows = datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint=key)
    features = datasets.Features({"ids": datasets.LargeList(datasets.Value("int32")), "cut": datasets.Value("int64")})
    # The library draws its bar on a terminal; in a file there is one line at the end.
    drawn = sys.stderr.isatty()
    (datasets.enable_progress_bars if drawn else datasets.disable_progress_bars)()
    datasets.logging.set_verbosity_error()
    processes = threads.available()
    with Bar(total=len(rows), desc="tokenising", unit="row", disable=drawn or None) as bar:
        found = rows.with_format("arrow").map(
            functools.partial(_tokens_of, how), with_indices=True, batched=True, batch_size=AT_A_TIME,
            writer_batch_size=AT_A_TIME, remove_columns=["texts"], features=features, desc="tokenising",
            num_proc=processes if processes > 1 else None, cache_file_name=str(folder / "part.arrow"), new_fingerprint=key)
        bar.update(len(rows))
    # One array of all tokens, because a batch takes its rows from anywhere in it.
    whole = TokenIds.joined([_ids_in(chunk) for chunk in found.data["ids"].chunks])
    ids = Column([pa.LargeListArray.from_arrays(whole.ends, whole.ids)])
    write_columns(folder / TOKENS, {"ids": ids}, {"cut": int(found.data["cut"].to_numpy().sum())})
    for part in folder.glob("part*.arrow"):
        part.unlink()


def _tokens_of(how: tuple, texts: pa.Table, rows: Sequence[int]) -> pa.Table:
    """Tokenises some rows in one of the processes."""
    import pyarrow as pa

    found = TokenIds.of(*encode_part(texts["texts"].to_pylist(), rows[0], *how))
    # The number of cuts stands in the first row.
    cut = [found.cut] + [0] * (len(rows) - 1)
    return pa.table({"ids": pa.LargeListArray.from_arrays(found.ends, found.ids), "cut": cut})


def _ids_in(chunk: pa.LargeListArray, cut: int = 0) -> TokenIds:
    """Returns the token ids of an Arrow array, without a copy."""
    ends = chunk.offsets.to_numpy()
    return TokenIds(chunk.values.to_numpy()[ends[0]:ends[-1]], ends - ends[0] if ends[0] else ends, cut)


def _mapped(folder: Path) -> TokenIds:
    columns, about = read_columns(folder / TOKENS)
    (ids,) = columns["ids"].chunks
    return _ids_in(ids, about["cut"])
