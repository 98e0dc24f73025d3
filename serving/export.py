"""A student as an ONNX file that needs neither PyTorch nor this project.

    python run.py export runs/distil-12345 --out student --int8

The graph is written with ONNX's own LSTM and GRU. Their `sequence_lens` stands for PyTorch's packing: the backward direction
begins at a sentence's last real token. A minGRU, which ONNX lacks, is a Scan over time.
"""
from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import data_utils
from data_utils import Split
from machine.errors import UserError
from model import DistilRNN
from record.files import new_folder, write_file, write_json
from serving import answers
from serving.merge import kept_ends, scale_logits
from serving.packages import require
from serving.texts import Reading

OPSET, IR_VERSION = 17, 8  # read by onnxruntime 1.14 (of 2023) and newer
BATCH = 32  # sentences
TOLERANCE = 1e-5  # of float32 logits, absolute where they are small, relative where they are large
MODEL_FILE, TOKENIZER_FILE, LABELS_FILE, EXAMPLE_FILE = "student.onnx", "tokenizer.json", "labels.json", "example.py"
# PyTorch stacks an LSTM's gates as input, forget, cell, output and a GRU's as reset, update, new; ONNX as input, output,
# forget, cell and as update, reset, new. https://onnx.ai/onnx/operators/onnx__LSTM.html
GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}
EXAMPLE = '''"""Classifies sentences with the exported student: python example.py "A sentence." "Another one."

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
session = onnxruntime.InferenceSession(here / "student.onnx", providers=["CPUExecutionProvider"])
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


# ---------------------------------------------------------------- the graph

def onnx_model(student: DistilRNN):
    """Builds an ONNX model: input_ids, attention_mask (batch, length) int64 -> logits (batch, labels) float32.

    Raises:
        UserError: the package onnx is not installed.
    """
    onnx = require("onnx")
    helper, numpy_helper, types = require("onnx.helper"), require("onnx.numpy_helper"), onnx.TensorProto
    config, weights, nodes = student.config, [], []

    def constant(name: str, value) -> str:
        weights.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(kind: str, inputs: list[str], output: str, unused: tuple[str, ...] = (), **attributes) -> str:
        # `unused` outputs come before the one that is read.
        nodes.append(helper.make_node(kind, inputs, [*unused, output], name=output, **attributes))
        return output

    # Embed the tokens: with a vocabulary of the student's own the ids lead to rows of the table first.
    rows = "input_ids"
    if student.embedding.rows is not None:
        rows = node("Gather", [constant("rows", student.embedding.rows.cpu().numpy()), rows], "row_of_token")
    # (B, T, E), or with pieces (B, T, 2, E); a frozen copy's vectors stand next to the trained ones.
    embedded = node("Gather", [constant("embedding", _array(student.embedding.weight)), rows], "embedded")
    if student.embedding.frozen is not None:
        frozen = node("Gather", [constant("frozen", _array(student.embedding.frozen)), rows], "embedded_frozen")
        embedded = node("Concat", [embedded, frozen], "both_embeddings", axis=-1)
    if config.vocabulary and config.rare_tokens == "pieces":
        embedded = node("ReduceMean", [embedded], "mean_of_pieces", axes=[2], keepdims=0)
    # Count each sentence's tokens: the mask is 1 at a real token.
    axis_1, axis_2 = constant("axis_1", np.array([1])), constant("axis_2", np.array([2]))
    lengths = node("ReduceSum", ["attention_mask", axis_1], "lengths", keepdims=0)  # (B,)
    lengths = node("Cast", [lengths], "sequence_lens", to=types.INT32)
    # ONNX's recurrent layers take time first.
    states = node("Transpose", [embedded], "time_first", perm=[1, 0, 2])  # (T, B, E)
    shape = constant("all_directions", np.array([0, 0, config.directions * config.hidden_size]))
    if config.cell == "mingru":
        states = _mingru(student, states, constant, node)  # (T, B, DH)
    for layer in range(config.rnn_layers if config.cell in GATES else 0):
        matrices = [constant(f"{part}_{layer}", value) for part, value in zip("WRB", _gates(student, layer), strict=True)]
        # PyTorch's GRU applies the reset gate after the matmul of the hidden state, ONNX's by default before it.
        more = {"linear_before_reset": 1} if config.cell == "gru" else {}
        nodes.append(helper.make_node(config.cell.upper(), [states, *matrices, lengths], [f"directions_{layer}"],
                                      name=f"rnn_{layer}", hidden_size=config.hidden_size,
                                      direction={1: "forward", 2: "bidirectional"}[config.directions], **more))
        states = node("Transpose", [f"directions_{layer}"], f"side_by_side_{layer}", perm=[0, 2, 1, 3])  # (T, B, D, H)
        states = node("Reshape", [states, shape], f"states_{layer}")  # (T, B, DH)
    states = node("Transpose", [states], "batch_first", perm=[1, 0, 2])  # (B, T, DH)
    # Pool the states of real tokens alone: pads become the neutral element of the sum or of the maximum.
    mask = node("Unsqueeze", [node("Cast", ["attention_mask"], "real", to=types.BOOL), axis_2], "mask")  # (B, T, 1)
    outside = constant("outside", np.array(0.0 if config.pooling == "mean" else -np.inf, dtype=np.float32))
    scores = states
    if config.pooling == "attention":
        scores = node("MatMul", [states, constant("attention", _array(student.attention.weight.T))], "scores")  # (B, T, 1)
    masked = node("Where", [mask, scores, outside], "masked")
    if config.pooling == "max":
        pooled = node("ReduceMax", [masked], "pooled", axes=[1], keepdims=0)  # (B, DH)
    elif config.pooling == "attention":
        weighted = node("Mul", [node("Softmax", [masked], "weights", axis=1), states], "weighted")
        pooled = node("ReduceSum", [weighted, axis_1], "pooled", keepdims=0)
    else:
        total = node("ReduceSum", [masked, axis_1], "total", keepdims=0)
        count = node("Unsqueeze", [node("Cast", [lengths], "counts", to=types.FLOAT), axis_1], "count")  # (B, 1)
        pooled = node("Div", [total, count], "pooled")
    node("Gemm", [pooled, constant("classifier", _array(student.classifier.weight)),
                  constant("classifier_bias", _array(student.classifier.bias))], "logits", transB=1)
    inputs = [helper.make_tensor_value_info(name, types.INT64, ["batch", "length"])
              for name in ("input_ids", "attention_mask")]
    outputs = [helper.make_tensor_value_info("logits", types.FLOAT, ["batch", config.num_labels])]
    model = helper.make_model(helper.make_graph(nodes, "DistilRNN", inputs, outputs, weights),
                              opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return model


def _array(value: torch.Tensor) -> np.ndarray:
    return value.detach().cpu().float().numpy()


def _gates(student: DistilRNN, layer: int) -> tuple[np.ndarray, ...]:
    """Returns a layer's W (D, gates x H, in), R (D, gates x H, H) and B (D, 2 x gates x H), gates in ONNX's order."""
    order = GATES[student.config.cell]

    def ordered(name: str) -> np.ndarray:
        pieces = np.split(_array(getattr(student.rnn, name)), len(order))
        return np.concatenate([pieces[gate] for gate in order])

    W, R, B = [], [], []
    for direction in ("", "_reverse")[:student.config.directions]:
        suffix = f"l{layer}{direction}"
        W.append(ordered(f"weight_ih_{suffix}"))
        R.append(ordered(f"weight_hh_{suffix}"))
        B.append(np.concatenate([ordered(f"bias_ih_{suffix}"), ordered(f"bias_hh_{suffix}")]))
    return np.stack(W), np.stack(R), np.stack(B)


def _mingru(student: DistilRNN, states: str, constant: Callable, node: Callable) -> str:
    """Adds the layers of a minGRU to a graph (layers.py): vectors (T, B, E) -> the name of its states (T, B, DH).

    Args:
        constant, node: add a constant and a node to the graph, and return its name.
    """
    helper, types, size = require("onnx.helper"), require("onnx").TensorProto, student.config.hidden_size
    # One step of the recurrence: h = keep h + new.
    pair = [helper.make_tensor_value_info(name, types.FLOAT, ["batch", size]) for name in ("h", "keep", "new")]
    out = [helper.make_tensor_value_info(name, types.FLOAT, ["batch", size]) for name in ("h_next", "h_now")]
    body = helper.make_graph([helper.make_node("Mul", ["h", "keep"], ["kept"]),
                              helper.make_node("Add", ["kept", "new"], ["h_next"]),
                              helper.make_node("Identity", ["h_next"], ["h_now"])], "step", pair, out)
    start = node("Concat", [node("Shape", ["sequence_lens"], "batch_size"), constant("hidden_size", np.array([size]))],
                 "start_shape", axis=0)
    start = node("ConstantOfShape", [start], "start")
    one, zero, half = (constant(name, np.array(value, dtype=np.float32))
                       for name, value in (("one", 1), ("zero", 0), ("half", 0.5)))
    real = node("Transpose", ["attention_mask"], "mask_time_first", perm=[1, 0])
    real = node("Unsqueeze", [node("Cast", [real], "real_steps", to=types.FLOAT), "axis_2"], "real_gate")  # (T, B, 1)
    for layer in range(student.config.rnn_layers):
        # The matmuls of each gate and direction by themselves: the graph needs no cuts.
        parts, linear, found = 2 * student.config.directions, [], []
        weights = np.split(_array(getattr(student.rnn, f"weight_l{layer}")), parts)
        biases = np.split(_array(getattr(student.rnn, f"bias_l{layer}")), parts)
        for part in range(parts):
            name = f"{layer}_{part}"
            product = node("MatMul", [states, constant(f"weight_{name}", weights[part].T)], f"matmul_{name}")
            linear.append(node("Add", [product, constant(f"bias_{name}", biases[part])], f"linear_{name}"))
        for direction in range(student.config.directions):
            name, (gate, candidate) = f"{layer}_{direction}", linear[2 * direction:2 * direction + 2]
            # A gate of zero at the pads keeps the state as it is.
            gate = node("Mul", [node("Sigmoid", [gate], f"sigmoid_{name}"), real], f"gate_{name}")
            keep = node("Sub", [one, gate], f"keep_{name}")
            candidate = node("Where", [node("GreaterOrEqual", [candidate, zero], f"positive_{name}"),
                                       node("Add", [candidate, half], f"above_{name}"),
                                       node("Sigmoid", [candidate], f"below_{name}")], f"candidate_{name}")
            new = node("Mul", [gate, candidate], f"new_{name}")
            found.append(node("Scan", [start, keep, new], f"scan_{name}", (f"last_{name}",), body=body, num_scan_inputs=2,
                              scan_input_directions=[direction] * 2, scan_output_directions=[direction]))
        states = node("Concat", found, f"states_{layer}", axis=2)
    return states


def write_int8(model, path: Path) -> None:
    """Writes the model with 8-bit weights: embedding table, and LSTM or minGRU. Activations are quantised at run time.

    Attention and classifier, a few hundred numbers, stay float32, and so does a GRU: onnxruntime has no 8-bit GRU.
    """
    quantization = require("onnxruntime.quantization")
    # onnxruntime's advice is about traced graphs, not about one that was built by hand.
    logging.disable(logging.WARNING)
    try:
        # Unsigned weights, since matmuls of unsigned with signed bytes overflow on CPUs without VNNI.
        quantization.quantize_dynamic(model, path, op_types_to_quantize=["Gather", "LSTM", "MatMul"],
                                      nodes_to_exclude=["scores"], weight_type=quantization.QuantType.QUInt8)
    finally:
        logging.disable(logging.NOTSET)


# ---------------------------------------------------------------- the folder

def write_student(student: DistilRNN, tokenizer, reading: Reading, rows: Split, labelled: bool, out: Path, *,
                  int8: bool = False, say: Callable[[str], None] = print) -> None:
    """Writes student.onnx, tokenizer.json, labels.json and example.py into a new folder, checked or not at all.

    Args:
        student: on the CPU, in evaluation mode. Its logits are divided by the temperature.
        reading: the classes, the way the run cut long texts, and its calibration.
        rows: real sentences; onnxruntime and PyTorch have to agree on them.
        labelled: whether the labels of `rows` are real; the cost of int8 is told in accuracy and MCC then.
        out: must not exist yet, or be empty.
        int8: whether student.onnx gets 8-bit weights.

    Raises:
        UserError: a package is missing, the folder is not new, or the file does not give PyTorch's logits.
    """
    scale_logits(student.classifier, reading.calibration.temperature)
    model = onnx_model(student)
    require("onnxruntime")
    ids = data_utils.encode(tokenizer, rows.sentences, reading.max_length, reading.truncate)
    expected = _torch_logits(student, ids)
    with new_folder(out) as folder:
        portable = portable_tokenizer(tokenizer, reading.max_length, reading.truncate)
        write_file(folder / TOKENIZER_FILE, portable.to_str(pretty=True))
        if reading.truncate == "middle":
            say("  tokenizer.json cuts no text, because it has no way to cut the middle; example.py does, as the run did")
        _check_tokenizer(folder / TOKENIZER_FILE, answers.texts_of(tokenizer, rows.sentences), ids,
                         kept_ends(tokenizer, reading.max_length))
        write_file(folder / MODEL_FILE, model.SerializeToString())
        # The float32 file is checked even where int8 replaces it: a wrong graph must not pass for a cost of int8.
        logits = onnx_logits(session(folder / MODEL_FILE), ids)
        difference = float(np.abs(logits - expected).max() / max(1.0, np.abs(expected).max()))
        if not difference <= TOLERANCE:
            raise UserError(f"{out}: onnxruntime's logits differ from PyTorch's by {difference:.1e}; expected at most "
                            f"{TOLERANCE:.0e}; nothing was written")
        say(f"  onnxruntime's logits equal PyTorch's on {len(ids):,} sentences (largest difference {difference:.1e})")
        if int8:
            size = (folder / MODEL_FILE).stat().st_size
            write_int8(model, folder / MODEL_FILE)
            cost = answers.cost(reading.problem, logits, onnx_logits(session(folder / MODEL_FILE), ids),
                                rows.labels if labelled else None)
            say(f"  int8: {(folder / MODEL_FILE).stat().st_size / 1e6:.2f} MB (float32: {size / 1e6:.2f} MB), {cost}")
        write_json(folder / LABELS_FILE, list(reading.classes))
        write_file(folder / EXAMPLE_FILE, example(tokenizer, reading))


def example(tokenizer, reading: Reading) -> str:
    """Returns the program that classifies sentences with the exported files, as the run reads them and chooses a class."""
    rule, choice = reading.calibration, "row.argmax()"
    if rule.threshold is not None:
        choice = f"{rule.positive} if row[{rule.positive}] >= {rule.threshold!r} else {1 - rule.positive}  # calibrated"
    own, texts = answers.texts_in_example(tokenizer)
    text = EXAMPLE.replace("OWN", own).replace("TEXTS", texts)
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


def onnx_logits(session, ids: list[list[int]], batch_size: int = BATCH) -> np.ndarray:
    """Computes logits (N, labels) of token ids by onnxruntime."""
    return np.concatenate([session.run(["logits"], inputs)[0] for inputs in padded(ids, batch_size)])


@torch.inference_mode()
def _torch_logits(student: DistilRNN, ids: list[list[int]]) -> np.ndarray:
    return np.concatenate([student(torch.from_numpy(inputs["input_ids"]), torch.from_numpy(inputs["attention_mask"])).numpy()
                           for inputs in padded(ids)])
