"""Holds every option of a run in dataclasses, with type and default; writes them to config.json and reads them back.

    python -c "from options.schema import LoRAOptions; print(LoRAOptions(rank=4))"

A default is written here and nowhere else: the command line (experiments/parser.py) and the models read it from here.
Nothing heavy is imported, so that --help answers at once.
"""
from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import get_args, get_origin, get_type_hints

from machine.errors import UserError

FREE = ("keep", "keep_memory", "save_every", "save_steps", "anomaly", "cache")  # change no result: a resume may have others
ROLES = ("q", "k", "v", "o", "mlp")  # which projections of a block are adapted


@dataclass(frozen=True)
class LoRAOptions:
    """Says which layers LoRA adapts, and how."""

    rank: int = 8  # rank of each update
    alpha: float = 16.0  # numerator of the scaling
    dropout: float = 0.0  # on the inputs of A
    rslora: bool = False  # scale by alpha / sqrt(rank)
    targets: tuple[str, ...] = ROLES  # roles, or module-name patterns
    layers: str | None = None  # "0-11", "0,2,4-5"; all blocks if None


@dataclass(frozen=True)
class TableOptions:
    """Says which columns of a table are text, label and features."""

    text_column: tuple[str, ...] = ()  # joined by the tokenizer's separator; text, sentence or review if none
    label_column: str = "label"  # strings, booleans or whole numbers
    template: str | None = None  # instead of text_column: "Q: {question} A: {guess}"
    eval_split: str | None = None  # a file of the folder by its stem, a file, or a share of the training rows
    feature_columns: tuple[str, ...] = ()  # numeric columns that the head reads beside the text
    truncate: str = "tail"  # the part of a text too long that is cut: head, tail or middle
    delimiter: str | None = None  # between the cells of CSV and TSV; a comma and a tab if None
    encoding: str = "utf-8"  # of CSV, TSV and JSON Lines; a byte order mark in the file wins


@dataclass(frozen=True)
class TrainOptions:
    """Says how a model is trained; the same for every method that is compared."""

    seed: int
    epochs: int = 3
    batch_size: int = 32  # sentences in a batch
    batch_tokens: int | None = None  # instead: tokens in a batch, pads included
    lr: float = 4e-4  # peak learning rate
    head_lr: float | None = None  # of the task head; lr if None
    weight_decay: float = 0.01  # not on biases, norms and other vectors
    warmup: float = 0.06  # share of the steps over which the rate rises from 0
    schedule: str = "linear"  # linear or cosine decay to 0, or constant
    clip: float = 1.0  # largest global gradient norm; 0 for none
    accumulate: int = 1  # batches in an optimiser step
    label_smoothing: float = 0.0
    ema: float = 0.0  # decay of the average of the weights that is scored and kept; 0: the weights themselves
    patience: int | None = None  # stop after so many epochs without a better one
    precision: str = "auto"  # of frozen linears: fp32, bf16x3, bf16, or the fastest that changes no prediction
    save_every: float = 10.0  # minutes between checkpoints inside an epoch
    save_steps: int | None = None  # instead: optimiser steps between them
    anomaly: bool = False  # name the first module that computes something not finite


@dataclass(frozen=True)
class RNNConfig:
    """Holds the sizes of a `DistilRNN`."""

    vocab_size: int
    num_labels: int = 2
    embedding_size: int = 96
    hidden_size: int = 128  # of each direction
    directions: int = 2  # 1: forward alone
    rnn_layers: int = 1
    cell: str = "lstm"  # lstm or gru
    pooling: str = "max"  # max, mean or attention, over real tokens
    dropout: float = 0.3  # on embeddings and on the pooled vector


# Embedding and hidden sizes of a default student, which has the first that fit its budget. Those in stages depend on the
# number of directions in which it reads; the largest fit into 8 MB in 8-bit weights.
STAGED_SIZES = {1: ((128, 352), (96, 264), (64, 176), (48, 132), (32, 88), (24, 66), (16, 44)),
                2: ((128, 288), (96, 216), (64, 144), (48, 108), (32, 72), (24, 54), (16, 36))}
PLAIN_SIZES = ((RNNConfig.embedding_size, RNNConfig.hidden_size), (72, 96), (48, 64), (36, 48), (24, 32), (12, 16))


@dataclass(frozen=True)
class DistilOptions:
    """Holds the teacher, the sizes of the student, its stages and losses.

    The defaults here are those of a plain distillation, one stage on the training set; the command line has others.
    """

    teacher: Path
    more_teachers: tuple[str, ...] = ()  # folders; logits are averaged
    plain: bool = True  # gold stage alone, from random embeddings
    control: bool = True  # train the same student without a teacher, too
    temperature: float = 4.0
    kd_alpha: float = 0.9
    kd_loss: str = "kl"  # kl, mse (of logits) or hard (the teacher's choice alone)
    student_embeddings: str = "random"  # random or teacher (reduced by PCA)
    text: tuple[str, ...] = ()  # files of plain sentences, one a line
    cache: Path | None = None  # folder of the transfer set's cache; beside the runs if None
    augment: int | None = 0  # sentences of the transfer set; None: a multiple of the training set's
    label_precision: str | None = "teacher"  # or bf16: in which the stages' labels are computed; None: bf16 if it is fast
    pretrain: int = 0  # epochs of language modelling
    transfer: int = 0  # epochs on the transfer set
    stage_lr: float = 2e-3  # peak learning rate of both
    stage_tokens: int = 512  # tokens in a batch of both
    stage_dropout: float = 0.2  # of the student in both
    lm_weight: float = 1.0  # of language modelling in pretraining; 0: hidden states are matched alone
    match: str = "none"  # hidden or none: the teacher's last hidden states
    match_size: int = 192  # dimensions to which these are reduced
    match_weight: float = 1.0
    score_weight: float = 0.5  # of the logits that a decoder's head gives each prefix of a sentence
    gold_repeats: int = 2  # times that an epoch on the transfer set holds each training sentence
    embedding_size: int | None = None
    hidden_size: int | None = None
    directions: int | None = RNNConfig.directions  # None: those in which the teacher reads
    rnn_layers: int = RNNConfig.rnn_layers
    cell: str = RNNConfig.cell
    pooling: str = RNNConfig.pooling
    dropout: float = RNNConfig.dropout


@dataclass(frozen=True)
class RunOptions:
    """Holds what every run has."""

    mode: str  # LoRA or distil
    sr: str  # five digits: the seed, and the run's name
    model: str
    task: str
    data: str | None  # folder of the task's files; the Hub's if None
    out: Path  # the run's folder
    train: TrainOptions
    method: str = "lora"  # lora, full, head or none
    lora: LoRAOptions = LoRAOptions()
    table: TableOptions = TableOptions()
    init: Path | None = None  # folder of a LoRA run whose adapter this one starts from; a fresh adapter if None
    keep: bool = True  # keep what the frozen blocks below the lowest trained one compute
    keep_memory: float = 2.0  # GiB of it in memory; the rest is memory-mapped
    max_length: int | None = None  # tokens; the model's context if None
    limit: int | None = None  # so many rows of each split only
    resume: bool = False
    overwrite: bool = False
    deterministic: bool = False
    repeats: Path | None = None  # folder of the finished run that this one must equal in options and data


# ---------------------------------------------------------------- config.json

def as_json(value):
    """Returns options as plain JSON values."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def settings_of(options: RunOptions) -> dict:
    """Returns what config.json records of these options.

    Nested options stand beside the others under their own names (`train`, `lora`), if the mode uses them.
    """
    return {**{field.name: getattr(options, field.name) for field in fields(options)
               if field.name not in ("out", "resume", "overwrite", "repeats", "train", "lora", "table")},
            **asdict(options.table)}


def rebuild(cls: type, values: dict, **given):
    """Builds an options object from what config.json recorded: the way back from `settings_of` and `as_json`.

    Raises:
        UserError: an option without a default was not recorded, or one is of another type than it has.
    """
    kinds, made = get_type_hints(cls), dict(given)
    for field in fields(cls):
        kind = kinds[field.name]
        if field.name in given:
            continue
        if is_dataclass(kind):
            made[field.name] = rebuild(kind, values)
        elif field.name in values:
            value = values[field.name]
            if not _is(kind, value):
                raise UserError(f"config.json: {field.name} is {json.dumps(value)[:60]}; expected {field.type}")
            value = tuple(value) if isinstance(value, list) else value
            made[field.name] = Path(value) if isinstance(value, str) and "Path" in str(kind) else value
    try:
        return cls(**made)
    except TypeError as error:
        raise UserError(f"config.json does not record every option ({error})") from None


def _is(kind, value) -> bool:
    """Returns whether a JSON value can stand for an option of this type."""
    if isinstance(kind, UnionType):
        return any(_is(one, value) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(_is(get_args(kind)[0], item) for item in value)
    if kind in (int, float, bool):  # in JSON, a whole number serves for either
        return isinstance(value, bool) if kind is bool else isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(value, {Path: str | Path, str: str, NoneType: NoneType}.get(kind, object))
