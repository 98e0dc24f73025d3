"""Distils a fine-tuned teacher into a `DistilRNN`, and trains the same student without the teacher beside it.

    python run.py distil 12345
"""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

import train_utils
from data.digests import tokenizer_digest
from data_utils import Batch, Task
from experiments.evaluate import load_finetuned
from experiments.inputs import load_task, make_all_batches, resolve_precision, seed_everything
from model import DistilRNN, TextClassifier, count_parameters, student_config, student_parameters
from record import processes, tensors
from record.files import sha256, write_file, write_json
from record.folder import Recorder, finish, provenance, run_folder, use_recorded_machine
from record.machine import device
from record.options import DistilOptions, RNNConfig, RunOptions, TableOptions, as_json, rebuild, settings_of
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
    """Returns the teacher's logits (N, labels) on the training split: computed once and cached in a file.

    The file is keyed on the teacher's weights and on the token ids, so that a changed teacher, data
    set or tokenizer is never answered from it.

    Raises:
        UserError: the file is damaged.
    """
    key = tensors.weights_digest(teacher) + tensors.batches_digest(batches)
    if processes.of_first(path.exists()):
        cached, its_key = tensors.load_checked(path)
        if its_key == key:
            return cached["logits"]
    logits = train_utils.compute_logits(teacher, batches)
    tensors.save_checked(path, {"logits": logits}, key)
    return logits


@dataclass
class Prepared:
    """What a distillation starts from."""

    options: RunOptions  # with what the teacher's run decides filled in
    task: Task
    teacher: TextClassifier
    teacher_parameters: int
    tokenizer_sha256: str
    student: RNNConfig
    batches: list[Batch]  # the training split's, as the teacher reads them
    dev: dict[str, list[Batch]]  # the development splits', likewise


def prepare(options: RunOptions, distil_options: DistilOptions) -> Prepared:
    """Loads the teacher and its task, sizes the student, and makes the batches; writes nothing.

    Raises:
        UserError: bad input, a teacher that is not a finished LoRA run.
    """
    seed_everything(int(options.sr), options.deterministic)
    teacher, tokenizer, recorded = load_finetuned(distil_options.teacher)
    tokenizer_sha256 = tokenizer_digest(tokenizer)
    options = replace(options, model=recorded["model"], task=options.task or recorded["task"],
                      data=options.data or recorded["data"], limit=options.limit or recorded["limit"],
                      max_length=options.max_length or recorded["max_length"], table=rebuild(TableOptions, recorded))
    task = load_task(options, tokenizer)
    batches, dev = make_all_batches(task, tokenizer, options.max_length, options.train, options.table.truncate)
    teacher_parameters = count_parameters(teacher)["total"]
    student = student_config(len(tokenizer), task.num_labels, teacher_parameters // 10, **{
        name: getattr(distil_options, name)
        for name in ("embedding_size", "hidden_size", "rnn_layers", "cell", "pooling", "dropout")})
    return Prepared(options, task, teacher, teacher_parameters, tokenizer_sha256, student, batches, dev)


def config_of(run: Prepared, distil_options: DistilOptions) -> dict:
    """Returns what config.json records of a distillation."""
    settings = {**asdict(run.options.train), **asdict(distil_options), **settings_of(run.options), **asdict(run.student)}
    return {**provenance(as_json(settings), run.task.files), "architecture": asdict(run.student),
            "classes": list(run.task.classes), "tokenizer_sha256": run.tokenizer_sha256,
            "teacher_files": {path.name: sha256(path)
                              for path in sorted(Path(distil_options.teacher).glob("*.safetensors"))}}


def run_distil(options: RunOptions, distil_options: DistilOptions, say: Callable[[str], None] = print,
               stop: Callable[[], int | None] = lambda: None) -> dict:
    """Distils a fine-tuned teacher into a `DistilRNN`, then trains the same student without the teacher.

    Both students start from the same weights and get the same batches, order and number of steps.

    Returns:
        The summary, as in summary.json.

    Raises:
        UserError: bad input, a teacher that is not a finished LoRA run.
        train_utils.Diverged, signals.Interrupted: the last good checkpoint stays.
    """
    use_recorded_machine(options)
    options = resolve_precision(options)
    run = prepare(options, distil_options)
    options, parameters = run.options, student_parameters(run.student)
    with run_folder(options, config_of(run, distil_options)) as folder:
        say(f"distilling {distil_options.teacher} ({run.teacher_parameters:,} parameters) into a student "
            f"({run.student.cell.upper()}) of {parameters:,} ({100 * parameters / run.teacher_parameters:.1f} %)")
        logits = teacher_logits(run.teacher, run.batches, folder / "teacher_logits.safetensors").to(device())
        smoothing, recorder = options.train.label_smoothing, Recorder(folder, say)
        kd = train_utils.distillation(logits, distil_options.temperature, distil_options.kd_alpha, smoothing)
        say("student with KD")
        student, loss = train_student(run, "student", kd, folder, recorder, stop)
        say("the same student without the teacher")
        scratch, _ = train_student(run, "scratch", train_utils.cross_entropy(smoothing), folder, recorder, stop)
        write_json(folder / "student_config.json", asdict(run.student))
        summary = {"mode": "distil", "sr": options.sr, "model": options.model, "task": run.task.name,
                   "teacher": {"run": str(distil_options.teacher), "parameters": run.teacher_parameters,
                               "validation": train_utils.validate(run.teacher, run.dev)[0],
                               "sentences_per_second": sentences_per_second(run.teacher, run.dev, passes=1)},
                   "student": student, "scratch": scratch,
                   "distillation": {"temperature": distil_options.temperature, "alpha": distil_options.kd_alpha,
                                    "loss": loss},
                   "train": student["train"]}
        finish(folder, summary)
    return summary


def train_student(run: Prepared, phase: str, objective: train_utils.Objective, folder: Path, recorder: Recorder,
                  stop: Callable[[], int | None]) -> tuple[dict, float]:
    """Trains one student and writes its weights.

    Args:
        phase: `student` or `scratch`, the no-KD baseline: the name of its files and of its lines in metrics.jsonl.

    Returns:
        Its part of the summary, and the training loss of its best epoch.
    """
    options = run.options
    batches, dev = _texts_only(run.batches), {split: _texts_only(rows) for split, rows in run.dev.items()}
    torch.manual_seed(int(options.sr))  # the same initial weights and dropout for both
    model = DistilRNN(run.student).to(device())
    progress = train_utils.fit(
        model, batches, dev, objective, options.train, folder=folder, resume=options.resume, name=f"{phase}.",
        select=selection_split(run.task.dev), stop=stop, on_epoch=lambda history: recorder(history, phase))
    write_file(folder / f"{phase}.safetensors", save({n: t.cpu() for n, t in model.state_dict().items()}))
    result = {"parameters": student_parameters(run.student),
              **best_and_last(progress.best_epoch, progress.history, run.task.classes),
              "sentences_per_second": sentences_per_second(model.eval(), dev),
              "train": training_summary(progress, batches)}
    return result, progress.history[progress.best_epoch - 1]["train"]["loss"]


def _texts_only(batches: list[Batch]) -> list[Batch]:
    """Returns the batches without numeric features, for the student reads text alone."""
    return [replace(batch, features=None, micro=batch.micro and _texts_only(batch.micro)) for batch in batches]


def comparison_table(summary: dict) -> str:
    """Formats teacher, student and no-KD baseline side by side, for the terminal."""
    names = {"teacher": "teacher", "student": "student with KD", "scratch": "student without"}
    splits = list(summary["teacher"]["validation"])
    head = "".join(f"{split + ' acc':>20}{'MCC':>8}" for split in splits)
    lines = [f"  {'':<16}{'parameters':>14}{'sentences/s':>13}" + head]
    for key, name in names.items():
        row = summary[key]
        lines.append(f"  {name:<16}{row['parameters']:>14,}{row['sentences_per_second']:>13,.0f}" + "".join(
            f"{row['validation'][split]['accuracy']:>20.3f}{row['validation'][split]['mcc']:>8.3f}" for split in splits))
    return "\n".join(lines)
