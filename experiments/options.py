"""What the command line takes: its modes, their options, the types and defaults of these.

    python run.py LoRA --help

Nothing heavy is imported here, so that --help and a mistyped option are answered at once.
"""
from __future__ import annotations

import argparse
import difflib
import re
import sys
from pathlib import Path

# The embedded task's model is small: it wants more epochs and a higher rate than a pretrained one.
EPOCHS = {"LoRA": {"tiny": 12, "": 3}, "distil": {"tiny": 30, "": 15}}
# By method: what is pretrained wants small steps, what starts from nothing large ones.
LEARNING_RATE = {"lora": {"tiny": 2e-3, "": 4e-4}, "full": {"tiny": 5e-4, "": 5e-5}, "head": {"tiny": 1e-2, "": 1e-3},
                 "features": {"": 3e-3}, "none": {"": 4e-4}, "distil": {"": 3e-3}}
MODES = ("gen", "LoRA", "distil", "compare", "sweep", "eval", "repeat", "report", "submit")
METHODS = ("lora", "full", "head", "features", "none")
# What every entry of a comparison, and every trial of a sweep, has in common: the data and where results go.
COMMON = ("sr", "task", "data", "label_column", "eval_split", "limit", "out", "plots", "no_plots", "no_keep", "keep_memory",
          "save_every", "resume", "overwrite")


def complain(message) -> None:
    """One line on stderr, whatever the message quotes."""
    print("run.py:", str(message).replace("\n", " "), file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """Errors are one line on stderr, with the closest option or mode where one was mistyped; exit status 2."""

    def error(self, message: str):
        complain(message)
        sys.exit(2)


class Help(argparse.HelpFormatter):
    """Shows a default where there is one to show."""

    def _get_help_string(self, action):
        shown = action.default not in (None, False, argparse.SUPPRESS) and action.option_strings
        return (action.help or "") + (" (default: %(default)s)" if shown else "")


def closest(word: str, known) -> str:
    """The end of an error: the known word that was probably meant, or all of them."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.4)
    return f"; did you mean {by_lower[close[0]]}?" if close else f"; expected one of {', '.join(known)}"


def _number(kind, low, high, what: str):
    """An argparse type: a number within bounds."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {what}")
        return value
    return parse


_count = _number(int, 1, 10 ** 9, "a whole number of at least 1")
_share = _number(float, 0, 1, "a number from 0 to 1")
_positive = _number(float, 1e-30, 1e30, "a number above 0")
_not_negative = _number(float, 0, 1e30, "a number of at least 0")


def _save_every(text: str) -> str:
    """An argparse type: minutes (a bare number, or 10min) or steps (50steps)."""
    saving(text)
    return text


def saving(text: str) -> dict:
    """`--save-every` as TrainOptions has it."""
    what = "minutes, such as 10 or 10min, or steps, such as 50steps"
    if text.endswith("steps"):
        return {"save_steps": _number(int, 1, 10 ** 9, what)(text.removesuffix("steps"))}
    return {"save_every": _number(float, 1e-30, 1e30, what)(text.removesuffix("min"))}


def _one_of(words):
    """An argparse type: one of these words."""
    def parse(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(words)}")
        return text
    return parse


def _list(kind):
    """An argparse type: values with commas between them, each once."""
    def parse(text: str) -> list:
        values = [kind(part.strip()) for part in text.split(",")]
        if len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"{text!r}: a value is given twice")
        return values
    return parse


def _sr(text: str) -> str:
    if not re.fullmatch("[0-9]{5}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected exactly five digits, such as 12345")
    return text


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(prog="run.py", description="Adapt GPT-2 with LoRA, distil it into a small RNN.",
                    formatter_class=Help, allow_abbrev=False)
    modes = parser.add_subparsers(dest="mode", required=True, metavar="MODE", parser_class=Parser)

    def mode(name: str, text: str, sr: bool = True, epilog: str | None = None) -> Parser:
        sub = modes.add_parser(name, help=text, description=text, allow_abbrev=False,
                               formatter_class=Help, epilog=epilog)
        if sr:
            sub.add_argument("sr", metavar="SR", type=_sr, help="five digits: the seed, and the run's name")
        return sub

    gen = mode("gen", "generate text")
    gen.add_argument("--model", help="as for LoRA")
    gen.add_argument("--prompt", action="append", help="may be given several times")
    gen.add_argument("--prompt-file", type=Path, help="a UTF-8 file with one prompt a line")
    gen.add_argument("--max-new-tokens", type=_count, default=40, help="of each sample")
    gen.add_argument("--temperature", type=_positive, default=0.8, help="below 1: likelier tokens likelier still")
    gen.add_argument("--top-k", type=_number(int, 0, 10 ** 9, "a whole number of at least 0"), default=50,
                     help="draw from the k likeliest tokens; 0: all")
    gen.add_argument("--top-p", type=_number(float, 1e-9, 1, "a number above 0, up to 1"), default=0.95,
                     help="draw from the likeliest tokens that hold this probability")
    gen.add_argument("--num-samples", type=_count, default=1, help="samples of each prompt")
    gen.add_argument("--greedy", action="store_true", help="the likeliest token each time")
    gen.add_argument("--adapter", type=Path, help="folder of a saved LoRA adapter")

    lora = mode("LoRA", "inject LoRA into a backbone and fine-tune it on a task")
    _lora_options(lora)

    distil = mode("distil", "distil a LoRA run into a small RNN, and train the RNN alone beside it")
    distil.add_argument("--teacher", type=Path, help="folder of a LoRA run; runs/LoRA-SR if not given")
    distil.add_argument("--temperature", type=_positive, default=4.0, help="softens teacher and student in the KD loss")
    distil.add_argument("--kd-alpha", type=_share, default=0.9, help="weight of the teacher in the loss")
    distil.add_argument("--embedding-size", type=_count, help="96, or less to fit 10 %% of the teacher's parameters")
    distil.add_argument("--hidden-size", type=_count, help="128, or less to fit, of each direction")
    distil.add_argument("--rnn-layers", type=_count, default=1, help="of the RNN")
    distil.add_argument("--cell", choices=("lstm", "gru"), default="lstm", help="of the RNN")
    distil.add_argument("--pooling", choices=("max", "mean"), default="max", help="over real tokens")
    distil.add_argument("--dropout", type=_number(float, 0, 0.99, "a number from 0 to 0.99"), default=0.3,
                        help="on embeddings and on the pooled vector")
    _training_options(distil, "distil")

    compare = mode("compare", "compare methods on one task: the same seeds, budget and learning rates for each",
                   epilog="Each entry's learning rate is chosen on the first seed, by the best epoch's MCC. The same "
                          "command started again goes on with what is missing.")
    compare.add_argument("--methods", type=_list(_one_of(METHODS)), default="none,head,lora,full",
                         metavar="METHOD[,...]", help="an entry each")
    compare.add_argument("--set", action="append", default=[], metavar="NAME:OPTION=VALUE[,...]",
                         help="one more entry, with options of LoRA's: r2:method=lora,rank=2,targets=q+v "
                              "(+ stands for the comma within targets and layers); may be given several times")
    compare.add_argument("--seeds", type=_number(int, 1, 1000, "a whole number from 1 to 1000"), default=3,
                         help="how many: SR, SR + 1, ...; 00000 follows 99999")
    compare.add_argument("--lr-grid", type=_list(_positive), metavar="LR[,...]",
                         help="learning rates that each entry chooses from; --lr if not given, or each method's default")
    _lora_options(compare, method=False)

    sweep = mode("sweep", "search rank, targets, layers, learning rate ... with Optuna",
                 epilog="A trial's score is its best epoch's MCC. The same command started again, or elsewhere with the "
                        "same --storage, goes on with the trials that wait.")
    sweep.add_argument("--search", action="append", required=True, metavar="OPTION=VALUES",
                       help="choices, rank=1,2,4 or targets=q+v,q+k+v+o,all (+ stands for the comma within targets and "
                            "layers), or a range, lr=1e-4..1e-3 or alpha=1..64:log (rates are searched on a logarithmic "
                            "scale, others on a linear one unless :log follows); several times for several options")
    sweep.add_argument("--sampler", choices=("tpe", "random", "grid"), default="tpe", help="grid: every combination, once")
    sweep.add_argument("--trials", type=_count, help="of all processes together; 20, or the whole grid, if not given")
    sweep.add_argument("--storage", metavar="URL", help="a database that several processes share, such as "
                                                        "postgresql://HOST/DB; study.db in the folder if not given")
    sweep.add_argument("--no-prune", action="store_true",
                       help="let hopeless trials run to the end (pruned: below the median of the others' scores by then)")
    _lora_options(sweep)

    evaluate = mode("eval", "score a saved run on a labelled file", sr=False)
    evaluate.add_argument("run", metavar="RUN_DIR", type=Path)
    evaluate.add_argument("--data", type=Path, required=True, metavar="FILE", help="in the format of the run's task")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.add_argument("--predictions", type=Path, metavar="OUT.tsv",
                          help="write sentence, label, prediction and probability")

    repeat = mode("repeat", "repeat a finished run from its config.json; exit status 1 if the result differs", sr=False)
    repeat.add_argument("run", metavar="RUN_DIR", type=Path)
    repeat.add_argument("--out", type=Path, help="keep the repetition in this folder")

    report = mode("report", "tables and plots of the runs into report/Report_SR.pdf")
    submit = mode("submit", "zip code, plots and the PDF, without data and caches")
    submit.add_argument("--first-name", required=True)
    submit.add_argument("--last-name", required=True)
    for sub in (report, submit, distil):
        sub.add_argument("--plots", type=Path, default=Path("plots"), metavar="DIR", help="folder of the plots")
    for sub in (report, submit):
        sub.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder of the runs")
    return parser


def default(table: dict, task: str):
    """The task's entry of a table of defaults, or that of all others."""
    return table.get(task, table[""])


def _defaults_text(table: dict) -> str:
    return ", ".join(f"{value:g}" + (f" for --task {task}" if task else " otherwise") for task, value in table.items())


def _lora_options(parser: Parser, method: bool = True) -> None:
    """What a fine-tuning has; `compare` (whose entries have a method each) and `sweep` take the same."""
    parser.add_argument("--model", help="gpt2 (the default), gpt2-medium, distilgpt2 ..., any Hugging Face name, a local "
                                        "folder or GGUF file, smollm2, or tiny")
    if method:
        parser.add_argument("--method", choices=METHODS, default="lora",
                            help="train LoRA and the head, everything, the head alone, a head that reads the features and "
                                 "no text, or nothing")
    parser.add_argument("--rank", type=int, default=8, help="of each update")
    parser.add_argument("--alpha", type=_positive, default=16.0, help="the update is scaled by alpha / rank")
    parser.add_argument("--dropout", type=_number(float, 0, 0.99, "a number from 0 to 0.99"), default=0.0,
                        help="on the inputs of A")
    parser.add_argument("--rslora", action="store_true", help="scale by alpha / sqrt(rank)")
    parser.add_argument("--targets", default="q,k,v,o,mlp", help="roles (q,k,v,o,mlp) or module-name patterns")
    parser.add_argument("--layers", help="blocks to adapt, such as 0-11; all if not given")
    _table_options(parser)
    _training_options(parser, "LoRA")
    parser.add_argument("--head-lr", type=_positive, help="learning rate of the head; --lr if not given")
    parser.add_argument("--precision", choices=("fp32", "bf16x3", "bf16"), default="fp32",
                        help="of products with frozen weights; what trains stays float32")
    parser.add_argument("--no-keep", action="store_true", help="recompute frozen blocks below the lowest trained one")
    parser.add_argument("--keep-memory", type=_not_negative, default=2.0, metavar="GIB",
                        help="of their results in memory; the rest is memory-mapped")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--plots", type=Path, default=Path("plots"), metavar="DIR", help="folder of the plots")
    parser.add_argument("--no-plots", action="store_true", help="draw none")


def _names(text: str) -> tuple[str, ...]:
    """An argparse type: names separated by commas."""
    names = tuple(part.strip() for part in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r}; expected names separated by commas")
    return names


def _table_options(parser: Parser) -> None:
    """What the columns of a table mean."""
    parser.add_argument("--text-column", type=_names, default=(), metavar="A,B",
                        help="joined by the tokenizer's separator; text, sentence or review if not given")
    parser.add_argument("--template", metavar="TEXT", help='instead: column names in braces, "Q: {question} A: {guess}"')
    parser.add_argument("--label-column", default="label", help="strings, booleans or whole numbers; any number of classes")
    parser.add_argument("--eval-split", metavar="NAME|FILE|SHARE",
                        help="validation, dev or eval if --data has it, else 0.1 of the training rows")
    parser.add_argument("--feature-columns", type=_names, default=(), metavar="A,B",
                        help="numbers that the head reads beside the text")
    parser.add_argument("--truncate", choices=("head", "tail", "middle"), default="tail",
                        help="the part of a text longer than --max-length that is cut")


def _training_options(parser: Parser, mode: str) -> None:
    """What every training has."""
    parser.add_argument("--task", choices=("cola", "rotten_tomatoes", "imdb", "buzzer", "csv", "tiny"),
                        help="csv: any table; cola if not given, unless --data holds tables or the embedded default is used")
    parser.add_argument("--data", metavar="DIR|FILE", help="folder with the task's files, or a CSV, TSV, JSONL or Parquet "
                                                           "file; the Hub's if not given")
    parser.add_argument("--out", type=Path, help="the run's folder; runs/MODE-SR if not given")
    parser.add_argument("--epochs", type=_count, help=_defaults_text(EPOCHS[mode]))
    parser.add_argument("--batch-size", type=_count, default=32, help="sentences in a batch")
    parser.add_argument("--batch-tokens", type=_count, help="instead of --batch-size: tokens in a batch, pads included")
    parser.add_argument("--lr", type=_positive, help="; ".join(
        f"{method}: {_defaults_text(LEARNING_RATE[method])}" for method in (METHODS[:-1] if mode == "LoRA" else (mode,))))
    parser.add_argument("--weight-decay", type=_not_negative, default=0.01, help="not on biases and norms")
    parser.add_argument("--warmup", type=_share, default=0.06, help="share of the steps")
    parser.add_argument("--schedule", choices=("linear", "cosine", "constant"), default="linear",
                        help="decay after warm-up")
    parser.add_argument("--clip", type=_not_negative, default=1.0, help="largest gradient norm; 0: no clipping")
    parser.add_argument("--accumulate", type=_count, default=1, help="batches in an optimiser step")
    parser.add_argument("--label-smoothing", type=_share, default=0.0, help="share of the label spread over all classes")
    parser.add_argument("--patience", type=_count, help="stop after so many epochs without a better one")
    parser.add_argument("--max-length", type=_count, help="tokens; the model's context if not given")
    parser.add_argument("--limit", type=_count, help="so many rows of each split, evenly spaced: a quick look")
    parser.add_argument("--save-every", type=_save_every, default="10min", metavar="Nmin|Nsteps",
                        help="minutes, or optimiser steps, between checkpoints in an epoch")
    parser.add_argument("--anomaly", action="store_true",
                        help="name the first module that computes something not finite; several times slower")
    parser.add_argument("--resume", action="store_true", help="continue an unfinished run")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is already in the folder")
    parser.add_argument("--deterministic", action="store_true", help="deterministic kernels on a GPU too")


class Variant(Parser):
    """Parses the options of one entry or trial; errors name the option that they came in."""

    def __init__(self, where: str):
        super().__init__(prog=where, allow_abbrev=False, add_help=False)
        self.where = where
        self.add_argument("sr", type=_sr)
        _lora_options(self)

    def error(self, message: str):
        from record.files import UserError

        raise UserError(f"{self.where}: {message}")

    def words(self, args, changes: dict[str, str]) -> list[str]:
        """What of `args` is no default, with `changes` (option -> value as written), as words of a command line."""
        words = []
        for action in self._actions:
            value = getattr(args, action.dest, action.default)
            if not action.option_strings or action.dest in changes or value == action.default or (
                    action.dest in ("out", "plots", "no_plots", "resume", "overwrite", "lr")):
                continue
            option = action.option_strings[-1]
            if action.nargs == 0:
                words.append(option)
            elif isinstance(action, argparse._AppendAction):
                words += [f"{option}={item}" for item in value]
            elif isinstance(value, (list, tuple)):
                words += [option, *map(str, value)] if action.nargs else [f"{option}={','.join(map(str, value))}"]
            else:
                words.append(f"{option}={value}")
        for dest, value in changes.items():
            action = self.option(dest)
            option = action.option_strings[-1]
            if dest in ("targets", "layers"):  # the comma stands between options, or between choices
                value = "" if value == "all" else value.replace("+", ",")
            if action.nargs == 0 and value not in ("yes", "no"):
                self.error(f"{dest}={value}: expected yes or no")
            words += ([option] if value == "yes" else []) if action.nargs == 0 else [f"{option}={value}"] if value else []
        return words

    def option(self, name: str):
        """The option `name`, dashes or underscores in it alike."""
        known = {action.dest: action for action in self._actions if action.option_strings}
        if name not in known:
            self.error(f"unknown option {name}{closest(name, known)}")
        return known[name]
