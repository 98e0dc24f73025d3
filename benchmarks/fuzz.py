"""Damages every kind of file that is read, thousands of times, and counts what is neither a result nor one clear line.

    make fuzz                                  # or: python benchmarks/fuzz.py --cases 12000
    python benchmarks/fuzz.py --cases 10000 --only table

Two generators make tables instead of damaging them: rows with wrong numbers of cells, stray quotes, marks and line ends, and
cells that are no text, label or number. Training and prediction must read the same cells or refuse the same row, and no row
may be lost without a word.

The cases are hypothesis's, generated from --seed; a failing one is shrunk and printed. Prints tried/failed by reader; exit
status 0 if none failed.
"""
from __future__ import annotations

import argparse
import codecs
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TQDM_DISABLE", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "tests")]

import readers  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402 (needs the path above)
from hypothesis import strategies as st  # noqa: E402

# ---------------------------------------------------------------- tables

CELLS = st.text('ab",;\t\\\'\ufeff |', max_size=5) | st.sampled_from(
    ["1", "01", "0.5", "-1", "nan", "", " ", "caf\u00e9", "\u2028", "7" * 5000, "$5$", "1e999", "sep=;", "true"])
ODD = st.sampled_from(["\ud83d", "a\ufeffb", "a\nb"])
VALUES = st.recursive(
    CELLS | ODD | st.none() | st.booleans() | st.integers(-2, 10 ** 400) | st.floats(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=2), max_leaves=3)
HEADERS = st.sampled_from([["text", "label"], ["", "text", "label"], ["text", "label", "x"], ["text"], ["a", "b"],
                           ["text", "text"], ["\ufefftext", " label "], ["sep=;"], ["text;label"]])
MARKS = st.sampled_from([b"", b"", codecs.BOM_UTF8, b"\xff", b"\n\n"])
ENDS = st.sampled_from(["\n", "\r\n", "\r"])


# Strings rather than rows are generated: what a program writes wrongly is often no table at all.
@st.composite
def separated(draw) -> tuple[str, bytes]:
    """Makes a CSV or TSV; returns its ending and its bytes."""
    ending, end, header = draw(st.sampled_from(["csv", "tsv"])), draw(ENDS), draw(HEADERS)
    delimiter = "," if ending == "csv" else "\t"
    rows = draw(st.lists(st.lists(CELLS, max_size=len(header) + 1), max_size=5))
    if ending == "csv" and draw(st.booleans()):
        rows = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in rows]
    lines = [delimiter.join(row) for row in rows]
    content = draw(MARKS) + end.join([delimiter.join(header), *lines, ""]).encode()
    return ending, content


@st.composite
def objects(draw) -> tuple[str, bytes]:
    """Makes a JSON Lines file whose values have any type; returns what `separated` does."""
    keys = st.sampled_from(["text", "label", "x", "\ufefftext"])
    rows = draw(st.lists(st.dictionaries(keys, VALUES, max_size=3), min_size=1, max_size=5))
    end = draw(ENDS)
    return "jsonl", draw(MARKS) + "".join(json.dumps(row) + end for row in rows).encode()


def check_table(folder: Path, ending: str, content: bytes) -> None:
    """Reads a made table as training and as prediction do.

    Raises:
        AssertionError: they read different cells, a row is lost without a word, or an error has several lines.
        Exception: whatever else a reader raised.
    """
    from data import splits, stream, tables
    from machine.errors import UserError
    from options.schema import TableOptions

    path = folder / f"rows.{ending}"
    path.write_bytes(content)
    # Prediction's way: row by row, with errors in their places.
    try:
        opened = stream.open_rows(path)
        with opened.file:
            rows = list(opened.rows)
    except UserError as error:
        rows, refused = [], error
    else:
        refused = next((row.error for row in rows if row.error), None)
        check_lines(content, [row.line for row in rows], ending)
    # Training's way: all rows, or one line.
    try:
        table = tables.read_table(path)
    except UserError as error:
        assert refused or not rows or not any(row.columns for row in rows), f"prediction reads on: {error}"
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000, f"the message {str(error)[:2000]!r}"
        return
    assert not refused, f"training reads on: {refused}"
    for name, cells in table.columns.items():
        assert repr(cells) == repr([row.columns.get(name) for row in rows]), f"another column {name}"
    # Cells that are no text, label or number are refused; the others can be written as UTF-8.
    for features in ((), ("x",)):
        try:
            split, _ = splits.read_split(table, TableOptions(feature_columns=features), " ")
        except UserError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000, f"the message {str(error)[:2000]!r}"
        else:
            assert len(split) == len(split.sentences) == len(rows), "another number of sentences"
            json.dumps([split.sentences, split.features], allow_nan=True, ensure_ascii=False).encode()


def check_lines(content: bytes, numbers: list[int], ending: str) -> None:
    """Checks that each line is the beginning of a row, blank, the header, or inside a cell in quotes.

    Args:
        numbers: of the lines with which rows begin, from 1.

    Raises:
        AssertionError: a line is lost without a word.
    """
    # Bytes that are not UTF-8 stay one character each, so that no line is lost here.
    lines = re.split("\r\n|\r|\n", content.decode("utf-8-sig", "replace"))
    header = ending != "jsonl"
    begins, spans = set(numbers), False
    for number, line in enumerate(lines, 1):
        if number in begins:
            spans = ending == "csv" and '"' in line
        elif not line.strip("\ufeff \u2028"):
            continue
        elif header:
            header = False
        else:
            assert spans, f"line {number} is lost: {line[:40]!r}"


TABLES = {"table: CSV and TSV": separated(), "table: JSON Lines": objects()}


# ---------------------------------------------------------------- trying

def fuzz(name: str, path: Path, call, cases: int, number: int = 0) -> dict:
    """Tries `cases` damaged files on one reader; stops at the first that fails, and shrinks it."""
    return tried(name, readers.damaged(path.read_bytes(), path), lambda content: readers.attempt(path, content, call), cases,
                 number)


def fuzz_table(name: str, folder: Path, cases: int, number: int = 0) -> dict:
    """Tries `cases` made tables on training's and prediction's reader; see `fuzz`."""
    return tried(name, TABLES[name], lambda made: check_table(folder, *made), cases, number)


def tried(name: str, strategy: st.SearchStrategy, attempt: Callable, cases: int, number: int) -> dict:
    """Calls `attempt` with `cases` examples of a strategy; returns how many were tried, and the shrunk one that failed."""
    row = {"reader": name, "tried": 0, "failed": 0, "error": None}

    @seed(number)
    @settings(max_examples=cases, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
              suppress_health_check=list(HealthCheck))
    @given(case=strategy)
    def one(case) -> None:
        row["tried"] += 1
        attempt(case)
    try:
        one()
    except Exception as error:
        row["failed"] = 1
        notes = " ".join(getattr(error, "__notes__", []))
        row["error"] = f"{type(error).__name__}: {str(error)[:300]} {notes[:600]}"
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=12000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="PREFIX", help="readers whose names begin like this")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = [name for name in TABLES if name.startswith(args.only)]
        # The runs that other readers read take a minute to train.
        known = {} if args.only and made else readers.readers(readers.make(Path(folder)))
        known = {name: reader for name, reader in known.items() if name.startswith(args.only)}
        cases = -(-args.cases // max(1, len(known) + len(made)))
        rows = [fuzz(name, path, call, cases, args.seed) for name, (path, call) in known.items()]
        rows += [fuzz_table(name, Path(folder), cases, args.seed) for name in made]
    count, failed = (sum(row[key] for row in rows) for key in ("tried", "failed"))
    if args.json:
        from benchmarks import common  # late: it sets the environment that libraries read when imported

        print(common.result({"tried": count, "failed": failed, "seed": args.seed, "readers": rows}))
    else:
        for row in rows:
            print(f"{row['reader']:<28}{row['tried']:>7} tried {row['failed']:>3} failed" +
                  (f"\n  {row['error']}" if row["error"] else ""))
        print(f"{'all':<28}{count:>7} tried {failed:>3} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
