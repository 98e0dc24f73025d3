"""Reports of every kind of task, made up, built and read: each is true of its own run and says nothing of other tasks."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up import CLASSES, SR, copy_sources, distil_run, folds, task_runs
from safetensors.numpy import save_file

from metrics.problems import PROBLEMS
from report import build, figures, prose, scores, tables
from report.objectives import SOFT, objectives, soft_formula
from report.records import Record, read_json
from report.runs import Run

# Words of the tasks that these runs are not of.
FOREIGN = re.compile(r"accept|cola\b|glue|blimp|grammar|linguist|english|sentence|in-domain|polarity|review", re.IGNORECASE)
needs_latex = pytest.mark.skipif(not shutil.which("latexmk") or not shutil.which("pdftotext"),
                                 reason="latexmk or pdftotext is not installed")


@pytest.fixture
def no_plots(monkeypatch):
    """The figures of single quantities have their own tests, and are slow."""
    monkeypatch.setattr(figures, "quantities", lambda problem: ())


def flat(pdf: Path) -> str:
    """Returns the text of a PDF in one line."""
    text = subprocess.run(["pdftotext", pdf, "-"], capture_output=True, text=True, check=True).stdout
    return " ".join(text.split())


def texts_of(lora: Path | None, distil: Path | None, studies: dict | None = None) -> dict[str, str]:
    return prose.texts(lora and Run(lora), distil and Run(distil), studies or {})


@needs_latex
@pytest.mark.parametrize("kind", list(CLASSES))
def test_a_report_is_true_of_its_own_task(tmp_path, no_plots, monkeypatch, kind):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    task_runs(tmp_path / "runs", kind, decoder=kind != "four")
    folds(tmp_path / "runs", kind)
    report = copy_sources(tmp_path / "report")
    text = flat(build.build_report(SR, tmp_path / "runs", tmp_path / "plots", report, "Łucja O'Neil"))
    assert not FOREIGN.search(text), FOREIGN.search(text)
    # Nothing is missing, and no number is none.
    assert "not run" not in text and not re.search(r"\bnan\b|\?\?", text)
    score = {"multi-label": "0.500 ± 0.012", "regression": "0.600 ± 0.012"}.get(kind, "70.0 ± 1.2")
    assert "Cross-validation of LoRA. Mean ± sample standard deviation over 3 folds" in text and score in text
    assert text.startswith("Adapting a Language Model with LoRA and Shrinking It by Knowledge Distillation")
    assert "Łucja O\u2019Neil" in text or "Łucja O'Neil" in text
    assert f"SR {SR}" in text and "14 November 2023" in text or "15 November 2023" in text
    for name in CLASSES[kind]:
        assert name in text
    own = {"binary": "with the counts of true and false positives",
           "four": "its form for K classes", "multi-label": "micro-F1 is the same formula",
           "regression": "Spearman\u2019s is the same of the ranks"}
    assert [name for name, said in own.items() if said in text] == [kind]
    assert ("pretrained encoder" in text) == (kind == "four") and ("a kin of BERT" in text) == (kind == "four")
    conclusion = text.partition("Conclusion •")[2].partition("Limits")[0]
    assert re.search(r"(majority class|ignoring the text): better|LoRA reaches", conclusion)
    assert "Distillation against no distillation: better" in conclusion
    assert "5,000 of 100,000 parameters, 95.00 % fewer" in conclusion and "11.1 times smaller" in conclusion


# ---------------------------------------------------------------- sentences made from numbers

def test_the_verdicts_follow_the_numbers(tmp_path):
    lora, distil = task_runs(tmp_path, "binary")
    for baseline, said in ((0.1, "better"), (0.9, "worse"), (None, "equal")):
        summary = json.loads((distil / "summary.json").read_text())
        student = summary["student"]["validation"]["validation"]
        summary["scratch"]["validation"]["validation"]["mcc"] = student["mcc"] if baseline is None else baseline
        (distil / "summary.json").write_text(json.dumps(summary))
        assert f"no distillation: {said}." in texts_of(lora, distil)["text.conclusion"]


@pytest.mark.parametrize(("interval", "said"), [([0.01, 0.05], "better"), ([-0.01, 0.05], "no difference shown"),
                                                ([-0.05, -0.01], "worse")])
def test_over_seeds_the_interval_decides(tmp_path, interval, said):
    lora, distil = task_runs(tmp_path, "binary")
    path = tmp_path / "seeds.json"
    spread = {"mean": sum(interval) / 2, "interval": interval}
    path.write_text(json.dumps({"seeds": ["1", "2", "3"], "entries": [], "differences": [
        {"entry": "student", "minus": "scratch", "best": {"validation": {"mcc": spread}}}]}))
    conclusion = texts_of(lora, distil, {"seeds.distil": read_json(path)})["text.conclusion"]
    assert f"no distillation: {said}." in conclusion and "Over 3 seeds, paired" in conclusion


def test_a_speed_that_is_not_certain_is_not_in_the_abstract(tmp_path):
    lora, distil = task_runs(tmp_path, "binary")
    assert "20 times as fast" in texts_of(lora, distil)["text.abstract"]
    summary = json.loads((distil / "summary.json").read_text())
    summary["scratch"]["sentences_per_second"] = 1700.0
    (distil / "summary.json").write_text(json.dumps(summary))
    found = texts_of(lora, distil)
    assert "as fast" not in found["text.abstract"] and r"18\,\% apart: the factors" in found["text.speed"]
    del summary["scratch"]
    (distil / "summary.json").write_text(json.dumps(summary))
    found = texts_of(lora, distil)
    assert "as fast" not in found["text.abstract"] and "no second network" in found["text.speed"].lower()
    assert "not compared" in found["text.conclusion"]


def test_what_was_not_searched_says_so_and_names_the_search(tmp_path):
    lora, distil = task_runs(tmp_path, "binary")
    found = texts_of(lora, distil)
    assert "Defaults, not searched" in found["text.hyper.lora"] and "rank 8" in found["text.hyper.lora"]
    assert "sweep 12345" in found["text.hyper.lora"].replace(r"\allowbreak{}", "")
    sweep = Record({"trials": [Record({"number": 0, "params": Record({"rank": 4}, "s")}, "s")], "best": 0,
                    "search": Record({"rank": [4, 8]}, "s"), "selection": Record({"split": "validation"}, "s")}, "s")
    searched = texts_of(lora, None, {"sweep": sweep})["text.hyper.lora"]
    assert "not searched" not in searched and "over 4, 8" in searched and "other values of rank" in searched


def test_the_chosen_score_is_the_one_that_is_best_in_the_best_epoch():
    def row(number: int, **values) -> Record:
        validation = Record({"dev": Record(values, "m")}, "m")
        return Record({"epoch": number, "validation": validation}, "m")

    metrics = [row(1, pearson=0.5, spearman=0.6, mse=0.3), row(2, pearson=0.6, spearman=0.5, mse=0.2)]
    assert scores.chosen_key("regression", metrics, 2) == "pearson"
    assert scores.chosen_key("regression", metrics, 1) == "spearman"
    # The one of the training, where all are best in the same epoch.
    assert scores.chosen_key("regression", [row(1, pearson=0.5, spearman=0.6, mse=0.3)], 1) == "spearman"


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_the_report_knows_the_scores_of_each_problem_by_the_names_that_runs_record(problem):
    logits = torch.tensor([[2.0, -1.0], [-1.0, 1.5], [0.5, 0.1]])
    labels = {"single-label": torch.tensor([0, 1, 1]), "multi-label": torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
              "regression": torch.tensor([2.0, -1.0, 1.0])}[problem.name]
    recorded = Record(problem.scores(logits, labels), "m")
    assert scores.score_keys(problem.name, recorded) == tuple(problem.shown)
    assert scores.CHOSEN[problem.name] == problem.chosen
    same = problem.baseline({"dev": dict(recorded)})["dev"]
    assert {key: scores.without_input(recorded, key) for key in problem.shown} == same


def test_a_search_is_told_with_the_score_that_chose_and_would_read_the_same_columns(tmp_path):
    lora, _ = task_runs(tmp_path, "regression")
    config = json.loads((lora / "config.json").read_text())
    config["options"] |= {"text_column": ["subject", "body"], "label_column": "stars"}
    (lora / "config.json").write_text(json.dumps(config))
    said = texts_of(lora, None)["text.hyper.lora"].replace(r"\allowbreak{}", "")
    assert "text-column subject,body" in said and "label-column stars" in said
    selection = Record({"split": "validation", "score": "spearman"}, "s")
    sweep = Record({"trials": [], "best": 0, "search": Record({"rank": [4]}, "s"), "selection": selection}, "s")
    said = texts_of(lora, None, {"sweep": sweep})["text.hyper.lora"]
    assert "highest Spearman correlation" in said and "MCC" not in said


def test_the_losses_of_several_labels_are_means_over_the_labels(tmp_path):
    run = Run(task_runs(tmp_path, "multi-label")[1])
    assert r"\tfrac{1}{K}\sum_{k} \KL" in soft_formula(run)
    run.options["kd_loss"] = "mse"
    assert soft_formula(run) == SOFT["mse"]


# ---------------------------------------------------------------- distillation as it was

def test_the_losses_stand_stage_by_stage_with_their_weights(tmp_path):
    run = Run(task_runs(tmp_path, "binary")[1])
    table = objectives(run)
    assert table.count(r"0.5\,\mathcal{L}_{\text{soft}} + 0.5\,\mathcal{L}_{\text{gold}} + \mathcal{L}_{\text{hid}}") == 1
    rows = [line for line in table.splitlines() if line.startswith(("transfer set", "training set", " &"))]
    assert [line.count("&") for line in rows] == [3] * 5 and "baseline & training set, as many steps" in table
    assert soft_formula(run) == SOFT["kl"]
    # Every loss that can be chosen has a formula.
    source = (Path(build.__file__).parents[1] / "distillation" / "losses.py").read_text()
    assert set(re.findall(r'"([\w-]+)": \w+', source.partition("\nLOSSES: ")[2].partition("}")[0])) == set(SOFT)


def test_the_parts_of_the_student_are_counted_from_its_weights(tmp_path):
    run_dir = task_runs(tmp_path, "binary")[1]
    weights = {"embedding.weight": (500, 8), "rnn.weight_ih_l0": (64, 8), "rnn.weight_hh_l0": (64, 16),
               "attention.weight": (1, 16), "classifier.weight": (2, 16), "classifier.bias": (2,)}
    arrays = {name: np.zeros(shape, np.float32) for name, shape in weights.items()}
    save_file({**arrays, "embedding.rows": np.zeros(500, np.int32)}, run_dir / "student.safetensors")
    summary = json.loads((run_dir / "summary.json").read_text())
    summary["student"]["parameters"] = sum(math.prod(shape) for shape in weights.values())
    (run_dir / "summary.json").write_text(json.dumps(summary))
    table = tables.architecture(Run(run_dir))
    assert r"token embeddings & 500 $\times$ 8 & 4,000 & 71.6" in table and "& 1,536 & 27.5" in table
    assert r"all &  & 5,586 & 100.0" in table


def test_stages_and_calibration_have_tables(tmp_path):
    run = task_runs(tmp_path, "binary")[1]
    assert "student with KD & transfer set & 2 & 300 & 0.01 & 2.5 & 2 & 72.00 & 0.320" in tables.stages(Run(run))
    # A run with --plain has one stage.
    assert "student with KD & training set & 4 & 1,072" in tables.stages(Run(distil_run(tmp_path / "plain")))
    assert tables.calibrations({"LoRA": Run(run)}) == ""
    found = {"n": 400, "temperature": 1.5, "threshold": None, "before": {"ece": 0.08, "nll": 0.5},
             "after": {"ece": 0.02, "nll": 0.45}}
    (run / "calibration.json").write_text(json.dumps(found))
    assert "LoRA & 400 & 1.500 & 0.080 & 0.020 & 0.500 & 0.450 & -- " in tables.calibrations({"LoRA": Run(run)})


@pytest.mark.parametrize("count, environment", [(4, "tabular"), (5, "longtable*")])
def test_a_table_of_more_classes_than_fit_next_to_a_figure_breaks_over_pages(tmp_path, monkeypatch, count, environment):
    """As one block it would leave its caption on the page before."""
    monkeypatch.setitem(CLASSES, "four", [f"class {number}" for number in range(count)])
    assert tables.classes(Run(task_runs(tmp_path, "four")[0])).startswith(f"\\begin{{{environment}}}")


def test_the_cover_has_the_date_of_the_build_or_the_one_that_is_given(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(86_400 * 365))
    assert build.cover(SR, "A & B") == {"sr": SR, "date": "1 January 1971", "author": r"A \& B"}
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert re.fullmatch(r"\d+ \w+ \d{4}", build.cover(SR, "")["date"]) and "author" not in build.cover(SR, "")
