"""Starts the service: loads adapters and students, listens, and stops on a signal.

    python run.py serve --adapter cola=runs/LoRA-12345 --student small=runs/distil-12345
"""
from __future__ import annotations

import contextlib
import logging
import socket
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from experiments.arguments import named
from experiments.evaluate import load_student
from machine.errors import UserError
from machine.streams import note
from record.calibration import calibration_of
from record.folder import read_run
from serving.bank import AdapterBank
from serving.connections import ConnectionLimits, Server, most_connections
from serving.guard import ACCESS, Hosts, Limits
from serving.service import create_app
from serving.texts import Reading
from serving.worker import Student, Worker, check_name

STOP_SECONDS = 15  # beyond --timeout, until accepted requests are given up


def load_served_student(folder: Path, calibrated: bool = False) -> Student:
    """Loads the student of a distillation.

    Args:
        calibrated: answer by the run's calibration.json.

    Raises:
        UserError: not a distillation, or damaged.
    """
    config, summary = read_run(folder, "distil")
    model, tokenizer, _ = load_student(folder)
    reading = Reading.of(config, calibration_of(folder, calibrated))
    return Student(model.requires_grad_(False), tokenizer, reading, summary.get("task"),
                   frozenset(config.get("teacher_files", {}).values()))


def listen(host: str, port: int) -> socket.socket:
    """Returns a bound socket.

    Raises:
        UserError: the port is in use, or the address is not this machine's.
    """
    bound = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM,
                                                                flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, protocol)
        # A restarted service may take the port at once, while the kernel still remembers old connections.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        if bound is not None:
            bound.close()
        raise UserError(f"--host {host} --port {port}: cannot listen there ({getattr(error, 'strerror', None) or error}); "
                        "--port 0 takes any port that is free") from None
    return bound


@contextlib.contextmanager
def access_log(quiet: bool) -> Iterator[None]:
    """Writes the access log to stderr meanwhile, one line per request, unless `quiet`."""
    handler = logging.NullHandler() if quiet else logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    ACCESS.addHandler(handler)
    ACCESS.setLevel(logging.CRITICAL if quiet else logging.INFO)
    ACCESS.propagate = False
    try:
        yield
    finally:
        ACCESS.removeHandler(handler)


def main(args) -> int:
    """Serves until SIGINT or SIGTERM; then accepted requests are still answered. Returns the exit status.

    Raises:
        UserError: a name, run or folder that cannot be served, or an address that cannot be bound.
    """
    adapters, students = named(args.adapter, "--adapter"), named(args.student, "--student")
    if not adapters and not students:
        raise UserError("serve: expected --adapter NAME=DIR or --student NAME=DIR, at least one")
    # Names are checked before the models are loaded, which takes long.
    for kind, names in (("adapter", adapters), ("student", students)):
        for name in names:
            check_name(kind, name)
    if args.adapters_root is not None and not args.adapters_root.is_dir():
        raise UserError(f"--adapters-root {args.adapters_root}: no such folder")
    # The answer says that its text was cut; nobody reads the terminal.
    warnings.filterwarnings("ignore", message=r"\d+ of \d+ sentences are longer than")
    connections = most_connections(args.max_connections)
    if connections < args.max_connections:
        note(f"serve: at most {connections} connections, half of the files that the process may open (ulimit -n)")
    # The port is taken before the models are loaded, so that one in use is told at once.
    with listen(args.host, args.port) as bound, access_log(args.quiet):
        worker = Worker(AdapterBank.of(adapters, args.calibrated) if adapters else None,
                        {name: load_served_student(folder, args.calibrated) for name, folder in students.items()},
                        args.max_queue)
        hosts = Hosts.of(args.host, bound.getsockname()[0], args.allowed_host)
        limits = Limits(args.max_texts, args.max_characters, seconds=args.timeout, adapters_root=args.adapters_root,
                        hosts=hosts)
        server = Server(create_app(worker, limits), ConnectionLimits(connections), int(args.timeout) + STOP_SECONDS,
                        lambda line: print(line, flush=True))
        # uvicorn raises the signal again once it has stopped.
        with contextlib.suppress(KeyboardInterrupt):
            server.run([bound])
    print(f"stopped: {worker.answered} of {worker.accepted} accepted requests answered", flush=True)
    return 0
