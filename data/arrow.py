"""Columns of many rows in Arrow: a value becomes a Python object only while it is looked at.

    column = Column.of(["Good.", "Bad."])
    print(len(column), column[1], list(column))
"""
from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

AT_A_TIME = 10_000  # rows that are Python objects at the same time
# Python types that Arrow gives back as they were, and its types; a cell of another one (a date) stays a Python object.
EXACT = {str: "large_string", float: "float64", int: "int64", bool: "bool_"}


class Column(Sequence):
    """The values of a column, in chunks: Arrow arrays, or lists of few values or of those that no Arrow type holds exactly.

    It reads like a list; its slices are lists. Rows of several numbers are tuples.
    """

    def __init__(self, chunks: Iterable[pa.Array | list]):
        chunks = [chunk for chunk in chunks if len(chunk)]
        # The last part of a long column is short, and packed like the others.
        self.chunks = chunks if len(chunks) == 1 else [as_arrow(chunk) if is_few(chunk) else chunk for chunk in chunks]
        self.starts = np.cumsum([0, *map(len, self.chunks)])  # number of each chunk's first row, and of all rows

    @classmethod
    def of(cls, values: Iterable) -> Column:
        """Packs values, AT_A_TIME together."""
        return cls(map(packed, in_parts(values)))

    @classmethod
    def of_array(cls, values: np.ndarray) -> Column:
        """Packs numbers (N,), or rows of numbers (N, width)."""
        if len(values) < AT_A_TIME:
            return cls([values.tolist() if values.ndim == 1 else list(map(tuple, values.tolist()))])
        return cls([_rows_in_arrow(values)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __iter__(self) -> Iterator:
        for chunk in self.chunks:
            for start in range(0, len(chunk), AT_A_TIME):
                yield from _python(chunk[start:start + AT_A_TIME])

    def __getitem__(self, at):
        if isinstance(at, slice):
            rows = range(len(self))[at]
            return list(self._between(rows.start, rows.stop) if rows.step == 1 else self.take(rows))
        at = range(len(self))[at]
        chunk = int(np.searchsorted(self.starts, at, "right")) - 1
        first = at - int(self.starts[chunk])
        return _python(self.chunks[chunk][first:first + 1])[0]

    def __eq__(self, other: object) -> bool:
        same_length = isinstance(other, Sequence) and len(self) == len(other)
        return same_length and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None

    def __add__(self, other: Sequence) -> list:
        return [*self, *other]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """Returns numbers as (N,), rows of numbers as (N, width); texts as objects."""
        return np.asarray(np.concatenate([_numpy(chunk) for chunk in self.chunks] or [[]]), dtype)

    def _between(self, start: int, stop: int) -> Column:
        """Returns neighbouring rows, without a copy."""
        found = []
        for chunk, first in zip(self.chunks, self.starts.tolist(), strict=False):
            found.append(chunk[max(0, start - first):max(0, stop - first)])
        return Column(found)

    def take(self, rows: Iterable[int]) -> Column:
        """Returns the given rows, in that order."""
        # Lists, or chunks of nothing but missing values, are no column of one type.
        kinds = {getattr(chunk, "type", None) for chunk in self.chunks}
        if len(kinds) != 1 or None in kinds:
            return Column([[self[row] for row in rows]])
        import pyarrow as pa

        rows = np.asarray(rows, dtype=np.int64)
        # In parts: Arrow joins the rows of a part, which then has one buffer.
        whole = pa.chunked_array(self.chunks)
        parts = [whole.take(pa.array(part)) for part in in_parts(rows)]
        return Column(itertools.chain(*(part.chunks for part in parts)))

    def sha256(self) -> str:
        """Returns the SHA-256 of a column of texts, whatever its chunks."""
        lengths, texts = hashlib.sha256(), hashlib.sha256()
        for chunk in map(as_arrow, self.chunks):
            ends = np.frombuffer(chunk.buffers()[1], np.int64, len(chunk) + 1, chunk.offset * 8)
            lengths.update(np.diff(ends))
            texts.update(memoryview(chunk.buffers()[2] or b"")[ends[0]:ends[-1]])
        return hashlib.sha256(lengths.digest() + texts.digest()).hexdigest()


def in_parts(values: Iterable) -> Iterator[Sequence]:
    """Yields values, AT_A_TIME together."""
    if isinstance(values, Sequence | np.ndarray):
        for start in range(0, len(values), AT_A_TIME):
            yield values[start:start + AT_A_TIME]
        return
    values = iter(values)
    while part := list(itertools.islice(values, AT_A_TIME)):
        yield part


def packed(values: Sequence) -> pa.Array | list:
    """Returns values as an Arrow array, or as they are if they are few or would come back as others."""
    values = list(values)
    # Few values do without Arrow: the import takes 30 MiB.
    return values if is_few(values) else as_arrow(values)


def is_few(chunk: pa.Array | list) -> bool:
    """Returns whether a chunk is a list that is too short for Arrow."""
    return isinstance(chunk, list) and len(chunk) < AT_A_TIME


def as_arrow(values: pa.Array | list) -> pa.Array | list:
    """Returns values as an Arrow array, or as they are if they would come back as others."""
    if not isinstance(values, list):
        return values
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is tuple:
        return _rows_in_arrow(np.array(values))
    if kinds or kind is not None and kind not in EXACT:
        return values
    try:
        return pa.array(values, pa.null() if kind is None else getattr(pa, EXACT[kind])())
    # A whole number of more than 64 bits; half of a surrogate pair.
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return values


def _rows_in_arrow(values: np.ndarray) -> pa.Array:
    """Returns numbers (N,), or rows of numbers (N, width), as an Arrow array."""
    import pyarrow as pa

    flat = pa.array(values.reshape(-1))
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _numpy(chunk: pa.Array | list) -> np.ndarray:
    if isinstance(chunk, list):
        # Numbers are numbers; texts and missing values are what Arrow makes of them.
        found = np.array(chunk, None if {type(value) for value in chunk} <= {int, float, bool, tuple} else object)
        return found if found.dtype != object else np.asarray(as_arrow(chunk))
    width = getattr(chunk.type, "list_size", None)
    return np.asarray(chunk) if width is None else chunk.flatten().to_numpy().reshape(-1, width)


def _python(chunk: pa.Array | list) -> list:
    if isinstance(chunk, list):
        return chunk
    return list(map(tuple, chunk.to_pylist())) if hasattr(chunk.type, "list_size") else chunk.to_pylist()


# ---------------------------------------------------------------- files

def write_columns(path: Path, columns: dict[str, Sequence], about: dict) -> None:
    """Writes columns and facts about them into an Arrow file.

    Args:
        columns: name -> values, all of the same length.
        about: facts, as JSON takes them.

    Raises:
        OSError: it cannot be written.
    """
    import pyarrow as pa

    arrays = {name: pa.chunked_array(list(map(as_arrow, values.chunks))) for name, values in columns.items()}
    table = pa.table(arrays).replace_schema_metadata({"about": json.dumps(about)})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def read_columns(path: Path) -> tuple[dict[str, Column], dict]:
    """Maps the columns of an Arrow file into memory: the system reads a page of it when it is looked at.

    Raises:
        OSError, pyarrow.ArrowException, ValueError: missing or damaged.
    """
    import pyarrow as pa

    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    about = json.loads(table.schema.metadata[b"about"])
    return {name: Column(table[name].chunks) for name in table.column_names}, about
