"""Readers that lose nothing and name what is wrong; batches that hold every row once, in an order the seed fixes."""
import itertools
import os
import random
import re
import warnings
from pathlib import Path

import pytest
import torch
import toy
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import data_utils
from data import arrow
from data.lines import encoding_of
from data.stream import is_blank
from data_utils import (
    Split,
    TokenIds,
    bucket_by_length,
    collate,
    encode,
    epoch_order,
    load_task,
    make_batches,
    read_cola_tsv,
    split_large,
)
from machine.errors import UserError
from record.files import sha256

FAST = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
COLA = Path(os.environ.get("LORA_DISTIL_DATA") or Path(__file__).parents[2] / "shared" / "data") / "cola"
# Anything that ends a line for str.splitlines but not in a file: kept inside a sentence.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\t\n\r") | st.sampled_from("\x0b\x0c\x1c\x85\u2028\u2029"))
SENTENCES = TEXT.filter(str.strip)
ROWS = st.lists(st.tuples(TEXT, st.integers(0, 1), TEXT, SENTENCES), min_size=1, max_size=20)
GOOD = b"s\t1\t\tGood.\n"


class WordTokenizer:
    """One token a word; the id is the word's length."""

    pad_token_id = None

    def __call__(self, sentences, truncation=False, max_length=None, **_):
        ids = [[len(word) for word in sentence.split(" ") if word] for sentence in sentences]
        ids = [tokens[:max_length] for tokens in ids] if truncation else ids
        return {"input_ids": ids, "special_tokens_mask": [[0] * len(tokens) for tokens in ids]}


def words_of(lengths: list[int]) -> list[str]:
    return [" ".join(["w" * (1 + row % 7)] * length) for row, length in enumerate(lengths)]


def lists(buckets) -> list[list[int]]:
    return [rows.tolist() for rows in buckets]


# ---------------------------------------------------------------- reading

@FAST
@given(rows=ROWS, end=st.sampled_from(["\n", "\r\n"]), last=st.booleans())
def test_any_sentences_come_back_in_order(tmp_path, rows, end, last):
    text = end.join("\t".join(map(str, row)) for row in rows) + (end if last else "")
    (tmp_path / "a.tsv").write_bytes(text.encode())
    split = read_cola_tsv(tmp_path / "a.tsv")
    expected = [(s, y, x) for s, y, _, x in rows]
    expected[0] = (expected[0][0].removeprefix("\ufeff"), *expected[0][1:])  # at a file's beginning, a byte order mark
    assert list(zip(split.sources, split.labels, split.sentences, strict=True)) == expected


@settings(FAST, max_examples=400)
@given(data=st.binary() | st.lists(st.sampled_from([GOOD, b"\n", b"\t", b"\r", b"1", b"\xff", b"x", b"s\t0\t*\t"]))
       .map(b"".join))
@example(data=b"\n")
@example(data=b"\r\n")
@example(data=b"s\t1\t\t\xe2\x80\xa8\n")
def test_any_bytes_are_a_split_or_one_line_naming_file_and_line(tmp_path, data):
    path = tmp_path / "any.tsv"
    path.write_bytes(data)
    try:
        split = read_cola_tsv(path)
    except UserError as error:
        blank = is_blank(data.decode(encoding_of(data), "replace"))
        assert str(error).startswith((f"{path}: the file is empty",) if blank else (f"{path}, line ", f"{path}: not UTF-"))
        assert len(str(error).splitlines()) == 1
    else:
        assert len(split.sentences) == len(split.labels) == len(split.sources) == len(split) > 0
        assert set(split.labels) <= {0, 1}
        assert all(sentence.strip() for sentence in split.sentences)


@pytest.mark.parametrize("line, what", [
    (b"s\t1\tOnly three.", "3 column"), (b"s\t1\t\tFive.\tcolumns", "5 column"), (b"", "1 column"),
    (b"s\t2\t\tLabel.", "label '2'; expected 0 or 1"), (b"s\t\t\tLabel.", "label ''"), (b"s\t1 \t\tLabel.", "label '1 '"),
    (b"s\t1\t\tCaf\xe9.", "not UTF-8 .byte 0xe9."), (b"s\t1\t\t \xc2\xa0", "the sentence is empty"), (b"s\t1\t\t", "empty"),
])
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, what):
    path = tmp_path / "bad.tsv"
    path.write_bytes(GOOD * 2 + line + b"\n" + GOOD)
    with pytest.raises(UserError, match=what) as caught:
        read_cola_tsv(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")


def test_a_missing_or_empty_file_is_named(tmp_path):
    (tmp_path / "empty.tsv").touch()
    for name, what in (("missing.tsv", "cannot be read"), ("empty.tsv", "the file is empty"), ("", "cannot be read")):
        with pytest.raises(UserError, match=what) as caught:
            read_cola_tsv(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_a_task_is_its_three_files_with_their_digests(tmp_path):
    task = load_task("cola", toy.write_cola(tmp_path, train=20, dev=6))
    assert (len(task.train), {name: len(split) for name, split in task.dev.items()}) == (
        20, {"in_domain": 6, "out_of_domain": 6})
    assert task.files == {str(tmp_path / name): sha256(tmp_path / name) for name in toy.COLA_FILES}
    assert task.dev["out_of_domain"].sentences == [sentence for sentence, _ in toy.toy_rows(6, 2)]


def test_a_training_split_of_one_class_is_refused_but_a_development_split_may_be(tmp_path):
    toy.write_cola(tmp_path)
    (tmp_path / "in_domain_dev.tsv").write_bytes(GOOD * 3)
    assert load_task("cola", tmp_path).dev["in_domain"].labels == [1, 1, 1]
    (tmp_path / "in_domain_train.tsv").write_bytes(GOOD * 3)
    with pytest.raises(UserError, match="in_domain_train.tsv: every label is 1; training needs both classes"):
        load_task("cola", tmp_path)


def test_a_limit_takes_evenly_spaced_rows_and_still_needs_every_class(tmp_path):
    toy.write_cola(tmp_path)
    (tmp_path / "in_domain_train.tsv").write_bytes(GOOD * 5 + b"s\t0\t*\tBad.\n" * 3)
    task = load_task("cola", tmp_path)
    limited = task.limit(4)
    assert limited.train.labels == [1, 1, 1, 0] and len(limited.dev["in_domain"]) == 4
    assert limited.dev["in_domain"].sentences == task.dev["in_domain"].sentences[::3]
    assert task.limit(100).train == task.train
    with pytest.raises(UserError, match="--limit 1: the 1 training rows have no example of class 0"):
        task.limit(1)


def test_an_unknown_task_or_folder_says_what_was_expected(tmp_path):
    with pytest.raises(UserError, match="--task colla: unknown; expected one of cola, sst2, mrpc, "):
        load_task("colla", tmp_path)
    with pytest.raises(UserError, match="not a folder; expected one with in_domain_train.tsv"):
        load_task("cola", tmp_path / "missing")


# ---------------------------------------------------------------- token ids

def test_plain_text_is_a_task_of_real_against_edited_sentences(tmp_path):
    """All text files of a folder, with their digests; a held-out part of each class; the same for every seed."""
    for name, start in (("a.txt", 0), ("b.txt", 300)):
        (tmp_path / name).write_text("".join(f"The cat saw number {n} of them.\n\n" for n in range(start, start + 300)))
    (tmp_path / "notes.md").write_text("not read\n")
    task = data_utils.load_task("edits", tmp_path)
    assert task == data_utils.load_task("edits", tmp_path) and task.classes == ("0", "1")
    assert task.files == {str(tmp_path / name): sha256(tmp_path / name) for name in ("a.txt", "b.txt")}
    assert len(task.train) == 588 and {split: len(rows) for split, rows in task.dev.items()} == {"held_out": 12}
    assert sum(task.train.labels) == 294 and sum(task.dev["held_out"].labels) == 6
    assert not set(task.train.sentences) & set(task.dev["held_out"].sentences)
    one = data_utils.load_task("edits", tmp_path / "a.txt")
    assert len(one.train) == 294 and list(one.files) == [str(tmp_path / "a.txt")]
    rows = data_utils.read_rows(tmp_path / "a.txt", "edits", data_utils.DEFAULT_COLUMNS, " ", ["0", "1"])
    assert sorted(rows.sentences) == sorted(one.train.sentences + one.dev["held_out"].sentences)


def test_plain_text_that_is_no_task_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("Go.\nNo way.\n")
    (tmp_path / "one.txt").write_text("The cat sat on the mat.\n")
    (tmp_path / "none.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait\n")
    for data, said in ((None, "--task edits: needs --data, a text file"), ("empty", "no .txt file in it"),
                       ("short.txt", "no sentence of 3 to 18 words"), ("one.txt", "training needs both classes"),
                       ("none.txt", "no sentence in it"), ("latin.txt", "line 1: not UTF-8 (byte 0xe9)"),
                       ("missing.txt", "cannot be read")):
        with pytest.raises(UserError, match=f"^[^\n]*{re.escape(said)}[^\n]*$"):
            data_utils.load_task("edits", data and tmp_path / data)


@pytest.mark.parametrize("at_a_time", [1, 3, 100])
def test_truncation_keeps_the_beginning_and_warns_once_with_the_count(monkeypatch, at_a_time):
    monkeypatch.setattr(arrow, "AT_A_TIME", at_a_time)
    sentences = words_of([3, 9, 5, 12])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ids = encode(WordTokenizer(), sentences, max_length=5)
    assert [str(w.message) for w in caught] == ["2 of 4 sentences are longer than 5 tokens and were truncated (tail cut)"]
    assert ids == [tokens[:5] for tokens in WordTokenizer()(sentences)["input_ids"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encode(WordTokenizer(), sentences, max_length=12) == WordTokenizer()(sentences)["input_ids"]


@pytest.mark.parametrize("at_a_time", [1, 100])
def test_a_sentence_without_a_token_is_named(monkeypatch, at_a_time):
    monkeypatch.setattr(arrow, "AT_A_TIME", at_a_time)
    with pytest.raises(UserError, match="row 2: the tokenizer makes no token of '  '"):
        encode(WordTokenizer(), ["a", "  "], 5)


# ---------------------------------------------------------------- batches

@FAST
@given(lengths=st.lists(st.integers(1, 60), max_size=200), batch_size=st.integers(1, 40), seed=st.integers(0, 99999))
def test_buckets_hold_every_row_once_sorted_by_length(lengths, batch_size, seed):
    buckets = bucket_by_length(lengths, batch_size, seed)
    assert sorted(row for rows in buckets for row in rows) == list(range(len(lengths)))
    assert [len(rows) for rows in buckets[:-1]] == [batch_size] * (len(buckets) - 1)
    assert all(0 < len(rows) <= batch_size for rows in buckets)
    # As few pads as any cut into batches of this size has: no row of a batch is longer than one of the next.
    in_order = [lengths[row] for rows in buckets for row in rows]
    assert in_order == sorted(in_order)
    assert lists(bucket_by_length(lengths, batch_size, seed)) == lists(buckets)


@FAST
@given(lengths=st.lists(st.integers(1, 60), max_size=200), bound=st.integers(1, 400), seed=st.integers(0, 99999))
def test_a_token_bound_holds_pads_included(lengths, bound, seed):
    buckets = bucket_by_length(lengths, 1, seed, batch_tokens=bound)
    assert sorted(row for rows in buckets for row in rows) == list(range(len(lengths)))
    for rows in buckets:
        assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= bound
    for rows, following in zip(buckets, buckets[1:], strict=False):  # and it is used: no further row would have fitted
        assert (len(rows) + 1) * lengths[following[0]] > bound


def test_the_seed_mixes_rows_of_equal_length():
    first, second = bucket_by_length([5] * 40, 8, seed=1), bucket_by_length([5] * 40, 8, seed=2)
    assert lists(first) != lists(second)


@FAST
@given(ids=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=80), batch_size=st.integers(1, 9),
       seed=st.integers(0, 99999))
def test_buckets_of_neighbours_hold_every_row_once_sorted_by_length(ids, batch_size, seed):
    lengths = list(map(len, ids))
    buckets = bucket_by_length(lengths, batch_size, seed, shared_prefixes=TokenIds.of(ids))
    order = [row for rows in buckets for row in rows]
    assert sorted(order) == list(range(len(ids))) and [lengths[row] for row in order] == sorted(lengths)
    assert [len(rows) for rows in buckets[:-1]] == [batch_size] * (len(buckets) - 1)
    assert lists(bucket_by_length(lengths, batch_size, seed, shared_prefixes=TokenIds.of(ids))) == lists(buckets)


def in_python(ids: list[list[int]], size: int, seed: int, bound: int | None, shared: bool) -> list[list[int]]:
    """The same buckets by lists, dictionaries and `sorted`."""
    draw, ranks = random.Random(seed), {}
    order = sorted(range(len(ids)), key=lambda row: (len(ids[row]), draw.random()))
    if shared:
        by_length, order = [list(rows) for _, rows in itertools.groupby(order, key=lambda row: len(ids[row]))], []
        for rows in by_length:
            rows.sort(key=lambda row: [ranks[token] if token in ranks else ranks.setdefault(token, draw.random())
                                       for token in ids[row]])
            fours = [rows[i:i + 4] for i in range(0, len(rows), 4)]
            draw.shuffle(fours)
            order += itertools.chain(*fours)
    buckets = []
    for row in order:
        full = buckets and (len(buckets[-1]) == size if bound is None else (len(buckets[-1]) + 1) * len(ids[row]) > bound)
        buckets = [*buckets, [row]] if full or not buckets else [*buckets[:-1], [*buckets[-1], row]]
    return buckets


@settings(FAST, max_examples=300)
@given(ids=st.lists(st.lists(st.integers(0, 5) | st.integers(0, 49999), min_size=1, max_size=9), max_size=60),
       size=st.integers(1, 9), seed=st.integers(0, 99999), bound=st.none() | st.integers(1, 60), shared=st.booleans())
def test_buckets_are_those_of_plain_python_to_the_row(monkeypatch, ids, size, seed, bound, shared):
    """Runs that are resumed or repeated need the very rows that they had."""
    monkeypatch.setattr(arrow, "AT_A_TIME", 7)
    found = bucket_by_length([len(row) for row in ids], size, seed, bound, TokenIds.of(ids) if shared else None)
    assert lists(found) == in_python(ids, size, seed, bound, shared)


@FAST
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20), tokens=st.floats(0, 200), features=st.booleans())
def test_a_split_batch_is_its_rows_in_order_in_few_pieces_of_like_size(lengths, tokens, features):
    ids = [list(range(1, n + 1)) for n in lengths]
    numbers = [[n + 1e-12] for n in lengths] if features else []  # beyond float32's digits
    batch = collate(ids, [n % 2 for n in lengths], list(range(len(ids))), 0, numbers)
    pieces = batch.split(tokens)
    for name in ("labels", "rows", *(["features"] if features else [])):
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(batch, name))
    assert not features or batch.features.tolist() == numbers
    assert [row[mask.bool()].tolist() for piece in pieces
            for row, mask in zip(piece.input_ids, piece.attention_mask, strict=True)] == ids
    assert [piece.tokens for piece in pieces] == [int(piece.attention_mask.sum()) for piece in pieces]
    assert all(piece.input_ids.shape[1] == max(lengths[row] for row in piece.rows) for piece in pieces)
    assert all(piece.input_ids.numel() <= tokens or len(piece.rows) == 1 for piece in pieces)
    sizes = [len(piece.rows) for piece in pieces]
    assert max(sizes) - min(sizes) <= 1
    fewer = -(-len(lengths) // max(1, len(pieces) - 1))  # rows of a piece, were there one less
    assert len(pieces) == 1 or fewer * max(lengths) > tokens


def test_only_batches_of_more_than_twice_the_mean_get_parts():
    batches = split_large([collate([[1] * width] * rows, [0] * rows, list(range(rows)), 0)
                           for rows, width in ((4, 3), (4, 3), (4, 6), (4, 9), (1, 40))])
    assert [len(batch.micro or ()) for batch in batches] == [0, 0, 0, 0, 0]  # the mean is 112 / 5
    batches = split_large([*batches[:4], collate([[1] * 40] * 3, [0] * 3, [0, 1, 2], 0)])
    assert [len(batch.micro or ()) for batch in batches] == [0, 0, 0, 0, 2]  # 192 / 5: of 120 tokens two parts of 80 and 40
    assert batches[0].micro_batches() == [batches[0]] and batches[4].micro_batches() is batches[4].micro


def test_rows_that_begin_alike_stand_together_in_fours_and_the_fours_are_mixed():
    ids = [[row % 5, row % 7 // 4, row] for row in range(60)]  # twelve rows begin with each of five tokens
    found = [sum(lists(bucket_by_length([3] * 60, 8, seed, shared_prefixes=TokenIds.of(ids))), []) for seed in range(30)]
    mixed = 0
    for order in found:
        fours = [[ids[row] for row in order[i:i + 4]] for i in range(0, 60, 4)]
        assert all(len({first for first, *_ in four}) == 1 for four in fours)
        assert all(len(list(itertools.groupby(second for _, second, _ in four))) <= 2 for four in fours)  # and go on alike
        mixed += len(list(itertools.groupby(four[0][0] for four in fours))) > 8  # sorted, it would be 5
    assert mixed > 25 and len({tuple(order) for order in found}) == 30


@FAST
@given(batches=st.integers(0, 60), seed=st.integers(0, 99999), epoch=st.integers(1, 99))
def test_an_epochs_order_is_a_permutation_fixed_by_seed_and_epoch(batches, seed, epoch):
    order = epoch_order(batches, seed, epoch)
    assert sorted(order) == list(range(batches))
    random.seed(0)  # no global state takes part
    assert epoch_order(batches, seed, epoch) == order


def test_orders_differ_by_epoch_and_by_seed():
    orders = [tuple(epoch_order(50, seed, epoch)) for seed in (1, 2, 11, 12) for epoch in (1, 2, 11, 12)]
    assert len(set(orders)) == len(orders)


def test_collate_pads_on_the_right_and_masks_the_pads():
    batch = collate([[1, 2, 3], [4], [5, 6]], [0, 1, 1], [2, 0, 1], pad_id=9)
    assert batch.input_ids.tolist() == [[5, 6, 9], [1, 2, 3], [4, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert (batch.labels.tolist(), batch.rows.tolist(), batch.tokens) == ([1, 0, 1], [2, 0, 1], 6)
    assert batch.input_ids.dtype == batch.labels.dtype == batch.rows.dtype == torch.int64


def test_padding_percent_is_pads_over_computed_tokens():
    batches = [collate([[1, 2, 3], [4]], [0, 1], [0, 1], 0), collate([[1, 2]], [0], [0], 0)]
    assert data_utils.padding_percent(batches) == pytest.approx(100 * 2 / 8)
    assert data_utils.padding_percent(batches[1:]) == 0


@FAST
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60), batch_size=st.integers(1, 16))
def test_batches_hold_each_sentence_with_its_own_tokens_and_label(lengths, batch_size):
    sentences = words_of(lengths)
    labels = [row % 2 for row in range(len(lengths))]
    expected = WordTokenizer()(sentences)["input_ids"]
    seen = {}
    for batch in make_batches(Split(sentences, labels), WordTokenizer(), 99, batch_size, seed=3):
        for ids, mask, label, row in zip(batch.input_ids, batch.attention_mask, batch.labels, batch.rows, strict=True):
            assert row.item() not in seen
            seen[row.item()] = (ids[mask.bool()].tolist(), label.item())
    assert seen == {row: (expected[row], labels[row]) for row in range(len(lengths))}


def test_colas_batches_of_32_compute_at_most_5_percent_pads():
    """On CoLA's training sentences; where they are absent, on lengths drawn as theirs are (mean 7.7, 3 to 40 words)."""
    if COLA.is_dir():
        split = read_cola_tsv(COLA / "in_domain_train.tsv")
        assert len(split) == 8551
    else:
        draw = random.Random(0)
        lengths = [min(40, max(3, round(draw.lognormvariate(1.93, 0.46)))) for _ in range(8551)]
        split = Split(words_of(lengths), [0, 1] * 4275 + [0])
    batches = make_batches(split, WordTokenizer(), 512, 32, seed=12345)
    assert data_utils.padding_percent(batches) <= 5
    ids = WordTokenizer()(split.sentences)["input_ids"]
    in_file_order = [collate(ids, split.labels, list(range(i, min(i + 32, 8551))), 0) for i in range(0, 8551, 32)]
    assert data_utils.padding_percent(in_file_order) > 30  # what sorting saves


def test_bucketing_changes_no_sentences_logits(tmp_path):
    """Invariant 10, on a real GPT-2 classifier of toy size: alone or in any bucket, the same logits."""
    from data.backbones import load_tokenizer
    from model import load_classifier
    from train_utils import compute_logits

    name = str(toy.write_model(tmp_path))
    torch.manual_seed(0)
    classifier = load_classifier(name, 2)[0]
    torch.nn.init.normal_(classifier.net.score.weight)  # a fresh head is zero
    sentences, labels = zip(*toy.toy_rows(30, 5), strict=True)
    split, tokenizer = Split(list(sentences), list(labels)), load_tokenizer(name)
    alone = compute_logits(classifier, make_batches(split, tokenizer, 64, 1, seed=0))
    assert alone.std(0).min() > 0.1  # the sentences do differ
    for seed in (1, 2):
        torch.testing.assert_close(compute_logits(classifier, make_batches(split, tokenizer, 64, 8, seed)), alone,
                                   rtol=0, atol=1e-5)
