"""The digest that a run records is of the bytes that were parsed, though the file is replaced at the next moment."""
import hashlib
import os

import pyarrow
import pyarrow.parquet
import pytest

from data import lines
from data_utils import load_task, read_cola_tsv
from experiments.distil_inputs import read_text

ROWS = [("The cat sleeps.", 1), ("The cat sleep.", 0), ("A dog barks.", 1), ("A dog bark.", 0)] * 6


def table(path) -> None:
    if path.suffix == ".parquet":
        texts, labels = zip(*ROWS, strict=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": labels}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(f'{{"text": "{text}", "label": {label}}}\n' for text, label in ROWS))
    else:
        mark = "," if path.suffix == ".csv" else "\t"
        path.write_text(f"text{mark}label\n" + "".join(f"{text}{mark}{label}\n" for text, label in ROWS))


@pytest.fixture
def replaced(monkeypatch):
    """Overwrites every file in place as soon as it has been opened and read, and returns the digests of the first bytes."""
    read, digests = lines.open_binary, {}

    def open_and_replace(path, expected):
        with read(path, expected) as file:
            content = file.read()
        digests[str(path)] = hashlib.sha256(content).hexdigest()
        copy = f"{path}.read"
        with open(copy, "wb") as file:
            file.write(content)
        with open(path, "wb") as file:
            file.write(b"other bytes")
        opened = open(copy, "rb")
        os.unlink(copy)
        return opened

    monkeypatch.setattr(lines, "open_binary", open_and_replace)
    monkeypatch.setattr("data.stream.open_binary", open_and_replace)
    return digests


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("files", [("train",), ("train", "validation")])
def test_a_tables_digest_is_of_the_bytes_that_were_parsed(tmp_path, replaced, suffix, files):
    for name in files:
        table(tmp_path / f"{name}{suffix}")
    task = load_task("csv", tmp_path)
    assert len(task.train) + sum(map(len, task.dev.values())) == len(ROWS) * len(files)
    assert task.files == replaced and len(replaced) == len(files)


def test_colas_digests_are_of_the_bytes_that_were_parsed(tmp_path, replaced):
    for name in ("in_domain_train", "in_domain_dev", "out_of_domain_dev"):
        (tmp_path / f"{name}.tsv").write_text("".join(f"s\t{label}\t\t{text}\n" for text, label in ROWS))
    assert load_task("cola", tmp_path).files == replaced and len(replaced) == 3


@pytest.mark.parametrize("folder", [False, True])
def test_plain_texts_digests_are_of_the_bytes_that_were_parsed(tmp_path, replaced, folder):
    paths = [tmp_path / name for name in ("a.txt", "b.txt")][:2 if folder else 1]
    for path in paths:
        path.write_text("".join(f"The {one} teacher has given {number} books to Mary.\n"
                                for number in range(40) for one in ("old", "young")))
    task = load_task("edits", tmp_path if folder else paths[0])
    assert task.files == replaced and len(replaced) == len(paths)


def test_the_digest_of_text_is_of_the_bytes_that_were_parsed(tmp_path, replaced):
    (tmp_path / "a.txt").write_text("A sentence.\nAnother one.\n")
    sentences, digests = read_text((str(tmp_path / "a.txt"),))
    assert sentences == ["A sentence.", "Another one."] and digests == replaced


def test_a_split_knows_its_files_digest(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("s\t1\t\tGood.\ns\t0\t*\tBad.\n")
    assert read_cola_tsv(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
