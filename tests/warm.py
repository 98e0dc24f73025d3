"""Starts run.py from a process that has imported the libraries already: less than a CPU second, not eight.

    python tests/warm.py SOCKET ARGUMENTS...        does what `python run.py ARGUMENTS...` does
    python tests/warm.py SOCKET -c CODE ARGUMENTS...

A server forks one child for each command. The command passes its streams, folder, environment and limits on to the child,
its signals too, and ends as the child ends. If the command is killed, the server kills the child.
"""
from __future__ import annotations

import fcntl
import json
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import uuid
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"nofile": resource.RLIMIT_NOFILE, "fsize": resource.RLIMIT_FSIZE}
MESSAGE = 1 << 20  # more bytes than a request has
# The CODE that runs a Python file as a program: `-c`, this, the file and its arguments.
AS_A_PROGRAM = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"


@cache
def command(hub: bool = False) -> list[str]:
    """Starts a server, once for all workers of the tests, and returns the words before run.py's arguments.

    Args:
        hub: the children read the Hub's variables (HF_...) themselves, because the server has not imported its libraries.
    """
    # The workers of one pytest-xdist have a name in common, and one parent, with which the server ends.
    run, owner = os.environ.get("PYTEST_XDIST_TESTRUNUID"), os.getppid()
    if run is None:
        run, owner = uuid.uuid4().hex, os.getpid()
    address = Path(tempfile.gettempdir(), f"warm-{run[:16]}-{'hub' if hub else 'run'}")
    with open(f"{address}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not address.exists():
            server = subprocess.Popen([sys.executable, __file__, "--serve", address, str(owner), *(["hub"] if hub else [])],
                                      stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
            assert server.stdout.readline() == b"ready\n"
    return [sys.executable, __file__, str(address)]


def of_file(path: Path, *arguments) -> list[str]:
    """Returns the words that run a Python file as a program."""
    return [*command(), "-c", AS_A_PROGRAM, str(path), *map(str, arguments)]


def program(folder: Path, hub: bool = False) -> Path:
    """Writes a Python file that stands for run.py where a test's own process starts it as a child."""
    path = folder / "run.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nimport warm\n"
                    f"warm.ask({command(hub)[-1]!r}, sys.argv[1:])\n")
    return path


# ---------------------------------------------------------------- the command

def ask(address: str, argv: list[str]) -> None:
    """Has the server run a command line, and ends with its status."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        request = {"argv": argv, "cwd": os.getcwd(), "env": dict(os.environ),
                   "limits": {name: resource.getrlimit(number) for name, number in LIMITS.items()}}
        socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
        answers = connection.makefile()
        child = int(answers.readline())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: os.kill(child, number))
        status = int(answers.readline())
    if status < 0:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


# ---------------------------------------------------------------- the server

def serve(address: str, owner: int, hub: bool) -> None:
    """Imports the libraries, then forks a child for each request until the process `owner` has ended."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    if hub:
        import matplotlib.pyplot  # noqa: F401
        import pandas  # noqa: F401
        import scipy.optimize  # noqa: F401
        import sklearn.metrics  # noqa: F401
        import torch.distributed.tensor  # noqa: F401
    else:
        import toy

        toy.import_for_children()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    # A child's end wakes the selector through this pipe.
    ended, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    signal.set_wakeup_fd(wakeup.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    waiting = selectors.DefaultSelector()
    for source in (listening, ended):
        waiting.register(source, selectors.EVENT_READ)
    print("ready", flush=True)
    connections: dict[int, socket.socket] = {}  # of each child
    while exists(owner):
        for key, _ in waiting.select(timeout=1):
            if key.fileobj is listening:
                connection = listening.accept()[0]
                child = start(connection)
                connections[child] = connection
                connection.sendall(f"{child}\n".encode())
                waiting.register(connection, selectors.EVENT_READ, child)
            elif key.fileobj is not ended:
                # The command was killed: nothing else is ever sent after the request.
                os.kill(key.data, signal.SIGKILL)
                waiting.unregister(key.fileobj)
            else:
                ended.recv(MESSAGE)
                for child in list(connections):
                    if (done := os.waitpid(child, os.WNOHANG))[0]:
                        tell(connections.pop(child), os.waitstatus_to_exitcode(done[1]), waiting)
    for name in (address, f"{address}.lock"):
        os.unlink(name)


def exists(process: int) -> bool:
    """Returns whether a process runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def tell(connection: socket.socket, status: int, waiting: selectors.BaseSelector) -> None:
    """Sends a child's exit status, or minus its signal, to the command, if that still lives."""
    if connection.fileno() in waiting.get_map():
        waiting.unregister(connection)
    try:
        connection.sendall(f"{status}\n".encode())
    except OSError:
        pass
    connection.close()


def start(connection: socket.socket) -> int:
    """Forks a child for the request of a connection and returns its process id."""
    data, streams = b"", []
    while not data.endswith(b"\n"):
        part, sent, _, _ = socket.recv_fds(connection, MESSAGE, 3)
        data, streams = data + part, streams + list(sent)
    child = os.fork()
    if child:
        for stream in streams:
            os.close(stream)
        return child
    status = 70
    try:
        become(json.loads(data), streams)
        status = call(json.loads(data)["argv"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def become(request: dict, streams: list[int]) -> None:
    """Gives this child the streams, the folder, the environment and the limits of the command."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, 100)
    # The server's own streams may be at another position, or of another kind.
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for name, limit in request["limits"].items():
        resource.setrlimit(LIMITS[name], tuple(limit))
    import torch

    torch.set_num_threads(int(request["env"].get("OMP_NUM_THREADS", 1)))


def call(argv: list[str]) -> int:
    """Runs `run.py ARGUMENTS`, or a program after -c, and returns the exit status."""
    if argv[:1] == ["-c"]:
        sys.argv = ["-c", *argv[2:]]
        exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
        return 0
    import run

    sys.argv = ["run.py", *argv]
    return run.main(argv) or 0


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2], int(sys.argv[3]), hub=sys.argv[4:] == ["hub"])
    else:
        ask(sys.argv[1], sys.argv[2:])
