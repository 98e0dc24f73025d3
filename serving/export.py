"""The folder of an exported network: its ONNX file, tokenizer, classes and an example, checked or not at all.

    python run.py export runs/distil-12345 --out student --int8    # export_student.py
    python run.py export runs/LoRA-12345 --out classifier          # export_teacher.py
"""
from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import data_utils
from data_utils import Split
from machine.errors import UserError
from machine.progress import Bar
from record.files import new_folder, write_file, write_json
from serving import answers
from serving.merge import kept_ends
from serving.packages import require
from serving.texts import Reading

IR_VERSION = 8  # read by onnxruntime 1.14 (of 2023) and newer
BATCH = 32  # sentences
TOKENIZER_FILE, LABELS_FILE, EXAMPLE_FILE, INT8_FILE = "tokenizer.json", "labels.json", "example.py", "int8.json"
LARGEST = 1_900_000_000  # bytes of weights in one ONNX file; a protobuf holds 2 GiB
EXAMPLE = '''"""Classifies sentences with the exported NETWORK: python example.py "A sentence." "Another one."

Needs: pip install onnxruntime tokenizers numpy
"""
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

here = Path(__file__).parent
tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))
session = onnxruntime.InferenceSession(here / "NETWORK.onnx", providers=["CPUExecutionProvider"])
labels = json.loads((here / "labels.json").read_text(encoding="utf-8"))

sentences = sys.argv[1:] or OWN
batch = tokenizer.encode_batch(TEXTS)  # padded to the longest; pads are masked
for sentence, row in zip(sentences, batch):
    if not sentence.strip() or not any(row.attention_mask):
        sys.exit(f"example.py: {sentence!r}: expected a sentence, found no word in it")
INPUTS
logits = session.run(["logits"], inputs)[0]
ANSWER
'''
INPUTS = '''inputs = {"input_ids": np.array([row.ids for row in batch], dtype=np.int64),
          "attention_mask": np.array([row.attention_mask for row in batch], dtype=np.int64)}
'''
# No tokenizer.json can cut the middle of a text, so the example does.
INPUTS_WITHOUT_MIDDLE = '''texts = [[token for token, real in zip(row.ids, row.attention_mask) if real] for row in batch]
texts = [ids if len(ids) <= {length} else ids[:{front}] + ids[-{back}:] for ids in texts]  # the middle is cut
longest = max(map(len, texts))
inputs = {{"input_ids": np.array([ids + [0] * (longest - len(ids)) for ids in texts], dtype=np.int64),
          "attention_mask": np.array([[1] * len(ids) + [0] * (longest - len(ids)) for ids in texts], dtype=np.int64)}}
'''


@dataclass(frozen=True)
class Network:
    """Holds a network that is written as ONNX: input_ids, attention_mask (batch, length) -> logits (batch, classes)."""

    name: str  # of the file, without .onnx, and in the example
    write: Callable[[Path], None]  # writes the float32 file
    write_int8: Callable[[Path, Path], None]  # from the float32 file, and the new one
    logits: Callable[[list[list[int]]], np.ndarray]  # (N, classes) by PyTorch, of the sentences' token ids
    tolerance: float  # of float32 logits, absolute where they are small, relative where they are large

    @property
    def file(self) -> str:
        return f"{self.name}.onnx"


# ---------------------------------------------------------------- the folder

def write_folder(network: Network, tokenizer, reading: Reading, rows: Split, out: Path, *,
                 int8: bool = False, say: Callable[[str], None] = print) -> None:
    """Writes the ONNX file, tokenizer.json, labels.json and example.py into a new folder.

    Args:
        reading: the classes, the way the run cut long texts, and its calibration.
        rows: real sentences; onnxruntime and PyTorch have to agree on them. Without labels, the cost of int8 is told in
            verdicts alone.
        out: must not exist yet, or be empty.
        int8: whether the ONNX file gets 8-bit weights.

    Raises:
        UserError: a package is missing, the folder is not new, or the file does not give PyTorch's logits.
    """
    require("onnxruntime")
    ids = data_utils.encode(tokenizer, rows.sentences, reading.max_length, reading.truncate)
    with new_folder(out) as folder:
        portable = portable_tokenizer(tokenizer, reading.max_length, reading.truncate)
        write_file(folder / TOKENIZER_FILE, portable.to_str(pretty=True))
        if reading.truncate == "middle":
            say("  tokenizer.json cuts no text, because it has no way to cut the middle; example.py does, as the run did")
        _check_tokenizer(folder / TOKENIZER_FILE, answers.texts_of(tokenizer, rows.sentences), ids,
                         kept_ends(tokenizer, reading.max_length))
        # The float32 file is checked even where int8 replaces it: a wrong graph must not pass for a cost of int8.
        path = folder / ("float32.onnx" if int8 else network.file)
        network.write(path)
        logits = onnx_logits(session(path), ids)
        difference = largest_difference(logits, network.logits(ids))
        if not difference <= network.tolerance:
            raise UserError(f"{out}: onnxruntime's logits differ from PyTorch's by {difference:.1e}; expected at most "
                            f"{network.tolerance:.0e}; nothing was written")
        say(f"  onnxruntime's logits equal PyTorch's on {len(ids):,} sentences (largest difference {difference:.1e})")
        if int8:
            network.write_int8(path, folder / network.file)
            after = onnx_logits(session(folder / network.file), ids)
            cost = {"megabytes": megabytes(folder / network.file), "float32_megabytes": megabytes(path),
                    **answers.cost_of_int8(reading.problem, logits, after, rows.labels)}
            say(f"  int8: {answers.in_words(cost)}")
            write_json(folder / INT8_FILE, cost)
            for part in _parts(path):
                part.unlink()
        write_json(folder / LABELS_FILE, list(reading.shown))
        write_file(folder / EXAMPLE_FILE, example(network.name, tokenizer, reading))


def example(name: str, tokenizer, reading: Reading) -> str:
    """Returns the program that classifies sentences with the exported files, as the run reads them and chooses a class."""
    rule, choice = reading.calibration, "row.argmax()"
    if rule.threshold is not None:
        choice = f"{rule.positive} if row[{rule.positive}] >= {rule.threshold!r} else {1 - rule.positive}  # calibrated"
    own, texts = answers.texts_in_example(tokenizer)
    text = EXAMPLE.replace("NETWORK", name).replace("OWN", own).replace("TEXTS", texts)
    text = text.replace("ANSWER\n", answers.ANSWERS[reading.problem.name].replace("CHOICE", choice))
    if reading.truncate != "middle":
        return text.replace("INPUTS\n", INPUTS)
    front, back = kept_ends(tokenizer, reading.max_length)
    return text.replace("INPUTS\n", INPUTS_WITHOUT_MIDDLE.format(length=reading.max_length, front=front, back=back))


def portable_tokenizer(tokenizer, max_length: int, truncate: str):
    """Returns the tokenizer in the form of the library `tokenizers`. It pads, and cuts a head or tail as the run did.

    Raises:
        UserError: the tokenizer has no such form.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"the tokenizer {type(tokenizer).__name__} has no tokenizer.json form")
    portable = Tokenizer.from_str(backend.to_str())
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    portable.enable_padding(pad_id=pad_id, pad_token=tokenizer.convert_ids_to_tokens(pad_id))
    if truncate == "middle":
        portable.no_truncation()
    else:
        portable.enable_truncation(max_length, direction={"tail": "right", "head": "left"}[truncate])
    return portable


def _check_tokenizer(path: Path, sentences: list[str] | list[tuple[str, str]], ids: list[list[int]],
                     kept: tuple[int, int]) -> None:
    """Compares the token ids of the written tokenizer with those of the run's own.

    Args:
        kept: tokens at either end of a longer text, see `kept_ends`: the example cuts where the tokenizer does not.

    Raises:
        UserError: they differ.
    """
    from tokenizers import Tokenizer

    written = Tokenizer.from_file(str(path))
    for sentence, row, expected in zip(sentences, written.encode_batch(sentences), ids, strict=True):
        real = [token for token, mask in zip(row.ids, row.attention_mask, strict=True) if mask]
        if len(real) > sum(kept):
            real = real[:kept[0]] + real[-kept[1]:]
        if real != expected:
            raise UserError(f"{TOKENIZER_FILE} makes other tokens of {str(sentence)[:60]!r} than the run's tokenizer; "
                            "nothing was written")


# ---------------------------------------------------------------- 8-bit weights

def quantize(source: Path, path: Path, kinds: list[str], excluded: list[str], per_channel: bool = False) -> None:
    """Writes a float32 file with 8-bit weights. Activations are quantised at run time.

    Args:
        kinds: of the nodes whose weights become 8-bit.
        excluded: names of nodes that stay float32.
        per_channel: give each output of a matmul a scale of its own.
    """
    quantization = require("onnxruntime.quantization")
    # onnxruntime's advice is about the preparation of graphs that another program traced.
    logging.disable(logging.WARNING)
    try:
        # Unsigned weights, since matmuls of unsigned with signed bytes overflow on CPUs without VNNI.
        quantization.quantize_dynamic(source, path, op_types_to_quantize=kinds, nodes_to_exclude=excluded,
                                      per_channel=per_channel, weight_type=quantization.QuantType.QUInt8,
                                      use_external_data_format=megabytes(source) > 4 * LARGEST / 1e6)
    finally:
        logging.disable(logging.NOTSET)


def _parts(path: Path) -> list[Path]:
    """Returns an ONNX file and, where its weights are too many for one file, the one next to it."""
    return [part for part in (path, path.with_name(f"{path.name}.data")) if part.exists()]


def megabytes(path: Path) -> float:
    """Returns the size of an ONNX file with its weights in MB (10^6 bytes)."""
    return sum(part.stat().st_size for part in _parts(path)) / 1e6


# ---------------------------------------------------------------- answers

def session(path: Path, threads: int | None = None):
    """Opens an onnxruntime session on the CPU, with a fixed number of threads if given."""
    onnxruntime = require("onnxruntime")
    options = onnxruntime.SessionOptions()
    if threads:
        options.intra_op_num_threads = options.inter_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def padded(ids: list[list[int]], batch_size: int = BATCH) -> list[dict[str, np.ndarray]]:
    """Returns token ids as the graph's inputs, right-padded, batch by batch in the given order."""
    batches = []
    for start in range(0, len(ids), batch_size):
        rows = ids[start:start + batch_size]
        input_ids, mask = (np.zeros((len(rows), max(map(len, rows))), dtype=np.int64) for _ in range(2))
        for i, row in enumerate(rows):
            input_ids[i, :len(row)], mask[i, :len(row)] = row, 1
        batches.append({"input_ids": input_ids, "attention_mask": mask})
    return batches


def by_batches(compute: Callable[[dict[str, np.ndarray]], np.ndarray], ids: list[list[int]], batch_size: int = BATCH
               ) -> np.ndarray:
    """Computes logits (N, classes) of token ids in batches of about equal length; `compute` answers a batch."""
    # Sorted by length: few pads in a batch.
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    batches = padded([ids[row] for row in order], batch_size)
    logits = np.concatenate([compute(inputs) for inputs in Bar(batches, desc="checking", unit="batch", dynamic_ncols=True,
                                                                delay=2, leave=False)])
    return logits[np.argsort(order)]


def onnx_logits(session, ids: list[list[int]], batch_size: int = BATCH) -> np.ndarray:
    """Computes logits (N, classes) of token ids by onnxruntime."""
    return by_batches(lambda inputs: session.run(["logits"], inputs)[0], ids, batch_size)


def largest_difference(logits: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest difference of logits, relative where they are large; NaN if one is not finite."""
    return float(np.abs(logits - expected).max() / max(1.0, np.abs(expected).max()))
