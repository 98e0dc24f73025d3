"""Kills `run.py LoRA` at random moments, resumes it, and compares what it leaves with an uninterrupted run's bytes.

    python benchmarks/kill_test.py --kills 100

A checkpoint is written after every step. A process imports PyTorch once and forks a child for each attempt,
so that a kill costs a fraction of a second. Plots are left out: they are drawn after the run is finished.
Then SIGINT and SIGTERM reach runs that load, cache features, compute the teacher's logits, validate or plot: the run must
stop promptly, and a resume end in the same bytes. Last, a signal reaches a run with `--ema` at single statements of the
training's code: while the averaged weights stand in for the trained ones, a checkpoint would hold a mixture of both.
Prints survived/tried; exit status 0 if all survived.
"""
from __future__ import annotations

import argparse
import collections
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # no thread may run when this process forks
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "tests")]

import toy  # noqa: E402 (needs the path above)

FINAL = ("adapter_model.safetensors", "metrics.jsonl", "summary.json")
EMA = ("--ema", "0.9")
ROOT = Path(__file__).resolve().parents[1]
# The code that changes a training's state: a signal is sent before single lines of these files.
TRAINING = (str(ROOT / "train_utils.py"), str(ROOT / "training"))
# Functions at work while the averaged weights stand in for the trained ones, or are being exchanged for them.
AROUND = re.compile("in_model|restore|validate")
# Phases in which a run takes no steps: module, function, and the options that lead to it.
PHASES = {"loading": ("experiments.finetune", "load_classifier", ()),
          "keeping": ("fast.frozen", "FrozenPrefix", ("--layers", "1")),
          "teacher": ("distillation.sentences", "teacher_logits", ()), "validation": ("train_utils", "validate", ()),
          "plotting": ("report.figures", "plot_run", ())}
SIGNALS = ((signal.SIGTERM, 143), (signal.SIGINT, 130))


def command(work: Path, out: Path) -> list[str]:
    """Returns the arguments of a run of 18 steps; dropout makes it depend on the random state."""
    return ["LoRA", "12345", "--model", str(work / "model"), "--data", str(work / "cola"), "--out", str(out),
            "--no-plots", "--epochs", "3", "--batch-size", "8", "--lr", "0.01", "--dropout", "0.2", "--save-every", "1e-9"]


def fork(work: Path, function: Callable[[], int]) -> int:
    """Starts `function` in a child whose exit status it returns, with stderr in a file; returns the process id."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        with open(work / "stderr", "w") as errors, open(os.devnull, "w") as nothing:
            os.dup2(errors.fileno(), 2)
            os.dup2(nothing.fileno(), 1)
        status = function()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def start(arguments: list[str], work: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Forks `python run.py ARGUMENTS`, after `prepare()`; returns its process id."""
    def call() -> int:
        import run
        from report import figures

        figures.plot_run = lambda *_: []
        prepare()
        sys.argv = ["run.py", *arguments]
        return run.main()
    return fork(work, call)


def wait(child: int, limit: float = 60) -> int:
    """Returns the child's exit status, or minus the signal that ended it; kills a child that hangs with SIGABRT."""
    end = time.monotonic() + limit
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, signal.SIGABRT)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(ended[1])


def inputs(work: Path) -> int:
    """Writes a toy model and toy data."""
    toy.write_model(work / "model")
    toy.write_cola(work / "cola", train=48)
    return 0


def outcome(folder: Path) -> dict:
    """Returns the bytes of the weights, results without times, and the names of all files but TensorBoard's events."""
    from record.folder import without_times

    texts = {name: (folder / name).read_text() for name in FINAL[1:]}
    return {FINAL[0]: (folder / FINAL[0]).read_bytes(),
            FINAL[1]: [without_times(json.loads(line)) for line in texts[FINAL[1]].splitlines()],
            FINAL[2]: without_times(json.loads(texts[FINAL[2]])),
            # A kill between summary.json and the removal of the checkpoint leaves the latter; no harm.
            "files": sorted(path.name for path in folder.iterdir() if path.name != "checkpoint.safetensors")}


def difference(folder: Path, expected: dict) -> list[str]:
    """Returns the differences of a finished run from the expected outcome, a line each."""
    got = outcome(folder)
    return [f"{key} differs" + (f": {got[key]} for {expected[key]}" if key == "files" else "")
            for key in expected if got[key] != expected[key]]


def uninterrupted(work: Path, name: str = "whole", more: tuple[str, ...] = (), prepare: Callable[[], None] = lambda: None
                  ) -> tuple[dict, float]:
    """Returns the outcome of an undisturbed run with some more options, and its seconds."""
    begin = time.perf_counter()
    status = wait(start([*command(work, work / name), *more], work, prepare))
    if status:
        raise RuntimeError(f"the uninterrupted run ended with {status}: {(work / 'stderr').read_text()[-2000:]}")
    return outcome(work / name), time.perf_counter() - begin


def kill_and_resume(work: Path, kills: int, seed: int, expected: dict, seconds: float) -> dict:
    """Kills runs `kills` times in all; a run that finishes is compared, and the next one begins.

    Returns:
        survived: kills of runs that ended as expected; tried: all kills; runs: finished ones; within_training:
        kills that left a checkpoint to resume from; failures: a line for each difference.
    """
    draw = random.Random(seed)
    result = {"survived": 0, "tried": 0, "runs": 0, "within_training": 0, "failures": []}
    while result["tried"] < kills:
        out, killed = work / f"killed-{result['runs']}", 0
        while True:
            child = start(command(work, out) + ["--resume"], work)
            if result["tried"] < kills:
                time.sleep(draw.uniform(0, seconds))
                os.kill(child, signal.SIGKILL)
            status = wait(child)
            if status == -signal.SIGKILL:
                killed += 1
                result["tried"] += 1
                result["within_training"] += any(out.glob("*checkpoint.safetensors"))
            if status != -signal.SIGKILL or (out / "summary.json").exists():
                break
        result["runs"] += 1
        wrong = difference(out, expected) if (out / "summary.json").exists() else [
            f"exit status {status}: {(work / 'stderr').read_text()[-500:]}"]
        result["survived"] += 0 if wrong else killed
        result["failures"] += wrong
    return result


def signal_and_resume(work: Path, number: signal.Signals, expected: dict) -> dict:
    """Asks one run to stop once it has a checkpoint, and resumes it.

    Returns:
        status: exit status of the stopped run; stderr: its last line; failures: differences after the resume.
    """
    out = work / f"stopped-{number}"
    child = start(command(work, out), work)
    limit = time.monotonic() + 60
    while not any(out.glob("checkpoint*")) and time.monotonic() < limit:
        time.sleep(0.001)
    os.kill(child, number)
    status = wait(child)
    line = (work / "stderr").read_text().strip().splitlines()[-1]
    again = wait(start(command(work, out) + ["--resume"], work))
    return {"status": status, "stderr": line,
            "failures": difference(out, expected) if again == 0 else [f"the resumed run ended with {again}"]}


# ---------------------------------------------------------------- a signal at one statement

def before_each_line(action: Callable[[str, int], None]) -> Callable[[], None]:
    """Returns a preparation that calls `action` with the function's name and the line before each line of TRAINING."""
    def within(frame, event, _):
        if event == "line":
            action(frame.f_code.co_qualname, frame.f_lineno)
        return within

    def trace(frame, event, _):
        return within if frame.f_code.co_filename.startswith(TRAINING) else None
    return lambda: sys.settrace(trace)


def lines_of(work: Path) -> tuple[dict, list[list]]:
    """Returns the outcome of an undisturbed run with `--ema`, and the functions and lines of TRAINING in order."""
    # Buffered by lines, because a child ends without closing its files.
    with open(work / "lines", "w", buffering=1) as file:
        expected, _ = uninterrupted(work, "ema", EMA, before_each_line(
            lambda function, line: file.write(json.dumps([function, line]) + "\n")))
    return expected, [json.loads(text) for text in (work / "lines").read_text().splitlines()]


def moments(lines: list[list], count: int, seed: int) -> list[int]:
    """Draws positions in a run's statements, every second one around a validation.

    Each function is as likely as any other, or almost all signals would fall into steps and checkpoints.
    """
    draw = random.Random(seed)
    places = collections.defaultdict(list)
    for number, (function, _) in enumerate(lines):
        places[function].append(number)
    around = [name for name in places if AROUND.search(name)]
    return [draw.choice(places[draw.choice(list(places) if number % 2 else around)]) for number in range(count)]


def signal_at_statements(work: Path, count: int, seed: int) -> dict:
    """Sends a run with `--ema` a signal at one statement, `count` times, and resumes it.

    Returns:
        survived: runs that ended in the expected bytes; tried: all; in_validation: signals at statements around a
        validation; failures: the statement and the difference.
    """
    expected, lines = lines_of(work)
    result = {"survived": 0, "tried": count, "in_validation": 0, "failures": []}
    for attempt, at in enumerate(moments(lines, count, seed)):
        out, number, passed = work / f"statement-{attempt}", SIGNALS[attempt // 2 % 2][0], []

        def send(function: str, line: int, at=at, number=number, passed=passed) -> None:
            passed.append(line)
            if len(passed) == at + 1:
                os.kill(os.getpid(), number)

        begun = [*command(work, out), *EMA]
        status = wait(start(begun, work, before_each_line(send)))
        function, line = lines[at]
        result["in_validation"] += bool(AROUND.search(function))
        # A signal in the last statements may find the run finished.
        again = 0 if status == 0 else wait(start([*begun, "--resume"], work))
        wrong = [f"exit status {status}"] if status not in (0, *(code for _, code in SIGNALS)) else []
        wrong += [f"the resumed run ended with {again}"] if again else difference(out, expected)
        result["survived"] += not wrong
        result["failures"] += [f"{number.name} at {function}, line {line}: {text}" for text in wrong]
    return result


# ---------------------------------------------------------------- a signal in a long phase

def busy(work: Path, module: str, function: str) -> Callable[[], None]:
    """Returns a preparation after which a function makes the file `busy` and then takes a minute."""
    def slow(*_, **__):
        (work / "busy").touch()
        # In short pieces: a signal that arrives just before a sleep begins does not end that sleep.
        for _ in range(6000):
            time.sleep(0.01)
    return lambda: setattr(sys.modules[module], function, slow)


def stop_while_busy(work: Path, phase: str, number: signal.Signals, expected: dict) -> dict:
    """Asks a run to stop in a phase without steps, and resumes it.

    Returns:
        status, stderr (its last line), seconds until it ended; failures: differences after the resume.
    """
    module, function, more = PHASES[phase]
    out = work / f"busy-{phase}"
    if phase == "teacher":
        line = ["distil", "12345", "--plain", "--teacher", str(work / "whole"), "--out", str(out), "--no-plots",
                "--epochs", "1", "--embedding-size", "4", "--hidden-size", "4"]
    else:
        line = [*command(work, out), *more]
    if phase == "plotting":
        line[line.index("--no-plots")] = f"--plots={work / 'plots'}"
    child = start(line, work, busy(work, module, function))
    limit = time.monotonic() + 60
    while not (work / "busy").exists() and time.monotonic() < limit:
        time.sleep(0.005)
    (work / "busy").unlink()
    begin = time.perf_counter()
    os.kill(child, number)
    status = wait(child)
    seconds = time.perf_counter() - begin
    said = (work / "stderr").read_text().strip().splitlines()[-1]
    again = wait(start([*line, "--resume"], work))
    failures = [f"the resumed run ended with {again}: {(work / 'stderr').read_text()[-300:]}"] if again else []
    if not (failures or more or phase == "teacher"):
        failures = difference(out, expected)
    return {"status": status, "stderr": said, "seconds": seconds, "failures": failures}


def signal_twice(work: Path) -> dict:
    """Sends SIGINT twice to a run whose step takes long: the second one must end it at once."""
    child = start(command(work, work / "twice"), work, busy(work, "torch.nn.utils", "clip_grad_norm_"))
    limit = time.monotonic() + 60
    while not (work / "busy").exists() and time.monotonic() < limit:
        time.sleep(0.005)
    (work / "busy").unlink()
    os.kill(child, signal.SIGINT)
    time.sleep(0.3)
    # The first signal lets the step finish.
    waits = os.waitpid(child, os.WNOHANG)[0] == 0
    begin = time.perf_counter()
    os.kill(child, signal.SIGINT)
    return {"waits": waits, "status": wait(child), "seconds": time.perf_counter() - begin}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--statements", type=int, help="signals at single statements of a run with --ema; as many as kills "
                        "if not given")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    from benchmarks import common

    toy.import_for_children()

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if wait(fork(work, lambda: inputs(work))):  # in a child: the libraries start threads for it
            raise RuntimeError((work / "stderr").read_text()[-2000:])
        expected, seconds = uninterrupted(work)
        result = kill_and_resume(work, args.kills, args.seed, expected, seconds)
        result["signals"] = {number.name: signal_and_resume(work, number, expected) for number, _ in SIGNALS}
        result["busy"] = {phase: stop_while_busy(work, phase, SIGNALS[i % 2][0], expected) for i, phase in enumerate(PHASES)}
        result["twice"] = signal_twice(work)
        statements = args.kills if args.statements is None else args.statements
        result["statements"] = signal_at_statements(work, statements, args.seed)
    parts = [result, *result["signals"].values(), *result["busy"].values(), result["statements"]]
    wrong = [text for part in parts for text in part["failures"]]
    if args.json:
        print(common.result(result).replace(str(work), "WORK"))
    else:
        print(f"{result['survived']}/{result['tried']} kills survived, {result['within_training']} of them within training, "
              f"in {result['runs']} runs; {result['statements']['survived']}/{result['statements']['tried']} signals at "
              f"statements of a run with --ema, {result['statements']['in_validation']} of them around a validation"
              + "".join(f"\n  {text}" for text in wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
