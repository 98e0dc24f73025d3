"""Declares the options of a run, each in one field. record/config_json.py writes them and reads them back.

    python -c "from options.schema import LoRAOptions; print(LoRAOptions(rank=4))"

A new option is one line here: the command line, the checks and docs/options.md are made from these fields (declare.py).
Defaults that depend on the task or on --plain stand in presets/.
"""
from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from machine.errors import UserError
from options.declare import option

# Roles of a block's projections, as --targets names them: query, key, value, output, and both of the MLP.
ROLES = ("q", "k", "v", "o", "mlp")
METHODS = ("lora", "full", "head", "features", "none", "bitfit", "ia3")
TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "edits", "rotten_tomatoes", "imdb", "buzzer",
         "csv", "tiny")
# Words of options: a number, and one that is not zero, alone or first of a list.
NUMBER = r"(\d+\.?\d*|\.\d+)(e[+-]?\d\d?)?"
POSITIVE = rf"(?=(.*,)?[^e,]*[1-9]){NUMBER}"


@dataclass(frozen=True)
class LoRAOptions:
    """Holds the layers that LoRA adapts, and the size of their updates."""

    variant: str = option("lora", "formula of the update (docs/variants.md)", "variants/injection.py:VARIANTS", often=True)
    rank: int = option(8, "rank of each LoRA update", often=True)
    alpha: float = option(16.0, "LoRA's updates are scaled by alpha / rank", above=0, often=True)
    rank_pattern: tuple[str, ...] = option((), "ranks of single modules by regular expressions of names or their endings",
                                           pattern=r".+=[1-9]\d{0,8}", metavar="MODULE=RANK[,...]")
    alpha_pattern: tuple[str, ...] = option((), "alphas of single modules, in the form of --rank-pattern",
                                            pattern=rf".+={POSITIVE}", metavar="MODULE=ALPHA[,...]")
    dropout: float = option(0.0, "dropout on the inputs of LoRA's A", least=0, most=0.99)
    loraplus_ratio: float = option(16.0, "learning rate of B over that of A with --variant loraplus", above=0)
    rslora: bool = option(False, "old spelling of --variant rslora", hidden=True)
    targets: tuple[str, ...] = option(ROLES, "roles of the layers that LoRA adapts, or patterns of module names", often=True)
    layers: str | None = option(None, "blocks that LoRA adapts, such as 0-11 or 0,2,4-5; all if not given")

    def __post_init__(self):
        # Two spellings, one meaning: runs recorded before --variant have the flag alone.
        if self.rslora and self.variant not in ("lora", "rslora"):
            raise UserError(f"--rslora: an old spelling of --variant rslora, not with --variant {self.variant}")
        if self.rslora or self.variant == "rslora":
            object.__setattr__(self, "variant", "rslora")
            object.__setattr__(self, "rslora", True)


@dataclass(frozen=True)
class TableOptions:
    """Holds the columns of a table that are text, label and features."""

    text_column: tuple[str, ...] = option((), "columns of the text; text, sentence or review if not given")
    label_column: str = option("label", "column of classes, lists of labels, or numbers; or columns of 0 and 1, one a label")
    problem: str | None = option(None, "kind of label; found if not given", "metrics/problems.py:PROBLEMS")
    join: str = option("pair", "two text columns as a pair or as one separated text", ("pair", "text"), before="text")
    template: str | None = option(None, 'text with columns in braces, "Q: {question} A: {guess}", instead of --text-column')
    eval_split: str | None = option(None, "development file, or share of the training rows", metavar="NAME|FILE|SHARE")
    feature_columns: tuple[str, ...] = option((), "columns of numbers that the head reads next to the text")
    truncate: str = option("tail", "part of a text longer than --max-length that is cut", ("head", "tail", "middle"))
    delimiter: str | None = option(None, "character between cells; a comma and a tab if not given", metavar="CHARACTER")
    encoding: str = option("utf-8", "encoding of a table, such as cp1252; a byte order mark wins", metavar="NAME")
    agreement: str = option("dictionary", "words' numbers in --task edits", ("dictionary", "suffix"), before="suffix")

    @property
    def pairs(self) -> bool:
        """Returns whether each row is a pair of texts."""
        return self.join == "pair" and len(self.text_column) == 2 and self.template is None


@dataclass(frozen=True)
class TrainOptions:
    """Holds the training of a model; the same for every method that is compared."""

    seed: int
    epochs: int = option(3, "passes over the training set", least=1, preset=True, often=True)
    batch_size: int = option(32, "sentences in a batch", least=1, often=True)
    batch_tokens: int | None = option(None, "tokens in a batch, pads included, instead of --batch-size", least=1)
    lr: float = option(4e-4, "peak learning rate", above=0, preset=True, often=True)
    head_lr: float | None = option(None, "peak learning rate of the head; --lr if not given", above=0, not_in="distil")
    weight_decay: float = option(0.01, "weight decay of matrices; biases and norms have none", least=0)
    warmup: float = option(0.06, "share of the steps over which the learning rate rises from 0", least=0, most=1)
    schedule: str = option("linear", "decay of the learning rate after warm-up", ("linear", "cosine", "constant"))
    clip: float = option(1.0, "largest global gradient norm; 0: no clipping", least=0)
    accumulate: int = option(1, "batches in an optimiser step", least=1)
    label_smoothing: float = option(0.0, "share of each label that is spread over all classes", least=0, most=1)
    loss: str = option("ce", "loss of the labels: cross-entropy, or focal loss", ("ce", "focal"), not_in="distil")
    focal_gamma: float = option(2.0, "power of 1 - p in --loss focal", least=0, not_in="distil")
    class_weights: str = option("none", "weights of the classes; balanced: the rarer, the heavier", not_in="distil",
                                pattern=rf"balanced|none|{POSITIVE}(,{NUMBER})+", metavar="balanced|none|W,W[,...]")
    ema: float = option(0.0, "decay of the weights' moving average, which is scored and kept; 0: none", least=0, most=1)
    patience: int | None = option(None, "epochs without a better one after which training stops", least=1)
    precision: str = option("auto", "precision of frozen linears", ("auto", "fp32", "bf16x3", "bf16"), not_in="distil")
    save_every: float = option(10.0, "minutes or optimiser steps between checkpoints", metavar="Nmin|Nsteps", free=True,
                               pattern=rf"[1-9]\d*steps|{POSITIVE}(min)?", like="minutes, such as 10min, or 50steps")
    save_steps: int | None = None  # optimiser steps between checkpoints, instead of minutes: --save-every 50steps
    anomaly: bool = option(False, "name the first module that computes inf or nan; several times slower", free=True)


@dataclass(frozen=True)
class DistilOptions:
    """Holds the teacher, the sizes of the student, its stages and losses; defaults are those of a distillation in stages."""

    teacher: Path = option(help="folder of a LoRA run, or with --seeds of every seed's run; runs/LoRA-SR if not given; the "
                           "logits of several are averaged", repeat=True, often=True)
    more_teachers: tuple[str, ...] = ()  # the folders of all but the first --teacher: early runs recorded one
    labels: tuple[str, ...] = option((), "labels of another teacher (predict --json)", metavar="FILE", repeat=True)
    labels_alone: bool = option(False, "no label of a teacher's own for a sentence that --labels has")
    plain: bool = option(False, "one stage, on the training set alone, from random embeddings", before=True, often=True)
    control: bool = option(True, "leave out the baseline, which trains the same RNN without a teacher")
    temperature: float = option(1.0, "temperature that softens teacher and student", above=0, preset=True, often=True)
    kd_alpha: float = option(0.5, "share of the teacher in the loss", least=0, most=1, often=True, preset=True)
    kd_loss: str = option("kl", "the teacher's loss (docs/distillation.md)", "distillation/losses.py:LOSSES", often=True)
    js_weight: float = option(0.5, "weight of the teacher in the mixture of --kd-loss js", least=0.01, most=0.99)
    dkd_weight: float = option(8.0, "weight of the classes other than the target in --kd-loss dkd", least=0)
    temperature_schedule: str = option("constant", "temperature within a stage; anneal: falls to 1", ("constant", "anneal"))
    student_embeddings: str = option("teacher", "first embeddings; contextual: the teacher's mean hidden states",
                                     ("teacher", "contextual", "random"), preset=True, before="random")
    text: tuple[str, ...] = option((), "file of plain sentences for the stages", metavar="FILE", repeat=True, often=True)
    cache: Path | None = option(None, "folder that caches the transfer set; next to the runs if not given", free=True)
    augment: int | None = option(None, "sentences of the transfer set; by --augment-times if not given", least=0, often=True,
                                 preset=True, before=0)
    transfer_version: int = option(2, "rules that make a transfer set; 1: those of early runs", (1, 2), before=1)
    label_precision: str | None = option(None, "precision of the labelling teacher; bf16 if not given and fast here",
                                         ("teacher", "bf16"), preset=True, before="teacher")
    pretrain: int = option(0, "epochs of language modelling in the student's directions, the first stage", least=0)
    transfer: int = option(3, "epochs on the transfer set, the second stage", least=0, preset=True, before=0, often=True)
    stage_lr: float = option(2e-3, "peak learning rate of the stages before the training set", above=0)
    stage_tokens: int = option(512, "tokens in a batch of the stages before the training set", least=1)
    stage_dropout: float = option(0.2, "dropout of the student in the stages before the training set", least=0, most=0.99)
    lm_weight: float = option(1.0, "weight of language modelling in pretraining; 0: hidden states alone", least=0)
    match: str = option("hidden", "match the teacher's last hidden states", ("hidden", "none"), preset=True, before="none")
    match_directions: str = option("forward", "the student's directions that match hidden states", ("forward", "both"))
    match_size: int = option(192, "dimensions of the teacher's hidden states after PCA", least=1)
    match_weight: float = option(1.0, "weight in the loss of the hidden states that are matched", least=0)
    score_weight: float = option(0.5, "weight in the loss of a decoder's logits for each prefix of a sentence", least=0)
    edit_weight: float = option(0.0, "weight in the transfer set's loss of telling the tokens that an edit touched", least=0)
    gold_repeats: int = option(2, "copies of the training set in each epoch on the transfer set", least=0)
    student_parameters: int | None = option(None, "parameters of the student; a tenth of the teacher's by default", least=1)
    embedding_size: int | None = option(None, "size of the student's embeddings; the largest that fits by default", least=1)
    hidden_size: int | None = option(None, "size of the student's states; the largest that fits by default", least=1)
    directions: int | None = option(None, "directions of reading; the teacher's by default", (1, 2), preset=True, before=2)
    vocabulary: int | None = option(None, "rows of the student's embeddings; one for each token if not given", least=16)
    rare_tokens: str = option("buckets", "tokens beyond --vocabulary: shared rows or means of pieces", ("buckets", "pieces"))
    frozen_embeddings: bool = option(False, "give the student a frozen copy of its first embeddings next to trained ones")
    rnn_layers: int = option(1, "layers of the student's RNN", least=1)
    cell: str = option("lstm", "cell of the student's RNN", "model.py:CELLS")
    pooling: str = option("attention", "pooling of the student", ("max", "mean", "attention"), preset=True, before="max")
    dropout: float = option(0.3, "dropout on the student's embeddings and pooled vector", least=0, most=0.99)
    augment_times: int = option(28, "training sets in a transfer set without --augment", least=0, preset=True)
    augment_most: int = option(240_000, "most sentences in a transfer set without --augment", least=0, preset=True)


@dataclass(frozen=True)
class RunOptions:
    """Holds the options that every run has."""

    mode: str  # LoRA or distil
    sr: str
    model: str = option(help="name on the Hub, local folder, GGUF file, smollm2, minilm, mpnet, or tiny; gpt2 if not given",
                        not_in="distil", often=True)
    task: str = option(help="csv: a table; edits: real or edited sentences; cola without --data", choices=TASKS, often=True)
    data: str | None = option(help="files of the task; the Hub's if not given", metavar="DIR|FILE|NAME", often=True)
    out: Path = option(help="the run's folder; runs/MODE-SR if not given", often=True)
    train: TrainOptions
    method: str = option("lora", "trained part: the head or more, an adapter (lora, ia3), biases (bitfit), all (full); "
                         "features: a head without text", METHODS, often=True, not_in="distil compare")
    lora: LoRAOptions = option(LoRAOptions(), not_in="distil")
    table: TableOptions = option(TableOptions(), not_in="distil")
    init: Path | None = option(None, "finished run; training starts from its adapter and head", not_in="distil")
    keep: bool = option(True, "recompute the frozen blocks, and cache none of their results", not_in="distil", free=True)
    keep_memory: float = option(2.0, "GiB of memory for results of frozen blocks", least=0, not_in="distil", free=True)
    max_length: int | None = option(None, "tokens of a text; the model's context if not given", least=1)
    limit: int | None = option(None, "rows of each split, evenly spaced: a quick look", least=1)
    fold: str | None = option(None, "fold of the training rows that is the development split", pattern=r"\d+/\d+:\d+",
                              metavar="N/K:SEED", hidden=True, not_in="distil compare sweep")
    resume: bool = option(False, "continue an unfinished run", often=True)
    overwrite: bool = option(False, "replace a run that is already in the folder", often=True)
    deterministic: bool = option(False, "use deterministic kernels on a GPU too")
    repeats: Path | None = None  # the finished run that this one must equal in options and data, for `repeat`
    # The field is `fast`, for `kernels` is in config.json already: the library that this machine computed with.
    fast: str = option("auto", "reference: model.py alone, without fast/", ("auto", "reference"), word="kernels")
    track: str = option("tensorboard", "program that shows each epoch's scalars", "training/trackers.py:TRACKERS", free=True)
    preset: str | None = option(None, "file of defaults, options/presets/NAME.toml; the task's if not given", metavar="NAME")


# Options that change no result: a resumed run may have others. `save_steps` is another way to write `save_every`.
FREE = ("save_steps", *(one.name for cls in (RunOptions, TrainOptions, DistilOptions) for one in fields(cls)
                        if "option" in one.metadata and one.metadata["option"].free))
