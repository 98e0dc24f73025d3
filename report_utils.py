"""What a run left in runs/ -> curves in plots/, tables and the PDF in report/, the zip to hand in.

    python run.py report 12345      # plots/*-12345_*, report/results/, report/Report_12345.pdf
    python run.py submit 12345 ...  # Asst2_<first>_<last>_12345.zip

It reads files only and imports none of the project's other modules, so that a figure or a table
cannot show anything but what a run wrote down: `config.json`, `metrics.jsonl`, `summary.json`.
"""

import json
import math
import os
import re
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

# quantity -> (name of its axis, key in "train", key in "validation", factor). The training loss drawn is the
# cross-entropy, not the objective: with KD the objective holds the teacher's part too, and could not be compared.
QUANTITIES = {"loss": ("cross-entropy loss (nats)", "cross_entropy", "loss", 1),
              "accuracy": ("accuracy (%)", "accuracy", "accuracy", 100),
              "mcc": ("Matthews correlation", "mcc", "mcc", 1)}
METHODS = {"lora": "LoRA", "full": "full fine-tuning", "head": "head alone", "features": "features alone",
           "none": "untrained head"}
PHASES = {"student": "student, KD", "scratch": "student, no teacher"}
# Okabe and Ito's palette: told apart by colour-blind readers too.
BLACK, BLUE, VERMILLION, GREEN, PURPLE, GREY = "#222222", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"
SET_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, "#E69F00", "#56B4E9", BLACK)
PHASE_LOOKS = {"student": (BLUE, "o"), "scratch": (VERMILLION, "s")}

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
SUBMITTED = ("*.py", "tests/**/*.py", "benchmarks/**/*.py", "benchmarks/**/*.sh", "benchmarks/**/*.md",
             "requirements*.txt", "Makefile", "README.md", "LICENSE", "pyproject.toml", ".ci/run",
             "report/main.tex", "report/results/*.tex", "report/results/*.pdf")


class ReportError(ValueError):
    """What the user can put right, in one line: a run's file, a missing program, a name."""


class Record(dict):
    """A JSON object that knows its file, so that a missing or wrong field is reported with it."""

    def __init__(self, fields: dict, source: str) -> None:
        super().__init__(fields)
        self.source = source

    def __missing__(self, key: str) -> None:
        raise ReportError(f"{self.source}: {key!r} is missing")

    def section(self, key: str) -> "Record":
        """The object under `key`."""
        if not isinstance(self[key], Record):
            raise ReportError(f"{self.source}: {key!r} must be an object, not {json.dumps(self[key])[:60]}")
        return self[key]

    def number(self, key: str) -> float:
        """The number under `key`; null (JSON has no NaN) is NaN."""
        value = self[key]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ReportError(f"{self.source}: {key!r} must be a number, not {json.dumps(value)[:60]}")
        return math.nan if value is None else value


def _records(path: Path, by_line: bool) -> list[Record]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror} (has the run finished?)") from None
    records = []
    for number, text in enumerate(content.splitlines() if by_line else [content], start=1):
        source = f"{path}, line {number}" if by_line else str(path)
        try:
            record = json.loads(text, object_hook=lambda fields, source=source: Record(fields, source))
        except ValueError as error:  # no JSON, or no UTF-8
            raise ReportError(f"{source}: not valid JSON ({error})") from None
        if not isinstance(record, Record):
            raise ReportError(f"{source}: must be a JSON object, not {json.dumps(record)[:60]}")
        records.append(record)
    return records


def read_json(path: Path) -> Record:
    """The JSON object in a file. Raises ReportError naming the file where it is missing or malformed."""
    return _records(path, by_line=False)[0]


def read_metrics(path: Path) -> list[Record]:
    """The epochs of `metrics.jsonl`, as written. Raises ReportError naming file and line."""
    if not (epochs := _records(path, by_line=True)):
        raise ReportError(f"{path}: no epoch in it")
    return epochs


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary neighbour to write to, renamed to `path` at the end: readers never see half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _main_split(validation: Record) -> str:
    """The split by which the best epoch is chosen: CoLA's in-domain one, or a task's only (first) one."""
    if not validation:
        raise ReportError(f"{validation.source}: 'validation' has no split")
    return "in_domain" if "in_domain" in validation else next(iter(validation))


def _said(split: str) -> str:
    return split.replace("_", "-")


# ---------------------------------------------------------------- curves

def curves(metrics: list[Record], summary: Record, quantity: str) -> Figure:
    """One quantity over the epochs: training and validation, best epoch marked, baselines as horizontal lines.

    Args:
        metrics: the rows of `metrics.jsonl`; a distillation's carry "phase", and both students are drawn.
        summary: `summary.json`.
        quantity: "loss" (nats), "accuracy" (drawn in percent) or "mcc".
    """
    axis_name, train_key, key, factor = QUANTITIES[quantity]
    distil, first = summary["mode"] == "distil", metrics[0].section("validation")
    main = _main_split(first)
    # `all` is in- and out-of-domain together: a third line between the two would say nothing new.
    splits = [main] + [split for split in first if split not in (main, "all")]
    styles = dict(zip(splits, ["-", "--", "-."], strict=False))
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()

    def label(name: str, value: float) -> str:
        return f"{name} ({value:.1f} %)" if quantity == "accuracy" else f"{name} ({value:.3f})"

    def level(name: str, validation: Record, source: str, **look) -> None:
        for split in [split for split in styles if split in validation]:
            value = factor * validation.section(split).number(source)
            axes.axhline(value, linestyle=styles[split], label=label(f"{name}, {_said(split)}", value), **look)

    for phase in dict.fromkeys(row.get("phase", "") for row in metrics):
        rows = [row for row in metrics if row.get("phase", "") == phase]
        epochs = [row.number("epoch") for row in rows]
        colour, marker = PHASE_LOOKS.get(phase, (BLUE, "o"))
        before = f"{PHASES.get(phase, phase)}: " if phase else ""
        train = [factor * row.section("train").number(train_key) for row in rows]
        axes.plot(epochs, train, ":", color=colour if phase else BLACK, marker=marker, ms=3, label=before + "train")
        for split, other in zip(styles, (BLUE, VERMILLION, PURPLE), strict=False):
            values = [factor * row.section("validation").section(split).number(key) for row in rows]
            axes.plot(epochs, values, linestyle=styles[split], color=colour if phase else other, marker=marker, ms=4,
                      label=before + (split if split == "validation" else f"validation, {_said(split)}"))
            if split == main:
                best = (summary.section(phase) if phase else summary).number("best_epoch")
                if best not in epochs:
                    raise ReportError(f"{summary.source}: 'best_epoch' is {best:g}, which metrics.jsonl does not have")
                value = values[epochs.index(best)]
                axes.axvline(best, color=colour, linewidth=1, alpha=0.4)
                axes.plot([best], [value], "*", color=colour, ms=13, markeredgecolor="white", zorder=5,
                          label=label(f"{before}best epoch {best:g}", value))
    if distil:
        level("teacher", summary.section("teacher").section("validation"), key, color=GREEN)
    if quantity == "accuracy":
        styles = dict(zip(splits, ["--", (0, (1, 2))], strict=False))
        level("majority class", first, "majority_accuracy", color=GREY, linewidth=1)
    if quantity == "mcc":
        axes.axhline(0, color=GREY, linestyle="--", linewidth=1, label="majority class (0)")
    how = "distilled" if distil else str(summary["method"]).replace("lora", "LoRA")
    # An unescaped $ would start matplotlib's mathematics.
    axes.set_title(f"{summary['model']}, {how}, on {summary['task']} (SR {summary['sr']})".replace("$", r"\$"))
    axes.set_xlabel("epoch")
    axes.set_ylabel(axis_name + ("\nwith the labels, no KD term" if distil and quantity == "loss" else ""))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(min(row["epoch"] for row in metrics) - 0.5, max(row["epoch"] for row in metrics) + 0.5)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    return figure


def _by_class(summary: Record) -> tuple[str, Record]:
    """The split that the best epoch was chosen on, and that epoch's scores by class there (the student's, of two)."""
    scores = (summary.section("student") if summary["mode"] == "distil" else summary).section("by_class")
    split = _main_split(scores)
    return split, scores.section(split)


def confusion(summary: Record) -> Figure:
    """How often each class was taken for which, in rows and as a share of each true class."""
    split, scores = _by_class(summary)
    matrix, classes = scores["confusion"], list(scores.section("per_class"))
    if not (isinstance(matrix, list) and len(matrix) == len(classes)
            and all(isinstance(row, list) and len(row) == len(classes) for row in matrix)
            and all(isinstance(count, int) for row in matrix for count in row)):
        raise ReportError(f"{scores.source}: 'confusion' must have a row and a column of counts for each class")
    shares = [[count / (sum(row) or 1) for count in row] for row in matrix]
    size = min(9.0, 3.2 + 0.55 * len(classes))
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow([[100 * share for share in row] for row in shares], cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, label="share of the true class (%)", shrink=0.8)
    if len(classes) <= 12:
        for i, row in enumerate(matrix):
            for j, count in enumerate(row):
                axes.text(j, i, f"{count:,}\n{100 * shares[i][j]:.1f} %", ha="center", va="center", fontsize="small",
                          color="white" if shares[i][j] > 0.6 else BLACK)
    if len(classes) <= 40:
        names = [name if len(name) <= 20 else name[:19] + "…" for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=0 if max(map(len, names)) * len(names) < 40 else 60,
                        ha="center" if max(map(len, names)) * len(names) < 40 else "right")
        axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted class", ylabel="true class", title=f"{_said(split)}, n = {sum(map(sum, matrix)):,}")
    return figure


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Writes a figure as `.png` (200 dpi) and `.pdf`; the same figure, the same bytes."""
    written = []
    for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        written.append(stem.with_name(f"{stem.name}.{kind}"))
        with _replacing(written[-1]) as temporary:
            figure.savefig(temporary, format=kind, dpi=200, metadata=metadata)
    return written


def plot_run(run_dir: Path, plots_dir: Path) -> list[Path]:
    """Draws a run's loss, accuracy, MCC and confusion matrix as `<mode>-<SR>_<quantity>.png` and `.pdf`.

    Raises ReportError where a file of the run is missing or malformed.
    """
    summary, path = read_json(run_dir / "summary.json"), run_dir / "metrics.jsonl"
    metrics = read_metrics(path) if path.exists() or summary.get("method") != "none" else []  # "none" trains nothing
    figures = {quantity: curves(metrics, summary, quantity) for quantity in QUANTITIES if metrics}
    if "by_class" in summary or "by_class" in summary.get("student", {}):
        figures["confusion"] = confusion(summary)
    return [path for quantity, figure in figures.items()
            for path in save_figure(figure, plots_dir / f"{summary['mode']}-{summary['sr']}_{quantity}")]


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
        above.append(rf"\multicolumn{{{len(names)}}}{{c}}{{{escape(_said(name))}}}")
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
    scores = _by_class(summary)[1].section("per_class")
    keys = ("n", "precision", "recall", "f1")
    rows = [[breakable(name)] + [shown("mcc" if key != "n" else key, scores.section(name).number(key)) for key in keys]
            for name in scores]
    return _tabular("lrrrr", "class & rows & precision & recall & F1", rows)


def _lora_tables(summary: Record) -> tuple[dict[str, str], dict[str, object]]:
    """A LoRA run's own tables, and its result on the split that chose the epoch."""
    split = _main_split(summary.section("validation"))
    tables = {"lora_results": _results({METHODS.get(summary["method"], summary["method"]): summary})}
    if "by_class" in summary:
        tables["lora_classes"] = _classes(summary)
    return tables, {"chosen": summary["validation"].section(split) | {"split": _said(split)}}


def _distil_tables(summary: Record) -> tuple[dict[str, str], dict[str, object]]:
    """A distillation's own tables (accuracy and MCC; size and speed) and its derived numbers."""
    models = {key: summary.section(key) for key in ("teacher", *PHASES)}
    teacher = models["teacher"]
    split = _main_split(teacher.section("validation"))
    numbers, sizes = {"chosen": {"split": _said(split)}}, []
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
                  for path in plot_run(run_dir, plots_dir) if path.suffix == ".pdf"}
    for mode in STUDIES:
        path = runs_dir / f"{mode}-{sr}" / f"{mode}.json"
        if path.is_file():
            study, (latex, notes) = read_json(path), STUDY_TABLES[mode]
            files[f"{mode}_results.tex"] = latex(study).encode()
            files[f"{mode}.pdf"] = next(p for p in plot_study(path, plots_dir) if p.suffix == ".pdf").read_bytes()
            numbers |= {f"{mode}.{key}": breakable(study[key]) for key in ("model", "task", "command")}
            numbers[f"{mode}.notes"] = escape(" ".join(notes(study)))
    files["numbers.tex"] = "".join(f"\\setresult{{{key}}}{{{value}}}\n" for key, value in numbers.items()).encode()
    results = report_dir / "results"
    for name, content in files.items():
        with _replacing(results / name) as temporary:
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


def _shown_splits(splits: list[str]) -> list[str]:
    """`all` is in- and out-of-domain together, and in a wide table one too many."""
    return [split for split in splits if split != "all"]


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
    splits, scores = _shown_splits(compare.section("selection")["splits"]), _scores_of(done)
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
    others = [split for split in _shown_splits(selection["splits"]) if split != main]
    tried = max(len(entry["tried"]) for entry in compare["entries"])
    chose = ("the epoch" if tried == 1 else f"the epoch, and the learning rate (of {tried}, on the first seed)") + (
        " by its MCC")
    split = (f"The {_said(main)} split chose {chose}; {_said(others[0])} took part in no choice." if others else
             f"The {_said(main)} split chose {chose}, and is the one reported: its figures flatter a little.")
    edge = [f"{entry['entry']} ({entry['learning_rate']:g})" for entry in compare["entries"] if len(entry["tried"]) > 2
            and entry["learning_rate"] in (entry["tried"][0]["learning_rate"], entry["tried"][-1]["learning_rate"])]
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
    above = [""] * len(before) + [_said(split) if i == 0 else "" for split, names in groups.items()
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


def compare_figure(compare: Record) -> Figure:
    """Accuracy of the best epoch against trained parameters, with the majority class as a dashed line."""
    done = sorted((entry for entry in compare["entries"] if "best" in entry),
                  key=lambda entry: entry.section("parameters").number("trainable"))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    x = [entry.section("parameters").number("trainable") for entry in done]
    main = compare.section("selection")["split"]
    splits = sorted(_shown_splits(compare.section("selection")["splits"]), key=lambda split: split != main)
    for split, colour, marker in zip(splits, (BLUE, VERMILLION, PURPLE), "osD", strict=False):
        spreads = [entry.section("best").section(split).section("accuracy") for entry in done]
        y = [100 * spread.number("mean") for spread in spreads]
        sd = [0 if math.isnan(spread.number("sd")) else 100 * spread.number("sd") for spread in spreads]
        axes.errorbar(x, y, yerr=sd, fmt=marker, color=colour, ms=6, capsize=4, label=_said(split),
                      zorder=3 if split == main else 2, markerfacecolor=colour if split == main else "white")
        level = 100 * done[0].section("majority_accuracy").number(split)
        axes.axhline(level, color=colour, linestyle="--", linewidth=1, alpha=0.7,
                     label=f"majority class, {_said(split)} ({level:.1f} %)")
    _label_points(axes, x, [100 * entry.section("best").section(main).section("accuracy").number("mean")
                            for entry in done], [str(entry["entry"]) for entry in done])
    _parameter_axis(axes, x)
    seeds = len(compare["seeds"])
    axes.set_ylabel("accuracy (%), best epoch" + (f"\nmean and sd of {seeds} seeds" if seeds > 1 else ""))
    axes.set_title(f"{compare['model']} on {compare['task']} (SR {compare['sr']})".replace("$", r"\$"))
    axes.margins(y=0.12)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    return figure


def _label_points(axes, x: list[float], y: list[float], names: list[str]) -> None:
    """A name above each point; where neighbours stand close in x, above and below in turn."""
    for i, (at, value, name) in enumerate(zip(x, y, names, strict=True)):
        below = i % 2 == 1 and (at < 4 * max(x[i - 1], 1))
        axes.annotate(name.replace("$", r"\$"), (at, value), xytext=(7, -13 if below else 7), textcoords="offset points",
                      fontsize="small", color=BLACK, bbox={"fc": "white", "ec": "none", "pad": 0.5, "alpha": 0.7})


def _parameter_axis(axes, x: list[float]) -> None:
    """Trained parameters on a logarithmic axis; a model that trains nothing stands at its 0."""
    low, high = min((value for value in x if value > 0), default=1), max(*x, 1)
    steps = (1, 2, 5) if high < 100 * low else (1,)
    ticks = [step * 10 ** power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
             for step in steps]
    if min(x) > 0:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.5, high * 1.5)
    else:
        axes.set_xscale("symlog", linthresh=ticks[0], linscale=0.5)
        axes.axvline(0, color=GREY, linewidth=0.5)
        axes.set_xlim(-ticks[0] / 2, high * 2)
        ticks = [0, *ticks]
    axes.set_xticks([tick for tick in ticks if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]])
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("trained parameters")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def plot_study(path: Path, plots_dir: Path) -> list[Path]:
    """Draws a comparison (compare.json) or a sweep (sweep.json) as `<mode>-<SR>.png` and `.pdf`; the same bytes again."""
    study = read_json(path)
    figure = {"compare": compare_figure, "sweep": sweep_figure}[study["mode"]](study)
    return save_figure(figure, plots_dir / f"{study['mode']}-{study['sr']}")


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
    split = _said(sweep.section("selection")["split"])
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


def sweep_figure(sweep: Record) -> Figure:
    """Score against trained parameters, each option's importance, and the mean score of each set of roles or layers."""
    trials = [trial for trial in sweep["trials"] if trial["parameters"] and trial["score"] is not None]
    if not trials:
        raise ReportError(f"{sweep.source}: no trial has a score")
    search, importance = sweep.section("search"), sweep["importance"] or {}
    sets = [name for name in ("targets", "layers") if name in sweep.section("means")]
    panels = ([importance] if importance else []) + sets
    figure = Figure(figsize=(10 if panels else 7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(max(1, len(panels)), 2 if panels else 1, width_ratios=[1.7, 1] if panels else None)
    axes = figure.add_subplot(grid[:, 0])
    colour_of = sets[0] if sets else None
    choices = search[colour_of] if colour_of else [None]
    for i, choice in enumerate(choices):
        own = [trial for trial in trials if colour_of is None or trial.section("params")[colour_of] == choice]
        colour, label = SET_COLOURS[i % len(SET_COLOURS)], "trial" if choice is None else f"{colour_of} {choice}"
        for states, look in ((("complete",), {"color": colour, "label": label}),
                             (("pruned", "diverged"), {"facecolors": "none", "edgecolors": colour})):
            points = [(trial.section("parameters").number("trainable"), trial.number("score")) for trial in own
                      if trial["state"] in states]
            axes.scatter(*zip(*points, strict=True) if points else ([], []), s=30, **look)
    if any(trial["state"] in ("pruned", "diverged") for trial in trials):
        axes.scatter([], [], facecolors="none", edgecolors=GREY, label="pruned: best until then")
    for trial in trials:
        if trial["number"] == sweep["best"]:
            axes.plot([trial.section("parameters").number("trainable")], [trial.number("score")], "*", color=BLACK, ms=15,
                      markerfacecolor="none", label=f"best: trial {trial['number']} ({trial.number('score'):.3f})")
    axes.axhline(0, color=GREY, linestyle="--", linewidth=1, label="majority class (0)")
    _parameter_axis(axes, [trial.section("parameters").number("trainable") for trial in trials])
    axes.set_ylabel(f"MCC, best epoch, {_said(sweep.section('selection')['split'])}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=4, fontsize="small", frameon=False)
    for i, panel in enumerate(panels):
        side = figure.add_subplot(grid[i, 1])
        if panel is importance:
            _bars(side, list(importance), list(importance.values()))
            side.set_xlabel("importance (share of variance, fANOVA)")
        else:
            _bars(side, [f"{row['value']} (n={row['n']})" for row in sweep.section("means")[panel]],
                  [row.number("mean") for row in sweep.section("means")[panel]],
                  [row.number("sd") for row in sweep.section("means")[panel]])
            side.set_xlabel(f"mean MCC by {panel}, sd (n complete trials)")
    figure.suptitle(f"{sweep['model']} on {sweep['task']} (SR {sweep['sr']})".replace("$", r"\$"))
    return figure


def _bars(axes, names: list[str], values: list[float], sd: list[float] | None = None) -> None:
    """Horizontal bars, the first on top."""
    axes.barh(range(len(names)), [0 if math.isnan(value) else value for value in values], color=BLUE, height=0.6,
              xerr=sd, capsize=3)
    axes.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names], fontsize="small")
    axes.invert_yaxis()
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)


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
        with _replacing(report_dir / f"Report_{sr}.pdf") as temporary:
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
    with _replacing(root / f"{top}.zip") as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for path in sorted(files):
            entry = zipfile.ZipInfo(f"{top}/{path.relative_to(root).as_posix()}", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type, entry.create_system = zipfile.ZIP_DEFLATED, 3  # 3: Unix, whatever made it
            entry.external_attr = (0o755 if path.match(".ci/run") else 0o644) << 16
            archive.writestr(entry, path.read_bytes())
    return root / f"{top}.zip"
