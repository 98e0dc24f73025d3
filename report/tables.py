"""Makes LaTeX tables of one run: results, epochs, options, provenance."""

import math

from report.latex import breakable, escape, grouped, plain, shown, tabular
from report.records import PHASES, Record, by_class, last_stage, main_split, spoken

METHODS = {"lora": "LoRA", "full": "full fine-tuning", "head": "head alone", "features": "features alone",
           "none": "untrained head"}



def epochs(metrics: list[Record]) -> str:
    """Makes a table of every epoch, training and each split; a distillation's two students one below the other."""
    metrics = last_stage(metrics)
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
    return tabular("r" * columns, grouped(["ep.", "rate"], groups), rows, "longtable*")


def _results(runs: dict[str, Record]) -> str:
    """Makes a table of accuracy and MCC on every split: the majority class, then each model's best and last epoch."""
    splits = next(iter(runs.values())).section("validation")
    majority = [shown("accuracy", splits.section(split).number("majority_accuracy")) for split in splits]
    rows = [["majority class", "--"] + [cell for accuracy in majority for cell in (accuracy, "0")]]
    for name, run in runs.items():
        for which, key in (("best", "validation"), ("last", "last_validation")):
            if key in run:
                epoch = f"{run[f'{which}_epoch']} ({which})" if f"{which}_epoch" in run else "--"
                parts = [run.section(key).section(split) for split in splits]
                rows.append([name, epoch] + [shown(k, part.number(k)) for part in parts for k in ("accuracy", "mcc")])
    head = grouped(["model", "epoch"], {split: [r"acc.\,\%", "MCC"] for split in splits})
    return tabular("ll" + "rr" * len(splits), head, rows)


def config_tables(config: Record, prefix: str) -> dict[str, str]:
    """Makes tables of every option as resolved (a student's architecture too), two to a line, and of command, versions
    and hashes of the data.
    """
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
    return {f"{prefix}_options": tabular("@{}lL{4.2cm}lL{4.2cm}@{}", "option & value & option & value", two),
            f"{prefix}_provenance": tabular("@{}lL{13.2cm}@{}", "what & value", rows)}


def _classes(summary: Record) -> str:
    """Makes a table of precision, recall and F1 of each class at the best epoch."""
    scores = by_class(summary)[1].section("per_class")
    keys = ("n", "precision", "recall", "f1")
    rows = [[breakable(name)] + [shown("mcc" if key != "n" else key, scores.section(name).number(key)) for key in keys]
            for name in scores]
    return tabular("lrrrr", "class & rows & precision & recall & F1", rows)


def lora_tables(summary: Record) -> tuple[dict[str, str], dict[str, object]]:
    """Makes a LoRA run's own tables, and its result on the split that chose the epoch."""
    split = main_split(summary.section("validation"))
    tables = {"lora_results": _results({METHODS.get(summary["method"], summary["method"]): summary})}
    if "by_class" in summary:
        tables["lora_classes"] = _classes(summary)
    return tables, {"chosen": summary["validation"].section(split) | {"split": spoken(split)}}


def distil_tables(summary: Record) -> tuple[dict[str, str], dict[str, object]]:
    """Makes a distillation's own tables (accuracy and MCC; size and speed) and its derived numbers."""
    models = {key: summary.section(key) for key in ("teacher", *PHASES) if key != "scratch" or key in summary}
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
    if "scratch" in numbers:  # else --no-control
        student, scratch = numbers["student"]["chosen"], numbers["scratch"]["chosen"]
        numbers["gain"] = {key: student.number(key) - scratch.number(key) for key in ("accuracy", "mcc")}
    head = r"model & parameters & smaller ($\times$) & sentences/s & faster ($\times$)"
    return {"distil_results": _results({PHASES.get(key, key): model for key, model in models.items()}),
            "distil_size": tabular("lrrrr", head, sizes)}, numbers
