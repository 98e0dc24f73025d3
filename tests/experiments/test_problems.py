"""Runs of several labels and of numbers: LoRA, its student, and everything that is done with them."""
import json
from argparse import Namespace
from types import SimpleNamespace

import problem_runs
import pytest
import torch
import toy
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from data.splits import Split
from distillation import recipe, sources
from experiments import compare, variants
from experiments.predict import RunPredictor
from machine.errors import UserError
from record.files import read_json
from serving import export
from serving.bank import AdapterBank
from serving.service import Result

PLAIN = ("--plain", "--embedding-size", 6, "--hidden-size", 5, "--epochs", 1, "--batch-size", 8, "--no-plots")
# name -> model, data, options of the columns, a development file, problem
RUNS = {"numbers": ("bert", "scores", problem_runs.SCORES, "dev.csv", "regression"),
        "labels": ("model", "sets", problem_runs.SETS, "dev.jsonl", "multi-label")}

TEXTS = {"numbers": "a red cat\tthe cat saw", "labels": "the cat saw"}


def lora(place, name, out, *more) -> int:
    model, data, columns, *_ = RUNS[name]
    return toy.main("LoRA", "12345", "--model", place / model, "--data", place / data, "--epochs", 2, "--batch-size", 8,
                    "--lr", 0.01, "--no-plots", "--out", out, *columns, *more)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A BERT, a GPT-2, both kinds of data, a LoRA run of each, and a student of each."""
    folder = tmp_path_factory.mktemp("problems")
    problem_runs.write_bert(folder / "bert")
    toy.write_model(folder / "model")
    problem_runs.write_scores(folder / "scores")
    problem_runs.write_label_sets(folder / "sets")
    for name in RUNS:
        assert lora(folder, name, folder / name) == 0
        assert toy.main("distil", "12345", "--teacher", folder / name, "--out", folder / f"{name}-student", *PLAIN) == 0
    return folder


def printed(capsys, *words) -> str:
    capsys.readouterr()
    assert toy.main(*words) == 0
    return capsys.readouterr().out


def refused(capsys, *words) -> str:
    capsys.readouterr()
    assert toy.main(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("name", RUNS)
def test_a_run_records_its_problem_and_the_scores_of_it(place, name):
    shown = {"numbers": {"pearson", "spearman", "mse"}, "labels": {"f1_micro", "f1_macro"}}[name]
    for folder in (place / name, place / f"{name}-student"):
        config, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
        assert config["problem"] == summary["problem"] == config["options"]["problem"] == RUNS[name][4]
        for part in (summary,) if "validation" in summary else (summary["teacher"], summary["student"], summary["scratch"]):
            assert shown < set(part["validation"]["dev"]) and "accuracy" not in part["validation"]["dev"]
    # The best epoch is the one with the best of them.
    lines, chosen = toy.lines_of(place / name), {"numbers": "spearman", "labels": "f1_micro"}[name]
    summary = read_json(place / name / "summary.json")
    assert summary["validation"]["dev"][chosen] == max(line["validation"]["dev"][chosen] for line in lines)


@pytest.mark.parametrize("name", RUNS)
def test_eval_finds_the_scores_of_the_run_and_repeat_the_same_bytes(place, name, tmp_path, capsys):
    found = json.loads(printed(capsys, "eval", place / name, "--data", place / RUNS[name][1] / RUNS[name][3], "--json",
                               "--predictions", tmp_path / "p.tsv"))
    summary = read_json(place / name / "summary.json")
    assert {key: found[key] for key in summary["validation"]["dev"]} == summary["validation"]["dev"]
    head, *rows = (tmp_path / "p.tsv").read_text().splitlines()
    assert len(rows) == 20 and head.split("\t")[:3] == ["sentence", "label", "prediction"]
    assert "identical" in printed(capsys, "repeat", place / name)


@pytest.mark.parametrize("name", RUNS)
def test_a_merged_checkpoint_has_the_problem_type_and_gives_the_answers(place, name, tmp_path):
    assert toy.main("merge", place / name, "--out", tmp_path / "merged") == 0
    net = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert net.config.problem_type == {"numbers": "regression", "labels": "multi_label_classification"}[name]
    predictor = RunPredictor(place / name)
    if name == "numbers":
        # The tokenizer's own token types, which a run takes from its separators.
        inputs = tokenizer("a red cat", "the cat saw", return_tensors="pt")
        expected = net(**inputs).logits[0, 0].item()
        other = net(input_ids=inputs["input_ids"]).logits[0, 0].item()
        (found,) = predictor.classify([("a red cat\tthe cat saw", [])])
        assert found["score"] == pytest.approx(expected, abs=1e-4) and abs(found["score"] - other) > 1e-3
    else:
        expected = net(**tokenizer("the cat saw", return_tensors="pt")).logits[0].sigmoid()
        (found,) = predictor.classify([("the cat saw", [])])
        assert list(found["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-4)
        assert found["labels"] == [label for label, p in zip(problem_runs.LABELS, expected, strict=True) if p > 0.5]


@pytest.mark.parametrize("name", RUNS)
def test_a_bank_answers_as_the_run_and_refuses_one_text_beside_pairs(place, name):
    text = TEXTS[name]
    bank = AdapterBank.of({"own": place / name})
    (expected,) = RunPredictor(place / name).classify([(text, [])])
    (found,) = bank.classify([("own", text)])
    assert set(found) <= set(Result.model_fields) and Result(**found).model_dump(exclude_none=True) == found
    assert found["label"] == expected["label"] or float(found["label"]) == pytest.approx(float(expected["label"]), abs=1e-3)
    if name == "numbers":
        assert "expected two of them" in str(bank.classify([("own", "a red cat")])[0])


@pytest.mark.parametrize("name", RUNS)
def test_a_file_of_labels_stands_for_the_teacher_that_wrote_it(place, name, tmp_path, monkeypatch, capsys):
    """Whatever separates a pair in the file: the tab of the lines here, the teacher's own mark in the training set."""
    _, data, _, dev, _ = RUNS[name]
    lines = printed(capsys, "predict", place / name, "--file", place / data / dev.replace("dev", "train"), "--json")
    rows = [json.loads(line) for line in lines.splitlines() if line.startswith("{")]
    for row in rows:
        row["text"] = row["text"].replace(" [SEP] ", "\t")
    # Another teacher: of each label the opposite.
    for row in rows:
        if name == "numbers":
            row["score"] = -row["score"]
        else:
            row["probabilities"] = {label: 1 - p for label, p in row["probabilities"].items()}
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))

    kept, alone = [], recipe.training_set_alone
    monkeypatch.setattr(recipe, "training_set_alone", lambda *args: kept.append(alone(*args)) or kept[-1])
    for out, more in (("own", ()), ("file", ("--labels", labels, "--labels-alone")), ("both", ("--labels", labels))):
        assert toy.main("distil", "12345", "--teacher", place / name, "--out", tmp_path / out, "--no-control", *PLAIN,
                        *more) == 0
    own, file, both = (one.logits for one in kept)
    torch.testing.assert_close(file, -own, atol=1e-4, rtol=1e-3)
    assert own.abs().max() > 0.1 and both.abs().max() < 1e-3
    assert "are not in it" not in capsys.readouterr().err


def test_an_adapter_of_one_text_follows_the_last_one_of_pairs_and_none_stands_beside_it(place, tmp_path):
    toy.write_cola(tmp_path / "cola")
    assert toy.main("LoRA", "12345", "--model", place / "bert", "--data", tmp_path / "cola", "--epochs", 1, "--lr", 0.01,
                    "--no-plots", "--out", tmp_path / "one") == 0
    # With the separator in it: the token types of pairs would change its second half.
    text = "a red [SEP] cat"
    (expected,) = RunPredictor(tmp_path / "one").classify([(text, [])])
    bank = AdapterBank.of({"pairs": place / "numbers"})
    with pytest.raises(UserError, match="reads one text, and the adapters that are loaded read pairs"):
        bank.add_run("one", tmp_path / "one")
    bank.remove("pairs")
    bank.add_run("one", tmp_path / "one")
    (found,) = bank.classify([("one", text)])
    assert found["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)
    # And the other way round: the token types are back.
    bank.remove("one")
    bank.add_run("pairs", place / "numbers")
    (expected,) = RunPredictor(place / "numbers").classify([(TEXTS["numbers"], [])])
    assert bank.classify([("pairs", TEXTS["numbers"])])[0]["score"] == pytest.approx(expected["score"], abs=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_a_student_is_exported_and_two_runs_are_compared(place, name, tmp_path, capsys):
    text = TEXTS[name]
    assert toy.main("export", place / f"{name}-student", "--out", tmp_path / "onnx", "--int8") == 0
    assert printed(capsys, "predict", place / f"{name}-student", text).endswith(" ".join(text.split()) + "\n")
    found = json.loads(printed(capsys, "test", place / name, place / f"{name}-student", "--data",
                               place / RUNS[name][1] / RUNS[name][3], "--resamples", 100, "--json"))
    for key, one in found["difference"].items():
        assert one["value"] == pytest.approx(found["a"][key] - found["b"][key], abs=1e-6)
        assert one["interval"][0] <= one["value"] <= one["interval"][1]


@pytest.mark.slow
def test_an_exported_classifier_of_pairs_has_the_token_types_in_its_graph(place, tmp_path):
    assert toy.main("export", place / "numbers", "--out", tmp_path / "onnx") == 0
    tokenizer = Tokenizer.from_file(str(tmp_path / "onnx" / "tokenizer.json"))
    session = export.session(tmp_path / "onnx" / "classifier.onnx", threads=1)
    (logits,) = export.onnx_logits(session, [tokenizer.encode("a red cat", "the cat saw").ids])
    (expected,) = RunPredictor(place / "numbers").classify([(TEXTS["numbers"], [])])
    assert float(logits[0]) == pytest.approx(expected["score"], abs=1e-4)


def test_a_language_model_writes_no_pairs(monkeypatch):
    monkeypatch.setattr(sources, "Writer", lambda *_: pytest.fail("a sentence would be written"))
    pairs = ["the cat saw a dog | a red bird", "the old cat fed a dog | the dog saw a cat"]
    inputs = SimpleNamespace(task=SimpleNamespace(train=Split(pairs, [0.0, 1.0]), dev={}, left_out=()),
                             teachers=[SimpleNamespace(model=SimpleNamespace(decoder=True))],
                             tokenizer=SimpleNamespace(pair_separator=" | "), plain=[])
    # Fewer than asked for: the pairs have no further edits.
    found = [one.text for one in sources.new_sentences(inputs, None, 10_000, 2)]
    assert 5 < len(found) < 10_000 and all(text.count(" | ") == 1 for text in found)


def test_stages_teach_numbers_with_pairs_alone(place, tmp_path):
    assert toy.main("distil", "12345", "--teacher", place / "numbers", "--out", tmp_path / "staged", "--augment", 20,
                    "--transfer", 1, "--epochs", 1, "--embedding-size", 6, "--hidden-size", 5, "--no-plots") == 0
    summary = read_json(tmp_path / "staged" / "summary.json")
    assert [stage["stage"] for stage in summary["student"]["stages"]] == ["transfer", "gold"]


@pytest.mark.parametrize("words, said", [
    (("predict", "numbers", "a red cat"), "expected two of them, with a tab between them"),
    (("predict", "labels", "a cat", "--at-least", "0.9"), "--at-least: for one of several classes"),
    (("calibrate", "labels"), "and this is a multi-label problem"), (("diagnose", "numbers"), "a regression problem")])
def test_what_is_for_one_of_several_classes_is_refused_in_one_line(place, capsys, words, said):
    mode, run, *rest = words
    assert said in refused(capsys, mode, place / run, *rest)


def test_options_of_classes_and_other_losses_are_refused_before_anything_is_written(place, tmp_path, capsys):
    for option in (("--class-weights", "balanced"), ("--loss", "focal"), ("--label-smoothing", "0.1")):
        capsys.readouterr()
        assert lora(place, "labels", tmp_path / "run", *option) == 2
        assert f"{' '.join(option[:1])}" in capsys.readouterr().err
    assert "--kd-loss dkd: not for a multi-label problem" in refused(
        capsys, "distil", "12345", "--teacher", place / "labels", "--out", tmp_path / "run", *PLAIN, "--kd-loss", "dkd")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["full", "head", "none"])
def test_every_method_learns_numbers(place, tmp_path, method):
    assert lora(place, "numbers", tmp_path / "run", "--method", method, "--epochs", 1) == 0
    assert "pearson" in read_json(tmp_path / "run" / "summary.json")["validation"]["dev"]
    predictor = RunPredictor(tmp_path / "run")
    assert isinstance(predictor.classify([("a cat\ta dog", [])])[0]["score"], float)


def test_a_run_of_one_text_and_classes_records_what_it_always_has(work):
    config = read_json(work / "LoRA" / "config.json")
    assert "problem" not in config and not {"problem", "join", "fold"} & set(config["options"])
    assert "problem" not in read_json(work / "LoRA" / "summary.json")


def test_a_study_from_before_there_were_pairs_goes_on():
    args = Namespace(mode="compare", fast="auto", join="pair", text_column=(), template=None)
    assert "join" not in variants.settings(args)
    # Two columns were one text then: another study.
    assert variants.settings(Namespace(**{**vars(args), "text_column": ("a", "b")}))["join"] == "pair"


def test_folds_are_runs_with_a_mean_and_an_interval(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "run_child", lambda words, log, threads=None, tick=None: log.touch() or toy.main(*words))
    words = ("LoRA", "12345", "--model", place / "bert", "--data", place / "scores", "--epochs", 1, "--batch-size", 8,
             "--lr", 0.01, *problem_runs.SCORES, "--folds", 2, "--out", tmp_path / "folds")
    assert "95 % interval" in printed(capsys, *words)
    result = read_json(tmp_path / "folds" / "summary.json")
    runs = [read_json(tmp_path / "folds" / name / "summary.json") for name in result["runs"]]
    values = [run["validation"]["held_out"]["pearson"] for run in runs]
    assert result["problem"] == "regression" and result["validation"]["held_out"]["n"] == 40
    assert result["validation"]["held_out"]["pearson"] == pytest.approx(sum(values) / 2)
    assert result["intervals"]["best"]["held_out"]["pearson"]["values"] == values
    # Again: nothing is left to do. Other options are refused.
    monkeypatch.setattr(compare, "run_child", lambda *_, **__: pytest.fail("a run was started"))
    assert toy.main(*words) == 0
    assert "began with another --lr" in refused(capsys, *(0.02 if word == 0.01 else word for word in words))
    assert torch.tensor(values).isfinite().all()


def test_comparisons_and_sweeps_choose_by_the_problems_score(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "run_child", lambda words, log, threads=None, tick=None: log.touch() or toy.main(*words))
    columns = ("--model", place / "model", "--data", place / "sets", "--epochs", 1, *problem_runs.SETS, "--no-plots")
    out = printed(capsys, "compare", "12345", *columns, "--methods", "none,head", "--seeds", 2, "--against", "none", "--out",
                  tmp_path / "compare")
    assert "micro-F1" in out and "by its micro F1" in out and "MCC" not in out and "head minus none" in out
    assert read_json(tmp_path / "compare" / "compare.json")["selection"]["score"] == "f1_micro"
    out = printed(capsys, "sweep", "12345", *columns, "--search", "rank=1,2", "--sampler", "grid", "--out",
                  tmp_path / "sweep")
    assert "best epoch's micro F1" in out and "MCC" not in out
