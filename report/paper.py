"""Makes the tables, figures and numbers of the paper from the files of its steps: mean and 95 % interval over seeds.

    numbers, files = paper_results(Path("runs/paper-12345"), Path("runs/paper-12345/plots"))

A step that is not done has no table: main.tex prints "not run" in its place.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from statistics import fmean

from report import diagnosis, figures, studies, variants
from report.latex import breakable, escape, grouped, tabular
from report.records import BASELINE, Record, ReportError, main_split, model_name, read_json, shown_splits

# Recorded score -> name of its column.
SCORES = {"accuracy": "acc. %", "mcc": "MCC"}
# The length of each list of sentences.
SENTENCES = 8
# The tables of main.tex: results/paper_NAME.tex.
TABLES = ("cola", "student", "polarity", "ablations", "rank", "methods", "long", "buzzer", "diagnose_scores",
          "diagnose_phenomena", "diagnose_length", "diagnose_calibration", "diagnose_disagreements", "diagnose_all_wrong",
          "variants", "variants_cola", "class_weights", "losses", "cost", "steps")

EXTRAS = ("variants", "variants_cola", "class_weights", "losses")


class Paper:
    """Holds paper.json and the records of the finished steps.

    Attributes:
        record: paper.json.
        done: the record of each finished step, by the name of the step.
    """

    def __init__(self, folder: Path):
        self.folder, self.record = folder, read_json(folder / "paper.json")
        self.done = {step["name"]: read_json(folder / step["file"]) for step in self.record["steps"]
                     if step["status"] == "done"}

    def entries(self, step: str) -> dict[str, Record]:
        """Returns the entries of a study that have a result, by name; none if the step is not done."""
        rows = self.done[step]["entries"] if step in self.done else []
        return {entry["entry"]: entry for entry in rows if "best" in entry}

    def difference(self, step: str) -> Record | None:
        """Returns the difference of a step from the step next to it in the paper, paired by seed, or None."""
        return next((row for row in self.record["differences"] if row["step"] == step and "best" in row), None)


def paper_results(folder: Path, plots_dir: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Returns the numbers (key -> LaTeX) and the files (name -> content) of the paper.

    Args:
        folder: the folder of the paper, with paper.json.
        plots_dir: the folder for the figures.

    Raises ReportError where a file of a step is missing or malformed.
    """
    paper = Paper(folder)
    seeds = paper.record["seeds"]
    numbers = {"paper.profile": escape(paper.record.section("options")["profile"]), "paper.seeds": str(len(seeds)),
               "paper.range": f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else seeds[0],
               "paper.spread": _spread_note(len(seeds)), "paper.machines": escape(_machines(paper))}
    # Every caption ends with the command of its step, done or not.
    for step in paper.record["steps"]:
        numbers[f"paper.{step['name']}.command"] = breakable(step["command"])
    files = {f"paper_{name}.tex": table.encode() for name, table in _tables(paper).items() if table}
    for name, path in _plots(paper, plots_dir):
        files[f"paper_{name}.pdf"] = path.read_bytes()
    # The steps that run only where they are named have a section only then.
    if {f"paper_{name}.tex" for name in EXTRAS} & set(files):
        numbers["paper.extras"] = "yes"
    return numbers | dict(_headline(paper)) | dict(_notes(paper)), files


def _notes(paper: Paper) -> Iterator[tuple[str, str]]:
    """Yields the notes next to the tables of the steps that are done."""
    for name in ("rank", "methods", "long", "buzzer"):
        if name in paper.done:
            for key in ("model", "task"):
                yield f"paper.{name}.{key}", breakable(paper.done[name][key])
            # The first note of a comparison is about the seeds, which the section says once for all of its tables.
            notes = studies.sweep_notes(paper.done[name]) if name == "rank" else studies.compare_notes(paper.done[name])[1:]
            yield f"paper.{name}.notes", escape(" ".join(notes))
    if "teacher" in paper.done:
        first = " that first learned to tell plain sentences from edited ones" if "intermediate" in paper.done else ""
        yield "paper.teacher.note", ("The teacher of the students was trained outside that budget: it has an adapter of "
                                     f"rank 16{first}. The students learn from the teacher of the first seed.")
    if "diagnose" in paper.done:
        left_out, pairs = paper.done["diagnose"]["left_out"], paper.done["diagnose"]["pairs"]
        if left_out:
            yield "paper.diagnose.left_out", escape(f"Left out: {'; '.join(left_out)}.")
        if pairs:
            some = f", the first {pairs['limit']} of each paradigm" if pairs["limit"] else ""
            # Published figures exist for BLiMP alone.
            source = ", BLiMP" if pairs["published"] else ", the built-in grammar's"
            yield "paper.diagnose.pairs", escape(f"{pairs['n']:,} pairs{some}{source}")


def _machines(paper: Paper) -> str:
    """Returns the processors of the steps, each with its number of threads."""
    # The steps of one paper may have run on several machines.
    found = {(step["cpu"], step["threads"]) for step in paper.done.values() if {"cpu", "threads"} <= step.keys()}
    return " and on ".join(f"{cpu} with {threads} thread{'s' if threads > 1 else ''}" for cpu, threads in sorted(
        found or {(paper.record["cpu"], paper.record["threads"])}))


def _spread_note(seeds: int) -> str:
    """Returns the sentence about means and intervals."""
    return "One seed: no standard deviation and no interval." if seeds == 1 else (
        rf"A number with a $\pm$ is the mean over {seeds} seeds $\pm$ half of its 95\,\% interval (Student's $t$).")


def value(spread: Record, key: str, signed: bool = False) -> str:
    """Returns mean ± half of the 95 % interval as LaTeX; of a single seed the mean alone."""
    factor, digits = (100, 1) if key == "accuracy" else (1, 3)
    text = f"{factor * spread.number('mean'):{'+' if signed else ''}.{digits}f}"
    if interval := spread.get("interval"):
        text += rf"\,$\pm$\,{factor * (interval[1] - interval[0]) / 2:.{digits}f}"
    return text.replace("-", "$-$")


def _headline(paper: Paper) -> Iterator[tuple[str, str]]:
    """Yields the numbers of the abstract, on the split that chose the epoch."""
    for step, entry in (("lora", "LoRA"), ("peft", "peft"), ("distil", "student"), ("distil", BASELINE)):
        if row := paper.entries(step).get(entry):
            split = main_split(row.section("best"))
            name = "baseline" if entry == BASELINE else entry
            yield f"paper.{step}.{name}.mcc", value(row.section("best").section(split).section("mcc"), "mcc")
    if row := paper.difference("peft") or paper.difference("lora"):
        split = main_split(row.section("best"))
        yield "paper.lora.minus.peft", value(row.section("best").section(split).section("mcc"), "mcc", True)
    for row in paper.done["distil"]["differences"] if "distil" in paper.done else ():
        if row["minus"] == BASELINE and "best" in row:
            split = main_split(row.section("best"))
            yield "paper.student.minus.baseline", value(row.section("best").section(split).section("mcc"), "mcc", True)


# ---------------------------------------------------------------- tables

def _tables(paper: Paper) -> dict[str, str | None]:
    """Makes every table by its name in TABLES; None for a step that is not done."""
    found = {"cola": cola(paper), "student": student(paper, "distil"), "polarity": student(paper, "polarity"),
             "ablations": ablations(paper), "rank": rank(paper), "cost": cost(paper), "steps": steps(paper)}
    found |= {name: methods(paper, name) for name in ("methods", "long", "buzzer")}
    found |= {step.replace("-", "_"): against_lora(paper, step, default) for step, default in (
        ("variants", "variants-default"), ("variants-cola", "variants-default-cola"), ("class-weights", ""))}
    found["losses"] = losses(paper)
    return found | diagnoses(paper)


def _score_rows(rows: list[tuple[str, Record, bool]], splits: list[str]) -> list[list[str]]:
    """Returns the rows of (name, scores, whether they are a difference): one for the best epoch, one for the last."""
    lines = []
    for name, row, signed in rows:
        name = rf"\addlinespace {name}" if lines else name
        for which in ("best", "last"):
            if which in row:
                epoch = f" ({row.section(which + '_epoch').number('mean'):.3g})" if f"{which}_epoch" in row else ""
                lines.append([name, f"{which}{epoch}", *(value(row.section(which).section(split).section(key), key, signed)
                                                         for split in splits for key in SCORES)])
                # The name stands in the first of its rows alone.
                name = ""
    return lines


def _score_table(rows: list[tuple[str, Record, bool]], splits: list[str], majority: Record) -> str:
    """Makes a table of accuracy and MCC on every split, the majority class first."""
    head = grouped(["", "epoch"], dict.fromkeys(splits, _score_columns()))
    first = ["majority class", ""] + [text for split in splits for text in (f"{100 * majority.number(split):.1f}", "0")]
    return tabular("ll" + "rr" * len(splits), head, [first, *_score_rows(rows, splits)])


def _score_columns() -> list[str]:
    """Returns the names of the scores' columns as LaTeX."""
    return [escape(name) for name in SCORES.values()]


def cola(paper: Paper) -> str | None:
    """Makes the table of LoRA, PEFT's reference, their difference paired by seed, and the students' teacher."""
    if "lora" not in paper.done:
        return None
    study = paper.done["lora"]
    # The grid chose the learning rate of LoRA in a step of its own.
    rows = [(f"LoRA, rate {_rate(paper, 'grid')}", paper.entries("lora")["LoRA"], False)]
    if reference := paper.entries("peft").get("peft"):
        rows.append((f"PEFT + Trainer, rate {reference['learning_rate']:g}", reference, False))
    if difference := paper.difference("lora"):
        rows.append(("LoRA minus PEFT", difference, True))
    if teacher := paper.entries("teacher").get("LoRA"):
        rows.append(("the students' teacher", teacher, False))
    table = _score_table(rows, study.section("selection")["splits"], study.section("majority_accuracy"))
    # A table with one side of a comparison must not pass for the whole of it.
    return table if reference else table.replace("\\bottomrule", "PEFT + Trainer & \\emph{not run} \\\\\n\\bottomrule")


def _rate(paper: Paper, step: str) -> str:
    """Returns the learning rate that a step chose, as text; ? if it is not done."""
    return f"{paper.done[step]['entries'][0]['learning_rate']:g}" if step in paper.done else "?"


def student(paper: Paper, step: str) -> str | None:
    """Makes the table of teacher, student with KD, baseline, and their differences paired by seed, of one step."""
    if step not in paper.done:
        return None
    study = paper.done[step]
    rows = [(escape(model_name(entry["entry"])), entry, False) for entry in study["entries"]]
    rows += [(escape(f"{model_name(row['entry'])} minus {model_name(row['minus'])}"), row, True)
             for row in study["differences"] if "best" in row]
    return _score_table(rows, study.section("selection")["splits"], study.section("majority_accuracy"))


def ablations(paper: Paper) -> str | None:
    """Makes the table of the student's variants: MCC at the best epoch, gain over the baseline, change from row 1."""
    names = [step["name"] for step in paper.record["steps"] if step["name"].startswith("distil")]
    if not any(name in paper.done for name in names):
        return None
    study = next(paper.done[name] for name in names if name in paper.done)
    splits = study.section("selection")["splits"]
    last_split = splits[-1]

    def mcc(scores: Record, split: str, signed: bool = False) -> str:
        return value(scores.section("best").section(split).section("mcc"), "mcc", signed)

    rows = []
    for name in names:
        label = rf"\texttt{{{breakable(_flags(paper, name)) or '(as it is)'}}}"
        if name not in paper.done:
            rows.append([label, r"\emph{not run}"])
            continue
        entries = paper.entries(name)
        gain = next((row for row in paper.done[name]["differences"] if row["minus"] == BASELINE and "best" in row), None)
        change = paper.difference(name)
        # Variants that change the teacher's part alone train no baseline: it would be that of the first row.
        baseline = mcc(entries[BASELINE], last_split) if BASELINE in entries else ""
        rows.append([label, *(mcc(entries["student"], split) for split in splits), baseline,
                     *(mcc(row, last_split, True) if row else "" for row in (gain, change))])
    above = {split: ["MCC"] for split in splits}
    head = grouped(["student"], above, ["baseline", _narrow("student minus it"), _narrow("minus first row")])
    return tabular("@{}L{3cm}" + "r" * (len(splits) + 3) + "@{}", head, rows)


def _flags(paper: Paper, name: str) -> str:
    """Returns the options of an ablation that the paper's student does not have."""
    def words(step: str) -> list[str]:
        return next(row["command"] for row in paper.record["steps"] if row["name"] == step).split()

    # Seeds, data and folders are the same or say nothing of the student.
    known = [*words("distil"), name]
    return " ".join(word for word in words(name) if word not in known and not word.endswith(f"/{name}"))


def rank(paper: Paper) -> str | None:
    """Makes the table of a sweep over two options, values of one down and of the other across: accuracy, MCC, parameters."""
    if "rank" not in paper.done:
        return None
    study = paper.done["rank"]
    (row_option, row_values), (column_option, column_values) = study.section("search").items()
    split = study.section("selection")["split"]
    # (value of the option down, value of the option across) -> the three cells of its trial
    cells = {}
    for trial in study["trials"]:
        if trial["state"] == "complete":
            scores, params = trial.section("validation").section(split), trial.section("params")
            cells[params[row_option], params[column_option]] = [
                f"{100 * scores.number('accuracy'):.1f}", f"{scores.number('mcc'):.3f}".replace("-", "$-$"),
                f"{trial.section('parameters').number('trainable'):,.0f}"]
    columns = ["acc.\\,\\%", "MCC", "trained"]
    head = grouped([escape(row_option)], {f"{column_option} {value}": columns for value in column_values})
    rows = []
    for down in row_values:
        # A trial that was pruned or diverged leaves its cells empty.
        found = [cells.get((down, across), ["", "", ""]) for across in column_values]
        rows.append([escape(down), *chain.from_iterable(found)])
    return tabular("r" + "rrr" * len(column_values), head, rows)


def methods(paper: Paper, step: str) -> str | None:
    """Makes the table of a comparison: best and last epoch of each entry, its cost, and the differences paired by seed."""
    if step not in paper.done:
        return None
    study, entries = paper.done[step], paper.entries(step)
    if not entries:
        raise ReportError(f"{study.source}: every run diverged")
    splits = shown_splits(study.section("selection")["splits"])
    majority = next(iter(entries.values())).section("majority_accuracy")
    blank = [""] * 3
    of_majority = [[f"{100 * majority.number(split):.1f}", "0"] for split in splits]
    rows = [["majority class", "", "", "", *chain.from_iterable(of_majority), *blank]]
    for entry in study["entries"]:
        name = escape(entry["entry"])
        if entry["entry"] not in entries:
            rows.append([name, "", "", "diverged"])
            continue
        rate = entry["learning_rate"]
        before = [name, f"{entry.section('parameters').number('trainable'):,.0f}", "" if rate is None else f"{rate:g}"]
        after = [f"{entry.number('seconds_per_epoch'):.3g}", f"{entry.number('peak_memory_bytes') / 2 ** 20:,.0f}",
                 f"{entry.number('size_bytes') / 1e6:.3g}"]
        best, *last = _score_rows([("", entry, False)], splits)
        rows.append([rf"\addlinespace {before[0]}", *before[1:], *best[1:], *after])
        # An entry without a learning rate trains nothing: its last epoch is its best.
        if rate is not None:
            rows += [[*blank, *line[1:], *blank] for line in last]
    for row in study["differences"]:
        if "best" in row:
            name = rf"\addlinespace {escape(row['entry'])} minus {escape(row['minus'])}"
            best, *last = _score_rows([("", row, True)], splits)
            rows.append([name, "", "", *best[1:], *blank])
            rows += [[*blank, *line[1:], *blank] for line in last]
    # A classical model of the same features shows how much of the score needs no network.
    if step == "buzzer" and "logistic" in paper.done:
        scores = next(iter(paper.done["logistic"].section("splits").values()))
        rows.append([r"logistic regression, \texttt{scikit-learn}", "", "", "",
                     f"{100 * scores.number('accuracy'):.1f}", f"{scores.number('mcc'):.3f}", *blank])
    head = grouped(["entry", "trained", "rate", "epoch"], dict.fromkeys(splits, _score_columns()),
                   ["s/epoch", "peak MiB", "MB on disk"])
    return tabular("lrrl" + "rr" * len(splits) + "rrr", head, rows)


def against_lora(paper: Paper, step: str, default: str) -> str | None:
    """Makes the table of a comparison against plain LoRA, with plain LoRA at the default rate from another step."""
    if step not in paper.done:
        return None
    return variants.table(paper.done[step], list(paper.entries(default).values()))


def losses(paper: Paper) -> str | None:
    """Makes the table of the students under each loss, those in stages first; KL's stand above the others."""
    rows = []
    for kl, prefix in (("distil", "losses-"), ("distil-plain", "losses-plain-")):
        names = [name for name in paper.done if name.startswith(prefix)
                 and (prefix == "losses-plain-" or not name.startswith("losses-plain-"))]
        if names and kl in paper.done:
            rows.append((f"{'plain, ' if 'plain' in kl else ''}kl", paper.entries(kl)["student"], None))
            rows += [(f"{'plain, ' if 'plain' in kl else ''}{name.removeprefix(prefix)}", paper.entries(name)["student"],
                      paper.difference(name)) for name in names]
    return variants.loss_table(rows, paper.done["distil"].section("selection")["splits"][-1]) if rows else None


def diagnoses(paper: Paper) -> dict[str, str]:
    """Makes the tables of the first seed's diagnosis; a table of sentences has its first rows alone."""
    if "diagnose" not in paper.done:
        return {}
    found = {}
    for name, table in diagnosis.tables(paper.done["diagnose"]).items():
        if f"diagnose_{name}" not in TABLES:
            continue
        columns = "l" * table.left + "r" * (len(table.head) - table.left)
        # A sentence needs a column that breaks lines.
        if name in ("disagreements", "all_wrong"):
            columns = "@{}L{8.2cm}" + "l" + "r" * (len(table.head) - 2) + "@{}"
            table = table._replace(rows=table.rows[:SENTENCES])
        head = " & ".join(_narrow(text) for text in table.head)
        found[f"diagnose_{name}"] = tabular(columns, head, [list(map(escape, row)) for row in table.rows])
    return found


def _narrow(text: str) -> str:
    """Returns the name of a column as LaTeX, one of several words in lines below each other."""
    words = text.replace(", published", " published").split()
    lines = r" \\ ".join(map(escape, words)) if len(text) > 12 and len(words) > 1 else escape(text)
    return rf"\begin{{tabular}}[b]{{@{{}}c@{{}}}}{lines}\end{{tabular}}" if len(text) > 12 else lines


def cost(paper: Paper) -> str | None:
    """Makes the table of the cost of training and inference: parameters, seconds, memory, bytes, sentences per second."""
    rows = []
    for step, entry, name in (("grid", "lora", "LoRA"), ("peft", "peft", "PEFT + Trainer")):
        if row := paper.entries(step).get(entry):
            counts = row.section("parameters")
            rows.append([name, f"{counts.number('total'):,.0f}", f"{counts.number('trainable'):,.0f}",
                         f"{row.number('seconds_per_epoch'):.3g}", f"{row.number('peak_memory_bytes') / 2 ** 20:,.0f}",
                         f"{row.number('size_bytes') / 1e6:.3g}", ""])
    for key in ("teacher", "student") if "distil" in paper.done else ():
        runs = [Path(run["folder"]) for run in paper.done["distil"]["runs"] if run["status"] == "finished"]
        # The folder of a paper may have moved since its runs were recorded.
        runs = [folder if folder.exists() else paper.folder / "cola" / folder.name for folder in runs]
        parts = [read_json(folder / "summary.json").section(key) for folder in runs]
        size = f"{parts[0].number('parameters'):,.0f}"
        speed = f"{fmean(part.number('sentences_per_second') for part in parts):,.0f}"
        if key == "teacher":
            rows.append(["the teacher, inference", size, "", "", "", "", speed])
            continue
        trains = [part.section("train") for part in parts]
        seconds = fmean(train.number("seconds") / train.number("epochs") for train in trains)
        memory = max(train.number("peak_memory_bytes") for train in trains) / 2 ** 20
        # Four bytes for each float32: the file itself may be on another machine.
        megabytes = 4 * parts[0].number("parameters") / 1e6
        rows.append([model_name(key), size, size, f"{seconds:.3g}", f"{memory:,.0f}", f"{megabytes:.3g}", speed])
    head = " & ".join(["", "parameters", "trained", "s/epoch", "peak MiB", "MB on disk", "sentences/s"])
    return tabular("lrrrrrr", head, rows) if rows else None


def steps(paper: Paper) -> str:
    """Makes the table of the steps of the paper: state, minutes, command."""
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
    """Draws the figures of the paper and yields each as (name, PDF)."""
    file_of = {step["name"]: step["file"] for step in paper.record["steps"]}
    for step in ("distil", "rank", "methods", "long", "buzzer"):
        if step in paper.done:
            drawn = figures.plot_study(paper.folder / file_of[step], plots_dir / step)
            yield step, next(path for path in drawn if path.suffix == ".pdf")
    # Drawn anew from the recorded numbers: a recorded step has no plots.
    if "diagnose" in paper.done:
        for name, figure in diagnosis.figures(paper.done["diagnose"]).items():
            if name in ("phenomena", "reliability", "length"):
                _, pdf = figures.save_figure(figure, plots_dir / f"diagnose_{name}")
                yield f"diagnose_{name}", pdf

