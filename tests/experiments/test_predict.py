"""What a run says of a sentence is what its model says; files are answered in order, bad lines in their place."""
import io
import json
import random
import sys
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import torch
import toy

from experiments import evaluate, predict, predict_file
from report import figures
from serving import texts

KEYS = {"text", "label", "probability", "probabilities"}
TEXTS = [text for text, _ in toy.toy_rows(40, 7)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of every kind on one toy base, and one on another."""
    folder = tmp_path_factory.mktemp("runs")
    toy.write_model(folder / "model")
    toy.write_model(folder / "other", seed=1)
    toy.write_cola(folder / "cola")
    words = {0: "low", 1: "mid", 2: "high"}
    draw = random.Random(0)
    rows = [(text, words[i % 3], i % 3 + draw.random(), "" if i % 7 == 0 else draw.random()) for i, (text, _) in
            enumerate(toy.toy_rows(48, 3))]
    (folder / "table").mkdir()
    for split, part in (("train", rows[:36]), ("validation", rows[36:])):
        lines = ["text,label,x,y", *(",".join(map(str, row)) for row in part)]
        (folder / "table" / f"{split}.csv").write_text("\n".join(lines) + "\n")
    small = ("--plots", folder / "plots", "--epochs", 2, "--batch-size", 8, "--lr", 0.01)
    cola, table = ("--data", folder / "cola"), ("--data", folder / "table")

    def lora(name, *more, model="model"):
        assert toy.main("LoRA", "12345", "--model", folder / model, "--out", folder / name, *small, *more) == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "plot_run", lambda *_: [])
        lora("lora", *cola)
        lora("qv", *table, "--rank", 3, "--targets", "q,v", "--max-length", 6, "--truncate", "head")
        lora("head", *cola, "--method", "head")
        lora("full", *cola, "--method", "full")
        lora("none", *cola, "--method", "none")
        lora("numbers", *table, "--feature-columns", "x,y")
        lora("features", *table, "--feature-columns", "x,y", "--method", "features")
        lora("stranger", *cola, model="other")
        assert toy.main("distil", "12345", "--plain", "--teacher", folder / "lora", "--out", folder / "distil", *small,
                        "--embedding-size", 6, "--hidden-size", 5) == 0
    return folder


def ask(capsys, *arguments) -> list[dict]:
    capsys.readouterr()
    assert toy.main("predict", *arguments, "--json") == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refused(capsys, says: str, *arguments) -> None:
    capsys.readouterr()
    assert toy.main("predict", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and len([line for line in err.splitlines() if not line.startswith("warning")]) == 1


def write(path, text: str | bytes):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@torch.no_grad()
def alone(model, tokenizer, options, text: str) -> list[float]:
    """The model's own answer to one sentence."""
    ids = tokenizer(text)["input_ids"]
    ids = ids[-options["max_length"]:] if options["truncate"] == "head" else ids[:options["max_length"]]
    ids = torch.tensor([ids])
    return model(ids, torch.ones_like(ids)).softmax(-1)[0].tolist()


# ---------------------------------------------------------------- one run

@pytest.mark.parametrize("name", ["lora", "qv", "head", "full", "none", "distil", "control"])
def test_each_kind_of_run_answers_as_its_model_does(runs, capsys, tmp_path, name):
    folder, control = (runs / "distil", True) if name == "control" else (runs / name, False)
    if name in ("distil", "control"):
        loaded = evaluate.load_student(folder, "scratch" if control else "student")
    else:
        loaded = evaluate.load_finetuned(folder)
    classes = ["high", "low", "mid"] if name == "qv" else ["0", "1"]
    results = ask(capsys, folder, "--file", write(tmp_path / "a.txt", "\n".join(TEXTS)), *(["--control"] if control else []))
    # The tokenizer of these runs makes a token of a word, and says which answers are those of a part of a text.
    cut = [len(loaded[1](text)["input_ids"]) > loaded[2]["max_length"] for text in TEXTS]
    assert any(cut) == (name == "qv") and [result.pop("truncated", False) for result in results] == cut
    assert [result["text"] for result in results] == TEXTS
    for result in results:
        expected = alone(*loaded, result["text"])
        assert set(result) - {"name"} == KEYS and list(result["probabilities"]) == classes
        assert list(result["probabilities"].values()) == pytest.approx(expected, abs=1e-5)
        assert result["probability"] == max(result["probabilities"].values())
        assert result["label"] == max(result["probabilities"], key=result["probabilities"].get)
    assert name == "none" or len({result["probability"] for result in results}) > 10


def test_student_and_control_are_two_models(runs, capsys):
    student, control = ask(capsys, runs / "distil", *TEXTS[:3]), ask(capsys, runs / "distil", *TEXTS[:3], "--control")
    assert student != control
    refused(capsys, "--control", runs / "lora", "the cat", "--control")


@pytest.mark.parametrize("name", ["numbers", "features"])
def test_predictions_of_a_table_agree_with_eval(runs, capsys, tmp_path, name):
    """Features included, missing values too."""
    file = runs / "table" / "validation.csv"
    assert toy.main("eval", runs / name, "--data", file, "--predictions", tmp_path / "p.tsv") == 0
    expected = [line.split("\t") for line in (tmp_path / "p.tsv").read_text().splitlines()[1:]]
    results = ask(capsys, runs / name, "--file", file)
    assert [(r["text"], r["label"]) for r in results] == [(text, label) for text, _, label, _ in expected]
    assert [r["probability"] for r in results] == pytest.approx([float(p) for *_, p in expected], abs=2e-6)
    assert len({r["probability"] for r in results}) > 5


def test_a_run_that_reads_features_says_so(runs, capsys, tmp_path):
    refused(capsys, "reads feature columns (x, y)", runs / "numbers", "the cat")
    refused(capsys, "reads feature columns (x, y)", runs / "numbers", "--file", write(tmp_path / "a.txt", "the cat\n"))
    refused(capsys, "no column 'y'", runs / "numbers", "--file", write(tmp_path / "a.csv", "text,x\nthe cat,1\n"))
    rows = [{"text": "the cat", "x": 1, "y": 2}, {"text": "the cat", "x": "one"}, {"text": "the cat", "x": 1}]
    results = ask(capsys, runs / "numbers", "--file", write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    assert set(results[0]) - {"name"} == set(results[2]) - {"name"} == KEYS and results[0] != results[2]
    assert results[1] == {"error": "feature x is 'one'; expected a finite number or an empty cell", "line": 2}


def test_sentences_on_the_command_line_stand_anywhere(runs, capsys):
    a, b = ask(capsys, runs / "lora", "the cat", "a red dog")
    assert [a["text"], b["text"]] == ["the cat", "a red dog"] and a != b
    capsys.readouterr()
    assert toy.main("predict", runs / "lora", "--json", "the cat", "a red dog") == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [a, b]
    assert toy.main("predict", runs / "lora", "the cat") == 0
    assert capsys.readouterr().out == f"{a['name']}\t{a['probability']:.4f}\tthe cat\n"


# ---------------------------------------------------------------- files

def test_every_format_gives_the_same_answers(runs, capsys, tmp_path, monkeypatch):
    expected = ask(capsys, runs / "lora", *TEXTS)
    table = pyarrow.table({"other": list(range(len(TEXTS))), "sentence": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    jsonl = "\n".join(json.dumps({"text": text}) for text in TEXTS) + "\n"
    files = [write(tmp_path / "a.txt", "\n".join(TEXTS)), write(tmp_path / "noending", "\r\n".join(TEXTS) + "\r\n"),
             write(tmp_path / "a.csv", "\ufefftext,n\n" + "".join(f'"{text}",1\n' for text in TEXTS)),
             write(tmp_path / "a.tsv", "n\tsentence\n" + "".join(f"1\t{text}\n" for text in TEXTS)),
             write(tmp_path / "a.jsonl", jsonl), tmp_path / "a.parquet",
             write(tmp_path / "cola.tsv", toy.tsv([(text, 1) for text in TEXTS]))]
    for file in files:
        assert ask(capsys, runs / "lora", "--file", file) == expected, file
    for content in ("\n".join(TEXTS), jsonl):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(content.encode()))))
        assert ask(capsys, runs / "lora", "--file", "-") == expected
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(files[2].read_bytes()))))
    assert ask(capsys, runs / "lora", "--file", "-", "--format", "csv") == expected


BAD = {
    "txt": ("the cat\n\n \t\nthe \xff dog\na red bird\n".encode("latin-1"), [2, 3, 4], 5),
    "csv": (b'text,n\nthe cat,1\nthe dog\n,2\n"a\nred bird",3\nx\xff,4\nold,5,6\nthe mat,7\n', [3, 4, 7, 8], 7),
    "jsonl": (b'{"text": "the cat"}\nnull\n{"text": null}\n{"txt": "x"}\n{"text": "\\ud800"}\n' + b"[" * 5000
              + b'\n{"text": "the dog"}\n', [2, 3, 4, 5, 6], 7),
    "tsv": (b"text\nthe cat\n" + b"x" * 1_100_000 + b"\nthe dog\n", [3], 3)}


@pytest.mark.parametrize("ending", BAD)
def test_a_bad_line_is_an_error_in_its_place_and_the_rest_goes_on(runs, capsys, tmp_path, ending):
    content, bad, count = BAD[ending]
    capsys.readouterr()
    assert toy.main("predict", runs / "lora", "--file", write(tmp_path / f"a.{ending}", content), "--json") == 0
    out, err = capsys.readouterr()
    results = list(map(json.loads, out.splitlines()))
    errors = [result for result in results if "error" in result]
    assert f"a.{ending}: {len(bad)} of {count} rows have an error in place of an answer" in err
    assert [error["line"] for error in errors] == bad
    assert all(set(error) == {"error", "line"} and error["error"] and "row 1" not in error["error"] for error in errors)
    good = [result for result in results if "error" not in result]
    assert len(results) == count and "error" not in results[0] and set(good[0]) - {"name"} == KEYS
    expected = ask(capsys, runs / "lora", "the cat")[0]
    assert good[0]["label"] == expected["label"]
    assert good[0]["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-6)


def test_a_long_file_is_never_in_memory(runs, monkeypatch):
    """A stream of many lines; the windows are answered by nobody."""
    class Endless(io.RawIOBase):
        lines = 0

        def readable(self):
            return True

        def readinto(self, buffer):
            self.lines += 1
            text = b"the old cat saw a red bird, line %d\n" % self.lines if self.lines <= 30_000 else b""
            buffer[:len(text)] = text
            return len(text)

    predictor = predict.RunPredictor(runs / "lora")
    monkeypatch.setattr(predictor, "classify", lambda rows, _: [{"label": "x"} for _ in rows])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(Endless())))
    tracemalloc.start()
    count = sum(1 for _ in predict_file.predict_file(predictor, "-"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 30_000 and peak < 4 << 20


def test_answers_come_before_the_end_of_the_file(runs, tmp_path):
    file = write(tmp_path / "a.txt", "\n".join(["the cat"] * 3 * predict_file.WINDOW))
    told = []
    predictor = predict.RunPredictor(runs / "head")
    results = predict_file.predict_file(predictor, file, progress=lambda rows, _: told.append(rows))
    next(results)
    assert told == []
    assert sum(1 for _ in results) == 3 * predict_file.WINDOW - 1 and told == [predict_file.WINDOW] * 3


# ---------------------------------------------------------------- many adapters

def test_rows_name_their_adapters(runs, capsys, tmp_path):
    draw, names = random.Random(0), ["cola", "words", "head", None]
    rows = [{"adapter": draw.choice(names), "text": text} for text in TEXTS]
    rows += [{"adapter": "nobody", "text": "the cat"}, {"adapter": 3, "text": "the cat"}, {"adapter": "cola"},
             {"adapter": "cola", "text": " "}, {"text": "the cat"}]
    results = ask(capsys, "--adapter", f"cola={runs / 'lora'}", "--adapter", f"words={runs / 'qv'}", "--adapter",
                  f"head={runs / 'head'}", "--base", "--file", write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    folders = {"cola": "lora", "words": "qv", "head": "head"}
    for name, folder in folders.items():
        chosen = [i for i, row in enumerate(rows[:len(TEXTS)]) if row["adapter"] == name]
        for i, expected in zip(chosen, ask(capsys, runs / folder, *(TEXTS[i] for i in chosen)), strict=True):
            assert results[i]["label"] == expected["label"] and results[i]["text"] == expected["text"]
            assert results[i]["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)
    for row, result in zip(rows, results, strict=True):
        if row.get("adapter", None) is None:
            assert set(result["probabilities"]) == {"LABEL_0", "LABEL_1"}  # the base under its own head
    errors = results[len(TEXTS):-1]
    assert [error["line"] for error in errors] == [len(TEXTS) + i for i in (1, 2, 3, 4)]
    assert "unknown adapter 'nobody'; expected one of cola, words, head" in errors[0]["error"]


def test_a_row_that_names_no_adapter_is_an_error_unless_the_base_is_asked_for(runs, capsys, tmp_path):
    rows = [{"adapter": "cola", "text": "the cat"}, {"text": "the cat"}, {"adapter": None, "text": "the cat"},
            {"adapter": "", "text": "the cat"}, {"Adapter": "cola", "text": "the cat"},
            {"adapter": "cola", "text": "the dog"}]
    words = ("--adapter", f"cola={runs / 'lora'}", "--file", write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    results = ask(capsys, *words)
    assert [result.get("line") for result in results] == [None, 2, 3, 4, 5, None]
    assert all(result["error"] == "adapter is missing; expected one of cola, or --base for the base alone"
               for result in results[1:5])
    results = ask(capsys, *words, "--base")
    assert [set(result.get("probabilities", ())) for result in results[1:5]] == [{"LABEL_0", "LABEL_1"}] * 4
    table = write(tmp_path / "a.csv", "text\nthe cat\n")
    refused(capsys, "with --adapter, expected JSON Lines", "--adapter", f"cola={runs / 'lora'}", "--file", table)
    assert "label" in ask(capsys, "--adapter", f"cola={runs / 'lora'}", "--base", "--file", table)[0]
    refused(capsys, "--base is for --adapter", runs / "lora", "the cat", "--base")


def test_a_parquet_file_has_the_classes_of_every_adapter_and_of_the_base(runs, capsys, tmp_path):
    rows = [{"adapter": name, "text": "the old cat"} for name in ("cola", "words", None, "nobody")]
    words = ("--adapter", f"cola={runs / 'lora'}", "--adapter", f"words={runs / 'qv'}", "--base", "--file",
             write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    expected = ask(capsys, *words)
    assert toy.main("predict", *words, "--out", tmp_path / "a.parquet") == 0
    found = pyarrow.parquet.read_table(tmp_path / "a.parquet").to_pylist()
    for row, answer in zip(found, expected, strict=True):
        if row["probabilities"]:
            row["probabilities"] = {name: value for name, value in row["probabilities"].items() if value is not None}
        assert {name: value for name, value in row.items() if value is not None} == answer


@pytest.mark.parametrize("name, says", [("stranger", "adapter for another base"), ("full", "has --method full"),
                                        ("numbers", "reads feature columns"), ("distil", "a distil run"),
                                        ("nowhere", "not a run's folder")])
def test_what_cannot_share_the_base_is_refused(runs, capsys, tmp_path, name, says):
    file = write(tmp_path / "a.jsonl", '{"adapter": "a", "text": "the cat"}\n')
    refused(capsys, says, "--adapter", f"a={runs / 'lora'}", "--adapter", f"b={runs / name}", "--file", file)


@pytest.mark.parametrize("arguments, says", [
    ((), "expected RUN_DIR, or --adapter"), (("RUN",), "expected sentences, or --file"),
    (("RUN", "x", "--file", "y"), "not both"), (("RUN", " "), "sentence 1: the text is empty"),
    (("RUN", "--file", "nowhere.csv"), "nowhere.csv: cannot be read"),
    (("RUN", "--file", "."), "expected --file FOLDER --out FOLDER"),
    (("--adapter", "a", "--file", "x"), "expected NAME=DIR"),
    (("RUN", "--adapter", "a=b", "--file", "x"), "expected RUN_DIR, or"),
    (("--adapter", "a=RUN", "--adapter", "a=RUN", "--file", "x"), "the name is given twice"),
    (("--adapter", "a b=RUN", "--file", "x"), "adapter name 'a b'"), (("RUN", "--fil", "x"), "did you mean --file?"),
    (("--adapter", "a=RUN", "x"), "expected RUN_DIR, or"), (("nowhere", "x"), "not a run's folder")])
def test_bad_arguments_are_one_line(runs, capsys, arguments, says):
    refused(capsys, says, *(str(word).replace("RUN", str(runs / "lora")) for word in arguments))


def test_cola_s_classes_are_shown_by_name_and_kept_as_numbers(runs, capsys):
    result, = ask(capsys, runs / "lora", TEXTS[0])
    assert result["name"] == {"0": "unacceptable", "1": "acceptable"}[result["label"]]
    assert list(result["probabilities"]) == ["0", "1"]
    assert toy.main("predict", runs / "lora", TEXTS[0]) == 0
    assert capsys.readouterr().out.startswith(result["name"] + "\t")
    # A table's own classes have no other names, and a run of the time before there were names shows its numbers.
    assert "name" not in ask(capsys, runs / "qv", TEXTS[0])[0]
    old = texts.Reading.of({"options": {"max_length": 8}, "classes": ["0", "1"]})
    assert "name" not in old.answer(torch.tensor([0.0, 1.0]))
    undecided = predict_file.decided({"label": "1", "name": "acceptable", "probability": 0.6}, 0.9)
    assert undecided["label"] is None and undecided["name"] is None and predict_file.line_of(
        {**undecided, "text": "A."}, False).startswith("undecided")


# ---------------------------------------------------------------- words that the built-in model never saw

def test_unknown_words_are_one_warning_after_the_answers(runs, tmp_path, capsys, monkeypatch):
    of = predict.Reading.of
    monkeypatch.setattr(predict.Reading, "of", lambda *given: replace(of(*given), tiny=True))
    says = ("warning: {} words that the built-in model never saw ({}): its answers about them say nothing; data/grammar.py "
            "has its words")
    lines = ["cat zebra", "dog old cat", "Okapi cat zebra"]
    for words, many in ((lines[:1], "a text has"), (lines, "2 texts have")):
        assert toy.main("predict", runs / "lora", *words) == 0
        out, err = capsys.readouterr()
        assert len(out.splitlines()) == len(words)
        assert err.splitlines() == [says.format(many, "zebra" if len(words) == 1 else "zebra, Okapi")]
    assert toy.main("predict", runs / "lora", "--file", write(tmp_path / "a.txt", "\n".join(lines)), "--json") == 0
    out, err = capsys.readouterr()
    assert [json.loads(line).get("unknown_words") for line in out.splitlines()] == [["zebra"], None, ["Okapi", "zebra"]]
    assert err.splitlines() == [says.format("2 texts have", "zebra, Okapi")]
