"""Large splits: tokenised by several processes, mapped from the cache, the same batches to the bit as in one list."""
import json
import resource
import warnings

import pytest
import torch
import toy

import data_utils
from data import cache, splits, tables, tasks, tokens
from data.tiny import train_tokenizer
from data_utils import Batches, Split, encode, make_batches, padding_percent, split_large
from machine.errors import UserError
from options.schema import TableOptions

WORDS = "the cat sat on a mat while another dog ran home".split()
TEXTS = [" ".join(WORDS[(row * step) % 11] for step in range(1, 2 + row % 7)) for row in range(500)]


@pytest.fixture
def tokenizer():
    return train_tokenizer(TEXTS)


@pytest.fixture(autouse=True)
def large(monkeypatch, tmp_path):
    """Every split of more than 20 rows is a large one, and the cache is empty."""
    set_large(monkeypatch, 20)
    monkeypatch.setattr(tasks, "LARGE_FILE", 20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/lora-distil"


def set_large(monkeypatch, rows: int) -> None:
    for module in (data_utils, tokens):
        monkeypatch.setattr(module, "LARGE_SPLIT", rows)


def ids_of(found: data_utils.TokenIds) -> list[list[int]]:
    return [found.ids[start:end].tolist() for start, end in zip(found.ends, found.ends[1:], strict=False)]


def batches_of(tokenizer, **more):
    split = Split(TEXTS, [row % 3 for row in range(500)], features=[[float(row), 1.0] for row in range(500)])
    return split_large(make_batches(split, tokenizer, 4, 8, 7, shared_prefixes=True, **more), 1, 2)


def test_tokens_of_several_processes_are_those_of_one_and_the_next_run_finds_them(tokenizer, large, monkeypatch):
    with pytest.warns(UserWarning) as first:
        found = data_utils.tokenise(tokenizer, TEXTS, 4, "head")
        expected = encode(tokenizer, TEXTS, 4, "head")
    assert ids_of(found) == expected and found.lengths.max() == 4
    # The same warning twice, for the processes count the cuts together.
    (line,) = {str(warning.message) for warning in first}
    assert "of 500 sentences are longer than 4 tokens" in line
    (folder,) = large.glob("tokens-*/")
    assert [path.name for path in folder.iterdir()] == ["tokens.arrow"]

    def no_more(*_, **__):
        raise AssertionError("tokenised again")
    monkeypatch.setattr(tokens, "_write", no_more)
    with pytest.warns(UserWarning) as again:
        assert ids_of(data_utils.tokenise(tokenizer, TEXTS, 4, "head")) == expected
    assert [str(warning.message) for warning in again] == [line]
    # Other texts, lengths, cuts, tokenizers or versions are other tokens.
    for change in (lambda: data_utils.tokenise(tokenizer, [*TEXTS[:-1], "the dog"], 4, "head"),
                   lambda: data_utils.tokenise(tokenizer, TEXTS, 5, "head"),
                   lambda: data_utils.tokenise(tokenizer, TEXTS, 4, "tail"),
                   lambda: data_utils.tokenise(train_tokenizer(TEXTS[:3]), TEXTS, 4, "head")):
        with pytest.raises(AssertionError, match="tokenised again"):
            change()
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    with pytest.raises(AssertionError, match="tokenised again"):
        data_utils.tokenise(tokenizer, TEXTS, 4, "head")


def test_batches_made_on_demand_are_those_of_a_list(tokenizer, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = batches_of(tokenizer)
        set_large(monkeypatch, 1000)
        expected = batches_of(tokenizer)
    assert isinstance(found, Batches) and isinstance(expected, list) and len(found) == len(expected)
    assert padding_percent(found) == padding_percent(expected) and len(found[1::2]) == len(expected[1::2])
    for batches, others in ((found, expected), (found[1::2], expected[1::2]), ([found[-1]], [expected[-1]])):
        for one, other in zip(batches, others, strict=True):
            for a, b in zip([one, *one.micro_batches()], [other, *other.micro_batches()], strict=True):
                assert a.tokens == b.tokens
                for name in ("input_ids", "attention_mask", "labels", "rows", "features"):
                    assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert any(batch.micro for batch in expected)  # or parts were not compared


def test_a_bad_row_is_named_by_its_number_and_leaves_nothing(tokenizer, large):
    texts = [*TEXTS[:321], "", *TEXTS[321:]]
    with pytest.raises(UserError, match="^row 322: the tokenizer makes no token of ''$"):
        data_utils.tokenise(tokenizer, texts, 64)
    assert not list(large.glob("tokens-*/"))


def test_a_full_disk_is_one_line_and_a_damaged_file_is_made_again(tokenizer, large):
    texts, (soft, hard) = TEXTS * 4, resource.getrlimit(resource.RLIMIT_FSIZE)
    expected = encode(tokenizer, texts, 64)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, hard))
    try:
        with pytest.warns(UserWarning) as said:
            assert ids_of(data_utils.tokenise(tokenizer, texts, 64)) == expected
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (line,) = {str(warning.message) for warning in said}
    assert "the cache cannot be written" in line and "\n" not in line and not list(large.glob("tokens-*/"))
    data_utils.tokenise(tokenizer, texts, 64)
    (path,) = large.glob("tokens-*/tokens.arrow")
    path.write_bytes(path.read_bytes()[:-100])
    assert ids_of(data_utils.tokenise(tokenizer, texts, 64)) == expected


@pytest.mark.parametrize("options", [["--layers", "1"], ["--targets", "q,v,mlp", "--batch-tokens", "60"]])
def test_a_run_on_large_splits_ends_in_the_same_bytes(gpt2_folder, tmp_path, monkeypatch, options):
    """With frozen blocks, whose results are cached batch by batch, and without."""
    toy.write_cola(tmp_path / "cola")
    for name, rows in (("large", 5), ("small", 1000)):
        set_large(monkeypatch, rows)
        assert toy.main("LoRA", "12345", "--model", gpt2_folder, "--data", tmp_path / "cola", "--epochs", "2", "--no-plots",
                        *options, "--out", tmp_path / name) == 0
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("large", "small")]
    assert weights[0] == weights[1]
    one, other = (toy.lines_of(tmp_path / name) for name in ("large", "small"))
    assert [{**line, "seconds": 0} for line in one] == [{**line, "seconds": 0} for line in other] and len(one) == 2
    assert toy.main("eval", tmp_path / "large", "--data", tmp_path / "cola/in_domain_dev.tsv", "--predictions",
                    tmp_path / "answers.tsv") == 0
    assert len((tmp_path / "answers.tsv").read_text().splitlines()) == 13


# ---------------------------------------------------------------- tables

ROWS = [{"text": text, "label": ["x", "y", "z"][row % 3], "size": row / 2} for row, text in enumerate(TEXTS)]


@pytest.mark.parametrize("labels", [TableOptions(feature_columns=("size",)), TableOptions(label_column="size")])
def test_a_large_file_is_parsed_once(tmp_path, large, monkeypatch, labels):
    for name, rows in (("train", ROWS), ("validation", ROWS[:40])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = tasks.load_task("csv", tmp_path, labels)
    assert first.train.sentences == TEXTS and len(list(large.glob("rows-*/"))) == 2
    assert first.problem == ("regression" if labels.label_column == "size" else "single-label")
    read = tables.read_table
    monkeypatch.setattr(tables, "read_table", None)
    again = tasks.load_task("csv", tmp_path, labels)
    assert again == first and again.files == first.files and again.train.take([3, 1]) == first.train.take([3, 1])
    # Another file, under the same name, is read.
    monkeypatch.setattr(tables, "read_table", read)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[1:]))
    assert len(tasks.load_task("csv", tmp_path, labels).train) == 499


def test_a_bad_large_file_is_refused_and_leaves_nothing(tmp_path, large):
    (tmp_path / "train.csv").write_text("text,label\n" + "a,x\nb,y\n" * 200 + "c\n")
    with pytest.raises(UserError, match="train.csv, row 401 .line 402.: 1 cells"):
        tasks.load_task("csv", tmp_path / "train.csv")
    assert not list(large.glob("rows-*/"))


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, large):
    large.parent.mkdir()
    large.write_text("a file in the folder's place")
    (tmp_path / "train.csv").write_text("text,label\n" + "a,x\nb,y\n" * 200)
    with pytest.warns(UserWarning, match="cannot be written"):
        task = tasks.load_task("csv", tmp_path / "train.csv")
    assert len(task.train) == 360 and splits.PARTS[0] == "sentences"
