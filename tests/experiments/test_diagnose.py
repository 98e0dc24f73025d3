"""A diagnosis: its numbers held to scikit-learn and transformers, its files, what it leaves out and says."""
import json
import math
import shutil

import numpy as np
import pytest
import torch
import toy
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, matthews_corrcoef

from data.backbones import load_causal_lm, load_tokenizer
from data.pairs import Pair
from data_utils import Split
from experiments import diagnose, evaluate, trained_on
from record.files import read_json

PAIRS = "field\tphenomenon\tparadigm\tgood\tbad\n" + "".join(
    f"f\tp{i % 2}\tq{i % 3}\tthe cat saw a {word}\tcat the saw a {word}\n" for i, word in enumerate(toy.WORDS * 2))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A file of 20 pairs of three paradigms, and published figures beside it."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "pairs.tsv").write_text(PAIRS)
    (folder / "published.tsv").write_text("paradigm\tphenomenon\tlstm\tgpt2\nq0\tp0\t0.5\t0.9\nq1\tp1\t0.7\t1\n")
    return folder / "pairs.tsv"


@pytest.fixture(scope="module")
def diagnosed(work, distilled_run, pairs, tmp_path_factory):
    """A distillation's diagnosis: its folder and its JSON."""
    out = tmp_path_factory.mktemp("diagnosed") / "out"
    assert toy.main("diagnose", distilled_run, "--pairs", pairs, "--out", out) == 0
    return out, read_json(out / "diagnose.json")


# ---------------------------------------------------------------- a run

def test_a_distillation_is_diagnosed_beside_teacher_baseline_and_language_model(work, distilled_run, diagnosed):
    out, found = diagnosed
    summary = read_json(distilled_run / "summary.json")
    assert list(found["scores"]) == ["teacher", "student", "scratch"]
    for name, splits in found["scores"].items():
        for split, scores in splits.items():
            for key in ("n", "accuracy", "mcc", "majority_accuracy"):
                assert scores[key] == pytest.approx(summary[name]["validation"][split][key], abs=1e-6)
    assert found["models"] == {"teacher": str(work / "LoRA"), "student": str(distilled_run), "scratch": str(distilled_run),
                               "language_model": str(work / "model")}
    assert found["left_out"] == ["by source: the task cola has no sources here"]  # all of the toy's have one
    for name in ("scores", "calibration", "length", "phenomena", "paradigms", "disagreements"):
        assert (out / f"{name}.tex").read_text().startswith(r"\begin{tabular}")
    for name in ("reliability", "length", "phenomena"):
        assert (out / f"{name}.png").stat().st_size > 5000 and (out / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_sentences_of_disagreement_and_of_common_error_are_what_they_say(work, distilled_run, diagnosed):
    _, found = diagnosed
    distances = [row["distance"] for row in found["disagreements"]]
    assert distances == sorted(distances, reverse=True) and distances[0] > 0 and len(distances) == 24
    for row in found["disagreements"]:
        teacher, student = (row["models"][name]["probability_of_label"] for name in ("teacher", "student"))
        assert row["distance"] == pytest.approx(abs(teacher - student), abs=1e-6)  # of two classes
    rows = found["disagreements"]  # of 24 rows, all
    wrong = [row for row in rows if all(model["prediction"] != row["label"] for model in row["models"].values())]
    assert found["all_wrong"]["n"] == len(found["all_wrong"]["rows"]) == len(wrong)
    assert {row["sentence"] for row in found["all_wrong"]["rows"]} == {row["sentence"] for row in wrong}
    first = rows[0]
    scored = evaluate.score_rows(work / "LoRA", work / "cola" / f"{first['split']}_dev.tsv")
    at = scored.split.sentences.index(first["sentence"])
    assert first["models"]["teacher"]["probability_of_label"] == pytest.approx(
        float(scored.logits[at].softmax(-1)[int(first["label"])]), abs=1e-6)


def test_pairs_are_counted_by_paradigm_and_phenomenon_beside_the_published_figures(work, distilled_run, diagnosed):
    _, found = diagnosed
    groups = found["pairs"]
    assert [(row["group"], row["n"]) for row in groups["paradigms"]] == [("q0", 7), ("q1", 7), ("q2", 6)]
    assert [(row["group"], row["n"]) for row in groups["phenomena"]] == [("p0", 10), ("p1", 10)]
    assert groups["paradigms"][0]["published"] == {"lstm": 0.5, "gpt2": 0.9} and groups["paradigms"][2]["published"] == {}
    assert groups["overall"]["published"] == {"lstm": pytest.approx(0.6), "gpt2": pytest.approx(0.95)}
    rows = [line.split("\t")[3:] for line in PAIRS.splitlines()[1:]]
    for name, load in (("teacher", lambda: evaluate.load_finetuned(work / "LoRA")),
                       ("student", lambda: evaluate.load_student(distilled_run))):
        model, tokenizer, _ = load()
        right = []
        for both in rows:
            ids = [tokenizer(text, return_tensors="pt").input_ids for text in both]
            with torch.inference_mode():
                good, bad = (float(logits[0, 1] - logits[0, 0]) for logits in (
                    model(one, torch.ones_like(one)) for one in ids))
            right.append(good > bad)
        assert groups["overall"]["models"][name]["accuracy"] == pytest.approx(np.mean(right))


def test_a_lora_run_is_diagnosed_alone_on_a_file_and_a_changed_file_is_warned_of(work, pairs, tmp_path, capsys):
    shutil.copytree(work / "cola", tmp_path / "cola")
    config = (work / "LoRA" / "config.json").read_text().replace(str(work / "cola"), str(tmp_path / "cola"))
    shutil.copytree(work / "LoRA", tmp_path / "LoRA")
    (tmp_path / "LoRA" / "config.json").write_text(config)
    toy.reseal(tmp_path / "LoRA")
    data = tmp_path / "cola" / "in_domain_dev.tsv"
    data.write_text(data.read_text().replace("toy\t", "other\t", 4))
    assert toy.main("diagnose", tmp_path / "LoRA", "--data", data, "--pairs", pairs, "--limit", 2, "--json") == 0
    said = capsys.readouterr()
    assert f"warning: {data}: changed since the run read it" in said.err
    found = json.loads(said.out)
    assert list(found["scores"]) == ["teacher"] and list(found["splits"]) == ["in_domain_dev"]
    assert [(row["group"], row["n"]) for row in found["by_source"]] == [("toy", 8), ("other", 4)]
    assert found["left_out"] == ["disagreements: they need a teacher and a student, a distillation run's"]
    assert {row["n"] for row in found["pairs"]["paradigms"]} == {2}
    assert list(found["pairs"]["overall"]["models"]) == ["teacher", "language_model"]
    assert (tmp_path / "diagnose-LoRA" / "source.png").exists()
    assert toy.main("diagnose", tmp_path / "LoRA", "--pairs", pairs, "--limit", 1, "--out", tmp_path / "again") == 0
    said = capsys.readouterr()
    assert f"warning: {data}: changed since the run read it" in said.err and "classifier" in said.out


def test_a_task_that_is_none_of_acceptability_has_no_pairs(work, tmp_path, capsys, quick):
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(
        f"{text},{'abc'[len(text) % 3]}\n" for text, _ in toy.toy_rows(60, 3)))
    assert toy.main("LoRA", "12345", "--model", work / "model", "--data", tmp_path / "train.csv", "--epochs", 1, "--method",
                    "head", "--out", tmp_path / "csv", "--no-plots") == 0
    assert toy.main("diagnose", tmp_path / "csv", "--out", tmp_path / "out") == 0
    found = read_json(tmp_path / "out" / "diagnose.json")
    assert found["pairs"] is None and found["by_source"] is None
    said = capsys.readouterr().out
    assert "left out: by source: the task csv has no sources here" in said
    assert "left out: minimal pairs: csv is no task of acceptability; --pairs asks for them" in said


@pytest.mark.parametrize("content, said", [
    ("phenomenon\tgood\tbad\n", "no column paradigm"), (PAIRS.splitlines()[0] + "\n", "no row below its header"),
    (PAIRS + "a\tb\n", "line 22: 2 cells, and the header has 5"), (PAIRS + "f\tp\tq\t \tbad\n", "line 22: good is empty")])
def test_bad_pairs_are_one_line_and_nothing_is_written(work, tmp_path, capsys, content, said):
    (tmp_path / "pairs.tsv").write_text(content)
    assert toy.main("diagnose", work / "LoRA", "--pairs", tmp_path / "pairs.tsv", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- its parts

def test_groups_are_scored_as_scikit_learn_scores_them():
    rng = np.random.default_rng(0)
    groups = [*rng.choice(["a", "b"], 60).tolist(), "c", "c"]
    labels, said = rng.integers(0, 2, 62), rng.integers(0, 2, 62)
    labels[-2:] = 1
    found = {row["group"]: row for row in diagnose.by_group(groups, ["b", "a", "c"], labels, {"m": said})}
    assert list(found) == ["b", "a", "c"]
    for group in "ab":
        here = np.array(groups) == group
        assert found[group]["n"] == here.sum()
        assert found[group]["models"]["m"] == {"accuracy": pytest.approx(accuracy_score(labels[here], said[here])),
                                               "mcc": pytest.approx(matthews_corrcoef(labels[here], said[here]))}
    assert found["c"]["models"]["m"]["mcc"] is None and found["c"]["majority_accuracy"] == 1


def test_lengths_fall_into_groups_of_about_the_same_size():
    words = np.random.default_rng(0).poisson(8, 1000) + 1
    groups, order = diagnose.length_groups(words.tolist())
    assert len(order) == 5 and set(groups) == set(order)
    for group in order:
        low, _, high = group.partition("-")
        assert all(int(low) <= n <= int(high or low) for n, own in zip(words, groups, strict=True) if own == group)
        assert 50 < groups.count(group) < 350  # of equal lengths, all are in one
    assert [int(name.partition("-")[0]) for name in order] == sorted(int(name.partition("-")[0]) for name in order)
    assert diagnose.length_groups([3, 3, 3]) == (["3"] * 3, ["3"])


def test_log_probabilities_are_transformers_own_whatever_the_batch(work):
    lm, tokenizer = load_causal_lm(str(work / "model")), load_tokenizer(str(work / "model"))
    sentences = ["the cat saw a dog", "mat", "a red bird fed the old cat", "the dog"]
    found = diagnose.log_probabilities(lm, tokenizer, sentences)
    for sentence, value in zip(sentences, found, strict=True):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(sentence).input_ids]])
        with torch.inference_mode():
            mean = float(lm(input_ids=ids, labels=ids).loss)  # over all tokens but the first
        assert value == pytest.approx(-mean * (ids.shape[1] - 1), rel=1e-5)
        assert value < 0
    assert diagnose.log_probabilities(lm, tokenizer, sentences, batch_tokens=3) == pytest.approx(found, rel=1e-5)


def test_acceptability_is_the_difference_of_the_two_logits(work):
    model, tokenizer, options = evaluate.load_finetuned(work / "LoRA")
    split = Split(["the cat", "dog a saw", "red"], [0, 0, 0])
    logits = evaluate.logits_of(model, split, tokenizer, options)
    assert diagnose.acceptability([(model, tokenizer, options)], split.sentences) == pytest.approx(
        (logits[:, 1] - logits[:, 0]).numpy())
    assert len(set(logits[:, 1].tolist())) == 3


def test_a_phenomenons_published_figure_is_the_mean_over_its_paradigms_and_intervals_are_wilsons():
    pairs = [Pair("p", "x", "g", "b")] * 3 + [Pair("p", "y", "g", "b")]
    row, = diagnose.pair_groups(pairs, "phenomenon", {"m": np.array([True, True, True, False])},
                                {"lstm": {"x": 0.2, "y": 0.4, "z": 1.0}})
    assert row["published"] == {"lstm": pytest.approx(0.3)} and row["models"]["m"]["accuracy"] == 0.75
    z, n, p = 1.959964, 4, 0.75
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert row["models"]["m"]["interval"] == pytest.approx([centre - half, centre + half], rel=1e-5)


def test_a_moved_teacher_is_found_beside_the_run_and_a_missing_one_is_left_out(work, distilled_run, pairs, tmp_path, capsys,
                                                                               quick):
    shutil.copytree(distilled_run, tmp_path / "distilled")
    path = tmp_path / "distilled" / "summary.json"
    path.write_text(path.read_text().replace(json.dumps(str(work / "LoRA")), json.dumps("gone/teacher")))
    toy.reseal(tmp_path / "distilled")
    assert trained_on.find_source(tmp_path / "distilled", "gone/teacher") is None
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}")
    assert trained_on.find_source(tmp_path / "distilled", "gone/teacher") == tmp_path / "teacher"
    shutil.rmtree(tmp_path / "teacher")
    assert toy.main("diagnose", tmp_path / "distilled", "--pairs", pairs, "--limit", 1, "--out", tmp_path / "out") == 0
    assert "left out: the teacher: gone/teacher is not there" in capsys.readouterr().out
    found = read_json(tmp_path / "out" / "diagnose.json")
    assert list(found["scores"]) == ["student", "scratch"] and found["disagreements"] is None


@pytest.fixture(scope="module")
def averaged(work, tmp_path_factory):
    """A distillation of two teachers, in folders that the test may change."""
    folder = tmp_path_factory.mktemp("averaged")
    assert toy.lora(work, folder / "one", "--no-plots") == 0
    assert toy.lora(work, folder / "two", "--rank", 2, "--lr", 0.03, "--no-plots") == 0
    assert toy.main("distil", "12345", "--plain", "--teacher", folder / "one", "--teacher", folder / "two", "--out",
                    folder / "run", "--epochs", 1, "--embedding-size", 6, "--hidden-size", 5, "--no-plots") == 0
    return folder


def test_a_distillation_of_several_teachers_is_diagnosed_with_their_average(averaged, pairs, tmp_path, monkeypatch, capsys,
                                                                            quick):
    monkeypatch.chdir(tmp_path)
    assert toy.main("diagnose", averaged / "run", "--pairs", pairs, "--limit", 2, "--out", tmp_path / "out") == 0
    found = read_json(tmp_path / "out" / "diagnose.json")
    assert list(found["scores"]) == ["teacher", "student", "scratch"] and "changed" not in capsys.readouterr().err
    assert found["models"]["teacher"] == f"{averaged / 'one'}, {averaged / 'two'}"
    expected = read_json(averaged / "run" / "summary.json")["teacher"]["validation"]
    for split, scores in found["scores"]["teacher"].items():
        assert scores["loss"] == pytest.approx(expected[split]["loss"], abs=1e-6) and scores["mcc"] == expected[split]["mcc"]
    assert len(found["disagreements"]) == 24


@pytest.mark.parametrize("name", ["one", "two"])
def test_each_of_several_teachers_is_looked_for_and_compared(averaged, pairs, tmp_path, capsys, quick, name):
    """Also where all were moved together, and by relative names, as they are given."""
    shutil.copytree(averaged, tmp_path / "moved")
    run = tmp_path / "moved" / "run"
    for file in ("config.json", "summary.json"):
        (run / file).write_text((run / file).read_text().replace(str(averaged), "gone"))
    toy.reseal(run)
    toy.reseal(tmp_path / "moved" / name)
    words = ("diagnose", run, "--pairs", pairs, "--limit", 1, "--out", tmp_path / "out")
    assert toy.main(*words) == 0
    assert "changed since the student learned" not in capsys.readouterr().err
    weights = load_file(tmp_path / "moved" / name / "adapter_model.safetensors")
    save_file({key: value + 1 for key, value in weights.items()}, tmp_path / "moved" / name / "adapter_model.safetensors")
    toy.reseal(tmp_path / "moved" / name)
    assert toy.main(*words) == 0
    assert f"warning: {tmp_path / 'moved' / name}: changed since the student learned from it" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "moved" / name)
    assert toy.main(*words) == 0
    assert f"left out: the teacher: gone/{name} is not there" in capsys.readouterr().out
    assert list(read_json(tmp_path / "out" / "diagnose.json")["scores"]) == ["student", "scratch"]
