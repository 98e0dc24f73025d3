"""The command line: parses, calls and prints.

    python run.py                  one line about each mode
    python run.py LoRA --help      its options, and an example
    python run.py LoRA 12345       fine-tune with LoRA
    python run.py distil 12345     distil that run into a small RNN

PyTorch is imported after parsing, so that --help answers at once. A new mode is a dataclass of options in options/modes.py
and a function here, in CALLS; a new option is a field, in options/schema.py if a run records it.
"""
from __future__ import annotations

import gc
import json
import os
import re
import shlex
import signal
import sys
import warnings
from pathlib import Path

from experiments.parser import MODES, Parser, closest, complain, note, overview
from machine import processes

SEVERAL_PROCESSES = ("LoRA", "distil")  # modes that torchrun may start several times for one run


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    _open_streams()
    try:
        processes.connect()
    except processes.Lost as error:
        complain(error)
        return 1
    # Python hides bytes that are not UTF-8 in surrogates, which no tokenizer, JSON file or terminal takes.
    if stray := next((word for word in argv if re.search("[\ud800-\udfff]", word)), None):
        complain(f"{stray!r}: not UTF-8")
        return 2
    mode = argv[0] if argv else "--help"
    if mode in ("-h", "--help"):
        print(overview())
        for name in MODES if argv[1:] == ["all"] else ():
            Parser(name).print_help()
        return 0
    if mode not in MODES:
        complain(f"unknown {'option' if mode.startswith('-') else 'mode'} {mode}{closest(mode, MODES)}")
        return 2
    args = Parser(mode).parse(argv[1:])
    warnings.showwarning = lambda message, *_, **__: note(f"warning: {message}")
    from machine import signals

    signals.install()
    try:
        return _call(args)
    except KeyboardInterrupt as error:  # before PyTorch is imported, that is; or a mode with nothing to resume
        complain("stopped")
        return 128 + getattr(error, "signal", signal.SIGINT)


def _open_streams() -> None:
    """Makes output possible where a stream is closed, or cannot write every character."""
    # In this order: the lowest free file descriptor is taken, and no file of a run must become standard output.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _call(args) -> int:
    """Runs the chosen mode; what the user can mend is one line and exit status 2."""
    from machine.errors import UserError
    from report.records import ReportError

    try:
        if hasattr(args, "device"):  # report and submit read files alone
            _import_libraries()
            from machine import hardware

            hardware.use_device(args.device)
        if hasattr(args, "fast"):
            import speed

            speed.choose(args.fast)
        if processes.count() > 1:
            if args.mode not in SEVERAL_PROCESSES:
                raise UserError(f"{args.mode} is for one process, and here are {processes.count()}; "
                                f"{' and '.join(SEVERAL_PROCESSES)} take several (docs/scaling.md)")
            processes.start(hardware.device().type)
        status = CALLS[args.mode](args) or 0
        processes.stop()
        return status
    except processes.Lost as error:
        complain(error)
        return 1
    except (UserError, ReportError) as error:
        complain(error)
    except BrokenPipeError:  # whoever read the results has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        complain(f"{error.filename or 'a file or connection'}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        from machine import hardware

        if not hardware.exhausted(error):
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
        import experiments.finetune  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()


def _less_memory(args) -> str:
    """Returns advice on what to try where memory ran out."""
    size, tokens = getattr(args, "batch_size", None), getattr(args, "batch_tokens", None)
    if tokens:
        less = f" with --batch-tokens {tokens}; try --batch-tokens {max(1, tokens // 2)}"
    elif size and size > 1:
        less = f" with --batch-size {size}; try --batch-size {size // 2}"
    else:
        return f"{' with --batch-size 1' if size else ''}; try a smaller --max-length, or a smaller model"
    return less + f" --accumulate {2 * args.accumulate}, which is the same step, and --overwrite; checkpoints are kept"


# ---------------------------------------------------------------- ways of ending

def _again(*more: str) -> str:
    """Returns the command that goes on with what this one began."""
    return f"{processes.launcher()} run.py " + shlex.join([*(word for word in sys.argv[1:] if word != "--overwrite"), *more])


def _train(args, options, start) -> int:
    """Runs a training, plots it and turns its ways of ending into exit statuses."""
    from machine import signals
    from record.files import check_folder, make_folder
    from train_utils import Diverged

    check_folder(args.plots)  # made after the training: bad input leaves nothing behind
    again = _again(*([] if args.resume else ["--resume"]))
    try:
        if args.no_plots or not processes.broadcast(args.resume and _only_plots_missing(options, args.plots)):
            start(signals.received)
        plots = []
        if not args.no_plots and processes.is_main():
            from report import figures  # late: the first step does not wait for Matplotlib

            plots = figures.draw_finished(lambda: figures.plot_run(options.out, make_folder(args.plots)))
    except Diverged as error:
        complain(error)
        return 3
    except processes.Lost as error:
        complain(f"{error}; continue with: {again}")
        return 1
    except signals.Interrupted as error:
        begun = any(options.out.glob("*checkpoint.safetensors")) or (options.out / "summary.json").exists()
        complain(f"stopped; continue with: {again}" if begun else
                 "stopped before anything was trained; the same command begins again")
        return 128 + error.signal
    _say_where("run", options.out, plots)
    return 0


def _study(args, out: Path, start, name: str) -> int:
    """Runs a comparison, a sweep or seeds, draws it and turns its ways of ending into exit statuses."""
    from machine.signals import Interrupted
    from record.files import check_folder, make_folder
    from report import figures

    check_folder(args.plots)
    try:
        start()
        plots = [] if args.no_plots else figures.draw_finished(
            lambda: figures.plot_study(out / f"{name}.json", make_folder(args.plots)))
    except Interrupted as error:
        complain(f"stopped; continue with: {_again()}")
        return 128 + error.signal
    _say_where(name, out, plots)
    return 0


def _say_where(name: str, out: Path, plots: list[Path]) -> None:
    """Prints the folder of the results, and the plots."""
    print(f"{name}: {out}")
    if plots:
        print(f"plots: {', '.join(str(path) for path in plots if path.suffix == '.png')}")


def _only_plots_missing(options, plots: Path) -> bool:
    """Returns whether the run is finished but was stopped before its plots were drawn."""
    from report import figures

    finished = all((options.out / name).exists() for name in ("summary.json", "metrics.jsonl"))
    return finished and not all((plots / f"{options.mode}-{options.sr}_{quantity}.{kind}").exists()
                                for quantity in (*figures.QUANTITIES, "confusion") for kind in ("png", "pdf"))


# ---------------------------------------------------------------- the modes, one function each

def generate(args) -> None:
    """`gen`: prints samples; the same SR, the same text."""
    from tqdm import tqdm

    from experiments import generate, inputs
    from sampling import Sampling

    model = args.model or (generate.base_model(args.adapter) if args.adapter else None)
    model, _, _ = inputs.choose(model, None, None, note, need_task=False)
    prompts = [*args.prompt, *(generate.read_prompts(args.prompt_file) if args.prompt_file else ())]
    sampling = Sampling(args.greedy, args.temperature, args.top_k, args.top_p, int(args.sr))
    options = generate.GenerateOptions(model, args.adapter, args.max_new_tokens, args.num_samples, sampling, args.batch_size,
                                       args.precision)
    for sample in generate.generate(prompts or [""], options):
        tqdm.write(sample)  # to stdout, with the bar out of the way


def finetune(args) -> int:
    """`LoRA`: fine-tunes and prints the result."""
    from experiments import arguments, finetune

    if args.seeds:
        return _seeds(args)
    _check_jobs(args)
    options = arguments.finetune_options(args)

    def start(stop):
        summary = finetune.run_finetune(options, stop=stop)
        for name, epoch in (("best", "best_epoch"), ("last", "last_epoch")):
            values = summary["validation" if name == "best" else "last_validation"]
            print(f"{name} epoch ({summary[epoch]}): " + "; ".join(
                f"{split} accuracy {v['accuracy']:.3f} (majority {v['majority_accuracy']:.3f}), MCC {v['mcc']:.3f}"
                for split, v in values.items()))
        train = summary["train"]
        print(f"{train['tokens_per_second']:.0f} tokens/s, {train['padding_percent']:.1f} % padding, "
              f"{train['peak_memory_bytes'] / 2 ** 20:.0f} MiB peak memory")
    return _train(args, options, start)


def distil(args) -> int:
    """`distil`: distils and prints teacher, student and baseline side by side."""
    from experiments import arguments, distil

    if args.seeds:
        return _seeds(args)
    _check_jobs(args)
    options, student = arguments.distil_options(args)
    return _train(args, options, lambda stop: print(distil.comparison_table(distil.run_distil(options, student, stop=stop))))


def _check_jobs(args) -> None:
    """Refuses --jobs where there is one run."""
    from machine.errors import UserError

    if args.jobs > 1:
        raise UserError(f"--jobs {args.jobs}: only with --seeds, whose runs it counts")


def _seeds(args) -> int:
    """`LoRA` and `distil` with `--seeds`: runs the seeds that are missing, prints and draws their means."""
    from experiments import seeds, variants
    from machine.errors import UserError
    from report import figures

    if processes.count() > 1:
        raise UserError(f"--seeds is for one process, and here are {processes.count()}; start the seeds one by one")
    options = seeds.SeedsOptions(args.mode, args.sr, variants.seed_runs(args),
                                 (args.out or Path("runs")) / f"{args.mode}-{args.sr}-seeds", variants.settings(args),
                                 args.overwrite, args.jobs)

    def start():
        for run in seeds.run_seeds(options)["runs"]:
            if run["status"] == "finished" and not args.no_plots:
                figures.draw_finished(lambda folder=Path(run["folder"]): figures.plot_run(folder, args.plots))
    return _study(args, options.out, start, "seeds")


def compare(args) -> int:
    """`compare`: runs the missing runs of a comparison, prints and draws it."""
    from experiments import arguments, compare, variants

    arguments.choose(args)
    options = compare.CompareOptions(args.sr, variants.entries(args), args.seeds,
                                     args.out or Path(f"runs/compare-{args.sr}"), variants.settings(args, "against"),
                                     args.overwrite, args.jobs, args.against)
    return _study(args, options.out, lambda: compare.run_comparison(options), "compare")


def sweep(args) -> int:
    """`sweep`: runs the trials that are left, prints and draws the study."""
    from experiments import arguments, sweep, variants

    arguments.choose(args)
    options = sweep.SweepOptions(
        args.sr, variants.search(args), lambda values, folder: variants.trial_options(args, values, folder), args.sampler,
        args.trials, not args.no_prune, args.storage, args.out or Path(f"runs/sweep-{args.sr}"),
        variants.settings(args, "trials", "storage"), args.overwrite)
    return _study(args, options.out, lambda: sweep.run_sweep(options), "sweep")


def evaluate(args) -> None:
    """`eval`: scores a saved run on a file."""
    from experiments import evaluate

    result = evaluate.evaluate_run(args.run, args.data, args.predictions, args.allow_training_data)
    print(json.dumps(result) if args.json else
          f"{result['data']}: n {result['n']}, loss {result['loss']:.4f}, accuracy {result['accuracy']:.4f} "
          f"(majority {result['majority_accuracy']:.4f}), MCC {result['mcc']:.4f}, macro-F1 {result['macro_f1']:.4f}")


def predict(args) -> None:
    """`predict`: prints class and probability of sentences."""
    from tqdm import tqdm

    from experiments import predict
    from experiments.arguments import named
    from machine.errors import UserError

    if bool(args.run) == bool(args.adapter) or args.adapter and (args.control or args.texts or not args.file):
        raise UserError("predict: expected RUN_DIR, or --adapter NAME=DIR (several times) with --file")
    if args.base and not args.adapter:
        raise UserError("predict: --base is for --adapter")
    if bool(args.texts) == bool(args.file):
        raise UserError("predict: expected sentences, or --file FILE" + (", not both" if args.file else ""))
    predictor = predict.BankPredictor(named(args.adapter, "--adapter"), args.base) if args.adapter else \
        predict.RunPredictor(args.run, args.control)
    if args.texts:
        print("\n".join(predict.line_of(result, args.json) for result in predict.predict_texts(predictor, args.texts)))
        return
    with tqdm(unit="rows", delay=2) as bar:
        def progress(rows: int, file) -> None:
            if file.size:
                bar.unit, bar.unit_scale, bar.total = "B", True, file.size
            bar.update(file.file.tell() - bar.n if file.size else rows)
            sys.stdout.flush()

        for result in predict.predict_file(predictor, args.file, args.format, progress):
            tqdm.write(predict.line_of(result, args.json))  # to stdout, with the bar out of the way


def serve(args) -> int:
    """`serve`: answers requests until it is told to stop."""
    from serving.packages import require

    for package in ("fastapi", "uvicorn", "prometheus_client"):
        require(package, "serve")
    from experiments import serve

    return serve.run_service(args)


def test(args) -> None:
    """`test`: tests the difference of two runs on a file."""
    from experiments import significance

    result = significance.paired_test(args.run, args.other, args.data, args.resamples, args.seed, args.allow_training_data)
    print(json.dumps(result) if args.json else significance.paired_test_text(result))


def diagnose(args) -> None:
    """`diagnose`: says where a run is right and wrong."""
    from experiments import diagnose
    from report import diagnosis, records

    result = diagnose.diagnose_run(args.run, args.data, args.pairs, args.limit, args.out, args.allow_training_data)
    out = args.out or args.run.parent / f"diagnose-{args.run.name}"
    print(json.dumps(result) if args.json else
          f"{diagnosis.diagnosis_text(records.read_json(out / 'diagnose.json'))}\ndiagnosis: {out}")


def export(args) -> None:
    """`export`: writes the student as an ONNX model."""
    from experiments import ship

    ship.export_run(args.run, args.out, args.int8, args.control)
    print(f"export: {args.out}")


def merge(args) -> None:
    """`merge`: writes the classifier as a plain checkpoint."""
    from experiments import ship

    ship.merge_run(args.run, args.out)
    print(f"merge: {args.out}")


def repeat(args) -> int:
    """`repeat`: runs it again and compares."""
    import tempfile

    from experiments import repeat
    from machine import signals
    from train_utils import Diverged

    with tempfile.TemporaryDirectory() as folder:
        try:
            found = repeat.run_again(args.run, args.out or Path(folder) / "run", stop=signals.received)
        except Diverged as error:
            complain(error)
            return 3
    print(f"different: {'; '.join(found)}" if found else f"identical: {args.run} and its repetition")
    return 1 if found else 0


def paper(args) -> int:
    """`paper`: runs the steps that are missing and builds the paper; exit status 1 where a step failed."""
    from experiments import paper
    from machine.signals import Interrupted

    quick = args.profile == "quick"
    options = paper.PaperOptions(args.sr, args.profile, args.seeds, None if quick else args.data_root,
                                 args.out or Path(f"runs/paper-{'quick-' if quick else ''}{args.sr}"), tuple(args.only),
                                 args.overwrite, args.jobs, args.records, args.no_run)
    if args.dry_run:
        print(paper.plan(options))
        return 0
    try:
        pdf, failures = paper.make_paper(options)
    except Interrupted as error:
        complain(f"stopped; continue with: {_again()}")
        return 128 + error.signal
    for failure in failures:
        complain(failure)
    print(f"paper: {pdf}")
    return 1 if failures else 0


def report(args) -> None:
    """`report`: builds the PDF."""
    from record.files import check_sums
    from report import build

    for mode in ("LoRA", "distil"):
        check_sums(args.runs / f"{mode}-{args.sr}")
    print(f"report: {build.build_report(args.sr, args.runs, args.plots, Path(__file__).parent / 'report')}")


def submit(args) -> None:
    """`submit`: makes the zip file."""
    from report import build

    print(build.make_submission(args.sr, args.first_name, args.last_name, Path(__file__).parent))


# --help lists the modes in the order of options/modes.py.
CALLS = {"gen": generate, "LoRA": finetune, "distil": distil, "compare": compare, "sweep": sweep, "eval": evaluate,
         "test": test, "diagnose": diagnose, "predict": predict, "serve": serve, "export": export, "merge": merge,
         "repeat": repeat, "paper": paper, "report": report, "submit": submit}


if __name__ == "__main__":
    sys.exit(main())
