"""Prepares the inputs of a run: model, task and data, the seed, the batches."""
from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import data_utils
import speed
from data.backbones import described, load_config
from data.digests import config_digest, tokenizer_digest
from data.hub import is_dataset_name, load_dataset
from data.segments import add_token_types, read_pairs, separator_of
from data_utils import Batch, Task
from machine import hardware, processes
from machine.errors import UserError
from metrics.problems import SINGLE_LABEL, Problem
from model import TextClassifier
from options.schema import RunOptions, TableOptions, TrainOptions
from record import tensors
from record.config_json import rebuild
from record.folder import recorded_config

# Digests of a base in config.json, and their names in the error of another base.
BASE = {"base_sha256": "other weights", "base_config_sha256": "another configuration",
        "tokenizer_sha256": "another tokenizer"}
DEFAULT_MODEL, DEFAULT_TASK = "gpt2", "cola"


def choose(model: str | None, task: str | None, data: str | None, notice: Callable[[str], None],
           need_task: bool = True) -> tuple[str, str, str | None]:
    """Fills in the defaults: GPT-2 on CoLA, or the built-in model and task if the Hub cannot be reached.

    The built-in default replaces nothing that was named.

    Args:
        notice: told, visibly, when the built-in default is used instead.
        need_task: whether the task's files must be there too.
    """
    # The built-in task has a model of its own.
    if model is None and task == "tiny" and data is None:
        return "tiny", task, None
    if model is not None or task is not None or data is not None:
        return model or DEFAULT_MODEL, task or _task_of(model, data), data
    # The configuration, a small file, tells whether the Hub or its cache has the model.
    try:
        load_config(DEFAULT_MODEL)
        if need_task:
            data_utils.load_task(DEFAULT_TASK)
        return DEFAULT_MODEL, DEFAULT_TASK, None
    except UserError:
        what = f"{DEFAULT_MODEL} and {DEFAULT_TASK} are" if need_task else f"{DEFAULT_MODEL} is"
        used = "--model tiny --task tiny" if need_task else "--model tiny"
        notice(f"NOTICE: the Hugging Face Hub cannot be reached and {what} not cached; using the built-in {used} instead")
        return "tiny", "tiny", None


def _task_of(model: str | None, data: str | None) -> str:
    """Chooses a task by the files under --data, if none was named."""
    # The built-in model knows the words of the built-in task alone.
    if data is None:
        return "tiny" if model == "tiny" else DEFAULT_TASK
    if is_dataset_name(data):
        try:
            load_dataset(data)
            return "csv"
        # The error is raised again where the task is loaded.
        except UserError:
            return DEFAULT_TASK
    folder = Path(data)
    is_cola = any((folder / name).exists() for name in data_utils.COLA_FILES.values())
    return "csv" if folder.is_file() or folder.is_dir() and any(folder.iterdir()) and not is_cola else DEFAULT_TASK


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seeds Python, NumPy and PyTorch, and sets the allocator up for training."""
    hardware.keep_freed_memory()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        # cuBLAS is deterministic with a workspace of fixed size (NVIDIA, cuBLAS: results reproducibility).
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def check_base(folder: Path, config: dict, model: str, net, tokenizer) -> None:
    """Checks that weights, configuration and tokenizer of a base are those that a run recorded.

    Args:
        folder: the run's.
        config: its config.json; what it does not record is not checked.
        model: the base's name, for the error's text.
        net: the base as it is loaded now, under any head; without an adapter.
        tokenizer: likewise.

    Raises:
        UserError: one of them is another; says which.
    """
    # A digest of weights takes a second: it is computed only if the run recorded one.
    digests = (lambda: tensors.weights_digest(net.base_model), lambda: config_digest(net.config),
               lambda: tokenizer_digest(tokenizer))
    for (key, what), digest in zip(BASE.items(), digests, strict=True):
        if config.get(key) not in (None, digest()):
            made_for = config.get("options", {}).get("model", model)
            raise UserError(f"{folder}: adapter for another base: it was made for {made_for}, with {what} than {model} has "
                            "here")


def read_as(options: TableOptions, problem: Problem, tokenizer, classifier: TextClassifier | None = None) -> None:
    """Prepares tokenizer and classifier for a run's texts (one, or a pair) and for its problem.

    Args:
        classifier: None of a student, which reads token ids alone.
    """
    if options.pairs:
        read_pairs(tokenizer)
    if classifier is not None:
        if options.pairs:
            add_token_types(classifier.net, tokenizer)
        # The library's own loss is then the problem's; without it the library guesses.
        if problem is not SINGLE_LABEL:
            classifier.net.config.problem_type = problem.problem_type


def columns_of(options: dict, delimiter: str | None, encoding: str | None) -> TableOptions:
    """Returns the recorded columns of a run's tables, for a file that may have another delimiter or encoding.

    Args:
        options: as config.json records them.
        delimiter, encoding: None: as recorded.
    """
    recorded = rebuild(TableOptions, options)
    return replace(recorded, delimiter=delimiter or recorded.delimiter, encoding=encoding or recorded.encoding)


def load_task(options: RunOptions, tokenizer) -> Task:
    """Loads the task of a run, shortened by --limit.

    Raises:
        UserError: its files cannot be read, or the features that --method reads are missing.
    """
    task = data_utils.load_task(options.task, options.data, options.table, separator_of(tokenizer))
    if options.method == "features" and not task.train.features:
        raise UserError("--method features: needs --feature-columns")
    task = task.limit(options.limit) if options.limit else task
    return task.fold(options.fold) if options.fold else task


def with_problem(options: RunOptions, task: Task, say: Callable[[str], None]) -> RunOptions:
    """Records the problem of a task's labels in the options, and says it if it was guessed and is not the usual one."""
    if options.table.problem is None and task.problem != SINGLE_LABEL.name:
        say(f"--problem {task.problem}: guessed from the labels of column {options.table.label_column}; --problem says "
            "otherwise")
    return replace(options, table=replace(options.table, problem=task.problem))


def with_recorded_join(options: RunOptions) -> RunOptions:
    """Returns the options with the way of joining two text columns of an unfinished run from before there were two ways."""
    recorded = (recorded_config(options) or {}).get("options") or {}
    old = options.resume and recorded.get("text_column") and "join" not in recorded
    return replace(options, table=replace(options.table, join="text")) if old else options


def make_all_batches(task: Task, tokenizer, max_length: int, options: TrainOptions, truncate: str,
                     shared_prefixes: bool = False) -> tuple[Sequence[Batch], dict[str, Sequence[Batch]]]:
    """Makes the batches of the training split, this process's part of them, and those of each development split."""
    # Rounding depends on which sentences share a batch: development batches are the same for all models and `evaluate_run`.
    make = [(split, data_utils.make_batches(rows, tokenizer, max_length, options.batch_size, options.seed,
                                            options.batch_tokens, truncate, shared_prefixes or bool(split)))
            for split, rows in {"": task.train, **task.dev}.items()]
    return data_utils.split_large(make[0][1], processes.rank(), processes.count()), dict(make[1:])


def resolve_precision(options: RunOptions) -> RunOptions:
    """Fills in `--precision auto`: the recorded one of a run to resume or repeat, else the fastest with equal predictions.

    That is bf16x3 on a CPU with tiles and a compiler, bf16 on a GPU, and float32 elsewhere. A student and a model that is
    trained in all its weights have no frozen linears, and one with trained biases no fused blocks: float32.
    """
    if options.train.precision != "auto":
        return options
    recorded = ((recorded_config(options) or {}).get("options") or {}).get("precision")
    precision = "fp32"
    # Another precision would not end in the same bytes.
    if recorded in ("fp32", "bf16x3", "bf16"):
        precision = recorded
    elif options.mode == "LoRA" and options.method not in ("full", "bitfit"):
        if hardware.device().type == "cuda":
            precision = "bf16" if torch.cuda.is_bf16_supported() else "fp32"
        elif hardware.device().type == "cpu" and speed.has_tiles():
            precision = "bf16x3"
    return replace(options, train=replace(options.train, precision=precision))


def about(task: Task, classifier: TextClassifier) -> dict:
    """Returns the part of config.json for readers: names of classes, rows of splits, kind and sizes of the backbone."""
    # No names where they are those of the files.
    named = {"class_names": list(task.class_names)} if task.class_names != task.classes else {}
    splits = {"train": task.train, **task.dev}
    return {**named, "rows": {name: len(split) for name, split in splits.items()},
            "backbone": described(classifier.net.config)}
