"""Makes the paper's tables and numbers of what its steps left: mean and 95 % interval over seeds, each with its command.

    numbers, files = paper_results(Path("runs/paper-12345"), Path("runs/paper-12345/plots"))

A step that is not done leaves no table: main.tex prints "not run" in its place.
"""

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from report import diagnosis, figures, studies
from report.latex import breakable, escape, grouped, tabular
from report.records import Record, ReportError, main_split, read_json, shown_splits
from report.seeds import spoken_entry

SCORES = {"accuracy": "acc. %", "mcc": "MCC"}
SENTENCES = 8  # of each list of sentences
# What main.tex asks for; each is a table of its own.
TABLES = ("cola", "student", "polarity", "ablations", "rank", "methods", "long", "buzzer", "diagnose_scores",
          "diagnose_phenomena", "diagnose_length", "diagnose_calibration", "diagnose_disagreements", "diagnose_all_wrong",
          "cost", "steps")


class Paper:
    """Holds paper.json and what its finished steps left.

    Attributes:
        record: paper.json.
        done: the file that each finished step left, by the step's name.
    """

    def __init__(self, folder: Path):
        self.folder, self.record = folder, read_json(folder / "paper.json")
        self.done = {step["name"]: read_json(folder / step["file"]) for step in self.record["steps"]
                     if step["status"] == "done"}

    def entries(self, step: str) -> dict[str, Record]:
        """Returns a study's entries that have a result, by name; none if the step is not done."""
        rows = self.done[step]["entries"] if step in self.done else []
        return {entry["entry"]: entry for entry in rows if "best" in entry}

    def difference(self, step: str) -> Record | None:
        """Returns a step's paired difference from the one that it is compared with."""
        return next((row for row in self.record["differences"] if row["step"] == step and "best" in row), None)


def paper_results(folder: Path, plots_dir: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Returns the numbers (key -> LaTeX) and the files (name -> content) of the paper.

    Raises ReportError where a file of a step is missing or malformed.
    """
    paper = Paper(folder)
    seeds = paper.record["seeds"]
    numbers = {"paper.profile": escape(paper.record.section("options")["profile"]), "paper.seeds": str(len(seeds)),
               "paper.range": f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else seeds[0],
               "paper.spread": _spread_note(len(seeds)), "paper.machines": escape(_machines(paper))}
    for step in paper.record["steps"]:
        numbers[f"paper.{step['name']}.command"] = breakable(step["command"])
    files = {f"paper_{name}.tex": table.encode() for name, table in _tables(paper).items() if table}
    numbers |= dict(_headline(paper))
    for name, path in _plots(paper, plots_dir):
        files[f"paper_{name}.pdf"] = path.read_bytes()
    for name in ("rank", "methods", "long", "buzzer"):
        if name in paper.done:
            numbers |= {f"paper.{name}.{key}": breakable(paper.done[name][key]) for key in ("model", "task")}
            if name != "rank":
                numbers[f"paper.{name}.notes"] = escape(" ".join(studies.compare_notes(paper.done[name])[1:]))
            else:
                numbers["paper.rank.notes"] = escape(" ".join(studies.sweep_notes(paper.done[name])))
    if "teacher" in paper.done:
        numbers["paper.teacher.note"] = (
            "The students' teacher owes nothing to that budget: it has an adapter of rank 16" + (
                " that first learned to tell plain sentences from edited ones" if "intermediate" in paper.done else "")
            + ". The students learn from the first seed's.")
    if "diagnose" in paper.done:
        found = paper.done["diagnose"]
        if found["left_out"]:
            numbers["paper.diagnose.left_out"] = escape(f"Left out: {'; '.join(found['left_out'])}.")
        if found["pairs"]:
            n, limit = found["pairs"]["n"], found["pairs"]["limit"]
            numbers["paper.diagnose.pairs"] = escape(f"{n:,} pairs" + (f", the first {limit} of each paradigm" if limit else
                                                                     "") + (", BLiMP" if found["pairs"]["published"] else
                                                                            ", the built-in grammar's"))
    return numbers, files


def _machines(paper: Paper) -> str:
    """Names what the steps ran on: each processor with its number of threads, which may be several machines'."""
    found = {(step["cpu"], step["threads"]) for step in paper.done.values() if {"cpu", "threads"} <= step.keys()}
    return " and on ".join(f"{cpu} with {threads} thread{'s' if threads > 1 else ''}" for cpu, threads in sorted(
        found or {(paper.record["cpu"], paper.record["threads"])}))


def _spread_note(seeds: int) -> str:
    """Says what stands behind a mean."""
    return "One seed: no standard deviation and no interval." if seeds == 1 else (
        rf"Mean over {seeds} seeds $\pm$ half of its 95\,\% interval (Student's $t$).")


def value(spread: Record, key: str, signed: bool = False) -> str:
    """Returns mean ± half of the 95 % interval as LaTeX; of one seed the mean alone."""
    factor, digits = (100, 1) if key == "accuracy" else (1, 3)
    text = f"{factor * spread.number('mean'):{'+' if signed else ''}.{digits}f}"
    if interval := spread.get("interval"):
        text += rf"\,$\pm$\,{factor * (interval[1] - interval[0]) / 2:.{digits}f}"
    return text.replace("-", "$-$")


def _headline(paper: Paper) -> Iterator[tuple[str, str]]:
    """Yields the numbers of the abstract, of the split that chose the epoch."""
    for step, entry in (("lora", "LoRA"), ("peft", "peft"), ("distil", "student"), ("distil", "scratch")):
        if row := paper.entries(step).get(entry):
            split = main_split(row.section("best"))
            yield f"paper.{step}.{entry}.mcc", value(row.section("best").section(split).section("mcc"), "mcc")
    if row := paper.difference("peft") or paper.difference("lora"):
        split = main_split(row.section("best"))
        yield "paper.lora.minus.peft", value(row.section("best").section(split).section("mcc"), "mcc", True)
    for row in paper.done["distil"]["differences"] if "distil" in paper.done else ():
        if row["minus"] == "scratch" and "best" in row:
            split = main_split(row.section("best"))
            yield "paper.student.minus.scratch", value(row.section("best").section(split).section("mcc"), "mcc", True)


# ---------------------------------------------------------------- tables

def _tables(paper: Paper) -> dict[str, str | None]:
    found = {"cola": cola(paper), "student": student(paper, "distil"), "polarity": student(paper, "polarity"),
             "ablations": ablations(paper), "rank": rank(paper), "cost": cost(paper), "steps": steps(paper)}
    found |= {name: methods(paper, name) for name in ("methods", "long", "buzzer")}
    return found | diagnoses(paper)


def _score_rows(rows: list[tuple[str, Record, bool]], splits: list[str]) -> list[list[str]]:
    """Returns a line for the best and one for the last epoch of each (name, entry or difference, whether it is one)."""
    lines = []
    for name, row, signed in rows:
        name = rf"\addlinespace {name}" if lines else name
        for which in ("best", "last"):
            if which in row:
                epoch = f" ({row.section(which + '_epoch').number('mean'):.3g})" if f"{which}_epoch" in row else ""
                lines.append([name, f"{which}{epoch}", *(value(row.section(which).section(split).section(key), key, signed)
                                                         for split in splits for key in SCORES)])
                name = ""
    return lines


def _score_table(rows: list[tuple[str, Record, bool]], splits: list[str], majority: Record) -> str:
    head = grouped(["", "epoch"], {split: [escape(name) for name in SCORES.values()] for split in splits})
    first = ["majority class", ""] + [text for split in splits for text in (f"{100 * majority.number(split):.1f}", "0")]
    return tabular("ll" + "rr" * len(splits), head, [first, *_score_rows(rows, splits)])


def cola(paper: Paper) -> str | None:
    """Makes the table of LoRA, PEFT's reference, their difference paired by seed, and the students' teacher's recipe."""
    if "lora" not in paper.done:
        return None
    study = paper.done["lora"]
    rows = [(f"LoRA, rate {_rate(paper, 'grid')}", paper.entries("lora")["LoRA"], False)]
    if reference := paper.entries("peft").get("peft"):
        rows.append((f"PEFT + Trainer, rate {reference['learning_rate']:g}", reference, False))
    if difference := paper.difference("lora"):
        rows.append(("LoRA minus PEFT", difference, True))
    if teacher := paper.entries("teacher").get("LoRA"):
        rows.append(("the students' teacher", teacher, False))
    table = _score_table(rows, study.section("selection")["splits"], study.section("majority_accuracy"))
    return table if reference else table.replace("\\bottomrule", "PEFT + Trainer & \\emph{not run} \\\\\n\\bottomrule")


def _rate(paper: Paper, step: str) -> str:
    return f"{paper.done[step]['entries'][0]['learning_rate']:g}" if step in paper.done else "?"


def student(paper: Paper, step: str) -> str | None:
    """Makes a step's table of teacher, student with KD, no-KD baseline, and their differences paired by seed."""
    if step not in paper.done:
        return None
    study = paper.done[step]
    rows = [(escape(spoken_entry(entry["entry"])), entry, False) for entry in study["entries"]]
    rows += [(escape(f"{spoken_entry(row['entry'])} minus {spoken_entry(row['minus'])}"), row, True)
             for row in study["differences"] if "best" in row]
    return _score_table(rows, study.section("selection")["splits"], study.section("majority_accuracy"))


def ablations(paper: Paper) -> str | None:
    """Makes the table of the student's variants: MCC at the best epoch, minus its control, minus the paper's student."""
    names = [step["name"] for step in paper.record["steps"] if step["name"].startswith("distil")]
    if not any(name in paper.done for name in names):
        return None
    study = next(paper.done[name] for name in names if name in paper.done)
    splits = study.section("selection")["splits"]
    all_splits = splits[-1]
    rows = []
    for name in names:
        label = rf"\texttt{{{breakable(_flags(paper, name)) or '(as it is)'}}}"
        if name not in paper.done:
            rows.append([label, r"\emph{not run}"])
            continue
        entries = paper.entries(name)
        gain = next((row for row in paper.done[name]["differences"] if row["minus"] == "scratch" and "best" in row), None)
        change = paper.difference(name)
        baseline = value(entries["scratch"].section("best").section(all_splits).section("mcc"), "mcc"
                         ) if "scratch" in entries else ""
        rows.append([label, *(value(entries["student"].section("best").section(split).section("mcc"), "mcc")
                              for split in splits),
                     baseline,
                     *(value(row.section("best").section(all_splits).section("mcc"), "mcc", True) if row else ""
                       for row in (gain, change))])
    head = grouped(["student"], {f"student: {split}": ["MCC"] for split in splits},
                   ["no-KD baseline", "student minus it", "minus first row"])
    return tabular("l" + "r" * (len(splits) + 3), head, rows)


def _flags(paper: Paper, name: str) -> str:
    """Returns what an ablation's command has that the paper's student's has not."""
    def words(step: str) -> list[str]:
        return next(row["command"] for row in paper.record["steps"] if row["name"] == step).split()

    known = [*words("distil"), name]
    return " ".join(word for word in words(name) if word not in known and not word.endswith(f"/{name}"))


def rank(paper: Paper) -> str | None:
    """Makes the grid of a sweep over two options: accuracy and MCC of the best epoch, and trained parameters."""
    if "rank" not in paper.done:
        return None
    study = paper.done["rank"]
    (row_option, row_values), (column_option, column_values) = study.section("search").items()
    split = study.section("selection")["split"]
    cells = {}
    for trial in study["trials"]:
        if trial["state"] == "complete":
            scores, params = trial.section("validation").section(split), trial.section("params")
            cells[params[row_option], params[column_option]] = [
                f"{100 * scores.number('accuracy'):.1f}", f"{scores.number('mcc'):.3f}".replace("-", "$-$"),
                f"{trial.section('parameters').number('trainable'):,.0f}"]
    head = grouped([escape(row_option)], {f"{column_option} {value}": ["acc.\\,\\%", "MCC", "trained"]
                                          for value in column_values})
    rows = [[escape(one), *(text for other in column_values for text in cells.get((one, other), ["", "", ""]))]
            for one in row_values]
    return tabular("r" + "rrr" * len(column_values), head, rows)


def methods(paper: Paper, step: str) -> str | None:
    """Makes the table of a comparison: each entry's best and last epoch, its cost, and the differences paired by seed."""
    if step not in paper.done:
        return None
    study, entries = paper.done[step], paper.entries(step)
    if not entries:
        raise ReportError(f"{study.source}: every run diverged")
    splits = shown_splits(study.section("selection")["splits"])
    majority = next(iter(entries.values())).section("majority_accuracy")
    blank = [""] * 3
    rows = [["majority class", "", "", ""] + [text for split in splits for text in (
        f"{100 * majority.number(split):.1f}", "0")] + blank]
    for entry in study["entries"]:
        name = escape(entry["entry"])
        if entry["entry"] not in entries:
            rows.append([name, "", "", "diverged"])
            continue
        rate = entry["learning_rate"]
        before = [name, f"{entry.section('parameters').number('trainable'):,.0f}", "" if rate is None else f"{rate:g}"]
        after = [f"{entry.number('seconds_per_epoch'):.3g}", f"{entry.number('peak_memory_bytes') / 2 ** 20:,.0f}",
                 f"{entry.number('size_bytes') / 1e6:.3g}"]
        for i, line in enumerate(_score_rows([("", entry, False)], splits)[:1 if rate is None else 2]):
            rows.append((before if i == 0 else blank) + line[1:] + (after if i == 0 else blank))
            rows[-1][0] = rf"\addlinespace {rows[-1][0]}" if i == 0 else ""
    for row in study["differences"]:
        if "best" in row:
            name = rf"\addlinespace {escape(row['entry'])} minus {escape(row['minus'])}"
            rows += [[name if i == 0 else "", "", "", *line[1:], *blank]
                     for i, line in enumerate(_score_rows([("", row, True)], splits))]
    if step == "buzzer" and "logistic" in paper.done:
        scores = next(iter(paper.done["logistic"].section("splits").values()))
        rows.append([r"logistic regression, \texttt{scikit-learn}", "", "", "",
                     f"{100 * scores.number('accuracy'):.1f}", f"{scores.number('mcc'):.3f}", *blank])
    head = grouped(["entry", "trained", "rate", "epoch"], {split: [escape(name) for name in SCORES.values()]
                                                           for split in splits}, ["s/epoch", "peak MiB", "MB on disk"])
    return tabular("lrrl" + "rr" * len(splits) + "rrr", head, rows)


def diagnoses(paper: Paper) -> dict[str, str]:
    """Makes the tables of the first seed's diagnosis; those of single sentences with their first rows."""
    if "diagnose" not in paper.done:
        return {}
    found = {}
    for name, table in diagnosis.tables(paper.done["diagnose"]).items():
        if f"diagnose_{name}" not in TABLES:
            continue
        columns = "l" * table.left + "r" * (len(table.head) - table.left)
        if name in ("disagreements", "all_wrong"):
            columns = "@{}L{8.2cm}" + "l" + "r" * (len(table.head) - 2) + "@{}"
            table = table._replace(rows=table.rows[:SENTENCES])
        head = " & ".join(_narrow(text) for text in table.head)
        found[f"diagnose_{name}"] = tabular(columns, head, [[escape(text) for text in row] for row in table.rows])
    return found


def _narrow(text: str) -> str:
    """Breaks a column's name of several words into lines."""
    words = text.replace(", published", " published").split()
    lines = r" \\ ".join(map(escape, words)) if len(text) > 12 and len(words) > 1 else escape(text)
    return rf"\begin{{tabular}}[b]{{@{{}}c@{{}}}}{lines}\end{{tabular}}" if len(text) > 12 else lines


def cost(paper: Paper) -> str | None:
    """Makes the table of what training and answering cost: parameters, seconds, memory, bytes, sentences a second."""
    rows = []
    for step, entry, name in (("grid", "lora", "LoRA"), ("peft", "peft", "PEFT + Trainer")):
        if row := paper.entries(step).get(entry):
            counts = row.section("parameters")
            rows.append([name, f"{counts.number('total'):,.0f}", f"{counts.number('trainable'):,.0f}",
                         f"{row.number('seconds_per_epoch'):.3g}", f"{row.number('peak_memory_bytes') / 2 ** 20:,.0f}",
                         f"{row.number('size_bytes') / 1e6:.3g}", ""])
    for key in ("teacher", "student") if "distil" in paper.done else ():
        runs = [Path(run["folder"]) for run in paper.done["distil"]["runs"] if run["status"] == "finished"]
        runs = [folder if folder.exists() else paper.folder / "cola" / folder.name for folder in runs]  # or moved
        parts = [read_json(folder / "summary.json").section(key) for folder in runs]
        size = f"{parts[0].number('parameters'):,.0f}"
        speed = f"{fmean(part.number('sentences_per_second') for part in parts):,.0f}"
        if key == "teacher":
            rows.append(["the teacher, answering", size, "", "", "", "", speed])
            continue
        trains = [part.section("train") for part in parts]
        rows.append(["student with KD", size, size, f"{fmean(t.number('seconds') / t.number('epochs') for t in trains):.3g}",
                     f"{max(t.number('peak_memory_bytes') for t in trains) / 2 ** 20:,.0f}",
                     f"{4 * parts[0].number('parameters') / 1e6:.3g}", speed])  # float32; the weights may be elsewhere
    head = " & ".join(["", "parameters", "trained", "s/epoch", "peak MiB", "MB on disk", "sentences/s"])
    return tabular("lrrrrrr", head, rows) if rows else None


def steps(paper: Paper) -> str:
    """Makes the table of every step of the paper: what became of it, how long it took, its command."""
    rows = []
    for step in paper.record["steps"]:
        took = "" if step["seconds"] is None else f"{step.number('seconds') / 60:.1f}"
        state = "" if step["status"] == "done" else rf" (\emph{{{escape(step['status'])}}})"
        rows.append([escape(step["name"]) + state, took, rf"\texttt{{{breakable(step['command'])}}}"])
    total = sum(step.number("seconds") for step in paper.record["steps"] if step["seconds"] is not None)
    rows.append(["together", f"{total / 60:.1f}", ""])
    return tabular("@{}L{2.6cm}rL{12cm}@{}", "step & minutes & command", rows, "longtable*")


# ---------------------------------------------------------------- figures

def _plots(paper: Paper, plots_dir: Path) -> Iterator[tuple[str, Path]]:
    """Yields the paper's figures as PDF by their names."""
    for step in ("distil", "rank", "methods", "long", "buzzer"):
        if step in paper.done:
            drawn = figures.plot_study(paper.folder / next(
                row["file"] for row in paper.record["steps"] if row["name"] == step), plots_dir / step)
            yield step, next(path for path in drawn if path.suffix == ".pdf")
    if "diagnose" in paper.done:
        for name, figure in diagnosis.figures(paper.done["diagnose"]).items():
            if name in ("phenomena", "reliability", "length"):
                yield f"diagnose_{name}", figures.save_figure(figure, plots_dir / f"diagnose_{name}")[1]  # PNG, PDF

