"""stream.py and tables.py: training and prediction read every table alike, and lose no row without a word."""
from __future__ import annotations

import codecs
import csv
import io
import json
import sys
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import fuzz
from data import stream
from data.lines import LONGEST, read_lines, read_sentences
from data.pairs import read_pairs
from data.stream import DEFAULT_COLUMNS
from data.tables import read_table
from data_utils import read_cola_tsv
from machine.errors import UserError
from options.schema import TableOptions

FAST = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
BOM = codecs.BOM_UTF8


def both(path, options=DEFAULT_COLUMNS) -> list[dict]:
    """Returns a file's rows as training and as prediction reads them, which must be the same."""
    table = read_table(path, options)
    trained = [dict(zip(table.columns, cells, strict=True)) for cells in zip(*table.columns.values(), strict=True)]
    rows = stream.open_rows(path, options=options)
    with rows.file:
        streamed = list(rows.rows)
    assert not any(row.error for row in streamed)
    predicted = [{name: row.columns.get(name) for name in table.columns} for row in streamed]
    assert trained == predicted
    return trained


def refused(path, options=DEFAULT_COLUMNS) -> str:
    """Returns the one line with which training refuses a file; prediction has it too, for the file or for a row."""
    with pytest.raises(UserError) as caught:
        read_table(path, options)
    said = str(caught.value)
    assert str(path) in said and len(said.splitlines()) == 1
    try:
        rows = stream.open_rows(path, options=options)
        errors = [row.error for row in rows.rows if row.error]
    except UserError as error:
        errors = [str(error)]
    assert errors and errors[0].removeprefix(f"{path}: ") in said
    return said


# ---------------------------------------------------------------- one table of cases

A, B = {"text": "a", "label": "1"}, {"text": "b", "label": "0"}
CASES = {
    "plain": ("csv", b"text,label\na,1\nb,0\n", [A, B]),
    "no last line end": ("csv", b"text,label\na,1\nb,0", [A, B]),
    "CR": ("csv", b"text,label\ra,1\rb,0\r", [A, B]),
    "CRLF": ("csv", b"text,label\r\na,1\r\nb,0\r\n", [A, B]),
    "CR in a TSV": ("tsv", b"text\tlabel\ra\t1\rb\t0\r", [A, B]),
    "CR in JSON Lines": ("jsonl", b'{"text": "a", "label": "1"}\r{"text": "b", "label": "0"}\r', [A, B]),
    "blank lines": ("csv", b"\n\ntext,label\n\na,1\n\nb,0\n\n", [A, B]),
    "blank lines of JSON Lines": ("jsonl", b'\n{"text": "a", "label": "1"}\n \n\n{"text": "b", "label": "0"}\n', [A, B]),
    "BOM": ("csv", BOM + b"text,label\na,1\nb,0\n", [A, B]),
    "BOM before a quote": ("csv", BOM + b'"text",label\n"a",1\nb,0\n', [A, B]),
    "BOM of a TSV": ("tsv", BOM + b"text\tlabel\na\t1\nb\t0\n", [A, B]),
    "BOM of JSON Lines": ("jsonl", BOM + b'{"text": "a", "label": "1"}\n{"text": "b", "label": "0"}\n', [A, B]),
    "joined files with BOMs": ("jsonl", 2 * (BOM + b'{"text": "a", "label": "1"}\n'), [A, A]),
    "UTF-16 with BOM": ("csv", "text,label\na,1\nb,0\n".encode("utf-16"), [A, B]),
    "UTF-32 with BOM": ("tsv", "text\tlabel\na\t1\nb\t0\n".encode("utf-32"), [A, B]),
    "pandas' index": ("csv", b",text,label\n0,a,1\n1,b,0\n", [A, B]),
    "two nameless columns": ("tsv", b"\ttext\t\tlabel\n0\ta\tx\t1\n1\tb\ty\t0\n", [A, B]),
    "spaces round names": ("csv", b" text , label\na,1\nb,0\n", [A, B]),
    "empty cells too many": ("csv", b"text,label\na,1,,\nb,0, \n", [A, B]),
    "empty cells too many in a TSV": ("tsv", b"text\tlabel\na\t1\t\nb\t0\n", [A, B]),
    "a quoted cell over lines": ("csv", b'text,label\n"a\r\n\nb",1\nb,0\n', [{"text": "a\r\n\nb", "label": "1"}, B]),
    "doubled quotes": ("csv", b'text,label\n"""a"", b",1\nb,0\n', [{"text": '"a", b', "label": "1"}, B]),
    "a quote inside a cell": ("csv", b'text,label\n5" disk,1\nb,0\n', [{"text": '5" disk', "label": "1"}, B]),
    "a backslash at a cell's end": ("csv", b'text,label\n"C:\\",1\nb,0\n', [{"text": "C:\\", "label": "1"}, B]),
    "a backslash before a comma": ("csv", b'text,label\na\\\\,1\nb,0\n', [{"text": "a\\\\", "label": "1"}, B]),
    "quotes of a TSV": ("tsv", b'text\tlabel\n"a\t1\n"b"\t0\na ""b\t1\n', [
        {"text": '"a', "label": "1"}, {"text": '"b"', "label": "0"}, {"text": 'a ""b', "label": "1"}]),
    "a backslash before a quote in a TSV": ("tsv", b'text\tlabel\n\\"a\\"\t1\n', [{"text": '\\"a\\"', "label": "1"}]),
    "line ends of Unicode": ("csv", "text,label\na\u2028b\x85c\x0bd,1\n".encode(), [{"text": "a\u2028b\x85c\x0bd",
                                                                                  "label": "1"}]),
    "one column": ("csv", b'text\na\n"b, c"\n', [{"text": "a"}, {"text": "b, c"}]),
}


@pytest.mark.parametrize("case", CASES)
def test_training_and_prediction_read_the_same_cells(tmp_path, case):
    ending, content, expected = CASES[case]
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(content)
    assert both(path) == expected


REFUSED = {
    "a cell too many": ("csv", b"text,label\na,1\nb,c,0\n", "row 2 (line 3): 3 cells, and the header has 2 (text, label)"),
    "an unquoted comma": ("csv", b"label,text\n1,Good, really\n0,Bad, really\n", "row 1 (line 2): 3 cells, and the header"),
    "a cell too few": ("csv", b"id,text,label\n1,a,1\n2,b\n", "row 2 (line 3): 2 cells, and the header has 3"),
    "a TSV's cell too many": ("tsv", b"text\tlabel\na\tb\t1\n", "hold no tab"),
    "a quoted cell over lines in a TSV": ("tsv", b'text\tlabel\n"a\nb"\t1\n', "row 1 (line 2): 1 cells"),
    "a row longer by more than empty cells": ("csv", b"text,label\na,1,,x\n", "4 cells"),
    "an open quote": ("csv", b'text,label\n"a,1\nb,0\n', "a double quote that is not closed"),
    "a backslash before a quote": ("csv", b'text,label\n"he said \\"hi\\" twice",1\n', "a double quote is written twice"),
    "text after a quote": ("csv", b'text,label\n"a\nb" c,1\n', "text after a closing double quote (line 3)"),
    "semicolons": ("csv", b"text;label\na;1\n", "separated by semicolons, which is not the CSV its ending says; give "
                                                "--delimiter ';'"),
    "bars": ("tsv", b"text|label\na|1\n", "separated by bars"),
    "sep=": ("csv", b"sep=;\ntext;label\na;1\n", "first line is 'sep=;', a note to Excel and no header; delete that "
                                                 "line, and give --delimiter ';'"),
    "sep= with a BOM": ("csv", BOM + b"SEP=,\r\ntext,label\r\na,1\r\n", "delete that line"),
    "sep= and a tab": ("tsv", b"sep=\t\ntext\tlabel\na\t1\n", "delete that line"),
    "no name at all": ("csv", b",,\na,1,2\n", "names no column"),
    "two names": ("csv", b"a film,a film\nb,c\n", "two columns are called 'a film'; if its first line is a row"),
    "two keys": ("jsonl", b'{"text": "a", "text": "b", "label": 1}\n', "line 1: two keys are called 'text'"),
    "thousands of digits": ("jsonl", b'{"text": "a", "label": ' + b"7" * 5000 + b"}\n", "more than 4,300 digits"),
    "nothing but a BOM": ("csv", BOM, "the file is empty"),
    "a BOM and blank lines": ("tsv", BOM + b"\r\n\r\n", "the file is empty"),
    "nothing but a BOM in JSON Lines": ("jsonl", BOM, "the file is empty"),
    "UTF-16 without BOM": ("csv", "text,label\na,1\n".encode("utf-16-le"), "give --encoding utf-16-le"),
    "Latin-1": ("csv", b"text,label\ncaf\xe9,1\n", "row 1 (line 2): not UTF-8 (byte 0xe9)"),
    "a line too long": ("tsv", b"text\tlabel\n" + b"x" * LONGEST + b"\t1\n", f"longer than {LONGEST:,} characters"),
    "a cell too long": ("csv", b'text,label\n"' + b"x\n" * (LONGEST // 2) + b'x",1\n', f"more than {LONGEST:,} characters"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_training_and_prediction_refuse_the_same_rows_in_one_line(tmp_path, case):
    ending, content, said = REFUSED[case]
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(content)
    assert said in refused(path)


def test_a_table_without_header_is_told_what_to_do(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a fine film,pos\na dull film,neg\n")
    with pytest.raises(UserError, match="it has a fine film, pos .its first line; if that is a row, put a header above it"):
        read_table(path).column("text", "--text-column")


@pytest.mark.parametrize("size", [131_073, 200_000, LONGEST - 20])
@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_cells_may_have_the_documented_size(tmp_path, size, ending):
    """Python's csv module alone stops at 131,072 characters."""
    cell, path = "x" * size, tmp_path / f"rows.{ending}"
    path.write_text(json.dumps({"text": cell}) + "\n" if ending == "jsonl" else f"text\n{cell}\n")
    assert both(path) == [{"text": cell}]


# ---------------------------------------------------------------- delimiters and encodings

@pytest.mark.parametrize("given, delimiter", [
    (";", ";"), ("|", "|"), ("tab", "\t"), ("\\t", "\t"), ("\t", "\t"), ("\u00a7", "\u00a7")])
@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_delimiter_that_is_named_is_used(tmp_path, given, delimiter, ending):
    path = tmp_path / f"rows.{ending}"
    path.write_text(f"text{delimiter}label\na, b{delimiter}1\n")
    assert both(path, TableOptions(delimiter=given)) == [{"text": "a, b", "label": "1"}]


@pytest.mark.parametrize("given", ["", ";;", '"', "\n", "\r", " ", "\0", "\udc80"])
def test_what_cannot_be_a_delimiter_is_one_line(tmp_path, given):
    (tmp_path / "rows.csv").write_text("text,label\na,1\n")
    with pytest.raises(UserError, match="--delimiter .*: expected one character"):
        read_table(tmp_path / "rows.csv", TableOptions(delimiter=given))


def test_a_delimiter_that_the_file_does_not_have_is_named(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\na,1\n")
    with pytest.raises(UserError, match="separated by commas, not by ';' as --delimiter says"):
        read_table(tmp_path / "rows.csv", TableOptions(delimiter=";"))


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16", "utf-16-le", "utf-32", "cp500", "utf-8"])
def test_an_encoding_that_is_named_is_used(tmp_path, encoding):
    path = tmp_path / "rows.csv"
    path.write_bytes("text,label\r\ncaf\u00e9 \u00e0 la,1\r\n".encode(encoding))
    assert both(path, TableOptions(encoding=encoding)) == [{"text": "caf\u00e9 \u00e0 la", "label": "1"}]


def test_a_byte_order_mark_wins_over_the_encoding(tmp_path):
    (tmp_path / "rows.csv").write_bytes(BOM + "text\ncaf\u00e9\n".encode())
    assert both(tmp_path / "rows.csv", TableOptions(encoding="latin-1")) == [{"text": "caf\u00e9"}]


@pytest.mark.parametrize("encoding", ["nonsense", "base64", "rot13", "undefined", "", "utf-16", "a\0b"])
def test_an_encoding_that_is_none_or_another_is_one_line(tmp_path, encoding):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"text,label\na,1\nxyz,0\n0")
    with pytest.raises(UserError, match="--encoding|not UTF-16|not UNDEFINED|NUL|separated|line|no column|header"):
        read_table(path, TableOptions(encoding=encoding)).column("text", "--text-column")


# ---------------------------------------------------------------- round trips

TEXT = st.text(st.characters(exclude_categories=("Cs",)) | st.sampled_from('",\n\r\t;\\\u2028\x85\ufeff|\''), max_size=12)
NAMES = st.lists(st.text("abcxyz\u00e9", min_size=1, max_size=4), min_size=1, max_size=4, unique=True)


@st.composite
def tables(draw, exclude=""):
    """Column names, and rows of cells of which no row is blank."""
    names = draw(NAMES)
    cell = TEXT.map(lambda text: "".join(c for c in text if c not in exclude))
    rows = draw(st.lists(st.lists(cell, min_size=len(names), max_size=len(names)).filter(any), min_size=1, max_size=6))
    return names, rows


def as_dicts(names, rows):
    return [dict(zip(names, row, strict=True)) for row in rows]


@FAST
@given(table=tables(), end=st.sampled_from(["\n", "\r\n", "\r"]),
       quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), delimiter=st.sampled_from(",;\t"),
       encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]), index=st.booleans())
def test_any_csv_comes_back_as_it_was_written(tmp_path, table, end, quoting, delimiter, encoding, index):
    names, rows = table
    if {"\r", "\n"} & set("".join(map("".join, rows))):  # Python's writer puts its own line end alone into quotes
        quoting = csv.QUOTE_ALL
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerows([["", *row] if index else row for row in [names, *rows]])
    (tmp_path / "rows.csv").write_bytes(text.getvalue().encode(encoding))
    assert both(tmp_path / "rows.csv", TableOptions(delimiter=delimiter)) == as_dicts(names, rows)


@FAST
@given(table=tables("\t\n\r"), end=st.sampled_from(["\n", "\r\n", "\r"]), bom=st.booleans(), extra=st.integers(0, 2))
def test_any_tsv_comes_back_as_it_was_written(tmp_path, table, end, bom, extra):
    names, rows = table
    lines = ["\t".join(names), *("\t".join(row) + "\t" * extra for row in rows)]
    (tmp_path / "rows.tsv").write_bytes((BOM if bom else b"") + "".join(line + end for line in lines).encode())
    assert both(tmp_path / "rows.tsv") == as_dicts(names, rows)


@FAST
@given(table=tables(), end=st.sampled_from(["\n", "\r\n", "\r", "\n\n"]), bom=st.booleans(), ascii_only=st.booleans())
def test_any_json_lines_come_back_as_they_were_written(tmp_path, table, end, bom, ascii_only):
    rows = as_dicts(*table)
    text = "".join(json.dumps(row, ensure_ascii=ascii_only) + end for row in rows)
    (tmp_path / "rows.jsonl").write_bytes((BOM if bom else b"") + text.encode())
    assert both(tmp_path / "rows.jsonl") == rows


@FAST
@given(table=tables())
def test_any_parquet_comes_back_as_it_was_written(tmp_path, table):
    rows = as_dicts(*table)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert both(tmp_path / "rows.parquet") == rows


@FAST
@given(lines=st.lists(st.text('ab",;\t\\', max_size=8), max_size=8), ending=st.sampled_from(["csv", "tsv"]))
def test_no_line_is_lost_without_a_word(tmp_path, lines, ending):
    """Any lines below a header: each is a row, an error, a part of a row in quotes, or blank."""
    path = tmp_path / f"rows.{ending}"
    path.write_text("\n".join(["text,label" if ending == "csv" else "text\tlabel", *lines, ""]))
    rows = list(stream.open_rows(path).rows)
    fuzz.check_lines(path.read_bytes(), [row.line for row in rows], ending)
    if '"' not in "".join(lines):
        assert len(rows) == sum(1 for line in lines if line)
    try:
        assert len(read_table(path)) == len(rows)
    except UserError:
        assert not rows or any(row.error for row in rows)


# ---------------------------------------------------------------- what is read around a bad row, and from elsewhere

def test_rows_after_an_open_quote_are_read(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"a,1\nb,0\nc,1\n"d\ne",0\n')
    rows = list(stream.open_rows(path).rows)
    assert [(row.line, bool(row.error)) for row in rows] == [(2, True), (3, False), (4, False), (5, False)]
    assert rows[3].columns == {"text": "d\ne", "label": "0"}


def test_standard_input_is_read_alike_and_stays_open(tmp_path, monkeypatch):
    file = io.BufferedReader(io.BytesIO(BOM + b"text,label\ra,1\rb,0\r"))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=file))
    assert [row.columns for row in stream.open_rows("-", "csv").rows] == [A, B]
    assert not file.closed


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_every_reader_of_text_takes_marks_and_line_ends(tmp_path, end):
    """CoLA's files, plain sentences and minimal pairs."""
    def write(name, *lines):
        (tmp_path / name).write_bytes(BOM + b"".join(line + end for line in lines))
        return tmp_path / name
    split = read_cola_tsv(write("cola.tsv", b"s\t1\t\tGood.", b"s\t0\t*\tBad."))
    assert (split.sources, split.labels, split.sentences) == (["s", "s"], [1, 0], ["Good.", "Bad."])
    assert read_sentences(write("a.txt", b"One  sentence.", b"", b"Two."))[0] == ["One sentence.", "Two."]
    pairs = read_pairs(write("pairs.tsv", b"phenomenon\tparadigm\tgood\tbad", b'p\tq\t"a\tb'))
    assert [(pair.phenomenon, pair.good) for pair in pairs] == [("p", '"a')]
    assert [line.text for line in read_lines(tmp_path / "a.txt")] == ["One  sentence.", "", "Two."]


@pytest.mark.parametrize("read", [read_cola_tsv, read_sentences, read_pairs])
@pytest.mark.parametrize("content", [b"", BOM, BOM + b"\r\n", b"\n\n", codecs.BOM_UTF16_LE])
def test_a_file_of_nothing_is_one_line(tmp_path, read, content):
    (tmp_path / "a.tsv").write_bytes(content)
    with pytest.raises(UserError, match="a.tsv: (the file is empty|no sentence in it)"):
        read(tmp_path / "a.tsv")
