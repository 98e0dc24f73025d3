"""Runs of two processes for test_processes.py, numbered as torchrun numbers them, and what they left, as one JSON object.

    python tests/two_processes.py FOLDER

The processes are forked from this one, which has imported everything: a run takes a second, not ten.
"""
from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")  # no thread may run when this process forks
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "tests")]

import toy  # noqa: E402 (needs the path above)

hosts: list[int] = []  # the processes that hold the store of the run at hand


def fork(call: Callable[[], int | None], texts: Path) -> int:
    """Starts `call` in a child whose stdout and stderr go into files; returns its process id."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{texts}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        status = call() or 0
        sys.stdout.flush()
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def start(call: Callable[[], int | None], texts: Path, count: int = 2) -> list[int]:
    """Forks `count` processes of one run; returns their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def hold_store() -> None:  # as torchrun does, so that it outlives every one of them
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # noqa: F841
        time.sleep(600)

    hosts.append(fork(hold_store, Path(f"{texts}-store")))

    def numbered(rank: int) -> int | None:
        os.environ.update({
            "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
            "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)})
        return call()
    return [fork(lambda rank=rank: numbered(rank), Path(f"{texts}-{rank}")) for rank in range(count)]


def finish(children: list[int], texts: Path, limit: float = 120) -> dict:
    """Waits for the processes of a run.

    Returns:
        statuses: exit statuses, or minus the signal that ended one; stdout: of each; said: the lines of run.py on stderr,
        and all of stderr where it holds a traceback.
    """
    begin, ended = time.monotonic(), {}
    while len(ended) < len(children):
        for child in set(children) - set(ended):
            if (done := os.waitpid(child, os.WNOHANG))[0]:
                ended[child] = os.waitstatus_to_exitcode(done[1])
        if time.monotonic() > begin + limit:
            for child in set(children) - set(ended):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    while hosts:
        os.kill(hosts[-1], signal.SIGKILL)
        os.waitpid(hosts.pop(), 0)
    said, out = [], [Path(f"{texts}-{rank}.stdout").read_text() for rank in range(len(children))]
    for rank in range(len(children)):
        text = Path(f"{texts}-{rank}.stderr").read_text().replace("\r", "\n")
        said += [text] if "Traceback" in text else [line for line in text.splitlines() if line.startswith("run.py")]
    return {"statuses": [ended[child] for child in children], "stdout": out, "said": said}


def command(work: Path, name: str, *more: str) -> Callable[[], int]:
    """A call of `run.py LoRA` in this process."""
    line = ["LoRA", "12345", "--model", str(work / "model"), "--data", str(work / "cola"), "--plots", str(work / "plots"),
            "--out", str(work / name), "--epochs", "2", "--batch-size", "7", "--lr", "0.01", "--save-every", "2steps",
            "--no-plots", *more]

    def call() -> int:
        import run

        sys.argv = ["run.py", *line]
        return run.main()
    return call


def train(result: Path) -> None:
    """Trains the toy model; each process writes what it saw."""
    import torch
    import toy_training as toys
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    import train_utils
    from data_utils import split_large
    from machine import processes

    processes.connect()
    processes.start("cpu")
    model, seen, rows = toys.ToyModel(), [], []
    register_optimizer_step_pre_hook(lambda *_: seen.append(
        {name: p.grad.tolist() for name, p in train_utils.trainable(model).items()}))

    def objective(logits, batch):
        rows.extend(batch.rows.tolist())
        return train_utils.label_loss()(logits, batch)

    batches = split_large(toys.toy_batches(21, 4), processes.rank(), processes.count())  # the last one has one row
    progress = train_utils.fit(model, train_utils.Data(batches, toys.toy_dev()), objective, toys.OPTIONS)
    found = {"gradients": seen, "rows": rows, "history": progress.history, "draw": torch.rand(3).tolist(),
             "weights": {name: p.tolist() for name, p in train_utils.trainable(model).items()},
             "says": processes.claim_once("this")}
    Path(f"{result}-{processes.rank()}.json").write_text(json.dumps(found))
    processes.stop()


def interrupted(work: Path, name: str, number: signal.Signals) -> dict:
    """A run with dropout of which one process gets a signal in its training, and the run resumed."""
    children = start(command(work, name, "--dropout", "0.3", "--epochs", "6"), work / name)
    toy.until(lambda: (work / name / "checkpoint.safetensors").exists(), 60)
    os.kill(children[1], number)
    ended = finish(children, work / name)
    again = command(work, name, "--dropout", "0.3", "--epochs", "6", "--resume")
    return {**ended, "resumed": finish(start(again, work / name), work / name)}


def inputs(work: Path) -> None:
    toy.write_model(work / "model")
    toy.write_cola(work / "cola", train=48)  # 7 batches of 7, the last of 6


def main(work: Path) -> None:
    import toy_training  # noqa: F401

    import run

    toy.import_for_children()

    # In a child, for the tokenizers' library starts threads.
    found = {"inputs": finish([fork(lambda: inputs(work), work / "inputs-0")], work / "inputs")}
    for name, count in (("fit-one", 1), ("fit-two", 2)):
        found[name] = finish(start(lambda name=name: train(work / name), work / name, count), work / name)
    for name, count, more in (("one", 1, ()), ("two", 2, ()), ("bad", 2, ("--rank", "4000")),
                              ("whole", 2, ("--dropout", "0.3", "--epochs", "6"))):
        found[name] = finish(start(command(work, name, *more), work / name, count), work / name)
    found["two"]["again"] = finish(start(command(work, "two"), work / "again"), work / "again")
    found["stopped"] = interrupted(work, "stopped", signal.SIGTERM)
    found["killed"] = interrupted(work, "killed", signal.SIGKILL)

    def sweep() -> int:
        sys.argv = ["run.py", "sweep", "12345", "--search", "rank=1,2", "--out", str(work / "sweep")]
        return run.main()

    def distilled() -> int:
        sys.argv = ["run.py", "distil", "12345", "--plain", "--teacher", str(work / "one"), "--out",
                    str(work / f"distil-{count}"),
                    "--no-plots", "--epochs", "2", "--embedding-size", "4", "--hidden-size", "4",
                    "--dropout", "0"]
        return run.main()

    found["sweep"] = finish(start(sweep, work / "sweep"), work / "sweep")
    for count in (1, 2):
        found[f"distil-{count}"] = finish(start(distilled, work / f"distil-{count}", count), work / f"distil-{count}")
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
