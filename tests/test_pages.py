"""README.md and docs/: every link leads somewhere, every command is one that run.py takes, every folder is named."""
import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import toy

import run
from benchmarks import summarise
from data import tiny
from experiments import compare, sweep
from model import lora_layers

ROOT = summarise.ROOT
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in summarise.pages()}
VISIBLE = {name: re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL) for name, text in PAGES.items()}
LINKS = [(name, link) for name, text in VISIBLE.items() for link in re.findall(r"\]\(([^)]+)\)", text)]
COMMAND = re.compile(r"python ((?:run|benchmarks/\w+)\.py\b[^`\n]*)")


def commands(text: str) -> list[str]:
    """Every `python run.py ...` and `python benchmarks/... .py` of a page, in one line each."""
    return COMMAND.findall(text.replace("\\\n", " "))


COMMANDS = sorted({command for text in VISIBLE.values() for command in commands(text)})


def anchors(text: str) -> set[str]:
    """A page's headings as GitHub links to them."""
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def test_the_readme_is_read_in_five_minutes():
    assert len(PAGES["README.md"].splitlines()) <= 150


def broken_links(root: Path) -> list[tuple[str, str]]:
    """The links of the pages of a copy of this project that lead nowhere, each with its page."""
    broken = []
    for page, link in LINKS:
        path, _, anchor = link.partition("#")
        target = (root / page).parent / path if path else root / page
        outside = re.match("https?://", link)
        if not outside and (not target.exists() or anchor and anchor not in anchors(target.read_text())):
            broken.append((page, link))
    return broken


def test_every_link_leads_somewhere():
    assert broken_links(ROOT) == [] and len(LINKS) > 50


def test_the_readme_links_every_page():
    linked = {link for page, link in LINKS if page == "README.md"}
    assert {name for name in PAGES if name != "README.md"} <= linked


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one_that_its_program_takes(command, monkeypatch):
    program, *words = shlex.split(command.replace("SR", "12345"), comments=True)
    if program != "run.py":
        assert (ROOT / program).is_file()
        source = (ROOT / program).read_text() + (ROOT / "benchmarks" / "common.py").read_text()
        assert [word for word in words if word.startswith("--") and f'"{word}"' not in source] == []
        return
    if "..." in words:  # a mode is named, and no more
        assert words[0] in run.MODES
        return
    parsed = []
    monkeypatch.setattr(run, "_call", lambda args: parsed.append(args))
    assert toy.main(*words) is None and parsed[0].mode == words[0]
    if words[0] == "compare":
        assert compare.entries(parsed[0])
    if words[0] == "sweep":
        assert sweep.search(parsed[0])


def test_each_mode_has_an_example_in_the_readme():
    shown = {command.split()[1] for command in commands(PAGES["README.md"])}  # hidden ones too
    assert set(run.MODES) <= shown


def test_the_table_of_rooms_is_the_house():
    """Every room exists and has a row, those that import each other in the order of the lint."""
    section = VISIBLE["README.md"].partition("## Where things are")[2]
    rooms = re.findall(r"^\| `([\w.]+)/?` \|", section, re.MULTILINE)
    assert [room for room in rooms if not (ROOT / room).exists()] == []
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    named = [room.removesuffix(".py") for room in rooms]
    assert [room for room in named if room in layers] == layers
    code = {path.name for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert code <= set(rooms)


@pytest.mark.parametrize("place", ["kd_loss distillation/losses.py", "DistilRNN model.py", "LoRALinear model.py",
                                   "CELLS model.py", "ROLE_MODULES data/architectures.py", "read_table data/tables.py",
                                   "SET_COLOURS report/style.py"])
def test_what_a_newcomer_changes_stands_where_the_readme_says(place):
    name, path = place.split()
    assert re.search(rf"^(def |class )?{name}\b", (ROOT / path).read_text(), re.MULTILINE)
    room, _, module = path.partition("/")
    row = next(line for line in PAGES["README.md"].splitlines() if re.match(rf"\| `{re.escape(room)}/?` ", line))
    assert (module or name) in row


def test_the_program_of_the_page_from_python_runs(gpt2_folder, monkeypatch, capsys):
    """With a toy in place of the built-in model, which takes a minute to make."""
    monkeypatch.setattr(tiny, "tiny_model_folder", lambda: gpt2_folder)
    program, = re.findall(r"```python\n(.*?)```", PAGES["docs/python.md"], re.DOTALL)
    exec(compile(program, "docs/python.md", "exec"), names := {})
    *_, taught, distilled = capsys.readouterr().out.splitlines()
    for answers in map(ast.literal_eval, (taught, distilled)):
        assert len(answers) == 4 and {label for label, _ in answers} <= {"acceptable", "unacceptable"}
    # Only the adapter and the head were trained.
    assert {name.rpartition(".")[2] for name, p in names["teacher"].net.named_parameters() if p.requires_grad} == {
        "lora_A", "lora_B", "weight"}
    assert all(layer.lora_B.any() for layer in lora_layers(names["teacher"].net).values())
