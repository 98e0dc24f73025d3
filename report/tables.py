"""What a run left in runs/ -> tables, figures and the PDF in report/, the zip to hand in.

    python run.py report 12345      # plots/*-12345_*, report/results/, report/Report_12345.pdf
    python run.py submit 12345 ...  # Asst2_<first>_<last>_12345.zip

It reads files only and imports none of the project's other modules but figures.py and records.py, so that a
table cannot show anything but what a run wrote down: `config.json`, `metrics.jsonl`, `summary.json`.
"""

import math
import os
import re
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from report import figures
from report.records import (
    PHASES,
    Record,
    ReportError,
    by_class,
    main_split,
    read_json,
    read_metrics,
    replacing,
    shown_splits,
    spoken,
)

METHODS = {"lora": "LoRA", "full": "full fine-tuning", "head": "head alone", "features": "features alone",
           "none": "untrained head"}
NOT_RUN = rb"\emph{not run}"
TABLES = ("lora_results", "lora_classes", "lora_epochs", "lora_options", "lora_provenance", "distil_results",
          "distil_size", "distil_epochs", "distil_options", "distil_provenance")
STUDIES = ("compare", "sweep")  # many runs each: a table <study>_results and a figure, where there is one
DEBIAN = "latexmk texlive-latex-recommended texlive-latex-extra texlive-fonts-recommended lmodern"
LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "`": r"\textasciigrave{}", "'": r"\textquotesingle{}",
    '"': r"\textquotedbl{}", "[": "{[}", "]": "{]}", "*": "{*}",  # the last three: a row after \\ may start with them
}
SUBMITTED = ("*.py", *(f"{room}/**/*.{kind}" for room in ("experiments", "lora", "data", "record", "report")
                             for kind in ("py", "c")), "docs/**/*.md", "docs/**/*.png", "tests/**/*.py",
             "benchmarks/**/*.py", "benchmarks/**/*.sh", "benchmarks/**/*.md",
             "requirements*.txt", "Makefile", "README.md", "LICENSE", "pyproject.toml", ".ci/run",
             "report/main.tex", "report/results/*.tex", "report/results/*.pdf")


# ---------------------------------------------------------------- tables

def escape(text: object) -> str:
    """Any text as LaTeX that prints it: specials escaped, ligatures broken, what T1 fonts lack as [U+XXXX]."""
    safe = re.sub(r"\s", " ", str(text)).translate(str.maketrans(LATEX))
    safe = re.sub("[^ -~\u00a1-\u00ff]", lambda match: f"{{[}}U+{ord(match[0]):04X}{{]}}", safe)
    return re.sub(r"([-<>,])(?=\1)", r"\1{}", safe)


def breakable(text: object) -> str:
    """`text` escaped, with places to break lines after / , = : _ and within very long words."""
    words = [re.findall("[^/,=:_]{1,32}[/,=:_]*|[/,=:_]+", word) for word in re.split(r"\s", str(text))]
    return " ".join(r"\allowbreak{}".join(map(escape, pieces)) for pieces in words)


def shown(key: str, value: object) -> str:
    """A result as LaTeX: shares in percent, losses and MCC with 3 decimals, counts as 124,439,808."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "n/a"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return breakable(plain(value))
    if key.endswith(("accuracy", "percent")):
        text = f"{value * (100 if key.endswith('accuracy') else 1):.2f}"
    elif key in ("loss", "cross_entropy", "mcc"):
        text = f"{value:.3f}"
    else:
        text = f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"
    return text.replace("-", "$-$")


def plain(value: object) -> str:
    """An option as it was given: no rounding, no thousands separators."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def _flatten(prefix: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(f"{prefix}.{key}", inner)
    else:
        yield re.sub(r"[^\w.-]", "-", prefix, flags=re.ASCII), shown(prefix.rpartition(".")[2], value)


def _tabular(columns: str, head: str, rows: list[list[str]], environment: str = "tabular") -> str:
    """A booktabs table; `head` and `rows` are LaTeX already. A longtable* repeats its head on every page."""
    repeat = "\\endhead\n" if environment == "longtable*" else ""
    body = "".join(" & ".join(row) + " \\\\\n" for row in rows)
    return (f"\\begin{{{environment}}}{{{columns}}}\n\\toprule\n{head} \\\\\n\\midrule\n{repeat}{body}\\bottomrule\n"
            f"\\end{{{environment}}}\n")


def _grouped(before: list[str], groups: dict[str, list[str]], after: list[str] | None = None) -> str:
    """A head of two lines: the groups' names with a rule below each, then every column's name."""
    above, rules, column = [""] * len(before), "", len(before) + 1
    for name, names in groups.items():
        above.append(rf"\multicolumn{{{len(names)}}}{{c}}{{{escape(spoken(name))}}}")
        rules += rf"\cmidrule(lr){{{column}-{column + len(names) - 1}}}"
        column += len(names)
    above += [""] * len(after or [])
    return " & ".join(above) + f" \\\\ {rules}\n" + " & ".join(before + sum(groups.values(), []) + (after or []))


def _epochs(metrics: list[Record]) -> str:
    """Every epoch, training and each split; a distillation's two students one below the other."""
    scores, phase = {"accuracy": r"acc.\,\%", "mcc": "MCC"}, None
    held_out = {"loss": "CE"} | scores
    train = ({"loss": "obj."} if "phase" in metrics[0] else {}) | {"cross_entropy": "CE"} | scores
    splits = list(metrics[0].section("validation"))
    groups = {"train": list(train.values())} | {split: list(held_out.values()) for split in splits}
    columns, rows = 2 + sum(map(len, groups.values())), []
    for row in metrics:
        if row.get("phase") != phase:
            phase = row["phase"]
            rows.append([rf"\multicolumn{{{columns}}}{{l}}{{\emph{{{escape(PHASES.get(phase, phase))}}}}}"])
        parts = [(row.section("train"), train)] + [(row.section("validation").section(s), held_out) for s in splits]
        rows.append([shown("epoch", row.number("epoch")), f"{row.number('learning_rate'):.1e}".replace("-", "$-$")]
                    + [shown(key, part.number(key)) for part, keys in parts for key in keys])
    return _tabular("r" * columns, _grouped(["ep.", "rate"], groups), rows, "longtable*")


def _results(runs: dict[str, Record]) -> str:
    """Accuracy and MCC on every split: the majority class, then each model's best and last epoch."""
    splits = next(iter(runs.values())).section("validation")
    majority = [shown("accuracy", splits.section(split).number("majority_accuracy")) for split in splits]
    rows = [["majority class", "--"] + [cell for accuracy in majority for cell in (accuracy, "0")]]
    for name, run in runs.items():
        for which, key in (("best", "validation"), ("last", "last_validation")):
            if key in run:
                epoch = f"{run[f'{which}_epoch']} ({which})" if f"{which}_epoch" in run else "--"
                parts = [run.section(key).section(split) for split in splits]
                rows.append([name, epoch] + [shown(k, part.number(k)) for part in parts for k in ("accuracy", "mcc")])
    head = _grouped(["model", "epoch"], {split: [r"acc.\,\%", "MCC"] for split in splits})
    return _tabular("ll" + "rr" * len(splits), head, rows)


def _config_tables(config: Record, prefix: str) -> dict[str, str]:
    """Every option as resolved (a student's architecture too), two to a line; command, versions, hashes of the data."""
    def typed(value: object) -> str:
        return rf"\texttt{{{breakable(plain(value))}}}"

    pairs = [[typed(name), typed(value)] for name, value in config.section("options").items()]
    pairs += [[typed(f"student {name}"), typed(value)] for name, value in (config.get("architecture") or {}).items()]
    half = (len(pairs) + 1) // 2
    two = [left + right for left, right in zip(pairs[:half], [*pairs[half:], ["", ""]], strict=False)]
    versions = [f"{name} {version}" for name, version in config.section("versions").items()]
    rows = [["command", typed(config["command"])], ["git commit", typed(config["git_commit"])],
            ["versions", typed(versions)]]
    rows += [["data", typed(f"{path} SHA-256: {sha}")] for path, sha in config.section("data_files").items()]
    return {f"{prefix}_options": _tabular("@{}lL{4.2cm}lL{4.2cm}@{}", "option & value & option & value", two),
            f"{prefix}_provenance": _tabular("@{}lL{13.2cm}@{}", "what & value", rows)}


def _classes(summary: Record) -> str:
    """Precision, recall and F1 of each class at the best epoch."""
    scores = by_class(summary)[1].section("per_class")
    keys = ("n", "precision", "recall", "f1")
    rows = [[breakable(name)] + [shown("mcc" if key != "n" else key, scores.section(name).number(key)) for key in keys]
            for name in scores]
    return _tabular("lrrrr", "class & rows & precision & recall & F1", rows)


def _lora_tables(summary: Record) -> tuple[dict[str, str], dict[str, object]]:
    """A LoRA run's own tables, and its result on the split that chose the epoch."""
    split = main_split(summary.section("validation"))
    tables = {"lora_results": _results({METHODS.get(summary["method"], summary["method"]): summary})}
    if "by_class" in summary:
        tables["lora_classes"] = _classes(summary)
    return tables, {"chosen": summary["validation"].section(split) | {"split": spoken(split)}}


def _distil_tables(summary: Record) -> tuple[dict[str, str], dict[str, object]]:
    """A distillation's own tables (accuracy and MCC; size and speed) and its derived numbers."""
    models = {key: summary.section(key) for key in ("teacher", *PHASES)}
    teacher = models["teacher"]
    split = main_split(teacher.section("validation"))
    numbers, sizes = {"chosen": {"split": spoken(split)}}, []
    for key, model in models.items():
        size, speed = model.number("parameters"), model.number("sentences_per_second")
        smaller = round(teacher.number("parameters") / (size or math.nan), 1)
        faster = round(speed / (teacher.number("sentences_per_second") or math.nan), 1)
        chosen = model.section("validation").section(split)
        numbers[key] = {"chosen": chosen, "smaller": smaller, "faster": faster}
        sizes.append([PHASES.get(key, key)] + [shown("", cell) for cell in (size, smaller, speed, faster)])
    student, scratch = numbers["student"]["chosen"], numbers["scratch"]["chosen"]
    numbers["gain"] = {key: student.number(key) - scratch.number(key) for key in ("accuracy", "mcc")}
    head = r"model & parameters & smaller ($\times$) & sentences/s & faster ($\times$)"
    return {"distil_results": _results({PHASES.get(key, key): model for key, model in models.items()}),
            "distil_size": _tabular("lrrrr", head, sizes)}, numbers


def write_report_results(sr: str, runs_dir: Path, plots_dir: Path, report_dir: Path) -> list[Path]:
    r"""Writes report/results/ from the runs and studies of `sr`: numbers.tex, tables, figures. Nothing older stays there.

    numbers.tex holds a \setresult{key}{value} per number, which main.tex prints with \result{key}; a key that is
    not there prints "not run", and the tables of a missing run say the same.

    Raises ReportError where a file of a run is missing or malformed; report/results/ is then as it was.
    """
    numbers, files = {"sr": sr}, dict.fromkeys([f"{name}.tex" for name in TABLES], NOT_RUN + b"\n")
    for mode, own in (("LoRA", _lora_tables), ("distil", _distil_tables)):
        run_dir, prefix = runs_dir / f"{mode}-{sr}", mode.lower()
        if not run_dir.is_dir():
            continue
        summary, config = read_json(run_dir / "summary.json"), read_json(run_dir / "config.json")
        tables, derived = own(summary)
        if summary.get("method") != "none":  # which trains nothing
            tables[f"{prefix}_epochs"] = _epochs(read_metrics(run_dir / "metrics.jsonl"))
        tables |= _config_tables(config, prefix)
        plain_numbers = {key: value for key, value in summary.items() if key != "by_class"}  # that one has its table
        numbers |= dict(_flatten(prefix, plain_numbers)) | dict(_flatten(prefix, derived))
        files |= {f"{name}.tex": table.encode() for name, table in tables.items()}
        files |= {f"{mode}_{path.stem.rpartition('_')[2]}.pdf": path.read_bytes()
                  for path in figures.plot_run(run_dir, plots_dir) if path.suffix == ".pdf"}
    for mode in STUDIES:
        path = runs_dir / f"{mode}-{sr}" / f"{mode}.json"
        if path.is_file():
            study, (latex, notes) = read_json(path), STUDY_TABLES[mode]
            files[f"{mode}_results.tex"] = latex(study).encode()
            files[f"{mode}.pdf"] = next(p for p in figures.plot_study(path, plots_dir) if p.suffix == ".pdf").read_bytes()
            numbers |= {f"{mode}.{key}": breakable(study[key]) for key in ("model", "task", "command")}
            numbers[f"{mode}.notes"] = escape(" ".join(notes(study)))
    files["numbers.tex"] = "".join(f"\\setresult{{{key}}}{{{value}}}\n" for key, value in numbers.items()).encode()
    results = report_dir / "results"
    for name, content in files.items():
        with replacing(results / name) as temporary:
            temporary.write_bytes(content)
    for stale in set(results.iterdir()) - {results / name for name in files}:
        stale.unlink()
    return [results / name for name in files]


# ---------------------------------------------------------------- comparisons

def _spread(spread: Record, key: str) -> str:
    """Mean and, where there are several seeds, sample standard deviation."""
    factor, digits = (100, 1) if key == "accuracy" else (1, 3)
    mean, sd = factor * spread.number("mean"), factor * spread.number("sd")
    return f"{mean:.{digits}f}" + ("" if math.isnan(sd) else f" \u00b1 {sd:.{digits}f}")


def _scores_of(entries: list[Record]) -> dict[str, str]:
    """Key -> name of the scores that a comparison has."""
    names = {"accuracy": "acc. %", "mcc": "MCC", "macro_f1": "macro-F1"}
    return {key: name for key, name in names.items() if all(
        key in scores for entry in entries for scores in entry.section("best").values())}


def compare_rows(compare: Record) -> tuple[list[str], dict[str, list[str]], list[str], list[list[str]]]:
    """A comparison as plain text cells.

    Returns:
        the columns before the scores, the scores of each split, the columns after them, and the rows: the majority
        class, then the best and the last epoch of each entry.
    """
    done = [entry for entry in compare["entries"] if "best" in entry]
    if not done:
        raise ReportError(f"{compare.source}: every run diverged; lower --lr-grid")
    splits, scores = shown_splits(compare.section("selection")["splits"]), _scores_of(done)
    majority = done[0].section("majority_accuracy")
    rows = [["majority class", "", "", "", ""] + [
        {"accuracy": f"{100 * majority.number(split):.1f}", "mcc": "0"}.get(key, "") for split in splits for key in scores]
        + [""] * 3]
    for entry in compare["entries"]:
        name, seeds = entry["entry"], len(entry["seeds"])
        if entry not in done:
            rows.append([name, "", "", "", "diverged"] + [""] * (len(splits) * len(scores) + 3))
            continue
        counts, rate = entry.section("parameters"), entry["learning_rate"]
        size = [f"{counts.number('trainable'):,.0f}", f"{counts.number('trainable_percent'):.3g}",
                "" if rate is None else f"{rate:g}"]
        cost = [f"{entry.number('seconds_per_epoch'):.3g}", f"{entry.number('peak_memory_bytes') / 2 ** 20:,.0f}",
                f"{entry.number('size_bytes') / 1e6:.3g}"]
        few = f" ({seeds} of {len(compare['seeds'])} seeds)" if seeds < len(compare["seeds"]) else ""
        for which in ("best",) if rate is None else ("best", "last"):
            epoch = "untrained" if rate is None else f"{which} ({entry.section(which + '_epoch').number('mean'):.3g})"
            values = [_spread(entry.section(which).section(split).section(key), key) for split in splits for key in scores]
            first = which == "best"
            rows.append([name + few if first else ""] + (size if first else [""] * 3) + [epoch] + values
                        + (cost if first else [""] * 3))
    return (["entry", "trained", "%", "lr", "epoch"], {split: list(scores.values()) for split in splits},
            ["s/epoch", "peak MiB", "MB on disk"], rows)


def compare_notes(compare: Record) -> list[str]:
    """What a reader must know beside the table."""
    selection, seeds = compare.section("selection"), compare["seeds"]
    main = selection["split"]
    others = [split for split in shown_splits(selection["splits"]) if split != main]
    tried = max(len(entry["tried"]) for entry in compare["entries"])
    chose = ("the epoch" if tried == 1 else f"the epoch, and the learning rate (of {tried}, on the first seed)") + (
        " by its MCC")
    split = (f"The {spoken(main)} split chose {chose}; {spoken(others[0])} took part in no choice." if others else
             f"The {spoken(main)} split chose {chose}, and is the one reported: its figures flatter a little.")
    edge = []
    for entry in compare["entries"]:
        rates = sorted(run["learning_rate"] for run in entry["tried"] if run["learning_rate"] is not None)
        if len(rates) > 2 and entry["learning_rate"] in (rates[0], rates[-1]):
            edge.append(f"{entry['entry']} ({entry['learning_rate']:g})")
    return [(f"Mean \u00b1 sample standard deviation over {len(seeds)} seeds ({seeds[0]} to {seeds[-1]})."
             if len(seeds) > 1 else f"One seed ({seeds[0]})."), split,
            "Seconds an epoch are of training alone; where frozen results are kept, one pass over the data comes first.",
            *([f"Chosen at the edge of the grid: {', '.join(edge)}; a wider grid may do better."] if edge else [])]


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows as lines of text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)
                                                   ]).rstrip() for row in rows]


def compare_text(compare: Record) -> str:
    """The table of a comparison for the terminal."""
    before, groups, after, rows = compare_rows(compare)
    above = [""] * len(before) + [spoken(split) if i == 0 else "" for split, names in groups.items()
                                  for i in range(len(names))] + [""] * len(after)
    head = before + sum(groups.values(), []) + after
    return "\n".join([f"{compare['model']} on {compare['task']}", *aligned([above, head, *rows]), *compare_notes(compare)])


def compare_latex(compare: Record) -> str:
    """The table of a comparison for the report."""
    before, groups, after, rows = compare_rows(compare)
    head = _grouped(list(map(escape, before)), {split: list(map(escape, names)) for split, names in groups.items()},
                    list(map(escape, after)))
    scores = sum(map(len, groups.values()))
    return _tabular("lrrrl" + "r" * (scores + len(after)), head, [[_latex(cell) for cell in row] for row in rows])


def _latex(cell: str) -> str:
    """A plain cell as LaTeX: a number's minus is no hyphen."""
    return re.sub(r"^-(?=\d)", "$-$", escape(cell))


# ---------------------------------------------------------------- sweeps

def sweep_rows(sweep: Record, most: int = 10) -> tuple[list[str], list[list[str]]]:
    """Head and rows, as plain text cells, of a sweep's best trials."""
    split, options = sweep.section("selection")["split"], list(sweep.section("search"))
    complete = sorted((trial for trial in sweep["trials"] if trial["state"] == "complete"),
                      key=lambda trial: (-trial.number("score"), trial.section("parameters").number("trainable")))
    rows = []
    for trial in complete[:most]:
        counts, values = trial.section("parameters"), trial.section("params")
        trained, accuracy = counts.number("trainable"), trial.section("validation").section(split).number("accuracy")
        rows.append([str(trial["number"]), f"{trial.number('score'):.3f}", f"{100 * accuracy:.1f}", f"{trained:,.0f}",
                     f"{100 * trained / counts.number('total'):.3g}", f"{trial.number('best_epoch'):g}"]
                    + [f"{values[name]:.3g}" if isinstance(values[name], float) else str(values[name]) for name in options])
    return ["trial", "MCC", "acc. %", "trained", "%", "epoch"] + options, rows


def sweep_notes(sweep: Record) -> list[str]:
    """What a reader must know beside the table."""
    states = [trial["state"] for trial in sweep["trials"]]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    split = spoken(sweep.section("selection")["split"])
    notes = [f"{len(states)} trials with one seed ({sweep['sr']}): {', '.join(counts)}.",
             f"A trial's score is its best epoch's MCC on the {split} split, by which the best trial is chosen too: its "
             "figures flatter."]
    if majority := _sweep_majority(sweep):
        notes.append(f"The majority class has an accuracy of {100 * majority:.1f} % and MCC 0.")
    if sweep["importance"]:
        shares = ", ".join(f"{name} {share:.2f}" for name, share in sweep["importance"].items())
        notes.append(f"Share of the scores' variance that each option explains (fANOVA): {shares}.")
    return notes


def _sweep_majority(sweep: Record) -> float | None:
    split = sweep.section("selection")["split"]
    return next((trial.section("validation").section(split).number("majority_accuracy") for trial in sweep["trials"]
                 if trial["validation"]), None)


def sweep_text(sweep: Record) -> str:
    """A sweep's best trials for the terminal."""
    head, rows = sweep_rows(sweep)
    return "\n".join([f"{sweep['model']} on {sweep['task']}: the best trials", *aligned([head, *rows]), *sweep_notes(sweep)])


def sweep_latex(sweep: Record) -> str:
    """A sweep's best trials for the report."""
    head, rows = sweep_rows(sweep)
    return _tabular("r" * len(head), " & ".join(map(escape, head)), [[_latex(cell) for cell in row] for row in rows])


STUDY_TABLES = {"compare": (compare_latex, compare_notes), "sweep": (sweep_latex, sweep_notes)}


# ---------------------------------------------------------------- the PDF and the hand-in

def build_report(sr: str, runs_dir: Path, plots_dir: Path, report_dir: Path) -> Path:
    """Writes the results of `sr`, runs latexmk and leaves `report/Report_<SR>.pdf`.

    Raises ReportError: no run of `sr`, a malformed file, latexmk is missing, or LaTeX failed (its log is then kept).
    """
    if not any((runs_dir / f"{mode}-{sr}").is_dir() for mode in ("LoRA", "distil", *STUDIES)):
        raise ReportError(f"{runs_dir}: no run of {sr}; first `python run.py LoRA {sr}` or `python run.py distil {sr}`")
    if not (latexmk := shutil.which("latexmk")):
        raise ReportError(f"latexmk not found; on Debian: apt install {DEBIAN}")
    write_report_results(sr, runs_dir, plots_dir, report_dir)
    # LaTeX's own files go to a folder of their own: one that was broken off would trip the next build.
    with tempfile.TemporaryDirectory() as build:
        done = subprocess.run([latexmk, "-pdf", "-cd", "-interaction=nonstopmode", "-halt-on-error", f"-outdir={build}",
                               str(report_dir / "main.tex")], stdin=subprocess.DEVNULL, capture_output=True,
                              env=os.environ | {"max_print_line": "1000"}, check=False)
        if done.returncode:
            log, kept = Path(build, "main.log"), report_dir / f"Report_{sr}.log"
            kept.write_bytes(log.read_bytes() if log.exists() else done.stderr)
            said = re.search("^! .*", kept.read_text(errors="replace"), flags=re.MULTILINE)
            raise ReportError(f"{report_dir / 'main.tex'}: LaTeX failed: {said[0] if said else 'no error in its log'} "
                              f"(see {kept}; if a file was not found, on Debian: apt install {DEBIAN})")
        with replacing(report_dir / f"Report_{sr}.pdf") as temporary:
            shutil.copyfile(Path(build, "main.pdf"), temporary)
    return report_dir / f"Report_{sr}.pdf"


def make_submission(sr: str, first_name: str, last_name: str, root: Path) -> Path:
    """Zips code, plots and report of `sr` as `Asst2_<first>_<last>_<SR>.zip`, without data and runs; same bytes again.

    Raises ReportError for a name that no file can have, or a report that was not built for `sr`.
    """
    for name in (first_name, last_name):
        if not name.strip() or re.search(r'[/\\:*?"<>|\x00-\x1f]', name):
            raise ReportError(f"name {name!r}: must not be empty nor hold any of / \\ : * ? \" < > |")
    if not re.fullmatch("[0-9]{5}", sr):
        raise ReportError(f"SR {sr!r}: must be five digits")
    pdf, numbers = root / "report" / f"Report_{sr}.pdf", root / "report" / "results" / "numbers.tex"
    if not pdf.is_file():
        raise ReportError(f"{pdf}: not found; first `python run.py report {sr}`")
    if numbers.is_file() and rf"\setresult{{sr}}{{{sr}}}" not in numbers.read_text().splitlines():
        raise ReportError(f"{numbers}: holds the results of another SR; first `python run.py report {sr}`")
    patterns = [*SUBMITTED, f"plots/*-{sr}[_.]*", f"report/{pdf.name}"]
    files = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
    top = f"Asst2_{first_name.strip()}_{last_name.strip()}_{sr}"
    with replacing(root / f"{top}.zip") as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for path in sorted(files):
            entry = zipfile.ZipInfo(f"{top}/{path.relative_to(root).as_posix()}", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type, entry.create_system = zipfile.ZIP_DEFLATED, 3  # 3: Unix, whatever made it
            entry.external_attr = (0o755 if path.match(".ci/run") else 0o644) << 16
            archive.writestr(entry, path.read_bytes())
    return root / f"{top}.zip"
