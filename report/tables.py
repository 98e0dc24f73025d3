"""Makes the LaTeX tables of one run: results, epochs, options, provenance."""

import math

from report.latex import breakable, escape, grouped, plain, shown, tabular
from report.records import BASELINE, STUDENTS, Record, by_class, last_stage, main_split, model_name, spoken

METHODS = {"lora": "LoRA", "full": "full fine-tuning", "head": "head alone", "features": "features alone",
           "none": "untrained head", "bitfit": "BitFit", "ia3": "IA3"}


def epochs(metrics: list[Record]) -> str:
    """Makes the table of every epoch, on training data and each split; of a distillation one student below the other."""
    metrics = last_stage(metrics)
    scores, phase = {"accuracy": r"acc.\,\%", "mcc": "MCC"}, None
    held_out = {"loss": "CE"} | scores
    # The objective of a student holds the KD term: its cross-entropy alone can be compared with the others.
    train = ({"loss": "obj."} if "phase" in metrics[0] else {}) | {"cross_entropy": "CE"} | scores
    splits = list(metrics[0].section("validation"))
    groups = {"train": list(train.values())} | {split: list(held_out.values()) for split in splits}
    columns, rows = 2 + sum(map(len, groups.values())), []
    for row in metrics:
        # A line with the name of the student stands above its epochs.
        if row.get("phase") != phase:
            phase = row["phase"]
            rows.append([rf"\multicolumn{{{columns}}}{{l}}{{\emph{{{escape(model_name(phase))}}}}}"])
        parts = [(row.section("train"), train)] + [(row.section("validation").section(s), held_out) for s in splits]
        rate = f"{row.number('learning_rate'):.1e}".replace("-", "$-$")
        rows.append([shown("epoch", row.number("epoch")), rate]
                    + [shown(key, part.number(key)) for part, keys in parts for key in keys])
    return tabular("r" * columns, grouped(["ep.", "rate"], groups), rows, "longtable*")


def _results(runs: dict[str, Record]) -> str:
    """Makes the table of accuracy and MCC on every split: the majority class, then best and last epoch of each model."""
    splits = next(iter(runs.values())).section("validation")
    majority = [shown("accuracy", splits.section(split).number("majority_accuracy")) for split in splits]
    # The majority class first: no accuracy is read without it.
    rows = [["majority class", "--"] + [cell for accuracy in majority for cell in (accuracy, "0")]]
    for name, run in runs.items():
        for which, key in (("best", "validation"), ("last", "last_validation")):
            if key in run:
                # The teacher of a distillation has scores but no epoch: it was trained elsewhere.
                epoch = f"{run[f'{which}_epoch']} ({which})" if f"{which}_epoch" in run else "--"
                parts = [run.section(key).section(split) for split in splits]
                rows.append([name, epoch] + [shown(k, part.number(k)) for part in parts for k in ("accuracy", "mcc")])
    head = grouped(["model", "epoch"], {split: [r"acc.\,\%", "MCC"] for split in splits})
    return tabular("ll" + "rr" * len(splits), head, rows)


def config_tables(config: Record, prefix: str) -> dict[str, str]:
    """Makes two tables of config.json, named by `prefix`: the options as resolved, and the provenance of the run.

    The options include the architecture of a student, two to a line. The provenance is command, git commit, versions and
    SHA-256 of the data files.
    """
    def typed(value: object) -> str:
        return rf"\texttt{{{breakable(plain(value))}}}"

    pairs = [[typed(name), typed(value)] for name, value in config.section("options").items()]
    pairs += [[typed(f"student {name}"), typed(value)] for name, value in (config.get("architecture") or {}).items()]
    half = (len(pairs) + 1) // 2
    # An odd number leaves the last line with its left half alone.
    two = [left + right for left, right in zip(pairs[:half], [*pairs[half:], ["", ""]], strict=False)]
    versions = [f"{name} {version}" for name, version in config.section("versions").items()]
    rows = [["command", typed(config["command"])], ["git commit", typed(config["git_commit"])],
            ["versions", typed(versions)]]
    rows += [["data", typed(f"{path} SHA-256: {sha}")] for path, sha in config.section("data_files").items()]
    return {f"{prefix}_options": tabular("@{}lL{4.2cm}lL{4.2cm}@{}", "option & value & option & value", two),
            f"{prefix}_provenance": tabular("@{}lL{13.2cm}@{}", "item & value", rows)}


def _classes(summary: Record) -> str:
    """Makes the table of precision, recall and F1 of each class at the best epoch."""
    scores = by_class(summary)[1].section("per_class")
    keys = ("n", "precision", "recall", "f1")
    rows = []
    for name in scores:
        own = scores.section(name)
        # Like an MCC, the three scores are shown with 3 decimals.
        rows.append([breakable(name)] + [shown("n" if key == "n" else "mcc", own.number(key)) for key in keys])
    return tabular("lrrrr", "class & rows & precision & recall & F1", rows)


def lora_tables(summary: Record) -> tuple[dict[str, str], dict[str, object]]:
    """Makes the tables of a LoRA run alone, and its result on the split that chose the epoch."""
    split = main_split(summary.section("validation"))
    tables = {"lora_results": _results({METHODS.get(summary["method"], summary["method"]): summary})}
    if "by_class" in summary:
        tables["lora_classes"] = _classes(summary)
    return tables, {"chosen": summary["validation"].section(split) | {"split": spoken(split)}}


def distil_tables(summary: Record) -> tuple[dict[str, str], dict[str, object]]:
    """Makes the tables of a distillation alone (accuracy and MCC; size and speed) and the numbers derived from them."""
    # Runs with --no-control have no baseline.
    models = {key: summary.section(key) for key in ("teacher", *STUDENTS) if key != BASELINE or key in summary}
    teacher = models["teacher"]
    split = main_split(teacher.section("validation"))
    numbers, sizes = {"chosen": {"split": spoken(split)}}, []
    for key, model in models.items():
        # A speed or size of 0 was not measured: the ratio to it is NaN, which prints as n/a.
        size, speed = model.number("parameters"), model.number("sentences_per_second")
        smaller = round(teacher.number("parameters") / (size or math.nan), 1)
        faster = round(speed / (teacher.number("sentences_per_second") or math.nan), 1)
        chosen = model.section("validation").section(split)
        numbers["baseline" if key == BASELINE else key] = {"chosen": chosen, "smaller": smaller, "faster": faster}
        sizes.append([model_name(key)] + [shown("", cell) for cell in (size, smaller, speed, faster)])
    if "baseline" in numbers:
        student, baseline = numbers["student"]["chosen"], numbers["baseline"]["chosen"]
        numbers["gain"] = {key: student.number(key) - baseline.number(key) for key in ("accuracy", "mcc")}
    head = r"model & parameters & smaller ($\times$) & sentences/s & faster ($\times$)"
    # Several teachers stand above their mean, so that its worth beyond the best of them can be read.
    members = {f"teacher {number}": member for number, member in enumerate(teacher.get("members", []), 1)}
    named = {"mean of teachers" if members and key == "teacher" else model_name(key): model for key, model in models.items()}
    return {"distil_results": _results(members | named),
            "distil_size": tabular("lrrrr", head, sizes)}, numbers
