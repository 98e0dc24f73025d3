"""The Dockerfile without Docker: its files are there, its command is one that run.py takes, its ports are one."""
import json
import re
from pathlib import Path

import toy

import run

ROOT = Path(run.__file__).parent
LINES = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()


def values(word: str) -> list[str]:
    return [line.removeprefix(word).strip() for line in LINES if line.startswith(word)]


def test_its_entry_point_serves_the_run_of_its_example_on_the_port_that_is_exposed_and_asked(monkeypatch):
    parsed, example = [], next(line for line in LINES if line.startswith("#   docker run"))
    monkeypatch.setattr(run, "_call", lambda args: parsed.append(args))
    (entry,), (port,) = values("ENTRYPOINT"), values("EXPOSE")
    python, program, *words = json.loads(entry)
    assert (python, program) == ("python", "run.py")
    assert toy.main(*words, *example.partition(" lora-distil ")[2].split()) is None
    assert (parsed[0].mode, parsed[0].host, str(parsed[0].port)) == ("serve", "0.0.0.0", port)
    assert parsed[0].adapter == ("cola=runs/LoRA-12345",)
    (health,) = values("HEALTHCHECK")
    code = json.loads(health[health.index("["):])[2]
    compile(code, "healthcheck", "exec")
    assert f"127.0.0.1:{port}/healthz" in code and f"-p {port}:{port}" in example


def test_it_copies_what_is_there_and_nothing_that_the_service_needs_is_left_out():
    files, _ = values("COPY")
    assert all((ROOT / name).is_file() for name in files.split()[:-1])
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    rooms = re.findall(r"^layers = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[0]
    assert not set(ignored) & {name for room in re.findall(r'"(\w+)"', rooms) for name in (room, f"{room}.py")}
    assert {"runs", ".git", ".venv"} <= set(ignored)
