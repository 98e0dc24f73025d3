"""The pages hold exactly what the results say; a table's cells are the results' figures."""
import json
import re
from pathlib import Path

import made_up
import pytest

from benchmarks import command, summarise
from benchmarks.collect import row, typed
from experiments import seeds
from experiments.significance import over_seeds
from metrics.problems import PROBLEMS

RESULTS = summarise.read_results()
PLACES = re.compile(r"[\s\"'=]/(?:tmp|home|root|mnt|work|Users)\b")
MACHINE = {"cpu": "A(R) CPU", "threads": 2, "device": "cpu", "versions": {"torch": "2.0", "transformers": "5.0"},
           "git_commits": ["0123456789", "abcdef0123"]}


@pytest.mark.parametrize("page", summarise.pages(), ids=lambda page: str(page.relative_to(summarise.ROOT)))
def test_a_page_is_what_the_results_say(page):
    text = page.read_text()
    assert summarise.filled(text, RESULTS) == text


def test_every_section_stands_on_one_page():
    marked = [name for page in summarise.pages() for _, name, _ in summarise.MARKED.findall(page.read_text())]
    assert sorted(set(marked)) == sorted(marked)
    assert set(marked) >= set(summarise.SECTIONS)


def test_every_result_is_shown_and_names_no_folder_of_a_machine():
    shown = "".join(page.read_text() for page in summarise.pages())
    for name, result in RESULTS.items():
        if own := summarise.STUDENTS.get(name.removeprefix("paper/")):  # beside the first row
            assert summarise.shown(result).endswith(" ".join(own)) and f"| `{' '.join(own)}` |" in shown, name
        else:
            assert summarise.shown(result) in re.sub(r" \\\n *", " ", shown), name
        assert not PLACES.search(json.dumps(result)), name
        assert typed(summarise.shown(result)) == summarise.shown(result)


def test_no_record_names_a_folder_of_a_machine():
    for path in (summarise.HERE / "results" / "paper").glob("*.json"):
        assert not PLACES.search(path.read_text()), path


def test_a_program_is_named_as_it_is_typed(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/benchmarks/peft_reference.py", "--seed", "12345", "--out", "a b"])
    assert command() == "python benchmarks/peft_reference.py --seed 12345 --out 'a b'"


def test_a_name_that_nothing_fills_is_an_error():
    page = "before\n<!-- colour, by summarise.py -->\n<!-- end of colour -->\nafter\n"
    with pytest.raises(KeyError, match="colour: no section"):
        summarise.filled(page, {})
    filled = summarise.filled(page.replace("colour", "serving_of_nobody").replace("serving_of_nobody", "precision"), {})
    assert filled == ("before\n<!-- precision, by summarise.py -->\n\n`python benchmarks/precision.py`: not run.\n\n"
                      "<!-- end of precision -->\nafter\n")
    assert summarise.filled(filled, {}) == filled  # nothing grows


def trained(*rows: dict, **more) -> dict:
    return {"collected": "LoRA", "command": "python run.py LoRA SR", "seeds": ["12345", "12346"], **MACHINE, "rows": rows,
            "majority_accuracy": {"in_domain": 0.693, "out_of_domain": 0.686, "all": 0.689}, **more}


def part(mcc: float, rate: float = 100.0) -> dict:
    """What a summary holds of one model; accuracies are 0.8065, 0.7565 and 0.7065."""
    return {"validation": made_up.validation(mcc), "last_validation": made_up.validation(mcc - 0.2), "best_epoch": 2,
            "last_epoch": 3, "parameters": 4950530, "sentences_per_second": rate}


def test_a_training_is_mean_and_deviation_of_its_best_and_last_epoch():
    results = {"cola_lora_fp32": trained(row("lora", [part(0.5), part(0.6)]))}
    lines = summarise.cola(results)
    assert "| majority class |  |  |  | 0.693 / 0 | 0.686 / 0 | 0.689 / 0 |  |" in lines
    best = next(i for i, line in enumerate(lines) if line.startswith("| `LoRA`, float32 |"))
    deviation = 0.1 / 2 ** 0.5  # of 0.5 and 0.6
    assert lines[best:best + 2] == [
        "| `LoRA`, float32 | 2 (12345 to 12346) | best (2) | 4,950,530 | "
        f"0.806 ± 0.000 / 0.550 ± {deviation:.3f} | 0.756 ± 0.000 / 0.450 ± {deviation:.3f} | "
        f"0.707 ± 0.000 / 0.350 ± {deviation:.3f} | `python run.py LoRA SR --precision fp32` |",
        f"|  |  | last (3) |  | 0.806 ± 0.000 / 0.350 ± {deviation:.3f} | 0.756 ± 0.000 / 0.250 ± {deviation:.3f} | "
        f"0.707 ± 0.000 / 0.150 ± {deviation:.3f} |  |"]
    # Two of the equal budget, bfloat16, the teacher, a student in stages, one without, and their two baselines.
    assert sum("not run" in line for line in lines) == 9
    assert lines[-1] == "Measured on A CPU, 2 thread(s); torch 2.0, transformers 5.0; commit 0123456, abcdef0."
    assert (f"| CoLA, `LoRA`, float32 | 0.707 ± 0.000 / 0.350 ± {deviation:.3f} | "
            "`python run.py LoRA SR --precision fp32` |") in summarise.summary(results)


def recorded(step: str, path: Path) -> dict:
    """What a step left, as its record has it."""
    return summarise.of_step(step, {"files": {summarise.STEPS[step].done: path.read_text()}})


def test_lora_and_its_reference_are_trainings_with_their_difference_paired_by_seed():
    def study(step: str, entry: str, mccs: list[float]) -> dict:
        row = {"entry": entry, "seeds": ["12345", "12346", "12347"], "parameters": {"trainable": 7},
               "majority_accuracy": {"in_domain": 0.693, "out_of_domain": 0.686, "all": 0.689},
               **over_seeds([part(mcc) for mcc in mccs])}
        content = {"command": f"python run.py {step} 12345 --jobs 2 --out=runs/x", "seeds": row["seeds"], **MACHINE,
                   "git_commit": "0123456789", "entries": [row]}
        return summarise.of_step(step, {"files": {summarise.STEPS[step].done: json.dumps(content)}})
    results = {"paper/lora": study("lora", "LoRA", [0.5, 0.6, 0.7]), "paper/peft": study("peft", "peft", [0.48, 0.6, 0.66])}
    lines = summarise.cola(results)
    label = "`LoRA`, float32, best of two learning rates"
    assert any(line.startswith(f"| {label} | 3 (12345 to 12347) | best (2) | 7 | 0.807 ± 0.000 / 0.600")
               and line.endswith("| `python run.py lora 12345 --precision fp32` |") for line in lines)
    half = 4.302653 * 0.02 / 3 ** 0.5  # of 0.02, 0 and 0.04: mean 0.02, deviation 0.02; Student's t, two degrees of freedom
    said = f"{0.02:+.3f} ({0.02 - half:+.3f} to {0.02 + half:+.3f})"
    assert ("LoRA minus PEFT at equal budget, MCC paired by seed, 95 % interval: best epoch in-domain "
            f"{said}, out-of-domain {said}, all {said}; last epoch in-domain {said}, out-of-domain {said}, all {said}."
            ) in lines
    del results["paper/peft"]
    assert not any("minus" in line for line in summarise.cola(results))


def test_students_and_their_teacher_are_trainings():
    def entry(name: str, rate: float) -> dict:
        teacher = {"validation": made_up.validation(0.5), "sentences_per_second": rate, "parameters": 4950530}
        return teacher if name == "teacher" else part(0.1, rate)
    summaries = {seed: {"mode": "distil", "model": "m", "task": "cola", "distillation": {"temperature": 1, "alpha": 0.5},
                        **{name: {**entry(name, rate), "run": "t"} for name, rate in (
                            ("teacher", 50.0), ("student", 7000.0), ("scratch", 7000.0))}} for seed in ("12345", "12346")}
    study = {**seeds.results("distil", summaries), "seeds": list(summaries), "command": "python run.py distil 12345 --out=x",
             **MACHINE, "git_commit": "0123456789"}
    teacher = {**seeds.results("LoRA", {seed: {"mode": "LoRA", "model": "m", "task": "cola", "method": "lora", **part(0.5),
                                               "parameters": {"trainable": 7}} for seed in ("12345", "12346")}),
               "seeds": ["12345", "12346"], "command": "python run.py LoRA 12345 --out x", **MACHINE,
               "git_commit": "1123456789"}
    results = {"paper/distil": summarise.of_step("distil", {"files": {summarise.STEPS["distil"].done: json.dumps(study)}}),
               "paper/teacher": summarise.of_step("teacher", {"files": {
                   summarise.STEPS["teacher"].done: json.dumps(teacher)}})}
    lines = summarise.cola(results)
    label = "`LoRA` after an intermediate task, bfloat16, rank 16: the students' teacher"
    assert any(line.startswith(f"| {label} | 2 (12345 to 12346) | best (2) | 7 | 0.806 ± 0.000 / 0.500")
               and line.endswith("| `python run.py LoRA 12345` |") for line in lines)
    assert sum(line.endswith("| `python run.py distil 12345` |") for line in lines) == 2
    label = "`distil`: student with KD"
    assert any(line.startswith(f"| {label} | 2 (12345 to 12346) | best (2) | 4,950,530 | 0.806 ± 0.000 / 0.100")
               for line in lines)
    assert lines[-1].endswith("commit 0123456, 1123456.")
    assert summarise.student(results)[2:] == ["| teacher | 4,950,530 | 50 ± 0 |", "| student | 4,950,530 | 7,000 ± 0 |"]


def test_a_variant_of_the_student_stands_beside_its_baseline_and_the_first_row():
    def study(**mccs: tuple[float, float]) -> dict:
        return {**MACHINE, "entries": [{"entry": name, "seeds": ["12345", "12346"], **over_seeds([part(mcc) for mcc in two])}
                                       for name, two in mccs.items()]}
    lines = summarise.ablations({"paper/distil": study(student=(0.5, 0.6), scratch=(0.4, 0.4)),
                                 "paper/distil-hard-labels": study(student=(0.45, 0.55)),
                                 "paper/distil-plain": study(student=(0.3, 0.4), scratch=(0.46, 0.46))})
    assert ("| as it is | 0.550 ± 0.071 | 0.450 ± 0.071 | 0.350 ± 0.071 | 0.200 ± 0.000 | +0.150 (-0.485 to +0.785) |  |"
            ) in lines
    hard = next(line for line in lines if "--kd-loss hard" in line)
    assert hard.endswith("| 0.500 ± 0.071 | 0.400 ± 0.071 | 0.300 ± 0.071 |  |  | -0.050 (-0.050 to -0.050) |")
    assert sum("not run" in line for line in lines) == 3
    assert "The first row's student minus the best baseline of all rows: +0.090 (-0.545 to +0.725)." in lines


def test_a_student_of_another_task_stands_beside_its_teacher():
    def entry(name: str, **more) -> dict:
        return {"entry": name, "parameters": 1000, **more}
    score = {"validation": {"accuracy": {"mean": 0.8, "sd": 0.01}, "mcc": {"mean": 0.6, "sd": 0.02}}}
    one = {"validation": {name: spread | {"sd": 0.0} for name, spread in score["validation"].items()}}
    lines = summarise.polarity({"paper/polarity": {**MACHINE, "command": "python run.py distil 12345", "selection": {
        "split": "validation"}, "entries": [entry("teacher", best=one), entry("student", best=score, last=score)],
        "seeds": ["12345", "12346"], "differences": [
            {"entry": "student", "minus": minus, "best": {"validation": {"accuracy": {"mean": mean, "interval": interval}}}}
            for minus, mean, interval in (("scratch", 0.02, [0.01, 0.03]), ("teacher", -0.01, None))]}})
    assert "| teacher | 1,000 | 0.800 / 0.600 |  |" in lines  # one for both seeds
    assert ("Seeds: 2 (12345 to 12346). Accuracy minus that of the baseline, paired by seed, 95 % interval: the "
            "student with KD +2.0 % (+1.0 to +3.0). Accuracy minus that of the teacher, paired by seed, 95 % interval: the "
            "student with KD -1.0 %."
            ) in lines
    assert "| student with KD | 1,000 | 0.800 ± 0.010 / 0.600 ± 0.020 | 0.800 ± 0.010 / 0.600 ± 0.020 |" in lines


def test_a_comparison_has_a_row_for_each_entry(tmp_path):
    spread = {"accuracy": {"mean": 0.004, "interval": [-0.001, 0.009]}}
    study = made_up.comparison(tmp_path, **{**MACHINE, "git_commit": "0123456789"}, differences=[
        {"entry": "lora", "minus": "head", "best": {"in_domain": spread}}, {"entry": "full", "minus": "head"}])
    lines = summarise.comparison("methods", {"paper/methods": recorded("methods", study)})
    assert lines[:3] == ["```", "python run.py compare 12345", "```"]
    assert "| majority class |  |  | 69.3 % | 0 |  |  |  |  |" in lines
    assert ("| lora | 123,456 (12 %) | 0.0004 | 81.2 ± 1.0 % | 0.212 ± 0.010 | 81.2 ± 1.0 % | 12.3 s | 600 MiB | 4.57 MB |"
            ) in lines
    assert "| none | 0 (0 %) |  | 30.0 ± 1.0 % | -0.300 ± 0.010 |  | 12.3 s | 600 MiB | 4.57 MB |" in lines
    assert any(line.startswith("| full |") and "diverged" in line for line in lines)
    assert any(line.endswith(" Accuracy minus that of `head`, paired by seed, 95 % interval: `lora` +0.4 % (-0.1 to +0.9).")
               for line in lines)


def test_a_grid_has_one_option_in_rows_and_the_other_in_columns(tmp_path):
    trials = [{"state": "complete", "params": {"rank": rank, "targets": targets}, "score": 0.5,
               "parameters": {"trainable": 1000 * rank, "total": 10 ** 6}, "validation": made_up.validation(rank / 10)}
              for rank in (1, 2) for targets in ("q+v", "all") if (rank, targets) != (2, "all")]
    path = made_up.search(tmp_path, search={"rank": [1, 2], "targets": ["q+v", "all"]}, trials=trials, **MACHINE,
                          importance={"rank": 0.07, "targets": 0.93}, git_commit="0123456789")
    lines = summarise.sweep("rank", {"paper/rank": recorded("rank", path)})
    assert lines[4:8] == ["| rank | q+v | all |", "| --- | ---: | ---: |",
                          "| 1 | 80.7 % / 0.100 (1,000) | 80.7 % / 0.100 (1,000) |", "| 2 | 80.7 % / 0.200 (2,000) |  |"]
    assert lines[9] == "Share of the scores' variance that each option explains (fANOVA): `rank` 7 % and `targets` 93 %."


def test_other_problems_have_their_own_scores_and_the_model_that_always_says_the_same():
    number = PROBLEMS["regression"]
    parts = []
    for spearman in (0.8, 0.9):
        scores = {"dev": {"pearson": 0.7, "spearman": spearman, "mse": 0.5}}
        parts.append({"validation": scores, "last_validation": scores, "best_epoch": 2, "last_epoch": 3, "parameters": 1234})
    result = trained(row("lora", parts, number), problem="regression",
                     always_the_same={"dev": {"pearson": 0.0, "spearman": 0.0, "mse": 2.25}})
    lines = summarise.other_problems({"stsb_lora": result})
    assert lines[2] == "| STS-B, mean |  |  | Pearson 0.000, Spearman 0.000, MSE 2.250 |  |"
    said = "Pearson 0.700 ± 0.000, Spearman 0.850 ± 0.071, MSE 0.500 ± 0.000"
    assert lines[3] == f"| STS-B, `LoRA` | 2 (12345 to 12346) | 1,234 | {said} | {said} |"
    assert sum("not run" in line for line in lines) == 5
