"""Writes the sentences of the report that depend on the runs: abstract, task, hyperparameters, conclusion.

    texts(Run(Path("runs/LoRA-12345")), None, [])["text.abstract"]

Every sentence is made from recorded numbers; one that needs a number that is not there is left out.
"""

import math
import shlex
from typing import NamedTuple

from report.latex import breakable, escape, shown
from report.records import BASELINE, Record, spoken
from report.runs import Run
from report.scores import LOSSES, SCORES, without_input
from report.tables import METHODS, models_of, sizes, speed_error

# Facts about tasks by name; a table of the user's own is described by its numbers alone.
TASKS = {
    "cola": (
        r"The Corpus of Linguistic Acceptability (CoLA) \cite{warstadt2018} holds sentences from the linguistics "
        r"literature, each with its authors' judgement: acceptable or not. The in-domain split is from the "
        r"publications of the training set, the out-of-domain split from others; GLUE's validation set \cite{wang2018} "
        r"is the two together. The labels of the test set are not public, and nothing here is a test score."),
    "tiny": (
        r"The task is built in, so that everything runs without a download: a small grammar of English makes minimal "
        r"pairs, as BLiMP does \cite{warstadt2020}. Two templates, of which the second has one violation, are filled "
        r"with the same words, and a row is either side of a pair: an acceptable sentence or an unacceptable one. The "
        r"words of the out-of-domain split, and in part its phenomena, are held out from training. The built-in "
        r"language model learned from acceptable sentences alone, none of them of this task: like GPT-2, it knows the "
        r"language and has never seen a judgement. The task checks the machinery in minutes; it says nothing about "
        r"English."),
    "edits": (
        r"The task is to tell plain sentences from sentences that were edited in one place; its labels cost nothing."),
    "rotten_tomatoes": (
        r"The task is the polarity of single sentences of film reviews (Pang and Lee, 2005)."),
    "imdb": (
        r"The task is the polarity of whole film reviews."),
    "buzzer": (
        r"The task is to tell whether a guess at a quiz-bowl question is right."),
}
# Of methods other than LoRA.
METHOD_TEXTS = {
    "full": "Every weight of the backbone and the head is trained.",
    "head": "The backbone is frozen; the classification head alone is trained, on hidden states that are computed once.",
    "features": "The numeric features alone are read, by a linear head; the text plays no part.",
    "none": "Nothing is trained: the untrained head is scored as it is, the floor of every comparison.",
    "bitfit": "The biases and the head alone are trained; all matrices stay frozen.",
    "ia3": "Vectors that scale keys, values and the inner states of the feed-forward networks are trained, and the head."}
# Options that say where a run ran, and not how it trained.
PLACES = ("data", "model", "task", "out", "plots", "teacher", "threads", "device", "seeds", "overwrite", "resume", "text",
          "no-plots", "cache", "jobs", "init", "limit", "text-column", "label-column", "no-control")
# The share by which two networks of one size may be measured apart where a ratio of speeds is to mean something.
MOST_ERROR = 0.1
# The search that would choose the options of a LoRA run.
SWEEP = "--search rank=4,8,16 --search lr=1e-4..1e-3 --trials 20"


class Seeds(NamedTuple):
    """The results of several seeds of one mode: the study seeds.json."""

    mode: str
    study: Record

    def mean(self, entry: str | None, split: str, key: str) -> Record | None:
        """Returns mean and interval of an entry at the best epoch; None if the study lacks them."""
        for row in self.study["entries"]:
            if row["entry"] == entry and "best" in row and split in row["best"]:
                return row["best"][split].get(key)
        return None

    def difference(self, one: str, other: str, split: str, key: str) -> Record | None:
        """Returns the difference of two entries paired by seed."""
        for row in self.study.get("differences", []):
            if (row["entry"], row["minus"]) == (one, other) and "best" in row and split in row["best"]:
                return row["best"][split].get(key)
        return None


def texts(lora: Run | None, distil: Run | None, studies: dict[str, Record]) -> dict[str, str]:
    """Returns the sentences and flags of the report, by key.

    Args:
        lora, distil: the runs that exist.
        studies: compare.json, sweep.json and the two seeds.json of this SR that exist, by `compare`, `sweep`, `seeds.LoRA`,
            `seeds.distil`.
    """
    run = lora or distil
    if run is None:
        return {}
    found = {f"is.{flag}": "yes" for flag in _flags(lora, distil)}
    title = _title(lora, distil)
    found |= {"text.title": title, "text.title.plain": title.replace(r"\\", " "), "text.abstract": _abstract(lora, distil),
              "text.task": _task(run), "text.classes": _classes(run), "text.conclusion": _conclusion(lora, distil, studies),
              "task.k": "1" if run.problem == "regression" else str(len(run.classes)),
              "task.name": breakable(run.summary["task"]), "task.model": breakable(run.summary["model"]),
              "task.loss": LOSSES[run.problem],
              "task.chosen": SCORES[_main_score(run)].name}
    if lora is not None and distil is not None and lora.summary["task"] != distil.summary["task"]:
        found["text.othertask"] = rf"The distillation is on another task, \texttt{{{breakable(distil.summary['task'])}}}."
    if lora is not None:
        found["text.method"] = METHOD_TEXTS.get(lora.summary["method"], "")
        found["text.hyper.lora"] = _hyperparameters(lora, studies)
    if distil is not None:
        found["text.speed"] = _speed(distil)
        found["text.hyper.distil"] = _hyperparameters(distil, {})
    for key, value in run.config.get("backbone", {}).items():
        found[f"backbone.{key}"] = shown(key, value)
    return found


def _flags(lora: Run | None, distil: Run | None) -> list[str]:
    """Returns the names of the parts that the report shows."""
    run = lora or distil
    flags = [run.problem, "lora" if lora else "nolora", "distil" if distil else "nodistil"]
    if run.problem == "single-label":
        flags.append("binary" if len(run.classes) == 2 else "multiclass")
        flags += ["few"] if len(run.classes) <= 4 and run.has_confusion() else []
    backbone = run.config.get("backbone", {})
    if "decoder" in backbone:
        flags.append("decoder" if backbone["decoder"] else "encoder")
    flags += ["gpt2"] if backbone.get("kind") == "gpt2" else []
    for one in (one for one in (lora, distil) if one is not None):
        if len(one.result.section("validation")) > 1:
            flags.append("splits")
    if lora is not None:
        method = lora.summary["method"]
        flags += ["other"] if method != "lora" else []
        flags += ["rslora"] if lora.options.get("rslora") else []
        flags += ["weighted"] if lora.options.get("class_weights", "none") != "none" else []
        flags += ["focal"] if lora.options.get("loss") == "focal" else []
        flags += [name for name in ("label_smoothing", "ema") if lora.options.get(name)]
        flags += ["schedule." + str(lora.options.get("schedule", "linear"))]
    if distil is not None:
        options, stages = distil.options, [stage["stage"] for stage in distil.summary.section("student").get("stages", [])]
        flags += [f"stage.{name}" for name in stages] + (["plain"] if len(stages) < 2 else ["stages"])
        flags += ["baseline"] if BASELINE in distil.summary else []
        flags += ["kd.other"] if options.get("kd_loss", "kl") != "kl" else []
        flags += ["anneal"] if options.get("temperature_schedule") == "anneal" else []
        staged = len(stages) > 1
        flags += ["hidden"] if staged and options.get("match") == "hidden" else []
        flags += ["scores"] if staged and options.get("match") == "hidden" and options.get("score_weight") and (
            distil.config.get("backbone", {}).get("decoder", True)) else []
        flags += ["edits"] if staged and options.get("edit_weight") else []
        flags += ["students.embeddings"] if options.get("student_embeddings", "random") != "random" else []
        flags += ["bidirectional"] if (distil.config.get("architecture") or {}).get("directions", 2) == 2 else []
        flags += [f"pooling.{(distil.config.get('architecture') or {}).get('pooling', 'max')}"]
        flags += [f"cell.{(distil.config.get('architecture') or {}).get('cell', 'lstm')}"]
        flags += ["teachers"] if distil.summary.section("teacher").get("members") else []
    return list(dict.fromkeys(flags))


def _title(lora: Run | None, distil: Run | None) -> str:
    how = "Fine-Tuning a Language Model"
    if lora is None or lora.summary["method"] == "lora":
        how = "Adapting a Language Model with LoRA"
    if distil is None:
        return how
    shrunk = r"Shrinking It by Knowledge Distillation"
    return rf"{how} and\\{shrunk}" if lora else "Shrinking a Language Model by Knowledge Distillation"


# ---------------------------------------------------------------- the task

def _kind(run: Run) -> str:
    """Returns the kind of problem in words."""
    if run.problem == "regression":
        return "predicting a number"
    classes = len(run.classes)
    return f"assigning any of {classes} labels" if run.problem == "multi-label" else f"telling {classes} classes apart"


def _classes(run: Run) -> str:
    """Returns the classes in words."""
    if run.problem == "regression":
        return "The target is a number."
    names = [rf"\emph{{{escape(name)}}}" for name in run.classes]
    shown_names = ", ".join(names[:28]) + (", \\dots" if len(names) > 28 else "")
    if run.problem == "multi-label":
        return f"A text may have several of the {len(names)} labels, or none: {shown_names}."
    return f"There are {len(names)} classes: {shown_names}."


def _task(run: Run) -> str:
    """Returns the paragraph about the task."""
    known = TASKS.get(run.summary["task"])
    if known is None:
        known = "The task comes as tables of texts with their labels."
    limit = run.options.get("limit")
    cut = f" At most {limit:,} rows of each split were used." if limit else ""
    return f"{known}{cut}"


# ---------------------------------------------------------------- the abstract

def _main_score(run: Run) -> str:
    """Returns the score by which the run's best epoch was chosen."""
    return run.chosen if run.metrics else run.keys[-1]


def _scores(run: Run, scores: Record) -> str:
    """Returns the scores of a model in words: an accuracy of 80.65 % and a Matthews correlation of 0.512."""
    said = [f"{'an' if SCORES[key].name[0] in 'aeiou' else 'a'} {SCORES[key].name} of "
            f"{SCORES[key].prose(scores.number(key))}" for key in run.keys]
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"


def _abstract(lora: Run | None, distil: Run | None) -> str:
    run, sentences = lora or distil, []
    backbone = run.config.get("backbone", {})
    kind = {True: "decoder", False: "encoder"}.get(backbone.get("decoder"), "transformer")
    sentences.append(rf"A pretrained {kind}, \texttt{{{breakable(run.summary['model'])}}}, is adapted to the task "
                     rf"\texttt{{{breakable(run.summary['task'])}}} ({_kind(run)})"
                     + (", and then shrunk." if distil else "."))
    if lora is not None:
        method, parameters, scores = lora.summary["method"], lora.summary.section("parameters"), lora.result.section(
            "validation").section(lora.split)
        if parameters.number("trainable"):
            sentences.append(f"{_capital(METHODS.get(method, method))} trains {parameters['trainable']:,} of "
                             f"{parameters['total']:,} parameters"
                             + (rf", a reduction of {parameters.number('reduction_percent'):.2f}\,\%." if
                                parameters.number("reduction_percent") > 0 else "."))
        sentences.append(f"Its best epoch, chosen on the {escape(spoken(lora.split))} split, reaches {_scores(lora, scores)}"
                         f"{_ignorant(lora, scores)}.")
    if distil is not None:
        models = models_of(distil.summary)
        ratios = sizes(models)[1]
        size = models["student"].number("parameters")
        faster = f" and {ratios['student']['faster']:g} times as fast" if speed_error(models) < MOST_ERROR else ""
        student = models["student"].section("validation").section(distil.split)
        key = _main_score(distil)
        sentences.append(f"A recurrent student of {size:,.0f} parameters, {ratios['student']['smaller']:g} times smaller "
                         f"than its teacher{faster}, learns from the teacher and reaches {_scores(distil, student)}.")
        if BASELINE in models:
            baseline = models[BASELINE].section("validation").section(distil.split).number(key)
            sentences.append(f"The same student with the same initial weights and as many steps, but without a teacher (the "
                             f"baseline), reaches {SCORES[key].prose(baseline)} in {SCORES[key].name}: the difference that "
                             f"distillation makes is {SCORES[key].shown(student.number(key) - baseline, True)} in this run.")
    return "\n".join(sentences)


def _ignorant(run: Run, scores: Record) -> str:
    """Returns in words the scores of a model that ignores its input, those that are known."""
    known = [(key, without_input(scores, key)) for key in run.keys]
    known = [(key, value) for key, value in known if not math.isnan(value)]
    if not known:
        return ""
    who = "always answering the commonest class" if run.problem == "single-label" else "ignoring the text"
    return f", where {who} would reach " + " and ".join(
        f"{SCORES[key].prose(value)} ({SCORES[key].name})" for key, value in known)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _speed(run: Run) -> str:
    """Returns the error of the measured speeds in words."""
    error = speed_error(models_of(run.summary))
    if math.isnan(error):
        return "No second network of the student's size was measured, so that the error of the speeds is not known."
    doubt = "" if error < MOST_ERROR else ": the factors of speed are uncertain by as much"
    return rf"Student and baseline are one network, and were measured {100 * error:.0f}\,\% apart{doubt}."


# ---------------------------------------------------------------- hyperparameters

def _hyperparameters(run: Run, studies: dict[str, Record]) -> str:
    """Returns the searched options, their values and the criterion; or that nothing was searched, and a search."""
    said, options = [], run.options
    if (sweep := studies.get("sweep")) is not None:
        ranges = [rf"\texttt{{{escape(name)}}} {_range(values)}" for name, values in sweep.section("search").items()]
        split = spoken(sweep.section("selection")["split"])
        said.append(f"Searched by \\texttt{{sweep}}, in {len(sweep['trials'])} trials: {'; '.join(ranges)}. The best trial "
                    f"has the highest {_criterion(sweep)} of its best epoch on the {escape(split)} split.")
        best = next((trial for trial in sweep["trials"] if trial["number"] == sweep["best"]), None)
        if best is not None:
            differ = [name for name, value in best.section("params").items()
                      if name in options and not _same(options[name], value)]
            said.append("This run has the best trial's values." if not differ else
                        f"This run has other values of {escape(', '.join(differ))} than the best trial.")
    if (compare := studies.get("compare")) is not None:
        tried = sorted({one["learning_rate"] for entry in compare["entries"] for one in entry["tried"]
                        if one["learning_rate"] is not None})
        if len(tried) > 1:
            split = spoken(compare.section("selection")["split"])
            said.append(f"\\texttt{{compare}} searched the learning rate of each method over "
                        f"{', '.join(f'{rate:g}' for rate in tried)}, by the {_criterion(compare)} of the best epoch on the "
                        f"{escape(split)} split, on the first seed.")
    given, preset = _given(run), options.get("preset")
    defaults = rf"the defaults of the preset \texttt{{{escape(preset)}}}" if preset else "the defaults"
    if not said:
        named = rf" (preset \texttt{{{escape(preset)}}})" if preset else ""
        said.append(f"Defaults, not searched{named}"
                    + (rf", but for those given on the command line ({given})." if given else "."))
        said.append(_would_search(run))
    else:
        said.append(f"All other values are {defaults}" + (rf", or given on the command line ({given})." if given else "."))
    return "\n".join(said)


def _criterion(study: Record) -> str:
    """Returns the name of the score that chose in a study. The first studies recorded none: it was the MCC."""
    key = study.section("selection").get("score", "mcc")
    return "MCC" if key == "mcc" or key not in SCORES else SCORES[key].name


def _same(one: object, other: object) -> bool:
    """Returns whether an option has a searched value; a list of roles is searched as q+v."""
    return (one == other or str(one) == str(other)
            or isinstance(one, list) and ("+".join(map(str, one)) == str(other) or str(other) == "all"))


def _range(values: object) -> str:
    """Returns searched values in words."""
    if isinstance(values, list):
        return "over " + escape(", ".join(map(str, values)))
    scale = " on a logarithmic scale" if values.get("log") else ""
    return f"from {values.number('low'):g} to {values.number('high'):g}{scale}"


def _given(run: Run) -> str:
    """Returns the options of the training that the command line gave."""
    try:
        words = shlex.split(run.config["command"])
    except ValueError:
        return ""
    found = []
    for number, word in enumerate(words):
        name, _, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name not in PLACES:
            following = words[number + 1:number + 2]
            value = value or (following[0] if following and not following[0].startswith("--") else "")
            found.append(rf"\texttt{{-{{}}-{breakable(f'{name} {value}'.strip())}}}")
    return ", ".join(found)


def _would_search(run: Run) -> str:
    """Returns the sentence with the command that would search."""
    sr, summary = run.summary["sr"], run.summary
    if summary["mode"] == "LoRA":
        data = run.options.get("data")
        words = ["python run.py sweep", sr, "--model", summary["model"], "--task", summary["task"],
                 *(["--data", data] if data else []), *_columns(run), SWEEP]
        command = rf"\texttt{{{breakable(' '.join(map(str, words))).replace('-{}-', '-{}-')}}}"
        return f"The search that would choose them: {command}."
    command = rf"\texttt{{{breakable(f'python run.py distil {sr} --temperature 2 --kd-alpha 0.7 --out DIR')}}}"
    return (f"There is no search over the options of a distillation: a run for each value, such as {command}, compared on "
            f"the {escape(spoken(run.split))} split, would choose them.")


def _columns(run: Run) -> list[str]:
    """Returns the options of the columns that the run was given, as words."""
    text, label = run.options.get("text_column"), run.options.get("label_column", "label")
    return ([f"--text-column {','.join(text)}"] if text else []) + ([f"--label-column {label}"] if label != "label" else [])


# ---------------------------------------------------------------- the conclusion

def _verdict(difference: float, interval: list[float] | None, key: str) -> str:
    """Returns better, worse or equal: by the interval over seeds where there is one, else by the shown digits."""
    sign = 1 if SCORES[key].largest else -1
    if interval is not None:
        low, high = sorted(sign * bound for bound in interval)
        return "better" if low > 0 else "worse" if high < 0 else "no difference shown"
    rounded = round(sign * SCORES[key].factor * difference, SCORES[key].digits)
    return "better" if rounded > 0 else "worse" if rounded < 0 else "equal"


def _over(run: Run, seeds: int) -> str:
    """Returns the evidence in words: rows and seeds."""
    n = run.result.section("validation").section(run.split).number("n")
    return f"on the {escape(spoken(run.split))} split, {n:,.0f} rows, {'one seed' if seeds == 1 else f'{seeds} seeds'}"


def _interval(interval: list[float], key: str) -> str:
    score = SCORES[key]
    return rf"95\,\% interval {score.shown(interval[0], True)} to {score.shown(interval[1], True)}"


def _conclusion(lora: Run | None, distil: Run | None, studies: dict[str, Record]) -> str:
    items = []
    if lora is not None:
        items.append(_against_majority(lora, studies.get("seeds.LoRA")))
    if distil is not None and BASELINE in distil.summary:
        items.append(_against_baseline(distil, studies.get("seeds.distil")))
    elif distil is not None:
        items.append(r"\textbf{Distillation against no distillation: not compared.} The run trained no baseline.")
    items.append(_reduction(lora, distil))
    listed = "\n".join(rf"\item {item}" for item in items if item)
    return "\\begin{itemize}\n" + listed + "\n\\end{itemize}"


def _against_majority(run: Run, seeds: Record | None) -> str:
    method, key = METHODS.get(run.summary["method"], run.summary["method"]), _main_score(run)
    scores, score = run.result.section("validation").section(run.split), SCORES[key]
    nothing = without_input(scores, key)
    whom = "the majority class" if run.problem == "single-label" else "ignoring the text"
    if math.isnan(nothing):
        return (rf"\textbf{{{_capital(method)}}} reaches {_scores(run, scores)} ({_over(run, 1)}); no score of a model that "
                "ignores the text was recorded.")
    study = Seeds("LoRA", seeds) if seeds is not None and len(seeds["seeds"]) > 1 else None
    mean = study and next((study.mean(row["entry"], run.split, key) for row in study.study["entries"]), None)
    if mean and mean.get("interval"):
        interval = [bound - nothing for bound in mean["interval"]]
        verdict = _verdict(mean.number("mean") - nothing, interval, key)
        return (rf"\textbf{{{_capital(method)} against {whom}: {verdict}.}} Over {len(seeds['seeds'])} seeds its "
                f"{score.name} is {score.prose(mean.number('mean'))} on average against {score.prose(nothing)} "
                f"({_interval(interval, key)} of the difference).")
    verdict = _verdict(scores.number(key) - nothing, None, key)
    parts = [f"{SCORES[name].name} {SCORES[name].prose(scores.number(name))} against "
             f"{SCORES[name].prose(without_input(scores, name))}" for name in run.keys
             if not math.isnan(without_input(scores, name))]
    return (rf"\textbf{{{_capital(method)} against {whom}: {verdict}.}} {_capital('; '.join(parts))} ({_over(run, 1)}).")


def _against_baseline(run: Run, seeds: Record | None) -> str:
    key, score = _main_score(run), SCORES[_main_score(run)]
    students = [run.summary.section(name).section("validation") for name in ("student", BASELINE)]
    study = Seeds("distil", seeds) if seeds is not None and len(seeds["seeds"]) > 1 else None
    if study and (difference := study.difference("student", BASELINE, run.split, key)) and difference.get("interval"):
        verdict = _verdict(difference.number("mean"), difference["interval"], key)
        return (rf"\textbf{{Distillation against no distillation: {verdict}.}} Over {len(seeds['seeds'])} seeds, paired, "
                f"the student with KD minus the baseline is {score.shown(difference.number('mean'), True)} in {score.name} "
                f"({_interval(difference['interval'], key)}).")
    one, other = (student.section(run.split) for student in students)
    verdict = _verdict(one.number(key) - other.number(key), None, key)
    parts = [f"{SCORES[name].name} {SCORES[name].prose(one.number(name))} against {SCORES[name].prose(other.number(name))}"
             for name in run.keys]
    more = [f"{SCORES[key].shown(students[0].section(split).number(key) - students[1].section(split).number(key), True)} "
            f"{escape(spoken(split))}" for split in students[0] if split not in (run.split, "all")]
    further = f" On other rows the difference in {score.name} is {', '.join(more)}." if more else ""
    return (rf"\textbf{{Distillation against no distillation: {verdict}.}} The student with KD against the baseline: "
            f"{'; '.join(parts)} ({_over(run, 1)}).{further} One seed cannot tell a small difference from chance: "
            rf"\texttt{{{breakable('python run.py distil ' + run.summary['sr'] + ' --seeds 5')}}} gives an interval.")


def _reduction(lora: Run | None, distil: Run | None) -> str:
    parts = []
    if lora is not None:
        parameters = lora.summary.section("parameters")
        method = METHODS.get(lora.summary["method"], lora.summary["method"])
        parts.append(f"{_capital(method)} trains {parameters['trainable']:,} of {parameters['total']:,} parameters, "
                     rf"{parameters.number('reduction_percent'):.2f}\,\% fewer than all.")
    if distil is not None:
        models = models_of(distil.summary)
        teacher, student = (models[key].number("parameters") for key in ("teacher", "student"))
        ratios = sizes(models)[1]["student"]
        key = _main_score(distil)
        one, other = (models[name].section("validation").section(distil.split).number(key)
                      for name in ("student", "teacher"))
        parts.append(f"The student has {student:,.0f} parameters, the teacher {teacher:,.0f}: "
                     rf"{ratios['fewer_percent']:.2f}\,\% fewer, {ratios['smaller']:g} times smaller, with "
                     f"{SCORES[key].prose(one)} against the teacher's {SCORES[key].prose(other)} in {SCORES[key].name}.")
    return r"\textbf{Reduction of parameters.} " + " ".join(parts) if parts else ""
