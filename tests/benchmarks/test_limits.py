"""A full disk, a quota, a read-only folder and memory that runs out: one line, the last checkpoint whole, and a resume."""
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import toy
import warm

import train_utils
from machine import hardware
from report import figures


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    done = subprocess.run(warm.of_file(Path(__file__).parents[1] / "limits.py"), capture_output=True, text=True,
                          timeout=300, env={**os.environ, "TMPDIR": str(tmp_path_factory.mktemp("limits"))})
    assert done.stdout.startswith("{"), done.stderr
    return json.loads(done.stdout)


def one_line(attempt: dict) -> str:
    assert attempt["status"] == 2, attempt
    assert len(attempt["stderr"]) == 1 and attempt["stderr"][0].startswith("run.py: "), attempt
    return attempt["stderr"][0]


@pytest.mark.slow
@pytest.mark.parametrize("where, names, checkpoint", [
    ("first checkpoint", "checkpoint.safetensors: cannot be written (File too large)", False),
    ("later checkpoint", "checkpoint.safetensors: cannot be written (File too large)", True),
    ("final weights", "adapter_model.safetensors: cannot be written (File too large)", True),
    ("summary", "SHA256SUMS: cannot be written (File too large)", True),
    ("tensorboard", "events.out.tfevents.", True),
    ("keeping", "no room to keep what frozen blocks compute (File too large)", False)])
def test_a_quota_is_one_line_and_the_run_ends_in_the_same_bytes_once_there_is_room(result, where, names, checkpoint):
    assert names in one_line(result[where])
    assert result[where]["checkpoint"] is checkpoint
    assert result[where]["temporaries"] == []
    assert result[where]["failures"] == []


@pytest.mark.slow
def test_a_disk_that_is_full_and_then_read_only_likewise(result):
    """On a small file system of its own, where the tests may mount one; a quota stands for it elsewhere."""
    disk = result["disk"]
    if disk is None:
        assert result["later checkpoint"]["status"] == 2
        return
    assert "checkpoint.safetensors: cannot be written (No space left on device)" in one_line(disk["full"])
    assert disk["checkpoint"] is True
    assert "(No space left on device)" in one_line(disk["keeping"])
    assert "(Read-only file system)" in one_line(disk["read_only"]) or "cannot be written to" in one_line(disk["read_only"])
    assert disk["failures"] == []


# ---------------------------------------------------------------- memory

def cpu_allocator():
    torch.empty(1 << 50)


def cuda_allocator():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nSee documentation.")


def python_allocator():
    raise MemoryError


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    toy.write_model(folder / "model")
    toy.write_cola(folder / "cola")
    return folder


@pytest.mark.parametrize("fails", [cpu_allocator, cuda_allocator, python_allocator])
@pytest.mark.parametrize("options, says", [
    (("--batch-size", 8), "out of memory with --batch-size 8; try --batch-size 4 --accumulate 2, which is the same step"),
    (("--batch-size", 6, "--accumulate", 3), "with --batch-size 6; try --batch-size 3 --accumulate 6"),
    (("--batch-tokens", 101), "out of memory with --batch-tokens 101; try --batch-tokens 50"),
    (("--batch-size", 1), "out of memory with --batch-size 1; try a smaller --max-length, or a smaller model")])
def test_out_of_memory_is_one_line_that_names_the_batch_size_to_try(work, tmp_path, monkeypatch, capsys, fails, options,
                                                                     says):
    """In the fourth batch; the checkpoint of the step before stands."""
    calls = []
    monkeypatch.setattr(figures, "plot_run", lambda *_: [])
    monkeypatch.setattr(train_utils, "label_loss", lambda *_: lambda logits, batch: (
        fails() if calls.append(1) or len(calls) == 4 else logits.square().mean()))
    assert toy.main("LoRA", "12345", "--model", work / "model", "--data", work / "cola", "--out", tmp_path / "run",
                    "--plots", tmp_path, "--save-every", "1steps", *options) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and not line.startswith("epoch ")]  # bars
    assert len(lines) == 1 and lines[0].startswith("run.py: out of memory") and says in lines[0]
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_other_errors_are_not_taken_for_exhausted_memory():
    assert not hardware.exhausted(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not hardware.exhausted(ValueError("out of memory"))
