"""Runs: fine-tune a classifier, distil it into a student, evaluate what a run left behind.

Each function takes typed options, leaves a folder under `runs/` and returns its summary. It prints
what a person would want to watch; nothing here parses a command line.
"""
from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from lora import adapters
from lora import amx
import data_utils
from lora import frozen
from record import memory
import train_utils
from data.backbones import is_decoder, load_config, load_tokenizer, max_length_of
from data_utils import Batch, Task
from record.files import UserError, read_json, sha256, write_file, write_json
from model import (DistilRNN, FeatureHead, LoRAOptions, RNNConfig, TextClassifier, count_parameters, inject_lora,
                   load_classifier, lora_layers, student_config)
from experiments.runs import (Recorder, RunOptions, as_json, device, finish, provenance, read_run, rebuild, run_folder,
                  settings_of, use_recorded_threads, warn_of_changed_data)
from data.tables import TableOptions
from train_utils import TrainOptions

SANITY_PROMPT, SANITY_TOKENS = "The", 12
DEFAULT_MODEL, DEFAULT_TASK = "gpt2", "cola"


@dataclass(frozen=True)
class DistilOptions:
    """The teacher, the student and the KD loss."""

    teacher: Path
    temperature: float = 4.0
    kd_alpha: float = 0.9
    embedding_size: int | None = None
    hidden_size: int | None = None
    rnn_layers: int = 1
    cell: str = "lstm"
    pooling: str = "max"
    dropout: float = 0.3


# ---------------------------------------------------------------- what a run starts from

def choose(model: str | None, task: str | None, data: str | None, notice: Callable[[str], None],
           need_task: bool = True) -> tuple[str, str, str | None]:
    """Fills in the defaults: GPT-2 on CoLA, or the embedded pair where the Hub cannot be reached.

    Only somebody who named neither model, task nor data is served the embedded default; what was asked
    for by name is never replaced.

    Args:
        notice: told, visibly, when the embedded default is used instead.
        need_task: whether the task's files must be there too.
    """
    if model is None and task == "tiny" and data is None:
        return "tiny", task, None
    if model is not None or task is not None or data is not None:
        return model or DEFAULT_MODEL, task or _task_of(model, data), data
    try:
        load_config(DEFAULT_MODEL)
        if need_task:
            data_utils.load_task(DEFAULT_TASK)
        return DEFAULT_MODEL, DEFAULT_TASK, None
    except UserError:
        what = f"{DEFAULT_MODEL} and {DEFAULT_TASK} are" if need_task else f"{DEFAULT_MODEL} is"
        used = "--model tiny --task tiny" if need_task else "--model tiny"
        notice(f"NOTICE: the Hugging Face Hub cannot be reached and {what} not cached; using the embedded {used} instead")
        return "tiny", "tiny", None


def _task_of(model: str | None, data: str | None) -> str:
    """The task that somebody means who named none: by what lies under --data."""
    if data is None:
        return "tiny" if model == "tiny" else DEFAULT_TASK
    folder = Path(data)
    is_cola = any((folder / name).exists() for name in data_utils.COLA_FILES.values())
    return "csv" if folder.is_file() or folder.is_dir() and any(folder.iterdir()) and not is_cola else DEFAULT_TASK


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seeds Python, NumPy and PyTorch, and sets the allocator up for training."""
    memory.keep_freed_memory()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def separator_of(tokenizer) -> str:
    """What joins several text columns: the tokenizer's separator, or its end-of-text mark where it has none."""
    mark = tokenizer.sep_token or tokenizer.eos_token
    return f" {mark} " if mark else " "


def _load_task(options: RunOptions, tokenizer) -> Task:
    task = data_utils.load_task(options.task, options.data, options.table, separator_of(tokenizer))
    if options.method == "features" and not task.train.features:
        raise UserError("--method features: needs --feature-columns")
    return task.limit(options.limit) if options.limit else task


def _batches(task: Task, tokenizer, max_length: int, options: TrainOptions, truncate: str, beginnings: bool = False
             ) -> tuple[list[Batch], dict[str, list[Batch]]]:
    # Scores do not depend on who stands in a batch, but for rounding: alike for all models, as in `evaluate_run`.
    make = [(split, data_utils.make_batches(rows, tokenizer, max_length, options.batch_size, options.seed,
                                            options.batch_tokens, truncate, beginnings or bool(split)))
            for split, rows in {"": task.train, **task.dev}.items()]
    return data_utils.split_large(make[0][1]), dict(make[1:])


def selection_split(splits) -> str:
    """The split (by name, of the task or of its scores) whose MCC chooses the best epoch: in-domain where there is one."""
    return "in_domain" if "in_domain" in splits else next(iter(splits))


def _training_summary(progress: train_utils.Progress, batches: list[Batch]) -> dict:
    seconds, tokens = (sum(line[key] for line in progress.history) for key in ("seconds", "tokens"))
    return {"epochs": len(progress.history), "steps": progress.step, "seconds": seconds, "tokens": tokens,
            "tokens_per_second": tokens / seconds if seconds else 0.0,
            "padding_percent": data_utils.padding_percent(batches), "peak_memory_bytes": memory.peak_memory_bytes()}


def _result(best_epoch: int, history: list[dict], classes: tuple[str, ...]) -> dict:
    """Best and last epoch, alike; the best one by class too."""
    best, last = next(line for line in history if line["epoch"] == best_epoch), history[-1]
    by_class = {split: {"confusion": matrix, "per_class": train_utils.per_class(matrix, classes)}
                for split, matrix in best["confusion"].items()}
    return {"best_epoch": best_epoch, "validation": best["validation"], "by_class": by_class,
            "last_epoch": last["epoch"], "last_validation": last["validation"]}


def parameter_table(counts: dict) -> str:
    """Total, trainable and frozen parameters and the reduction, for the terminal."""
    rows = [("total", f"{counts['total']:,}"), ("trainable", f"{counts['trainable']:,}"),
            ("frozen", f"{counts['total'] - counts['trainable']:,}"), ("reduction", f"{counts['reduction_percent']:.2f} %")]
    return "\n".join(f"  {name:<10} {value:>16}" for name, value in rows)


# ---------------------------------------------------------------- LoRA

def greedy(lm, tokenizer, prompt: str, tokens: int) -> Tensor:
    """Token ids (1, T) of a greedy continuation, prompt included."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(lm.device)
    with torch.inference_mode():
        return lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                           pad_token_id=lm.generation_config.eos_token_id)


@torch.inference_mode()
def is_greedy(lm, ids: Tensor, prompt: int) -> bool:
    """Whether each token of (1, T) after the first `prompt` ones is the model's likeliest: one pass, not one a token."""
    logits = lm(input_ids=ids, use_cache=False).logits  # (1, T, vocabulary)
    return torch.equal(logits[:, prompt - 1:-1].argmax(-1), ids[:, prompt:])


def adapt(classifier: TextClassifier, method: str, lora: LoRAOptions) -> None:
    """Marks what trains: LoRA and the head, everything, the head alone, or nothing."""
    classifier.full = method == "full"
    if method == "lora":
        inject_lora(classifier.net, lora)
    elif method == "head":
        classifier.net.base_model.requires_grad_(False)
    elif method == "features":
        classifier.net.requires_grad_(False)
        classifier.reads_text = False
    elif method == "none":
        classifier.requires_grad_(False)


def to_precision(classifier: TextClassifier, precision: str) -> None:
    """How the products with frozen weights are computed; what trains stays float32.

    bf16: frozen weights become bfloat16. On a CPU that is the adapted projections alone, and activations stay
    float32: its matrix products gain from bfloat16, its other operations lose.

    bf16x3: all numbers stay float32, and a product of the fused blocks with a frozen weight, the update's second factor
    beside it, is three of bfloat16 (amx.py).

    Raises:
        UserError: bf16x3, and this machine cannot do it.
    """
    if precision == "fp32" or classifier.full:
        return
    if precision == "bf16x3":
        if device().type != "cpu":
            raise UserError("--precision bf16x3: is for CPUs; on a GPU use bf16 or fp32")
        amx.load()
        for module in classifier.net.base_model.modules():
            if isinstance(module, nn.Linear | Conv1D) and not module.weight.requires_grad:
                module.tiles = True  # read by lora.product
        return
    adapted = [layer.base for layer in lora_layers(classifier.net).values()]
    for module in adapted if adapted and device().type == "cpu" else [classifier.net.base_model]:
        for p in module.parameters():
            if not p.requires_grad:
                p.data = p.data.bfloat16()


def finetune(options: RunOptions, say: Callable[[str], None] = print, stop: Callable[[], int | None] = lambda: None,
             on_epoch: Callable[[list[dict], dict], None] = lambda history, counts: None) -> dict:
    """Fine-tunes a classifier and writes the run's folder.

    Args:
        stop: asked after each step; a signal number ends the run, which can be resumed.
        on_epoch: called after each epoch with the lines of metrics.jsonl so far and the parameters' counts; what it
            raises ends the run.

    Returns:
        The summary, as in summary.json.

    Raises:
        UserError: bad input, before anything is written.
        train_utils.Diverged, signals.Interrupted: the last good checkpoint is kept.
    """
    use_recorded_threads(options)
    seed_everything(int(options.sr), options.deterministic)
    tokenizer = load_tokenizer(options.model)
    task = _load_task(options, tokenizer)
    classifier, lm = load_classifier(options.model, task.num_labels)
    max_length = min(options.max_length or 10 ** 9, max_length_of(classifier.net.config))
    if lm is not None and options.method == "lora":
        ids = greedy(lm, tokenizer, SANITY_PROMPT, SANITY_TOKENS)
    base = frozen.digest_meanwhile(classifier.net.base_model)  # on a core that tokenising leaves idle
    torch.manual_seed(int(options.sr))  # again: A must not depend on what loading drew
    adapt(classifier, options.method, options.lora)
    if task.train.features:
        classifier.feature_head = FeatureHead(torch.tensor(task.train.features, dtype=torch.float64), task.num_labels)
        classifier.feature_head.requires_grad_(options.method != "none")
    counts = count_parameters(classifier)
    say(f"{options.model}, {options.method} on {task.name}: {len(task.train):,} training sentences, classes "
        f"{', '.join(task.classes[:10])}{', ...' if task.num_labels > 10 else ''}\n{parameter_table(counts)}")
    for name, rows in task.missing.items():
        if rows:
            say(f"  feature {name}: no value in {rows:,} of {len(task.train):,} training rows; the mean stands in, marked")
    batches, dev = _batches(task, tokenizer, max_length, options.train, options.table.truncate, classifier.decoder)
    sanity = None
    if lm is not None and options.method == "lora":
        text = tokenizer.decode(ids[0], skip_special_tokens=True)
        # Generated again only where a pass over the text leaves a doubt, as rounding may between near equals.
        if not is_greedy(lm, ids, len(tokenizer(SANITY_PROMPT).input_ids)):
            after = greedy(lm, tokenizer, SANITY_PROMPT, SANITY_TOKENS)
            if not torch.equal(after, ids):
                raise RuntimeError(f"a fresh adapter changed the generated text: {text!r} became "
                                   f"{tokenizer.decode(after[0], skip_special_tokens=True)!r}")
        sanity = {"prompt": SANITY_PROMPT, "text": text, "equal_to_base": True}
        say(f"  sanity: greedy text after injection equals the base model's: {text!r}")
    to_precision(classifier, options.train.precision)
    classifier.to(device())
    settings = {**asdict(options.lora), **asdict(options.train), **settings_of(options), "max_length": max_length}
    record_config = {**provenance(as_json(settings), task), "base_sha256": base.result(), "classes": list(task.classes)}
    with run_folder(options, record_config) as folder:
        record = Recorder(folder, say)
        if options.method == "none":
            progress = train_utils.Progress(best_epoch=0, history=[])
            validation, matrices = train_utils.validate(classifier, dev)
            result = _result(0, [{"epoch": 0, "validation": validation, "confusion": matrices}], task.classes)
        else:
            prefix = frozen.FrozenPrefix(classifier)
            if options.keep and prefix.lowest > 0 and classifier.reads_text:
                start, used = time.perf_counter(), 0
                for split in (batches, *dev.values()):
                    used = prefix.cache(split, folder, int(options.keep_memory * 2 ** 30), used)
                say(f"  kept what the {prefix.lowest} frozen blocks below the lowest trained one compute: "
                    f"{used / 2 ** 20:.0f} MiB in memory, {time.perf_counter() - start:.1f} s")
            progress = train_utils.fit(classifier, batches, dev, train_utils.cross_entropy(options.train.label_smoothing),
                                       options.train, folder=folder, resume=options.resume, select=selection_split(task.dev),
                                       on_epoch=lambda history: (record(history), on_epoch(history, counts)),
                                       stop=stop)
            result = _result(progress.best_epoch, progress.history, task.classes)
        save_trained(classifier, options.method, folder, options.model)
        summary = {"mode": options.mode, "sr": options.sr, "model": options.model, "task": task.name,
                   "method": options.method, "classes": list(task.classes), "parameters": counts, **result,
                   "train": _training_summary(progress, batches), "sanity": sanity}
        finish(folder, summary)
    return summary


def check(options: RunOptions) -> Task:
    """Raises what `finetune` would of a task, model, target, layer or rank, without loading weights; returns the task."""
    config = load_config(options.model)
    is_decoder(config)  # or says that there is no classifier of that kind
    task = _load_task(options, load_tokenizer(options.model))
    config.num_labels = task.num_labels
    with torch.device("meta"):
        classifier = TextClassifier(AutoModelForSequenceClassification.from_config(config))
    adapt(classifier, options.method, options.lora)
    return task


def save_trained(classifier: TextClassifier, method: str, folder: Path, base: str) -> None:
    """Writes what was trained: an adapter with its head in PEFT's layout, else the trained tensors by name.

    A feature head, of which PEFT knows nothing, goes into a file of its own.
    """
    def write(name: str, tensors: dict[str, Tensor]) -> None:
        write_file(folder / name, save({n: t.cpu().contiguous() for n, t in tensors.items()}))

    if method == "lora":
        adapters.save_adapter(classifier, folder, base)
    elif method != "features":
        state = classifier.net.state_dict(prefix="net.")
        heads = tuple(f"net.{head}." for head in classifier.head_names())
        write("trained.safetensors", {n: t for n, t in state.items() if method == "full" or n.startswith(heads)})
    if classifier.feature_head is not None:
        write("features.safetensors", classifier.feature_head.state_dict())


# ---------------------------------------------------------------- what a run left behind

def load_finetuned(folder: Path) -> tuple[TextClassifier, object, dict]:
    """The classifier of a LoRA run, its tokenizer and its options.

    Raises:
        UserError: not a finished LoRA run, or damaged.
    """
    config, _ = read_run(folder, "LoRA")
    options = config["options"]
    classifier, _ = load_classifier(options["model"], len(config.get("classes", data_utils.COLA_CLASSES)))
    classifier.full = options["method"] == "full"
    if config.get("base_sha256") not in (None, frozen.weights_digest(classifier.net.base_model)):
        raise UserError(f"{folder}: adapter for another base: the weights of {options['model']} are not those that the "
                        "run was trained on")
    classifier.reads_text = options["method"] != "features"
    if options["method"] == "lora":
        adapters.load_adapter(classifier.net, folder)
    elif classifier.reads_text:
        state = adapters.load_tensors(Path(folder) / "trained.safetensors")
        own = classifier.state_dict()
        if any(name not in own or own[name].shape != value.shape for name, value in state.items()):
            raise UserError(f"{Path(folder) / 'trained.safetensors'}: made for another model")
        classifier.load_state_dict(state, strict=False)
    if options.get("feature_columns"):
        state, path = adapters.load_tensors(Path(folder) / "features.safetensors"), Path(folder) / "features.safetensors"
        classifier.feature_head = FeatureHead(torch.zeros(1, len(options["feature_columns"]), dtype=torch.float64),
                                              len(config["classes"]))
        try:
            classifier.feature_head.load_state_dict(state)
        except RuntimeError:
            raise UserError(f"{path}: made for other features") from None
    # bf16x3 is a way of computing float32: where it cannot be had, the plain way gives the same up to rounding.
    plain = options["precision"] == "bf16x3" and (device().type != "cpu" or not amx.available())
    to_precision(classifier.requires_grad_(False), "fp32" if plain else options["precision"])
    return classifier.to(device()).eval(), load_tokenizer(options["model"]), options


def load_student(folder: Path, name: str = "student") -> tuple[DistilRNN, object, dict]:
    """The student of a distillation run (or its control, `scratch`), its tokenizer and the run's options.

    Raises:
        UserError: not a finished distillation run, or damaged.
    """
    config, _ = read_run(folder, "distil")
    sizes = read_json(Path(folder) / "student_config.json")
    try:
        student = DistilRNN(RNNConfig(**sizes))
        student.load_state_dict(adapters.load_tensors(Path(folder) / f"{name}.safetensors"))
    except (TypeError, KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder}: damaged student ({str(error).splitlines()[0]})") from None
    return student.to(device()).eval(), load_tokenizer(config["options"]["model"]), config["options"]


def evaluate_run(folder: Path, data: Path, predictions: Path | None = None) -> dict:
    """Scores a saved run on a labelled file of its task's format.

    Args:
        folder: of a finished LoRA or distillation run.
        data: in the format of the run's task, with the run's columns.
        predictions: if given, a TSV of sentence, label, prediction and probability (of the prediction).

    Returns:
        n, loss, accuracy, mcc, macro_f1, majority_accuracy, by_class {confusion, per_class}.
    """
    config, summary = read_run(folder)
    warn_of_changed_data(config, data)
    model, tokenizer, options = (load_finetuned if summary["mode"] == "LoRA" else load_student)(folder)
    classes = config.get("classes", data_utils.COLA_CLASSES)
    split = data_utils.read_rows(data, options["task"], rebuild(TableOptions, options), separator_of(tokenizer), classes)
    if summary["mode"] == "distil":
        split = replace(split, features=[])  # the student reads text alone
    batches = data_utils.make_batches(split, tokenizer, options["max_length"], options["batch_size"], options["seed"],
                                      options.get("batch_tokens"), options.get("truncate", "tail"),
                                      beginnings=True)
    logits = train_utils.compute_logits(model, batches)
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


# ---------------------------------------------------------------- distillation

def sentences_per_second(model, dev: dict[str, list[Batch]], passes: int = 3) -> float:
    """Sentences classified in a second over the development splits, batched by length; the best of `passes`."""
    batches = [batch for split in dev.values() for batch in split]
    rows, best = sum(len(batch.rows) for batch in batches), float("inf")
    for _ in range(passes):
        start = time.perf_counter()
        with torch.inference_mode():
            for batch in batches:
                model(*batch.to(device()).inputs())
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return rows / best


def teacher_logits(teacher: TextClassifier, batches: list[Batch], path: Path) -> Tensor:
    """The teacher's logits (N, labels) on the training split: computed once and kept in a file.

    The file is keyed on the teacher's weights and on the token ids, so that a changed teacher, data
    set or tokenizer is never answered from it.

    Raises:
        UserError: the file is damaged.
    """
    key = frozen.weights_digest(teacher) + frozen.batches_digest(batches)
    if path.exists():
        kept, its_key = train_utils.load_checked(path)
        if its_key == key:
            return kept["logits"]
    logits = train_utils.compute_logits(teacher, batches)
    train_utils.save_checked(path, {"logits": logits}, key)
    return logits


def distil(options: RunOptions, distil_options: DistilOptions, say: Callable[[str], None] = print,
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
    task = _load_task(options, tokenizer)
    batches, dev = _batches(task, tokenizer, options.max_length, options.train, options.table.truncate)
    teacher_parameters = count_parameters(teacher)["total"]
    config = student_config(len(tokenizer), task.num_labels, teacher_parameters // 10, **{
        name: getattr(distil_options, name)
        for name in ("embedding_size", "hidden_size", "rnn_layers", "cell", "pooling", "dropout")})
    settings = {**asdict(options.train), **asdict(distil_options), **settings_of(options), **config.as_dict(),
                "max_length": options.max_length}
    record_config = {**provenance(as_json(settings), task), "architecture": config.as_dict(),
                     "classes": list(task.classes), "teacher_files": {path.name: sha256(path)
                                       for path in sorted(Path(distil_options.teacher).glob("*.safetensors"))}}
    with run_folder(options, record_config) as folder:
        say(f"distilling {distil_options.teacher} ({teacher_parameters:,} parameters) into a student "
            f"({config.cell.upper()}) of {config.parameters():,} ({100 * config.parameters() / teacher_parameters:.1f} %)")
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
            results[phase] = {"parameters": config.parameters(),
                              **_result(progress.best_epoch, progress.history, task.classes),
                              "sentences_per_second": sentences_per_second(model.eval(), dev_texts),
                              "train": _training_summary(progress, batches)}
            if phase == "student":
                final_loss = progress.history[progress.best_epoch - 1]["train"]["loss"]
        write_json(folder / "student_config.json", config.as_dict())
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
    """The batches without numeric features: the student reads text alone."""
    return [replace(batch, features=None) for batch in batches]


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
