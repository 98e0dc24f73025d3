"""The command line.

    python run.py gen 12345        generate text
    python run.py LoRA 12345       inject LoRA into a backbone and fine-tune it on a task
    python run.py distil 12345     distil that run into a small RNN, and train the RNN alone beside it
    python run.py compare 12345    methods on one task: same seeds, budget and learning rates for each
    python run.py sweep 12345      search rank, targets, layers, learning rate ...
    python run.py eval RUN_DIR --data FILE
    python run.py repeat RUN_DIR   repeat a run from its config.json and compare
    python run.py report 12345     tables and plots of the runs into report/Report_12345.pdf
    python run.py submit 12345 --first-name A --last-name B

It parses, calls and prints. PyTorch is imported after parsing, so that --help answers at once.
"""
from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import shlex
import signal
import sys
import tempfile
import warnings
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


def _complain(message) -> None:
    """One line on stderr, whatever the message quotes."""
    print("run.py:", str(message).replace("\n", " "), file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """Errors are one line on stderr, with the closest option or mode where one was mistyped; exit status 2."""

    def error(self, message: str):
        _complain(message)
        sys.exit(2)


class Help(argparse.HelpFormatter):
    """Shows a default where there is one to show."""

    def _get_help_string(self, action):
        shown = action.default not in (None, False, argparse.SUPPRESS) and action.option_strings
        return (action.help or "") + (" (default: %(default)s)" if shown else "")


def _closest(word: str, known) -> str:
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
    _saving(text)
    return text


def _saving(text: str) -> dict:
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


def _default(table: dict, task: str):
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
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32",
                        help="of the frozen weights; what trains stays float32")
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


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    if argv and not argv[0].startswith("-") and argv[0] not in MODES:
        parser.error(f"unknown mode {argv[0]}{_closest(argv[0], MODES)}")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        modes = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        known = [option for action in modes.choices[args.mode]._actions for option in action.option_strings]
        parser.error(f"unknown option {unknown[0]}{_closest(unknown[0].split('=')[0], known)}")
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    import signals

    signals.install()
    try:
        return _call(args)
    except KeyboardInterrupt as error:  # before PyTorch is imported, that is; or a mode with nothing to resume
        _note("run.py: stopped")
        return 128 + getattr(error, "signal", signal.SIGINT)


def _call(args) -> int:
    """Runs the chosen mode; what the user can mend is one line and exit status 2."""
    from files import UserError
    from records import ReportError

    try:
        return {"gen": generate, "LoRA": finetune, "distil": distil, "compare": compare, "sweep": sweep,
                "eval": evaluate, "repeat": repeat, "report": report, "submit": submit}[args.mode](args) or 0
    except (UserError, ReportError) as error:
        _complain(error)
    except OSError as error:
        _complain(f"{error.filename or 'a file or connection'}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        import memory

        if not memory.exhausted(error):
            raise
        _complain(f"out of memory{_less_memory(args)}")
    return 2


def _less_memory(args) -> str:
    """What to try where memory ran out."""
    size, tokens = getattr(args, "batch_size", None), getattr(args, "batch_tokens", None)
    if tokens:
        less = f" with --batch-tokens {tokens}; try --batch-tokens {max(1, tokens // 2)}"
    elif size and size > 1:
        less = f" with --batch-size {size}; try --batch-size {size // 2}"
    else:
        return f"{' with --batch-size 1' if size else ''}; try a smaller --max-length, or a smaller model"
    return less + f" --accumulate {2 * args.accumulate}, which is the same step, and --overwrite; checkpoints are kept"


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def generate(args) -> None:
    """`gen`: prints samples; the same SR, the same text."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tqdm import tqdm

    import experiments
    import generation

    model = args.model or (generation.base_model(args.adapter) if args.adapter else None)
    model, _, _ = experiments.choose(model, None, None, _note, need_task=False)
    prompts = list(args.prompt or [])
    if args.prompt_file:
        prompts += generation.read_prompts(args.prompt_file)
    for sample in generation.generate(
            model, prompts or [""], seed=int(args.sr), max_new_tokens=args.max_new_tokens, greedy=args.greedy,
            temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, num_samples=args.num_samples,
            adapter=args.adapter):
        tqdm.write(sample)  # to stdout, with the bar out of the way


def _run_options(args, mode: str, model: str | None, task: str | None, data: str | None, **extra):
    from runs import RunOptions
    from train_utils import TrainOptions

    names = ("epochs", "batch_size", "batch_tokens", "lr", "weight_decay", "warmup", "schedule", "clip", "accumulate",
             "label_smoothing", "patience", "head_lr", "precision", "compile", "anomaly")
    values = {**{name: getattr(args, name) for name in names if hasattr(args, name)}, **_saving(args.save_every)}
    values["epochs"] = args.epochs or _default(EPOCHS[mode], task)
    values["lr"] = args.lr or _default(LEARNING_RATE[getattr(args, "method", mode)], task)
    train = TrainOptions(seed=int(args.sr), **values)
    return RunOptions(mode=mode, sr=args.sr, model=model, task=task, data=data, train=train,
                      out=args.out or Path("runs") / f"{mode}-{args.sr}", max_length=args.max_length, limit=args.limit,
                      resume=args.resume, overwrite=args.overwrite, deterministic=args.deterministic, **extra)


def _train(args, options, start) -> int:
    """Runs a training, plots it and turns its ways of ending into exit statuses."""
    import figures
    import signals
    from files import check_folder, make_folder
    from train_utils import Diverged

    check_folder(args.plots)  # made after the training: bad input leaves nothing behind
    again = "python run.py " + shlex.join(
        [word for word in sys.argv[1:] if word != "--overwrite"] + ([] if args.resume else ["--resume"]))
    try:
        no_plots = getattr(args, "no_plots", False)
        if no_plots or not (args.resume and _only_plots_missing(options, args.plots)):
            start(signals.received)
        plots = [] if no_plots else figures.plot_run(options.out, make_folder(args.plots))
    except Diverged as error:
        _note(f"run.py: {error}")
        return 3
    except signals.Interrupted as error:
        begun = any(options.out.glob("*checkpoint.safetensors")) or (options.out / "summary.json").exists()
        _note(f"run.py: stopped; continue with: {again}" if begun else
              "run.py: stopped before anything was trained; the same command begins again")
        return 128 + error.signal
    print(f"run: {options.out}\nplots: {', '.join(str(path) for path in plots if path.suffix == '.png')}")
    return 0


def _only_plots_missing(options, plots: Path) -> bool:
    """Whether the run is finished and was stopped before its plots were."""
    import figures

    finished = all((options.out / name).exists() for name in ("summary.json", "metrics.jsonl"))
    return finished and not all((plots / f"{options.mode}-{options.sr}_{quantity}.{kind}").exists()
                                for quantity in (*figures.QUANTITIES, "confusion") for kind in ("png", "pdf"))


def _finetune_options(args):
    """A fine-tuning's options, with the model, task and data that are used where none were named."""
    import experiments
    from model import LoRAOptions
    from tables import TableOptions

    model, task, data = experiments.choose(args.model, args.task, args.data, _note)
    targets = tuple(part.strip() for part in args.targets.split(",") if part.strip())
    lora = LoRAOptions(args.rank, args.alpha, args.dropout, args.rslora, targets, args.layers)
    table = TableOptions(args.text_column, args.label_column, args.template, args.eval_split, args.feature_columns,
                         args.truncate)
    return _run_options(args, "LoRA", model, task, data, method=args.method, keep=not args.no_keep,
                        keep_memory=args.keep_memory, lora=lora, table=table)


def finetune(args) -> int:
    """`LoRA`: fine-tunes and prints the result."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import experiments

    options = _finetune_options(args)

    def start(stop):
        summary = experiments.finetune(options, stop=stop)
        for name, epoch in (("best", "best_epoch"), ("last", "last_epoch")):
            values = summary["validation" if name == "best" else "last_validation"]
            print(f"{name} epoch ({summary[epoch]}): " + "; ".join(
                f"{split} accuracy {v['accuracy']:.3f} (majority {v['majority_accuracy']:.3f}), MCC {v['mcc']:.3f}"
                for split, v in values.items()))
        train = summary["train"]
        print(f"{train['tokens_per_second']:.0f} tokens/s, {train['padding_percent']:.1f} % padding, "
              f"{train['peak_memory_bytes'] / 2 ** 20:.0f} MiB peak memory")
        return summary
    return _train(args, options, start)


class Variant(Parser):
    """Parses the options of one entry or trial; errors name the option that they came in."""

    def __init__(self, where: str):
        super().__init__(prog=where, allow_abbrev=False, add_help=False)
        self.where = where
        self.add_argument("sr", type=_sr)
        _lora_options(self)

    def error(self, message: str):
        from files import UserError

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
            self.error(f"unknown option {name}{_closest(name, known)}")
        return known[name]


def _entry(args, name: str, changes: dict[str, str], where: str):
    """An entry of a comparison: the common options with its own changes."""
    from compare import Entry

    parser = Variant(where)
    for option in changes:
        if option in (*COMMON, "lr", "epochs", "batch_size", "batch_tokens", "accumulate", "patience"):
            parser.error(f"{option} is the same for every entry; give it as --{option.replace('_', '-')}")
        parser.option(option)
    words = parser.words(args, changes)
    parsed = parser.parse_args([args.sr, *words])
    parsed.lr = args.lr
    options = _finetune_options(parsed)
    rates = [] if options.method == "none" else args.lr_grid or [options.train.lr]
    return Entry(name, words, options, rates)


def _entries(args) -> list:
    """--methods and --set as entries."""
    from files import UserError

    entries = [_entry(args, method, {"method": method}, f"--methods {method}") for method in args.methods]
    for text in args.set:
        name, colon, rest = text.partition(":")
        # A comma begins an option only where a name and = follow.
        pairs = [pair.partition("=") for pair in re.split(r",(?=[\w-]+=)", rest)]
        if not colon or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,39}", name) or not all(
                option and equals and value for option, equals, value in pairs):
            raise UserError(f"--set {text}: expected NAME:OPTION=VALUE[,OPTION=VALUE...] with a NAME of letters, digits "
                            "and _.+-, such as r2:method=lora,rank=2,targets=q+v")
        changes = {option.replace("-", "_"): value for option, _, value in pairs}
        if len(changes) < len(pairs):
            raise UserError(f"--set {text}: an option is given twice")
        entries.append(_entry(args, name, changes, f"--set {name}"))
    names = [entry.name for entry in entries]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"entry {twice}: --methods and --set name it twice; expected a name for each entry")
    return entries


def _settings(args, *more: str) -> dict:
    """Every option of a comparison or sweep that may change its results."""
    from runs import FREE, as_json

    skipped = ("mode", "out", "plots", "no_plots", "resume", "overwrite", "no_keep", *FREE, *more)
    return as_json({name: value for name, value in vars(args).items() if name not in skipped})


def compare(args) -> int:
    """`compare`: runs what is missing of a comparison, and prints and draws it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import compare as comparison
    import experiments

    args.model, args.task, args.data = experiments.choose(args.model, args.task, args.data, _note)
    args.epochs = args.epochs or _default(EPOCHS["LoRA"], args.task)
    options = comparison.CompareOptions(args.sr, _entries(args), args.seeds, args.out or Path(f"runs/compare-{args.sr}"),
                                        _settings(args), args.overwrite)
    return _study(args, options, lambda: comparison.compare(options))


def _search(args) -> dict:
    """--search as option -> list of choices, or a range."""
    from files import UserError
    from sweep import Range

    search = {}
    for text in args.search:
        name, equals, rest = text.partition("=")
        parser, name = Variant(f"--search {text}"), name.replace("-", "_")
        if not equals or not rest:
            raise UserError(f"--search {text}: expected OPTION=VALUES, such as rank=1,2,4 or lr=1e-4..1e-3")
        if name in (*COMMON, "model", "deterministic"):
            parser.error(f"{name} is the same for every trial")
        if name in search:
            parser.error(f"{name} is searched twice")
        option = parser.option(name)
        if match := re.fullmatch(r"([^,]+?)\.\.([^,]+?)(?::(log|linear))?", rest):
            low, high = (_value(parser, args, name, end) for end in match.groups()[:2])
            log = (match[3] or ("log" if name in ("lr", "head_lr") else "linear")) == "log"
            if option.nargs == 0 or not isinstance(low, (int, float)) or not low < high or (log and low <= 0):
                parser.error("expected a range LOW..HIGH of numbers, LOW below HIGH" + (" and above 0" if log else ""))
            if args.sampler == "grid":
                parser.error("a grid needs choices, such as 1,2,4, not a range")
            search[name] = Range(low, high, log)
        else:
            search[name] = [_value(parser, args, name, part) for part in rest.split(",")]
            if len(set(search[name])) < len(search[name]):
                parser.error("a value is given twice")
    return search


def _value(parser: Variant, args, name: str, text: str):
    """A searched value as a number where the option is one, else as written; refused where the option would refuse it."""
    if not text:
        parser.error("a value is empty")
    parsed = getattr(parser.parse_args([args.sr, *parser.words(args, {name: text})]), name)
    return parsed if isinstance(parsed, (int, float)) and not isinstance(parsed, bool) else text


def sweep(args) -> int:
    """`sweep`: runs the trials that wait, and prints and draws the study."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import dataclasses

    import experiments
    import sweep as search

    args.model, args.task, args.data = experiments.choose(args.model, args.task, args.data, _note)
    args.epochs = args.epochs or _default(EPOCHS["LoRA"], args.task)
    ranges = _search(args)

    def make(values: dict, folder: Path):
        parser = Variant("sweep")
        parsed = parser.parse_args([args.sr, *parser.words(args, {name: str(value) for name, value in values.items()})])
        parsed.lr = values.get("lr") or args.lr
        return dataclasses.replace(_finetune_options(parsed), out=folder, overwrite=True)

    options = search.SweepOptions(args.sr, ranges, make, args.sampler, args.trials, not args.no_prune, args.storage,
                                  args.out or Path(f"runs/sweep-{args.sr}"), _settings(args, "trials", "storage"),
                                  args.overwrite)
    return _study(args, options, lambda: search.sweep(options))


def _study(args, options, start) -> int:
    """Runs a comparison or a sweep, draws it and turns its ways of ending into exit statuses."""
    import figures
    from files import check_folder, make_folder
    from signals import Interrupted

    check_folder(args.plots)
    try:
        start()
        plots = [] if args.no_plots else figures.plot_study(options.out / f"{args.mode}.json", make_folder(args.plots))
    except Interrupted as error:
        _note("run.py: stopped; continue with: python run.py "
              + shlex.join(word for word in sys.argv[1:] if word != "--overwrite"))
        return 128 + error.signal
    print(f"{args.mode}: {options.out}\nplots: {', '.join(str(path) for path in plots if path.suffix == '.png')}")
    return 0


def distil(args) -> int:
    """`distil`: distils and prints teacher, student and control side by side."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import experiments
    from files import UserError

    teacher = args.teacher or Path("runs") / f"LoRA-{args.sr}"
    if not teacher.is_dir():
        raise UserError(f"teacher {teacher}: no such run; python run.py LoRA {args.sr} makes it")
    task = args.task or experiments.read_run(teacher, "LoRA")[0]["options"]["task"]
    options = _run_options(args, "distil", None, task, args.data)
    student = experiments.DistilOptions(teacher, args.temperature, args.kd_alpha, args.embedding_size, args.hidden_size,
                                        args.rnn_layers, args.cell, args.pooling, args.dropout)

    def start(stop):
        summary = experiments.distil(options, student, stop=stop)
        print(experiments.comparison_table(summary))
        return summary
    return _train(args, options, start)


def evaluate(args) -> None:
    """`eval`: scores a saved run on a file."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import experiments

    result = experiments.evaluate_run(args.run, args.data, args.predictions)
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{args.data}: n {result['n']}, loss {result['loss']:.4f}, accuracy {result['accuracy']:.4f} "
              f"(majority {result['majority_accuracy']:.4f}), MCC {result['mcc']:.4f}, macro-F1 {result['macro_f1']:.4f}")


def repeat(args) -> int:
    """`repeat`: runs it again and compares."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import repeat
    import signals
    from train_utils import Diverged

    with tempfile.TemporaryDirectory() as folder:
        try:
            found = repeat.repeat(args.run, args.out or Path(folder) / "run", stop=signals.received)
        except Diverged as error:
            _note(f"run.py: {error}")
            return 3
    print(f"different: {'; '.join(found)}" if found else f"identical: {args.run} and its repetition")
    return 1 if found else 0


def report(args) -> None:
    """`report`: builds the PDF."""
    import report_utils
    from files import check_sums

    for mode in ("LoRA", "distil"):
        check_sums(args.runs / f"{mode}-{args.sr}")
    print(f"report: {report_utils.build_report(args.sr, args.runs, args.plots, Path(__file__).parent / 'report')}")


def submit(args) -> None:
    """`submit`: makes the zip file."""
    import report_utils

    print(report_utils.make_submission(args.sr, args.first_name, args.last_name, Path(__file__).parent))


if __name__ == "__main__":
    sys.exit(main())
