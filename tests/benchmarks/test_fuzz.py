"""Any damage to any file that is read ends in a result or one clear line; benchmarks/fuzz.py tries it in thousands."""
import itertools
import pickle
import shutil
import tempfile
import zipfile
from pathlib import Path

import pytest
import readers
import toy

from adapters import peft_layout
from benchmarks import fuzz
from data import stream, tables
from experiments import evaluate
from machine.errors import UserError
from report import build, records

pytestmark = pytest.mark.slow
CASES = 20  # of each reader
NAMES = ("predict: text", "predict: TSV", "predict: CSV", "predict: JSON Lines", "predict: Parquet",
         "CoLA's TSV", "CSV", "JSON Lines", "Parquet", "prompts", "minimal pairs", "published figures",
         "adapter_config.json", "adapter_model.safetensors",
         "gen --adapter", "LoRA config.json", "LoRA summary.json", "trained.safetensors", "student_config.json",
         "student.safetensors", "distil config.json", "teacher_logits", "SHA256SUMS", "options of config.json",
         "report: metrics.jsonl", "report: summary.json")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return readers.make(tmp_path_factory.mktemp("fuzz"))


def test_every_reader_is_tried_and_reads_what_is_whole(base):
    known = readers.readers(base)
    assert tuple(known) == NAMES
    for path, call in known.values():
        assert path.is_file()
        call()


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_a_result_or_one_clear_line(base, name):
    row = fuzz.fuzz(name, *readers.readers(base)[name], CASES)
    assert row["error"] is None and row["tried"] >= CASES


@pytest.mark.parametrize("wrong, says", [
    (lambda path: pickle.loads(b"garbage"), "UnpicklingError"), (lambda path: path.write_bytes(b"x"), "changed the file"),
    (lambda path: tempfile.mkstemp(dir=path.parent), "left files"), (lambda path: [][1], "IndexError")])
def test_what_a_reader_must_not_do_is_noticed(tmp_path, wrong, says):
    """The fuzzer itself: none of these may pass for a result."""
    path = tmp_path / "file"
    path.write_bytes(b"whole")
    assert says in fuzz.fuzz("bad", path, lambda: wrong(path), 5)["error"]


@pytest.mark.parametrize("name", fuzz.TABLES)
def test_made_tables_are_read_alike_or_refused(tmp_path, name):
    row = fuzz.fuzz_table(name, tmp_path, 200)
    assert row["error"] is None and row["tried"] >= 200


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", fuzz.ADAPTERS)
def test_made_adapters_compute_as_in_peft_or_are_refused(tmp_path, name):
    row = fuzz.fuzz_adapter(name, tmp_path, 60)
    assert row["error"] is None and row["tried"] >= 60


@pytest.mark.filterwarnings("ignore")
def test_a_reader_that_drops_a_tensor_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(peft_layout, "_copy_whole", lambda *_, **more: None)
    with pytest.raises(AssertionError, match="other logits than PEFT's"):
        fuzz.check_adapter(tmp_path, False, {"modules_to_save": ["lm_head"]}, [])


@pytest.mark.parametrize("name, ending, content, says", [
    ("_tsv_records", "tsv", b"text\tlabel\na\t1\nb\t0\n", "line 3 is lost"),
    ("_json_rows", "jsonl", b'{"text": "a"}\n[1]\n', "line 2 is lost")])
def test_a_reader_that_loses_a_row_is_noticed(tmp_path, monkeypatch, name, ending, content, says):
    whole, kept = getattr(stream, name), 2 if ending == "tsv" else 1  # header and first row
    monkeypatch.setattr(stream, name, lambda *given: itertools.islice(whole(*given), kept))
    with pytest.raises(AssertionError, match=says):
        fuzz.check_table(tmp_path, ending, content)


def test_a_reader_of_training_that_differs_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "good_rows", lambda rows: ({**row.columns, "label": "1"} for row in rows.rows))
    with pytest.raises(AssertionError, match="another column label"):
        fuzz.check_table(tmp_path, "csv", b"text,label\na,1\nb,0\n")


# ---------------------------------------------------------------- nothing unpickles, nothing escapes

class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file, weights", [("pytorch_model.bin", "model.safetensors"),
                                           ("adapter_model.bin", "adapter_model.safetensors")])
def test_nothing_is_unpickled(base, tmp_path, capsys, file, weights):
    """Pickles beside the weights, in place of them, and under their name; torch.load would spring the trap."""
    source = base / ("model" if weights == "model.safetensors" else "lora")
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    for case, names in (("beside", [file]), ("instead", [file]), ("as weights", [weights])):
        folder = tmp_path / case
        shutil.copytree(source, folder)
        if case == "instead":
            (folder / weights).unlink()
        for name in names:
            (folder / name).write_bytes(trap)
        option = ("--model", folder) if weights == "model.safetensors" else ("--adapter", folder)
        assert toy.main("gen", "12345", *option, "--prompt", "the cat", "--max-new-tokens", 1) == (
            0 if case == "beside" else 2)
        assert not (tmp_path / "sprung").exists()
    pickle.loads(trap)
    assert (tmp_path / "sprung").exists()  # it would have worked


def test_a_submission_holds_no_path_outside_its_folder(tmp_path):
    for name in ("run.py", "report/Report_12345.pdf", "plots/LoRA-12345_loss.png", "tests/test_a.py"):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text("x")
    for first, last in (("..", "x"), ("../../x", "y"), ("/etc", "x"), ("a\x00b", "c"), ("a\\..\\b", "c")):
        try:
            path = build.make_submission("12345", first, last, tmp_path / "root")
        except records.ReportError:
            continue
        assert path.resolve().parent == (tmp_path / "root").resolve()
        for entry in zipfile.ZipFile(path).namelist():
            assert not entry.startswith("/") and ".." not in entry.split("/")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root"]


@pytest.mark.parametrize("name", ["../lora/trained", "/etc/passwd"])
def test_a_tensor_name_is_never_a_path(base, tmp_path, name):
    from safetensors.torch import load_file, save_file

    shutil.copytree(base / "lora", tmp_path / "lora")
    weights = tmp_path / "lora" / peft_layout.WEIGHTS_FILE
    save_file({**load_file(weights), f"base_model.model.{name}": next(iter(load_file(weights).values()))}, weights)
    before = toy.tree(tmp_path)
    with pytest.raises(UserError, match="does not exist or has another shape"):
        evaluate.load_finetuned(tmp_path / "lora")
    assert toy.tree(tmp_path) == before
