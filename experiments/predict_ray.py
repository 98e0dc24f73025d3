"""Answers shards in many processes, on one machine or several, by Ray Data (requirements-scale.txt).

    with connected("HOST:6379", workers=None) as count:
        for counts in answers(load, ("0.parquet", "1.parquet"), count): ...

Rows do not pass through Ray: a worker gets the name of a shard, reads it from the disk that all machines share, and writes
its answers there. Ray starts a worker that died anew, and gives it the shard again, where finished parts wait.
"""
from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from experiments.predict_file import Counts
from machine import threads
from machine.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 120  # seconds for a cluster's answer
CONNECTED = 10  # seconds for a connection to its machine
OBJECTS = 80 * 2 ** 20  # bytes of Ray's shared memory, nearly the least it takes: names and counts need little
# A driver of its own finds out whether a cluster answers: one that does not would hang this process, or end it.
PROBE = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='CRITICAL')"


class Worker:
    """Answers shards in a process of Ray's with one copy of the model, loaded before the first.

    Args:
        load: returns the function that answers a shard; a module's function, or a `partial` of one.
        folder: working folder that relative paths start from.
    """

    def __init__(self, load: Callable[[], Callable[[str], Counts]], folder: str):
        self.load, self.folder, self.answer = load, folder, None

    def __call__(self, batch: dict) -> dict:
        """Answers a batch of one shard; an error of the user's is an answer too, because Ray would retry an exception."""
        try:
            if self.answer is None:
                os.chdir(self.folder)
                self.answer = self.load()
                # Libraries and model stay as long as the worker; the garbage collector need not search them again.
                gc.freeze()
            counts = vars(self.answer(str(batch["shard"][0])))
        except UserError as error:
            counts = {"error": str(error)}
        except OSError as error:
            counts = {"error": f"{socket.gethostname()}: {error.filename or 'a file'}: {error.strerror or error}"}
        return {"counts": [json.dumps(counts)]}


@contextlib.contextmanager
def connected(address: str | None, workers: int | None = None) -> Iterator[int]:
    """Connects to a cluster, or starts one on this machine; leaves it at the end.

    Args:
        address: HOST:PORT; None: a cluster of this machine, which ends with the program.
        workers: number of processes; None: one for each core.

    Yields:
        The number of processes.

    Raises:
        UserError: Ray is not installed, or the cluster does not answer.
    """
    # Ray sends no usage statistics and prints no log. Its workers get the priority of this command: by default Ray gives
    # them a lower one than every other program has.
    for name, value in {"USAGE_STATS_ENABLED": "0", "BACKEND_LOG_LEVEL": "fatal", "worker_niceness": "0"}.items():
        os.environ.setdefault(f"RAY_{name}", value)
    # Before Ray is imported, because Ray then reads how to authenticate itself.
    if address and importlib.util.find_spec("ray"):
        _probe(address)
    try:
        # Ray tells of its own deprecated settings.
        with warnings.catch_warnings(action="ignore"):
            import ray
            import ray.data
            ray.data.DataContext.get_current().enable_progress_bars = False
    except ImportError:
        raise UserError("predict --engine ray: the package ray is not installed; pip install -r requirements-scale.txt"
                        ) from None
    # Workers find the project's modules in the folder where they lie here.
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", str(ROOT))]
    paths = os.pathsep.join([str(ROOT), *others])
    if address:
        settings = {"address": address, "runtime_env": {"env_vars": {"PYTHONPATH": paths}}}
    else:
        # Inherited, which takes less time than an environment of Ray's.
        os.environ["PYTHONPATH"] = paths
        # "local": never a cluster that somebody else has on this machine.
        settings = {"address": "local", "num_cpus": workers or threads.available(), "include_dashboard": False,
                    "object_store_memory": OBJECTS}
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # A cluster of this machine has half a minute to start, which a busy machine may exceed once.
    for last in (bool(address), True):
        try:
            with warnings.catch_warnings(action="ignore"), _without_stderr():
                ray.init(log_to_driver=False, logging_level="CRITICAL", **settings)
            break
        # Ray raises Exception itself.
        except Exception as error:
            ray.shutdown()
            if last:
                raise UserError(f"predict --engine ray: Ray does not start ({_first_line(str(error))})") from None
    # Ray handles SIGTERM in its own way.
    for number, handler in before.items():
        signal.signal(number, handler)
    try:
        # It prints there that a worker died.
        with contextlib.redirect_stdout(sys.stderr):
            yield workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    except ray.exceptions.RayError as error:
        raise UserError(f"predict --engine ray: {_first_line(str(error))}; the same command again goes on") from None
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Drops what C++ code writes to stderr: Ray's tells there that its log level was set."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _probe(address: str) -> None:
    """Checks that a cluster answers at an address; makes Ray send the user's token if the cluster asks for one.

    Raises:
        UserError: it does not.
    """
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise UserError(f"--address {address}: expected HOST:PORT, such as the one that `ray start --head` shows")
    try:
        socket.create_connection((host, int(port)), timeout=min(CONNECTED, PATIENCE)).close()
        # `ray start` asks for its token as a rule, and a driver that names an address sends none by itself.
        health = _ray("-m", "ray.scripts.scripts", "health-check", "--address", address)
        if "AuthenticationError" in health.stderr:
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        _ray("-c", PROBE, address).check_returncode()
    except subprocess.TimeoutExpired:
        raise UserError(f"--address {address}: no answer within {PATIENCE} seconds; expected a Ray cluster") from None
    except (OSError, OverflowError) as error:
        raise UserError(f"--address {address}: cannot be reached ({getattr(error, 'strerror', None) or error}); expected a "
                        "Ray cluster") from None
    except subprocess.CalledProcessError as error:
        # The last line of a traceback names the error.
        said = _first_line("".join(error.stderr.strip().splitlines()[-1:]))
        raise UserError(f"--address {address}: no Ray cluster that this program can use ({said}); expected Ray's version "
                        "here, and the cluster's token in ~/.ray/auth_token or RAY_AUTH_TOKEN") from None


def _ray(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], timeout=PATIENCE, capture_output=True, text=True)


def answers(load: Callable[[], Callable[[str], Counts]], names: tuple[str, ...], workers: int) -> Iterator[Counts]:
    """Answers shards in the processes of a cluster; yields the counts of each, in any order.

    Args:
        load: see `Worker`.
        names: of the shards.

    Raises:
        UserError: the first that a worker met; the others end.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    pool = ray.data.ActorPoolStrategy(size=min(workers, len(names)))
    # A block for each shard: whoever is free takes the next.
    shards = ray.data.from_items([{"shard": name} for name in names], override_num_blocks=len(names))
    found = shards.map_batches(Worker, fn_constructor_args=(load, os.getcwd()), batch_size=1, compute=pool, num_cpus=1)
    for row in found.iter_rows():
        counts = json.loads(row["counts"])
        if "error" in counts:
            raise UserError(counts["error"])
        yield Counts(**counts)


def _first_line(text: str) -> str:
    return (text.strip() or "no reason given").splitlines()[0][:200]
