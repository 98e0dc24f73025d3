"""Lists every reader of files, with a file that test_fuzz.py and benchmarks/fuzz.py damage.

A reader is one line in `readers`: the file to damage, and a call that reads it.
"""
from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
import signal
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import toy
from hypothesis import strategies as st

# The longest time of a reader, in seconds.
LIMIT = 20


def make(base: Path) -> Path:
    """Writes a toy model, tables, two runs of LoRA and a distillation into the folder `base`, and returns it.

    The runs have no checksums: damage would be found there, and no reader would see it.
    """
    import datasets

    toy.write_model(base / "model")
    toy.write_cola(base / "cola")
    common = ("--plots", base / "plots", "--batch-size", 8, "--epochs", 2)
    lora = ("LoRA", "12345", "--model", base / "model", "--data", base / "cola", *common, "--out")
    with mock.patch("report.figures.plot_run", lambda *_: []), contextlib.redirect_stdout(io.StringIO()):
        made = [toy.main(*lora, base / "lora"), toy.main(*lora, base / "head", "--method", "head"),
                toy.main("distil", "12345", "--plain", "--teacher", base / "lora", "--out", base / "distil",
                         "--embedding-size", 4,
                         "--hidden-size", 4, *common)]
    if made != [0, 0, 0]:
        raise RuntimeError(f"the runs to damage ended with {made}")
    for name in ("lora", "head", "distil"):
        (base / name / "SHA256SUMS").rename(base / f"{name}.sums")
        shutil.rmtree(base / name / "tensorboard")
    (base / "sums").mkdir()
    shutil.copy(base / "lora.sums", base / "sums" / "SHA256SUMS")
    for name in ("config.json", "metrics.jsonl", "summary.json", "adapter_config.json", "adapter_model.safetensors",
                 "README.md", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / "lora" / name, base / "sums" / name)
    (base / "prompts.txt").write_text("The cat\nsat on\n")
    (base / "pairs.tsv").write_text("phenomenon\tparadigm\tgood\tbad\np\tq\tthe cat sat\tcat the sat\n")
    (base / "published.tsv").write_text("paradigm\tphenomenon\tlstm\nq\tp\t0.5\n")
    columns = {"text": ["a cat", "the dog", "old mat", "red bird"], "label": ["x", "y", "x", "y"]}
    table = datasets.Dataset.from_dict(columns)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    for kind in ("csv", "jsonl", "parquet"):
        (base / kind).mkdir()
        for split in ("train", "validation"):
            path = base / kind / f"{split}.{kind}"
            if kind == "csv":
                path.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
            elif kind == "jsonl":
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            else:
                table.to_parquet(path)
    return base


def readers(base: Path) -> dict[str, tuple[Path, Callable[[], object]]]:
    """Returns the file to damage and the call of each reader, by its name."""
    import data_utils
    from adapters import peft_layout
    from data import pairs
    from experiments import evaluate, predict, predict_file
    from experiments import generate as generation
    from model import load_classifier
    from options.schema import RunOptions
    from record import files, folder, tensors
    from record.config_json import rebuild
    from report import figures, records

    dev = base / "cola/out_of_domain_dev.tsv"

    def adapter():
        return peft_layout.load_adapter(load_classifier(str(base / "model"), 2)[0].net, base / "lora")

    def plotted():
        return figures.curves(records.read_metrics(base / "lora/metrics.jsonl"),
                              records.read_json(base / "lora/summary.json"), "mcc")

    def rebuilt():
        return rebuild(RunOptions, folder.read_run(base / "lora")[0]["options"], out=base)

    predictor = functools.cache(lambda: predict.RunPredictor(base / "lora"))

    def predicted(path: Path):
        return lambda: [json.dumps(result, allow_nan=False) for result in predict_file.predict_file(predictor(), path)]

    return {
        **{f"predict: {kind}": (path, predicted(path)) for kind, path in {
            "text": base / "prompts.txt", "TSV": dev, "CSV": base / "csv/train.csv",
            "JSON Lines": base / "jsonl/train.jsonl", "Parquet": base / "parquet/train.parquet"}.items()},
        "CoLA's TSV": (base / "cola/in_domain_dev.tsv", lambda: data_utils.load_task("cola", base / "cola")),
        "CSV": (base / "csv/train.csv", lambda: data_utils.load_task("csv", base / "csv")),
        "JSON Lines": (base / "jsonl/train.jsonl", lambda: data_utils.load_task("csv", base / "jsonl")),
        "Parquet": (base / "parquet/train.parquet", lambda: data_utils.load_task("csv", base / "parquet")),
        "prompts": (base / "prompts.txt", lambda: generation.read_prompts(base / "prompts.txt")),
        "minimal pairs": (base / "pairs.tsv", lambda: pairs.read_pairs(base / "pairs.tsv")),
        "published figures": (base / "published.tsv", lambda: pairs.read_published(base / "published.tsv")),
        "adapter_config.json": (base / "lora/adapter_config.json", adapter),
        "adapter_model.safetensors": (base / "lora/adapter_model.safetensors", adapter),
        "gen --adapter": (base / "lora/adapter_config.json", lambda: generation.base_model(base / "lora")),
        "LoRA config.json": (base / "lora/config.json", lambda: evaluate.evaluate_run(base / "lora", dev)),
        "LoRA summary.json": (base / "lora/summary.json", lambda: folder.read_run(base / "lora", "LoRA")),
        "trained.safetensors": (base / "head/trained.safetensors", lambda: evaluate.load_finetuned(base / "head")),
        "student_config.json": (base / "distil/student_config.json", lambda: evaluate.load_student(base / "distil")),
        "student.safetensors": (base / "distil/student.safetensors", lambda: evaluate.load_student(base / "distil")),
        "distil config.json": (base / "distil/config.json", lambda: evaluate.evaluate_run(base / "distil", dev)),
        "teacher_logits": (base / "distil/teacher_logits.safetensors",
                           lambda: tensors.load_checked(base / "distil/teacher_logits.safetensors")),
        "SHA256SUMS": (base / "sums/SHA256SUMS", lambda: files.check_sums(base / "sums")),
        "options of config.json": (base / "lora/config.json", rebuilt),
        "report: metrics.jsonl": (base / "lora/metrics.jsonl", plotted),
        "report: summary.json": (base / "lora/summary.json", plotted),
    }


# ---------------------------------------------------------------- damage

JSON = st.recursive(st.none() | st.booleans() | st.integers(-2, 10 ** 12) | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
                    max_leaves=4)


def damaged(whole: bytes, path: Path) -> st.SearchStrategy[bytes]:
    """Returns a strategy of damaged files: bytes changed, inserted, cut out or repeated, JSON values replaced, or any bytes.

    Args:
        whole: the bytes of the undamaged file.
        path: the file, whose suffix tells its format.
    """
    place = st.integers(0, max(0, len(whole) - 1))
    change = st.tuples(place, st.integers(0, 40), st.binary(max_size=6) | st.sampled_from(
        [b"\n", b"\t", b"\r", b"\0", b'"', b",", b"{", b"]", b"\xff", b"-1", b"1e999", b"NaN", b"null", b"../../x"]))

    def changed(changes) -> bytes:
        result = whole
        for start, length, new in changes:
            result = result[:start] + new + result[start + length:]
        return result
    # Changes inside of valid JSON reach deeper than changed bytes: they are three times as likely.
    kinds = [st.lists(change, min_size=1, max_size=3).map(changed), place.map(lambda end: whole[:end]),
             place.map(lambda end: whole + whole[:end]), st.binary(max_size=60)]
    if path.suffix == ".json":
        kinds += [_with_other_values(json.loads(whole)).map(lambda value: json.dumps(value).encode())] * 3
    elif path.suffix == ".jsonl":
        lines = [json.loads(line) for line in whole.splitlines()]
        kinds += [_with_other_values(lines).map(lambda value: "".join(
            json.dumps(line) + "\n" for line in (value if isinstance(value, list) else [value])).encode())] * 3
    elif path.suffix == ".safetensors":
        size = struct.unpack("<Q", whole[:8])[0]
        header, data = json.loads(whole[8:8 + size]), whole[8 + size:]

        def with_header(value) -> bytes:
            text = json.dumps(value).encode()
            return struct.pack("<Q", len(text)) + text + data
        kinds += [_with_other_values(header).map(with_header)] * 2
    return st.one_of(kinds)


@st.composite
def _with_other_values(draw, value):
    """Returns a JSON value with up to three parts, at any depth, replaced, removed or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        part = value
        while isinstance(part, dict | list) and part:
            key = draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
            if isinstance(part[key], dict | list) and part[key] and draw(st.integers(0, 3)):
                part = part[key]
                continue
            kind = draw(st.integers(0, 4))
            if kind == 0:
                del part[key]
            elif kind == 1 and isinstance(part, dict):
                part[draw(st.text(max_size=6))] = part.pop(key)
            else:
                part[key] = draw(JSON)
            break
    return value


# ---------------------------------------------------------------- one case

def attempt(path: Path, content: bytes, call: Callable[[], object]) -> None:
    """Reads a damaged file. Anything but a result or an error of the user's in one line is a failure.

    Raises:
        AssertionError: a message of several lines, or a file that was made or changed.
        TimeoutError: the reader hangs.
        Exception: any other error of the reader.
    """
    from machine.errors import UserError
    from report.records import ReportError

    def hangs(*_):
        raise TimeoutError(f"took more than {LIMIT} s")

    whole, before = path.read_bytes(), sorted(os.listdir(path.parent))
    handler = signal.signal(signal.SIGALRM, hangs)
    path.write_bytes(content)
    signal.alarm(LIMIT)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            call()
    except (UserError, ReportError) as error:
        assert str(error).strip(), "an empty message"
        assert len(str(error)) < 2000, f"a message of {len(str(error))} characters"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        after = path.read_bytes()
        path.write_bytes(whole)
    assert after == content, "the reader changed the file"
    assert sorted(os.listdir(path.parent)) == before, "the reader left files"
