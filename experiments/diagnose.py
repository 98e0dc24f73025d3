"""Finds where a run is right and wrong: by source, length and phenomenon; calibration; disagreements.

    python run.py diagnose runs/distil-12345
    python run.py diagnose runs/distil-12345 --pairs blimp/pairs.tsv --limit 100

A LoRA run is diagnosed next to its bare language model, a distillation next to its teacher, its baseline and the
teacher's bare language model. diagnose.json holds every number; tables and plots are drawn from it (report/diagnosis.py).
"""
from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from scipy.special import softmax
from sklearn.metrics import matthews_corrcoef

import data_utils
import train_utils
from data import pairs as minimal_pairs
from data.backbones import is_decoder, load_causal_lm, load_config, max_length_of
from data.pairs import Pair
from data.segments import separator_of
from data_utils import Split
from distillation.teachers import mean_logits
from experiments import calibration
from experiments.evaluate import HELD_OUT, load_finetuned, load_student, logits_of
from experiments.inputs import load_task
from experiments.trained_on import check_not_trained_on, count_trained_on, find_source
from machine.hardware import device
from machine.progress import Bar
from metrics.classification import scores
from metrics.problems import problem_of
from model import DistilRNN
from options.schema import RunOptions, TableOptions
from record.config_json import rebuild
from record.files import check_folder, make_folder, sha256, write_json
from record.folder import provenance, read_run, warn_of_changed_data
from record.ownership import check_out
from report import diagnosis, records

BUILT_IN_PAIRS = 200  # of each phenomenon of the built-in grammar, without --limit
LENGTH_BINS = 5  # groups of about the same number of sentences
MOST = 50  # sentences in a list
CHUNK = 4000  # sentences scored between two steps of the progress bar
# Tokens in a batch of the language model, pads included: few, because its logits are as wide as the vocabulary.
LM_TOKENS = 1024


@dataclass
class Diagnosed:
    """Holds the models of a run, and the rows that they answer."""

    config: dict  # of the run
    mode: str  # LoRA or distil
    # teacher, student, scratch (the baseline) -> model, tokenizer and options, of each of several teachers
    models: dict[str, list[tuple]]
    runs: dict[str, str]  # model -> the run or runs that it comes from
    splits: dict[str, Split]
    files: dict[str, str]  # SHA-256 of every data file
    trained_on: dict[str, int | None]  # split -> rows that stand in the training data too
    left_out: list[str] = field(default_factory=list)  # parts without a result, each with its reason

    @property
    def classes(self) -> list[str]:
        """Returns the classes' names."""
        return self.config.get("classes", list(data_utils.COLA_CLASSES))


class Answers:
    """Computes every classifier's logits of the rows, by split and of all splits together.

    Attributes:
        by_split: model -> split -> logits (n, labels).
        labels_of: split -> labels (n,).
        logits: model -> logits (N, labels) of all rows; likewise `labels` (N,) and `predictions`, model -> (N,).
        rows: all rows; `split_of` holds the name of each row's split.
    """

    def __init__(self, run: Diagnosed):
        splits, self.classes = run.splits, run.classes
        self.by_split, self.split_of, self.rows = {}, [], Split([], [], [])
        for name, members in run.models.items():
            self.by_split[name] = {split: mean_logits_of(members, rows).double().numpy() for split, rows in splits.items()}
        self.labels_of = {name: np.array(split.labels) for name, split in splits.items()}
        for name, split in splits.items():
            self.split_of += [name] * len(split)
            for key in ("sentences", "labels", "sources"):
                getattr(self.rows, key).extend(getattr(split, key))
        # All rows together, for the parts that need many rows in a group: sources, lengths, disagreements.
        self.logits = {name: np.concatenate(list(parts.values())) for name, parts in self.by_split.items()}
        self.probabilities = {name: softmax(values, -1) for name, values in self.logits.items()}
        self.predictions = {name: values.argmax(-1) for name, values in self.logits.items()}
        self.labels = np.array(self.rows.labels)

    def scores(self) -> dict[str, dict]:
        """Returns every model's scores on every split, as a run's summary has them."""
        found = {}
        for name, parts in self.by_split.items():
            found[name] = {split: scores(torch.from_numpy(values), torch.from_numpy(self.labels_of[split]))
                           for split, values in parts.items()}
        return found

    def sentences(self, order) -> list[dict]:
        """Returns the rows of these indices: split, source, label, and every model's prediction and label's probability."""
        return [{"sentence": self.rows.sentences[i], "split": self.split_of[i],
                 "source": self.rows.sources[i] if self.rows.sources else None, "label": self.classes[self.labels[i]],
                 "models": self._answers_to(i)} for i in order]

    def _answers_to(self, row: int) -> dict[str, dict]:
        return {name: {"prediction": self.classes[self.predictions[name][row]],
                       "probability_of_label": float(values[row, self.labels[row]])}
                for name, values in self.probabilities.items()}


def diagnose_run(folder: Path, data: Path | None = None, pairs: Path | None = None, limit: int | None = None,
                 out: Path | None = None, allow_training_data: bool = False) -> dict:
    """Diagnoses a finished run and writes diagnose.json, tables and plots.

    Args:
        folder: of a LoRA or distillation run.
        data: in the format of the run's task; the run's development files if None.
        pairs: a file of minimal pairs (`data.pairs`); the built-in grammar's if None.
        limit: pairs of each paradigm, at most.
        out: folder of the result; diagnose-<run> next to the run if None.
        allow_training_data: diagnose on a file that was trained on, with a warning.

    Returns:
        The content of diagnose.json.

    Raises:
        UserError: bad input, before anything is written.
    """
    folder = Path(folder)
    out = out or folder.parent / f"diagnose-{folder.name}"
    check_out(out, "diagnose")
    check_folder(out)
    # Pairs are read before any model: a bad file is told at once.
    chosen = minimal_pairs.read_pairs(pairs, limit) if pairs else None
    published = pairs and pairs.with_name("published.tsv")
    accuracies = minimal_pairs.read_published(published) if published and published.exists() else {}
    run = load_diagnosed(folder, data, allow_training_data)
    answers = Answers(run)
    read = ([pairs] if pairs else []) + ([published] if accuracies else [])
    files = {**run.files, **{str(path): sha256(path) for path in read}}
    lengths = length_groups([len(text.split()) for text in answers.rows.sentences])
    result = {
        "mode": "diagnose", "run": str(folder), "of": run.mode, "model": run.config["options"]["model"],
        "task": run.config["options"]["task"], "classes": run.classes,
        **provenance({"data": data and str(data), "pairs": pairs and str(pairs), "limit": limit}, files),
        "models": {}, "splits": {name: len(split) for name, split in run.splits.items()}, "trained_on": run.trained_on,
        "scores": answers.scores(), "by_source": by_source(run, answers),
        "by_length": by_group(*lengths, answers.labels, answers.predictions),
        "calibration": {name: calibrate(parts, answers.labels_of) for name, parts in answers.by_split.items()},
        "disagreements": disagreements(run, answers), "all_wrong": all_wrong(answers)}
    result["pairs"] = on_pairs(run, chosen, limit, str(pairs) if pairs else None, accuracies)
    if pairs and not accuracies:
        run.left_out.append(f"published figures: there is no {published}")
    # Last, for the minimal pairs have loaded the bare language model meanwhile and may have left models out.
    result["models"] = dict(run.runs)
    result["left_out"] = run.left_out
    make_folder(out)
    write_json(out / "diagnose.json", result)
    diagnosis.write(out / "diagnose.json", out)
    return result


# ---------------------------------------------------------------- models and rows

def load_diagnosed(folder: Path, data: Path | None, allow_training_data: bool = False) -> Diagnosed:
    """Loads a run's models and rows, and warns of data or a teacher that changed since the run.

    Raises:
        UserError: not a finished run, or damaged; another teacher than the run's; a file that was trained on.
    """
    config, summary = read_run(folder)
    problem_of(config).check(f"diagnose {folder}", True)
    mode, models, runs, left_out = summary["mode"], {}, {}, []
    if mode == "LoRA":
        models["teacher"], runs["teacher"] = [load_finetuned(folder)], str(folder)
    else:
        recorded = [summary["teacher"]["run"], *summary["teacher"].get("more_runs", [])]
        found = [find_source(folder, name) for name in recorded]
        if missing := [name for name, path in zip(recorded, found, strict=True) if path is None]:
            # The average of some of the teachers is not the one that the student learned from.
            left_out.append(f"the teacher: {missing[0]} is not there")
        else:
            models["teacher"], runs["teacher"] = [load_finetuned(path) for path in found], ", ".join(map(str, found))
            warn_of_changed_teachers(config, recorded, found)
        for name in ("student", *(["scratch"] if "scratch" in summary else [])):
            models[name], runs[name] = [load_student(folder, name)], str(folder)
    (_, tokenizer, _), *_ = next(iter(models.values()))
    options = config["options"]
    if data is not None:
        warn_of_changed_data(config, data)
        classes = config.get("classes", data_utils.COLA_CLASSES)
        rows = data_utils.read_rows(data, options["task"], rebuild(TableOptions, options), separator_of(tokenizer), classes)
        splits, files = {data.stem: rows}, {str(data): rows.sha256 or sha256(data)}
        check_not_trained_on(folder, config, files, allow_training_data)
    else:
        for name in config.get("data_files", {}):
            if Path(name).exists():
                warn_of_changed_data(config, Path(name))
        task = load_task(rebuild(RunOptions, options, out=folder), tokenizer)
        splits, files = task.dev, task.files
        # Rows held out of the training file are new to the model; a development file must not be a copy of it.
        own = {} if HELD_OUT in splits else {name: digest for name, digest in files.items() if name != next(iter(files))}
        check_not_trained_on(folder, config, own, allow_training_data)
    trained_on, notes = count_trained_on(folder, config, tokenizer, splits)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return Diagnosed(config, mode, models, runs, splits, files, trained_on, left_out)


def mean_logits_of(members: list[tuple], split: Split) -> torch.Tensor:
    """Returns the mean logits (N, labels) that models give a split's rows; each has a tokenizer and options of its own."""
    return mean_logits([logits_of(model, split, tokenizer, options) for model, tokenizer, options in members])


def warn_of_changed_teachers(config: dict, recorded: list[str], found: list[Path]) -> None:
    """Warns of a teacher's weights that are not those that the student learned from.

    Args:
        config: of the distillation; it names the first teacher's files without their folder, the others' with it.
        recorded, found: every teacher's folder, as the run named it and where it stands now.
    """
    folders = list(map(Path, recorded))
    for name, digest in config.get("teacher_files", {}).items():
        at = folders.index(Path(name).parent) if Path(name).parent in folders else 0
        path = found[at] / Path(name).name
        if sha256(path) != digest:
            warnings.warn(f"{found[at]}: changed since the student learned from it ({path.name} is another file)",
                          stacklevel=2)


# ---------------------------------------------------------------- groups of rows

def by_group(groups: list[str], order: list[str], labels: np.ndarray, predictions: dict[str, np.ndarray]) -> list[dict]:
    """Returns n, the majority class's accuracy, and every model's accuracy and MCC of each group of rows.

    MCC is None, because it is not defined, for a group with one label.

    Args:
        groups: (N) each row's group.
        order: the groups in the order of the result.
        labels: (N,) class indices.
        predictions: model -> (N,) class indices.
    """
    found, members = [], np.array(groups)
    for group in order:
        own = members == group
        truth = labels[own]
        found.append({"group": group, "n": int(own.sum()),
                      "majority_accuracy": float(np.bincount(truth).max() / len(truth)),
                      "models": {name: _group_scores(truth, values[own]) for name, values in predictions.items()}})
    return found


def _group_scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float | None]:
    mcc = float(matthews_corrcoef(truth, predicted)) if len(set(truth.tolist())) > 1 else None
    return {"accuracy": float((predicted == truth).mean()), "mcc": mcc}


def by_source(run: Diagnosed, answers: Answers) -> list[dict] | None:
    """Returns `by_group` by source, the largest source first; None for a task without sources."""
    sources = answers.rows.sources
    if len(set(sources)) < 2:
        run.left_out.append(f"by source: the task {run.config['options']['task']} has no sources here")
        return None
    # Large groups first: small ones say little, and stand at the end of the table.
    order = sorted(set(sources), key=lambda source: (-sources.count(source), source))
    return by_group(sources, order, answers.labels, answers.predictions)


def length_groups(words: list[int], bins: int = LENGTH_BINS) -> tuple[list[str], list[str]]:
    """Returns each row's group by its number of words ("4-6"), and the groups in order, all of about the same size."""
    # An edge is the largest length of its group. Rows of one length share a group, so that edges may coincide.
    edges = np.unique(np.quantile(words, np.arange(1, bins) / bins, method="inverted_cdf")) if words else []
    index, names = np.searchsorted(edges, words), {}
    for i in np.unique(index):
        own = np.array(words)[index == i]
        names[i] = f"{own.min()}" if own.min() == own.max() else f"{own.min()}-{own.max()}"
    return [names[i] for i in index], list(names.values())


# ---------------------------------------------------------------- calibration and single sentences

def calibrate(logits: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> dict:
    """Returns one model's calibration on every split, at a temperature fitted on the split that chose its epoch.

    The scaled figures flatter on that split; on another one they show the worth of the temperature.
    """
    # Fitted on one split alone, so that the others are new to the temperature.
    chosen = train_utils.selection_split(logits)
    temperature = calibration.fit_temperature(logits[chosen], labels[chosen])
    return {"fitted_on": chosen, "temperature": temperature, "splits": {
        split: calibration.calibration(values, labels[split], temperature) for split, values in logits.items()}}


def disagreements(run: Diagnosed, answers: Answers) -> list[dict] | None:
    """Returns the sentences of the largest total variation distance between teacher's and student's probabilities."""
    if not {"teacher", "student"} <= set(answers.probabilities):
        run.left_out.append("disagreements: they need a teacher and a student, a distillation run's")
        return None
    # Half the L1 distance: 0 for equal distributions, 1 for distributions without a common class.
    distance = np.abs(answers.probabilities["teacher"] - answers.probabilities["student"]).sum(-1) / 2
    order = np.argsort(-distance, kind="stable")[:MOST]
    return [{**row, "distance": float(distance[i])} for i, row in zip(order, answers.sentences(order), strict=True)]


def all_wrong(answers: Answers) -> dict:
    """Returns the sentences that all classifiers have wrong, the lowest mean probability of the label first."""
    wrong = np.flatnonzero(np.all([values != answers.labels for values in answers.predictions.values()], axis=0))
    of_label = np.mean([values[wrong, answers.labels[wrong]] for values in answers.probabilities.values()], axis=0)
    return {"n": len(wrong), "rows": answers.sentences(wrong[np.argsort(of_label, kind="stable")][:MOST])}


# ---------------------------------------------------------------- minimal pairs

def on_pairs(run: Diagnosed, pairs: list[Pair] | None, limit: int | None, file: str | None,
             published: dict[str, dict[str, float]]) -> dict | None:
    """Counts the minimal pairs that each model orders rightly, by paradigm and phenomenon.

    A classifier scores a sentence by its logit of acceptable minus that of unacceptable, the bare language model by its
    log-probability. None for a task other than acceptability, unless pairs are given.
    """
    options = run.config["options"]
    if pairs is None and options["task"] not in ("cola", "tiny"):
        run.left_out.append(f"minimal pairs: {options['task']} is no task of acceptability; --pairs asks for them")
        return None
    pairs = pairs or minimal_pairs.built_in(limit or BUILT_IN_PAIRS)
    # Sentences stand in several pairs of BLiMP: each is scored once.
    sentences = list(dict.fromkeys(text for pair in pairs for text in (pair.good, pair.bad)))
    judges, higher = dict(scorers(run)), {}
    with Bar(total=len(judges) * len(sentences), unit="sentence", desc="minimal pairs") as bar:
        for name, judge in judges.items():
            bar.set_postfix_str(name)
            scores = {}
            for start in range(0, len(sentences), CHUNK):
                part = sentences[start:start + CHUNK]
                scores.update(zip(part, judge(part).tolist(), strict=True))
                bar.update(len(part))
            higher[name] = np.array([scores[pair.good] > scores[pair.bad] for pair in pairs])
    if not higher:
        return None
    return {"file": file, "limit": limit, "n": len(pairs), "published": list(published),
            "paradigms": pair_groups(pairs, "paradigm", higher, published),
            "phenomena": pair_groups(pairs, "phenomenon", higher, published),
            "overall": {"n": len(pairs), "models": {name: _share(values) for name, values in higher.items()},
                        "published": _published({pair.paradigm for pair in pairs}, published)}}


def pair_groups(pairs: list[Pair], key: str, higher: dict[str, np.ndarray], published: dict[str, dict[str, float]]
                ) -> list[dict]:
    """Returns the share of pairs that each model orders rightly, by paradigm or phenomenon.

    Args:
        key: attribute of a pair that groups it, `paradigm` or `phenomenon`.
        higher: model -> (N,) booleans.
        published: model -> paradigm -> accuracy; of a phenomenon, the mean over its paradigms.
    """
    members, found = np.array([getattr(pair, key) for pair in pairs]), []
    for group in dict.fromkeys(members.tolist()):
        inside = members == group
        own = [pair for pair, belongs in zip(pairs, inside, strict=True) if belongs]
        found.append({"group": group, "phenomenon": own[0].phenomenon, "n": len(own),
                      "models": {name: _share(values[inside]) for name, values in higher.items()},
                      "published": _published({pair.paradigm for pair in own}, published)})
    return found


def _share(values: np.ndarray) -> dict:
    """Computes the share of True, with its 95 % interval (Wilson 1927)."""
    interval = stats.binomtest(int(values.sum()), len(values)).proportion_ci(0.95, method="wilson")
    return {"accuracy": float(values.mean()), "interval": [float(interval.low), float(interval.high)]}


def _published(paradigms: set[str], published: dict[str, dict[str, float]]) -> dict[str, float]:
    """Returns each published model's mean accuracy over the paradigms that its figures cover."""
    found = {}
    for name, values in published.items():
        if covered := [values[paradigm] for paradigm in paradigms if paradigm in values]:
            found[name] = float(np.mean(covered))
    return found


def scorers(run: Diagnosed) -> Iterator[tuple]:
    """Yields every model that can score a sentence: its name, and a function from sentences to scores (N,)."""
    # A model is a default argument of its function: a plain closure would see the last model of the loop alone.
    for name, members in run.models.items():
        model, _, options = members[0]
        if options.get("feature_columns") and not isinstance(model, DistilRNN):
            run.left_out.append(f"minimal pairs, {name}: it reads numeric features, and pairs have none")
        elif len(run.classes) != 2:
            run.left_out.append(f"minimal pairs, {name}: it has more than the two classes of acceptability")
        else:
            yield name, lambda sentences, members=members: acceptability(members, sentences)
    name, tokenizer = run.config["options"]["model"], next(iter(run.models.values()))[0][1]
    if not is_decoder(load_config(name)):
        run.left_out.append(f"minimal pairs, bare language model: {name} is an encoder, which gives no probability of a "
                            "sentence")
        return
    lm = load_causal_lm(name).to(device())
    run.runs["language_model"] = name
    yield "language_model", lambda sentences: log_probabilities(lm, tokenizer, sentences)


def acceptability(members: list[tuple], sentences: list[str]) -> np.ndarray:
    """Returns the logit of acceptable (the second class) minus that of unacceptable, (N,), of one or several classifiers."""
    logits = mean_logits_of(members, Split(sentences, [0] * len(sentences)))
    return (logits[:, 1] - logits[:, 0]).double().numpy()


@torch.inference_mode()
def log_probabilities(lm, tokenizer, sentences: list[str], batch_tokens: int = LM_TOKENS) -> np.ndarray:
    """Returns log-probabilities (N,) of sentences under a causal language model, in nats.

    Sums over all tokens of the sentence. The first one is conditioned on the beginning-of-text token, if the tokenizer has
    any; an end-of-text token is not scored.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    # Some tokenizers add the token themselves: it must not stand twice.
    opening = [] if start is None else [start]
    ids = [tokens if tokens[:1] == opening else opening + tokens
           for tokens in data_utils.encode(tokenizer, sentences, max_length_of(lm) - len(opening))]
    result = np.empty(len(ids))
    # Batched by length, one batch after the other in memory: the largest tensor is (B, T - 1, vocabulary).
    for rows in data_utils.bucket_by_length([len(tokens) for tokens in ids], 1, 0, batch_tokens):
        batch = data_utils.collate(ids, [0] * len(ids), rows, 0).to(lm.device)
        logits = lm(input_ids=batch.input_ids, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.input_ids[:, 1:], reduction="none")
        result[rows] = -(losses.double() * batch.attention_mask[:, 1:]).sum(1).cpu().numpy()
    return result


# ---------------------------------------------------------------- the command line


def main(args) -> None:
    """Prints the diagnosis of a run, and its folder."""
    result = diagnose_run(args.run, args.data, args.pairs, args.limit, args.out, args.allow_training_data)
    out = args.out or args.run.parent / f"diagnose-{args.run.name}"
    print(json.dumps(result) if args.json else
          f"{diagnosis.diagnosis_text(records.read_json(out / 'diagnose.json'))}\ndiagnosis: {out}")
