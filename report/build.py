"""Builds the PDF of a run or of the paper from recorded files, and the zip file to hand in.

    python run.py report 12345      # plots/*-12345_*, report/results/, report/Report_12345.pdf
    python run.py paper 12345       # runs/paper-quick-12345/plots/, report/results/, report/main.pdf
    python run.py submit 12345 ...  # Asst2_<first>_<last>_12345.zip

Every number is from `config.json`, `metrics.jsonl` or `summary.json` of a run: this folder reads files and imports no other.
"""

import os
import re
import shutil
import subprocess
import tempfile
import zipfile
from datetime import date
from pathlib import Path

from report import figures
from report.curves import panels
from report.latex import breakable, escape, flatten
from report.objectives import objectives, soft_formula
from report.paper import Paper, paper_results
from report.prose import texts
from report.records import Record, ReportError, read_json, replacing
from report.runs import Run
from report.seeds import folds_latex, folds_note, interval_notes, intervals_latex
from report.studies import STUDY_TABLES
from report.style import save_figure
from report.tables import calibrations, tables_of

NOT_RUN = rb"\emph{not run}"
# The tables of main.tex that a missing run leaves as "not run"; the others are left out where they say nothing.
TABLES = ("lora_results", "lora_epochs", "lora_options", "lora_provenance", "distil_results", "distil_size", "distil_epochs",
          "distil_options", "distil_provenance")
# Studies of many runs: each has a table <study>_results and a figure, if it exists.
STUDIES = ("compare", "sweep")
DEBIAN = "latexmk texlive-latex-recommended texlive-latex-extra texlive-fonts-recommended lmodern"
# The submission: files of these kinds in every package and in these folders, and the listed files. Not whole folders: one
# with code may also hold data, weights and caches.
SUBMITTED_KINDS = ("py", "c", "h", "cu", "html", "css", "js", "toml", "md", "png", "svg", "ipynb", "sh")
SUBMITTED_FOLDERS = ("docs", "tests", "benchmarks", "notebooks")
SUBMITTED_FILES = ("*.py", "*.md", "requirements*.txt", "Makefile", "LICENSE", "CITATION.cff", "Dockerfile", ".dockerignore",
                   "pyproject.toml", ".ci/run",
                   "report/*.tex", "report/*.bib", "report/results/*.tex", "report/results/*.pdf",
                   "benchmarks/results/**/*.json", "plots/example_*.png")


def write_report_results(sr: str, runs_dir: Path, plots_dir: Path, report_dir: Path, author: str = "") -> list[Path]:
    r"""Writes numbers.tex, tables and figures of the runs and studies of `sr` into report/results/, and no others.

    numbers.tex has a line \setresult{key}{value} for each number, and main.tex prints it with \result{key}. A missing key
    prints "not run"; so does the table of a missing run.

    Args:
        author: name on the cover; empty: none.

    Raises ReportError where a file of a run is missing or malformed; report/results/ is then as it was.
    """
    numbers, files = _run_results(sr, runs_dir, plots_dir)
    return _write(report_dir / "results", cover(sr, author) | numbers, files)


def cover(sr: str, author: str) -> dict[str, str]:
    """Returns the numbers of the cover: SR, author, date of the build (SOURCE_DATE_EPOCH, if it is set)."""
    # The convention of reproducible builds: the same sources and date give the same bytes.
    seconds = os.environ.get("SOURCE_DATE_EPOCH", "")
    day = date.fromtimestamp(int(seconds)) if seconds.isdigit() else date.today()
    found = {"sr": sr, "date": f"{day.day} {day:%B %Y}"}
    return found | ({"author": escape(author)} if author else {})


def _run_results(sr: str, runs_dir: Path, plots_dir: Path, modes=("LoRA", "distil"), given: dict[str, Record] | None = None
                 ) -> tuple[dict[str, str], dict[str, bytes]]:
    """Returns the numbers, and the files by name, of the runs (of `modes`) and studies of `sr`.

    Args:
        given: studies that have tables elsewhere, as `prose.texts` takes them; None: those in `runs_dir`.
    """
    # Every table begins as "not run"; those of the runs that exist replace it.
    numbers, files = {}, dict.fromkeys([f"{name}.tex" for name in TABLES], NOT_RUN + b"\n")
    runs = {mode: Run(runs_dir / f"{mode}-{sr}") for mode in modes if (runs_dir / f"{mode}-{sr}").is_dir()}
    for mode, run in runs.items():
        tables, derived = tables_of(run)
        if mode == "distil":
            tables |= {"distil_objectives": objectives(run)}
            numbers["kd.soft"] = soft_formula(run)
        # `by_class` has a table of its own, and its keys are names of classes.
        plain_numbers = {key: value for key, value in run.summary.items() if key != "by_class"}
        prefix = mode.lower()
        numbers |= dict(flatten(prefix, plain_numbers)) | dict(flatten(prefix, derived))
        numbers |= dict(flatten(f"{prefix}.options", run.options))
        files |= {f"{name}.tex": table.encode() for name, table in tables.items()}
        files |= {f"{mode}_{path.stem.rpartition('_')[2]}.pdf": path.read_bytes()
                  for path in figures.plot_run(run.folder, plots_dir) if path.suffix == ".pdf"}
        if run.metrics:
            # Next to the plots of single quantities: the report's figure has all of them, aligned.
            _, pdf = save_figure(panels(run.metrics, run.summary, run.problem), plots_dir / f"{mode}-{sr}_curves")
            files[f"{mode}_curves.pdf"] = pdf.read_bytes()
    names = {"LoRA": "LoRA", "distil": "student with KD"}
    if table := calibrations({names[mode]: run for mode, run in runs.items()}):
        files["calibration.tex"] = table.encode()
    studies = dict(given or {})
    for mode in STUDIES if given is None else ():
        path = runs_dir / f"{mode}-{sr}" / f"{mode}.json"
        if path.is_file():
            studies[mode], (latex, notes) = read_json(path), STUDY_TABLES[mode]
            files[f"{mode}_results.tex"] = latex(studies[mode]).encode()
            files[f"{mode}.pdf"] = next(p for p in figures.plot_study(path, plots_dir) if p.suffix == ".pdf").read_bytes()
            numbers |= {f"{mode}.{key}": breakable(studies[mode][key]) for key in ("model", "task", "command")}
            numbers[f"{mode}.notes"] = escape(" ".join(notes(studies[mode])))
    for mode in modes if given is None else ():
        path = runs_dir / f"{mode}-{sr}-seeds" / "seeds.json"
        if path.is_file():
            study = studies[f"seeds.{mode}"] = read_json(path)
            files[f"seeds_{mode}.tex"] = intervals_latex(study).encode()
            numbers[f"seeds.{mode}.notes"] = escape(" ".join(interval_notes(study)))
    path = runs_dir / f"LoRA-{sr}-folds" / "summary.json"
    if given is None and path.is_file():
        folds = read_json(path)
        files["folds_LoRA.tex"] = folds_latex(folds).encode()
        numbers["folds.notes"] = escape(folds_note(folds))
    # Parts that main.tex mentions only where they exist.
    for path in map(Path, files):
        mode, _, quantity = path.stem.partition("_")
        numbers[f"has.{quantity}.{mode}" if path.suffix == ".pdf" else f"has.{path.stem}"] = "yes"
    return numbers | texts(runs.get("LoRA"), runs.get("distil"), studies), files


def _write(results: Path, numbers: dict[str, str], files: dict[str, bytes]) -> list[Path]:
    """Writes numbers.tex and the files into the folder `results`, removes everything else in it, and returns the paths."""
    files = files | {"numbers.tex": "".join(f"\\setresult{{{key}}}{{{value}}}\n" for key, value in numbers.items()).encode()}
    for name, content in files.items():
        with replacing(results / name) as temporary:
            temporary.write_bytes(content)
    # A table of an older run would otherwise stand in this run's report.
    for stale in set(results.iterdir()) - {results / name for name in files}:
        stale.unlink()
    return [results / name for name in files]


def check_latex() -> str:
    """Returns the path of latexmk. Raises ReportError if it is not installed."""
    if not (latexmk := shutil.which("latexmk")):
        raise ReportError(f"latexmk not found; on Debian: apt install {DEBIAN}")
    return latexmk


def build_report(sr: str, runs_dir: Path, plots_dir: Path, report_dir: Path, author: str = "") -> Path:
    """Builds `report/Report_<SR>.pdf` from the runs and studies of `sr`, with the author's name on the cover.

    Raises ReportError: no run of `sr`, a malformed file, latexmk is missing, or LaTeX failed (its log is then kept).
    """
    if not any((runs_dir / f"{mode}-{sr}").is_dir() for mode in ("LoRA", "distil", *STUDIES)):
        raise ReportError(f"{runs_dir}: no run of {sr}; first `python run.py LoRA {sr}` or `python run.py distil {sr}`")
    check_latex()
    write_report_results(sr, runs_dir, plots_dir, report_dir, author)
    return _compile(report_dir, f"Report_{sr}")


def build_paper(folder: Path, report_dir: Path, author: str = "") -> Path:
    """Builds `report/main.pdf` from the steps of a paper: the tables over seeds, then the report of the first seed's runs.

    Args:
        folder: the folder of the paper, with paper.json.
        report_dir: the folder of main.tex.
        author: name on the cover; empty: none.

    Raises ReportError: a malformed file, latexmk is missing, or LaTeX failed (its log is then kept).
    """
    check_latex()
    sr, plots = read_json(folder / "paper.json")["sr"], folder / "plots"
    # An unfinished run of a step that failed counts as "not run".
    finished = [mode for mode in ("LoRA", "distil") if (folder / "cola" / f"{mode}-{sr}" / "summary.json").exists()]
    done = Paper(folder).done
    steps = (("seeds.LoRA", "lora"), ("seeds.distil", "distil"), ("compare", "grid"))
    studies = {name: done[step] for name, step in steps if step in done}
    numbers, files = _run_results(sr, folder / "cola", plots, finished, studies)
    more_numbers, more_files = paper_results(folder, plots)
    _write(report_dir / "results", cover(sr, author) | numbers | more_numbers, files | more_files)
    return _compile(report_dir, "main")


def _compile(report_dir: Path, name: str) -> Path:
    """Runs latexmk on main.tex and writes report/<name>.pdf, or report/<name>.log if LaTeX failed."""
    # LaTeX's auxiliary files go to a temporary folder: those of an interrupted build would break the next one.
    with tempfile.TemporaryDirectory() as build:
        done = subprocess.run([check_latex(), "-pdf", "-cd", "-interaction=nonstopmode", "-halt-on-error",
                               f"-outdir={build}", str(report_dir / "main.tex")], stdin=subprocess.DEVNULL,
                              capture_output=True, env=os.environ | {"max_print_line": "1000"}, check=False)
        if done.returncode:
            # The log is the only way to find the error, so it outlives the temporary folder.
            log, kept = Path(build, "main.log"), report_dir / f"{name}.log"
            kept.write_bytes(log.read_bytes() if log.exists() else done.stderr)
            error = re.search("^! .*", kept.read_text(errors="replace"), flags=re.MULTILINE)
            raise ReportError(f"{report_dir / 'main.tex'}: LaTeX failed: {error[0] if error else 'no error in its log'} "
                              f"(see {kept}; if a file was not found, on Debian: apt install {DEBIAN})")
        with replacing(report_dir / f"{name}.pdf") as temporary:
            shutil.copyfile(Path(build, "main.pdf"), temporary)
    return report_dir / f"{name}.pdf"


def can_sign(sr: str, runs_dir: Path, report_dir: Path) -> bool:
    """Returns whether the report of `sr` has no author, and its runs and LaTeX are here to build it again."""
    numbers = report_dir / "results" / "numbers.tex"
    lines = numbers.read_text().splitlines() if numbers.is_file() else []
    signed = any(line.startswith(r"\setresult{author}") for line in lines)
    own = rf"\setresult{{sr}}{{{sr}}}" in lines and (report_dir / f"Report_{sr}.pdf").is_file()
    runs = any((runs_dir / f"{mode}-{sr}").is_dir() for mode in ("LoRA", "distil"))
    return own and not signed and runs and shutil.which("latexmk") is not None


def make_submission(sr: str, first_name: str, last_name: str, root: Path) -> Path:
    """Zips code, pages, plots and report of `sr` as `Asst2_<first>_<last>_<SR>.zip`, without data and runs.

    The same files give the same bytes. Names are written without spaces.

    Raises ReportError for a name that cannot be part of a file's name, or a report that was not built for `sr`.
    """
    for name in (first_name, last_name):
        # Surrogates stand for bytes of the command line that are not UTF-8.
        if not name.strip() or re.search(r'[/\\:*?"<>|\x00-\x1f\x7f\ud800-\udfff]', name):
            raise ReportError(f"name {name!r}: must not be empty nor hold any of / \\ : * ? \" < > |")
    if not re.fullmatch("[0-9]{5}", sr):
        raise ReportError(f"SR {sr!r}: must be five digits")
    pdf, numbers = root / "report" / f"Report_{sr}.pdf", root / "report" / "results" / "numbers.tex"
    if not pdf.is_file():
        raise ReportError(f"{pdf}: not found; first `python run.py report {sr}`")
    if numbers.is_file() and rf"\setresult{{sr}}{{{sr}}}" not in numbers.read_text().splitlines():
        raise ReportError(f"{numbers}: holds the results of another SR; first `python run.py report {sr}`")
    top = "_".join(["Asst2", *("".join(name.split()) for name in (first_name, last_name)), sr])
    with replacing(root / f"{top}.zip") as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for path in _submitted(root, [f"plots/*-{sr}[_.]*", f"report/{pdf.name}"]):
            entry = zipfile.ZipInfo(f"{top}/{path.relative_to(root).as_posix()}", date_time=(1980, 1, 1, 0, 0, 0))
            # 3 is Unix, on Windows too: permissions are stored for it, and the same files give the same bytes.
            entry.compress_type, entry.create_system = zipfile.ZIP_DEFLATED, 3
            entry.external_attr = (0o755 if path.match(".ci/run") else 0o644) << 16
            archive.writestr(entry, path.read_bytes())
    return root / f"{top}.zip"


def _submitted(root: Path, more: list[str]) -> list[Path]:
    """Returns the files of a submission in order; `more` are the patterns of the plots and the report."""
    # Every package, so that a new one cannot be forgotten.
    folders = [*SUBMITTED_FOLDERS, *(path.parent.name for path in root.glob("[!.]*/__init__.py"))]
    patterns = [f"{folder}/**/*.{kind}" for folder in folders for kind in SUBMITTED_KINDS]
    found = {path for pattern in patterns for path in root.glob(pattern)}
    # Checkpoints of notebooks and the like hide in folders with a dot.
    visible = {path for path in found if "/." not in path.relative_to(root).as_posix()}
    listed = {path for pattern in [*SUBMITTED_FILES, *more] for path in root.glob(pattern)}
    return sorted(path for path in visible | listed if path.is_file())
