"""The command line's modes and options; defaults come from the dataclasses of options/schema.py.

    python run.py LoRA --help

Nothing heavy is imported here, so that --help and a mistyped option are answered at once.
"""
from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

from experiments.argument_types import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    WHOLE,
    list_of,
    named_folder,
    names_type,
    number,
    one_of,
    save_every_type,
    sr_type,
)
from experiments.defaults import AUGMENT_MOST, AUGMENT_TIMES, EPOCHS, LEARNING_RATE, STAGES, in_words
from experiments.steps import PROFILES
from machine import processes
from options.schema import (
    PLAIN_SIZES,
    ROLES,
    STAGED_SIZES,
    DistilOptions,
    LoRAOptions,
    RNNConfig,
    RunOptions,
    TableOptions,
    TrainOptions,
)

METHODS = ("lora", "full", "head", "features", "none")


def complain(message) -> None:
    """Prints one line on stderr, whatever the message quotes; of several processes only the first that fails does so."""
    if processes.claim_once("the end"):
        print("run.py:", str(message).replace("\n", " "), file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """Errors are one line on stderr, with the closest option or mode where one was mistyped; exit status 2.

    Attributes:
        options: every option by its name in the parsed arguments, so that others can ask what there is.
    """

    def __init__(self, *args, **kwargs):
        self.options: dict[str, argparse.Action] = {}
        self.groups = {}
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        complain(message)
        sys.exit(2)

    def add(self, group: str, *names: str, **kwargs) -> None:
        """Adds an option to the group of that title, which is made where it is new; shows its default, if it has one."""
        if kwargs.get("default") not in (None, False, (), []):
            kwargs["help"] = kwargs.get("help", "") + " (default: %(default)s)"
        if group not in self.groups:
            self.groups[group] = self.add_argument_group(group)
        action = self.groups[group].add_argument(*names, **kwargs)
        self.options[action.dest] = action


def closest(word: str, known) -> str:
    """Returns the end of an error message: the known word that was probably meant, or all known words."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.4)
    return f"; did you mean {by_lower[close[0]]}?" if close else f"; expected one of {', '.join(known)}"


# ---------------------------------------------------------------- groups of options that several modes share

GENERAL, MODEL, ADAPTER, DATA, TRAINING, FOLDER = "most used", "model", "adapter", "data", "training", "run folder"


def _most_used(parser: Parser, mode: str) -> None:
    """Adds the options that people change most; help lists them first."""
    if mode == "LoRA":
        parser.add(GENERAL, "--model", help="gpt2 (the default), gpt2-medium, distilgpt2 ..., any Hugging Face name, a "
                                            "local folder or GGUF file, smollm2, minilm, or tiny")
    parser.add(GENERAL, "--data", metavar="DIR|FILE|NAME",
               help="folder with the task's files, a CSV, TSV, JSONL or Parquet file, or the name of a data set on the Hub, "
                    "such as stanfordnlp/sst2; the Hub's files of the task if not given")
    if mode == "LoRA":
        parser.add(GENERAL, "--rank", type=int, default=LoRAOptions.rank, help="of each update")
    alone = "; without a transfer set as with --plain" if mode == "distil" else ""
    parser.add(GENERAL, "--epochs", type=COUNT, help=in_words(EPOCHS[mode]) + alone)
    parser.add(GENERAL, "--lr", type=POSITIVE, help="; ".join(
        f"{method}: {in_words(LEARNING_RATE[method])}" for method in (METHODS[:-1] if mode == "LoRA" else (mode,))
        ) + alone)


def add_finetune_options(parser: Parser, method: bool = True) -> None:
    """Adds the options of a fine-tuning; `compare` (whose entries have a method each) and `sweep` take the same."""
    _most_used(parser, "LoRA")
    if method:
        parser.add(MODEL, "--method", choices=METHODS, default=RunOptions.method,
                   help="train LoRA and the head, everything, the head alone, a head that reads the features and no text, "
                        "or nothing")
    parser.add(MODEL, "--precision", choices=("auto", "fp32", "bf16x3", "bf16"), default=TrainOptions.precision,
               help="of frozen linears; what trains stays float32")
    parser.add(MODEL, "--no-keep", action="store_true", help="recompute frozen blocks below the lowest trained one")
    parser.add(MODEL, "--keep-memory", type=NOT_NEGATIVE, default=RunOptions.keep_memory, metavar="GIB",
               help="of their cached results in memory; the rest is memory-mapped")
    parser.add(ADAPTER, "--alpha", type=POSITIVE, default=LoRAOptions.alpha, help="the update is scaled by alpha / rank")
    parser.add(ADAPTER, "--dropout", type=number(float, 0, 0.99, "a number from 0 to 0.99"), default=LoRAOptions.dropout,
               help="on the inputs of A")
    parser.add(ADAPTER, "--rslora", action="store_true", help="scale by alpha / sqrt(rank)")
    parser.add(ADAPTER, "--targets", default=",".join(LoRAOptions.targets),
               help=f"roles ({','.join(ROLES)}) or module-name patterns")
    parser.add(ADAPTER, "--layers", help="blocks to adapt, such as 0-11; all if not given")
    _data_options(parser)
    _table_options(parser)
    _training_options(parser)
    parser.add(TRAINING, "--head-lr", type=POSITIVE, help="learning rate of the head; --lr if not given")
    _folder_options(parser)


def _data_options(parser: Parser) -> None:
    parser.add(DATA, "--task", choices=("cola", "edits", "rotten_tomatoes", "imdb", "buzzer", "csv", "tiny"),
               help="csv: any table; edits: plain sentences, real against edited; cola if not given, unless "
                    "--data holds tables or the built-in default is used")
    parser.add(DATA, "--max-length", type=COUNT, help="tokens; the model's context if not given")
    parser.add(DATA, "--limit", type=COUNT, help="so many rows of each split, evenly spaced: a quick look")


def _table_options(parser: Parser) -> None:
    """Adds the options that say what the columns of a table mean."""
    parser.add(DATA, "--text-column", type=names_type, default=TableOptions.text_column, metavar="A,B",
               help="joined by the tokenizer's separator; text, sentence or review if not given")
    parser.add(DATA, "--template", metavar="TEXT", help='instead: column names in braces, "Q: {question} A: {guess}"')
    parser.add(DATA, "--label-column", default=TableOptions.label_column,
               help="strings, booleans or whole numbers; any number of classes")
    parser.add(DATA, "--eval-split", metavar="NAME|FILE|SHARE",
               help="validation, dev or eval if --data has it, else 0.1 of the training rows")
    parser.add(DATA, "--feature-columns", type=names_type, default=TableOptions.feature_columns, metavar="A,B",
               help="numbers that the head reads beside the text")
    parser.add(DATA, "--truncate", choices=("head", "tail", "middle"), default=TableOptions.truncate,
               help="the part of a text longer than --max-length that is cut")
    parser.add(DATA, "--delimiter", metavar="CHARACTER",
               help="between the cells of CSV and TSV; a comma and a tab if not given")
    parser.add(DATA, "--encoding", default=TableOptions.encoding, metavar="NAME",
               help="of CSV, TSV and JSON Lines, such as cp1252; a byte order mark in the file wins")


def _training_options(parser: Parser) -> None:
    parser.add(TRAINING, "--batch-size", type=COUNT, default=TrainOptions.batch_size, help="sentences in a batch")
    parser.add(TRAINING, "--batch-tokens", type=COUNT, help="instead of --batch-size: tokens in a batch, pads included")
    parser.add(TRAINING, "--accumulate", type=COUNT, default=TrainOptions.accumulate, help="batches in an optimiser step")
    parser.add(TRAINING, "--schedule", choices=("linear", "cosine", "constant"), default=TrainOptions.schedule,
               help="decay after warm-up")
    parser.add(TRAINING, "--warmup", type=SHARE, default=TrainOptions.warmup, help="share of the steps")
    parser.add(TRAINING, "--weight-decay", type=NOT_NEGATIVE, default=TrainOptions.weight_decay,
               help="not on biases and norms")
    parser.add(TRAINING, "--clip", type=NOT_NEGATIVE, default=TrainOptions.clip,
               help="largest gradient norm; 0: no clipping")
    parser.add(TRAINING, "--label-smoothing", type=SHARE, default=TrainOptions.label_smoothing,
               help="share of the label spread over all classes")
    parser.add(TRAINING, "--ema", type=SHARE, default=TrainOptions.ema,
               help="decay of the average of the weights, which is scored and kept in their place; 0: none")
    parser.add(TRAINING, "--patience", type=COUNT, help="stop after so many epochs without a better one")
    parser.add(TRAINING, "--deterministic", action="store_true", help="deterministic kernels on a GPU too")
    parser.add(TRAINING, "--anomaly", action="store_true",
               help="name the first module that computes something not finite; several times slower")


def _folder_options(parser: Parser) -> None:
    parser.add(FOLDER, "--out", type=Path, help="the run's folder; runs/MODE-SR if not given")
    parser.add(FOLDER, "--resume", action="store_true", help="continue an unfinished run")
    parser.add(FOLDER, "--overwrite", action="store_true", help="replace a run that is already in the folder")
    parser.add(FOLDER, "--save-every", type=save_every_type, default=f"{TrainOptions.save_every:g}min",
               metavar="Nmin|Nsteps", help="minutes, or optimiser steps, between checkpoints in an epoch")
    parser.add(FOLDER, "--plots", type=Path, default=Path("plots"), metavar="DIR", help="folder of the plots")
    parser.add(FOLDER, "--no-plots", action="store_true", help="draw none")


def _seeds_option(parser: Parser, group: str, default: int | None, more: str) -> None:
    parser.add(group, "--seeds", type=number(int, 1, 1000, "a whole number from 1 to 1000"), default=default,
               help=f"how many: SR, SR + 1, ...; 00000 follows 99999{more}")
    parser.add(group, "--jobs", type=COUNT, default=None if group == "paper" else 1, metavar="N",
               help="steps at a time, each with its part of the CPU's threads; one for each core up to three if not given, "
                    "one on a GPU" if group == "paper" else "runs at a time, each with its part of the CPU's threads")


# ---------------------------------------------------------------- the modes, one function each

def _gen(parser: Parser) -> None:
    """generate text"""
    parser.add(GENERAL, "--model", help="as for LoRA")
    parser.add(GENERAL, "--prompt", action="append", help="may be given several times")
    parser.add(GENERAL, "--prompt-file", type=Path, help="a UTF-8 file with one prompt a line")
    parser.add(GENERAL, "--max-new-tokens", type=COUNT, default=40, help="of each sample")
    parser.add(GENERAL, "--adapter", type=Path, help="folder of a saved LoRA adapter")
    parser.add(GENERAL, "--batch-size", type=COUNT, default=64, help="samples that are drawn together")
    parser.add(GENERAL, "--precision", choices=("fp32", "bf16"), default="fp32", help="of the frozen linears")
    parser.add("sampling", "--num-samples", type=COUNT, default=1, help="samples of each prompt")
    parser.add("sampling", "--greedy", action="store_true", help="the likeliest token each time")
    parser.add("sampling", "--temperature", type=POSITIVE, default=0.8, help="below 1: likelier tokens likelier still")
    parser.add("sampling", "--top-k", type=number(int, 0, 10 ** 9, "a whole number of at least 0"), default=50,
               help="draw from the k likeliest tokens; 0: all")
    parser.add("sampling", "--top-p", type=number(float, 1e-9, 1, "a number above 0, up to 1"), default=0.95,
               help="draw from the likeliest tokens that hold this probability")


def _lora(parser: Parser) -> None:
    """inject LoRA into a backbone and fine-tune it on a task"""
    add_finetune_options(parser)
    parser.add(ADAPTER, "--init", type=Path, metavar="DIR",
               help="start from the adapter of a finished run (and from its head, if the classes are the same)")
    _seeds_option(parser, GENERAL, None, "; a run each (in runs/, or in --out), and their means with 95 %% intervals")


def _distil(parser: Parser) -> None:
    """distil a LoRA run into a small RNN, and train the RNN alone beside it"""
    add_distil_options(parser)
    _seeds_option(parser, GENERAL, None, "; each with the teacher of its own seed, or --teacher")


def add_distil_options(parser: Parser) -> None:
    """Adds the options of a distillation."""
    parser.add(GENERAL, "--teacher", type=Path, action="append", metavar="DIR",
               help="folder of a LoRA run; runs/LoRA-SR if not given; given several times, logits are averaged; with "
                    "--seeds also a folder that holds LoRA-SR of every seed")
    parser.add(GENERAL, "--plain", action="store_true", help="one stage, on the training set alone, from random embeddings")
    parser.add(GENERAL, "--no-control", dest="control", action="store_false",
               help="leave out the no-KD baseline: for ablations, whose baseline another run has trained already")
    _most_used(parser, "distil")
    parser.add(GENERAL, "--temperature", type=POSITIVE,
               help="softens teacher and student in the KD loss; " + in_words(STAGES["temperature"]))
    parser.add(GENERAL, "--kd-alpha", type=SHARE,
               help="weight of the teacher beside gold labels; " + in_words(STAGES["kd_alpha"]))
    parser.add(GENERAL, "--kd-loss", choices=("kl", "mse", "hard"), default=DistilOptions.kd_loss,
               help="of soft labels by KL, of logits by MSE, or with the teacher's choice as a hard label")
    _stage_options(parser)
    parser.add("student", "--embedding-size", type=COUNT,
               help=f"{STAGED_SIZES[1][0][0]} ({PLAIN_SIZES[0][0]} with --plain), or less to fit 10 %% of the teacher's "
                    "parameters")
    parser.add("student", "--hidden-size", type=COUNT,
               help=f"of each direction; {STAGED_SIZES[1][0][1]} of one, {STAGED_SIZES[2][0][1]} of two "
                    f"({PLAIN_SIZES[0][1]} with --plain), or less to fit")
    parser.add("student", "--directions", type=int, choices=(1, 2),
               help="1: the student reads forward, 2: backward, too; if not given as its teacher reads: 1 under a decoder, "
                    "2 under an encoder; 2 with --plain")
    parser.add("student", "--rnn-layers", type=COUNT, default=RNNConfig.rnn_layers, help="of the RNN")
    parser.add("student", "--cell", choices=("lstm", "gru"), default=RNNConfig.cell, help="of the RNN")
    parser.add("student", "--pooling", choices=("max", "mean", "attention"),
               help=f"over real tokens; {in_words(STAGES['pooling'])}")
    parser.add("student", "--dropout", type=number(float, 0, 0.99, "a number from 0 to 0.99"), default=RNNConfig.dropout,
               help="on embeddings and on the pooled vector")
    _data_options(parser)
    _training_options(parser)
    _folder_options(parser)


def _stage_options(parser: Parser) -> None:
    """Adds what comes before the gold stage: pretraining, the transfer set, and what of the teacher is matched."""
    stages = "stages"
    parser.add(stages, "--text", action="append", default=[], metavar="FILE",
               help="plain sentences, one a line, to pretrain on and for the transfer set; may be given several times")
    parser.add(stages, "--augment", type=WHOLE, metavar="N",
               help="sentences that the teacher labels beside the training set: edits, plain ones, and what the language "
                    f"model writes; 0: none; if not given, this many times the training set: {in_words(AUGMENT_TIMES)}; at "
                    f"most {in_words(AUGMENT_MOST)}")
    parser.add(stages, "--label-precision", choices=("teacher", "bf16"),
               help="in which the teacher labels: its own, or with updates merged in bfloat16; if not given bf16 where the "
                    "machine is fast with it")
    parser.add(stages, "--cache", type=Path, metavar="DIR",
               help="folder that caches these sentences and what the teacher says of them; beside the runs if not given")
    parser.add(stages, "--pretrain", type=WHOLE, metavar="EPOCHS",
               help=f"of language modelling in the student's directions; {in_words(STAGES['pretrain'])}")
    parser.add(stages, "--transfer", type=WHOLE, metavar="EPOCHS",
               help=f"on the teacher's labels of the transfer set; {in_words(STAGES['transfer'])}")
    parser.add(stages, "--match", choices=("hidden", "none"),
               help=f"the teacher's hidden states, reduced by PCA; {in_words(STAGES['match'])}")
    parser.add(stages, "--match-size", type=COUNT, default=DistilOptions.match_size, metavar="D",
               help="to D dimensions, or as many as there are")
    parser.add(stages, "--match-weight", type=NOT_NEGATIVE, default=DistilOptions.match_weight, help="in the loss")
    parser.add(stages, "--score-weight", type=NOT_NEGATIVE, default=DistilOptions.score_weight,
               help="of the logits that a decoder's head gives each prefix of a sentence, matched beside hidden states")
    parser.add(stages, "--lm-weight", type=NOT_NEGATIVE, default=DistilOptions.lm_weight,
               help="of language modelling in pretraining; 0: hidden states alone are matched there")
    parser.add(stages, "--gold-repeats", type=WHOLE, default=DistilOptions.gold_repeats, metavar="N",
               help="times that each epoch on the transfer set holds the training set too")
    parser.add(stages, "--student-embeddings", choices=("teacher", "random"),
               help=f"what the student starts from; {in_words(STAGES['student_embeddings'])}")
    parser.add(stages, "--stage-lr", type=POSITIVE, default=DistilOptions.stage_lr,
               help="of pretraining and the transfer set; the training set has --lr")
    parser.add(stages, "--stage-tokens", type=COUNT, default=DistilOptions.stage_tokens, help="in a batch there")
    parser.add(stages, "--stage-dropout", type=number(float, 0, 0.99, "a number from 0 to 0.99"),
               default=DistilOptions.stage_dropout, help="of the student there")


def _compare(parser: Parser) -> None:
    """compare methods on one task: the same seeds, budget and learning rates for each"""
    parser.epilog = ("Each entry's learning rate is chosen on the first seed, by the best epoch's MCC. The same command "
                     "started again goes on with what is missing.")
    parser.add("comparison", "--methods", type=list_of(one_of(METHODS)), default="none,head,lora,full",
               metavar="METHOD[,...]", help="an entry each")
    parser.add("comparison", "--set", action="append", default=[], metavar="NAME:OPTION=VALUE[,...]",
               help="one more entry, with options of LoRA's: r2:method=lora,rank=2,targets=q+v "
                    "(+ stands for the comma within targets and layers); may be given several times")
    _seeds_option(parser, "comparison", 3, "")
    parser.add("comparison", "--against", metavar="ENTRY", help="print every other entry minus this one, paired by seed")
    parser.add("comparison", "--lr-grid", type=list_of(POSITIVE), metavar="LR[,...]",
               help="learning rates that each entry chooses from; --lr if not given, or each method's default")
    add_finetune_options(parser, method=False)


def _sweep(parser: Parser) -> None:
    """search rank, targets, layers, learning rate ... with Optuna"""
    parser.epilog = ("A trial's score is its best epoch's MCC. The same command started again, or elsewhere with the same "
                     "--storage, goes on with the trials that wait.")
    parser.add("search", "--search", action="append", required=True, metavar="OPTION=VALUES",
               help="choices, rank=1,2,4 or targets=q+v,q+k+v+o,all (+ stands for the comma within targets and layers), "
                    "or a range, lr=1e-4..1e-3 or alpha=1..64:log (rates are searched on a logarithmic scale, others on a "
                    "linear one unless :log follows); several times for several options")
    parser.add("search", "--sampler", choices=("tpe", "random", "grid"), default="tpe", help="grid: every combination, once")
    parser.add("search", "--trials", type=COUNT, help="of all processes together; 20, or the whole grid, if not given")
    parser.add("search", "--storage", metavar="URL", help="a database that several processes share, such as "
                                                          "postgresql://HOST/DB; study.db in the folder if not given")
    parser.add("search", "--no-prune", action="store_true",
               help="let hopeless trials run to the end (pruned: below the median of the others' scores by then)")
    add_finetune_options(parser)


def _training_data_option(parser: Parser, group: str) -> None:
    parser.add(group, "--allow-training-data", action="store_true",
               help="score a file although the run was trained on it")


def _eval(parser: Parser) -> None:
    """score a saved run on a labelled file"""
    parser.add("scoring", "--data", type=Path, metavar="FILE",
               help="in the format of the run's task; the rows that the run held out if not given")
    _training_data_option(parser, "scoring")
    parser.add("scoring", "--json", action="store_true", help="print one JSON object")
    parser.add("scoring", "--predictions", type=Path, metavar="OUT.tsv",
               help="write sentence, label, prediction and probability")


def _predict(parser: Parser) -> None:
    """ask a saved run about sentences: class and probability"""
    parser.add_argument("run", metavar="RUN_DIR", type=Path, nargs="?",
                        help="of any mode; of a distillation its student is asked")
    parser.add_argument("texts", metavar="TEXT", nargs="*", help="sentences to classify")
    parser.add("prediction", "--file", type=Path, metavar="FILE",
               help="text (a sentence a line), CSV, TSV, JSONL or Parquet with the run's columns; - for standard input")
    parser.add("prediction", "--format", choices=("text", "csv", "tsv", "jsonl", "parquet"),
               help="of --file; by its ending if not given")
    parser.add("prediction", "--json", action="store_true", help="print one JSON object a line")
    parser.add("prediction", "--control", action="store_true", help="ask a distillation's no-KD baseline")
    parser.add("prediction", "--adapter", type=named_folder, action="append", default=[], metavar="NAME=DIR",
               help='instead of RUN_DIR, several times: LoRA runs on one base; each row of --file names its own, '
                    '{"adapter": "NAME", "text": "..."}')
    parser.add("prediction", "--base", action="store_true",
               help="with --adapter: a row that names no adapter is answered by the base alone, instead of being an error")


def _serve(parser: Parser) -> None:
    """answer requests over HTTP: many adapters on one base, and students beside them"""
    parser.add("models", "--adapter", type=named_folder, action="append", default=[], metavar="NAME=DIR",
               help="a LoRA run, several times; all on one base")
    parser.add("models", "--student", type=named_folder, action="append", default=[], metavar="NAME=DIR",
               help="a distillation, several times")
    parser.add("models", "--adapters-root", type=Path, metavar="DIR",
               help="folder from which adapters may be added while the service runs; none if not given")
    parser.add("network", "--host", default="127.0.0.1", help="address to listen on")
    parser.add("network", "--allowed-host", action="append", default=[], metavar="NAME",
               help="a further name in the Host header of requests, such as a proxy's; several times")
    parser.add("network", "--quiet", action="store_true", help="no access log")
    parser.add("network", "--port", type=number(int, 0, 65535, "a port from 0 (any that is free) to 65535"), default=8000,
               help="0: any that is free")
    parser.add("limits", "--max-queue", type=COUNT, default=1024, metavar="TEXTS", help="texts that may wait; more: 429")
    parser.add("limits", "--max-texts", type=COUNT, default=256, metavar="TEXTS", help="texts of a request; more: 413")
    parser.add("limits", "--max-characters", type=COUNT, default=20000, metavar="N", help="characters of a text; more: 413")
    parser.add("limits", "--max-connections", type=COUNT, default=512, metavar="N",
               help="open connections; more: the one that has sent nothing for longest is closed")
    parser.add("limits", "--timeout", type=POSITIVE, default=30.0, metavar="SECONDS", help="to answer a request; more: 504")


def _test(parser: Parser) -> None:
    """test the difference between two finished runs on one labelled file"""
    parser.usage = "run.py test RUN_A RUN_B --data FILE [options]"
    parser.add_argument("other", metavar="RUN_B", type=Path)
    parser.add("scoring", "--data", type=Path, required=True, metavar="FILE", help="in the format of the runs' task")
    _training_data_option(parser, "scoring")
    parser.add("scoring", "--json", action="store_true", help="print one JSON object")
    parser.add("test", "--resamples", type=number(int, 100, 10 ** 7, "a whole number from 100 to 10000000"), default=10_000,
               help="of the sentences, with replacement")
    parser.add("test", "--seed", type=number(int, 0, 10 ** 9, "a whole number of at least 0"), default=0,
               help="of the resamples")


def _diagnose(parser: Parser) -> None:
    """find where a run is right and wrong: by source, length, phenomenon; calibration; disagreements"""
    parser.add("diagnosis", "--data", type=Path, metavar="FILE",
               help="in the format of the run's task; its development files if not given")
    _training_data_option(parser, "diagnosis")
    parser.add("diagnosis", "--pairs", type=Path, metavar="FILE",
               help="TSV of minimal pairs with the columns phenomenon, paradigm, good, bad (BLiMP's; figures of "
                    "published.tsv beside it are shown too); the built-in grammar's if not given")
    parser.add("diagnosis", "--limit", type=COUNT, help="so many pairs of each paradigm: a quick look")
    parser.add("diagnosis", "--json", action="store_true", help="print one JSON object")
    parser.add(FOLDER, "--out", type=Path, help="of JSON, tables and plots; diagnose-RUN beside the run if not given")


def _repeat(parser: Parser) -> None:
    """repeat a finished run from its config.json; exit status 1 if the result differs"""
    parser.add(FOLDER, "--out", type=Path, help="keep the repetition in this folder")


def _export(parser: Parser) -> None:
    """write a distillation's student as an ONNX model that needs neither PyTorch nor this project"""
    parser.add(GENERAL, "--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add(GENERAL, "--int8", action="store_true", help="8-bit weights: a quarter of the size; says what it costs")
    parser.add(GENERAL, "--control", action="store_true", help="the no-KD baseline instead of the student")


def _merge(parser: Parser) -> None:
    """write a fine-tuned classifier as a plain transformers checkpoint, its adapter merged"""
    parser.add(GENERAL, "--out", type=Path, required=True, metavar="DIR", help="a new folder")


def _paper(parser: Parser) -> None:
    """make every run that the paper cites, then report/main.pdf; started again, it goes on with what is missing"""
    parser.add("paper", "--profile", choices=PROFILES, default=PROFILES[0],
               help="quick: the built-in task, some minutes; full: real models and data, some hours on two cores")
    parser.add("paper", "--data-root", type=Path, metavar="DIR",
               help="for full: folder with cola/, rotten_tomatoes/, movie_reviews/, buzzer/, blimp/ and plain_text/; the "
                    "Hub's GPT-2 and GLUE's CoLA if not given")
    _seeds_option(parser, "paper", 3, "")
    parser.add("paper", "--dry-run", action="store_true", help="print every step with its command, and run nothing")
    parser.add("paper", "--only", type=list_of(str), default=[], metavar="STEP[,...]", help="run these steps alone")
    parser.add("paper", "--no-run", action="store_true", help="run no step: build the paper of what is there")
    parser.add("paper", "--records", type=Path, metavar="DIR",
               help="folder of what finished steps left, all but the weights: a step recorded there is not run again, one "
                    "that is run is added")
    parser.add(FOLDER, "--out", type=Path, help="runs/paper-SR, or runs/paper-quick-SR, if not given")
    parser.add(FOLDER, "--overwrite", action="store_true", help="remove what the steps left, and begin anew")


def _report(parser: Parser) -> None:
    """tables and plots of the runs into report/Report_SR.pdf"""
    parser.add(FOLDER, "--plots", type=Path, default=Path("plots"), metavar="DIR", help="folder of the plots")
    parser.add(FOLDER, "--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder of the runs")


def _submit(parser: Parser) -> None:
    """zip code, plots and the PDF, without data and caches"""
    parser.add("author", "--first-name", required=True)
    parser.add("author", "--last-name", required=True)
    _report(parser)


# Modes that start something take SR, those that read a run take its folder; run.py has a function for each.
MODES = {"gen": _gen, "LoRA": _lora, "distil": _distil, "compare": _compare, "sweep": _sweep, "eval": _eval,
         "test": _test, "diagnose": _diagnose, "predict": _predict, "serve": _serve, "export": _export, "merge": _merge,
         "repeat": _repeat, "paper": _paper, "report": _report, "submit": _submit}
READS_A_RUN = ("eval", "test", "diagnose", "export", "merge", "repeat")
OWN_ARGUMENTS = {"predict": "RUN_DIR [TEXT ...]", "serve": "--adapter NAME=DIR ..."}  # neither SR nor just a run's folder
READS_FILES_ONLY = ("report", "submit")  # they do without PyTorch
SEVERAL_PROCESSES = ("LoRA", "distil")  # modes that torchrun may start several times for one run


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """Returns the whole command line, and the parser of each mode."""
    parser = Parser(prog="run.py", description="Adapt GPT-2 with LoRA, distil it into a small RNN.")
    commands = parser.add_subparsers(dest="mode", required=True, metavar="MODE", parser_class=Parser)
    modes = {}
    for name, add_options in MODES.items():
        what = OWN_ARGUMENTS.get(name, "RUN_DIR" if name in READS_A_RUN else "SR")
        modes[name] = commands.add_parser(name, help=add_options.__doc__, description=add_options.__doc__,
                                          usage=f"run.py {name} {what} [options]")
        if name in READS_A_RUN:
            modes[name].add_argument("run", metavar="RUN_DIR", type=Path)
        elif name not in OWN_ARGUMENTS:
            modes[name].add_argument("sr", metavar="SR", type=sr_type, help="five digits: the seed, and the run's name")
        add_options(modes[name])
        if name not in READS_FILES_ONLY:
            modes[name].add("machine", "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
                            help="auto: the GPU that CUDA finds, else the CPU; mps: an Apple GPU")
    return parser, modes
