"""tables, studies, build: runs made up (made_up.py), then tabled, built and zipped."""

import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import HASH, SR, comparison, copy_sources, distil_run, entry_row, epoch, lora_run, search
from test_pages import broken_links

from report import build, latex, studies
from report.latex import LATEX
from report.records import ReportError, read_json
from report.runs import Run
from report.tables import tables_of

REPORT = Path(build.__file__).parent


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Path:
    """A folder with both runs, a comparison, a sweep, their plots and report/results/; not to be changed."""
    root = tmp_path_factory.mktemp("both")
    lora_run(root / "runs"), distil_run(root / "runs"), comparison(root / "runs"), search(root / "runs")
    written = build.write_report_results(SR, root / "runs", root / "plots", root / "report")
    assert sorted(written) == sorted((root / "report" / "results").iterdir())
    return root


def numbers(results: Path) -> dict[str, str]:
    text = (results / "numbers.tex").read_text()
    return dict(re.findall(r"^\\setresult\{([^}]*)\}\{(.*)\}$", text, flags=re.MULTILINE))


# ---------------------------------------------------------------- LaTeX

def unescaped(latex: str) -> str:
    """What `escape` wrote, read back; fails on any special character that stands bare."""
    back = {value: key for key, value in LATEX.items()}
    tokens = "|".join(re.escape(value) for value in sorted(back, key=len, reverse=True))
    text = ""
    while latex:
        match = re.match(tokens, latex)
        broken = re.match(r"([-<>,])\{\}(?=\1)", latex)
        piece = match[0] if match else broken[0] if broken else latex[0]
        assert match or broken or piece not in "\\{}$&#_%~^", f"bare {piece!r} in {latex!r}"
        text += back[piece] if match else piece[0]
        latex = latex[len(piece):]
    return text


@given(st.text(alphabet=st.one_of(st.sampled_from("\\{}$&#_%~^[]*`'\"-<>,a "), st.characters(max_codepoint=0x2fff))))
def test_escape_leaves_no_special_character_bare(text):
    printable = re.sub(f"[^ -~\u00a1-\u00ff{latex.LETTERS}]", lambda match: f"[U+{ord(match[0]):04X}]",
                       re.sub(r"\s", " ", text))
    assert unescaped(latex.escape(text)) == printable
    assert "--" not in latex.escape(text)


@given(st.text(alphabet="ab_/\\%{ -"))
def test_breakable_loses_nothing(text):
    assert unescaped(latex.breakable(text).replace(r"\allowbreak{}", "")) == text


def test_breakable_breaks_paths_and_hashes():
    assert latex.breakable("a/b " + "c" * 40) == rf"a/\allowbreak{{}}b {'c' * 32}\allowbreak{{}}{'c' * 8}"


@pytest.mark.parametrize(("key", "value", "text"), [
    ("total", 124439808, "124,439,808"), ("accuracy", 0.80654, "80.65"), ("mcc", -0.0123, "$-$0.012"),
    ("reduction_percent", 99.05178, "99.05"), ("mcc", float("nan"), "n/a"), ("loss", None, "n/a"),
    ("seconds", 12.3456, "12.35"), ("equal_to_base", True, "yes"), ("model", "a_b", r"a\_\allowbreak{}b"),
    ("alpha", 0.9, "0.9")])
def test_numbers_as_the_report_prints_them(key, value, text):
    assert latex.shown(key, value) == text


def test_results_hold_the_numbers_of_the_runs(both):
    results = both / "report" / "results"
    found = numbers(results)
    assert found["lora.parameters.total"] == "125,620,992" and found["lora.parameters.trainable"] == "1,181,184"
    assert found["lora.parameters.reduction_percent"] == "99.06" and found["lora.chosen.mcc"] == "0.512"
    assert found["lora.validation.out_of_domain.mcc"] == "0.412" and found["lora.chosen.accuracy"] == "80.65"
    assert found["distil.student.smaller"] == "25" and found["distil.student.faster"] == "30"
    assert found["lora.train.seconds"] == "1,235"
    comparison = (results / "distil_results.tex").read_text()
    assert r"majority class & -- & 69.26 & 0 & 68.26 & 0 & 67.26 & 0 \\" in comparison
    assert r"teacher & -- & 80.65 & 0.512 & 75.65 & 0.412 & 70.65 & 0.312 \\" in comparison
    assert r"student with KD & 2 (best) & 80.65 & 0.322 &" in comparison
    assert r" & 4 (last) & 80.65 & 0.259 &" in comparison
    epochs = (results / "lora_epochs.tex").read_text()
    assert r"1 & 2.0e$-$04 & 0.600 & 72.00 & 0.100 & 0.500 & 80.65 & 0.090 &" in epochs
    assert r"2.0e$-$04 & 0.900 & 0.600 &" in (results / "distil_epochs.tex").read_text()
    provenance = (results / "lora_provenance.tex").read_text().replace(r"\allowbreak{}", "")
    assert HASH in provenance and r"cola\_v1.1 -{}-rank 8" in provenance and "torch 2.5.1+cpu" in provenance
    assert r"\texttt{2e-05}" in (results / "lora_options.tex").read_text()
    assert "LSTM, 1 layer, both directions, state of 128" in (results / "distil_architecture.tex").read_text()
    for name in ("LoRA", "distil"):
        assert (results / f"{name}_mcc.pdf").read_bytes() == (both / "plots" / f"{name}-{SR}_mcc.pdf").read_bytes()


def test_every_number_of_the_report_comes_from_a_run(both):
    text = (REPORT / "main.tex").read_text().partition(r"\begin{document}")[2]
    asked = {key for key in re.findall(r"\\result\{([^}#]*)\}", text) if not key.startswith("paper.")}  # see test_paper.py
    # What a run may lack is asked for behind a condition.
    asked -= set(re.findall(r"\\when\{([^}#]*)\}", text))
    missing = asked - set(numbers(both / "report" / "results"))
    assert len(asked) > 20 and {key.rpartition(".")[0] for key in missing} <= {"backbone", "lora.options", "distil.options"}
    tables = set(re.findall(r"\\(?:resulttable|longresult|fullresult)\{(\w+)\}", text))
    assert tables >= {*build.TABLES, *(f"{mode}_results" for mode in build.STUDIES)}


def test_a_missing_run_says_not_run_and_nothing_stale_stays(both, tmp_path):
    shutil.copytree(both / "report", tmp_path / "report")
    shutil.copytree(both / "runs" / f"LoRA-{SR}", tmp_path / "runs" / f"LoRA-{SR}")
    build.write_report_results(SR, tmp_path / "runs", tmp_path / "plots", tmp_path / "report")
    results = tmp_path / "report" / "results"
    assert "not run" in (results / "distil_results.tex").read_text()
    assert "not run" not in (results / "lora_results.tex").read_text()
    assert not list(results.glob("distil_*.pdf")) and not any(key.startswith("distil") for key in numbers(results))
    assert not [path.name for path in results.iterdir() if path.name.startswith(build.STUDIES)]


# ---------------------------------------------------------------- comparisons and sweeps

def test_a_comparisons_table_holds_its_numbers(both):
    table = (both / "report" / "results" / "compare_results.tex").read_text()
    assert "majority class &  &  &  &  & 69.3 & 0 & 68.3 & 0 &  &  &  \\\\" in table
    assert ("lora & 123,456 & 12.3 & 0.0004 & best (2.5) & 81.2 \u00b1 1.0 & 0.212 \u00b1 0.010 & 76.2 \u00b1 1.0 & "
            "0.212 \u00b1 0.010 & 12.3 & 600 & 4.57 \\\\") in table
    assert "none & 0 & 0 &  & untrained & 30.0 \u00b1 1.0 & $-$0.300 \u00b1 0.010" in table  # a minus, no hyphen
    assert r"r\_2 & 1,234" in table and "full &  &  &  & diverged &" in table
    text = studies.compare_text(read_json(both / "runs" / f"compare-{SR}" / "compare.json"))
    assert "lora            0.0004  best (2.5)  81.2 \u00b1 1.0   0.212 \u00b1 0.010" in text
    assert re.search(r"lora +123,456 +12.3 +12.3 +600 +4.57\n", text)
    tables = text.rpartition("\n\n")[0]  # notes are prose
    assert max(map(len, tables.splitlines())) <= 100


def test_a_comparison_with_one_seed_or_one_split_says_so(tmp_path):
    rows = [entry_row("lora", 100, 0.8, splits=("validation",), sd=None, seeds=["12345"])]
    path = comparison(tmp_path, ("validation",), entries=rows, seeds=["12345"])
    text = studies.compare_text(read_json(path))
    assert "One seed (12345)." in text and "\u00b1" not in text.splitlines()[5]
    assert "The validation split chose the epoch by its MCC, and is the one reported" in text


def test_a_rate_at_the_edge_of_the_grid_is_told(tmp_path):
    tried = [{"learning_rate": rate, "mcc": 0.1} for rate in (1e-4, 4e-4, 1e-3)]
    rows = [entry_row("mid", 1, 0.8, tried=tried), entry_row("low", 1, 0.8, tried=tried, learning_rate=1e-4)]
    notes = studies.compare_notes(read_json(comparison(tmp_path, entries=rows)))
    assert notes[-1] == "Chosen at the edge of the grid: low (0.0001); a wider grid may do better."


def test_a_sweeps_table_has_the_best_trials_first(both):
    table = (both / "report" / "results" / "sweep_results.tex").read_text().splitlines()
    assert table[2] == r"trial & MCC & acc. \% & trained & \% & epoch & targets & lr \\"
    assert table[4:7] == [r"0 & 0.500 & 80.7 & 1,000 & 0.1 & 2 & q+v & 0.001 \\",
                          r"1 & 0.400 & 80.7 & 2,000 & 0.2 & 2 & all & 0.002 \\",
                          r"2 & 0.300 & 80.7 & 3,000 & 0.3 & 2 & q+v & 0.003 \\"]
    notes = " ".join(studies.sweep_notes(read_json(both / "runs" / f"sweep-{SR}" / "sweep.json")))
    assert "5 trials with one seed (12345): 3 complete, 2 pruned." in notes and "targets 0.25, lr 0.75" in notes


def test_a_comparison_in_which_nothing_succeeded_is_told_in_one_line(tmp_path):
    rows = [{"entry": "lora", "tried": [], "learning_rate": None, "seeds": []}]
    with pytest.raises(ReportError, match="compare.json: every run diverged"):
        studies.compare_text(read_json(comparison(tmp_path, entries=rows)))


# ---------------------------------------------------------------- errors

@pytest.mark.parametrize(("name", "content", "said"), [
    ("summary.json", "{", "not valid JSON"), ("summary.json", "[]", "must be a JSON object"),
    ("summary.json", "{}", "'mode' is missing"), ("summary.json", None, "No such file"),
    ("config.json", "{}", "'options' is missing"), ("config.json", '{"options": 3}', "must be an object, not 3"),
    ("metrics.jsonl", "", "no epoch"), ("metrics.jsonl", "{}", "line 1: 'validation' is missing"),
    ("metrics.jsonl", json.dumps(epoch(1)) + "\n{", "line 2: not valid JSON"),
    ("metrics.jsonl", json.dumps(epoch(1) | {"epoch": "one"}), "'epoch' must be a number, not \"one\""),
    ("metrics.jsonl", json.dumps(epoch(9)), "'best_epoch' is 3"), ("summary.json", b"\xff", "not valid JSON")])
def test_a_malformed_file_is_named_in_one_line_and_nothing_is_written(tmp_path, name, content, said):
    run = lora_run(tmp_path / "runs")
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ReportError) as error:
        build.write_report_results(SR, tmp_path / "runs", tmp_path / "plots", tmp_path / "report")
    message = str(error.value)
    assert str(run) in message and said in message and "\n" not in message
    assert not (tmp_path / "report").exists()


def test_building_without_a_run_names_the_commands(tmp_path):
    with pytest.raises(ReportError, match=f"python run.py LoRA {SR}.*python run.py distil {SR}"):
        build.build_report(SR, tmp_path / "runs", tmp_path / "plots", tmp_path / "report")


def test_building_without_latexmk_names_the_packages(tmp_path, monkeypatch):
    lora_run(tmp_path / "runs")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ReportError, match="latexmk texlive-latex-recommended texlive-latex-extra "
                                          "texlive-fonts-recommended lmodern"):
        build.build_report(SR, tmp_path / "runs", tmp_path / "plots", tmp_path / "report")


# ---------------------------------------------------------------- the PDF

needs_latex = pytest.mark.skipif(not shutil.which("latexmk"), reason="latexmk is not installed")


@needs_latex
def test_the_report_builds_before_any_run(tmp_path):
    copy_sources(tmp_path)
    done = subprocess.run(["latexmk", "-pdf", "-cd", "-interaction=nonstopmode", "-halt-on-error",
                           tmp_path / "main.tex"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "main.pdf").stat().st_size > 50_000
    assert "undefined" not in (tmp_path / "main.log").read_text(errors="replace")


@needs_latex
def test_the_report_builds_from_runs_with_hostile_strings(tmp_path):
    every = "".join(map(chr, [*range(32, 127), *range(0xa1, 0x100)])) + "\n\u4e2d\U0001f600 -- << ?` [x] \\end{x}"
    scores = {"n": 5, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    by_class = {"in_domain": {"confusion": [[3, 2], [1, 4]], "per_class": {every[:30]: scores, "$x^$": scores}}}
    lora_run(tmp_path / "runs", model=every[:95], sanity={"prompt": "*", "text": every, "equal_to_base": True},
             by_class=by_class)
    distil_run(tmp_path / "runs")
    comparison(tmp_path / "runs", model=every[:95]), search(tmp_path / "runs", task=every[:95])
    report = copy_sources(tmp_path / "a folder" / "report")
    pdf = build.build_report(SR, tmp_path / "runs", tmp_path / "plots", report)
    assert pdf == report / f"Report_{SR}.pdf" and pdf.stat().st_size > 100_000
    assert {path.name for path in report.iterdir()} == {"main.tex", "over_seeds.tex", "refs.bib", "results", pdf.name}


@needs_latex
def test_a_latex_error_is_told_in_one_line(tmp_path):
    lora_run(tmp_path / "runs", epochs=1, best_epoch=1)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "main.tex").write_text("\\documentclass{article}\\begin{document}\\nosuch\\end{document}")
    with pytest.raises(ReportError, match=r"! Undefined control sequence\.") as error:
        build.build_report(SR, tmp_path / "runs", tmp_path / "plots", tmp_path / "report")
    assert "\n" not in str(error.value) and (tmp_path / "report" / f"Report_{SR}.log").exists()


# ---------------------------------------------------------------- the hand-in

@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project folder with all that is to be handed in, and all that is not."""
    wanted = ["run.py", "model.py", "fast/__init__.py", "fast/amx.c", "fast/avx512.h", "tests/test_model.py",
              "benchmarks/speed.py", "benchmarks/results/speed.json", "benchmarks/results/paper/lora.json",
              "serving/__init__.py", "serving/page.html", "serving/page.js", "serving/page.css", "data/__init__.py",
              "docs/speed.md", "plots/example_serving.png", "requirements.txt", "Makefile", "requirements-dev.txt",
              "README.md", "LICENSE", "pyproject.toml", ".ci/run",
              "report/main.tex", "report/refs.bib", "report/results/LoRA_mcc.pdf",
              f"plots/LoRA-{SR}_mcc.png", f"plots/distil-{SR}_loss.pdf",
              f"report/Report_{SR}.pdf"]
    unwanted = ["data/cola.tsv", "train.csv", "runs/LoRA-12345/metrics.jsonl", "model.safetensors", ".venv/lib/x.py",
                "__pycache__/run.pyc", ".git/config", ".pytest_cache/x", ".ruff_cache/x", "tests/__pycache__/x.pyc",
                "tests/rows.tsv", "benchmarks/out.jsonl", "data/train.json",
                "mine/x.py", "docs/.checkpoints/x.md", "plots/LoRA-54321_mcc.png", "report/main.aux",
                "report/Report_54321.pdf", "old.zip"]
    for name in wanted + unwanted:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "report" / "results" / "numbers.tex").write_text(f"\\setresult{{sr}}{{{SR}}}\n")
    (tmp_path / "wanted.list").write_text("\n".join([*wanted, "report/results/numbers.tex"]))
    return tmp_path


def test_submission_holds_code_plots_and_report_and_nothing_else(project):
    path = build.make_submission(SR, "Ada", "Lovelace", project)
    assert path == project / f"Asst2_Ada_Lovelace_{SR}.zip"
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        assert archive.testzip() is None and archive.read(f"{path.stem}/run.py") == b"run.py"
    assert sorted(names) == sorted(f"{path.stem}/{name}" for name in (project / "wanted.list").read_text().split())
    assert not list(project.glob(".*.part"))


def test_submission_of_this_project_holds_every_file_that_git_holds(project):
    if not (REPORT.parent / ".git").exists():
        pytest.skip("the submission itself")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPORT.parent, capture_output=True, text=True, check=True)
    tracked = {name for name in listed.stdout.split("\0") if name and (REPORT.parent / name).is_file()}
    for name in tracked:
        (project / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPORT.parent / name, project / "copy" / name)
    (project / "copy" / "report" / f"Report_{SR}.pdf").write_text("PDF")
    path = build.make_submission(SR, "Ada", "Lovelace", project / "copy")
    with zipfile.ZipFile(path) as archive:
        names = {name.removeprefix(f"{path.stem}/") for name in archive.namelist()}
        archive.extractall(project)
    assert tracked - names == {".gitignore", "plots/.gitkeep"}
    # Every link of its pages leads somewhere, in the unzipped folder too.
    assert broken_links(project / path.stem) == []


def test_submission_has_no_space_in_its_name(project):
    path = build.make_submission(SR, " Mary  Ann", "van der\u00a0Berg ", project)
    assert path.name == f"Asst2_MaryAnn_vanderBerg_{SR}.zip"
    assert all(name.startswith(f"{path.stem}/") for name in zipfile.ZipFile(path).namelist())


def test_submission_is_the_same_bytes_again(project):
    first = build.make_submission(SR, "Ada", "Lovelace", project).read_bytes()
    os.utime(project / "run.py", (1, 1))
    assert build.make_submission(SR, "Ada", "Lovelace", project).read_bytes() == first


@pytest.mark.parametrize(("first", "last"), [("", "L"), ("A", " "), ("../A", "L"), ("A", "b\\c"), ("A\n", "L"),
                                           ("A\udcff", "L")])
def test_submission_rejects_names_no_file_can_have(project, first, last):
    with pytest.raises(ReportError, match="name"):
        build.make_submission(SR, first, last, project)
    assert not list(project.glob("Asst2*"))


def test_submission_needs_the_report_of_its_own_run(project):
    (project / "report" / "results" / "numbers.tex").write_text("\\setresult{sr}{54321}\n")
    with pytest.raises(ReportError, match=f"python run.py report {SR}"):
        build.make_submission(SR, "Ada", "Lovelace", project)
    (project / "report" / f"Report_{SR}.pdf").unlink()
    with pytest.raises(ReportError, match=f"not found; first `python run.py report {SR}`"):
        build.make_submission(SR, "Ada", "Lovelace", project)
    with pytest.raises(ReportError, match="five digits"):
        build.make_submission("*", "Ada", "Lovelace", project)


def test_several_teachers_stand_above_their_mean(tmp_path):
    def model(mcc: float, **more) -> dict:
        return {"parameters": 100, "sentences_per_second": 10.0, **more,
                "validation": {"all": {"n": 9, "loss": 0.5, "accuracy": 0.8, "mcc": mcc, "majority_accuracy": 0.7}}}
    run = distil_run(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    parts = {"teacher": model(0.6, members=[model(0.55), model(0.52)]),
             "student": model(0.3, best_epoch=2, last_epoch=4), "scratch": model(0.1, best_epoch=2, last_epoch=4)}
    (run / "summary.json").write_text(json.dumps(summary | parts))
    table = tables_of(Run(run))[0]["distil_results"]
    places = [table.index(f"{name} & -- & 80.00 & {mcc:.3f} ") for name, mcc in (
        ("teacher 1", 0.55), ("teacher 2", 0.52), ("mean of teachers", 0.6))]
    assert places == sorted(places)
