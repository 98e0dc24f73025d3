"""Starts the service: loads adapters and students, listens, and stops when it is told to.

    python run.py serve --adapter cola=runs/LoRA-12345 --student small=runs/distil-12345
"""
from __future__ import annotations

import socket
import warnings

import uvicorn

from experiments.arguments import named
from experiments.evaluate import load_student
from machine.errors import UserError
from record.folder import read_run
from serving.bank import AdapterBank
from serving.service import Limits, create_app
from serving.texts import Reading
from serving.worker import Student, Worker


def load_served_student(folder) -> Student:
    """Loads the student of a distillation.

    Raises:
        UserError: not a distillation, or damaged.
    """
    config, summary = read_run(folder, "distil")
    model, tokenizer, _ = load_student(folder)
    return Student(model.requires_grad_(False), tokenizer, Reading.of(config), summary.get("task"),
                   frozenset(config.get("teacher_files", {}).values()))


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound.

    Raises:
        UserError: the port is in use, or the address is not this machine's.
    """
    bound = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM,
                                                                flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        if bound is not None:
            bound.close()
        raise UserError(f"--host {host} --port {port}: cannot listen there ({getattr(error, 'strerror', None) or error}); "
                        "--port 0 takes any port that is free") from None
    return bound


class _Server(uvicorn.Server):
    """Says that it is up, and where."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = sockets[0].getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(f"serving on http://{host}:{port}", flush=True)


def run_service(args) -> int:
    """Serves until SIGINT or SIGTERM; then what was accepted is still answered. Returns the exit status.

    Raises:
        UserError: a run that cannot be served, or an address that cannot be had.
    """
    adapters, students = named(args.adapter, "--adapter"), named(args.student, "--student")
    if not adapters and not students:
        raise UserError("serve: expected --adapter NAME=DIR or --student NAME=DIR, at least one")
    if args.adapters_root is not None and not args.adapters_root.is_dir():
        raise UserError(f"--adapters-root {args.adapters_root}: no such folder")
    # A service cuts a long text as the run did; there is nobody at the terminal to be told of each.
    warnings.filterwarnings("ignore", message=r"\d+ of \d+ sentences are longer than")
    with listen(args.host, args.port) as bound:
        worker = Worker(AdapterBank.of(adapters) if adapters else None,
                        {name: load_served_student(folder) for name, folder in students.items()}, args.max_queue)
        app = create_app(worker, Limits(args.max_texts, args.max_characters, seconds=args.timeout,
                                        adapters_root=args.adapters_root))
        server = _Server(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, backlog=2048,
                                        timeout_graceful_shutdown=int(args.timeout) + 15))
        try:
            server.run([bound])
        except KeyboardInterrupt:  # uvicorn raises the signal again once it has stopped
            pass
    print(f"stopped: {worker.answered} of {worker.accepted} accepted requests answered", flush=True)
    return 0
