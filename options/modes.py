"""Declares the modes of the command line and the options that no run records; those of a run stand in schema.py."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from options.declare import names_in, option
from options.schema import METHODS, DistilOptions, RunOptions


class Options:
    """Makes each class below a dataclass; without methods, which no one needs, in a tenth of the time, for --help."""

    def __init_subclass__(cls):
        dataclass(init=False, repr=False, eq=False)(cls)


# ---------------------------------------------------------------- options of several modes

class Sr(Options):
    sr: str = option(help="five digits: the seed, and the run's name", metavar="SR", positional=True, pattern="[0-9]{5}",
                     like="exactly five digits, such as 12345")


class RunFolder(Options):
    run: Path = option(help="folder of a finished run", metavar="RUN_DIR", positional=True)


class Machine(Options):
    device: str = option("auto", "auto: the GPU that CUDA finds, else the CPU; mps: an Apple GPU",
                         ("auto", "cpu", "cuda", "mps"), often=True)


class Kernels(Options):
    fast: str = option("auto", "auto: the fastest code for this machine; reference: model.py alone, without fast/",
                       ("auto", "reference"), flag="--kernels")


class Study(Options):
    config: Path | None = option(None, "JSON or TOML file of options, such as a run's config.json; flags take precedence",
                                 metavar="FILE", often=True)
    plots: Path = option(Path("plots"), "folder of the plots")
    no_plots: bool = option(False, "make no plots")


class Jobs(Options):
    jobs: int = option(1, "runs at a time, each with its part of the CPU's threads", least=1)


class Seeds(Options):
    seeds: int | None = option(None, "number of seeds, SR, SR + 1, ... (00000 follows 99999): a run each, and their means "
                               "with 95 % intervals", least=1, most=1000, often=True)
    folds: int | None = option(None, "folds of a cross-validation: a run each, and their mean with a 95 % interval",
                               least=2, most=1000, often=True, not_in="distil")


# Files of eval and predict may have another form than the training data's.
class Cells(Options):
    delimiter: str | None = option(None, "character between cells; the run's if not given", metavar="CHARACTER")
    encoding: str | None = option(None, "encoding of the file, such as cp1252; the run's if not given", metavar="NAME")


# eval, test, diagnose and calibrate score rows, and refuse those that a run was trained on.
class TrainingData(Options):
    allow_training_data: bool = option(False, "score a file although the run was trained on it")
    json: bool = option(False, "print one JSON object")


class Calibrated(Options):
    calibrated: bool = option(False, "use the temperature and the threshold of calibration.json (see the mode calibrate)")


class Student(Options):
    control: bool = option(False, "use a distillation's baseline, trained without a teacher, instead of its student")


# report and submit read files alone: they have no --device.
class Folders(Options):
    plots: Path = option(Path("plots"), "folder of the plots")
    runs: Path = option(Path("runs"), "folder of the runs")


# ---------------------------------------------------------------- options of one mode, in the order of MODES

class Gen(Options):
    model: str | None = option(None, "name on the Hub, local folder or GGUF file; the adapter's, or gpt2, if not given")
    prompt: tuple[str, ...] = option((), "beginning of a text; may be given several times", repeat=True)
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


class Compare(Options):
    methods: tuple[str, ...] = option(("none", "head", "lora", "full"), "methods to compare, an entry each", METHODS,
                                      unique=True, often=True)
    set: tuple[str, ...] = option((), "one more entry with LoRA's options, r2:method=lora,rank=2,targets=q+v (+ is the "
                                  "comma within targets and layers); may be given several times", repeat=True, often=True,
                                  metavar="NAME:OPTION=VALUE[,...]")
    seeds: int = option(3, "number of seeds: SR, SR + 1, ...; 00000 follows 99999", least=1, most=1000, often=True)
    jobs: int = option(1, "runs at a time, each with its part of the CPU's threads", least=1)
    against: str | None = option(None, "entry that is subtracted from every other one, paired by seed", often=True)
    lr_grid: tuple[float, ...] | None = option(None, "learning rates that each entry chooses from on the first seed",
                                               above=0, unique=True, often=True)


class Sweep(Options):
    search: tuple[str, ...] = option(
        (), "choices, rank=1,2,4 or targets=q+v,all (+ is the comma within targets and layers), or a range, lr=1e-4..1e-3 "
        "or alpha=1..64:log (only learning rates are logarithmic without :log); once for each option", repeat=True,
        required=True, often=True, metavar="OPTION=VALUES")
    sampler: str = option("tpe", "sampler of Optuna; grid: every combination, once", ("tpe", "random", "grid"), often=True)
    trials: int | None = option(None, "trials of all processes; 20, or the whole grid, if not given", least=1, often=True)
    storage: str | None = option(None, "database that several processes share; study.db if not given", metavar="URL")
    no_prune: bool = option(False, "finish trials that are below the median of the others", often=True)


class Eval(TrainingData):
    data: Path | None = option(None, "labelled file of the task; the rows that the run held out if not given", metavar="FILE")
    predictions: Path | None = option(None, "file for sentence, label, prediction and probability", metavar="OUT.tsv")


class Significance(TrainingData):
    data: Path = option(None, "labelled file in the format of the runs' task", metavar="FILE", required=True)
    other: Path = option(None, "folder of the run that is subtracted", metavar="RUN_B", positional=True)
    resamples: int = option(10_000, "resamples of the sentences, with replacement", least=100, most=10 ** 7)
    seed: int = option(0, "seed of the resamples", least=0)


class Diagnose(TrainingData):
    data: Path | None = option(None, "labelled file of the run's task; its development files if not given", metavar="FILE")
    pairs: Path | None = option(None, "TSV of minimal pairs with the columns phenomenon, paradigm, good, bad (BLiMP's; "
                                "figures of published.tsv next to it are shown too); the built-in grammar's if not given",
                                metavar="FILE")
    limit: int | None = option(None, "pairs of each paradigm: a quick look", least=1)
    out: Path | None = option(None, "folder of JSON, tables and plots; diagnose-RUN next to the run if not given")


class Calibrate(TrainingData):
    data: Path | None = option(None, "labelled file of the run's task; the split that chose the best epoch if not given",
                               metavar="FILE")
    least_precision: float | None = option(None, "choose the threshold of two classes for this precision, with the highest "
                                           "recall; for MCC if not given", above=0, most=1)
    positive: str | None = option(None, "class of the threshold; the second one if not given", metavar="CLASS")


class Predict(Options):
    run: Path | None = option(None, "folder of a finished run", metavar="RUN_DIR", positional="?")
    texts: tuple[str, ...] = option((), "sentences to classify", metavar="TEXT", positional="*", repeat=True)
    file: Path | None = option(None, "sentences, one a line, or a table with the run's columns; -: stdin", metavar="FILE")
    format: str | None = option(None, "format of --file; by its ending if not given",
                                ("text", "csv", "tsv", "jsonl", "parquet"))
    json: bool = option(False, "print one JSON object a line")
    out: Path | None = option(None, "new file of the answers to --file, .parquet or .jsonl; the same command again goes on "
                              "where it was stopped", metavar="FILE")
    adapter: tuple[str, ...] = option(
        (), 'LoRA run on one base with others, instead of RUN_DIR; each row of --file names one, {"adapter": "NAME", '
        '"text": "..."}', repeat=True, pattern="[^=]+=.+", like="NAME=DIR", metavar="NAME=DIR")
    base: bool = option(False, "answer rows that name no adapter by the base alone, instead of refusing them")
    at_least: float | None = option(None, "least probability of an answer; texts below it are undecided", least=0, most=1)


class Serve(Options):
    adapter: tuple[str, ...] = option((), "LoRA run; all on one base", repeat=True, pattern="[^=]+=.+", like="NAME=DIR",
                                      metavar="NAME=DIR")
    student: tuple[str, ...] = option((), "distillation run", repeat=True, pattern="[^=]+=.+", like="NAME=DIR",
                                      metavar="NAME=DIR")
    adapters_root: Path | None = option(None, "folder from which a running service may add adapters; none if not given")
    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0: any that is free", least=0, most=65535)
    max_queue: int = option(1024, "texts that may queue; more: 429", least=1)
    max_texts: int = option(256, "texts of a request; more: 413", least=1)
    max_characters: int = option(20000, "characters of a text; more: 413", least=1)
    timeout: float = option(30.0, "seconds to answer a request; more: 504", above=0)
    allowed_host: tuple[str, ...] = option((), "name that a Host header may have besides loopback names and --host; may be "
                                           "given several times", repeat=True, metavar="NAME")
    max_connections: int = option(512, "open connections; more: the one that waits longest is closed", least=1)
    quiet: bool = option(False, "write no access log")


class Merge(Options):
    out: Path = option(help="new folder of the result", required=True)


class Export(Merge):
    int8: bool = option(False, "8-bit weights: a quarter of the size; prints the loss of accuracy")


class Repeat(Options):
    out: Path | None = option(None, "folder that keeps the repetition")


class Paper(Options):
    profile: str = option("quick", "quick: the built-in task, some minutes; full: real models and data, some hours",
                          names_in("experiments/steps.py", "PROFILES"))
    data_root: Path | None = option(None, "folder with cola/, rotten_tomatoes/, movie_reviews/, buzzer/, blimp/ and "
                                    "plain_text/ for --profile full; the Hub's GPT-2 and CoLA if not given")
    seeds: int = option(3, "number of seeds: SR, SR + 1, ...; 00000 follows 99999", least=1, most=1000)
    jobs: int | None = option(None, "steps at a time, each with its part of the CPU's threads; one a core up to three, or "
                              "one on a GPU, if not given", least=1)
    dry_run: bool = option(False, "print every step with its command, and run nothing")
    only: tuple[str, ...] = option((), "steps to run, and no others; variants and losses name studies that run only so",
                                   unique=True)
    no_run: bool = option(False, "run no step: build the paper of existing results")
    author: str = option("", "name on the cover of the PDF")
    records: Path | None = option(None, "folder of finished steps without weights; a recorded step is not run again")
    out: Path | None = option(None, "folder of the paper's runs; runs/paper-SR, or runs/paper-quick-SR, if not given")
    overwrite: bool = option(False, "remove the results of the steps, and begin anew")


class Report(Folders):
    author: str = option("", "author on the cover of the PDF; the names of `submit`, or none, if not given")


class Submit(Folders):
    first_name: str = option(None, "the author's first name", required=True)
    last_name: str = option(None, "the author's last name", required=True)


# ---------------------------------------------------------------- the modes

class Mode(NamedTuple):
    """Holds one line about a mode, an example, its function in experiments/, and the classes of its options."""

    help: str
    example: str
    main: str  # the parsed arguments in, the exit status out (None: 0)
    options: tuple[type, ...]


# In the order of --help. Modes that start runs take SR, modes that read a run take its folder. A mode of at most 20 options
# shows all of them; others show those with `often`.
MODES = {
    "gen": Mode("generate text", 'gen 12345 --model gpt2 --prompt "The cat"', "generate:main", (Sr, Gen, Kernels, Machine)),
    "LoRA": Mode("inject LoRA into a backbone and fine-tune it on a task", "LoRA 12345 --model gpt2 --task cola --rank 8",
                 "finetune:main", (Sr, RunOptions, Seeds, Jobs, Study, Machine)),
    "distil": Mode("distil a LoRA run into a small RNN, and train the same RNN without a teacher",
                   "distil 12345 --teacher runs/LoRA-12345", "distil:main",
                   (Sr, DistilOptions, RunOptions, Seeds, Jobs, Study, Machine)),
    "compare": Mode("compare methods on one task: the same seeds, budget and learning rates for each",
                    "compare 12345 --methods none,head,lora,full --lr-grid 1e-4,3e-4,1e-3", "compare:main",
                    (Sr, Compare, RunOptions, Study, Machine)),
    "sweep": Mode("search rank, targets, layers, learning rate ... with Optuna",
                  "sweep 12345 --search rank=1,2,4 --search lr=1e-4..1e-3 --trials 20", "sweep:main",
                  (Sr, Sweep, RunOptions, Study, Machine)),
    "eval": Mode("score a saved run on a labelled file", "eval runs/LoRA-12345 --data dev.tsv", "evaluate:main",
                 (RunFolder, Eval, Cells, Kernels, Machine)),
    "test": Mode("test the difference between two finished runs on one labelled file",
                 "test runs/LoRA-12345 runs/distil-12345 --data dev.tsv", "significance:main",
                 (RunFolder, Significance, Machine)),
    "diagnose": Mode("find where a run is right and wrong: by source, length, phenomenon; calibration; disagreements",
                     "diagnose runs/LoRA-12345", "diagnose:main", (RunFolder, Diagnose, Machine)),
    "calibrate": Mode("calibrate a run's probabilities on held-out rows, and choose the threshold of two classes",
                      "calibrate runs/LoRA-12345", "calibrate:main", (RunFolder, Calibrate, Machine)),
    "predict": Mode("classify sentences by a saved run: class and probability",
                    'predict runs/LoRA-12345 "The teachers thanked him." "The princes encouraged she."', "predict:main",
                    (Predict, Student, Calibrated, Cells, Kernels, Machine)),
    "serve": Mode("answer requests over HTTP: many adapters on one base, and students next to them",
                  "serve --adapter cola=runs/LoRA-12345 --port 8000", "serve:main", (Serve, Calibrated, Machine)),
    "export": Mode("write a student or a fine-tuned classifier as an ONNX model that needs neither PyTorch nor this project",
                   "export runs/distil-12345 --out student-onnx", "ship:export_main",
                   (RunFolder, Export, Student, Calibrated, Machine)),
    "merge": Mode("write a fine-tuned classifier as a plain transformers checkpoint, its adapter merged",
                  "merge runs/LoRA-12345 --out merged", "ship:merge_main", (RunFolder, Merge, Calibrated, Machine)),
    "repeat": Mode("repeat a finished run from its config.json; exit status 1 if the result differs",
                   "repeat runs/LoRA-12345", "repeat:main", (RunFolder, Repeat, Machine)),
    "paper": Mode("make every run that the paper cites, then report/main.pdf", "paper 12345 --profile quick", "paper:main",
                  (Sr, Paper, Machine)),
    "report": Mode("put tables and plots of the runs into report/Report_SR.pdf", "report 12345", "hand_in:report",
                   (Sr, Report)),
    "submit": Mode("zip code, plots and the PDF, without data and caches",
                   "submit 12345 --first-name Ada --last-name Lovelace", "hand_in:submit", (Sr, Submit))}
