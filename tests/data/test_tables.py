"""tables.py and the tasks made of tables: files, columns, classes, features, splits; real data by their formats."""
from __future__ import annotations

import csv
import json
import math
import warnings

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import toy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import StandardScaler
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import data_utils
from data.columns import classes_of, labels_of
from data.splits import read_split, set_aside, split_files
from data.stream import is_blank
from data.tables import read_table
from data_utils import encode, load_task
from experiments import distil_inputs, inputs
from machine.errors import UserError
from model import FeatureHead
from options.schema import TableOptions
from record.files import read_json

FAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ROWS = [{"text": "a fine, \"good\" film", "label": 1, "size": 1.5}, {"text": "\"dull\" and long", "label": 0, "size": 2.0},
        {"text": "NA", "label": 1, "size": -3.0}, {"text": "None", "label": 0, "size": 4.25}]


def write(path, rows):
    """Rows in the format that the path's ending names, by the standard library's and pyarrow's own writers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        is_csv = path.suffix == ".csv"
        with open(path, "w", newline="") as file:  # a TSV is unquoted
            style = {"delimiter": ","} if is_csv else {"delimiter": "\t", "quotechar": None, "quoting": csv.QUOTE_NONE}
            writer = csv.DictWriter(file, list(rows[0]), **style)
            writer.writeheader()
            writer.writerows(rows)
    return path


def words_tokenizer() -> PreTrainedTokenizerFast:
    """A BERT-like tokenizer: [CLS] words [SEP], each word a token."""
    words = "[PAD] [UNK] [CLS] [SEP] a film of many words that goes on and it is not good at all one two three four".split()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                   sep_token="[SEP]")


# ---------------------------------------------------------------- files

@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_the_same_split(tmp_path, ending):
    """A cell that says NA or None is a text, not a missing one."""
    table = read_table(write(tmp_path / f"rows.{ending}", ROWS))
    split, classes = read_split(table, TableOptions(feature_columns=("size",)), " ")
    assert split.sentences == [row["text"] for row in ROWS]
    assert ([classes[label] for label in split.labels], classes) == (["1", "0", "1", "0"], ["0", "1"])
    assert split.features == [(row["size"],) for row in ROWS]


@FAST
@given(texts=st.lists(st.text(st.characters(exclude_categories=("Cs", "Cc"))).filter(lambda text: not is_blank(text)),
                      min_size=2, max_size=20),
       ending=st.sampled_from(["csv", "tsv", "jsonl", "parquet"]))
def test_any_text_comes_back_as_it_was_written(tmp_path, texts, ending):
    rows = [{"text": text, "label": ("no", "yes")[i % 2]} for i, text in enumerate(texts)]
    split, classes = read_split(read_table(write(tmp_path / f"rows.{ending}", rows)), TableOptions(), " ")
    assert split.sentences == texts and [classes[label] for label in split.labels] == [row["label"] for row in rows]


@FAST
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode),
       ending=st.sampled_from(["csv", "tsv", "jsonl", "parquet"]))
def test_any_bytes_give_a_table_or_one_line(tmp_path, content, ending):
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(content)
    try:
        read_split(read_table(path), TableOptions(), " ")
    except UserError as error:
        assert "\n" not in str(error).strip()


@pytest.mark.parametrize("ending, content, said", [
    ("csv", b"", "the file is empty; expected a CSV file"),
    ("csv", b"text,label\n", "no rows in it"),
    ("jsonl", b"\n\n", "the file is empty"),
    ("csv", b'{"text": "a", "label": 1}\n', "holds JSON, not the CSV its ending says"),
    ("csv", b"text\tlabel\na\t1\n", "separated by tabs, which is not the CSV its ending says"),
    ("tsv", b"text,label\na,1\n", "separated by commas, which is not the TSV its ending says"),
    ("csv", b"PAR1\x15\x04", "a Parquet file, not the CSV file its ending says"),
    ("parquet", b"text,label\na,1\n", "not the Parquet file its ending says"),
    ("parquet", b"PAR1 broken", "not a readable Parquet file"),
    ("jsonl", b"text,label\na,1\n", "line 1: not a JSON object; expected a JSON Lines file"),
    ("jsonl", b'null\n{"text": "a", "label": 1}\n', "line 1: not a JSON object"),  # pyarrow's reader dies of this
    ("csv", b"text,label\na,1\nb,0,3\n", r"row 2 \(line 3\): 3 cells, and the header has 2 \(text, label\)"),
    ("csv", b'text,label\n"a,1\nb,0\n', r"row 1 \(line 2\): a double quote that is not closed"),
    ("csv", b"text,label\n\xff\xfe,1\n", "not UTF-8"),
    ("csv", b"text,text,label\na,b,1\n", "two columns are called 'text'"),
    ("xlsx", b"x", "unknown ending; expected one of .csv, .tsv, .jsonl, .parquet"),
    ("txt", b"x", "unknown ending; expected one of .csv, .tsv, .jsonl, .parquet; plain sentences, without labels, are for"),
])
def test_a_file_that_is_not_what_its_ending_says_is_refused_in_one_line(tmp_path, ending, content, said):
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        read_table(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------- columns

@pytest.mark.parametrize("options, rows, said", [
    ({"text_column": ("review",)}, ROWS, "--text-column: .* has no column 'review'; it has text, label, size"),
    ({"label_column": "class"}, ROWS, "--label-column: .* has no column 'class'; it has text, label, size"),
    ({"feature_columns": ("length",)}, ROWS, "--feature-columns: .* has no column 'length'"),
    ({"template": "Q: {question}"}, ROWS, "--template: .* has no column 'question'; it has text, label, size"),
    ({"template": "Q: {text"}, ROWS, "--template 'Q: {text': expected '}' before end of string"),
    ({"template": "no column"}, ROWS, "expected column names in braces"),
    ({"template": "{text!r}"}, ROWS, "expected column names in braces"),
    ({"feature_columns": ("text",)}, ROWS, "row 1: feature text is .*; expected a finite number or an empty cell"),
    ({}, [{"text": "a", "label": 1}, {"text": " ", "label": 0}], r"row 2: the text \(text\) is empty"),
    ({}, [{"text": "a", "label": 1}, {"text": "b", "label": "x"}], "labels of mixed types in label: a whole number"),
    ({}, [{"text": "a", "label": 1}, {"text": "b", "label": True}], "number .'1', row 1. and a boolean .'True', row 2"),
    ({}, [{"text": "a", "label": 1}, {"text": "b", "label": None}], r"row 2: the label \(label\) is missing"),
    ({}, [{"text": "a", "label": 0.5}, {"text": "b", "label": 1.0}], "row 1: label '0.5'; expected a string, a boolean"),
    ({}, [{"text": "a", "label": math.inf}, {"text": "b", "label": 1}], "row 1: label 'inf'; expected a string, a boolean"),
    ({}, [{"text": "a", "label": 1}, {"text": "b", "label": 1}], "every label is 1; training needs at least two classes"),
])
def test_a_column_that_does_not_serve_is_named(tmp_path, options, rows, said):
    with pytest.raises(UserError, match=said):
        read_split(read_table(write(tmp_path / "rows.jsonl", rows)), TableOptions(**options), " ")


def test_mixed_labels_of_a_csv_are_refused_too(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\na,1\nb,positive\n")
    with pytest.raises(UserError, match="a whole number .'1', row 1. and a text .'positive', row 2."):
        labels_of(read_table(tmp_path / "rows.csv"), "label")


def test_classes_are_ordered_by_what_they_are():
    assert classes_of(["10", "9", "10", "-1"], "x") == ["-1", "9", "10"]
    assert classes_of(["true", "false"], "x") == ["false", "true"]
    assert classes_of(["sad", "glad", "mad"], "x") == ["glad", "mad", "sad"]


def test_a_parquet_files_own_class_names_are_kept(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    for labels, path in (([1, 0, 1], tmp_path / "rows.parquet"), ([1, 1, 1], tmp_path / "one.parquet")):
        datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": labels}, features).to_parquet(path)
    split, classes = read_split(read_table(tmp_path / "rows.parquet"), TableOptions(), " ")
    assert (split.labels, classes) == ([1, 0, 1], ["neg", "pos"])
    assert read_table(tmp_path / "rows.parquet").columns["label"] == [1, 0, 1]
    with pytest.raises(UserError, match="every label is pos"):
        read_split(read_table(tmp_path / "one.parquet"), TableOptions(), " ")


def test_booleans_and_numbers_are_the_same_labels_in_every_format(tmp_path):
    rows = [{"text": "a", "label": True}, {"text": "b", "label": False}]
    assert labels_of(read_table(write(tmp_path / "rows.jsonl", rows)), "label") == ["true", "false"]
    assert [n.lower() for n in labels_of(read_table(write(tmp_path / "rows.csv", rows)), "label")] == ["true", "false"]


def test_text_columns_are_joined_or_put_into_the_template(tmp_path):
    rows = [{"q": "Who?", "a": "Ishmael", "label": "x"}, {"q": "Where?", "a": "", "label": "y"}]
    table = read_table(write(tmp_path / "rows.csv", rows))
    joined, _ = read_split(table, TableOptions(text_column=("q", "a"), join="text"), " [SEP] ")
    assert joined.sentences == ["Who? [SEP] Ishmael", "Where?"]
    filled, _ = read_split(table, TableOptions(template="{{Q}}: {q} A: {a}"), " ")
    assert filled.sentences == ["{Q}: Who? A: Ishmael", "{Q}: Where? A: "]


def test_the_separator_is_the_tokenizers_own():
    tokenizer = words_tokenizer()
    ids = tokenizer(f"it{inputs.separator_of(tokenizer)}is")["input_ids"]
    assert ids == tokenizer("it", "is")["input_ids"] and tokenizer.sep_token_id in ids[1:-1]


def test_a_label_that_training_lacks_is_refused(tmp_path):
    write(tmp_path / "train.csv", ROWS)
    write(tmp_path / "validation.csv", [{**ROWS[0], "label": 7}])
    with pytest.raises(UserError, match="validation.csv, row 1: label '7', which the training data lacks; it has 0, 1"):
        load_task("csv", tmp_path)


def test_missing_numbers_are_counted_and_a_feature_of_none_is_refused(tmp_path):
    rows = [{"text": "a", "label": i % 2, "x": "" if i < 3 else i, "y": "NaN"} for i in range(10)]
    data = write(tmp_path / "train.csv", rows)
    write(tmp_path / "dev.csv", rows)
    task = load_task("csv", tmp_path, TableOptions(feature_columns=("x",)))
    assert task.missing == {"x": 3} and math.isnan(task.train.features[0][0]) and task.train.features[3] == (3.0,)
    with pytest.raises(UserError, match=f"--feature-columns: {data} has no value at all under 'y'"):
        load_task("csv", tmp_path, TableOptions(feature_columns=("x", "y")))


# ---------------------------------------------------------------- splits

def test_evaluation_rows_are_a_file_a_split_or_a_share(tmp_path):
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(40)]
    train, other = write(tmp_path / "train.csv", rows), write(tmp_path / "other.csv", rows[:6])
    assert split_files(train, None) == (train, 0.1)
    assert split_files(train, str(other)) == (train, {"other": other})
    assert split_files(tmp_path, "other") == (train, {"other": other})
    assert split_files(tmp_path, ".25") == (train, 0.25)
    task = load_task("csv", train, TableOptions(eval_split="0.2"))
    assert (len(task.train), len(task.dev["held_out"])) == (32, 8)
    assert sorted(task.train.sentences + task.dev["held_out"].sentences) == sorted(row["text"] for row in rows)
    assert task == load_task("csv", train, TableOptions(eval_split="0.2"))


@pytest.mark.parametrize("data, split, said", [
    ("missing", None, "no such file or folder"), ("", "test", "has no such file; it has dev, train"),
    ("train.csv", "nothing.csv", "no such file; expected one, or a share such as 0.1"),
    ("train.csv", ".0", "between 0 and 1"),
    ("empty", None, "no training file; expected train.csv"),
])
def test_a_split_that_does_not_exist_is_named(tmp_path, data, split, said):
    write(tmp_path / "train.csv", ROWS)
    write(tmp_path / "dev.csv", ROWS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=said):
        split_files(tmp_path / data, split)


@FAST
@given(labels=st.lists(st.integers(0, 3), min_size=8, max_size=80), share=st.floats(0.05, 0.5))
def test_a_share_set_aside_divides_each_class_and_loses_no_row(labels, share):
    split = data_utils.Split([str(i) for i in range(len(labels))], labels)
    try:
        kept, aside = set_aside(split, share, "rows")
    except UserError:
        assert min(map(labels.count, labels)) == 1
        return
    assert sorted(kept.sentences + aside.sentences, key=int) == split.sentences
    assert set(kept.labels) == set(aside.labels) == set(labels)


# ---------------------------------------------------------------- truncation

@pytest.mark.parametrize("truncate, side", [("tail", "right"), ("head", "left")])
def test_truncation_at_either_side_is_the_tokenizers_own(truncate, side):
    tokenizer = words_tokenizer()
    tokenizer.truncation_side = side
    sentences = ["a film of many words that goes on and on", "short", "it is not a good film at all"]
    expected = tokenizer(sentences, truncation=True, max_length=6)["input_ids"]
    with warnings.catch_warnings(record=True):
        assert encode(tokenizer, sentences, 6, truncate) == expected


def test_truncation_of_the_middle_keeps_both_ends():
    tokenizer = words_tokenizer()
    (whole,) = tokenizer(["one two three four five six seven"])["input_ids"]
    with warnings.catch_warnings(record=True):
        (cut,) = encode(tokenizer, ["one two three four five six seven"], 7, "middle")
    assert cut == whole[:3] + whole[-4:]
    with pytest.raises(UserError, match="--max-length 2: no room for a token beside the tokenizer's 2 own"):
        encode(tokenizer, ["one two"], 2)


# ---------------------------------------------------------------- features

def test_features_are_standardised_as_scikit_learn_does():
    """Mean and deviation of the training rows alone; a missing value stands at the mean, a constant at zero."""
    draw = np.random.default_rng(0)
    train, other = draw.normal([1e9, -3, 7], [100, 0.01, 0], (50, 3)), draw.normal([1e9, -3, 7], [100, 0.01, 0], (9, 3))
    train[4, 0] = train[5, 1] = other[2, 1] = np.nan
    head = FeatureHead(torch.tensor(train), 2)
    expected = np.nan_to_num(StandardScaler().fit(train).transform(other))
    assert np.abs(head.standardise(torch.tensor(other)).numpy() - expected).max() < 1e-4
    assert torch.equal(head(torch.tensor(other)), torch.zeros(9, 2))  # fresh: changes nothing


@pytest.mark.parametrize("constant", [1.1, -7e5, 1 / 3, 0.0])
def test_a_constant_feature_says_nothing_whatever_rounding_leaves_of_it(constant):
    """As in scikit-learn: 50 times 1.1 has a mean that is not quite 1.1, hence a std of 1e-16, which is no scale."""
    train, other = np.full((50, 1), constant), np.array([[constant], [constant + 0.1], [np.nan]])
    found = FeatureHead(torch.tensor(train), 2).standardise(torch.tensor(other)).numpy()
    expected = np.nan_to_num(StandardScaler().fit(train).transform(other))
    assert np.abs(found - expected).max() < 1e-6 and np.abs(found).max() < 0.2


def test_a_feature_that_varies_little_is_no_constant():
    train = 1.1 + 1e-9 * np.arange(50.0)[:, None]
    found = FeatureHead(torch.tensor(train), 2).standardise(torch.tensor(train)).numpy()
    assert np.abs(found - StandardScaler().fit_transform(train)).max() < 1e-4 and found.std() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1e-160, 1e-3, 1e140])
def test_a_value_far_outside_the_training_rows_gives_a_finite_answer(scale):
    """float32 ends at 3e38, and infinity minus infinity is NaN: such an answer would look like one."""
    head = FeatureHead(torch.tensor(scale * np.random.default_rng(0).normal(size=(50, 40))), 2)
    torch.manual_seed(0)
    torch.nn.init.normal_(head.out.weight)
    far = torch.tensor(np.array([[1e150], [-1e150], [1e60], [np.nan]]).repeat(40, 1))
    logits = head(far)
    assert logits.isfinite().all() and torch.equal(head.standardise(far[3:]), torch.zeros(1, 40))
    # The sides stay apart, and a value inside the range is as it was.
    assert (head.standardise(far[0]) >= head.standardise(far[2])).all() and (head.standardise(far[1]) < 0).all()


def test_a_missing_value_is_told_from_the_mean():
    head = FeatureHead(torch.tensor([[1.0], [3.0]], dtype=torch.float64), 2)
    torch.nn.init.ones_(head.out.weight)
    mean, missing = head(torch.tensor([[2.0], [float("nan")]], dtype=torch.float64))
    assert not torch.equal(mean, missing)


def feature_rows(count, seed=0):
    """The label is the sign of x; the text says nothing."""
    draw = np.random.default_rng(seed)
    values = draw.normal(size=count)
    return [{"text": "the cat saw a dog"[:5 + i % 8], "label": "up" if x > 0 else "down", "x": x, "y": draw.normal()}
            for i, x in enumerate(values)]


@pytest.fixture(scope="module")
def table_run(tmp_path_factory):
    """A LoRA run with features on a table, over a toy GPT-2."""
    work = tmp_path_factory.mktemp("tables")
    toy.write_model(work / "model")
    write(work / "data" / "train.csv", feature_rows(64))
    write(work / "data" / "validation.csv", feature_rows(40, seed=1))
    assert toy.main("LoRA", "12345", "--model", work / "model", "--data", work / "data", "--feature-columns", "x,y",
                    "--epochs", "4", "--lr", "2e-2", "--batch-size", "8", "--out", work / "run",
                    "--no-plots") == 0
    return work


def test_a_run_reads_the_features_and_keeps_its_classes(table_run):
    summary, config = read_json(table_run / "run" / "summary.json"), read_json(table_run / "run" / "config.json")
    assert summary["classes"] == config["classes"] == ["down", "up"] and summary["task"] == "csv"
    assert summary["validation"]["validation"]["accuracy"] > 0.8  # half without them: the text says nothing
    assert config["options"]["feature_columns"] == ["x", "y"]
    per_class = summary["by_class"]["validation"]["per_class"]
    assert list(per_class) == ["down", "up"] and sum(values["n"] for values in per_class.values()) == 40


def test_eval_of_a_table_run_repeats_its_summary(table_run, tmp_path, capsys):
    assert toy.main("eval", table_run / "run", "--data", table_run / "data" / "validation.csv", "--json",
                    "--predictions", tmp_path / "out.tsv") == 0
    result = json.loads(capsys.readouterr().out)
    summary = read_json(table_run / "run" / "summary.json")
    assert result.pop("data") == str(table_run / "data" / "validation.csv") and result.pop("trained_on") is not None
    assert result.pop("by_class") == summary["by_class"]["validation"] and result == summary["validation"]["validation"]
    rows = [line.split("\t") for line in (tmp_path / "out.tsv").read_text().splitlines()[1:]]
    assert np.mean([row[1] == row[2] for row in rows]) == pytest.approx(result["accuracy"])
    assert {row[1] for row in rows} == {"down", "up"}


def test_a_student_of_a_teacher_with_features_reads_text_alone(table_run, tmp_path):
    assert toy.main("distil", "12345", "--plain", "--teacher", table_run / "run", "--epochs", "1", "--batch-size", "8",
                    "--embedding-size", "4", "--hidden-size", "4", "--out", tmp_path / "run", "--no-plots") == 0
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["teacher"]["validation"] == read_json(table_run / "run" / "summary.json")["validation"]
    assert toy.main("eval", tmp_path / "run", "--data", table_run / "data" / "validation.csv", "--json") == 0


def test_a_student_reads_text_alone_where_a_large_batch_is_computed_in_micro_batches(table_run, tmp_path, monkeypatch):
    monkeypatch.setattr(data_utils, "LARGE", 1.0)
    monkeypatch.setattr(distil_inputs, "make_all_batches", lambda *args: all_batches.append(made := make(*args)) or made)
    make, all_batches = inputs.make_all_batches, []
    assert toy.main("distil", "12345", "--plain", "--teacher", table_run / "run", "--epochs", "1", "--batch-size", "8",
                    "--embedding-size", "4", "--hidden-size", "4", "--out", tmp_path / "run", "--no-plots") == 0
    assert any(batch.micro and batch.micro[0].features is not None for batch in all_batches[0][0])  # or it tests nothing


@pytest.mark.parametrize("method", ["full", "head", "features", "none"])
def test_every_method_reads_features_and_evaluates_alike(table_run, tmp_path, capsys, method):
    arguments = ("LoRA", "12345", "--model", table_run / "model", "--data", table_run / "data", "--method", method,
                 "--feature-columns", "x,y", "--epochs", "2", "--out", tmp_path / "run", "--no-plots")
    assert toy.main(*arguments) == 0
    capsys.readouterr()
    assert toy.main("eval", tmp_path / "run", "--data", table_run / "data" / "validation.csv", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    del result["by_class"], result["data"], result["trained_on"]
    assert result == read_json(tmp_path / "run" / "summary.json")["validation"]["validation"]


def test_features_alone_need_columns(table_run, tmp_path, capsys):
    assert toy.main("LoRA", "12345", "--model", table_run / "model", "--data", table_run / "data", "--method", "features",
                    "--out", tmp_path / "run") == 2
    assert "--method features: needs --feature-columns" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_kept_features_of_a_frozen_model_change_nothing(table_run, tmp_path):
    """Invariant 11, with numbers beside the text."""
    for name, more in (("kept", ()), ("fresh", ("--no-keep",))):
        assert toy.main("LoRA", "12345", "--model", table_run / "model", "--data", table_run / "data", "--method", "head",
                        "--feature-columns", "x,y", "--epochs", "2", "--out", tmp_path / name, "--no-plots", *more) == 0
    for file in ("trained.safetensors", "features.safetensors"):
        assert (tmp_path / "kept" / file).read_bytes() == (tmp_path / "fresh" / file).read_bytes()


# ---------------------------------------------------------------- tasks by name

def test_quiz_bowl_rows_become_text_and_numbers(tmp_path):
    rows = [{f"guess:{name}": 1, "Category_category:Literature": 1, "Category_subcategory:Literature American": 1,
             "Category_tournament:ACF Winter": 1, "Gpr_confidence": -0.5 * i, "label": bool(i % 2)}
            for i, name in enumerate(["William Carlos Williams", "Ishmael", "Queequeg: a life", "Ahab"])]
    for name in ("train", "dev"):
        write(tmp_path / f"{name}.jsonl", rows)
    task = load_task("buzzer", tmp_path, TableOptions(feature_columns=("Gpr_confidence",)))
    assert task.train.sentences[1:3] == ["Ishmael (Literature American, ACF Winter)",
                                         "Queequeg: a life (Literature American, ACF Winter)"]
    assert task.classes == ("false", "true") and task.train.features == [(-0.0,), (-0.5,), (-1.0,), (-1.5,)]
    picked = load_task("buzzer", tmp_path, TableOptions(text_column=("Category_category", "guess")), " / ")
    assert picked.train.sentences[0] == "Literature / William Carlos Williams"


def test_a_task_that_needs_data_says_so_and_cola_takes_no_columns(tmp_path):
    with pytest.raises(UserError, match="--task csv: needs --data"):
        load_task("csv")
    with pytest.raises(UserError, match="--text-column: not for --task cola, whose format is fixed"):
        load_task("cola", tmp_path, TableOptions(text_column=("a",)))


def test_the_task_is_told_by_what_lies_under_data(tmp_path):
    write(tmp_path / "tables" / "train.csv", ROWS)
    toy.write_cola(tmp_path / "cola")
    for data, task in (("tables", "csv"), ("tables/train.csv", "csv"), ("cola", "cola"), ("nothing", "cola")):
        assert inputs.choose("m", None, str(tmp_path / data), print)[1] == task


def test_three_classes_train_and_score(tmp_path):
    toy.write_model(tmp_path / "model")
    draw = np.random.default_rng(0)
    rows = [{"text": " ".join(draw.choice(toy.WORDS, 4)), "label": ("glad", "mad", "sad")[i % 3]} for i in range(36)]
    write(tmp_path / "rows.tsv", rows)
    assert toy.main("LoRA", "12345", "--model", tmp_path / "model", "--data", tmp_path / "rows.tsv", "--eval-split", "0.25",
                    "--epochs", "1", "--out", tmp_path / "run", "--plots", tmp_path / "plots") == 0
    summary = read_json(tmp_path / "run" / "summary.json")
    matrix = np.array(summary["by_class"]["held_out"]["confusion"])
    assert matrix.shape == (3, 3) and matrix.sum() == 9 and (matrix.sum(1) == 3).all()
    assert summary["validation"]["held_out"]["accuracy"] == pytest.approx(np.trace(matrix) / 9)
    assert (tmp_path / "plots" / "LoRA-12345_confusion.png").stat().st_size > 1000
