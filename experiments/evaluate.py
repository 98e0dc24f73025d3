"""What a run left behind: its model loaded again, and scored on a labelled file.

    python run.py eval runs/LoRA-12345 --data FILE
"""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import data_utils
import speed
import train_utils
from adapters import peft_layout
from data.backbones import load_tokenizer
from data.digests import tokenizer_digest
from data_utils import Split
from experiments.inputs import check_base, separator_of
from machine.errors import UserError
from machine.hardware import device
from model import DistilRNN, TextClassifier, load_classifier
from options.schema import RNNConfig, TableOptions, rebuild
from record import tensors
from record.files import read_json, write_file
from record.folder import read_run, warn_of_changed_data


def load_finetuned(folder: Path) -> tuple[TextClassifier, object, dict]:
    """Loads the classifier of a LoRA run, its tokenizer and its options.

    Raises:
        UserError: not a finished LoRA run, or damaged.
    """
    config, _ = read_run(folder, "LoRA")
    options = config["options"]
    tokenizer = load_tokenizer(options["model"])
    classifier, _ = load_classifier(options["model"], len(config.get("classes", data_utils.COLA_CLASSES)))
    check_base(folder, config, options["model"], classifier.net, tokenizer)
    columns = len(options.get("feature_columns") or ())
    # The training rows are in the saved statistics; what stands here is replaced by them.
    classifier.configure(options["method"], features=torch.zeros(1, columns, dtype=torch.float64) if columns else None)
    if options["method"] == "lora":
        peft_layout.load_adapter(classifier.net, folder)
    elif classifier.reads_text:
        state = tensors.load_tensors(Path(folder) / "trained.safetensors")
        own = classifier.state_dict()
        if any(name not in own or own[name].shape != value.shape for name, value in state.items()):
            raise UserError(f"{Path(folder) / 'trained.safetensors'}: made for another model")
        classifier.load_state_dict(state, strict=False)
    if classifier.feature_head is not None:
        path = Path(folder) / "features.safetensors"
        try:
            classifier.feature_head.load_state_dict(tensors.load_tensors(path))
        except RuntimeError:
            raise UserError(f"{path}: made for other features") from None
    # bf16x3 is a way of computing float32: where it cannot be had, the plain way gives the same up to rounding.
    plain = options["precision"] == "bf16x3" and (device().type != "cpu" or not speed.has_tiles())
    speed.install(classifier)
    speed.set_precision(classifier.net.base_model, "fp32" if plain else options["precision"])
    return classifier.requires_grad_(False).to(device()).eval(), tokenizer, options


def load_student(folder: Path, name: str = "student") -> tuple[DistilRNN, object, dict]:
    """Loads the student of a distillation run (or the no-KD baseline, `scratch`), its tokenizer and the run's options.

    Raises:
        UserError: not a finished distillation run, or damaged.
    """
    config, summary = read_run(folder, "distil")
    if name not in summary:
        raise UserError(f"{folder}: has no no-KD baseline (it was run with --no-control)")
    sizes = read_json(Path(folder) / "student_config.json")
    try:
        student = DistilRNN(RNNConfig(**sizes))
        student.load_state_dict(tensors.load_tensors(Path(folder) / f"{name}.safetensors"))
    except (TypeError, KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder}: damaged student ({str(error).splitlines()[0]})") from None
    name, tokenizer = config["options"]["model"], load_tokenizer(config["options"]["model"])
    if config.get("tokenizer_sha256") not in (None, tokenizer_digest(tokenizer)):
        raise UserError(f"{folder}: the tokenizer of {name} is not the one that the student was trained with")
    speed.install(student)
    return student.to(device()).eval(), tokenizer, config["options"]


def answers(folder: Path, data: Path) -> tuple[Tensor, Split, list[str]]:
    """Returns a saved run's logits (N, labels) of a labelled file, the file's rows, and the classes' names.

    Args:
        folder: of a finished LoRA or distillation run (of which the student answers).
        data: in the format of the run's task, with the run's columns.
    """
    config, summary = read_run(folder)
    warn_of_changed_data(config, data)
    model, tokenizer, options = (load_finetuned if summary["mode"] == "LoRA" else load_student)(folder)
    classes = config.get("classes", data_utils.COLA_CLASSES)
    split = data_utils.read_rows(data, options["task"], rebuild(TableOptions, options), separator_of(tokenizer), classes)
    return logits_of(model, split, tokenizer, options), split, classes


def logits_of(model: TextClassifier | DistilRNN, split: Split, tokenizer, options: dict) -> Tensor:
    """Returns logits (N, labels) of a split's rows, batched as the run with these options batched development rows."""
    if isinstance(model, DistilRNN):
        split = replace(split, features=[])  # the student reads text alone
    return train_utils.compute_logits(model, data_utils.make_batches(
        split, tokenizer, options["max_length"], options["batch_size"], options["seed"], options.get("batch_tokens"),
        options.get("truncate", "tail"), shared_prefixes=True))


def evaluate_run(folder: Path, data: Path, predictions: Path | None = None) -> dict:
    """Scores a saved run on a labelled file of its task's format.

    Args:
        folder, data: see `answers`.
        predictions: if given, a TSV of sentence, label, prediction and probability (of the prediction).

    Returns:
        n, loss, accuracy, mcc, macro_f1, majority_accuracy, by_class {confusion, per_class}.
    """
    logits, split, classes = answers(folder, data)
    if predictions is not None:
        probability, chosen = logits.softmax(-1).max(-1)
        rows = zip(split.sentences, split.labels, chosen.tolist(), probability.tolist(), strict=True)
        write_file(predictions, "sentence\tlabel\tprediction\tprobability\n" + "".join(
            f"{' '.join(sentence.split())}\t{classes[label]}\t{classes[prediction]}\t{p:.6f}\n"
            for sentence, label, prediction, p in rows))
    answer = logits, torch.tensor(split.labels)
    matrix = train_utils.confusion(*answer)
    return {**train_utils.scores(*answer),
            "by_class": {"confusion": matrix, "per_class": train_utils.per_class(matrix, classes)}}
