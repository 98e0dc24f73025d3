"""`run.py serve` as a process: SIGTERM, sockets, the access log, and bad arguments."""
import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy
import warm
from serving_runs import alone, call, check, classify, questions, raw, write_runs

from benchmarks import load
from experiments.serve import listen

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return write_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def expected(runs):
    return alone(runs)


@contextlib.contextmanager
def served(*arguments, files: int | None = None):
    """`run.py serve` in a process of its own, which may open `files` files, and its port."""
    limit = [] if files is None else ["sh", "-c", f'ulimit -n {files}; exec "$@"', "sh"]
    process = subprocess.Popen([*limit, *warm.command(), "serve", *map(str, arguments)], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        line = process.stdout.readline()
        match = re.fullmatch(r"serving on http://127\.0\.0\.1:(\d+)\n", line)
        assert match, (line, process.stderr.read() if process.poll() is not None else "")
        yield process, int(match[1])
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_sigterm_in_the_middle_loses_no_accepted_request(runs, expected):
    arguments = ("--adapter", f"cola={runs / 'root/lora'}", "--adapter", f"qv={runs / 'root/qv'}", "--student",
                 f"small={runs / 'distil'}", "--port", 0, "--quiet")
    with served(*arguments) as (process, port):
        asked = questions(4000, ("cola", "qv", "small"))

        async def until_it_stops():
            answers = asyncio.create_task(load.ask(port, asked, 24))
            await asyncio.sleep(0.7)
            process.send_signal(signal.SIGTERM)
            return await answers
        answers = asyncio.run(until_it_stops())
        out, err = process.communicate(timeout=30)
    good = [(question, answer) for question, answer in zip(asked, answers, strict=True) if answer.status is not None]
    for question, answer in good:
        check(question, answer, expected)
    assert 24 <= len(good) < len(asked)  # it was stopped in the middle
    assert out == f"stopped: {len(good)} of {len(good)} accepted requests answered\n"  # none that a client did not get
    assert err == "" and process.returncode == 0


def test_more_idle_sockets_than_the_process_has_files_neither_stop_it_nor_fill_its_log(runs):
    with served("--student", f"small={runs / 'distil'}", "--port", 0, files=128) as (process, port):
        with contextlib.ExitStack() as stack:
            for _ in range(220):
                stack.enter_context(contextlib.closing(socket.create_connection(("127.0.0.1", port), 10)))
            start = time.monotonic()
            for _ in range(3):
                assert call(port, "GET", "/healthz")[0] == 200
                assert classify(port, student="small", texts=["the cat"])[0] == 200
            assert time.monotonic() - start < 10
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=30)
    said, *logged = err.splitlines()
    assert "at most 64 connections" in said
    assert [line.split()[3:6] for line in logged] == 3 * [["GET", "/healthz", "200"], ["POST", "/v1/classify", "200"]]
    assert process.returncode == 0 and out == "stopped: 3 of 3 accepted requests answered\n"


@pytest.mark.parametrize("quiet", [False, True])
def test_each_request_is_a_line_of_the_access_log_unless_it_is_quiet(runs, quiet):
    arguments = ("--student", f"small={runs / 'distil'}", "--port", 0, *(["--quiet"] if quiet else []))
    with served(*arguments) as (process, port):
        classify(port, student="small", texts=["the cat"])
        classify(port, student="nobody", texts=["the cat"])
        call(port, "GET", "/%0A127.0.0.1%20forged")
        call(port, "GET", "/", None, {"host": "evil.example"})
        raw(port, b"\x16\x03\x01 no http\r\n\r\n")
        process.send_signal(signal.SIGTERM)
        err = process.communicate(timeout=30)[1]
    expected = [["127.0.0.1", "POST", "/v1/classify", "200"], ["127.0.0.1", "POST", "/v1/classify", "404"],
                ["127.0.0.1", "GET", "/%0A127.0.0.1%20forged", "404"], ["127.0.0.1", "GET", "/", "400"],
                ["127.0.0.1", "-", "-", "400"]]
    assert [re.fullmatch(r"[-\d]+ [:,\d]+ (.*) \d+\.\d ms", line)[1].split() for line in err.splitlines()] == (
        [] if quiet else expected)


BAD_NAMES = ["a/b", "a b", "..", "_a", "é", "x" * 65, "a\nb", "a%2fb"]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("option", ["--adapter", "--student"])
def test_names_of_adapters_and_students_are_checked_alike(capsys, option, name):
    assert toy.main("serve", option, f"{name}=nowhere") == 2
    out, err = capsys.readouterr()
    assert out == "" and err == (f"run.py: {option[2:]} name {name[:80]!r}: expected up to 64 letters, digits, dots, dashes "
                                 "and underscores\n")


@pytest.mark.parametrize("arguments, says", [
    ((), "expected --adapter NAME=DIR or --student"),
    (("--adapter", "a=RUN", "--adapter", "a=RUN"), "the name is given twice"),
    (("--adapter", "a=RUN", "--adapters-root", "nowhere"), "--adapters-root nowhere: no such folder"),
    (("--adapter", "a=nowhere"), "not a run's folder"), (("--student", "a=RUN"), "a LoRA run"),
    (("--adapter", "a=RUN", "--port", "70000"), "expected a whole number from 0 to 65535"),
    (("--adapter", "a=RUN", "--host", "192.0.2.1"), "cannot listen there"),
    (("--adapter", "a=RUN", "--host", "no such host"), "cannot listen there")])
def test_bad_arguments_are_one_line(runs, capsys, arguments, says):
    assert toy.main("serve", *(str(word).replace("RUN", str(runs / "root/lora")) for word in arguments)) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.count("\n") == 1


def test_a_port_in_use_is_told(runs, capsys):
    with listen("127.0.0.1", 0) as bound:
        bound.listen()
        port = bound.getsockname()[1]
        assert toy.main("serve", "--adapter", f"a={runs / 'root/lora'}", "--port", port) == 2
    assert f"--port {port}: cannot listen there (Address already in use)" in capsys.readouterr().err


def test_a_missing_package_is_told_with_the_way_to_install_it(runs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert toy.main("serve", "--student", f"x={runs / 'distil'}") == 2
    assert capsys.readouterr().err == (
        "run.py: serve: the package uvicorn is not installed; pip install -r requirements-serve.txt\n")
