"""Distils a fine-tuned teacher into a `DistilRNN`, and trains the same student without the teacher beside it.

    python run.py distil 12345              in stages: pretraining, the transfer set, the training set
    python run.py distil 12345 --plain      on the training set alone
"""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

import speed
import train_utils
from data.digests import tokenizer_digest
from data_utils import Batch, Task
from distillation.teachers import Averaged, embed_as
from experiments import stages
from experiments.evaluate import load_finetuned
from experiments.inputs import load_task, make_all_batches, resolve_precision, seed_everything
from experiments.stages import Stage
from experiments.transfer import Source
from machine import processes
from machine.errors import UserError
from machine.hardware import bf16_is_fast, device
from model import DistilRNN, TextClassifier, count_parameters, student_config, student_parameters
from options.schema import (
    PLAIN_SIZES,
    STAGED_SIZES,
    DistilOptions,
    RNNConfig,
    RunOptions,
    TableOptions,
    as_json,
    rebuild,
    settings_of,
)
from record import tensors
from record.files import read_json, sha256, write_file, write_json
from record.folder import Recorder, finish, provenance, run_folder
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
    if processes.broadcast(path.exists()):
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
    distil: DistilOptions  # likewise
    task: Task
    teacher: nn.Module  # the one, or several `Averaged`
    teachers: list[TextClassifier]
    teacher_parameters: int  # of the first
    tokenizer: object
    tokenizer_sha256: str
    base_sha256: str | None
    student: RNNConfig
    batches: list[Batch]  # the training split's, as the teacher reads them
    dev: dict[str, list[Batch]]  # the development splits', likewise


def prepare(options: RunOptions, distil_options: DistilOptions) -> Prepared:
    """Loads the teacher and its task, sizes the student, and makes the batches; writes nothing.

    Raises:
        UserError: bad input, a teacher that is not a finished LoRA run.
    """
    seed_everything(int(options.sr), options.deterministic)
    folders = [distil_options.teacher, *map(Path, distil_options.more_teachers)]
    loaded = [load_finetuned(folder) for folder in folders]
    teachers, (_, tokenizer, recorded) = [one for one, _, _ in loaded], loaded[0]
    for folder, (_, _, other) in zip(folders, loaded, strict=True):
        for name in ("model", "task", "data", "limit"):
            if other[name] != recorded[name]:
                raise UserError(f"--teacher {folder}: its {name} is {other[name]}, the first one's {recorded[name]}; "
                                "expected teachers of one task and base")
    tokenizer_sha256 = tokenizer_digest(tokenizer)
    options = replace(options, model=recorded["model"], task=options.task or recorded["task"],
                      data=options.data or recorded["data"], limit=options.limit or recorded["limit"],
                      max_length=options.max_length or recorded["max_length"], table=rebuild(TableOptions, recorded))
    task = load_task(options, tokenizer)
    batches, dev = make_all_batches(task, tokenizer, options.max_length, options.train, options.table.truncate)
    teacher = teachers[0] if len(teachers) == 1 else Averaged(teachers)
    teacher_parameters = count_parameters(teachers[0])["total"]
    if distil_options.directions is None:
        distil_options = replace(distil_options, directions=1 if teachers[0].decoder else 2)
    largest_first = PLAIN_SIZES if distil_options.plain else STAGED_SIZES[distil_options.directions]
    student = student_config(len(tokenizer), task.num_labels, teacher_parameters // 10, largest_first, **{
        name: getattr(distil_options, name)
        for name in ("embedding_size", "hidden_size", "directions", "rnn_layers", "cell", "pooling", "dropout")})
    if distil_options.augment is None:
        most = min(distil_options.augment_most, distil_options.augment_times * len(task.train))
        distil_options = replace(distil_options, augment=most)
    if distil_options.label_precision is None:
        staged = distil_options.pretrain or distil_options.transfer
        distil_options = replace(distil_options, label_precision="bf16" if staged and bf16_is_fast() else "teacher")
    base = read_json(distil_options.teacher / "config.json").get("base_sha256")
    return Prepared(options, distil_options, task, teacher, teachers, teacher_parameters, tokenizer, tokenizer_sha256, base,
                    student,
                    batches, dev)


def config_of(run: Prepared, distil_options: DistilOptions) -> dict:
    """Returns what config.json records of a distillation."""
    settings = {**asdict(run.options.train), **asdict(distil_options), **settings_of(run.options), **asdict(run.student)}
    files = {**run.task.files, **{file: sha256(file) for file in distil_options.text}}
    return {**provenance(as_json(settings), files), "architecture": asdict(run.student),
            "classes": list(run.task.classes), "tokenizer_sha256": run.tokenizer_sha256,
            "teacher_files": {path.name if number == 0 else str(path): sha256(path)
                              for number, folder in enumerate((distil_options.teacher, *distil_options.more_teachers))
                              for path in sorted(Path(folder).glob("*.safetensors"))}}


def run_distil(options: RunOptions, distil_options: DistilOptions, say: Callable[[str], None] = print,
               stop: Callable[[], int | None] = lambda: None) -> dict:
    """Distils a fine-tuned teacher into a `DistilRNN`, then trains the same student without the teacher (`control`).

    Both students start from the same weights and take the same number of steps in each stage; in the last one, on the
    training set, they get the same batches in the same order.

    Returns:
        The summary, as in summary.json.

    Raises:
        UserError: bad input, a teacher that is not a finished LoRA run.
        train_utils.Diverged, signals.Interrupted: the last good checkpoint stays.
    """
    speed.use_recorded_machine(options)
    options = resolve_precision(options)
    if processes.count() > 1 and not distil_options.plain:
        raise UserError(f"distil in stages is for one process, and here are {processes.count()}; --plain takes several")
    run = prepare(options, distil_options)
    options, distil_options, parameters = run.options, run.distil, student_parameters(run.student)
    with run_folder(options, config_of(run, distil_options)) as folder:
        say(f"distilling {distil_options.teacher} ({run.teacher_parameters:,} parameters) into a student "
            f"({run.student.cell.upper()}) of {parameters:,} ({100 * parameters / run.teacher_parameters:.1f} %)")
        first, control, logits = stages_before(run, distil_options, stop)
        if logits is None:
            logits = teacher_logits(run.teacher, run.batches, folder / "teacher_logits.safetensors")
        logits = logits.to(device())
        smoothing, recorder = options.train.label_smoothing, Recorder(folder, say)
        kd = train_utils.distillation(logits, distil_options.temperature, distil_options.kd_alpha, smoothing,
                                      distil_options.kd_loss)
        dev = {split: _texts_only(rows) for split, rows in run.dev.items()}
        gold = Stage("gold", _texts_only(run.batches), dev, kd, options.train, run.student.dropout)
        say("student with KD")
        student, loss = train_student(run, "student", [*first, gold], distil_options, folder, recorder, stop)
        scratch = {}
        if distil_options.control:
            say("the same student without the teacher")
            gold = replace(gold, objective=train_utils.cross_entropy(smoothing))
            scratch["scratch"], _ = train_student(run, "scratch", [*control, gold], distil_options, folder, recorder, stop,
                                                  same=first)
        write_json(folder / "student_config.json", asdict(run.student))
        more = {"more_runs": list(distil_options.more_teachers)} if distil_options.more_teachers else {}
        summary = {"mode": "distil", "sr": options.sr, "model": options.model, "task": run.task.name,
                   "teacher": {"run": str(distil_options.teacher), **more, "parameters": run.teacher_parameters,
                               "validation": train_utils.validate(run.teacher, run.dev)[0],
                               "sentences_per_second": sentences_per_second(run.teacher, run.dev, passes=1)},
                   "student": student, **scratch,
                   "distillation": {"temperature": distil_options.temperature, "alpha": distil_options.kd_alpha,
                                    "loss": loss},
                   "train": student["train"]}
        finish(folder, summary)
    return summary


def stages_before(run: Prepared, distil_options: DistilOptions, stop: Callable[[], int | None]
                  ) -> tuple[list[Stage], list[Stage], Tensor | None]:
    """Returns the stages before the training set, the student's and the no-KD baseline's; none with --plain.

    With them come the teacher's logits (N, labels) on the training set, which these stages read too; None without stages.
    """
    if not (distil_options.pretrain or distil_options.transfer):
        return [], [], None
    options, tokenizer = run.options, run.tokenizer
    cache = distil_options.cache or Path(options.out).parent
    base_sha256 = run.base_sha256 or tensors.weights_digest(run.teachers[0].net.base_model)
    source = Source.of(cache, base_sha256, run.tokenizer_sha256, run.task, tokenizer, options.model,
                       run.teachers[0].decoder, distil_options.text, stop)
    sentences = stages.read(source, run.task, run.teachers, [tensors.weights_digest(one) for one in run.teachers],
                            distil_options, options.max_length, options.table.truncate)
    dev = {split: _texts_only(rows) for split, rows in run.dev.items()}
    first = stages.first_stages(sentences, tokenizer, distil_options, options.train, dev, device())
    control = stages.control_stages(first, sentences, tokenizer, distil_options, options.train)
    return first, control, sentences.logits[sentences.transfer:]


def train_student(run: Prepared, phase: str, its_stages: list[Stage], distil_options: DistilOptions, folder: Path,
                  recorder: Recorder, stop: Callable[[], int | None], same: Sequence[Stage] = ()) -> tuple[dict, float]:
    """Trains one student in its stages, the last of which is the training set, and writes its weights.

    Args:
        phase: `student` or `scratch`, the no-KD baseline: the name of its files and of its lines in metrics.jsonl.
        same: stages that the student has been through: what is the baseline's stage too is not trained again.

    Returns:
        Its part of the summary, and the training loss of its best epoch in the last stage.
    """
    options, several = run.options, len(its_stages) > 1
    torch.manual_seed(int(options.sr))  # the same initial weights and dropout for both
    model = DistilRNN(run.student)
    if distil_options.student_embeddings == "teacher":
        embed_as(run.teachers[0], model)
    model, parts = model.to(device()), []
    for number, stage in enumerate(its_stages):
        if trained := any(stage is one for one in same):
            stages.take_over(folder, stage)
        progress, part = stages.run_stage(
            model, stage, number, device(), folder, options.resume or trained, phase, selection_split(run.task.dev),
            lambda history, name=stage.name: recorder(history, phase, name if several else None), stop)
        parts.append(part)
    write_file(folder / f"{phase}.safetensors", save({n: t.cpu() for n, t in model.state_dict().items()}))
    result = {"parameters": student_parameters(run.student),
              **best_and_last(progress.best_epoch, progress.history, run.task.classes),
              "sentences_per_second": sentences_per_second(model.eval(), its_stages[-1].dev),
              "train": training_summary(progress, its_stages[-1].batches), **({"stages": parts} if several else {})}
    return result, parts[-1]["loss"]


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
        if key not in summary:
            continue
        row = summary[key]
        lines.append(f"  {name:<16}{row['parameters']:>14,}{row['sentences_per_second']:>13,.0f}" + "".join(
            f"{row['validation'][split]['accuracy']:>20.3f}{row['validation'][split]['mcc']:>8.3f}" for split in splits))
    return "\n".join(lines)
