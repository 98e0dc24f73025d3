"""No flipped bit and no cut in a run's folder goes unnoticed; benchmarks/tamper_test.py does the same in thousands."""
import shutil

import pytest
import toy

from benchmarks import tamper_test
from experiments import repeat
from machine.errors import UserError
from record import files
from report import figures

pytestmark = pytest.mark.slow

FLIPS = 4


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("tamper")


@pytest.fixture(scope="module")
def rows(work):
    return tamper_test.tamper(work, FLIPS, seed=0)


def test_every_flip_and_cut_is_refused_by_the_files_name(rows):
    assert [(row["run"], row["file"], row["wrong"][:1]) for row in rows if row["noticed"] != row["tried"]] == []


def test_every_file_of_every_kind_of_run_was_tampered_with(rows):
    tried = {run: {row["file"] for row in rows if row["run"] == run and row["tried"] == FLIPS + 2}
             for run in ("LoRA", "distil", "LoRA, unfinished", "distil, unfinished")}
    common = {"config.json", "metrics.jsonl", "summary.json", "SHA256SUMS"}
    assert tried == {
        "LoRA": common | {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json",
                          "tokenizer_config.json"},
        "distil": common | {"student.safetensors", "scratch.safetensors", "student_config.json",
                            "teacher_logits.safetensors"},
        "LoRA, unfinished": {"config.json", "SHA256SUMS", "checkpoint.safetensors"},
        "distil, unfinished": {"config.json", "SHA256SUMS", "teacher_logits.safetensors", "student.checkpoint.safetensors",
                               "scratch.checkpoint.safetensors"}}
    assert {row["file"].split("/")[0] for row in rows if row["harmless"]} == {
        "tensorboard", *tamper_test.WRITTEN_ANEW}


def test_what_is_harmless_in_an_unfinished_run_is_written_anew(rows, work, tmp_path, monkeypatch):
    """A resume with the files destroyed ends as the finished run did."""
    monkeypatch.setattr(figures, "plot_run", lambda *_: [])
    shutil.copytree(work / "distil", tmp_path / "distil")
    for name in tamper_test.WRITTEN_ANEW:
        (tmp_path / "distil" / name).write_bytes(b"rubbish")
    assert toy.main("distil", "12345", "--plain", "--teacher", work / "runs/LoRA-12345", "--embedding-size", 4,
                    "--hidden-size", 4,
                    *tamper_test.SMALL, "--plots", tmp_path, "--out", tmp_path / "distil", "--resume") == 0
    assert list(repeat.differences(work / "runs/distil-12345", tmp_path / "distil")) == []


def test_a_missing_file_is_named_and_missing_checksums_are_said(rows, work, tmp_path, capsys):
    shutil.copytree(work / "runs/LoRA-12345", tmp_path / "run")
    data = work / "cola/in_domain_dev.tsv"
    (tmp_path / "run" / "SHA256SUMS").rename(tmp_path / "sums")
    assert toy.main("eval", tmp_path / "run", "--data", data) == 0
    assert "run: has no SHA256SUMS; whether its files are whole is not known" in capsys.readouterr().err
    (tmp_path / "sums").rename(tmp_path / "run" / "SHA256SUMS")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert toy.main("eval", tmp_path / "run", "--data", data) == 2
    assert "metrics.jsonl: missing, though SHA256SUMS lists it" in capsys.readouterr().err


def test_the_checksums_are_the_standard_tools(tmp_path):
    """The format of coreutils' sha256sum, with FIPS 180-4's first example."""
    (tmp_path / "abc").write_bytes(b"abc")
    files.write_sums(tmp_path, {"abc": files.sha256(tmp_path / "abc")})
    first, second = (tmp_path / "SHA256SUMS").read_text().splitlines()
    assert first == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  abc"
    assert second.startswith("# ")
    assert files.check_sums(tmp_path) is True
    (tmp_path / "abc").write_bytes(b"abd")
    with pytest.raises(UserError, match="abc: damaged or changed"):
        files.check_sums(tmp_path)


def test_eval_of_a_file_that_changed_since_the_run_says_so(rows, work, tmp_path, capsys):
    data = work / "cola/in_domain_dev.tsv"
    assert toy.main("eval", work / "runs/LoRA-12345", "--data", data) == 0
    assert "changed since" not in capsys.readouterr().err
    before = data.read_bytes()
    data.write_bytes(before + b"s\t1\t\tOne more.\n")
    assert toy.main("eval", work / "runs/LoRA-12345", "--data", data) == 0
    assert f"warning: {data}: changed since the run read it" in capsys.readouterr().err
    data.write_bytes(before)
