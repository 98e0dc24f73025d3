"""The paper's tables and PDF, from a paper made up."""
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from made_up import COLA, SR, copy_sources, distil_run, lora_run, search

from report import build
from report import paper as tables

REPORT = Path(build.__file__).parent
SEEDS = ["12345", "12346", "12347"]
STEPS = {"grid": "grid/compare.json", "lora": "cola/LoRA-12345-seeds/seeds.json", "peft": "peft/compare.json",
         "intermediate": "intermediate/summary.json", "teacher": "teacher/LoRA-12345-seeds/seeds.json",
         "distil": "cola/distil-12345-seeds/seeds.json", "distil-plain": "distil-plain/distil-12345-seeds/seeds.json",
         "rank": "sweep-12345/sweep.json", "methods": "methods/compare.json", "long": "long/compare.json",
         "variants": "variants/compare.json", "variants-default": "variants-default/compare.json",
         "losses-plain-dkd": "losses-plain-dkd/distil-12345-seeds/seeds.json"}


def spread(mean: float, half: float | None = 0.05) -> dict:
    return {"mean": mean, "sd": None if half is None else 0.02, "values": [mean] * 3,
            "interval": None if half is None else [mean - half, mean + half]}


def scores(mcc: float, half: float | None, splits=COLA) -> dict:
    both = {split: {"accuracy": spread(0.8 - i / 10, half and half / 5), "mcc": spread(mcc - i / 10, half)}
            for i, split in enumerate(splits)}
    return {"seeds": SEEDS, "best": both, "last": both}


def entry(name: str, mcc: float, half: float | None, **more) -> dict:
    return {"entry": name, "method": name, "learning_rate": 4e-4, "tried": [{"learning_rate": 4e-4, "mcc": mcc}],
            "parameters": {"total": 1000000, "trainable": 12345, "trainable_percent": 1.2}, "best_epoch": spread(2.5, half),
            "last_epoch": spread(3, half), "seconds_per_epoch": 12.3, "peak_memory_bytes": 600 * 2 ** 20,
            "size_bytes": 4567890, "majority_accuracy": {split: 0.69 for split in COLA}, **scores(mcc, half), **more}


def made_up(folder: Path, done=tuple(STEPS), half: float | None = 0.05, seeds=SEEDS) -> Path:
    """A paper's folder of which the steps `done` have been run; `half`: of every interval."""
    study = {"sr": SR, "model": "smollm2", "task": "cola", "seeds": seeds, "selection": {
        "split": "in_domain", "splits": list(COLA)}, "majority_accuracy": {split: 0.69 for split in COLA}}
    compare = {**study, "mode": "compare", "differences": []}
    distil = {**study, "mode": "seeds", "of": "distil", "runs": [
        {"seed": SR, "folder": f"nowhere/distil-{SR}", "status": "finished"}], "entries": [
            entry("teacher", 0.5, half), entry("student", 0.21, half), entry("scratch", 0.16, half)],
        "differences": [{"entry": "student", "minus": "scratch", **scores(0.05, half)}]}
    content = {"grid": {**compare, "entries": [entry("lora", 0.52, half)]},
               "lora": {**study, "mode": "seeds", "of": "LoRA", "entries": [entry("LoRA", 0.52, half)], "differences": []},
               "intermediate": {"mode": "LoRA"}, "teacher": {
                   **study, "mode": "seeds", "of": "LoRA", "entries": [entry("LoRA", 0.55, half)], "differences": []},
               "peft": {**compare, "entries": [entry("peft", 0.51, half)]}, "distil": distil, "distil-plain": distil,
               "methods": {**compare, "entries": [entry("head", 0.1, half), entry("lora", 0.5, half), {
                   "entry": "full", "tried": [], "learning_rate": None, "seeds": []}],
                   "differences": [{"entry": "head", "minus": "lora", **scores(-0.4, half)}]}}
    content["long"] = content["methods"]
    content["variants"] = {**compare, "entries": [entry(name, mcc, half) for name, mcc in (
                               ("lora", 0.5), ("dora", 0.51), ("ia3", 0.3))],
                           "differences": [{"entry": name, "minus": "lora", **scores(mcc, half)}
                                           for name, mcc in (("dora", 0.01), ("ia3", -0.2))]}
    content["variants-default"] = {**compare, "entries": [entry("lora", 0.49, half)]}
    content["losses-plain-dkd"] = distil
    for name in done:
        path = folder / STEPS[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "rank":
            path.parent.rmdir()
            search(folder)
        else:
            path.write_text(json.dumps(content[name]))
    if "lora" in done:
        lora_run(folder / "cola")
    if "distil" in done:
        run = distil_run(folder / "cola")
        summary = json.loads((run / "summary.json").read_text())
        summary["student"]["train"] = summary["train"]
        (run / "summary.json").write_text(json.dumps(summary))
    flags = {"distil-plain": " --out p/distil-plain --plain", "distil": " --out p/cola"}
    folder.mkdir(exist_ok=True)
    (folder / "paper.json").write_text(json.dumps({
        "mode": "paper", "sr": SR, "options": {"profile": "quick"}, "cpu": "A CPU", "threads": 1, "seeds": seeds, "steps": [
            {"name": name, "command": f"python run.py {name} {SR}{flags.get(name, '')}", "file": file,
             "status": "done" if name in done else "failed", "seconds": 60.0 if name in done else None}
            for name, file in STEPS.items()],
        "differences": [{"step": "lora", "entry": "LoRA", "minus": "peft", **scores(0.01, half)},
                        {"step": "distil-plain", "entry": "student", "minus": "student", **scores(-0.02, half)},
                        {"step": "losses-plain-dkd", "entry": "student", "minus": "student", **scores(0.03, half)}]
        if len(done) == len(STEPS) else []}))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The numbers and files of a paper of which every step is done; not to be changed."""
    folder = tmp_path_factory.mktemp("paper")
    return tables.paper_results(made_up(folder), folder / "plots")


def test_the_paper_names_every_machine_that_a_step_ran_on(tmp_path):
    folder = made_up(tmp_path / "paper", ("grid", "lora", "peft"))
    assert tables.paper_results(folder, tmp_path / "plots")[0]["paper.machines"] == "A CPU with 1 thread"
    for name, cpu in (("grid", "A CPU"), ("peft", "B&W")):
        study = json.loads((folder / STEPS[name]).read_text())
        (folder / STEPS[name]).write_text(json.dumps(study | {"cpu": cpu, "threads": 2}))
    assert tables.paper_results(folder, tmp_path / "plots")[0]["paper.machines"] == (
        r"A CPU with 2 threads and on B\&W with 2 threads")


def test_a_table_has_mean_and_half_of_the_interval_best_and_last_alike(whole):
    numbers, files = whole
    cola = files["paper_cola.tex"].decode()
    assert r"majority class &  & 69.0 & 0 & 69.0 & 0 & 69.0 & 0 \\" in cola
    assert r"LoRA, rate 0.0004 & best (2.5) & 80.0\,$\pm$\,1.0 & 0.520\,$\pm$\,0.050 & 70.0\,$\pm$\,1.0 & 0.420" in cola
    assert r"PEFT + Trainer, rate 0.0004 & best (2.5) & 80.0\,$\pm$\,1.0 & 0.510\,$\pm$\,0.050" in cola
    assert r"LoRA minus PEFT & best & +80.0\,$\pm$\,1.0 & +0.010\,$\pm$\,0.050 &" in cola and cola.count(" & last") == 4
    assert r"the students' teacher & best (2.5) & 80.0\,$\pm$\,1.0 & 0.550\,$\pm$\,0.050" in cola
    assert "first learned to tell plain sentences from edited ones" in numbers["paper.teacher.note"]
    student = files["paper_student.tex"].decode()
    assert r"student with KD minus baseline & best & +80.0\,$\pm$\,1.0 & +0.050\,$\pm$\,0.050" in student
    variants = files["paper_ablations.tex"].decode().splitlines()
    assert any(line.startswith(r"\texttt{(as it is)} & 0.210") and r"& $-$0.150\,$\pm$\,0.050 &  \\" in line
               for line in variants)
    assert any(line.startswith(r"\texttt{-{}-plain}") and r"$-$0.220\,$\pm$\,0.050 \\" in line for line in variants)
    methods = files["paper_methods.tex"].decode()
    assert r"head & 12,345 & 0.0004 & best (2.5) & 80.0" in methods and "full &  &  & diverged" in methods
    assert r"head minus lora &  &  & best & +80.0\,$\pm$\,1.0 & $-$0.400\,$\pm$\,0.050" in methods
    assert r"student with KD & 5,000,000 & 5,000,000 & 309 & 1,177 & 20 & 2,100" in files["paper_cost.tex"].decode()
    found = files["paper_variants.tex"].decode()
    assert r"lora (default rate) & 12,345 & 0.0004 & 0.290 &  &  &  &  & 12.3 & 600 & 4.57 \\" in found
    assert r"dora & 12,345 & 0.0004 & 0.310 &  & $-$0.190 & [$-$0.240, $-$0.140] & 0.0" in found
    assert "paper_class_weights.tex" not in files
    assert r"plain, dkd & 0.010 & $-$0.170 & [$-$0.220, $-$0.120] &" in files["paper_losses.tex"].decode()
    assert numbers["paper.lora.minus.peft"] == r"+0.010\,$\pm$\,0.050"
    assert "the mean over 3 seeds" in numbers["paper.spread"]


def test_one_seed_has_no_interval_and_says_so(tmp_path):
    done = ("grid", "lora", "peft", "distil")
    numbers, files = tables.paper_results(made_up(tmp_path, done, half=None, seeds=SEEDS[:1]), tmp_path / "plots")
    assert numbers["paper.spread"] == "One seed: no standard deviation and no interval."
    assert b"& 0.520 &" in files["paper_cola.tex"]
    assert not any(rb"\pm" in content for name, content in files.items() if name.endswith(".tex"))


def test_what_main_tex_asks_for_is_what_is_written(whole):
    numbers, files = whole
    text = (REPORT / "main.tex").read_text().partition(r"\begin{document}")[2] + (REPORT / "over_seeds.tex").read_text()
    asked = set(re.findall(r"\\papertable\{(\w+)\}", text)) | set(re.findall(r"\\longresult\{paper_(\w+)\}", text))
    assert asked == set(tables.TABLES)
    absent = {"paper.diagnose.pairs"}  # of a step that this paper has not
    assert set(re.findall(r"\\result\{(paper\.[^}#]*)\}", text)) - absent <= set(numbers)
    notes = {f"paper.{name}" for name in re.findall(r"\\papernote\{([^}#]*)\}", text)}
    assert notes - set(numbers) == {"paper.diagnose.left_out", "paper.buzzer.notes"}
    known = {f"paper_{name}.tex" for name in tables.TABLES}
    assert {name for name in files if name.endswith(".tex")} <= known


needs_latex = pytest.mark.skipif(not shutil.which("latexmk"), reason="latexmk is not installed")


@pytest.mark.slow
@needs_latex
@pytest.mark.parametrize("done", [tuple(STEPS), ()], ids=["all", "nothing"])
def test_the_paper_builds_whatever_is_done(tmp_path, done):
    report = copy_sources(tmp_path / "report")
    paper = made_up(tmp_path / "paper", done)
    (paper / "cola" / f"distil-{SR}").mkdir(parents=True, exist_ok=True)  # a run that failed leaves no summary
    pdf = build.build_paper(paper, report)
    assert pdf == report / "main.pdf" and pdf.stat().st_size > 50_000
    if not shutil.which("pdftotext"):
        return
    text = subprocess.run(["pdftotext", "-layout", pdf, "-"], capture_output=True, text=True, check=True).stdout
    # The list of contents has the names of the sections too.
    evidence = text.rpartition("Results over seeds")[2].partition("The first seed in detail")[0]
    assert ("0.520 ± 0.050" in evidence) == bool(done)
    assert evidence.count("not run") > (15 if not done else 5)  # quiz-bowl guesses and diagnoses are never there
    assert "python run.py grid 12345" in text and ("(failed)" in text) == (not done)
