"""Ships a student or a fine-tuned classifier as an ONNX file, and the latter as a plain checkpoint too.

    python run.py export runs/distil-12345 --out student --int8
    python run.py export runs/LoRA-12345 --out classifier
    python run.py merge runs/LoRA-12345 --out merged
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import data_utils
import speed
from data_utils import Split
from experiments.evaluate import load_finetuned, load_student
from experiments.inputs import load_task
from machine.errors import UserError
from model import TextClassifier
from options.schema import RunOptions
from record.calibration import calibration_of
from record.config_json import rebuild
from record.files import check_new_folder
from record.folder import read_run
from serving import export_student, export_teacher, merge
from serving.packages import require
from serving.texts import Reading

STAND_INS = 100  # sentences of each split of the built-in task


def export_run(folder: Path, out: Path, int8: bool = False, baseline: bool = False, calibrated: bool = False,
               say: Callable[[str], None] = print) -> None:
    """Writes a run's network as an ONNX model with tokenizer and example: a student, or a classifier, its adapter merged.

    Args:
        baseline: write the baseline of a distillation instead of its student.
        calibrated: divide the logits by the temperature of calibration.json, and choose the class by its threshold.

    Raises:
        UserError: not a finished run, one that reads more than text, `out` is not new, a package is missing, or onnxruntime
            disagrees.
    """
    if baseline and calibrated:
        raise UserError("--calibrated: calibration.json is the student's; leave out --control")
    # Whatever can be refused is refused before the model is loaded.
    check_new_folder(out)
    config, summary = read_run(folder)
    for package in ("onnx", "onnxruntime", *(["onnxscript"] if summary["mode"] == "LoRA" else [])):
        require(package)
    reading = Reading.of(config, calibration_of(folder, calibrated))
    if summary["mode"] == "LoRA":
        if baseline:
            raise UserError(f"--control: {folder} is a LoRA run; the baseline is a distillation's")
        classifier, tokenizer = load_text_classifier(folder, config, "an ONNX file")
        rows = development_rows(folder, config["options"], reading.classes, tokenizer, say)
        export_teacher.write_classifier(classifier, tokenizer, reading, rows, out, int8=int8, say=say,
                                        exact=config["options"]["precision"] != "bf16")
        return
    student, tokenizer, options = load_student(folder, "scratch" if baseline else "student")
    if len(reading.classes) != student.config.num_labels:
        raise UserError(f"{folder}: damaged student ({student.config.num_labels} outputs for {len(reading.classes)} "
                        "classes)")
    rows = development_rows(folder, options, reading.classes, tokenizer, say)
    export_student.write_student(student.cpu(), tokenizer, reading, rows, out, int8=int8, say=say)


def load_text_classifier(folder: Path, config: dict, form: str) -> tuple[TextClassifier, object]:
    """Loads the classifier of a LoRA run for another form, in float32 where the run was, and its tokenizer.

    Args:
        form: the other form, in words, for the error.

    Raises:
        UserError: the run reads more than text.
    """
    options = config["options"]
    if options.get("feature_columns"):
        raise UserError(f"{folder}: reads the features {', '.join(options['feature_columns'])} beside the text, for which "
                        f"{form} has no place")
    classifier, tokenizer, _ = load_finetuned(folder)
    # Others compute in plain float32, and so must the logits that theirs are compared with.
    if options["precision"] == "bf16x3":
        speed.set_precision(classifier.net.base_model, "fp32")
    return classifier.cpu(), tokenizer


def merge_run(folder: Path, out: Path, calibrated: bool = False, say: Callable[[str], None] = print) -> None:
    """Writes a fine-tuned classifier as a plain `transformers` checkpoint, its adapter merged.

    Args:
        calibrated: divide the logits by the temperature of calibration.json, and write a card that names the threshold.

    Raises:
        UserError: not a finished LoRA run, one that reads more than text, `out` is not new, or the adapter is not finite.
    """
    check_new_folder(out)
    config, _ = read_run(folder, "LoRA")
    options = config["options"]
    classifier, tokenizer = load_text_classifier(folder, config, "a plain checkpoint")
    reading = Reading.of(config, calibration_of(folder, calibrated))
    rows = development_rows(folder, options, reading.classes, tokenizer, say)
    merge.write_checkpoint(classifier, tokenizer, reading, rows.sentences, out,
                           exact=options["precision"] != "bf16", say=say)


def development_rows(folder: Path, options: dict, classes: tuple[str, ...], tokenizer, say: Callable[[str], None]
                     ) -> Split:
    """Returns the run's development rows, all splits together, without features.

    Where the run's data are gone, sentences of the built-in grammar stand in, without labels, and that is said.
    """
    try:
        task = load_task(rebuild(RunOptions, options, out=folder), tokenizer)
        if list(task.classes) != list(classes):
            raise UserError("the classes are no longer those of the run")
        labelled = True
    except UserError as error:
        # A run may outlive its data. The check then needs other sentences.
        say(f"  the run's data cannot be read ({error}); the built-in task's sentences stand in for the check")
        task, labelled = data_utils.load_task("tiny").limit(STAND_INS), False
    # Neither an ONNX file nor a plain checkpoint reads features.
    splits = [replace(split, features=[]) for split in task.dev.values()]
    return Split([text for split in splits for text in split.sentences],
                 [label for split in splits for label in split.labels if labelled])


# ---------------------------------------------------------------- the command line


def export_main(args) -> None:
    """Writes the network of a run as an ONNX model and prints its folder."""
    export_run(args.run, args.out, args.int8, args.control, args.calibrated)
    print(f"export: {args.out}")


def merge_main(args) -> None:
    """Writes the merged classifier and prints its folder."""
    merge_run(args.run, args.out, args.calibrated)
    print(f"merge: {args.out}")
