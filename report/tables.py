"""Makes the LaTeX tables of one run: splits, results, classes, epochs, stages, parts of the models, options, provenance."""

import math
import re
from collections.abc import Callable

from report.latex import breakable, cell, escape, grouped, plain, shown, tabular
from report.records import BASELINE, STUDENTS, Record, last_stage, model_name, shown_splits, spoken
from report.runs import Run
from report.scores import SCORES, without_input

METHODS = {"lora": "LoRA", "full": "full fine-tuning", "head": "head alone", "features": "features alone",
           "none": "untrained head", "bitfit": "BitFit", "ia3": "IA3"}
STAGES = {"pretrain": "pretraining", "transfer": "transfer set", "gold": "training set"}



# ---------------------------------------------------------------- the data

def splits(run: Run) -> str:
    """Makes the table of the splits: rows, and of the development splits those of each class."""
    validation, rows = run.result.section("validation"), run.config.get("rows", {})
    found = run.result.get("by_class", {})
    classes = list(run.by_class().get("per_class", {})) if run.problem == "single-label" else []
    # Beyond eight classes a column for each would not fit: the table of the classes has the numbers of one split.
    classes = classes if len(classes) <= 8 else []
    lines = [["training", shown("n", rows["train"])] + ["--" for _ in classes]] if "train" in rows else []
    for split in validation:
        counts = found[split].section("per_class") if split in found else {}
        lines.append([escape(spoken(split)), shown("n", validation.section(split).number("n")),
                      *(shown("n", counts.section(name).number("n")) if name in counts else "--" for name in classes)])
    head = ["split", "rows", *(escape(run.class_names.get(name, name)) for name in classes)]
    return tabular("lr" + "r" * len(classes), " & ".join(head), lines)


# ---------------------------------------------------------------- scores

def results(run: Run, models: dict[str, Record]) -> str:
    """Makes the table of the scores on every split: a model that ignores its input, then best and last epoch of each."""
    validation, keys = next(iter(models.values())).section("validation"), run.keys

    def cells(scores: Record, key_of: Callable[[Record, str], float]) -> list[str]:
        return [SCORES[key].shown(key_of(scores.section(split), key)) for split in validation for key in keys]

    # First: no accuracy is read without it.
    nothing = "majority class" if run.problem == "single-label" else "ignoring the text"
    floor = [text.replace("n/a", "--") for text in cells(validation, without_input)]
    rows = [[nothing, "--", *floor]] if set(floor) != {"--"} else []
    for name, model in models.items():
        for which, key in (("best", "validation"), ("last", "last_validation")):
            if key in model:
                # The teacher of a distillation has scores but no epoch: it was trained elsewhere.
                epoch = f"{model[f'{which}_epoch']} ({which})" if f"{which}_epoch" in model else "--"
                rows.append([name, epoch, *cells(model.section(key), Record.number)])
                name = ""
    columns = [SCORES[key].column for key in keys]
    head = grouped(["model", "epoch"], dict.fromkeys(validation, columns))
    return tabular("ll" + "r" * len(keys) * len(validation), head, rows)


def classes(run: Run) -> str:
    """Makes the table of precision, recall and F1 of each class at the best epoch."""
    scores = run.by_class().section("per_class")
    # A score that the classes lack is no column.
    first = next(iter(scores.values()))
    keys, rows = [key for key in ("n", "precision", "recall", "f1") if key in first], []
    for name in scores:
        own = scores.section(name)
        # Like an MCC, the three scores are shown with 3 decimals.
        rows.append([breakable(run.class_names.get(name, name)),
                     *(shown("n" if key == "n" else "mcc", own.number(key)) for key in keys)])
    names = {"n": "rows", "f1": "F1"}
    head = ["class", *(names.get(key, key) for key in keys)]
    # Up to four classes stand next to a figure. A longer table breaks over pages, so that it stays with its caption.
    return tabular("l" + "r" * len(keys), " & ".join(head), rows, "longtable*" if len(rows) > 4 else "tabular")


def epochs(run: Run) -> str:
    """Makes the table of every epoch of every stage, on training data and each split; one student below the other."""
    last = last_stage(run.metrics)
    distil, keys = "phase" in run.metrics[0], run.keys
    # `all` is in- and out-of-domain together, and a group of columns too many.
    names = shown_splits(list(last[0].section("validation")))
    # The objective of a student holds the KD term: its cross-entropy alone can be compared with the others.
    single = run.problem == "single-label"
    asked = dict.fromkeys([*(["loss"] if distil or not single else []), *(["cross_entropy"] if single else []), *keys])
    train, held_out = [key for key in asked if key in last[0].section("train")], ["loss", *keys]
    columns = {"loss": "CE" if single else "loss", "cross_entropy": "CE"} | {key: SCORES[key].column for key in keys}
    objective = columns | ({"loss": "obj."} if distil else {})
    own_columns = [columns[key] for key in held_out]
    groups = {"train": [objective[key] for key in train]} | dict.fromkeys(names, own_columns)
    width, rows, part = 2 + sum(map(len, groups.values())), [], None
    for row in run.metrics:
        # A line with the names of student and stage stands above its epochs.
        if (now := (row.get("phase"), row.get("stage"))) != part and distil:
            part = now
            stage = f", {STAGES.get(now[1], now[1])}" if now[1] else ""
            rows.append([rf"\multicolumn{{{width}}}{{l}}{{\emph{{{escape(model_name(now[0]) + stage)}}}}}"])
        own = row.section("validation")
        # Rows held out of pretraining have a loss and no classes, which is no score of a development split.
        parts = [(row.section("train"), train)] + [(own.section(s) if s in own else {}, held_out) for s in names]
        rate = f"{row.number('learning_rate'):.1e}".replace("-", "$-$")
        rows.append([shown("epoch", row.number("epoch")), rate,
                     *(_score(values, key) for values, some in parts for key in some)])
    return tabular("r" * width, grouped(["ep.", "rate"], groups), rows, "longtable*")


def _score(values: Record | dict, key: str) -> str:
    """Returns a loss or score as LaTeX; empty if it was not recorded."""
    if key not in values:
        return ""
    return SCORES[key].shown(values.number(key)) if key in SCORES else shown("loss", values.number(key))


# ---------------------------------------------------------------- distillation

def models_of(summary: Record) -> dict[str, Record]:
    """Returns teacher, student and baseline by their recorded names; runs with --no-control have no baseline."""
    return {key: summary.section(key) for key in ("teacher", *STUDENTS) if key != BASELINE or key in summary}


def speed_error(models: dict[str, Record]) -> float:
    """Returns the share by which the measured speeds of student and baseline differ, NaN if one was not measured.

    They are one network: their difference is the error of the measurement.
    """
    speeds = [models[key].number("sentences_per_second") for key in STUDENTS if key in models]
    return max(speeds) / min(speeds) - 1 if len(speeds) == 2 and min(speeds) > 0 else math.nan


def sizes(models: dict[str, Record]) -> tuple[str, dict[str, dict[str, object]]]:
    """Makes the table of sizes and speeds, and returns it with the ratios to the teacher of each model."""
    teacher, rows, ratios = models["teacher"], [], {}
    for key, model in models.items():
        # A speed or size of 0 was not measured: the ratio to it is NaN, which prints as n/a.
        size, speed = model.number("parameters"), model.number("sentences_per_second")
        smaller = round(teacher.number("parameters") / (size or math.nan), 1)
        faster = round(speed / (teacher.number("sentences_per_second") or math.nan), 1)
        ratios[key] = {"smaller": smaller, "faster": faster, "fewer_percent": 100 * (1 - size / teacher.number("parameters"))
                       if teacher.number("parameters") else math.nan}
        rows.append([model_name(key)] + [shown("", value) for value in (size, smaller, speed, faster)])
    head = r"model & parameters & smaller ($\times$) & texts/s & faster ($\times$)"
    return tabular("lrrrr", head, rows), ratios


def stages(run: Run) -> str:
    """Makes the table of the stages of both students: epochs, steps, best epoch, and the scores there."""
    rows, keys, split = [], run.keys, run.split
    for key in STUDENTS:
        if key not in run.summary:
            continue
        model = run.summary.section(key)
        alone = {"stage": "gold", "best_epoch": model["best_epoch"], "validation": model["validation"],
                 **model.get("train", run.summary.get("train", {}))}
        for number, stage in enumerate(model.get("stages") or [Record(alone, run.summary.source)]):
            scores = stage.section("validation").get(split, {})
            tokens = stage.get("tokens")
            rows.append(["" if number else model_name(key), STAGES.get(stage["stage"], escape(stage["stage"])),
                         *(shown(name, stage.get(name)) for name in ("epochs", "steps")),
                         "n/a" if tokens is None else f"{tokens / 1e6:.2f}", shown("seconds", stage.get("seconds")),
                         shown("best_epoch", stage["best_epoch"]), *(_score(scores, name) or "--" for name in keys)])
    scores = " & ".join(SCORES[key].column for key in keys)
    return tabular("llrrrrr" + "r" * len(keys),
                   f"model & stage & epochs & steps & $10^6$ tokens & seconds & best epoch & {scores}", rows)


def architecture(run: Run) -> str:
    """Makes the table of the student's parts: sizes, parameters, share of all."""
    shape, tensors = run.config.get("architecture") or {}, run.tensors("student.safetensors")

    def size(name: str) -> object:
        return shape.get(name, "n/a")

    directions = {1: "forward alone", 2: "both directions"}.get(shape.get("directions", 2), "n/a")
    own = shape.get("vocabulary")
    layers = shape.get("rnn_layers", 1)
    said = {
        "embedding": f"{own or size('vocab_size'):,} x {size('embedding_size')}"
                     + (f", rows shared by {size('vocab_size'):,} tokens" if own else "")
                     if shape.get("vocab_size") else "n/a",
        "rnn": f"{str(size('cell')).upper()}, {layers} layer{'s' if layers != 1 else ''}, {directions}, state of "
               f"{size('hidden_size')} in each direction",
        "attention": "attention: a score for each token, softmax over the sentence",
        "classifier": f"linear, {shape.get('directions', 2) * shape['hidden_size']} to {size('num_labels')}"
                      if "hidden_size" in shape else "linear"}
    names = {"embedding": "token embeddings", "rnn": "recurrent layers", "attention": "pooling",
             "classifier": "classifier"}
    counts: dict[str, int] = {}
    for name, shape_of in tensors.items():
        part = name.partition(".")[0]
        counts[part] = counts.get(part, 0) + math.prod(shape_of)
    total = run.summary.section("student").number("parameters")
    counts = counts or _counted(shape, total)
    rows = []
    for part in (*names, *(set(counts) - set(names))):
        if part == "attention" and part not in counts:
            rows.append([names[part], escape(f"{size('pooling')} over the real tokens"), "0", "0.0"])
            continue
        count = counts.get(part)
        rows.append([names.get(part, escape(part)), cell(said.get(part, "")).replace(" x ", r" $\times$ "),
                     "n/a" if count is None else f"{count:,}", "n/a" if count is None else f"{100 * count / total:.1f}"])
    rows.append([r"\midrule all", "", shown("", total), "100.0"])
    return tabular("llrr", r"part & layers and sizes & parameters & share (\%)", rows)


def _counted(shape: dict, total: float) -> dict[str, int]:
    """Returns the parameters of each part by the sizes, where the weights are not at hand; none if they do not add up."""
    gates = {"lstm": 4, "gru": 3}.get(shape.get("cell"))
    needed = ("vocab_size", "embedding_size", "hidden_size", "num_labels")
    if gates is None or any(name not in shape for name in needed):
        return {}
    size, directions, width = shape["hidden_size"], shape.get("directions", 2), shape["embedding_size"]
    tables = 2 if shape.get("frozen_embeddings") else 1
    counts = {"embedding": tables * (shape.get("vocabulary") or shape["vocab_size"]) * width, "rnn": 0,
              "classifier": (directions * size + 1) * shape["num_labels"]}
    if shape.get("pooling") == "attention":
        counts["attention"] = directions * size
    inputs = tables * width
    for _ in range(shape.get("rnn_layers", 1)):
        # PyTorch's cells have two biases.
        counts["rnn"] += directions * gates * size * (inputs + size + 2)
        inputs = directions * size
    return counts if sum(counts.values()) == total else {}


# ---------------------------------------------------------------- LoRA

def adapted(run: Run) -> str:
    """Makes the table of the trained parameters of an adapter by module, layers together; empty without its weights."""
    groups: dict[str, list[int]] = {}
    for name, shape in run.tensors("adapter_model.safetensors").items():
        # The module's name without PEFT's prefix, the number of its layer and the name of its matrix.
        module, _, matrix = name.removeprefix("base_model.model.").partition(".lora_")
        module = re.sub(r"\.\d+\.", ".*.", module.removesuffix(".weight"))
        rank = min(shape) if matrix and len(shape) == 2 else 0
        count, total, ranks, layers = groups.setdefault(module, [0, 0, 0, 0])
        groups[module] = [count + 1, total + math.prod(shape), max(ranks, rank), layers + matrix.startswith("A")]
    rows = [[rf"\texttt{{{breakable(module)}}}", str(layers or 1), str(rank or "--"), f"{total:,}"]
            for module, (_, total, rank, layers) in groups.items()]
    together = sum(total for _, total, _, _ in groups.values())
    return tabular("lrrr", "module & layers & rank & trained", [*rows, [r"\midrule all", "", "", f"{together:,}"]]
                   ) if rows else ""


# ---------------------------------------------------------------- calibration

def calibrations(runs: dict[str, Run]) -> str:
    """Makes the table of the calibrated runs: temperature, error and loss before and after; empty without any."""
    rows = []
    for name, run in runs.items():
        if (found := run.calibration()) is None:
            continue
        before, after = found.section("before"), found.section("after")
        threshold = "--" if found.get("threshold") is None else f"{found.number('threshold'):.3f}"
        rows.append([name, shown("n", found.number("n")), f"{found.number('temperature'):.3f}",
                     *(f"{part.number(key):.3f}" for key in ("ece", "nll") for part in (before, after)), threshold])
    head = grouped(["model", "rows", "temperature"], {"ECE": ["before", "after"], "loss (nats)": ["before", "after"]},
                   ["threshold"])
    return tabular("lrrrrrrr", head, rows) if rows else ""


# ---------------------------------------------------------------- options and provenance

def config_tables(config: Record, prefix: str) -> dict[str, str]:
    """Makes two tables of config.json, named by `prefix`: the options as resolved, and the provenance of the run.

    The options stand two to a line. The provenance is command, git commit, versions and SHA-256 of the data files.
    """
    def typed(value: object) -> str:
        return rf"\texttt{{{breakable(plain(value))}}}"

    pairs = [[typed(name), typed(value)] for name, value in config.section("options").items()]
    half = (len(pairs) + 1) // 2
    # An odd number leaves the last line with its left half alone.
    two = [left + right for left, right in zip(pairs[:half], [*pairs[half:], ["", ""]], strict=False)]
    versions = [f"{name} {version}" for name, version in config.section("versions").items()]
    machine = [f"{key} {config[key]}" for key in ("cpu", "device", "threads", "processes") if key in config]
    rows = [["command", typed(config["command"])], ["git commit", typed(config["git_commit"])],
            ["versions", typed(versions)], *([["machine", typed(machine)]] if machine else [])]
    rows += [["data", typed(f"{path} SHA-256: {sha}")] for path, sha in config.section("data_files").items()]
    return {f"{prefix}_options": tabular("@{}lL{4.2cm}lL{4.2cm}@{}", "option & value & option & value", two, "longtable*"),
            f"{prefix}_provenance": tabular("@{}lL{13.2cm}@{}", "item & value", rows)}


# ---------------------------------------------------------------- all of a run

def tables_of(run: Run) -> tuple[dict[str, str], dict[str, object]]:
    """Makes the tables of a run, by the name of their file, and the numbers derived from its results."""
    summary, prefix = run.summary, run.summary["mode"].lower()
    tables = {f"{prefix}_splits": splits(run)}
    if run.metrics:
        tables[f"{prefix}_epochs"] = epochs(run)
    if "per_class" in run.by_class():
        tables[f"{prefix}_classes"] = classes(run)
    tables |= config_tables(run.config, prefix)
    if prefix == "lora":
        method = METHODS.get(summary["method"], summary["method"])
        tables["lora_results"] = results(run, {method: summary})
        if summary["method"] == "lora" and (table := adapted(run)):
            tables["lora_adapted"] = table
        return tables, {"chosen": summary["validation"].section(run.split) | {"split": spoken(run.split)}}
    models = models_of(summary)
    # Several teachers stand above their mean, so that its worth beyond the best of them can be read.
    members = {f"teacher {number}": member for number, member in enumerate(models["teacher"].get("members", []), 1)}
    named = {"mean of teachers" if members and key == "teacher" else model_name(key): model for key, model in models.items()}
    tables["distil_results"] = results(run, members | named)
    tables["distil_size"], ratios = sizes(models)
    tables |= {"distil_stages": stages(run), "distil_architecture": architecture(run)}
    numbers = {"chosen": {"split": spoken(run.split)}}
    for key, model in models.items():
        chosen = model.section("validation").section(run.split)
        numbers["baseline" if key == BASELINE else key] = {"chosen": chosen, **ratios[key]}
    return tables, numbers
