"""A paper of three made-up steps, for the tests of `run.py paper`."""
import json

from experiments import compare, paper
from experiments.paper import PaperOptions
from experiments.steps import RUN, Step
from machine import signals
from record.files import sha256, write_sums


def three_steps(tmp_path, monkeypatch) -> tuple[PaperOptions, dict, list]:
    """A paper of three steps, the last of which needs the second; the fate of each by name; the names of those that ran.

    A step leaves a run unless its fate says otherwise.
    """
    out = tmp_path / "paper"
    declared = [Step(name, 1, [RUN, name], f"{name}/result.json", needs) for name, needs in (
        ("one", ()), ("two", ()), ("three", ("two",)))]
    monkeypatch.setattr(paper, "steps", lambda *_: declared)
    monkeypatch.setattr(paper.build, "build_paper", lambda folder, report, author="": report / "main.pdf")
    monkeypatch.setattr(paper.build, "check_latex", lambda: None)
    fate, ran = {}, []

    def child(words, log, **_):
        ran.append(words[0])
        log.write_text(f"{words[0]} says so\n")
        if fate.get(words[0], 0) == "interrupt":
            raise signals.Interrupted(2)
        if not fate.get(words[0], 0):
            folder = out / words[0]
            (folder / "run").mkdir(parents=True, exist_ok=True)
            (folder / "result.json").write_text('{"entries": []}')
            (folder / "run" / "weights").write_text("1")
            write_sums(folder / "run", {"weights": sha256(folder / "run" / "weights")})
        return fate.get(words[0], 0)
    monkeypatch.setattr(compare, "run_child", child)
    return PaperOptions("12345", "quick", 3, None, out, jobs=1), fate, ran


def states(options: PaperOptions) -> list[str]:
    return [step["status"] for step in json.loads((options.out / "paper.json").read_text())["steps"]]
