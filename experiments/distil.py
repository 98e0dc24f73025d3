"""Distils a fine-tuned teacher into a `DistilRNN`, and trains the same student without the teacher beside it.

    python run.py distil 12345
"""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

import train_utils
from data_utils import Batch
from experiments.evaluate import load_finetuned
from experiments.inputs import load_task, make_all_batches, seed_everything
from model import DistilRNN, TextClassifier, count_parameters, student_config, student_parameters
from record import processes, tensors
from record.files import sha256, write_file, write_json
from record.folder import Recorder, finish, provenance, run_folder, use_recorded_threads
from record.machine import device
from record.options import DistilOptions, RunOptions, TableOptions, as_json, rebuild, settings_of
from train_utils import best_and_last, selection_split, training_summary


def sentences_per_second(model, dev: dict[str, list[Batch]], passes: int = 3) -> float:
    """Sentences classified in a second over the development splits, batched by length; the best of `passes`."""
    batches = [batch for split in dev.values() for batch in split]
    rows, best = sum(len(batch.rows) for batch in batches), float("inf")
    for _ in range(passes):
        start = time.perf_counter()
        with torch.inference_mode():
            for batch in batches:
                model(*batch.to(device()).inputs())
            if device().type != "cpu":
                getattr(torch, device().type).synchronize()
        best = min(best, time.perf_counter() - start)
    return rows / best


def teacher_logits(teacher: TextClassifier, batches: list[Batch], path: Path) -> Tensor:
    """The teacher's logits (N, labels) on the training split: computed once and kept in a file.

    The file is keyed on the teacher's weights and on the token ids, so that a changed teacher, data
    set or tokenizer is never answered from it.

    Raises:
        UserError: the file is damaged.
    """
    key = tensors.weights_digest(teacher) + tensors.batches_digest(batches)
    if processes.of_first(path.exists()):
        kept, its_key = tensors.load_checked(path)
        if its_key == key:
            return kept["logits"]
    logits = train_utils.compute_logits(teacher, batches)
    tensors.save_checked(path, {"logits": logits}, key)
    return logits


def run_distil(options: RunOptions, distil_options: DistilOptions, say: Callable[[str], None] = print,
           stop: Callable[[], int | None] = lambda: None) -> dict:
    """Distils a fine-tuned teacher into a `DistilRNN`, then trains the same student without the teacher.

    Both students start from the same weights and get the same batches, order and number of steps.

    Returns:
        The summary, as in summary.json.

    Raises:
        UserError: bad input, a teacher that is not a finished LoRA run.
        train_utils.Diverged, signals.Interrupted: the last good checkpoint is kept.
    """
    use_recorded_threads(options)
    seed_everything(int(options.sr), options.deterministic)
    teacher, tokenizer, teacher_run = load_finetuned(distil_options.teacher)
    options = replace(options, model=teacher_run["model"], task=options.task or teacher_run["task"],
                      data=options.data or teacher_run["data"], limit=options.limit or teacher_run["limit"],
                      max_length=options.max_length or teacher_run["max_length"], table=rebuild(TableOptions, teacher_run))
    task = load_task(options, tokenizer)
    batches, dev = make_all_batches(task, tokenizer, options.max_length, options.train, options.table.truncate)
    teacher_parameters = count_parameters(teacher)["total"]
    config = student_config(len(tokenizer), task.num_labels, teacher_parameters // 10, **{
        name: getattr(distil_options, name)
        for name in ("embedding_size", "hidden_size", "rnn_layers", "cell", "pooling", "dropout")})
    parameters = student_parameters(config)
    settings = {**asdict(options.train), **asdict(distil_options), **settings_of(options), **asdict(config),
                "max_length": options.max_length}
    record_config = {**provenance(as_json(settings), task.files), "architecture": asdict(config),
                     "classes": list(task.classes), "teacher_files": {path.name: sha256(path)
                                       for path in sorted(Path(distil_options.teacher).glob("*.safetensors"))}}
    with run_folder(options, record_config) as folder:
        say(f"distilling {distil_options.teacher} ({teacher_parameters:,} parameters) into a student "
            f"({config.cell.upper()}) of {parameters:,} ({100 * parameters / teacher_parameters:.1f} %)")
        logits = teacher_logits(teacher, batches, folder / "teacher_logits.safetensors").to(device())
        kd = train_utils.distillation(logits, distil_options.temperature, distil_options.kd_alpha,
                                      options.train.label_smoothing)
        objectives = {"student": kd, "scratch": train_utils.cross_entropy(options.train.label_smoothing)}
        texts, dev_texts = _texts_only(batches), {split: _texts_only(rows) for split, rows in dev.items()}
        record, results = Recorder(folder, say), {}
        for phase, objective in objectives.items():
            say("student with KD" if phase == "student" else "the same student without the teacher")
            torch.manual_seed(int(options.sr))  # the same initial weights and dropout for both
            model = DistilRNN(config).to(device())
            progress = train_utils.fit(
                model, texts, dev_texts, objective, options.train, folder=folder, resume=options.resume, name=f"{phase}.",
                select=selection_split(task.dev), stop=stop, on_epoch=lambda history, phase=phase: record(history, phase))
            write_file(folder / f"{phase}.safetensors", save({n: t.cpu() for n, t in model.state_dict().items()}))
            results[phase] = {"parameters": parameters,
                              **best_and_last(progress.best_epoch, progress.history, task.classes),
                              "sentences_per_second": sentences_per_second(model.eval(), dev_texts),
                              "train": training_summary(progress, batches)}
            if phase == "student":
                final_loss = progress.history[progress.best_epoch - 1]["train"]["loss"]
        write_json(folder / "student_config.json", asdict(config))
        summary = {"mode": "distil", "sr": options.sr, "model": options.model, "task": task.name,
                   "teacher": {"run": str(distil_options.teacher), "parameters": teacher_parameters,
                               "validation": train_utils.validate(teacher, dev)[0],
                               "sentences_per_second": sentences_per_second(teacher, dev, passes=1)},
                   **results, "distillation": {"temperature": distil_options.temperature,
                                               "alpha": distil_options.kd_alpha, "loss": final_loss},
                   "train": results["student"]["train"]}
        finish(folder, summary)
    return summary


def _texts_only(batches: list[Batch]) -> list[Batch]:
    """Returns the batches without numeric features, for the student reads text alone."""
    return [replace(batch, features=None, micro=batch.micro and _texts_only(batch.micro)) for batch in batches]


def comparison_table(summary: dict) -> str:
    """Teacher, student and control side by side, for the terminal."""
    names = {"teacher": "teacher", "student": "student with KD", "scratch": "student without"}
    splits = list(summary["teacher"]["validation"])
    head = "".join(f"{split + ' acc':>20}{'MCC':>8}" for split in splits)
    lines = [f"  {'':<16}{'parameters':>14}{'sentences/s':>13}" + head]
    for key, name in names.items():
        row = summary[key]
        lines.append(f"  {name:<16}{row['parameters']:>14,}{row['sentences_per_second']:>13,.0f}" + "".join(
            f"{row['validation'][split]['accuracy']:>20.3f}{row['validation'][split]['mcc']:>8.3f}" for split in splits))
    return "\n".join(lines)
