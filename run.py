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

It parses (options.py), calls and prints. PyTorch is imported after parsing, so that --help answers at once.
"""
from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shlex
import signal
import sys
import tempfile
import warnings
from pathlib import Path

from experiments.options import (COMMON, EPOCHS, LEARNING_RATE, MODES, Variant, build_parser, closest, complain, default,
                                 saving)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    if argv and not argv[0].startswith("-") and argv[0] not in MODES:
        parser.error(f"unknown mode {argv[0]}{closest(argv[0], MODES)}")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        modes = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        known = [option for action in modes.choices[args.mode]._actions for option in action.option_strings]
        parser.error(f"unknown option {unknown[0]}{closest(unknown[0].split('=')[0], known)}")
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    from record import signals

    signals.install()
    try:
        return _call(args)
    except KeyboardInterrupt as error:  # before PyTorch is imported, that is; or a mode with nothing to resume
        _note("run.py: stopped")
        return 128 + getattr(error, "signal", signal.SIGINT)


def _call(args) -> int:
    """Runs the chosen mode; what the user can mend is one line and exit status 2."""
    from record.files import UserError
    from report.records import ReportError

    try:
        if args.mode not in ("report", "submit"):  # they read files only
            _import_libraries()
        return {"gen": generate, "LoRA": finetune, "distil": distil, "compare": compare, "sweep": sweep,
                "eval": evaluate, "repeat": repeat, "report": report, "submit": submit}[args.mode](args) or 0
    except (UserError, ReportError) as error:
        complain(error)
    except OSError as error:
        complain(f"{error.filename or 'a file or connection'}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        from record import memory

        if not memory.exhausted(error):
            raise
        complain(f"out of memory{_less_memory(args)}")
    return 2


def _import_libraries() -> None:
    """Imports PyTorch, transformers and what stands on them, with the garbage collector off.

    They make half a million objects, none of them garbage, and the collector would go through them again and
    again: a fifth of the way to the first training step. Frozen, they are not looked at afterwards either.
    """
    if "experiments.finetune" in sys.modules:
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    gc.disable()
    try:
        from experiments import finetune as experiments  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()


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
    from tqdm import tqdm

    from experiments import finetune as experiments
    from experiments import generate as generation

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
    from experiments.runs import RunOptions
    from train_utils import TrainOptions

    names = ("epochs", "batch_size", "batch_tokens", "lr", "weight_decay", "warmup", "schedule", "clip", "accumulate",
             "label_smoothing", "patience", "head_lr", "precision", "compile", "anomaly")
    values = {**{name: getattr(args, name) for name in names if hasattr(args, name)}, **saving(args.save_every)}
    values["epochs"] = args.epochs or default(EPOCHS[mode], task)
    values["lr"] = args.lr or default(LEARNING_RATE[getattr(args, "method", mode)], task)
    train = TrainOptions(seed=int(args.sr), **values)
    return RunOptions(mode=mode, sr=args.sr, model=model, task=task, data=data, train=train,
                      out=args.out or Path("runs") / f"{mode}-{args.sr}", max_length=args.max_length, limit=args.limit,
                      resume=args.resume, overwrite=args.overwrite, deterministic=args.deterministic, **extra)


def _train(args, options, start) -> int:
    """Runs a training, plots it and turns its ways of ending into exit statuses."""
    from record import signals
    from record.files import check_folder, make_folder
    from train_utils import Diverged

    check_folder(args.plots)  # made after the training: bad input leaves nothing behind
    again = "python run.py " + shlex.join(
        [word for word in sys.argv[1:] if word != "--overwrite"] + ([] if args.resume else ["--resume"]))
    try:
        no_plots = getattr(args, "no_plots", False)
        if no_plots or not (args.resume and _only_plots_missing(options, args.plots)):
            start(signals.received)
        plots = []
        if not no_plots:
            from report import figures  # late: the first step does not wait for Matplotlib

            plots = figures.plot_run(options.out, make_folder(args.plots))
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
    from report import figures

    finished = all((options.out / name).exists() for name in ("summary.json", "metrics.jsonl"))
    return finished and not all((plots / f"{options.mode}-{options.sr}_{quantity}.{kind}").exists()
                                for quantity in (*figures.QUANTITIES, "confusion") for kind in ("png", "pdf"))


def _finetune_options(args):
    """A fine-tuning's options, with the model, task and data that are used where none were named."""
    from experiments import finetune as experiments
    from model import LoRAOptions
    from data.tables import TableOptions

    model, task, data = experiments.choose(args.model, args.task, args.data, _note)
    targets = tuple(part.strip() for part in args.targets.split(",") if part.strip())
    lora = LoRAOptions(args.rank, args.alpha, args.dropout, args.rslora, targets, args.layers)
    table = TableOptions(args.text_column, args.label_column, args.template, args.eval_split, args.feature_columns,
                         args.truncate)
    return _run_options(args, "LoRA", model, task, data, method=args.method, keep=not args.no_keep,
                        keep_memory=args.keep_memory, lora=lora, table=table)


def finetune(args) -> int:
    """`LoRA`: fine-tunes and prints the result."""
    from experiments import finetune as experiments

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


def _entry(args, name: str, changes: dict[str, str], where: str):
    """An entry of a comparison: the common options with its own changes."""
    from experiments.compare import Entry

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
    from record.files import UserError

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
    from experiments.runs import FREE, as_json

    skipped = ("mode", "out", "plots", "no_plots", "resume", "overwrite", "no_keep", *FREE, *more)
    return as_json({name: value for name, value in vars(args).items() if name not in skipped})


def compare(args) -> int:
    """`compare`: runs what is missing of a comparison, and prints and draws it."""
    from experiments import compare as comparison
    from experiments import finetune as experiments

    args.model, args.task, args.data = experiments.choose(args.model, args.task, args.data, _note)
    args.epochs = args.epochs or default(EPOCHS["LoRA"], args.task)
    options = comparison.CompareOptions(args.sr, _entries(args), args.seeds, args.out or Path(f"runs/compare-{args.sr}"),
                                        _settings(args), args.overwrite)
    return _study(args, options, lambda: comparison.run_comparison(options))


def _search(args) -> dict:
    """--search as option -> list of choices, or a range."""
    from record.files import UserError
    from experiments.sweep import Range

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
    import dataclasses

    from experiments import finetune as experiments
    from experiments import sweep as search

    args.model, args.task, args.data = experiments.choose(args.model, args.task, args.data, _note)
    args.epochs = args.epochs or default(EPOCHS["LoRA"], args.task)
    ranges = _search(args)

    def make(values: dict, folder: Path):
        parser = Variant("sweep")
        parsed = parser.parse_args([args.sr, *parser.words(args, {name: str(value) for name, value in values.items()})])
        parsed.lr = values.get("lr") or args.lr
        return dataclasses.replace(_finetune_options(parsed), out=folder, overwrite=True)

    options = search.SweepOptions(args.sr, ranges, make, args.sampler, args.trials, not args.no_prune, args.storage,
                                  args.out or Path(f"runs/sweep-{args.sr}"), _settings(args, "trials", "storage"),
                                  args.overwrite)
    return _study(args, options, lambda: search.run_sweep(options))


def _study(args, options, start) -> int:
    """Runs a comparison or a sweep, draws it and turns its ways of ending into exit statuses."""
    from report import figures
    from record.files import check_folder, make_folder
    from record.signals import Interrupted

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
    from experiments import finetune as experiments
    from record.files import UserError

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
    from experiments import finetune as experiments

    result = experiments.evaluate_run(args.run, args.data, args.predictions)
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{args.data}: n {result['n']}, loss {result['loss']:.4f}, accuracy {result['accuracy']:.4f} "
              f"(majority {result['majority_accuracy']:.4f}), MCC {result['mcc']:.4f}, macro-F1 {result['macro_f1']:.4f}")


def repeat(args) -> int:
    """`repeat`: runs it again and compares."""
    from experiments import repeat
    from record import signals
    from train_utils import Diverged

    with tempfile.TemporaryDirectory() as folder:
        try:
            found = repeat.run_again(args.run, args.out or Path(folder) / "run", stop=signals.received)
        except Diverged as error:
            _note(f"run.py: {error}")
            return 3
    print(f"different: {'; '.join(found)}" if found else f"identical: {args.run} and its repetition")
    return 1 if found else 0


def report(args) -> None:
    """`report`: builds the PDF."""
    from report import tables as report_utils
    from record.files import check_sums

    for mode in ("LoRA", "distil"):
        check_sums(args.runs / f"{mode}-{args.sr}")
    print(f"report: {report_utils.build_report(args.sr, args.runs, args.plots, Path(__file__).parent / 'report')}")


def submit(args) -> None:
    """`submit`: makes the zip file."""
    from report import tables as report_utils

    print(report_utils.make_submission(args.sr, args.first_name, args.last_name, Path(__file__).parent))


if __name__ == "__main__":
    sys.exit(main())
