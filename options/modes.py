"""Declares the modes of the command line and the options that no run records; those of a run stand in schema.py."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from options.declare import option
from options.schema import METHODS, DistilOptions, RunOptions

# What several options have in common.
MANY = {"most": 1000, "often": True}
NAMED_RUN = {"repeat": True, "pattern": "[^=]+=.+", "metavar": "NAME=DIR"}


class Options:
    """Makes each class below a dataclass without methods: no object of it is made, and --help is faster."""

    def __init_subclass__(cls):
        dataclass(init=False, repr=False, eq=False)(cls)


# Options of several modes.
class Sr(Options):
    sr: str = option(help="five digits: the seed, and the run's name", metavar="SR", positional=True, pattern="[0-9]{5}",
                     like="exactly five digits, such as 12345")


class RunFolder(Options):
    run: Path = option(help="folder of a finished run", metavar="RUN_DIR", positional=True)


class Machine(Options):
    device: str = option("auto", "auto: a CUDA GPU, else the CPU", ("auto", "cpu", "cuda", "mps"), often=True)


class Study(Options):
    config: Path | None = option(None, "JSON or TOML file of options; flags take precedence", metavar="FILE", often=True)
    plots: Path = option(Path("plots"), "folder of the plots")
    no_plots: bool = option(False, "make no plots")


class Seeds(Options):
    seeds: int | None = option(None, "number of seeds, SR, SR + 1, ...: a run each, and intervals", least=1, **MANY)
    folds: int | None = option(None, "folds of a cross-validation: a run each, and means", least=2, **MANY, not_in="distil")
    jobs: int = option(1, "runs at a time, each with its part of the CPU's threads", least=1)


# Files of eval and predict may have another form than the training data's.
class Reading(Options):
    delimiter: str | None = option(None, "character between cells; the run's if not given", metavar="CHARACTER")
    encoding: str | None = option(None, "encoding of the file, such as cp1252; the run's if not given", metavar="NAME")
    fast: str = option("auto", "reference: model.py alone, without fast/", ("auto", "reference"), word="kernels")


# eval, test, diagnose and calibrate score rows, and refuse those that a run was trained on.
class TrainingData(Options):
    allow_training_data: bool = option(False, "score a file although the run was trained on it")
    json: bool = option(False, "print one JSON object")


class Calibrated(Options):
    calibrated: bool = option(False, "use the temperature and the threshold of calibration.json (see the mode calibrate)")


# Options of one mode, in the order of MODES.
class Gen(Options):
    model: str | None = option(None, "name on the Hub, local folder or GGUF file; the adapter's, or gpt2, if not given")
    prompt: tuple[str, ...] = option((), "beginning of a text", repeat=True)
    prompt_file: Path | None = option(None, "UTF-8 file with one prompt a line", metavar="FILE")
    max_new_tokens: int = option(40, "tokens of each sample, without its prompt", least=1)
    adapter: Path | None = option(None, "folder of a saved LoRA adapter")
    batch_size: int = option(64, "samples that are generated together", least=1)
    precision: str = option("fp32", "precision of the model's linears", ("fp32", "bf16"))
    num_samples: int = option(1, "samples of each prompt", least=1)
    greedy: bool = option(False, "take the likeliest token each time")
    temperature: float = option(0.8, "temperature of sampling; below 1, likelier tokens become likelier still", above=0)
    top_k: int = option(50, "sample from the k likeliest tokens; 0: from all", least=0)
    top_p: float = option(0.95, "sample from the likeliest tokens that hold this probability", above=0, most=1)
    fast: str = option("auto", "reference: model.py alone, without fast/", ("auto", "reference"), word="kernels")


class Compare(Options):
    methods: tuple[str, ...] = option(("none", "head", "lora", "full"), "methods to compare, an entry each", METHODS,
                                      unique=True, often=True)
    set: tuple[str, ...] = option((), "one more entry with LoRA's options, r2:method=lora,rank=2,targets=q+v (+ is a comma "
                                  "in a value)", repeat=True, often=True, metavar="NAME:OPTION=VALUE[,...]")
    seeds: int = option(3, "number of seeds: SR, SR + 1, ...", least=1, **MANY)
    jobs: int = option(1, "runs at a time, each with its part of the CPU's threads", least=1)
    against: str | None = option(None, "entry that is subtracted from every other one, paired by seed", often=True)
    lr_grid: tuple[float, ...] | None = option(None, "learning rates to choose from", above=0, unique=True, often=True)


class Sweep(Options):
    search: tuple[str, ...] = option((), "choices, rank=1,2,4 or targets=q+v,all, or a range, lr=1e-4..1e-3",
                                     repeat=True, required=True, often=True, metavar="OPTION=VALUES")
    sampler: str = option("tpe", "sampler of Optuna; grid: every combination, once", ("tpe", "random", "grid"), often=True)
    trials: int | None = option(None, "trials of all processes; 20, or the whole grid, if not given", least=1, often=True)
    storage: str | None = option(None, "database that several processes share; study.db if not given", metavar="URL")
    no_prune: bool = option(False, "finish trials that are below the median of the others", often=True)


class Eval(TrainingData):
    data: Path | None = option(None, "labelled file; the rows that the run held out if not given", metavar="FILE")
    predictions: Path | None = option(None, "file for sentence, label, prediction and probability", metavar="OUT.tsv")


class Significance(TrainingData):
    data: Path = option(None, "labelled file in the format of the runs' task", metavar="FILE", required=True)
    other: Path = option(None, "folder of the run that is subtracted", metavar="RUN_B", positional=True)
    resamples: int = option(10_000, "resamples of the sentences, with replacement", least=100, most=10 ** 7)
    seed: int = option(0, "seed of the resamples", least=0)


class Diagnose(TrainingData):
    data: Path | None = option(None, "labelled file; the run's development files if not given", metavar="FILE")
    pairs: Path | None = option(None, "TSV of minimal pairs (phenomenon, paradigm, good, bad), BLiMP's say; those of the "
                                "built-in grammar if not given", metavar="FILE")
    limit: int | None = option(None, "pairs of each paradigm: a quick look", least=1)
    out: Path | None = option(None, "folder of JSON, tables and plots; diagnose-RUN next to the run if not given")


class Calibrate(TrainingData):
    data: Path | None = option(None, "labelled file; the split that chose the epoch if not given", metavar="FILE")
    least_precision: float | None = option(None, "least precision of the threshold; for MCC if not given", above=0, most=1)
    positive: str | None = option(None, "class of the threshold; the second one if not given", metavar="CLASS")


class Predict(Options):
    run: Path | None = option(None, "folder of a finished run", metavar="RUN_DIR", positional="?")
    texts: tuple[str, ...] = option((), "sentences to classify", metavar="TEXT", positional="*")
    file: Path | None = option(None, "sentences, one a line, or a table with the run's columns; -: stdin", metavar="FILE")
    format: str | None = option(None, "format of --file; by default its ending", ("text", "csv", "tsv", "jsonl", "parquet"))
    json: bool = option(False, "print one JSON object a line")
    out: Path | None = option(None, "new .parquet or .jsonl file, or folder of them, of answers to --file", metavar="FILE")
    engine: str = option("local", "who answers a folder: this process, or Ray's (docs/scaling.md)", ("local", "ray"))
    address: str | None = option(None, "Ray cluster; by default one of this machine", metavar="HOST:PORT")
    workers: int | None = option(None, "processes of --engine ray; by default one a core", least=1)
    control: bool = option(False, "use a distillation's baseline, trained without a teacher, instead of its student")
    adapter: tuple[str, ...] = option((), 'LoRA run for the rows {"adapter": "NAME", "text": ...} of --file', **NAMED_RUN)
    base: bool = option(False, "answer rows that name no adapter by the base alone, instead of refusing them")
    at_least: float | None = option(None, "least probability of an answer; texts below it are undecided", least=0, most=1)


class Serve(Options):
    adapter: tuple[str, ...] = option((), "LoRA run; all on one base", **NAMED_RUN)
    student: tuple[str, ...] = option((), "distillation run", **NAMED_RUN)
    adapters_root: Path | None = option(None, "folder from which a running service may add adapters; none if not given")
    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0: any that is free", least=0, most=65535)
    max_queue: int = option(1024, "texts that may queue; more: 429", least=1)
    max_texts: int = option(256, "texts of a request; more: 413", least=1)
    max_characters: int = option(20000, "characters of a text; more: 413", least=1)
    timeout: float = option(30.0, "seconds to answer a request; more: 504", above=0)
    allowed_host: tuple[str, ...] = option((), "Host header, next to loopback names and --host", repeat=True, metavar="NAME")
    max_connections: int = option(512, "open connections; more: the one that waits longest is closed", least=1)
    quiet: bool = option(False, "write no access log")


class Ship(RunFolder):
    out: Path = option(help="new folder of the result", required=True)
    int8: bool = option(False, "8-bit weights: a quarter of the size; prints the loss of accuracy", not_in="merge")
    control: bool = option(False, "write a distillation's baseline instead of its student", not_in="merge")


class Repeat(RunFolder):
    out: Path | None = option(None, "folder that keeps the repetition")


class Paper(Options):
    profile: str = option("quick", "quick: built-in task, minutes; full: real data, hours", "experiments/steps.py:PROFILES")
    data_root: Path | None = option(None, "folder of cola/, blimp/ ... for --profile full; GPT-2 and CoLA if not given")
    seeds: int = option(3, "number of seeds: SR, SR + 1, ...", least=1, **MANY)
    jobs: int | None = option(None, "steps at a time; one a core up to three, or one on a GPU, if not given", least=1)
    dry_run: bool = option(False, "print every step with its command, and run nothing")
    only: tuple[str, ...] = option((), "steps to run, and no others; some run only so: variants, losses", unique=True)
    no_run: bool = option(False, "run no step: build the paper of existing results")
    author: str = option("", "name on the cover of the PDF")
    records: Path | None = option(None, "folder of finished steps without weights; a recorded step is not run again")
    out: Path | None = option(None, "folder of the paper's runs; runs/paper-SR, or runs/paper-quick-SR, if not given")
    overwrite: bool = option(False, "remove the results of the steps, and begin anew")


# report and submit read files alone: they have no --device.
class HandIn(Sr):
    plots: Path = option(Path("plots"), "folder of the plots")
    runs: Path = option(Path("runs"), "folder of the runs")
    author: str = option("", "author on the cover; the names of `submit`, or none, if not given", not_in="submit")
    first_name: str = option(None, "the author's first name", required=True, not_in="report")
    last_name: str = option(None, "the author's last name", required=True, not_in="report")


class Mode(NamedTuple):
    """Holds a mode's function in experiments/, one line about it, an example, and the classes of its options."""

    main: str  # the parsed arguments in, the exit status out (None: 0)
    help: str
    example: str
    options: tuple[type, ...]


# In the order of --help. Modes that start runs take SR, modes that read a run take its folder. A mode of at most 20 options
# shows all of them; others show those with `often`.
MODES = {
    "gen": Mode("generate:main", "generate text", 'gen 12345 --model gpt2 --prompt "The cat"', (Sr, Gen, Machine)),
    "LoRA": Mode("finetune:main", "inject LoRA into a backbone and fine-tune it on a task",
                 "LoRA 12345 --model gpt2 --task cola --rank 8", (Sr, RunOptions, Seeds, Study, Machine)),
    "distil": Mode("distil:main", "distil a LoRA run into a small RNN, and train the same RNN without a teacher",
                   "distil 12345 --teacher runs/LoRA-12345", (Sr, DistilOptions, RunOptions, Seeds, Study, Machine)),
    "compare": Mode("compare:main", "compare methods on one task: the same seeds, budget and learning rates for each",
                    "compare 12345 --methods head,lora,full --lr-grid 1e-4,1e-3", (Sr, Compare, RunOptions, Study, Machine)),
    "sweep": Mode("sweep:main", "search rank, targets, layers, learning rate ... with Optuna",
                  "sweep 12345 --search rank=1,2,4 --search lr=1e-4..1e-3", (Sr, Sweep, RunOptions, Study, Machine)),
    "eval": Mode("evaluate:main", "score a saved run on a labelled file",
                 "eval runs/LoRA-12345 --data dev.tsv", (RunFolder, Eval, Reading, Machine)),
    "test": Mode("significance:main", "test the difference between two finished runs on one labelled file",
                 "test runs/LoRA-12345 runs/distil-12345 --data dev.tsv", (RunFolder, Significance, Machine)),
    "diagnose": Mode("diagnose:main", "find where a run is right and wrong: by source, length, phenomenon, disagreements",
                     "diagnose runs/LoRA-12345", (RunFolder, Diagnose, Machine)),
    "calibrate": Mode("calibrate:main", "calibrate a run's probabilities, and choose the threshold of two classes",
                      "calibrate runs/LoRA-12345", (RunFolder, Calibrate, Machine)),
    "predict": Mode("predict:main", "classify sentences by a saved run: class and probability",
                    'predict runs/LoRA-12345 "The teachers thanked him."', (Predict, Calibrated, Reading, Machine)),
    "serve": Mode("serve:main", "answer requests over HTTP: many adapters on one base, and students next to them",
                  "serve --adapter cola=runs/LoRA-12345 --port 8000", (Serve, Calibrated, Machine)),
    "export": Mode("ship:export_main", "write a student or a classifier as an ONNX model that needs no PyTorch",
                   "export runs/distil-12345 --out student-onnx", (Ship, Calibrated, Machine)),
    "merge": Mode("ship:merge_main", "write a fine-tuned classifier as a plain transformers checkpoint, its adapter merged",
                  "merge runs/LoRA-12345 --out merged", (Ship, Calibrated, Machine)),
    "repeat": Mode("repeat:main", "repeat a finished run from its config.json; exit status 1 if the result differs",
                   "repeat runs/LoRA-12345", (Repeat, Machine)),
    "paper": Mode("paper:main", "make the runs of the paper, then report/main.pdf", "paper 12345", (Sr, Paper, Machine)),
    "report": Mode("hand_in:report", "put tables and plots of runs into report/Report_SR.pdf", "report 12345", (HandIn,)),
    "submit": Mode("hand_in:submit", "zip code, plots and the PDF, without data and caches",
                   "submit 12345 --first-name Ada --last-name Lovelace", (HandIn,))}
