"""Token ids of a split as two arrays; those of a large split are made by all cores and mapped from the user's cache.

    ids, ends, cut = made(sentences, encode, key_of(tokenizer, sentences, 128, "tail"))
    ids[ends[3]:ends[4]]      # the tokens of row 3
"""
from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from data.arrow import AT_A_TIME, Column, in_parts, read_columns, write_columns
from data.cache import cache_folder, fingerprint, kept
from data.digests import tokenizer_digest
from machine import threads
from machine.progress import Bar

TOKENS = "tokens.arrow"
# (texts, row of the first) -> token ids of each, number of those cut; it can be sent to another process.
Encode = Callable[[list[str], int], tuple[list[list[int]], int]]
Tokens = tuple[np.ndarray, np.ndarray, int]  # ids, where each row begins and the last one ends, number of rows cut


def key_of(tokenizer, sentences: Sequence[str], max_length: int, truncate: str) -> str:
    """Returns the fingerprint of everything that decides the token ids of a split."""
    texts = sentences if isinstance(sentences, Column) else Column.of(sentences)
    return fingerprint(texts.sha256(), tokenizer_digest(tokenizer), getattr(tokenizer, "pair_separator", None), max_length,
                       truncate)


def made(sentences: Sequence[str], encode: Encode, key: str | None) -> Tokens:
    """Returns the token ids of sentences.

    Args:
        encode: tokenises some of them.
        key: of a large split, which is made by several processes and kept in the cache; None: it is made here.
    """
    if key is not None:
        found = kept(cache_folder() / f"tokens-{key}", functools.partial(_make, sentences, encode, key), _mapped)
        if found is not None:
            return found
    parts, start = [], 0
    for texts in in_parts(sentences):
        rows, cut = encode(list(texts), start)
        parts.append((*flat(rows), cut))
        start += len(texts)
    return _joined(parts)


def flat(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the token ids of some rows in one array, and where each row begins and the last one ends."""
    ends = np.array([0, *itertools.accumulate(map(len, rows))])
    return np.fromiter(itertools.chain.from_iterable(rows), np.int32, ends[-1]), ends


def _joined(parts: list[Tokens]) -> Tokens:
    """Joins neighbouring parts of a split."""
    ids, ends, cuts = zip(*parts, strict=True)
    lengths = np.concatenate([np.diff(one) for one in ends])
    return np.concatenate(ids), np.concatenate([[0], np.cumsum(lengths)]), sum(cuts)


# ---------------------------------------------------------------- large splits

def _make(sentences: Sequence[str], encode: Encode, key: str, folder: Path) -> None:
    """Tokenises a split in as many processes as there are CPUs, and writes its tokens into a folder."""
    import datasets

    folder.mkdir()
    texts = pa.chunked_array(sentences.chunks if isinstance(sentences, Column) else map(pa.array, in_parts(sentences)))
    rows = datasets.Dataset(datasets.table.InMemoryTable(pa.table({"texts": texts})), fingerprint=key)
    features = datasets.Features({"ids": datasets.LargeList(datasets.Value("int32")), "cut": datasets.Value("int64")})
    # The library draws its bar on a terminal; in a file there is one line at the end.
    drawn = sys.stderr.isatty()
    (datasets.enable_progress_bars if drawn else datasets.disable_progress_bars)()
    datasets.logging.set_verbosity_error()
    processes = threads.available()
    with Bar(total=len(rows), desc="tokenising", unit="row", disable=drawn or None) as bar:
        found = rows.with_format("arrow").map(
            functools.partial(_tokens_of, encode), with_indices=True, batched=True, batch_size=AT_A_TIME,
            writer_batch_size=AT_A_TIME, remove_columns=["texts"], features=features, desc="tokenising",
            num_proc=processes if processes > 1 else None, cache_file_name=str(folder / "part.arrow"), new_fingerprint=key)
        bar.update(len(rows))
    chunks = found.data["ids"].chunks
    parts = [(chunk.flatten().to_numpy(), np.asarray(chunk.offsets) - chunk.offsets[0].as_py(), 0) for chunk in chunks]
    ids, ends, _ = _joined(parts)
    # One array of all tokens, because a batch takes its rows from anywhere in it.
    whole = Column([pa.LargeListArray.from_arrays(ends, ids)])
    write_columns(folder / TOKENS, {"ids": whole}, {"cut": int(np.sum(found.data["cut"].to_numpy()))})
    for part in folder.glob("part*.arrow"):
        part.unlink()


def _tokens_of(encode: Encode, texts: pa.Table, rows: Sequence[int]) -> pa.Table:
    """Tokenises some rows in one of the processes."""
    found, cut = encode(texts["texts"].to_pylist(), rows[0])
    ids, ends = flat(found)
    return pa.table({"ids": pa.LargeListArray.from_arrays(ends, ids), "cut": np.bincount([0], [cut], len(rows)).astype(int)})


def _mapped(folder: Path) -> Tokens:
    columns, about = read_columns(folder / TOKENS)
    (rows,) = columns["ids"].chunks
    return rows.values.to_numpy(), rows.offsets.to_numpy(), about["cut"]
