"""Writes the tables of README.md, docs/ and benchmarks/README.md from results/: no figure is typed by hand.

    python benchmarks/train_throughput.py --data DIR --json > benchmarks/results/train_throughput_NAME.json
    python benchmarks/collect.py --name cola_lora_bf16 runs/LoRA-12345 runs/LoRA-12346 runs/LoRA-12347
    python run.py paper 12345 --profile full --data-root ../shared/data --records benchmarks/results/paper
    python benchmarks/summarise.py

A page marks the place of a table: `<!-- NAME, by summarise.py -->` before it and `<!-- end of NAME -->` after it. NAME
is one of SECTIONS, or the name of a program in benchmarks/. A row without a result says "not run" next to its command.
"""
from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from benchmarks.collect import typed  # noqa: E402 (needs the path above)
from benchmarks.page_format import (  # noqa: E402
    accuracy_and_mcc,
    cpu_of,
    mean,
    measured_on,
    seeds_of,
    table,
    wrapped,
)
from benchmarks.program_tables import (  # noqa: E402
    NOT_RUN,
    measured_row,
    measurements,
    of_program,
    reliability,
    shown,
    speed,
)
from experiments.significance import paired_differences  # noqa: E402
from experiments.steps import ABLATIONS, CHOSEN, steps  # noqa: E402
from metrics.problems import PROBLEMS  # noqa: E402

MARKED = re.compile(r"(<!-- ([\w-]+), by summarise\.py -->\n).*?(<!-- end of \2 -->\n)", re.DOTALL)
COLA = "../shared/data/cola"
# The paper's steps on real data; their records in results/paper/ are results of the name paper/STEP.
STEPS = {step.name: step for step in steps("full", "12345", 3, Path("../shared/data"), Path("runs/paper-12345"))}
# A learning rate that the grid chooses is shown as the one it may choose.
COMMANDS = {name: typed("python " + shlex.join(step.words).replace(CHOSEN, "4e-4")) for name, step in STEPS.items()}
MPNET = (f"python run.py LoRA SR --model mpnet --data {COLA} --init runs/mpnet/intermediate --rank 16 --alpha 32 "
         "--precision fp32 --lr 3e-4 --epochs 3 --label-smoothing 0.1 --ema 0.995")
# Trainings on CoLA: result, label of each of its rows, command to show without a result. `scratch` is the recorded name of
# the baseline, the same student trained without a teacher.
TRAININGS = (
    ("paper/peft", {"peft": "PEFT + Trainer, best of two learning rates"}, COMMANDS["peft"]),
    ("paper/lora", {"LoRA": "`LoRA`, float32, best of two learning rates"}, COMMANDS["lora"]),
    ("cola_lora_fp32", {"lora": "`LoRA`, float32"}, f"python run.py LoRA SR --model smollm2 --data {COLA} --precision fp32"),
    ("cola_lora_bf16", {"lora": "`LoRA`, bfloat16"},
     f"python run.py LoRA SR --model smollm2 --data {COLA} --precision bf16"),
    ("paper/teacher", {"LoRA": "`LoRA` after an intermediate task, bfloat16, rank 16: the students' teacher"},
     COMMANDS["teacher"]),
    ("mpnet_teacher", {"lora": "`LoRA` on MPNet after an intermediate task, float32, rank 16"}, MPNET),
    ("paper/distil", {"student": "`distil`: student with KD", "scratch": "`distil`: baseline"}, COMMANDS["distil"]),
    ("paper/distil-plain", {"student": "`distil --plain`: student with KD", "scratch": "`distil --plain`: baseline"},
     COMMANDS["distil-plain"]))
REVIEWS = ("mpnet_reviews", {"lora": "`LoRA` on MPNet, float32, rank 16"},
           "python run.py LoRA SR --model mpnet --task rotten_tomatoes --data ../shared/data/rotten_tomatoes --rank 16 "
           "--alpha 32 --precision fp32 --lr 3e-4 --epochs 1")
# Tasks other than one of several classes: MiniLM's LoRA and its student. Result, label of each of its rows.
OTHER_PROBLEMS = (
    ("stsb_lora", {"lora": "STS-B, `LoRA`"}),
    ("stsb_distil", {"student": "STS-B, student with KD", "scratch": "STS-B, baseline"}),
    ("emotions_lora", {"lora": "GoEmotions, `LoRA`"}),
    ("emotions_distil", {"student": "GoEmotions, student with KD", "scratch": "GoEmotions, baseline"}))
IN_DETAIL = ("cola_lora_bf16",)  # trainings of docs/results.md that the README leaves out
# The paper's comparisons and its sweep: step, label.
STUDIES = {"methods": "MiniLM on rotten_tomatoes", "rank": "MiniLM on rotten_tomatoes", "long": "MiniLM on movie_reviews",
           "buzzer": "MiniLM on buzzer"}
STUDENTS = {"distil": [], **{f"distil-{name}": flags for name, flags in ABLATIONS.items()}}  # step -> its own options
LABELS = {"teacher": "teacher", "student": "student with KD", "scratch": "baseline"}
SHOWN = ("lora", "peft", "teacher", "logistic", "polarity", *STUDIES, *STUDENTS)  # on the pages; the paper shows every step
# Rows of the README, without bfloat16: program, end of the row's recorded name, label.
HEADLINES = (("train_throughput", ": ours / peft-best", "training, float32: this project / PEFT at its best"),
             ("train_throughput", ": ours-bf16x3 / peft-best", "training, `bf16x3`: this project / PEFT at its best"),
             ("generation", ": fp32, ours / transformers.generate",
              "sampling texts, float32: this project / `transformers`"),
             ("inference", "stages, SmolLM2: student / teacher", "classifying CoLA: student in stages / SmolLM2"))


# ---------------------------------------------------------------- trainings

def majority(results: dict[str, dict], names: Iterable[str]) -> dict[str, float] | None:
    """Returns the majority class's accuracy by split, which is the same in all results of a task."""
    return next((results[name]["majority_accuracy"] for name in names if name in results), None)


def cola(results: dict[str, dict]) -> list[str]:
    """Shows every training on CoLA: best and last epoch on each split, with the command."""
    lines = trainings(results, TRAININGS, ("in_domain", "out_of_domain", "all"))
    names = [name for name, *_ in TRAININGS if name in results]
    return [*lines, *lora_minus_peft(results), *measured_on(results[name] for name in names)]


def mpnet_reviews(results: dict[str, dict]) -> list[str]:
    """Shows MPNet's LoRA on rotten_tomatoes."""
    lines = trainings(results, (REVIEWS,), ("validation",))
    return [*lines, *measured_on([results[REVIEWS[0]]] if REVIEWS[0] in results else [])]


def trainings(results: dict[str, dict], listed: Sequence[tuple[str, dict, str]], splits: Sequence[str]) -> list[str]:
    """Returns a table of trainings on one task: best and last epoch on each split, with the command."""
    rows, names = [], [name for name, *_ in listed]
    if share := majority(results, names):
        rows.append(["majority class", "", "", "", *(f"{share[split]:.3f} / 0" for split in splits), ""])
    # Two lines of each training, the best and the last epoch; the second one repeats no label.
    for name, labels, command in listed:
        result = results.get(name)
        for key, label in labels.items():
            if result is None:
                rows.append([label, NOT_RUN, "", "", *("" for _ in splits), f"`{command}`"])
                continue
            row = next(row for row in result["rows"] if row["name"] == key)
            for which in ("best", "last"):
                epochs = ", ".join(map(str, dict.fromkeys(row[f"{which}_epoch"])))
                first = which == "best"
                rows.append([label if first else "", seeds_of(result) if first else "", f"{which} ({epochs})",
                             f"{row['trainable']:,}" if first else "",
                             *(accuracy_and_mcc(row[which][split]) for split in splits),
                             f"`{with_precision(result['command'], label)}`" if first else ""])
    shown = [split.replace("_of_", "-of-").replace("_", "-") for split in splits]
    return table(["training", "seeds", "epoch", "trained parameters:", *shown, "command"], rows)


def other_problems(results: dict[str, dict]) -> list[str]:
    """Shows a regression of pairs and a multi-label task: scores of the best and the last epoch on the development file."""
    rows, commands = [], []
    for name, labels in OTHER_PROBLEMS:
        result = results.get(name)
        if result is None:
            rows += [[label, NOT_RUN, "", "", ""] for label in labels.values()]
            continue
        problem, (split, always) = PROBLEMS[result["problem"]], next(iter(result["always_the_same"].items()))
        commands.append(result["command"])
        # Once for each task: the model that always says the same.
        if "lora" in labels:
            said = ", ".join(f"{heading} {always[key]:.3f}" for key, heading in problem.shown.items())
            rows.append([labels["lora"].replace("`LoRA`", problem.baseline_name), "", "", said, ""])
        for key, label in labels.items():
            row = next(row for row in result["rows"] if row["name"] == key)
            said = []
            for which in ("best", "last"):
                scores = row[which][split]
                said.append(", ".join(f"{heading} {mean(scores[key])}" for key, heading in problem.shown.items()))
            rows.append([label, seeds_of(result), f"{row['trainable']:,}", *said])
    return [*table(["model", "seeds", "trained parameters:", "best epoch", "last epoch"], rows), "",
            *(["```", *(line for command in commands for line in wrapped(command)), "```"] if commands else []),
            *measured_on(results[name] for name, _ in OTHER_PROBLEMS if name in results)]


def lora_minus_peft(results: dict[str, dict]) -> list[str]:
    """Shows the difference of LoRA and PEFT's reference at equal budget, paired by seed, with 95 % intervals."""
    if not {"paper/lora", "paper/peft"} <= results.keys():
        return []
    one, other = (results[name]["entries"][0] for name in ("paper/lora", "paper/peft"))
    parts = []
    for which in ("best", "last"):
        splits = [f"{split.replace('_', '-')} {difference(one, other, which, split)}" for split in one[which]]
        parts.append(f"{which} epoch {', '.join(splits)}")
    return ["", f"LoRA minus PEFT at equal budget, MCC paired by seed, 95 % interval: {'; '.join(parts)}."]


def student(results: dict[str, dict]) -> list[str]:
    """Shows size and speed of a distillation's student next to its teacher's."""
    result = results.get("paper/distil")
    if result is None:
        return [f"Student against teacher, size and speed: {NOT_RUN}."]
    # The baseline is the same network as the student.
    return table(["model", "parameters:", "sentences a second:"], [
        [entry["entry"], f"{entry['parameters']:,}", mean(entry["sentences_per_second"], ",.0f")]
        for entry in result["entries"] if entry["entry"] != "scratch"])


def ablations(results: dict[str, dict]) -> list[str]:
    """Shows the paper's student and its variants: MCC of the best epoch, against the baseline and the first row."""
    splits, rows, studies = ("in_domain", "out_of_domain", "all"), [], {}
    for name in STUDENTS:
        if f"paper/{name}" in results:
            studies[name] = {entry["entry"]: entry for entry in results[f"paper/{name}"]["entries"]}
    first = studies.get("distil", {}).get("student")
    for name, flags in STUDENTS.items():
        label = f"`{' '.join(flags)}`" if flags else "as it is"
        if name not in studies:
            rows.append([label, NOT_RUN, "", "", "", "", ""])
            continue
        student, baseline = studies[name]["student"], studies[name].get("scratch")
        rows.append([label, *(mean(student["best"][split]["mcc"]) for split in splits),
                     mean(baseline["best"]["all"]["mcc"]) if baseline else "",
                     difference(student, baseline) if baseline else "",
                     difference(student, first) if first and name != "distil" else ""])
    # The strongest baseline of all: the student's own may be one that no teacher was needed to beat.
    best = max((entries["scratch"] for entries in studies.values() if "scratch" in entries), default=None,
               key=lambda baseline: baseline["best"]["all"]["mcc"]["mean"])
    said = difference(first, best) if first and best else NOT_RUN
    return ["```", *wrapped(COMMANDS["distil"]), "```", "",
            *table(["its own options", "in-domain:", "out-of-domain:", "all:", "baseline, all:",
                    "student minus it, all:", "minus the first row, all:"], rows), "",
            f"The first row's student minus the best baseline of all rows: {said}.",
            *measured_on(results[f"paper/{name}"] for name in studies)]


def polarity(results: dict[str, dict]) -> list[str]:
    """Shows teacher, student and baseline on sentence polarity: accuracy and MCC of best and last epoch."""
    study = results.get("paper/polarity")
    lines = ["```", *wrapped(study["command"] if study else COMMANDS["polarity"]), "```", ""]
    if study is None:
        return [*lines, f"MiniLM's student on rotten_tomatoes: {NOT_RUN}."]
    split, rows = study["selection"]["split"], []
    for entry in study["entries"]:
        best, last = (which in entry and accuracy_and_mcc(entry[which][split]) for which in ("best", "last"))
        # All seeds have one teacher, with no epochs of its own: its deviation is none.
        best = best if last else best.replace(" ± 0.000", "")
        rows.append([LABELS[entry["entry"]], f"{entry['parameters']:,}", best, last or ""])
    return [*lines, *table(["model", "parameters:", "accuracy / MCC, best epoch", "last epoch"], rows), "",
            f"Seeds: {seeds_of(study)}.{against(study, split)}", *measured_on([study])]


def difference(one: dict, other: dict, which: str = "best", split: str = "all") -> str:
    """Returns the difference of two entries in MCC, paired by seed, with the 95 % interval."""
    spread = paired_differences(one, other)[which][split]["mcc"]
    return f"{spread['mean']:+.3f}" + (" ({:+.3f} to {:+.3f})".format(*spread["interval"]) if spread["interval"] else "")


# ---------------------------------------------------------------- comparisons and sweeps

def comparison(name: str, results: dict[str, dict]) -> list[str]:
    """Shows a row for each entry of one of the paper's comparisons."""
    result = results.get(f"paper/{name}")
    lines = ["```", *wrapped(result["command"] if result else COMMANDS[name]), "```", ""]
    if result is None:
        return [*lines, f"{STUDIES[name]}: {NOT_RUN}."]
    split, done = result["selection"]["split"], [entry for entry in result["entries"] if "best" in entry]
    rows = [["majority class", "", "", f"{100 * done[0]['majority_accuracy'][split]:.1f} %", "0", "", "", "", ""]]
    for entry in result["entries"]:
        if entry not in done:
            rows.append([entry["entry"], "", "", "diverged", "", "", "", "", ""])
            continue
        # A method that trains nothing has neither a learning rate nor a last epoch.
        counts, rate = entry["parameters"], entry["learning_rate"]
        best, last = entry["best"][split], entry["last"][split]
        percent = counts["trainable_percent"]
        share = f"{percent:.2g}" if percent < 99.5 else "100"
        rows.append([entry["entry"], f"{counts['trainable']:,} ({share} %)",
                     "" if rate is None else f"{rate:g}", f"{mean(best['accuracy'], '.1f', 100)} %", mean(best["mcc"]),
                     "" if rate is None else f"{mean(last['accuracy'], '.1f', 100)} %",
                     f"{entry['seconds_per_epoch']:.3g} s", f"{entry['peak_memory_bytes'] / 2 ** 20:,.0f} MiB",
                     f"{entry['size_bytes'] / 1e6:.3g} MB"])
    return [*lines, *table(["entry", "trained parameters:", "learning rate:", "accuracy, best epoch:", "MCC:",
                            "accuracy, last epoch:", "an epoch:", "peak memory:", "on disk:"], rows), "",
            f"Seeds: {seeds_of(result)}.{against(result, split)}", *measured_on([result])]


def against(result: dict, split: str) -> str:
    """Returns sentences on the differences in accuracy between entries, paired by seed: one for each subtrahend."""
    said, spoken = {}, {name: f"the {label}" for name, label in LABELS.items()}
    for row in (row for row in result["differences"] if "best" in row):
        entry, minus = (spoken.get(row[which], f"`{row[which]}`") for which in ("entry", "minus"))
        spread = row["best"][split]["accuracy"]
        said.setdefault(minus, []).append(f"{entry} {100 * spread['mean']:+.1f} %" + (
            " ({:+.1f} to {:+.1f})".format(*(100 * end for end in spread["interval"])) if spread["interval"] else ""))
    return "".join(f" Accuracy minus that of {minus}, paired by seed, 95 % interval: {', '.join(rows)}."
                   for minus, rows in said.items())


def sweep(name: str, results: dict[str, dict]) -> list[str]:
    """Shows a grid over two options: the first one's values as rows, the second one's as columns."""
    result = results.get(f"paper/{name}")
    lines = ["```", *wrapped(result["command"] if result else COMMANDS[name]), "```", ""]
    if result is None:
        return [*lines, f"{STUDIES[name]}: {NOT_RUN}."]
    (row_option, row_values), (column_option, column_values) = result["search"].items()
    split = result["selection"]["split"]
    cells = {(trial["params"][row_option], trial["params"][column_option]): trial for trial in result["trials"]
             if trial["state"] == "complete"}

    def cell(at) -> str:
        if at not in cells:
            return ""
        scores = cells[at]["validation"][split]
        return f"{100 * scores['accuracy']:.1f} % / {scores['mcc']:.3f} ({cells[at]['parameters']['trainable']:,})"

    rows = []
    for value in row_values:
        rows.append([str(value), *(cell((value, other)) for other in column_values)])
    shares = " and ".join(f"`{option}` {100 * share:.0f} %" for option, share in (result["importance"] or {}).items())
    return [*lines, *table([row_option, *(f"{value}:" for value in column_values)], rows), "",
            *([f"Share of the scores' variance that each option explains (fANOVA): {shares}."] if shares else []),
            *measured_on([result])]


def buzzer(results: dict[str, dict]) -> list[str]:
    """Shows the comparison on buzzer, and logistic regression on the same numbers."""
    reference = results.get("paper/logistic")
    scores = next(iter(reference["splits"].values())) if reference else None
    said = f"{100 * scores['accuracy']:.1f} %, MCC {scores['mcc']:.3f}" if scores else NOT_RUN
    command = shown(reference) or COMMANDS["logistic"]
    return [*comparison("buzzer", results), "",
            f"scikit-learn's logistic regression on the same six numbers: {said} (`{command}`)."]


def with_precision(command: str, label: str) -> str:
    """Returns a training's command with the precision that its label names: `auto` is another one on another CPU."""
    return command + " --precision fp32" if "float32" in label and "--precision" not in command else command


# ---------------------------------------------------------------- the README's one table

def summary(results: dict[str, dict]) -> list[str]:
    """Shows the README's figures: accuracy and MCC of trainings, and factors of speed."""
    rows = []
    if share := majority(results, [name for name, *_ in TRAININGS]):
        rows.append(["CoLA, majority class", f"{share['all']:.3f} / 0", ""])
    for name, labels, command in TRAININGS:
        for key, label in labels.items() if name not in IN_DETAIL else ():
            result = results.get(name)
            said = accuracy_and_mcc(next(row for row in result["rows"] if row["name"] == key)["best"]["all"]
                                    ) if result else NOT_RUN
            typed_command = result["command"] if result else command
            rows.append([f"CoLA, {label}", said, f"`{with_precision(typed_command, label)}`"])
    label = STUDIES["methods"]
    if result := results.get("paper/methods"):
        split = result["selection"]["split"]
        rows += [[f"{label}, `{entry['entry']}`", accuracy_and_mcc(entry["best"][split]), f"`{result['command']}`"]
                 for entry in result["entries"] if entry.get("method") in ("lora", "full") and "best" in entry]
    else:
        rows.append([label, NOT_RUN, f"`{COMMANDS['methods']}`"])
    for program, end, label in HEADLINES:
        for result in results.values():
            # Older results do not say at which commit they were measured: docs/speed.md shows them, with that.
            if result.get("benchmark") != program or "--precision bf16" in result["command"] or (
                    not result["machine"].get("git_commit")):
                continue
            found = [row for row in (*result.get("targets", ()), *result.get("measurements", ()))
                     if row["what"].endswith(end)]
            # Of a measurement of all families the slowest one stands for all.
            of_all = "--family" in result["command"] and found
            if of_all:
                found = [min(found, key=lambda row: row["median"])]
            which = ", the slowest family" if of_all else ""
            rows += [[f"{label}{which} ({', '.join(filter(None, (row['what'].removesuffix(end), cpu_of(result))))})",
                      measured_row(row)[1], f"`{shown(result)}`"] for row in found]
    return table(["result", "accuracy / MCC, or times as fast", "command"], rows)


def architectures(results: dict[str, dict]) -> list[str]:
    """Shows what works with each architecture.

    Architectures with which everything works are listed by name, the others stand in a table with run.py's messages.
    """
    if "architectures" not in results:
        return [f"`python benchmarks/architectures.py`: {NOT_RUN}."]
    result = results["architectures"]
    outcomes, lines = result["outcomes"], {}

    # Equal messages share one number.
    def cell(outcome: str) -> str:
        word, _, line = ("yes", "", "") if outcome == "works" else ("yes", *outcome.partition(", ")[1:]) if (
            outcome.startswith("works, ")) else ("no", "", outcome)
        return f"{word} ({lines.setdefault(line, len(lines) + 1)})" if line else word

    whole = [name for name, found in outcomes.items() if set(found.values()) == {"works"}]
    rows = [[f"`{name}`", *map(cell, found.values())] for name, found in outcomes.items() if name not in whole]
    return [f"Of {len(outcomes)} architectures everything works with {len(whole)}: "
            f"{', '.join(f'`{name}`' for name in whole)}.", "",
            *table(["model type", *next(iter(outcomes.values()))], rows), "",
            *(f"{number}. {line}" for line, number in lines.items()), "", shown(result), *measured_on([result])]


SECTIONS = {"architectures": architectures, "summary": summary, "cola": cola, "mpnet-reviews": mpnet_reviews,
            "other-problems": other_problems,
            "student": student, "speed": speed, "measurements": measurements, "reliability": reliability,
            "buzzer": buzzer, "serving": lambda results: of_program("serving", results),
            "ablations": ablations, "polarity": polarity, "methods": lambda results: comparison("methods", results),
            "long": lambda results: comparison("long", results),
            "rank": lambda results: sweep("rank", results)}


# ---------------------------------------------------------------- pages

def pages() -> list[Path]:
    """Returns every page that may have a table."""
    return [ROOT / "README.md", HERE / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def read_results() -> dict[str, dict]:
    """Returns every result by the name of its file, those of the paper's recorded steps as paper/STEP."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))}
    return found | {f"paper/{path.stem}": of_step(path.stem, json.loads(path.read_text()))
                    for path in sorted((HERE / "results" / "paper").glob("*.json")) if path.stem in SHOWN}


def of_step(name: str, record: dict) -> dict:
    """Returns the study of a recorded step as a result; a step of TRAININGS with `rows`, as collect.py writes them."""
    study = json.loads(record["files"][STEPS[name].done])
    result = {**study, "command": typed(study["command"]), "git_commits": [study.get("git_commit")]}
    if f"paper/{name}" in (training for training, *_ in TRAININGS):
        result["rows"] = [_row_of(entry) for entry in study["entries"] if "last" in entry]
        result["majority_accuracy"] = study.get("majority_accuracy", study["entries"][0].get("majority_accuracy"))
    return result


def _row_of(entry: dict) -> dict:
    """Returns an entry of a study in the form of a collected row."""
    row = {"name": entry["entry"], "trainable": _trained(entry["parameters"]), "best": entry["best"], "last": entry["last"]}
    for key in ("best_epoch", "last_epoch"):
        row[key] = [int(epoch) for epoch in entry[key]["values"]]
    return row


def _trained(parameters: int | dict) -> int:
    """Returns the number of trained parameters; a student has a single number, because all of its parameters train."""
    return parameters["trainable"] if isinstance(parameters, dict) else parameters


def filled(page: str, results: dict[str, dict]) -> str:
    """Returns the page with its marked sections replaced.

    Raises:
        KeyError: a section has a name that is neither one of SECTIONS nor a program's.
    """
    def section(match: re.Match) -> str:
        name = match[2]
        if name not in SECTIONS and not (HERE / f"{name}.py").exists():
            raise KeyError(f"{name}: no section of this name, and no benchmarks/{name}.py")
        lines = SECTIONS[name](results) if name in SECTIONS else of_program(name, results)
        return match[1] + "\n" + "\n".join(lines) + "\n\n" + match[3]

    return MARKED.sub(section, page)


if __name__ == "__main__":
    known = read_results()
    for path in pages():
        path.write_text(filled(path.read_text(), known))
