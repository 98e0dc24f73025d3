"""Tables and plots of a diagnosis, from one made up."""
import json

import pytest

from report import diagnosis
from report.paper import paper_results
from report.records import read_json

NAMES = ("teacher", "student", "scratch")


def made_up(folder, **changes):
    """A distillation's diagnosis of two splits, with pairs of two paradigms."""
    scores = {"accuracy": 0.75, "mcc": 0.3125, "majority_accuracy": 0.6}
    bins = [{"low": 0.6, "high": 0.7, "n": 3, "confidence": 0.66, "accuracy": 0.5},
            {"low": 0.9, "high": 1.0, "n": 7, "confidence": 0.95, "accuracy": 0.8}]
    calibration = {"n": 10, "ece": 0.153, "ece_scaled": 0.02, "nll": 0.9, "nll_scaled": 0.5, "bins": bins}
    share = {"accuracy": 0.7, "interval": [0.6, 0.8]}
    judged = {name: share for name in (*NAMES, "language_model")}
    groups = [{"group": name, "phenomenon": "anaphor_agreement", "n": 10, "models": judged,
               "published": {"lstm": 0.801, "gpt2": 0.992} if name == "one_a" else {}} for name in ("one_a", "two")]
    row = {"sentence": "The cats_ sees " + "it " * 40, "split": "in_domain", "source": "x", "label": "0", "distance": 0.5,
           "models": {name: {"prediction": "1", "probability_of_label": 0.125} for name in NAMES}}
    content = {
        "mode": "diagnose", "run": "runs/distil-12345", "of": "distil", "model": "gpt2", "task": "cola",
        "classes": ["0", "1"],
        "splits": {"in_domain": 10, "out_of_domain": 10},
        "scores": {name: {"in_domain": scores, "out_of_domain": scores} for name in NAMES},
        "by_source": [{"group": source, "n": 5, "majority_accuracy": 0.6, "models": {
            name: {"accuracy": 0.8, "mcc": None if source == "b_82" else 0.5} for name in NAMES}}
            for source in ("ks08", "b_82")],
        "by_length": [{"group": "2-4", "n": 20, "majority_accuracy": 0.6, "models": {
            name: {"accuracy": 0.8, "mcc": 0.5} for name in NAMES}}],
        "calibration": {name: {"fitted_on": "in_domain", "temperature": 2.5, "splits": {
            "in_domain": calibration, "out_of_domain": calibration}} for name in NAMES},
        "disagreements": [row] * 12, "all_wrong": {"n": 1, "rows": [row]},
        "pairs": {"file": "pairs.tsv", "limit": 10, "n": 20, "published": ["lstm", "gpt2"], "paradigms": groups,
                  "phenomena": [{**groups[0], "group": "anaphor_agreement", "n": 20}],
                  "overall": {"n": 20, "models": judged, "published": {"lstm": 0.801, "gpt2": 0.992}}},
        "left_out": ["nothing of note"], **changes}
    (folder / "diagnose.json").write_text(json.dumps(content))
    return read_json(folder / "diagnose.json")


def test_every_table_and_plot_is_written(tmp_path):
    made_up(tmp_path)
    written = {path.name for path in diagnosis.write(tmp_path / "diagnose.json", tmp_path)}
    names = {"scores", "source", "length", "phenomena", "paradigms", "calibration", "disagreements", "all_wrong"}
    plots = {"source", "length", "phenomena", "reliability"}
    assert written == {f"{name}.tex" for name in names} | {f"{name}.{kind}" for name in plots for kind in ("png", "pdf")}
    assert written | {"diagnose.json"} == {path.name for path in tmp_path.iterdir()}
    assert r"b\_82 & 5 & 60.0 & 80.0 & n/a & 80.0" in (tmp_path / "source.tex").read_text()
    assert r"one\_a & 10 & 70.0 & 70.0 & 70.0 & 70.0 & 80.1 & 99.2" in (tmp_path / "paradigms.tex").read_text()
    assert "anaphor agreement & 20 & 70.0" in (tmp_path / "phenomena.tex").read_text()


def test_the_papers_figures_are_drawn_of_the_numbers_alone(tmp_path):
    """A recorded step left no plots."""
    made_up(tmp_path)
    (tmp_path / "paper.json").write_text(json.dumps({
        "mode": "paper", "sr": "12345", "options": {"profile": "full"}, "cpu": "A CPU", "threads": 1, "seeds": ["12345"],
        "differences": [], "steps": [{"name": "diagnose", "command": "python run.py diagnose", "file": "diagnose.json",
                                      "status": "done", "seconds": 1.0}]}))
    files = paper_results(tmp_path, tmp_path / "plots")[1]
    for name in ("phenomena", "reliability", "length"):
        assert files[f"paper_diagnose_{name}.pdf"].startswith(b"%PDF")


def test_the_terminal_shows_the_first_rows_units_and_what_was_left_out(tmp_path):
    text = diagnosis.diagnosis_text(made_up(tmp_path))
    assert "accuracy (%)" in text and "left out: nothing of note" in text and "bare language model" in text
    assert "2.5 (fitted here)" in text and "15.3" in text  # points of 100
    assert "... and 2 more rows in disagreements.tex" in text
    assert "The first 10 pairs of each paradigm; the published figures are of 1,000." in text
    titles = [table.title for table in diagnosis.tables(made_up(tmp_path)).values()]  # titles and notes are prose
    assert max(len(line) for line in text.splitlines() if line not in titles) <= 100


def test_parts_that_were_left_out_are_not_there(tmp_path):
    record = made_up(tmp_path, by_source=None, pairs=None, disagreements=None, all_wrong={"n": 0, "rows": []}, of="LoRA",
                     scores={"teacher": {"in_domain": {"accuracy": 1, "mcc": 1, "majority_accuracy": 0.6},
                                         "out_of_domain": {"accuracy": 1, "mcc": 1, "majority_accuracy": 0.6}}})
    assert set(diagnosis.tables(record)) == {"scores", "calibration", "length"}
    assert set(diagnosis.figures(record)) == {"reliability", "length"}
    assert "classifier" in diagnosis.diagnosis_text(record)


def test_axes_are_named_and_models_told_apart(tmp_path):
    record = made_up(tmp_path)
    figures = diagnosis.figures(record)
    left, right = figures["source"].axes
    assert left.get_xlabel() == "accuracy (%)" and left.get_ylabel() == "source" and "Matthews" in right.get_xlabel()
    assert [label.get_text() for label in left.get_yticklabels()] == ["ks08 (n=5)", "b_82 (n=5)"]
    assert left.get_lines()[0].get_xdata() == pytest.approx([80, 80])
    upper = figures["reliability"].axes[:3]
    assert [axes.get_title() for axes in upper] == ["teacher", "student with KD", "baseline"]
    assert upper[0].get_lines()[1].get_xdata() == pytest.approx([66, 95])
    names = [text.get_text() for text in figures["phenomena"].legends[0].get_texts()]
    assert names == ["teacher", "student with KD", "baseline", "bare language model", "LSTM, published",
                     "GPT-2, published", "chance"]
