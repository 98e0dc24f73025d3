"""The temperature and the threshold held to scikit-learn and to a search by hand; every way out of a run obeys them."""
import json

import numpy as np
import pytest
import torch
import toy
from scipy.special import softmax
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import matthews_corrcoef, precision_score, recall_score

from experiments.calibrate import held_out, threshold_of
from experiments.calibration import fit_temperature
from experiments.evaluate import load_finetuned, load_student, logits_of
from experiments.serve import load_served_student
from machine.errors import UserError
from record.files import check_sums, read_json

CLASSES = ["no", "yes"]


def rows(n: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns overconfident logits (n, 2) and labels; 70 % are of class 1."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.7).astype(int)
    margin = rng.normal(3 * labels - 1, 3)
    return np.stack([-margin, margin], -1), labels


# ---------------------------------------------------------------- the numbers

def test_the_temperature_is_scikit_learns():
    logits, labels = rows()
    # A model whose decision function is the margin of the two logits.
    model = LogisticRegression().fit(logits[:, 1:] - logits[:, :1], labels)
    model.coef_[:], model.intercept_[:] = 1, 0
    theirs = CalibratedClassifierCV(FrozenEstimator(model), method="temperature").fit(logits[:, 1:] - logits[:, :1], labels)
    ours = softmax(logits / fit_temperature(logits, labels), -1)
    np.testing.assert_allclose(ours, theirs.predict_proba(logits[:, 1:] - logits[:, :1]), atol=1e-3)


@pytest.mark.parametrize("positive", CLASSES)
def test_the_threshold_has_the_best_mcc_of_all(positive):
    logits, labels = rows()
    found = threshold_of(logits, labels, CLASSES, None, positive)
    index = CLASSES.index(positive)
    p, truth = softmax(logits, -1)[:, index], labels == index
    assert found["positive"] == index
    assert found["mcc"] == pytest.approx(matthews_corrcoef(truth, p >= found["threshold"]))
    assert found["mcc"] == pytest.approx(max(matthews_corrcoef(truth, p >= one) for one in p))
    assert found["mcc"] > matthews_corrcoef(truth, p >= 0.5)


@pytest.mark.parametrize("least", [0.8, 0.9, 1.0])
def test_a_precision_is_reached_with_the_highest_recall(least):
    logits, labels = rows()
    found = threshold_of(logits, labels, CLASSES, least, None)
    p = softmax(logits, -1)[:, 1]
    assert least <= found["precision"] == pytest.approx(precision_score(labels, p >= found["threshold"]))
    assert found["recall"] == pytest.approx(recall_score(labels, p >= found["threshold"]))
    others = [recall_score(labels, p >= one) for one in p if precision_score(labels, p >= one) >= least]
    assert found["recall"] == pytest.approx(max(others))


def test_a_precision_out_of_reach_is_one_line():
    logits, labels = rows()
    with pytest.raises(UserError, match="no threshold reaches it for yes .the highest precision is 0."):
        threshold_of(-logits, labels, CLASSES, 0.999, None)


def test_no_row_is_scaled_by_a_temperature_that_saw_its_label():
    logits, labels = rows(50)
    changed = labels.copy()
    changed[3] = 1 - changed[3]
    before, after = held_out(logits, labels), held_out(logits, changed)
    assert (before[3] == after[3]).all() and (before != after).any()


# ---------------------------------------------------------------- a run

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    work = tmp_path_factory.mktemp("calibrate")
    toy.write_model(work / "model")
    toy.write_cola(work / "cola", dev=30)
    assert toy.lora(work, work / "lora") == 0
    assert toy.main("distil", "12345", "--plain", "--teacher", work / "lora", "--out", work / "distil", "--epochs", 2,
                    "--embedding-size", 6, "--hidden-size", 5, "--no-plots") == 0
    return work


@pytest.fixture(scope="module")
def calibrated(runs):
    """Both runs with a temperature and a threshold that change probabilities and classes."""
    for name in ("lora", "distil"):
        assert toy.main("calibrate", runs / name, "--positive", "0") == 0
    return runs


def predictions(capsys, *words) -> list[dict]:
    capsys.readouterr()
    assert toy.main("predict", *words, "--json") == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_calibration_is_of_the_split_that_chose_the_epoch_and_stands_in_the_checksums(calibrated):
    for name in ("lora", "distil"):
        found = read_json(calibrated / name / "calibration.json")
        assert (found["data"], found["n"], found["positive_class"]) == ("in_domain", 30, "0")
        assert found["temperature"] != 1 and {"ece", "nll"} == set(found["before"]) == set(found["after"])
        assert check_sums(calibrated / name, "calibration.json")
        assert "calibration.json" in (calibrated / name / "SHA256SUMS").read_text()
    assert toy.main("calibrate", calibrated / "lora", "--positive", "unacceptable", "--json") == 0  # by name, a second time


@pytest.mark.parametrize("name, load", [("lora", load_finetuned), ("distil", load_student)])
def test_predict_divides_the_logits_and_obeys_the_threshold(calibrated, capsys, name, load):
    texts = [text for text, _ in toy.toy_rows(20, seed=5)]
    file = calibrated / "texts.txt"
    file.write_text("\n".join(texts))
    model, tokenizer, options = load(calibrated / name)
    from data_utils import Split

    logits = logits_of(model, Split(texts, [0] * len(texts)), tokenizer, options).double()
    rule = read_json(calibrated / name / "calibration.json")
    expected = (logits / rule["temperature"]).softmax(-1)
    plain, scaled = (predictions(capsys, calibrated / name, "--file", file, *more) for more in ((), ("--calibrated",)))
    assert [one["probabilities"] for one in plain] != [one["probabilities"] for one in scaled]
    for answer, row in zip(scaled, expected, strict=True):
        assert list(answer["probabilities"].values()) == pytest.approx(row.tolist(), abs=1e-5)
        assert answer["label"] == ("0" if answer["probabilities"]["0"] >= rule["threshold"] else "1")
        assert answer["probability"] == answer["probabilities"][answer["label"]]
    undecided = predictions(capsys, calibrated / name, "--file", file, "--calibrated", "--at-least", "0.6")
    assert [one["label"] is None for one in undecided] == [one["probability"] < 0.6 for one in scaled]
    assert toy.main("predict", calibrated / name, texts[0], "--at-least", "1") == 0
    assert capsys.readouterr().out.startswith("undecided\t")


def test_the_exported_student_and_the_merged_checkpoint_are_calibrated(calibrated, capsys):
    import onnxruntime
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    text = "the old cat saw a bird"
    student, = predictions(capsys, calibrated / "distil", text, "--calibrated")
    assert toy.main("export", calibrated / "distil", "--out", calibrated / "onnx", "--calibrated") == 0
    rule = read_json(calibrated / "distil" / "calibration.json")
    assert f"row[0] >= {rule['threshold']!r} else 1" in (calibrated / "onnx" / "example.py").read_text()
    session = onnxruntime.InferenceSession(calibrated / "onnx" / "student.onnx", providers=["CPUExecutionProvider"])
    _, tokenizer, _ = load_student(calibrated / "distil")
    ids = np.array([tokenizer(text)["input_ids"]])
    logits = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0][0]
    assert softmax(logits) == pytest.approx(list(student["probabilities"].values()), abs=1e-5)

    teacher, = predictions(capsys, calibrated / "lora", text, "--calibrated")
    assert toy.main("merge", calibrated / "lora", "--out", calibrated / "merged", "--calibrated") == 0
    read = AutoModelForSequenceClassification.from_pretrained(calibrated / "merged").eval()
    with torch.inference_mode():
        found = read(**AutoTokenizer.from_pretrained(calibrated / "merged")(text, return_tensors="pt")).logits[0].softmax(-1)
    assert found.tolist() == pytest.approx(list(teacher["probabilities"].values()), abs=1e-5)
    card = (calibrated / "merged" / "README.md").read_text()
    assert f"{read_json(calibrated / 'lora' / 'calibration.json')['temperature']:.6g}" in card
    assert "Choose `unacceptable` where" in card


def test_the_service_answers_by_the_calibration(calibrated, capsys):
    text = "the old cat saw a bird"
    expected, = predictions(capsys, calibrated / "distil", text, "--calibrated")
    served, = load_served_student(calibrated / "distil", True).classify([text])
    assert served == {key: value for key, value in expected.items() if key != "text"}
    plain, = load_served_student(calibrated / "distil").classify([text])
    assert plain["probabilities"] != served["probabilities"]


def test_a_bank_is_calibrated_too(calibrated, capsys):
    file = calibrated / "rows.jsonl"
    file.write_text(json.dumps({"adapter": "one", "text": "the old cat"}) + "\n")
    mixed, = predictions(capsys, "--adapter", f"one={calibrated / 'lora'}", "--file", file, "--calibrated")
    alone, = predictions(capsys, calibrated / "lora", "the old cat", "--calibrated")
    assert mixed["label"] == alone["label"] and mixed["probability"] == pytest.approx(alone["probability"], abs=1e-5)


@pytest.mark.parametrize("change, says", [
    ({"temperature": 0}, "damaged"), ({"temperature": float("nan")}, "damaged"), ({"temperature": True}, "damaged"),
    ({"threshold": 2}, "damaged"), ({"positive": 7}, "damaged"), (None, "has no calibration.json; python run.py calibrate")])
def test_a_missing_or_damaged_calibration_is_one_line(calibrated, tmp_path, capsys, change, says):
    import shutil

    shutil.copytree(calibrated / "lora", tmp_path / "run")
    file = tmp_path / "run" / "calibration.json"
    if change is None:
        file.unlink()
        (tmp_path / "run" / "SHA256SUMS").unlink()
    else:
        file.write_text(json.dumps({**read_json(file), **change}))
        toy.reseal(tmp_path / "run")
    capsys.readouterr()
    assert toy.main("predict", tmp_path / "run", "a cat", "--calibrated") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("run.py: ")]
    assert len(lines) == 1 and says in lines[0]


@pytest.mark.parametrize("words, says", [
    (("calibrate", "lora", "--least-precision", "0"), "expected a number above 0, up to 1"),
    (("calibrate", "lora", "--positive", "maybe"), "no class of the run; expected one of 0, 1, unacceptable, acceptable"),
    (("predict", "distil", "a", "--control", "--calibrated"), "calibration.json is the student's; leave out --control"),
    (("export", "distil", "--out", "new", "--control", "--calibrated"), "is the student's; leave out --control"),
    (("predict", "lora", "a", "--at-least", "1.5"), "expected a number from 0 to 1")])
def test_bad_input_is_one_line(calibrated, capsys, words, says):
    capsys.readouterr()
    assert toy.main(words[0], calibrated / words[1], *words[2:]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("run.py: ")]
    assert len(lines) == 1 and says in lines[0] and not (calibrated / "new").exists()
