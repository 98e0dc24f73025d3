"""The command line: parses, calls and prints.

    python run.py                  one line about each mode
    python run.py LoRA --help      its options, and an example
    python run.py LoRA 12345       fine-tune with LoRA

PyTorch is imported after parsing, so that --help answers at once. A new mode is a dataclass of options and an entry in
options/modes.py, which names its function; a new option is a field, in options/schema.py if a run records it.
"""
from __future__ import annotations

import importlib
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable

from experiments.parser import MODES, Parser, closest, overview
from machine import processes, signals, threads
from machine.errors import UserError
from machine.imports import quick_imports
from machine.streams import complain, note, open_streams
from report.records import ReportError
from serving.packages import require

NEEDS = {"serve": ("fastapi", "uvicorn", "prometheus_client")}  # packages that requirements.txt does not have
SEVERAL_PROCESSES = ("LoRA", "distil")  # modes that torchrun may start several times for one run


def main(argv: list[str] | None = None) -> int:
    """Runs a command line, that of the process if none is given; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    open_streams()
    # Before any output: of several processes one prints.
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
            Parser(name, everything=True).print_help()
        return 0
    if mode not in MODES:
        complain(f"unknown {'option' if mode.startswith('-') else 'mode'} {mode}{closest(mode, MODES)}")
        return 2
    args = Parser(mode, everything=argv[-1] == "all").parse(argv[1:])
    warnings.showwarning = lambda message, *_, **__: note(f"warning: {message}")
    signals.install()
    try:
        return _call(args)
    # Before PyTorch is imported, or in a mode with nothing to resume.
    except KeyboardInterrupt as error:
        complain("stopped")
        return 128 + getattr(error, "signal", signal.SIGINT)


def _call(args) -> int:
    """Runs the chosen mode; an error that the user can mend is one line and exit status 2."""
    try:
        _prepare(args)
        # Late: each mode imports its own libraries.
        from machine.progress import logs_above_bars

        with logs_above_bars():
            status = function_of(args)(args) or 0
        processes.stop()
        return status
    except processes.Lost as error:
        complain(error)
        return 1
    except (UserError, ReportError) as error:
        complain(error)
    # The reader of the results (head, less) has read enough.
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        complain(f"{error.filename or 'a file or connection'}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        from experiments.endings import less_memory
        from machine import hardware

        if not hardware.exhausted(error):
            raise
        complain(f"out of memory{less_memory(args)}")
    return 2


def function_of(args) -> Callable:
    """Imports and returns the function of the chosen mode, or that of --seeds or --folds."""
    several = "folds" if getattr(args, "folds", None) else "seeds" if args.mode in SEVERAL_PROCESSES and args.seeds else ""
    module, name = f"{several}:main".split(":") if several else MODES[args.mode].main.split(":")
    return getattr(importlib.import_module(f"experiments.{module}"), name)


def _prepare(args) -> None:
    """Imports the libraries, and sets up device, kernels and processes.

    Raises:
        UserError: a device, package or number of processes that the mode cannot use.
    """
    # report and submit, which read files alone, have no device.
    if hasattr(args, "device"):
        threads.prepare()
        with quick_imports():
            import experiments.finetune  # noqa: F401
            from machine import hardware

        hardware.use_device(args.device)
    if hasattr(args, "fast"):
        import speed

        speed.choose(args.fast)
    for package in NEEDS.get(args.mode, ()):
        require(package, args.mode)
    if processes.count() > 1:
        if args.mode not in SEVERAL_PROCESSES:
            raise UserError(f"{args.mode} is for one process, and here are {processes.count()}; "
                            f"{' and '.join(SEVERAL_PROCESSES)} take several (docs/scaling.md)")
        if args.seeds or getattr(args, "folds", None):
            raise UserError(f"--seeds and --folds are for one process, not {processes.count()}; start the runs one by one")
        processes.start(hardware.device().type)


if __name__ == "__main__":
    sys.exit(main())
