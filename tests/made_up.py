"""Writes made-up runs, comparisons and sweeps in the layout of real ones, for the tests of report/."""

import json
import shutil
from pathlib import Path

from report import build

SR = "12345"
COLA = ("in_domain", "out_of_domain", "all")
HASH = "0123456789abcdef" * 4


def copy_sources(folder: Path) -> Path:
    """Copies main.tex, the files that it reads and the references into a folder, and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    here = Path(build.__file__).parent
    for path in (*here.glob("*.tex"), *here.glob("*.bib")):
        shutil.copy(path, folder)
    return folder


def validation(mcc: float, splits: tuple[str, ...] = COLA) -> dict:
    """Returns the scores of each split; no two splits have the same."""
    return {split: {"n": 527, "loss": 0.5 + i / 10, "accuracy": 0.8065 - i / 20, "mcc": mcc - i / 10,
                    "majority_accuracy": 0.6926 - i / 100} for i, split in enumerate(splits)}


def epoch(number: int, splits: tuple[str, ...] = COLA, lift: float = 0.0, **more) -> dict:
    """Returns a line of metrics.jsonl; `lift` adds to the MCC, `more` are further fields."""
    train = {"loss": 0.9 / number, "cross_entropy": 0.6 / number, "accuracy": 0.7 + 0.02 * number, "mcc": 0.1 * number}
    return {"epoch": number, "train": train, "validation": validation(lift + 0.1 * number - 0.01 * number**2, splits),
            "learning_rate": 2e-4 / number, "seconds": 12.5, "tokens": 98765, **more}


def write_run(folder: Path, summary: dict, metrics: list[dict], **config) -> Path:
    """Writes the files of a run into a new folder and returns it; `config` adds to config.json."""
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (folder / "config.json").write_text(json.dumps({
        "command": f"python run.py {summary['mode']} {SR} --data ../shared/data/cola_v1.1 --rank 8",
        "options": {"rank": 8, "lr": 2e-05, "targets": ["q", "k", "v", "o", "mlp"], "layers": None, "rslora": False},
        "versions": {"python": "3.11.7", "torch": "2.5.1+cpu"}, "git_commit": None,
        "data_files": {"../shared/data/cola_v1.1/in_domain_train.tsv": HASH}, **config}))
    return folder


TRAIN = {"epochs": 4, "steps": 1072, "seconds": 1234.5678, "tokens": 345678, "tokens_per_second": 280.04,
         "padding_percent": 1.257, "peak_memory_bytes": 1234567890}


def lora_run(runs: Path, epochs: int = 4, splits: tuple[str, ...] = COLA, **changes) -> Path:
    """Writes a LoRA run and returns its folder; `changes` are fields of summary.json."""
    summary = {"mode": "LoRA", "sr": SR, "model": "gpt2", "task": "cola", "method": "lora",
               "best_epoch": min(3, epochs),
               "parameters": {"total": 125620992, "trainable": 1181184, "reduction_percent": 99.0597},
               "validation": validation(0.5123, splits), "last_epoch": epochs, "train": TRAIN,
               "last_validation": validation(0.4876, splits),
               "sanity": {"prompt": "The cat", "text": "The cat sat_on 100% of\nthe mat", "equal_to_base": True}}
    return write_run(runs / f"LoRA-{SR}", summary | changes, [epoch(n, splits) for n in range(1, epochs + 1)])


def distil_run(runs: Path, epochs: int = 4) -> Path:
    """Writes a distillation of a teacher into a student and a baseline, and returns its folder."""
    def student(mcc: float) -> dict:
        return {"parameters": 5000000, "validation": validation(mcc), "best_epoch": 2, "last_epoch": epochs,
                "last_validation": validation(mcc - 0.02), "sentences_per_second": 2100.0}

    summary = {"mode": "distil", "sr": SR, "model": "gpt2", "task": "cola", "train": TRAIN,
               "teacher": {"run": f"runs/LoRA-{SR}", "parameters": 125000000, "validation": validation(0.5123),
                           "sentences_per_second": 70.0},
               "student": student(0.3217), "scratch": student(0.2789),
               "distillation": {"temperature": 4.0, "alpha": 0.9, "loss": 0.4321}}
    metrics = [epoch(n, lift=lift, phase=phase) for phase, lift in (("student", 0.1), ("scratch", 0.0))
               for n in range(1, epochs + 1)]
    return write_run(runs / f"distil-{SR}", summary, metrics, architecture={"cell": "lstm", "hidden_size": 128})


def spread(mean: float, sd: float | None = 0.01) -> dict:
    """Returns a score over two seeds, or over one if `sd` is None."""
    return {"mean": mean, "sd": sd, "values": [mean - 0.01, mean + 0.01] if sd else [mean]}


def study(runs: Path, mode: str, content: dict) -> Path:
    """Writes a comparison or a sweep and returns its JSON file."""
    path = runs / f"{mode}-{SR}" / f"{mode}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"mode": mode, "sr": SR, "model": "gpt2", "task": "cola", "options": {},
                                "command": f"python run.py {mode} {SR}"} | content))
    return path


def entry_row(name: str, trainable: int, accuracy: float, rate: float | None = 4e-4, splits=COLA, sd=0.01, **more) -> dict:
    """Returns an entry of a comparison; `more` are further fields."""
    scores = {split: {"accuracy": spread(accuracy - i / 20, sd), "mcc": spread(accuracy - 0.6, sd)}
              for i, split in enumerate(splits)}
    return {"entry": name, "tried": [{"learning_rate": rate, "mcc": 0.2}], "learning_rate": rate,
            "seeds": ["12345", "12346"],
            "parameters": {"total": 1000000, "trainable": trainable, "trainable_percent": trainable / 10000},
            "best": scores, "last": scores, "best_epoch": spread(2.5), "last_epoch": spread(3), "seconds_per_epoch": 12.345,
            "majority_accuracy": {split: 0.6926 - i / 100 for i, split in enumerate(splits)},
            "peak_memory_bytes": 600 * 2 ** 20, "size_bytes": 4567890} | more


def comparison(runs: Path, splits=COLA, **changes) -> Path:
    """Writes a comparison of an untrained head, two adapters and a run that diverged, and returns its JSON file."""
    rows = [entry_row("none", 0, 0.3, None, splits), entry_row("lora", 123456, 0.8123, splits=splits),
            entry_row("r_2", 1234, 0.55, splits=splits), {"entry": "full", "tried": [{"learning_rate": 1, "mcc": None}],
                                                          "learning_rate": None, "seeds": []}]
    return study(runs, "compare", {"seeds": ["12345", "12346"], "entries": rows, "selection": {
        "split": splits[0], "splits": list(splits)}} | changes)


def search(runs: Path, **changes) -> Path:
    """Writes a sweep of three complete and two pruned trials, and returns its JSON file."""
    trials = [{"number": i, "state": "complete" if i < 3 else "pruned",
               "params": {"targets": targets, "lr": 0.001 * (i + 1)},
               "score": 0.5 - i / 10 if i < 4 else -0.1, "best_epoch": 2, "same_as": None, "diverged": None,
               "parameters": {"total": 1000000, "trainable": 1000 * (i + 1)},
               "validation": {"in_domain": validation(0.5)["in_domain"]} if i < 3 else None}
              for i, targets in enumerate(["q+v", "all", "q+v", "all", "all"])]
    means = {"targets": [{"value": "q+v", "n": 2, "mean": 0.4, "sd": 0.14},
                         {"value": "all", "n": 1, "mean": 0.4, "sd": None}]}
    return study(runs, "sweep", {"search": {"targets": ["q+v", "all"], "lr": {"low": 0.001, "high": 0.01, "log": True}},
                                 "selection": {"split": "in_domain"}, "trials": trials, "best": 0, "means": means,
                                 "importance": {"targets": 0.25, "lr": 0.75}} | changes)


# ---------------------------------------------------------------- runs of every problem

def folds(runs: Path, kind: str) -> Path:
    """Writes the results of a cross-validation of three folds, and returns its summary.json."""
    scores = {key: {"mean": value, "sd": 0.0123, "interval": [value - 0.05, value + 0.05], "values": [value] * 3}
              for key, value in scores_of(kind, 0.1)["validation"].items() if key not in ("n", "loss", "majority_accuracy")}
    path = runs / f"LoRA-{SR}-folds" / "summary.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"mode": "folds", "folds": 3, "intervals": {
        which: {"held_out": scores} for which in ("best", "last")}}))
    return path


CLASSES = {"binary": ["no", "yes"], "four": ["spam", "work", "family", "bills"],
           "multi-label": ["urgent", "money", "travel"], "regression": []}


def scores_of(kind: str, lift: float) -> dict:
    """Returns the scores of a development split of a problem."""
    score = {"regression": {"pearson": 0.5 + lift, "spearman": 0.45 + lift, "mse": 1.2 - lift},
             "multi-label": {"f1_micro": 0.4 + lift, "f1_macro": 0.3 + lift}}.get(
                 kind, {"accuracy": 0.6 + lift, "mcc": 0.2 + lift, "majority_accuracy": 0.55})
    return {"validation": {"n": 400, "loss": 0.7 - lift, **score}}


def task_runs(runs: Path, kind: str, decoder: bool = True) -> tuple[Path, Path]:
    """Writes a LoRA run and a distillation in stages on a task of mails.

    Args:
        kind: binary, four, multi-label or regression.
        decoder: whether the backbone is one.
    """
    classes, problem = CLASSES[kind], kind if kind in ("regression", "multi-label") else None
    config = {"rows": {"train": 3000, "validation": 400}, "classes": classes, "data_files": {"mails/train.csv": HASH},
              "command": f"python run.py LoRA {SR} --task csv --data mails --rank 8", "backbone": {
        "kind": "gpt2" if decoder else "bert", "decoder": decoder, "num_hidden_layers": 2, "hidden_size": 32,
        "num_attention_heads": 2, "vocab_size": 500}} | ({"problem": problem} if problem else {})
    size = len(classes)
    own = {"n": 100, "precision": 0.5, "recall": 0.6, "f1": 0.55}
    by_class = {"validation": {"per_class": dict.fromkeys(classes, own)}}
    if not problem:
        by_class["validation"]["confusion"] = [[40 + 10 * (i == j) for j in range(size)] for i in range(size)]
    more = {"by_class": by_class} if classes else {}

    def line(number: int, lift: float, **names) -> dict:
        scores = {} if problem else {"cross_entropy": 0.6 / number, "accuracy": 0.7, "mcc": 0.4}
        train = {"loss": 0.9 / number, **scores}
        return {**names, "epoch": number, "train": train, "validation": scores_of(kind, lift + number / 20),
                "learning_rate": 1e-3, "seconds": 1.5, "tokens": 5000}

    model = {"mode": "LoRA", "sr": SR, "model": "backbone", "task": "csv", "method": "lora", "best_epoch": 3,
             "last_epoch": 3, "parameters": {"total": 100000, "trainable": 5000, "reduction_percent": 95.0}, "train": TRAIN,
             "validation": scores_of(kind, 0.15), "last_validation": scores_of(kind, 0.15), **more}
    lora = write_run(runs / f"LoRA-{SR}", model, [line(n, 0) for n in (1, 2, 3)], **config)

    def student(lift: float, speed: float) -> dict:
        stages = [{"stage": stage, "best_epoch": 2, "validation": scores_of(kind, lift + 0.1), "loss": 0.4, "epochs": 2,
                   "steps": steps, "seconds": 2.5, "tokens": 10000} for stage, steps in (("transfer", 300), ("gold", 100))]
        return {"parameters": 9000, "validation": scores_of(kind, lift + 0.1), "best_epoch": 2, "last_epoch": 2, **more,
                "last_validation": scores_of(kind, lift + 0.1), "sentences_per_second": speed, "stages": stages}

    summary = {"mode": "distil", "sr": SR, "model": "backbone", "task": "csv", "train": TRAIN,
               "teacher": {"run": f"runs/LoRA-{SR}", "parameters": 100000, "validation": scores_of(kind, 0.15),
                           "sentences_per_second": 100.0},
               "student": student(0.02, 2000.0), "scratch": student(0.0, 1950.0),
               "distillation": {"temperature": 2.0, "alpha": 0.5, "loss": 0.4}}
    metrics = [line(n, lift, phase=phase, stage=stage) for phase, lift in (("student", 0.02), ("scratch", 0.0))
               for stage in ("transfer", "gold") for n in (1, 2)]
    distil = write_run(runs / f"distil-{SR}", summary, metrics, **config, architecture={
        "vocab_size": 500, "num_labels": size or 1, "embedding_size": 8, "hidden_size": 16, "directions": 1, "rnn_layers": 1,
        "cell": "lstm", "pooling": "attention"})
    path = distil / "config.json"
    content = json.loads(path.read_text())
    content["options"] = {"kd_alpha": 0.5, "kd_loss": "kl", "temperature": 2.0, "match": "hidden", "match_size": 16,
                          "match_weight": 1.0, "score_weight": 0.5, "gold_repeats": 2, "preset": "distil"}
    path.write_text(json.dumps(content))
    return lora, distil
