"""The notebook of the assignment: every cell runs, at toy size, and it is committed without outputs."""
import nbclient
import nbformat
import pytest
import toy

PATH = toy.ROOT / "notebooks" / "assignment.ipynb"
# LaTeX would take longer than all the rest, and write into the repository; its absence is one line.
SMALL = """
import shutil
which = shutil.which
shutil.which = lambda name, *more, **options: None if name == "latexmk" else which(name, *more, **options)
SR, MODEL, TASK, WORK = "12345", {model!r}, "cola", {work!r}
LORA = ["--data", {data!r}, "--epochs", "1", "--batch-size", "8", "--lr", "0.01"]
DISTIL = ["--plain", "--epochs", "1", "--embedding-size", "6", "--hidden-size", "5"]
"""


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(PATH, as_version=4)


def test_it_is_committed_without_outputs(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.id for cell in code if cell.outputs or cell.execution_count] == []


def test_every_cell_runs(notebook, tmp_path):
    place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    small = SMALL.format(model=str(toy.write_model(tmp_path / "model")), data=str(toy.write_cola(tmp_path / "cola")),
                         work=str(tmp_path))
    # As papermill does: a cell of other values after the cell that is tagged "parameters".
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(small))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(PATH.parent)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    shown = [output.data for output in outputs if output.output_type == "display_data"]
    assert {path.name for path in (tmp_path / "runs").iterdir()} >= {"LoRA-12345", "distil-12345"}
    assert sum("image/png" in data for data in shown) == len(list((tmp_path / "plots").glob("*.png"))) > 4
    table, = (data["text/markdown"] for data in shown if "text/markdown" in data)
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [
        "majority class", "LoRA", "student with KD", "baseline"]
    assert printed.count("The teachers thanked him.") == 4  # two commands, two answers
    assert printed.splitlines()[-1].startswith("run.py: latexmk not found")
